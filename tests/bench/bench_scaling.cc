// SPDX-License-Identifier: Apache-2.0
//
// What a token costs as the work grows: a whole compress through the pipeline (segmentation, then
// scoring, selection and gather of every layer, no receipt), one layer of 8K to 512K tokens, and 1
// to 32 layers of 32K. A row's ceiling is the median of its sweep: flat means a share near 1. On
// CUDA every length also waits for the host once a layer, where kept tokens are read back.
//
//     bench_scaling [SECONDS]      about so long a size (1)
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "server/cpu/cpu_backend.h"
#include "tests/bench/layer_input.h"
#include "tests/bench/report.h"
#ifdef DYNSPLIT_HAVE_CUDA
#include "cuda/cuda_backend.h"
#endif

namespace dynsplit::bench {
namespace {

constexpr int64_t kLengths[] = {8192, 16384, 32768, 65536, 131072, 262144, 524288};
constexpr int32_t kLayerCounts[] = {1, 2, 4, 8, 16, 32};
constexpr int64_t kLayersLength = 32768;
constexpr const char* kFlat = "share >= 0.85";

struct Size {
  std::string name;  // "T=8192", "layers=4"
  int64_t num_tokens = 0;
  int32_t num_layers = 1;
  double seconds = 0;  // of one compress
};

double Seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

class Sweep {
 public:
  Sweep(std::string backend_name, Backend& backend, double seconds_per_size)
      : name_(std::move(backend_name)),
        backend_(backend),
        stream_(Check(backend.CreateStream())),
        budget_(seconds_per_size) {}

  void Lengths() {
    std::vector<Size> sizes;
    for (const int64_t length : kLengths) {
      sizes.push_back({"T=" + std::to_string(length), length, 1, 0});
    }
    // Small inputs rotate through as much memory as large ones: none stays in a cache.
    for (Size& size : sizes) {
      const LayerInput input(backend_, *stream_, size.num_tokens,
                             static_cast<int32_t>(std::max<int64_t>(1, 131072 / size.num_tokens)));
      Measure(input, size);
    }
    ReportAll(sizes);
  }

  void Layers() {
    const LayerInput input(backend_, *stream_, kLayersLength, 4);
    std::vector<Size> sizes;
    for (const int32_t layers : kLayerCounts) {
      sizes.push_back({"layers=" + std::to_string(layers), kLayersLength, layers, 0});
      Measure(input, sizes.back());
    }
    ReportAll(sizes);
  }

 private:
  // The fastest of at least three: neighbours on the machine only ever add time.
  void Measure(const LayerInput& input, Size& size) const {
    const auto run = [&] { input.Compress("dynsplit", size.num_layers); };
    run();
    double spent = 0;
    for (int i = 0; i < 3 || spent < budget_; ++i) {
      const double seconds = Seconds(run);
      size.seconds = i == 0 ? seconds : std::min(size.seconds, seconds);
      spent += seconds;
    }
  }

  void ReportAll(const std::vector<Size>& sizes) const {
    std::vector<double> costs;
    for (const Size& size : sizes) costs.push_back(NsPerToken(size));
    std::vector<double> sorted = costs;
    std::sort(sorted.begin(), sorted.end());
    const size_t middle = sorted.size() / 2;
    const double median =
        sorted.size() % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
    for (size_t i = 0; i < sizes.size(); ++i) {
      Report(Cost("scaling/" + name_ + "/" + sizes[i].name, costs[i], "ns/token", median, kFlat));
    }
  }
  static double NsPerToken(const Size& size) {
    return 1e9 * size.seconds / static_cast<double>(size.num_tokens * size.num_layers);
  }

  const std::string name_;
  Backend& backend_;
  const std::unique_ptr<Stream> stream_;
  const double budget_;
};

void Run(const std::string& name, Backend& backend, double seconds_per_size) {
  Sweep sweep(name, backend, seconds_per_size);
  sweep.Lengths();
  sweep.Layers();
}

}  // namespace
}  // namespace dynsplit::bench

// bench_scaling [SECONDS [BACKEND]]: seconds a row at least; cpu, cuda, or both
int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 1;
  const std::string_view only = argc > 2 ? argv[2] : "";
  using dynsplit::bench::Check;
  if (only.empty() || only == "cpu") {
    dynsplit::bench::Run("cpu", *Check(dynsplit::CreateCpuBackend({.num_threads = 2})), seconds);
  }
#ifdef DYNSPLIT_HAVE_CUDA
  if (only != "cpu" && dynsplit::CudaDeviceCount() > 0) {
    dynsplit::bench::Run("cuda", *Check(dynsplit::CreateCudaBackend({})), seconds);
  }
#endif
  return 0;
}

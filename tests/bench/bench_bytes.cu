// SPDX-License-Identifier: Apache-2.0
//
// The operations that memory bounds, on one layer of Llama-3.1-8B's shape (32 query heads, 8 KV
// heads, D 128, bf16), against the copy and read rates of the same run. Floors count each input
// byte read once and each output byte written once. Inputs come from memory: they rotate through
// more than the L2 cache holds, behind a read that flushes it.
#include <algorithm>
#include <array>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cuda/operations.h"
#include "tests/bench/device_bench.h"
#include "tests/bench/report.h"
#include "tests/oracle/random_tensors.h"

namespace dynsplit::bench {
namespace {

using Format = EncodingPolicy::Format;

constexpr int kQueryHeads = 32;
constexpr int kHeads = 8;
constexpr int kDim = 128;
constexpr int kWindow = 64;
constexpr int kPageSize = 16;
constexpr int kRowBytes = kDim * 2;
constexpr int64_t kTokenBytes = int64_t{kHeads} * kRowBytes;
constexpr int64_t kRotatedBytes = int64_t{512} << 20;  // inputs of one kind, at least
constexpr double kMaxKept = 0.5;
constexpr double kReceiptKept = 0.2;

struct GatherCase {
  std::string name;
  Format format = Format::kAsIs;
  ScaleGranularity granularity = ScaleGranularity::kHead;
  bool turned = false;  // the keys
  std::string target{};
};

class BytesBench {
 public:
  BytesBench(const Device& device, const Ceilings& ceilings, RandomSource& random,
             int64_t num_tokens)
      : device_(device), ceilings_(ceilings), timer_(device), num_tokens_(num_tokens) {
    const int64_t bytes = num_tokens * kTokenBytes;
    const auto num_sets = std::max<int64_t>(2, (kRotatedBytes + bytes - 1) / bytes);
    for (int64_t i = 0; i < num_sets; ++i) {
      keys_.push_back(random.Make(bytes));
      values_.push_back(random.Make(bytes));
    }
    queries_ = random.Make(int64_t{kWindow} * kQueryHeads * kRowBytes);
    const oracle::ParityShape shape = {.name = "bench", .num_tokens = num_tokens};
    block_starts_ = oracle::RandomBlockStarts(shape, 1);
    starts_ = Upload(device, block_starts_);
    const int64_t summary_bytes = num_blocks() * kTokenBytes;
    min_ = device.Allocate(summary_bytes);
    max_ = device.Allocate(summary_bytes);
    const int64_t slots = NumSlots(NumKept(kMaxKept));
    key_pages_ = device.Allocate(slots * kTokenBytes);
    value_pages_ = device.Allocate(slots * kTokenBytes);
    key_scales_ = device.Allocate(slots * kHeads * 4);
    value_scales_ = device.Allocate(slots * kHeads * 4);
    found_ = device.Allocate(64);
    losses_ = device.Allocate(3 * kQueryHeads * 4);
    const oracle::HostRotation rotation =
        oracle::MakeRotation(num_tokens, kDim, /*interleaved=*/false);
    coarse_ = Upload(device, rotation.coarse);
    fine_ = Upload(device, rotation.fine);
  }

  void Run() {
    for (const bool per_head : {false, true}) {
      for (const double kept : {0.1, 0.2, 0.5}) {
        Keep(kept, per_head);
        RunGather({.name = "gather as is", .target = "share >= 0.90"});
      }
      Keep(0.2, per_head);
      RunGather({.name = "gather fp8 per head",
                 .format = Format::kFloat8E4M3,
                 .target = "share >= 0.60"});
      RunGather({.name = "gather fp8 per token",
                 .format = Format::kFloat8E4M3,
                 .granularity = ScaleGranularity::kTokenHead,
                 .target = "share >= 0.80"});
      RunGather({.name = "gather int8 per token",
                 .format = Format::kInt8,
                 .granularity = ScaleGranularity::kTokenHead,
                 .target = "share >= 0.80"});
      RunGather({.name = "gather as is, keys turned", .turned = true});
      RunGather({.name = "gather fp8 per token, keys turned",
                 .format = Format::kFloat8E4M3,
                 .granularity = ScaleGranularity::kTokenHead,
                 .turned = true});
    }
    const auto layer_bytes = static_cast<double>(num_tokens_ * kTokenBytes);
    ReportTime("check_finite K+V", 2 * layer_bytes, ceilings_.read_gbps, "share >= 0.90",
               [&](int i) { CheckFinite(i); });
    const double summary_bytes = 2.0 * static_cast<double>(num_blocks() * kTokenBytes);
    ReportTime("summaries min/max", layer_bytes + summary_bytes, ceilings_.copy_gbps,
               "share >= 0.85", [&](int i) { Summarize(i); });
    RunReceipt();
  }

 private:
  size_t Set(int i) const { return static_cast<size_t>(i) % keys_.size(); }
  int64_t num_blocks() const { return static_cast<int64_t>(block_starts_.size()) - 1; }
  int64_t NumKept(double ratio) const {
    return static_cast<int64_t>(ratio * static_cast<double>(num_tokens_));
  }
  static int64_t NumSlots(int64_t num_kept) {
    return (num_kept + kPageSize - 1) / kPageSize * kPageSize;
  }
  TensorView Layer(const Buffer& data) const {
    return DenseView(data.data(), DType::kBFloat16, num_tokens_, kHeads, kDim);
  }

  // Whole blocks in random order, as a selection keeps them; the last gives its leading tokens.
  void Keep(double ratio, bool per_head) {
    num_kept_ = NumKept(ratio);
    groups_ = per_head ? kHeads : 1;
    kept_name_ = std::to_string(static_cast<int>(ratio * 100 + 0.5)) + " % kept" +
                 (per_head ? " per head" : "");
    oracle::Random random(3);
    std::vector<int32_t> kept;
    for (int group = 0; group < groups_; ++group) {
      std::vector<int64_t> order(static_cast<size_t>(num_blocks()));
      for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
      for (size_t i = order.size() - 1; i > 0; --i) {
        std::swap(order[i], order[static_cast<size_t>(random.Between(0, static_cast<int64_t>(i)))]);
      }
      std::vector<int32_t> tokens;
      for (const int64_t block : order) {
        const auto at = static_cast<size_t>(block);
        for (int32_t t = block_starts_[at]; t < block_starts_[at + 1]; ++t) {
          if (static_cast<int64_t>(tokens.size()) < num_kept_) tokens.push_back(t);
        }
      }
      std::sort(tokens.begin(), tokens.end());
      kept.insert(kept.end(), tokens.begin(), tokens.end());
    }
    kept_ = Upload(device_, kept);
  }

  GatherPagesItem Item(const GatherCase& test, const Buffer& source, bool keys) const {
    const bool encoded = test.format != Format::kAsIs;
    GatherPagesItem item;
    item.source = Layer(source);
    item.kept = kept_.as<int32_t>();
    item.groups = groups_;
    item.num_kept = num_kept_;
    item.page_size = kPageSize;
    item.format = test.format;
    item.scale_granularity = test.granularity;
    item.out_dtype = OutputDType(DType::kBFloat16, test.format, false);
    if (keys && test.turned) {
      item.rotation = {
          .coarse = coarse_.as<float>(), .fine = fine_.as<float>(), .rotary_dim = kDim};
    }
    item.pages = (keys ? key_pages_ : value_pages_).data();
    if (encoded) item.scales = (keys ? key_scales_ : value_scales_).as<float>();
    return item;
  }
  void Gather(const GatherCase& test, int i) const {
    const std::array<GatherPagesItem, 2> items = {Item(test, keys_[Set(i)], true),
                                                  Item(test, values_[Set(i)], false)};
    Check(kernels::GatherPages({.items = items}, device_.launch));
  }
  void RunGather(const GatherCase& test) {
    const bool encoded = test.format != Format::kAsIs;
    const auto read = static_cast<double>(num_kept_ * kTokenBytes);
    double written = encoded ? read / 2 : read;
    if (encoded && test.granularity == ScaleGranularity::kTokenHead) {
      written += static_cast<double>(num_kept_ * kHeads * 4);
    }
    ReportTime(test.name + " K+V, " + kept_name_, 2 * (read + written), ceilings_.copy_gbps,
               test.target, [&](int i) { Gather(test, i); });
  }

  void CheckFinite(int i) const {
    const std::array<CheckFiniteItem, 2> items = {
        CheckFiniteItem{.tensor = Layer(keys_[Set(i)]), .first_bad_token = found_.as<int32_t>()},
        CheckFiniteItem{.tensor = Layer(values_[Set(i)]),
                        .first_bad_token = found_.as<int32_t>() + 1}};
    Check(kernels::CheckFinite({.items = items}, device_.launch));
  }

  void Summarize(int i) const {
    Check(kernels::SummarizeBlocks({.keys = Layer(keys_[Set(i)]),
                                    .block_starts = starts_.as<int32_t>(),
                                    .num_blocks = num_blocks(),
                                    .summaries = DenseSummaries(DType::kBFloat16, kHeads, kDim,
                                                                min_.data(), max_.data(), nullptr)},
                                   device_.launch));
  }

  // The floor is what its bytes take; its arithmetic takes longer.
  void RunReceipt() {
    Keep(kReceiptKept, /*per_head=*/true);
    Gather({.name = "receipt"}, 0);
    MeasureAttentionParams params;
    params.queries = DenseView(queries_.data(), DType::kBFloat16, kWindow, kQueryHeads, kDim);
    params.kept_keys = DenseView(key_pages_.data(), DType::kBFloat16, num_kept_, kHeads, kDim);
    params.kept_values = DenseView(value_pages_.data(), DType::kBFloat16, num_kept_, kHeads, kDim);
    params.kept = kept_.as<int32_t>();
    params.groups = groups_;
    params.num_kept = num_kept_;
    params.softmax_scale = 0.08838835F;  // 1 / sqrt(128)
    params.mass = losses_.as<float>();
    params.err_sq = params.mass + kQueryHeads;
    params.ref_sq = params.err_sq + kQueryHeads;
    const auto layer_bytes = static_cast<double>(num_tokens_ * kTokenBytes);
    const auto kept_bytes = static_cast<double>(num_kept_ * kTokenBytes);
    ReportTime("measure_attention", 2 * (layer_bytes + kept_bytes), ceilings_.read_gbps, "",
               [&](int i) {
                 params.keys = Layer(keys_[Set(i)]);
                 params.values = Layer(values_[Set(i)]);
                 Check(kernels::MeasureAttention(params, device_.launch));
               });
  }

  void ReportTime(const std::string& name, double bytes, double gbps, const std::string& target,
                  const std::function<void(int)>& run) {
    const double us = 1e3 * timer_.Time(run);
    Report(Cost("cuda/" + name + ", T=" + std::to_string(num_tokens_), us, "us", bytes / gbps / 1e3,
                target));
  }

  const Device& device_;
  const Ceilings ceilings_;
  const ColdTimer timer_;
  const int64_t num_tokens_;
  int64_t num_kept_ = 0;
  int groups_ = 1;
  std::string kept_name_;
  std::vector<int32_t> block_starts_;
  std::vector<Buffer> keys_, values_;
  Buffer queries_, starts_, min_, max_, kept_, key_pages_, value_pages_, key_scales_, value_scales_,
      found_, losses_, coarse_, fine_;
};

void Main() {
  const Device device = OpenDevice();
  const Ceilings ceilings = MeasureCeilings(device);
  RandomSource random(device);
  for (const int64_t num_tokens : {32768, 131072}) {
    BytesBench(device, ceilings, random, num_tokens).Run();
    Check(cudaStreamSynchronize(device.launch.stream));
  }
}

}  // namespace
}  // namespace dynsplit::bench

int main() { dynsplit::bench::Main(); }

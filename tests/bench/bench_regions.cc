// SPDX-License-Identifier: Apache-2.0
//
// Requests whose tensors and results lie in memory that client and server share, through a running
// dynsplitd, RPC included, beside a ceiling of the same run. Llama-3.1-8B's shape, bf16, random.
//
//   --kind shm       streamingllm of --gib GiB in system shared memory. Ceiling: copying from
//                    pinned memory to the device (memcpy where the server has none).
//   --kind cuda-ipc  dynsplit, 20 %, 64 window queries with their log-sum-exp, in this process's
//                    device memory. Floor: the sum of the operations' own times, which the same
//                    pipeline runs here on the same tensors, each operation several times in a row.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#ifdef DYNSPLIT_HAVE_CUDA
#include <cuda_runtime_api.h>

#include "cuda/cuda_backend.h"
#endif
#include "client/cpp/client.h"
#include "client/cpp/shared_memory.h"
#include "proto/wire/channel.h"
#include "server/pipeline/compress.h"
#include "server/rpc/policy_adapter.h"
#include "server/runtime/profiles.h"
#include "tests/bench/report.h"
#include "tests/oracle/wrapped_backend.h"

namespace dynsplit::bench {
namespace {

constexpr int32_t kQueryHeads = 32;
constexpr int32_t kHeads = 8;
constexpr int32_t kDim = 128;
constexpr int64_t kElementBytes = 2;
constexpr int64_t kRowBytes = kHeads * kDim * kElementBytes;  // of K or V of a token
constexpr int64_t kWindow = 64;
constexpr int64_t kAlignment = 256;
constexpr int32_t kVocabulary = 49152;
constexpr const char* kProfile = "smollm2_table7";
constexpr int64_t kStreamingKept = 1024;  // tokens of the shm request's small result
constexpr int64_t kTinyTokens = 256;
constexpr int kTinyCalls = 50;

struct Arguments {
  std::string target;
  std::string kind = "shm";
  double gib = 8;
  int64_t tokens = 131072;
  int32_t layers = 32;
  int32_t repeats = 5;
};

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}
void Check(const absl::Status& status) {
  if (!status.ok()) Fail(status.ToString());
}
template <typename T>
T Check(absl::StatusOr<T> value) {
  Check(value.status());
  return *std::move(value);
}

double Seconds(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Normal values, repeated from a block: enough that no two layers are alike at any token.
std::vector<uint16_t> RandomBlock() {
  constexpr size_t kValues = (size_t{1} << 22) + 8 * kDim;
  std::mt19937_64 engine(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> values(kValues);
  for (uint16_t& value : values) {
    const float number = normal(engine);
    uint32_t bits = 0;
    std::memcpy(&bits, &number, sizeof(bits));
    value = static_cast<uint16_t>(bits >> 16U);
  }
  return values;
}

// ---- memory that both sides see -----------------------------------------------------------------

class Memory {
 public:
  virtual ~Memory() = default;
  virtual std::byte* data() const = 0;
  virtual int64_t size_bytes() const = 0;
  virtual v1::RegisterRegionRequest Registration(const std::string& name, bool writable) const = 0;
  virtual void Write(int64_t offset, const void* from, int64_t size) = 0;
  // Host copy of what lies there.
  virtual std::string Read(int64_t offset, int64_t size) const = 0;

  void FillRandom(const std::vector<uint16_t>& block) {
    const auto bytes = static_cast<int64_t>(block.size()) * kElementBytes;
    for (int64_t at = 0; at < size_bytes(); at += bytes) {
      Write(at, block.data(), std::min(bytes, size_bytes() - at));
    }
  }
};

class HostMemory final : public Memory {
 public:
  explicit HostMemory(int64_t size)
      : memory_(Check(SharedMemory::Create(static_cast<size_t>(size)))) {}
  std::byte* data() const override { return memory_->bytes().data(); }
  int64_t size_bytes() const override { return static_cast<int64_t>(memory_->bytes().size()); }
  v1::RegisterRegionRequest Registration(const std::string& name, bool writable) const override {
    return memory_->Registration(name, writable);
  }
  void Write(int64_t offset, const void* from, int64_t size) override {
    std::memcpy(data() + offset, from, static_cast<size_t>(size));
  }
  std::string Read(int64_t offset, int64_t size) const override {
    return {reinterpret_cast<const char*>(data()) + offset, static_cast<size_t>(size)};
  }

 private:
  const std::unique_ptr<SharedMemory> memory_;
};

#ifdef DYNSPLIT_HAVE_CUDA
constexpr int64_t kGranuleBytes = int64_t{2} << 20;  // what an IPC handle shares at least
constexpr int kOperationRuns = 8;

void CheckCuda(cudaError_t error, const char* call) {
  if (error != cudaSuccess) Fail(std::string(call) + ": " + cudaGetErrorString(error));
}

class DeviceMemory final : public Memory {
 public:
  explicit DeviceMemory(int64_t size)
      : size_((size + kGranuleBytes - 1) / kGranuleBytes * kGranuleBytes) {
    void* memory = nullptr;
    CheckCuda(cudaMalloc(&memory, static_cast<size_t>(size_)), "cudaMalloc");
    data_ = static_cast<std::byte*>(memory);
  }
  ~DeviceMemory() override { (void)cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  std::byte* data() const override { return data_; }
  int64_t size_bytes() const override { return size_; }
  v1::RegisterRegionRequest Registration(const std::string& name, bool writable) const override {
    cudaIpcMemHandle_t handle;
    CheckCuda(cudaIpcGetMemHandle(&handle, data_), "cudaIpcGetMemHandle");
    cudaDeviceProp properties;
    CheckCuda(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    v1::RegisterRegionRequest request;
    request.set_name(name);
    request.set_byte_size(size_);
    request.set_writable(writable);
    request.mutable_cuda_ipc()->set_handle(handle.reserved, sizeof(handle.reserved));
    request.mutable_cuda_ipc()->set_device_uuid(properties.uuid.bytes,
                                                sizeof(properties.uuid.bytes));
    return request;
  }
  void Write(int64_t offset, const void* from, int64_t size) override {
    CheckCuda(cudaMemcpy(data_ + offset, from, static_cast<size_t>(size), cudaMemcpyHostToDevice),
              "cudaMemcpy");
  }
  std::string Read(int64_t offset, int64_t size) const override {
    std::string bytes(static_cast<size_t>(size), '\0');
    CheckCuda(cudaMemcpy(bytes.data(), data_ + offset, bytes.size(), cudaMemcpyDeviceToHost),
              "cudaMemcpy");
    return bytes;
  }

 private:
  const int64_t size_;
  std::byte* data_ = nullptr;
};

// GB/s from pinned memory to the device.
double PinnedCopyRate() {
  constexpr size_t kBytes = size_t{1} << 30;
  constexpr int kCopies = 4;
  void* host = nullptr;
  void* device = nullptr;
  cudaStream_t stream = nullptr;
  CheckCuda(cudaMallocHost(&host, kBytes), "cudaMallocHost");
  CheckCuda(cudaMalloc(&device, kBytes), "cudaMalloc");
  CheckCuda(cudaStreamCreate(&stream), "cudaStreamCreate");
  std::memset(host, 1, kBytes);
  std::vector<double> rates;
  for (int round = 0; round < 5; ++round) {
    const double seconds = Seconds([&] {
      for (int i = 0; i < kCopies; ++i) {
        CheckCuda(cudaMemcpyAsync(device, host, kBytes, cudaMemcpyHostToDevice, stream),
                  "cudaMemcpyAsync");
      }
      CheckCuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    });
    rates.push_back(kCopies * static_cast<double>(kBytes) / seconds / 1e9);
  }
  (void)cudaStreamDestroy(stream);
  (void)cudaFree(device);
  (void)cudaFreeHost(host);
  return Median(rates);
}
#endif

// GB/s of one thread copying warm memory.
double HostCopyRate() {
  constexpr size_t kBytes = size_t{256} << 20;
  const std::vector<char> from(kBytes, 1);
  std::vector<char> to(kBytes, 2);
  std::vector<double> rates;
  for (int round = 0; round < 5; ++round) {
    const double seconds = Seconds([&] { std::memcpy(to.data(), from.data(), kBytes); });
    rates.push_back(static_cast<double>(kBytes) / seconds / 1e9);
    if (to[static_cast<size_t>(round)] != 1) Fail("memcpy did not copy");
  }
  return Median(rates);
}

// ---- operations alone ---------------------------------------------------------------------------

// Forwards to a backend and adds up what its operations take: each runs several times in a row, so
// that launching and waiting count for little. Results stay as after one run: none accumulates
// here.
class TimedBackend final : public WrappedBackend {
 public:
  TimedBackend(Backend& inner, int runs) : WrappedBackend(inner), runs_(runs) {}

  const std::map<std::string, double, std::less<>>& seconds() const { return seconds_; }

  absl::Status ReduceRows(const ReduceRowsParams& params, Stream& stream) override {
    if (params.accumulate) Fail("ReduceRows accumulates: it cannot be run twice");
    return WrappedBackend::ReduceRows(params, stream);
  }
  absl::Status RefreshRows(const RefreshRowsParams& /*params*/, Stream& /*stream*/) override {
    return absl::UnimplementedError("RefreshRows changes its input: it cannot be run twice");
  }

 private:
  absl::Status Run(std::string_view operation, Stream& stream,
                   absl::FunctionRef<absl::Status(Stream&)> run) override {
    absl::Status status = run(stream);
    status.Update(stream.Synchronize());
    const double seconds = Seconds([&] {
      for (int i = 0; i < runs_ && status.ok(); ++i) status = run(stream);
      status.Update(stream.Synchronize());
    });
    seconds_[std::string(operation)] += seconds / runs_;
    return status;
  }

  const int runs_;
  std::map<std::string, double, std::less<>> seconds_;
};

// ---- requests -----------------------------------------------------------------------------------

class RegionsBench {
 public:
  explicit RegionsBench(Arguments arguments)
      : arguments_(std::move(arguments)), client_(Check(Client::Connect(arguments_.target))) {}

  void RunShm() {
    layers_ = arguments_.layers;
    tokens_ = static_cast<int64_t>(arguments_.gib * static_cast<double>(int64_t{1} << 30)) /
              (layers_ * 2 * kRowBytes);
    Lay<HostMemory>(layers_ * PlacedLayerBytes(kStreamingKept), /*queries=*/false);
    CompressJob job = Job(tokens_, layers_);
    job.begin.mutable_policy()->set_preset("streamingllm");
    job.begin.mutable_policy()->mutable_budget()->set_tokens_per_head(kStreamingKept);
    const std::string backend = Check(client_->Compress(job)).accepted.backend();  // warms up
    const double before = Ceiling(backend);
    const std::vector<double> times = Times(job, arguments_.repeats);
    const double after = Ceiling(backend);
    const auto bytes = static_cast<double>(2 * layers_ * tokens_ * kRowBytes);
    std::printf("shm: %.2f GiB of K and V, %d layers, %lld tokens, server on %s\n",
                bytes / static_cast<double>(int64_t{1} << 30), layers_,
                static_cast<long long>(tokens_), backend.c_str());
    Report(Rate("regions/shm/" + backend, bytes / Median(times) / 1e9, "GB/s",
                std::max(before, after), "share >= 0.85"));
    ReportTiny("regions/shm/tiny request", "streamingllm");
  }

#ifdef DYNSPLIT_HAVE_CUDA
  void RunCudaIpc() {
    layers_ = arguments_.layers;
    tokens_ = arguments_.tokens;
    const auto kept = static_cast<int64_t>(static_cast<double>(tokens_) * 0.2) + 1024;
    Lay<DeviceMemory>(layers_ * PlacedLayerBytes(kept), /*queries=*/true);
    CompressJob job = Job(tokens_, layers_);
    SetDynSplit(*job.begin.mutable_policy());
    Check(client_->Compress(job));  // warms up
    const std::vector<double> times = Times(job, arguments_.repeats);
    // Whose results are in the region now: where they lie depends on which layer was done first.
    const CompressResult last = Check(client_->Compress(job));
    std::printf("cuda-ipc: %d layers, %lld tokens, %lld kept; server's stages, ms: %s\n", layers_,
                static_cast<long long>(tokens_),
                static_cast<long long>(last.end.plan().layers(0).num_kept_tokens()),
                stages_.c_str());
    const double floor = OperationSeconds(last);
    // As a ratio: the target is on time over the sum of the kernels.
    const double time = Median(times);
    Report(Cost("regions/cuda-ipc/request", 1e3 * time, "ms", 1e3 * floor));
    Report({.name = "regions/cuda-ipc/request over its operations",
            .value = time / floor,
            .unit = "x",
            .ceiling = 1.0,
            .share = floor / time,
            .target = "value <= 1.25",
            .peer = std::nullopt});
    ReportTiny("regions/cuda-ipc/tiny request", "dynsplit");
  }
#endif

 private:
  static int64_t Aligned(int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  // An upper bound of what a layer puts into its room.
  static int64_t PlacedLayerBytes(int64_t kept) {
    constexpr int64_t kPage = 16;
    return 2 * Aligned((kept + kPage) * kRowBytes) + Aligned(kept * kHeads * 4) + Aligned(kept * 4);
  }
  int64_t TensorBytes() const { return tokens_ * kRowBytes; }
  int64_t QueryBytes() const { return kWindow * kQueryHeads * kDim * kElementBytes; }
  int64_t LseBytes() const { return kWindow * kQueryHeads * 4; }
  int64_t LayerBytes() const {
    return 2 * TensorBytes() + (queries_ ? QueryBytes() + LseBytes() : 0);
  }

  // Inputs: K, V and, where wanted, queries and their log-sum-exp, a layer after the other. Outputs
  // beside them. Registered once, as an engine does.
  template <typename Kind>
  void Lay(int64_t output_bytes, bool queries) {
    queries_ = queries;
    input_ = std::make_unique<Kind>(layers_ * LayerBytes());
    output_ = std::make_unique<Kind>(output_bytes);
    input_->FillRandom(RandomBlock());
    if (queries) {
      // What normal queries and keys make on average: the times do not depend on it.
      const std::vector<float> lse(static_cast<size_t>(kWindow * kQueryHeads),
                                   std::log(static_cast<float>(tokens_)) + 0.5F);
      for (int32_t layer = 0; layer < layers_; ++layer) {
        input_->Write(layer * LayerBytes() + 2 * TensorBytes() + QueryBytes(), lse.data(),
                      LseBytes());
      }
    }
    std::mt19937 random(3);
    token_ids_.resize(static_cast<size_t>(tokens_));
    for (int32_t& id : token_ids_) id = static_cast<int32_t>(random() % kVocabulary);
    owner_ = Check(client_->AttachRegionOwner());
    input_generation_ = Register(*input_, "bench_in", false);
    output_generation_ = Register(*output_, "bench_out", true);
  }

  uint64_t Register(const Memory& memory, const std::string& name, bool writable) {
    v1::RegisterRegionRequest request = memory.Registration(name, writable);
    request.set_owner(owner_->token());
    request.set_lease_seconds(3600);
    return Check(client_->RegisterRegion(request)).generation();
  }

  InputTensor Input(v1::TensorKind kind, int32_t layer, int64_t offset, int64_t bytes) const {
    InputTensor tensor;
    tensor.kind = kind;
    tensor.layer = layer;
    tensor.dtype = kind == v1::TENSOR_KIND_LOG_SUM_EXP ? v1::DTYPE_FLOAT32 : v1::DTYPE_BFLOAT16;
    tensor.bytes = {static_cast<const std::byte*>(nullptr), static_cast<size_t>(bytes)};
    tensor.region = SliceOf("bench_in", input_generation_, layer * LayerBytes() + offset);
    return tensor;
  }

  // The first tokens of the first layers.
  CompressJob Job(int64_t tokens, int32_t layers) const {
    CompressJob job;
    v1::SequenceShape& shape = *job.begin.mutable_shape();
    shape.set_num_layers(layers);
    shape.set_num_query_heads(kQueryHeads);
    shape.set_num_kv_heads(kHeads);
    shape.set_num_tokens(tokens);
    shape.set_head_dim(kDim);
    job.begin.set_no_receipt(true);
    *job.begin.mutable_output()->mutable_region() = SliceOf("bench_out", output_generation_, 0);
    for (int32_t layer = 0; layer < layers; ++layer) {
      job.tensors.push_back(Input(v1::TENSOR_KIND_KEY, layer, 0, tokens * kRowBytes));
      job.tensors.push_back(Input(v1::TENSOR_KIND_VALUE, layer, TensorBytes(), tokens * kRowBytes));
      if (!queries_) continue;
      job.tensors.push_back(Input(v1::TENSOR_KIND_QUERIES, layer, 2 * TensorBytes(), QueryBytes()));
      job.tensors.push_back(
          Input(v1::TENSOR_KIND_LOG_SUM_EXP, layer, 2 * TensorBytes() + QueryBytes(), LseBytes()));
    }
    if (!queries_) return job;
    InputTensor& ids = job.tensors.emplace_back();
    ids.kind = v1::TENSOR_KIND_TOKEN_IDS;
    ids.dtype = v1::DTYPE_INT32;
    ids.bytes = {reinterpret_cast<const std::byte*>(token_ids_.data()),
                 static_cast<size_t>(tokens) * sizeof(int32_t)};
    return job;
  }

  static void SetDynSplit(v1::Policy& policy) {
    policy.set_preset("dynsplit");
    policy.mutable_segmentation()->set_profile(kProfile);
    policy.mutable_budget()->set_kept_ratio(0.2);
  }

  std::vector<double> Times(const CompressJob& job, int calls) {
    std::vector<double> times;
    for (int call = 0; call < calls; ++call) {
      CompressResult result;
      times.push_back(Seconds([&] { result = Check(client_->Compress(job)); }));
      const v1::StageSeconds& stages = result.end.seconds();
      char text[256];
      std::snprintf(text, sizeof(text),
                    "total %.2f, copy in %.2f, split %.2f, score %.2f, select %.2f, gather %.2f, "
                    "collect %.2f",
                    1e3 * result.end.total_seconds(), 1e3 * stages.host_to_device(),
                    1e3 * stages.split(), 1e3 * stages.score(), 1e3 * stages.select(),
                    1e3 * stages.gather(), 1e3 * stages.device_to_host());
      stages_ = text;
    }
    return times;
  }

  // What a request costs that has next to nothing to do.
  void ReportTiny(const std::string& name, const std::string& preset) {
    CompressJob job = Job(std::min(tokens_, kTinyTokens), 1);
    job.begin.mutable_policy()->set_preset(preset);
    if (preset == "dynsplit") SetDynSplit(*job.begin.mutable_policy());
    Times(job, kTinyCalls / 5);
    Report({.name = name,
            .value = 1e6 * Median(Times(job, kTinyCalls)),
            .unit = "us",
            .ceiling = std::nullopt,
            .share = std::nullopt,
            .target = "",
            .peer = std::nullopt});
  }

  static double Ceiling([[maybe_unused]] const std::string& backend) {
#ifdef DYNSPLIT_HAVE_CUDA
    if (backend == "cuda") return PinnedCopyRate();
#endif
    return HostCopyRate();
  }

#ifdef DYNSPLIT_HAVE_CUDA
  LayerTensors Tensors(int32_t layer) const {
    const std::byte* at = input_->data() + layer * LayerBytes();
    LayerTensors tensors;
    tensors.layer = layer;
    tensors.keys = DenseView(at, DType::kBFloat16, tokens_, kHeads, kDim);
    tensors.values = DenseView(at + TensorBytes(), DType::kBFloat16, tokens_, kHeads, kDim);
    tensors.queries =
        DenseView(at + 2 * TensorBytes(), DType::kBFloat16, kWindow, kQueryHeads, kDim);
    tensors.lse = reinterpret_cast<const float*>(at + 2 * TensorBytes() + QueryBytes());
    return tensors;
  }

  // Seconds of all operations of the request, which must decide and move as the server did.
  double OperationSeconds(const CompressResult& served) {
    const std::unique_ptr<Backend> device = Check(CreateCudaBackend({}));
    TimedBackend backend(*device, kOperationRuns);
    const std::unique_ptr<Stream> stream = Check(backend.CreateStream());
    const auto profiles = Check(ProfileStore::Create({.default_name = kProfile, .directory = ""}));
    SequenceSpec spec;
    spec.shape = {.num_layers = layers_,
                  .num_query_heads = kQueryHeads,
                  .num_kv_heads = kHeads,
                  .num_tokens = tokens_,
                  .head_dim = kDim};
    spec.policy = Check(rpc::PolicyFromProto(served.accepted.policy(), "policy"));
    spec.supply.num_window_queries = kWindow;
    spec.supply.lse = true;
    spec.with_receipt = false;
    const auto context = Check(
        PrepareSequence(spec, token_ids_, Check(profiles->Find(kProfile)).get(), backend, *stream));
    for (int32_t layer = 0; layer < layers_; ++layer) {
      const LayerTensors tensors = Tensors(layer);
      Check(CheckLayerFinite(tensors, backend, *stream));
      const LayerResult result =
          Check(CompressLayer(*context, tensors, /*with_pages=*/true, backend, *stream));
      Check(stream->Synchronize());
      if (layer == 0) Compare(result, served.layers[0].result);
    }
    double total = 0;
    std::printf("operations, ms:");
    for (const auto& [name, seconds] : backend.seconds()) {
      std::printf(" %s %.3f", name.c_str(), 1e3 * seconds);
      total += seconds;
    }
    std::printf(", together %.3f\n", 1e3 * total);
    return total;
  }

  // The pages in the region are those made here.
  void Compare(const LayerResult& made, const v1::LayerResult& served) const {
    for (const v1::TensorDescriptor& tensor : served.tensors()) {
      const Buffer* own = nullptr;
      if (tensor.kind() == v1::TENSOR_KIND_KEY_PAGES) own = &made.pages.key_pages;
      if (tensor.kind() == v1::TENSOR_KIND_VALUE_PAGES) own = &made.pages.value_pages;
      if (own == nullptr) continue;
      std::string expected(static_cast<size_t>(own->size_bytes()), '\0');
      CheckCuda(cudaMemcpy(expected.data(), own->data(), expected.size(), cudaMemcpyDeviceToHost),
                "cudaMemcpy");
      const int64_t offset = tensor.location().region().offset_bytes();
      if (output_->Read(offset, tensor.byte_size()) != expected) {
        Fail("pages in the region differ from those that the same operations make here");
      }
    }
  }
#endif

  const Arguments arguments_;
  const std::unique_ptr<Client> client_;
  int32_t layers_ = 0;
  int64_t tokens_ = 0;
  bool queries_ = false;
  std::unique_ptr<Memory> input_;
  std::unique_ptr<Memory> output_;
  std::unique_ptr<RegionOwner> owner_;  // goes before the memory does
  uint64_t input_generation_ = 0;
  uint64_t output_generation_ = 0;
  std::vector<int32_t> token_ids_;
  std::string stages_;
};

}  // namespace
}  // namespace dynsplit::bench

int main(int argc, char** argv) {
  dynsplit::wire::InitProcessMemoryPolicy();
  CLI::App app("Times requests in shared memory through a running dynsplitd");
  dynsplit::bench::Arguments arguments;
  app.add_option("--target", arguments.target, "gRPC target, e.g. unix:/run/dynsplit.sock")
      ->required();
  app.add_option("--kind", arguments.kind, "shm or cuda-ipc")
      ->check(CLI::IsMember({"shm", "cuda-ipc"}));
  app.add_option("--gib", arguments.gib, "shm: size of the request, GiB")
      ->check(CLI::Range(0.01, 64.0));
  app.add_option("--tokens", arguments.tokens, "cuda-ipc: length")
      ->check(CLI::Range(1024, 1 << 22));
  app.add_option("--layers", arguments.layers)->check(CLI::Range(1, 1024));
  app.add_option("--repeats", arguments.repeats, "timed requests")->check(CLI::Range(1, 1000));
  CLI11_PARSE(app, argc, argv);
  dynsplit::bench::RegionsBench bench(arguments);
  if (arguments.kind == "shm") {
    bench.RunShm();
    return 0;
  }
#ifdef DYNSPLIT_HAVE_CUDA
  bench.RunCudaIpc();
  return 0;
#else
  std::fprintf(stderr, "this build has no CUDA\n");
  return 1;
#endif
}

// SPDX-License-Identifier: Apache-2.0
//
// What a decode step waits for: Sessions.Select through a running dynsplitd, beside Sessions.Get as
// the floor of the same connection. Opens one session of random bf16 KV of Llama-3.1-8B's shape,
// cut into blocks of 14 tokens, and selects per KV head: one layer and all layers, queries and
// tokens in the messages and, with --ipc, in device memory that client and server share. The
// server's own figures (SelectResponse) stand beside the client's.
#include <cuda_runtime_api.h>
#include <grpcpp/grpcpp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dynsplit/v1/memory.grpc.pb.h"
#include "dynsplit/v1/sessions.grpc.pb.h"
#include "proto/wire/channel.h"
#include "proto/wire/crc32c.h"
#include "proto/wire/frame.h"

namespace dynsplit {
namespace {

constexpr int32_t kQueryHeads = 32;
constexpr int32_t kHeads = 8;
constexpr int32_t kDim = 128;
constexpr int64_t kElementBytes = 2;
constexpr int64_t kQueryBytes = kQueryHeads * kDim * kElementBytes;  // a layer
constexpr int32_t kBlockTokens = 14;
constexpr int kQuerySets = 8;  // different queries, in turns
constexpr int kWarmUps = 20;
constexpr int64_t kGranuleBytes = int64_t{2} << 20;  // what an IPC handle shares at least
constexpr double kOneLayerTargetUs = 150;
constexpr double kAllLayersTargetUs = 400;
constexpr auto kCallTimeout = std::chrono::minutes(5);
// Room for the rest of a response beside its tokens.
constexpr int64_t kLargestInlineTokenBytes = wire::kMaxMessageBytes - 65536;

struct Arguments {
  std::string target;
  int64_t tokens = 131072;
  int32_t layers = 32;
  int32_t steps = 500;
  double budget = 0.1;
  bool ipc = false;

  int64_t tensor_bytes() const { return tokens * kHeads * kDim * kElementBytes; }
};

void Check(const grpc::Status& status, const char* call) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s: error %d, %s\n", call, static_cast<int>(status.error_code()),
               status.error_message().c_str());
  std::exit(1);
}
void Check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", call, cudaGetErrorString(error));
  std::exit(1);
}
void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void SetDeadline(grpc::ClientContext& context) {
  context.set_deadline(std::chrono::system_clock::now() + kCallTimeout);
}

// Standard normal values as bfloat16, repeated from a block where many are wanted.
std::vector<uint16_t> RandomValues(int64_t count, uint64_t seed) {
  constexpr int64_t kDistinct = int64_t{1} << 22;
  std::mt19937_64 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> values(static_cast<size_t>(count));
  const auto distinct = static_cast<size_t>(std::min(count, kDistinct));
  for (size_t i = 0; i < distinct; ++i) {
    const float value = normal(engine);
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    values[i] = static_cast<uint16_t>(bits >> 16U);
  }
  for (size_t i = distinct; i < values.size(); ++i) values[i] = values[i - distinct];
  return values;
}

// Device memory that the server may map; freed when the process ends.
struct SharedRegion {
  std::byte* data = nullptr;
  std::string name;
  uint64_t generation = 0;

  v1::RegionSlice Slice(int64_t offset_bytes) const {
    v1::RegionSlice slice;
    slice.set_name(name);
    slice.set_offset_bytes(offset_bytes);
    slice.set_generation(generation);
    return slice;
  }
};

class SelectBench {
 public:
  explicit SelectBench(Arguments arguments)
      : arguments_(std::move(arguments)),
        channel_(grpc::CreateCustomChannel(arguments_.target, grpc::InsecureChannelCredentials(),
                                           wire::ClientChannelArguments(arguments_.target))),
        sessions_(v1::Sessions::NewStub(channel_)),
        memory_(v1::Memory::NewStub(channel_)),
        queries_(RandomValues(kQuerySets * arguments_.layers * kQueryBytes / kElementBytes, 2)) {}

  void Run() {
    Open();
    const int64_t num_selected = Select(InlineRequest(0, 1)).sequences(0).tokens_per_head();
    std::printf("T=%lld, %d layers, n=%lld a KV head, %d steps; microseconds\n",
                static_cast<long long>(arguments_.tokens), arguments_.layers,
                static_cast<long long>(num_selected), arguments_.steps);
    std::printf("%-28s %8s %8s %8s %10s %10s %8s %8s\n", "call", "p50", "p90", "p99", "server p50",
                "device p50", "Get p50", "target");
    MeasureGet();
    for (int32_t layers : {1, arguments_.layers}) {
      const std::string what = layers == 1 ? "Select 1 layer" : "Select all layers";
      const double target = layers == 1 ? kOneLayerTargetUs : kAllLayersTargetUs;
      const int64_t token_bytes = layers * kHeads * num_selected * 4;
      if (token_bytes <= kLargestInlineTokenBytes) {
        MeasureSelect(what + ", inline", target,
                      [&](int set) { return InlineRequest(set, layers); });
      } else {
        std::printf("%-28s tokens of %.1f MB do not fit in a message\n",
                    (what + ", inline").c_str(), static_cast<double>(token_bytes) / 1e6);
      }
      if (arguments_.ipc) MeasureShared(what + ", regions", target, layers, num_selected);
      if (layers == arguments_.layers) break;
    }
    Release();
  }

 private:
  // ---- the session ----

  v1::Begin BeginOfSession() const {
    v1::Begin begin;
    begin.set_request_id("bench_select");
    v1::SequenceShape& shape = *begin.mutable_shape();
    shape.set_num_layers(arguments_.layers);
    shape.set_num_query_heads(kQueryHeads);
    shape.set_num_kv_heads(kHeads);
    shape.set_num_tokens(arguments_.tokens);
    shape.set_head_dim(kDim);
    v1::Policy& policy = *begin.mutable_policy();
    policy.set_preset("dynsplit_index");
    policy.mutable_segmentation()->set_method(v1::Segmentation::METHOD_FIXED);
    policy.mutable_segmentation()->set_block_size(kBlockTokens);
    policy.mutable_budget()->set_kept_ratio(arguments_.budget);
    begin.mutable_session()->set_lease_seconds(3600);
    begin.mutable_session()->set_residence(v1::SessionOptions::RESIDENCE_DEVICE);
    for (int32_t tensor = 0; tensor < 2 * arguments_.layers; ++tensor) {
      v1::TensorDescriptor& descriptor = *begin.add_tensors();
      descriptor.set_id(static_cast<uint32_t>(tensor + 1));
      descriptor.set_kind(tensor % 2 == 0 ? v1::TENSOR_KIND_KEY : v1::TENSOR_KIND_VALUE);
      descriptor.set_layer(tensor / 2);
      descriptor.set_dtype(v1::DTYPE_BFLOAT16);
      descriptor.set_byte_size(arguments_.tensor_bytes());
    }
    return begin;
  }

  void Open() {
    const std::vector<uint16_t> values = RandomValues(arguments_.tensor_bytes() / kElementBytes, 1);
    v1::CompressRequest request;
    *request.mutable_begin() = BeginOfSession();
    if (arguments_.ipc) {  // all layers read the same memory
      const SharedRegion region = Share("kv", arguments_.tensor_bytes(), false);
      Check(cudaMemcpy(region.data, values.data(), static_cast<size_t>(arguments_.tensor_bytes()),
                       cudaMemcpyHostToDevice),
            "cudaMemcpy");
      for (v1::TensorDescriptor& tensor : *request.mutable_begin()->mutable_tensors()) {
        *tensor.mutable_location()->mutable_region() = region.Slice(0);
      }
    }
    grpc::ClientContext context;
    SetDeadline(context);
    const auto stream = sessions_->Open(&context);
    v1::CompressResponse response;
    bool open = stream->Write(request) && stream->Read(&response) && response.has_accepted();
    const int32_t num_sent = arguments_.ipc ? 0 : 2 * arguments_.layers;
    const int64_t chunk_bytes =
        std::min<int64_t>(response.accepted().max_chunk_bytes(), wire::kDefaultChunkDataBytes);
    for (int32_t tensor = 1; open && tensor <= num_sent; ++tensor) {
      open = SendTensor(static_cast<uint32_t>(tensor), values, chunk_bytes, *stream);
    }
    request.Clear();
    request.mutable_end()->set_num_tensors(num_sent);
    if (open) open = stream->Write(request) && stream->WritesDone();
    while (stream->Read(&response)) {
      if (response.has_end()) session_id_ = response.end().session().session_id();
    }
    Check(stream->Finish(), "Sessions.Open");
    Require(open && !session_id_.empty(), "Sessions.Open ended without a session");
  }

  bool SendTensor(
      uint32_t id, const std::vector<uint16_t>& values, int64_t chunk_bytes,
      grpc::ClientReaderWriter<v1::CompressRequest, v1::CompressResponse>& stream) const {
    const auto* const data = reinterpret_cast<const char*>(values.data());
    const int64_t size = arguments_.tensor_bytes();
    uint32_t tensor_crc = 0;
    for (int64_t at = 0; at < size; at += chunk_bytes) {
      const auto length = static_cast<size_t>(std::min(chunk_bytes, size - at));
      v1::CompressRequest chunk;
      chunk.set_tensor(id);
      chunk.set_offset(static_cast<uint64_t>(at));
      chunk.set_data(data + at, length);
      chunk.set_crc32c(wire::Crc32c(data + at, length));
      tensor_crc = wire::Crc32cCombine(tensor_crc, chunk.crc32c(), length);
      if (at + chunk_bytes >= size) {
        chunk.set_last(true);
        chunk.set_tensor_crc32c(tensor_crc);
      }
      if (!stream.Write(chunk)) return false;
    }
    return true;
  }

  void Release() {
    grpc::ClientContext context;
    SetDeadline(context);
    v1::ReleaseSessionRequest request;
    request.set_session_id(session_id_);
    v1::ReleaseSessionResponse response;
    Check(sessions_->Release(&context, request, &response), "Sessions.Release");
  }

  SharedRegion Share(const std::string& name, int64_t size_bytes, bool writable) {
    SharedRegion region;
    region.name = name;
    void* memory = nullptr;
    const int64_t rounded = (size_bytes + kGranuleBytes - 1) / kGranuleBytes * kGranuleBytes;
    Check(cudaMalloc(&memory, static_cast<size_t>(rounded)), "cudaMalloc");
    region.data = static_cast<std::byte*>(memory);
    cudaIpcMemHandle_t handle;
    Check(cudaIpcGetMemHandle(&handle, memory), "cudaIpcGetMemHandle");
    cudaDeviceProp properties;
    Check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    v1::RegisterRegionRequest request;
    request.set_name(name);
    request.set_byte_size(size_bytes);
    request.set_writable(writable);
    request.set_lease_seconds(3600);
    request.mutable_cuda_ipc()->set_handle(handle.reserved, sizeof(handle.reserved));
    request.mutable_cuda_ipc()->set_device_uuid(properties.uuid.bytes,
                                                sizeof(properties.uuid.bytes));
    grpc::ClientContext context;
    SetDeadline(context);
    v1::RegisterRegionResponse response;
    Check(memory_->Register(&context, request, &response), "Memory.Register");
    region.generation = response.generation();
    return region;
  }

  // ---- the steps ----

  v1::SequenceStep Step(int32_t layers) const {
    v1::SequenceStep step;
    step.set_session_id(session_id_);
    step.set_num_layers(layers);
    step.set_dtype(v1::DTYPE_BFLOAT16);
    return step;
  }
  int64_t QueryOffset(int set) const { return set * arguments_.layers * kQueryBytes; }

  v1::SelectRequest InlineRequest(int set, int32_t layers) const {
    v1::SelectRequest request;
    v1::SequenceStep& step = *request.add_sequences() = Step(layers);
    step.set_query_data(reinterpret_cast<const char*>(queries_.data()) + QueryOffset(set),
                        static_cast<size_t>(layers * kQueryBytes));
    return request;
  }

  v1::SelectResponse Select(const v1::SelectRequest& request) {
    grpc::ClientContext context;
    SetDeadline(context);
    v1::SelectResponse response;
    Check(sessions_->Select(&context, request, &response), "Sessions.Select");
    return response;
  }

  void MeasureShared(const std::string& name, double target, int32_t layers, int64_t num_selected) {
    const std::string suffix = std::to_string(layers);
    const auto query_bytes = static_cast<int64_t>(queries_.size()) * kElementBytes;
    const SharedRegion queries = Share("queries" + suffix, query_bytes, false);
    Check(cudaMemcpy(queries.data, queries_.data(), static_cast<size_t>(query_bytes),
                     cudaMemcpyHostToDevice),
          "cudaMemcpy");
    const int64_t token_bytes = layers * kHeads * num_selected * 4;
    const SharedRegion tokens = Share("tokens" + suffix, token_bytes, true);
    const auto request_of = [&](int set) {
      v1::SelectRequest request;
      v1::SequenceStep& step = *request.add_sequences() = Step(layers);
      *step.mutable_query_region() = queries.Slice(QueryOffset(set));
      *step.mutable_token_region() = tokens.Slice(0);
      return request;
    };
    Select(request_of(1));
    CheckTokens(tokens, num_selected);
    MeasureSelect(name, target, request_of);
  }

  // The first layer's tokens in the region are those that come in the message.
  void CheckTokens(const SharedRegion& tokens, int64_t num_selected) {
    const v1::SelectResponse response = Select(InlineRequest(1, 1));
    const std::string& expected = response.sequences(0).tokens();
    Require(expected.size() == static_cast<size_t>(kHeads * num_selected * 4),
            "Select returned another number of tokens than it says");
    std::string found(expected.size(), '\0');
    Check(cudaMemcpy(found.data(), tokens.data, found.size(), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    Require(found == expected, "tokens in the region differ from those in the message");
  }

  void MeasureGet() {
    v1::GetSessionRequest request;
    request.set_session_id(session_id_);
    const std::vector<double> times = Times([&](int) {
      grpc::ClientContext context;
      SetDeadline(context);
      v1::SessionInfo response;
      Check(sessions_->Get(&context, request, &response), "Sessions.Get");
    });
    get_us_ = Percentile(times, 50);
    std::printf("%-28s %8.1f %8.1f %8.1f\n", "Get", get_us_, Percentile(times, 90),
                Percentile(times, 99));
  }

  void MeasureSelect(const std::string& name, double target,
                     const std::function<v1::SelectRequest(int)>& request_of) {
    std::vector<v1::SelectRequest> requests;
    for (int set = 0; set < kQuerySets; ++set) requests.push_back(request_of(set));
    std::vector<double> server_us;
    std::vector<double> device_us;
    const std::vector<double> times = Times([&](int step) {
      const v1::SelectResponse response = Select(requests[static_cast<size_t>(step % kQuerySets)]);
      server_us.push_back(1e6 * response.total_seconds());
      device_us.push_back(1e6 * response.device_seconds());
    });
    std::printf("%-28s %8.1f %8.1f %8.1f %10.1f %10.1f %8.1f %8.0f\n", name.c_str(),
                Percentile(times, 50), Percentile(times, 90), Percentile(times, 99),
                Percentile(server_us, 50), Percentile(device_us, 50), get_us_, target);
    std::fflush(stdout);
  }

  // Microseconds of each step, without the warm-ups.
  std::vector<double> Times(const std::function<void(int)>& run) const {
    std::vector<double> times;
    for (int step = 0; step < kWarmUps + arguments_.steps; ++step) {
      const auto start = std::chrono::steady_clock::now();
      run(step);
      const std::chrono::duration<double, std::micro> elapsed =
          std::chrono::steady_clock::now() - start;
      if (step >= kWarmUps) times.push_back(elapsed.count());
    }
    return times;
  }
  static double Percentile(std::vector<double> values, int percent) {
    std::sort(values.begin(), values.end());
    return values[(values.size() - 1) * static_cast<size_t>(percent) / 100];
  }

  const Arguments arguments_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::Sessions::Stub> sessions_;
  const std::unique_ptr<v1::Memory::Stub> memory_;
  const std::vector<uint16_t> queries_;  // [kQuerySets, layers, Hq, D]
  std::string session_id_;
  double get_us_ = 0;
};

}  // namespace
}  // namespace dynsplit

int main(int argc, char** argv) {
  dynsplit::wire::InitProcessMemoryPolicy();
  CLI::App app("Times Sessions.Select through a running dynsplitd");
  dynsplit::Arguments arguments;
  app.add_option("--target", arguments.target, "gRPC target, e.g. unix:/run/dynsplit.sock")
      ->required();
  app.add_option("--tokens", arguments.tokens, "length of the session")
      ->check(CLI::Range(1024, 1 << 22));
  app.add_option("--layers", arguments.layers, "of the session")->check(CLI::Range(1, 1024));
  app.add_option("--steps", arguments.steps, "timed calls a row")->check(CLI::Range(1, 1000000));
  app.add_option("--budget", arguments.budget, "share of tokens chosen")
      ->check(CLI::Range(0.001, 1.0));
  app.add_flag("--ipc", arguments.ipc, "share device memory with the server (its --regions)");
  CLI11_PARSE(app, argc, argv);
  dynsplit::SelectBench(arguments).Run();
  return 0;
}

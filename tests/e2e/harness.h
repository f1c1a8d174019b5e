// SPDX-License-Identifier: Apache-2.0
//
// A real server in this process, and a client that speaks the wire format by hand so that it can
// also speak it wrongly.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "dynsplit/v1/compression.grpc.pb.h"
#include "dynsplit/v1/sessions.grpc.pb.h"
#include "grpcpp/grpcpp.h"
#include "proto/wire/status.h"
#include "server/rpc/server.h"

namespace dynsplit::e2e {

// Whether the condition holds within a few seconds.
template <typename Condition>
bool Eventually(Condition condition) {
  for (int i = 0; i < 500; ++i) {
    if (condition()) return true;
    absl::SleepFor(absl::Milliseconds(10));
  }
  return false;
}

// Small limits, two listeners.
ServerConfig TestConfig();

std::vector<std::unique_ptr<Backend>> OneBackend(std::unique_ptr<Backend> backend);

class TestServer {
 public:
  // Without backends: one of the CPU, as the configuration says.
  explicit TestServer(ServerConfig config = TestConfig(),
                      std::vector<std::unique_ptr<Backend>> backends = {});
  ~TestServer();

  rpc::Server& server() { return *server_; }
  std::shared_ptr<grpc::Channel> tcp_channel() const;
  std::shared_ptr<grpc::Channel> unix_channel() const;
  const std::string& unix_socket() const { return config_.unix_socket; }
  std::string Http(const std::string& path) const;  // body, or "<status code>" where not 200

  // True once no request holds memory or a stream, within a few seconds; `held_bytes` are those of
  // sessions that are meant to be there.
  bool ReturnsToBaseline(int64_t held_bytes = 0) const;
  // Memory of the backend beyond what it held at the start, bytes.
  int64_t held_bytes() const;
  // The same once no request holds memory: a call's own goes a moment after its answer.
  int64_t settled_bytes() const;

 private:
  ServerConfig config_;
  std::string directory_;
  std::unique_ptr<rpc::Server> server_;
  int64_t baseline_host_bytes_ = 0;
  int64_t baseline_device_bytes_ = 0;
};

struct Tensor {
  v1::TensorDescriptor descriptor;
  std::string bytes;
};

// A request before it is cut into messages.
struct Script {
  v1::Begin begin;              // without tensors
  std::vector<Tensor> tensors;  // of the sequence first, then ascending layers
  size_t chunk_bytes = 1 << 20;
};
std::vector<v1::CompressRequest> Messages(const Script& script);
v1::CompressRequest ChunkOf(const Tensor& tensor, size_t offset, size_t size);

struct ScriptOptions {
  int32_t num_layers = 2, num_query_heads = 4, num_kv_heads = 2, head_dim = 16;
  int64_t num_tokens = 96;
  int64_t num_queries = 8;
  uint64_t seed = 1;
};
// Token ids, and bf16 keys, values and queries of every layer, at random.
Script MakeScript(const ScriptOptions& options = {});
// The tensor of that kind (and layer); fails the test where there is none.
Tensor& Find(Script& script, v1::TensorKind kind, int32_t layer = -1);
uint16_t ToBFloat16(float value);

// What came back. Checksums of chunks and tensors have been verified (`wire_problem` is empty).
struct Reply {
  grpc::Status status;
  wire::RichError error;
  v1::Accepted accepted;
  v1::SequenceResult sequence;
  std::vector<v1::LayerResult> layers;
  v1::CompressEnd end;
  std::map<uint32_t, std::string> bytes;  // by tensor id
  std::string wire_problem;

  const std::string& Bytes(const v1::LayerResult& layer, v1::TensorKind kind) const;
  std::vector<int32_t> Ints(const v1::LayerResult& layer, v1::TensorKind kind) const;
};

using Stub = v1::Compression::Stub;
using CallStream = grpc::ClientReaderWriter<v1::CompressRequest, v1::CompressResponse>;
enum class Call { kCompress, kPlan, kApply, kCalibrate };
std::unique_ptr<CallStream> Open(Stub& stub, Call call, grpc::ClientContext& context);

// The streams of sessions.
enum class SessionCall { kOpen, kAppend, kFetch };
std::unique_ptr<CallStream> Open(v1::Sessions::Stub& stub, SessionCall call,
                                 grpc::ClientContext& context);
// As below. `received` is what an earlier call of the same tensors has had.
Reply Exchange(v1::Sessions::Stub& stub, SessionCall call,
               const std::vector<v1::CompressRequest>& messages, Reply received = {});

// Sends all messages, closes, and reads to the end.
Reply Exchange(Stub& stub, Call call, const std::vector<v1::CompressRequest>& messages);
Reply Exchange(Stub& stub, Call call, const Script& script);
// Adds one response to the reply.
void Take(const v1::CompressResponse& response, Reply& reply);

}  // namespace dynsplit::e2e

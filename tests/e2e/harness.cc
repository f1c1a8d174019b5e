// SPDX-License-Identifier: Apache-2.0
#include "tests/e2e/harness.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/wire/channel.h"
#include "proto/wire/crc32c.h"
#include "server/cpu/cpu_backend.h"
#include "server/runtime/log.h"

namespace dynsplit::e2e {
namespace {

std::shared_ptr<grpc::Channel> Connect(const std::string& target) {
  grpc::ChannelArguments arguments = wire::ClientChannelArguments(target);
  arguments.SetInt("grpc.use_local_subchannel_pool", 1);
  return grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
}

Tensor MakeTensor(v1::TensorKind kind, int32_t layer, v1::DType dtype, std::string bytes) {
  Tensor tensor;
  tensor.descriptor.set_kind(kind);
  if (layer >= 0) tensor.descriptor.set_layer(layer);
  tensor.descriptor.set_dtype(dtype);
  tensor.descriptor.set_byte_size(static_cast<int64_t>(bytes.size()));
  tensor.bytes = std::move(bytes);
  return tensor;
}

std::string RandomBFloat16(size_t count, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::string bytes(count * 2, '\0');
  for (size_t i = 0; i < count; ++i) {
    const uint16_t bits = ToBFloat16(normal(random));
    std::memcpy(&bytes[i * 2], &bits, 2);
  }
  return bytes;
}

}  // namespace

uint16_t ToBFloat16(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);  // truncated: any bf16 will do
}

ServerConfig TestConfig() {
  ServerConfig config;
  config.listen = "127.0.0.1:0";
  config.metrics_listen = "127.0.0.1:0";
  config.threads = 2;
  config.workers = 2;
  config.max_request_bytes = int64_t{512} << 20;
  config.max_in_flight_bytes = int64_t{1} << 30;
  config.drain_timeout = absl::Seconds(5);
  config.default_profile = "smollm2_table7";
  return config;
}

std::vector<std::unique_ptr<Backend>> OneBackend(std::unique_ptr<Backend> backend) {
  std::vector<std::unique_ptr<Backend>> backends;
  backends.push_back(std::move(backend));
  return backends;
}

TestServer::TestServer(ServerConfig config, std::vector<std::unique_ptr<Backend>> backends)
    : config_(std::move(config)) {
  SetLogLevel(LogLevel::kError);
  std::string name = (std::filesystem::temp_directory_path() / "dynsplit-e2e-XXXXXX").string();
  if (mkdtemp(name.data()) != nullptr) directory_ = name;
  if (config_.unix_socket.empty()) config_.unix_socket = directory_ + "/server.sock";
  if (backends.empty()) {
    auto backend = CreateCpuBackend({.num_threads = config_.threads, .memory_limit_bytes = 0});
    if (!backend.ok()) {
      ADD_FAILURE() << backend.status();
      std::abort();
    }
    backends.push_back(*std::move(backend));
  }
  auto server = rpc::Server::Start(config_, std::move(backends), "test");
  if (!server.ok()) {
    ADD_FAILURE() << server.status();
    std::abort();
  }
  server_ = *std::move(server);
  baseline_host_bytes_ = server_->live().host_bytes;
  baseline_device_bytes_ = server_->live().device_bytes;
}

TestServer::~TestServer() {
  server_.reset();
  std::error_code ignored;
  std::filesystem::remove_all(directory_, ignored);
}

std::shared_ptr<grpc::Channel> TestServer::tcp_channel() const {
  return Connect(absl::StrCat("127.0.0.1:", server_->port()));
}

std::shared_ptr<grpc::Channel> TestServer::unix_channel() const {
  return Connect("unix:" + config_.unix_socket);
}

std::string TestServer::Http(const std::string& path) const {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(server_->http_port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string reply;
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    const std::string request = "GET " + path + " HTTP/1.0\r\nConnection: close\r\n\r\n";
    if (write(fd, request.data(), request.size()) > 0) {
      char piece[4096];
      for (ssize_t n = 0; (n = read(fd, piece, sizeof(piece))) > 0;) {
        reply.append(piece, static_cast<size_t>(n));
      }
    }
  }
  close(fd);
  const size_t space = reply.find(' ');
  if (space == std::string::npos) return "<no reply>";
  const std::string code = reply.substr(space + 1, 3);
  if (code != "200") return "<" + code + ">";
  return reply.substr(reply.find("\r\n\r\n") + 4);
}

int64_t TestServer::held_bytes() const {
  const Metrics::Live live = server_->live();
  return live.host_bytes - baseline_host_bytes_ + live.device_bytes - baseline_device_bytes_;
}

int64_t TestServer::settled_bytes() const {
  EXPECT_TRUE(Eventually([&] { return server_->live().reserved_bytes == 0; }));
  return held_bytes();
}

bool TestServer::ReturnsToBaseline(int64_t held_bytes) const {
  for (int i = 0; i < 1000; ++i) {
    const Metrics::Live live = server_->live();
    if (live.reserved_bytes == 0 && live.streams == 0 && live.queue_depth == 0 &&
        this->held_bytes() <= held_bytes) {
      return true;
    }
    absl::SleepFor(absl::Milliseconds(10));
  }
  const Metrics::Live live = server_->live();
  ADD_FAILURE() << "reserved " << live.reserved_bytes << ", streams " << live.streams << ", queue "
                << live.queue_depth << ", host " << live.host_bytes << " (baseline "
                << baseline_host_bytes_ << "), device " << live.device_bytes << " (baseline "
                << baseline_device_bytes_ << ")";
  return false;
}

Script MakeScript(const ScriptOptions& options) {
  std::mt19937_64 random(options.seed);
  Script script;
  v1::SequenceShape& shape = *script.begin.mutable_shape();
  shape.set_num_layers(options.num_layers);
  shape.set_num_query_heads(options.num_query_heads);
  shape.set_num_kv_heads(options.num_kv_heads);
  shape.set_num_tokens(options.num_tokens);
  shape.set_head_dim(options.head_dim);
  script.begin.mutable_policy()->mutable_protection()->set_num_recent_tokens(8);
  script.begin.mutable_policy()->mutable_budget()->set_kept_ratio(0.5);

  std::string ids(static_cast<size_t>(options.num_tokens) * 4, '\0');
  for (size_t i = 0; i < ids.size() / 4; ++i) {
    const auto id = static_cast<int32_t>(random() % 1000);
    std::memcpy(&ids[i * 4], &id, 4);
  }
  script.tensors.push_back(
      MakeTensor(v1::TENSOR_KIND_TOKEN_IDS, -1, v1::DTYPE_INT32, std::move(ids)));
  const auto row = static_cast<size_t>(options.head_dim);
  const size_t kv = static_cast<size_t>(options.num_tokens * options.num_kv_heads) * row;
  const size_t queries = static_cast<size_t>(options.num_queries * options.num_query_heads) * row;
  for (int32_t layer = 0; layer < options.num_layers; ++layer) {
    for (const v1::TensorKind kind : {v1::TENSOR_KIND_KEY, v1::TENSOR_KIND_VALUE}) {
      script.tensors.push_back(
          MakeTensor(kind, layer, v1::DTYPE_BFLOAT16, RandomBFloat16(kv, random)));
    }
    if (queries > 0) {
      script.tensors.push_back(MakeTensor(v1::TENSOR_KIND_QUERIES, layer, v1::DTYPE_BFLOAT16,
                                          RandomBFloat16(queries, random)));
    }
  }
  uint32_t id = 1;
  for (Tensor& tensor : script.tensors) tensor.descriptor.set_id(id++);
  return script;
}

Tensor& Find(Script& script, v1::TensorKind kind, int32_t layer) {
  for (Tensor& tensor : script.tensors) {
    if (tensor.descriptor.kind() == kind &&
        (layer < 0 ? !tensor.descriptor.has_layer() : tensor.descriptor.layer() == layer)) {
      return tensor;
    }
  }
  ADD_FAILURE() << "no tensor of kind " << kind << " in layer " << layer;
  std::abort();
}

v1::CompressRequest ChunkOf(const Tensor& tensor, size_t offset, size_t size) {
  v1::CompressRequest message;
  message.set_tensor(tensor.descriptor.id());
  message.set_offset(offset);
  message.set_data(tensor.bytes.substr(offset, size));
  message.set_crc32c(wire::Crc32c(message.data().data(), message.data().size()));
  if (offset + size == tensor.bytes.size()) {
    message.set_last(true);
    message.set_tensor_crc32c(wire::Crc32c(tensor.bytes.data(), tensor.bytes.size()));
  }
  return message;
}

std::vector<v1::CompressRequest> Messages(const Script& script) {
  std::vector<v1::CompressRequest> messages(1);
  v1::Begin& begin = *messages.front().mutable_begin();
  begin = script.begin;
  for (const Tensor& tensor : script.tensors) *begin.add_tensors() = tensor.descriptor;
  for (const Tensor& tensor : script.tensors) {
    for (size_t offset = 0; offset < tensor.bytes.size(); offset += script.chunk_bytes) {
      const size_t size = std::min(script.chunk_bytes, tensor.bytes.size() - offset);
      messages.push_back(ChunkOf(tensor, offset, size));
    }
  }
  const auto sent =
      std::count_if(script.tensors.begin(), script.tensors.end(),
                    [](const Tensor& tensor) { return !tensor.descriptor.has_location(); });
  messages.emplace_back().mutable_end()->set_num_tensors(static_cast<int>(sent));
  return messages;
}

const std::string& Reply::Bytes(const v1::LayerResult& layer, v1::TensorKind kind) const {
  static const std::string& none = *new std::string;
  for (const v1::TensorDescriptor& descriptor : layer.tensors()) {
    if (descriptor.kind() == kind) return bytes.at(descriptor.id());
  }
  return none;
}

std::vector<int32_t> Reply::Ints(const v1::LayerResult& layer, v1::TensorKind kind) const {
  const std::string& raw = Bytes(layer, kind);
  std::vector<int32_t> values(raw.size() / 4);
  std::memcpy(values.data(), raw.data(), values.size() * 4);
  return values;
}

std::unique_ptr<CallStream> Open(Stub& stub, Call call, grpc::ClientContext& context) {
  switch (call) {
    case Call::kCompress:
      return stub.Compress(&context);
    case Call::kPlan:
      return stub.Plan(&context);
    case Call::kApply:
      return stub.Apply(&context);
    case Call::kCalibrate:
      return stub.Calibrate(&context);
  }
  return nullptr;
}

void Take(const v1::CompressResponse& response, Reply& reply) {
  if (response.has_accepted()) reply.accepted = response.accepted();
  if (response.has_sequence()) reply.sequence = response.sequence();
  if (response.has_layer()) reply.layers.push_back(response.layer());
  if (response.has_end()) reply.end = response.end();
  if (response.data().empty()) return;
  std::string& bytes = reply.bytes[response.tensor()];
  if (response.offset() != bytes.size()) reply.wire_problem = "chunks have gaps";
  if (response.crc32c() != wire::Crc32c(response.data().data(), response.data().size())) {
    reply.wire_problem = "a chunk has a wrong checksum";
  }
  bytes += response.data();
  if (response.last() && response.tensor_crc32c() != wire::Crc32c(bytes.data(), bytes.size())) {
    reply.wire_problem = "a tensor has a wrong checksum";
  }
}

namespace {

template <typename AnyStub, typename AnyCall>
Reply Converse(AnyStub& stub, AnyCall call, const std::vector<v1::CompressRequest>& messages,
               Reply reply) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(30)));
  const std::unique_ptr<CallStream> stream = Open(stub, call, context);
  std::thread writer([&] {
    for (const v1::CompressRequest& message : messages) {
      if (!stream->Write(message)) break;
    }
    stream->WritesDone();
  });
  for (v1::CompressResponse response; stream->Read(&response);) Take(response, reply);
  writer.join();
  reply.status = stream->Finish();
  reply.error = wire::ReadError(reply.status);
  return reply;
}

}  // namespace

std::unique_ptr<CallStream> Open(v1::Sessions::Stub& stub, SessionCall call,
                                 grpc::ClientContext& context) {
  switch (call) {
    case SessionCall::kOpen:
      return stub.Open(&context);
    case SessionCall::kAppend:
      return stub.Append(&context);
    case SessionCall::kFetch:
      return stub.Fetch(&context);
  }
  return nullptr;
}

Reply Exchange(v1::Sessions::Stub& stub, SessionCall call,
               const std::vector<v1::CompressRequest>& messages, Reply received) {
  return Converse(stub, call, messages, std::move(received));
}

Reply Exchange(Stub& stub, Call call, const std::vector<v1::CompressRequest>& messages) {
  return Converse(stub, call, messages, {});
}

Reply Exchange(Stub& stub, Call call, const Script& script) {
  return Exchange(stub, call, Messages(script));
}

}  // namespace dynsplit::e2e

// SPDX-License-Identifier: Apache-2.0
//
// How calls and the server live and end: pipelining, cancellation, deadlines, overload, drain,
// health, reflection, metrics, company.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "dynsplit/v1/info.grpc.pb.h"
#include "dynsplit/v1/memory.grpc.pb.h"
#include "grpcpp/generic/generic_stub.h"
#include "server/cpu/cpu_backend.h"
#include "tests/e2e/harness.h"

namespace dynsplit::e2e {
namespace {

// A call driven message by message.
struct OpenCall {
  OpenCall(const std::shared_ptr<grpc::Channel>& channel, Call call,
           absl::Duration deadline = absl::Seconds(30))
      : stub(v1::Compression::NewStub(channel)) {
    context.set_deadline(absl::ToChronoTime(absl::Now() + deadline));
    stream = Open(*stub, call, context);
  }
  bool Send(const v1::CompressRequest& message) { return stream->Write(message); }
  bool Receive() {
    v1::CompressResponse response;
    if (!stream->Read(&response)) return false;
    Take(response, reply);
    return true;
  }
  absl::Status Finish() {
    while (Receive()) {
    }
    return wire::ToAbsl(stream->Finish());
  }

  std::unique_ptr<Stub> stub;
  grpc::ClientContext context;
  std::unique_ptr<CallStream> stream;
  Reply reply;
};

// grpc.health.v1 by hand: the package has no generated stubs for it.
grpc::ByteBuffer HealthRequest(const std::string& service) {
  std::string bytes = "\x0a";
  bytes += static_cast<char>(service.size());
  bytes += service;
  grpc::Slice slice(bytes);
  return {&slice, 1};
}

// 1 SERVING, 2 NOT_SERVING, 3 SERVICE_UNKNOWN.
int ServingStatus(const grpc::ByteBuffer& response) {
  std::vector<grpc::Slice> slices;
  if (!response.Dump(&slices).ok()) return -1;
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes.size() == 2 ? bytes[1] : 0;
}

// Check of one service: the status, or minus the gRPC code.
int CheckHealth(const std::shared_ptr<grpc::Channel>& channel, const std::string& service) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  const grpc::ByteBuffer request = HealthRequest(service);
  grpc::ByteBuffer response;
  grpc::CompletionQueue queue;
  const auto call =
      stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  call->StartCall();
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  return status.ok() ? ServingStatus(response) : -static_cast<int>(status.error_code());
}

double MetricValue(const std::string& text, const std::string& series) {
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    double value = 0;
    if (absl::StartsWith(line, series + " ") &&
        absl::SimpleAtod(line.substr(series.size() + 1), &value)) {
      return value;
    }
  }
  return -1;
}

TEST(LifecycleTest, LayersLeaveWhileLaterOnesHaveNotBeenSent) {
  TestServer server;
  const Script script = MakeScript({.num_layers = 6, .num_tokens = 300});
  const std::vector<v1::CompressRequest> messages = Messages(script);
  for (const Call method : {Call::kCompress, Call::kPlan}) {
    OpenCall call(server.unix_channel(), method);
    ASSERT_TRUE(call.Send(messages[0]));
    ASSERT_TRUE(call.Send(messages[1]));  // token ids
    for (size_t layer = 0; layer < 6; ++layer) {
      // Layer l+1 is held back until all of layer l's result has arrived.
      for (size_t i = 0; i < 3; ++i) ASSERT_TRUE(call.Send(messages[2 + layer * 3 + i]));
      const auto arrived = [&] {
        return call.reply.layers.size() == layer + 1 &&
               std::all_of(call.reply.layers.back().tensors().begin(),
                           call.reply.layers.back().tensors().end(), [&](const auto& tensor) {
                             return static_cast<int64_t>(call.reply.bytes[tensor.id()].size()) ==
                                    tensor.byte_size();
                           });
      };
      while (!arrived()) ASSERT_TRUE(call.Receive());
    }
    ASSERT_TRUE(call.Send(messages.back()));
    call.stream->WritesDone();
    EXPECT_EQ(call.Finish(), absl::OkStatus());
    EXPECT_EQ(call.reply.end.plan().layers_size(), 6);
  }
  EXPECT_TRUE(server.ReturnsToBaseline());
}

TEST(LifecycleTest, MoreLayersThanPlacesFlowWithoutDeadlock) {
  TestServer server;
  Script script = MakeScript({.num_layers = 24, .num_tokens = 2000});
  script.begin.set_max_open_layers(1);
  script.begin.set_max_chunk_bytes(4096);
  script.chunk_bytes = 5000;
  const std::unique_ptr<Stub> stub = v1::Compression::NewStub(server.tcp_channel());
  const Reply reply = Exchange(*stub, Call::kCompress, script);
  EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.layers.size(), 24U);
  EXPECT_EQ(reply.wire_problem, "");
  EXPECT_TRUE(server.ReturnsToBaseline());
}

TEST(LifecycleTest, CancellationAtEveryMessageReturnsAllMemory) {
  TestServer server;
  Script script = MakeScript({.num_layers = 3, .num_tokens = 1500, .num_queries = 64});
  script.chunk_bytes = 60000;
  for (const v1::Scope scope : {v1::SCOPE_LAYER, v1::SCOPE_GLOBAL}) {
    script.begin.mutable_policy()->set_scope(scope);
    const std::vector<v1::CompressRequest> messages = Messages(script);
    for (size_t sent = 0; sent <= messages.size(); ++sent) {
      OpenCall call(server.unix_channel(), Call::kCompress);
      for (size_t i = 0; i < sent; ++i) call.Send(messages[i]);
      if (sent % 3 == 1) call.Receive();
      call.context.TryCancel();
      const absl::Status status = call.Finish();
      EXPECT_TRUE(absl::IsCancelled(status)) << status;
    }
  }
  EXPECT_TRUE(server.ReturnsToBaseline());
}

TEST(LifecycleTest, KilledClientLeavesNothingBehind) {
  TestServer server;
  const Script script = MakeScript({.num_layers = 3, .num_tokens = 3000});
  const std::vector<v1::CompressRequest> messages = Messages(script);
  for (const size_t sent : {size_t{1}, size_t{3}, size_t{6}}) {
    {
      // The channel goes with everything still open, as a process that dies would leave it.
      auto call = std::make_unique<OpenCall>(server.tcp_channel(), Call::kCompress);
      for (size_t i = 0; i < sent; ++i) call->Send(messages[i]);
      ASSERT_TRUE(call->Receive());
      EXPECT_GT(server.server().live().reserved_bytes, 0);
    }
    EXPECT_TRUE(server.ReturnsToBaseline());
  }
}

ServerConfig OneAtATime() {
  ServerConfig config = TestConfig();
  config.max_request_bytes = 1 << 20;
  config.max_in_flight_bytes = 1 << 20;
  config.max_queue = 1;
  config.queue_timeout = absl::Milliseconds(400);
  return config;
}

// About 0.7 MiB: one fits, two do not.
Script LargeScript() { return MakeScript({.num_layers = 1, .num_tokens = 3300}); }

TEST(LifecycleTest, FullServerQueuesThenRefusesWithRetryInfo) {
  TestServer server(OneAtATime());
  const std::vector<v1::CompressRequest> messages = Messages(LargeScript());
  OpenCall first(server.unix_channel(), Call::kCompress);
  first.Send(messages[0]);
  ASSERT_TRUE(first.Receive());  // accepted: holds the memory
  EXPECT_GT(first.reply.accepted.reserved_bytes(), 1 << 19);

  OpenCall queued(server.unix_channel(), Call::kCompress);
  queued.Send(messages[0]);
  ASSERT_TRUE(Eventually([&] { return server.server().live().queue_depth == 1; }));

  OpenCall refused(server.unix_channel(), Call::kCompress);
  refused.Send(messages[0]);
  const absl::Status full = refused.Finish();
  EXPECT_TRUE(absl::IsResourceExhausted(full)) << full;
  EXPECT_GT(wire::ReadError(full).retry_after_ms.value_or(0), 0);

  const absl::Status waited = queued.Finish();  // gives up after queue_timeout
  EXPECT_TRUE(absl::IsResourceExhausted(waited)) << waited;
  EXPECT_GT(wire::ReadError(waited).retry_after_ms.value_or(0), 0);

  OpenCall next(server.unix_channel(), Call::kCompress);
  next.Send(messages[0]);
  ASSERT_TRUE(Eventually([&] { return server.server().live().queue_depth == 1; }));
  first.context.TryCancel();  // memory comes free: the waiting one is let in
  ASSERT_TRUE(next.Receive());
  for (size_t i = 1; i < messages.size(); ++i) next.Send(messages[i]);
  next.stream->WritesDone();
  EXPECT_EQ(next.Finish(), absl::OkStatus());
  const std::string metrics = server.Http("/metrics");
  EXPECT_EQ(MetricValue(metrics, "dynsplit_rejected_total{reason=\"queue_full\"}"), 1);
  EXPECT_EQ(MetricValue(metrics, "dynsplit_rejected_total{reason=\"queue_timeout\"}"), 1);
  EXPECT_TRUE(absl::IsCancelled(first.Finish()));
  EXPECT_TRUE(server.ReturnsToBaseline());
}

TEST(LifecycleTest, DeadlineInQueue) {
  ServerConfig config = OneAtATime();
  config.queue_timeout = absl::Seconds(20);
  TestServer server(config);
  const std::vector<v1::CompressRequest> messages = Messages(LargeScript());
  OpenCall first(server.unix_channel(), Call::kCompress);
  first.Send(messages[0]);
  ASSERT_TRUE(first.Receive());
  OpenCall late(server.unix_channel(), Call::kCompress, absl::Milliseconds(150));
  late.Send(messages[0]);
  EXPECT_TRUE(absl::IsDeadlineExceeded(late.Finish()));
  EXPECT_TRUE(Eventually([&] { return server.server().live().queue_depth == 0; }));
  first.context.TryCancel();
  EXPECT_TRUE(absl::IsCancelled(first.Finish()));
  EXPECT_TRUE(server.ReturnsToBaseline());
}

TEST(LifecycleTest, TooManyStreams) {
  ServerConfig config = TestConfig();
  config.max_streams = 2;
  TestServer server(config);
  const auto begin = Messages(MakeScript()).front();
  OpenCall one(server.unix_channel(), Call::kCompress);
  OpenCall two(server.tcp_channel(), Call::kPlan);
  one.Send(begin);
  two.Send(begin);
  ASSERT_TRUE(one.Receive());
  ASSERT_TRUE(two.Receive());
  OpenCall three(server.unix_channel(), Call::kCompress);
  const absl::Status status = three.Finish();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_TRUE(wire::ReadError(status).retry_after_ms.has_value());
  one.context.TryCancel();
  two.context.TryCancel();
  EXPECT_TRUE(absl::IsCancelled(one.Finish()));
  EXPECT_TRUE(absl::IsCancelled(two.Finish()));
  EXPECT_TRUE(server.ReturnsToBaseline());
}

TEST(LifecycleTest, DrainTurnsHealthFirstFinishesWhatRunsAndRefusesTheRest) {
  ServerConfig config = TestConfig();
  config.pre_stop_delay = absl::Milliseconds(300);
  TestServer server(config);
  const auto channel = server.unix_channel();
  EXPECT_EQ(CheckHealth(channel, ""), 1);
  EXPECT_EQ(CheckHealth(channel, "dynsplit.v1.Compression"), 1);
  EXPECT_EQ(CheckHealth(channel, "no.such.Service"), -static_cast<int>(grpc::NOT_FOUND));
  EXPECT_EQ(server.Http("/readyz"), "ok\n");

  // Watch sees the change.
  grpc::GenericStub stub(channel);
  grpc::ClientContext watch_context;
  grpc::CompletionQueue queue;
  const auto next = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  const auto watch = stub.PrepareCall(&watch_context, "/grpc.health.v1.Health/Watch", &queue);
  watch->StartCall(nullptr);
  ASSERT_TRUE(next());
  watch->WriteLast(HealthRequest("dynsplit.v1.Compression"), grpc::WriteOptions(), nullptr);
  ASSERT_TRUE(next());
  grpc::ByteBuffer seen;
  watch->Read(&seen, nullptr);
  ASSERT_TRUE(next());
  EXPECT_EQ(ServingStatus(seen), 1);

  const std::vector<v1::CompressRequest> messages = Messages(MakeScript());
  OpenCall running(channel, Call::kCompress);
  running.Send(messages[0]);
  ASSERT_TRUE(running.Receive());

  std::thread shutdown([&] { server.server().Shutdown(); });
  watch->Read(&seen, nullptr);
  ASSERT_TRUE(next());
  EXPECT_EQ(ServingStatus(seen), 2);
  // Before the pre-stop delay is over, new requests are still served.
  EXPECT_EQ(server.Http("/readyz"), "<503>");
  EXPECT_EQ(server.Http("/healthz"), "ok\n");
  const std::unique_ptr<Stub> compression = v1::Compression::NewStub(channel);
  EXPECT_TRUE(Exchange(*compression, Call::kCompress, messages).status.ok());
  // Afterwards they are refused ...
  absl::Status refused;
  EXPECT_TRUE(Eventually([&] {
    refused = wire::ToAbsl(Exchange(*compression, Call::kCompress, messages).status);
    return absl::IsUnavailable(refused);
  }));
  EXPECT_TRUE(wire::ReadError(refused).retry_after_ms.has_value()) << refused;
  // ... while the one that runs finishes.
  for (size_t i = 1; i < messages.size(); ++i) ASSERT_TRUE(running.Send(messages[i]));
  running.stream->WritesDone();
  EXPECT_EQ(running.Finish(), absl::OkStatus());
  watch_context.TryCancel();
  grpc::Status watch_status;
  watch->Finish(&watch_status, nullptr);
  next();
  shutdown.join();
  EXPECT_NE(access(server.unix_socket().c_str(), F_OK), 0) << "the socket file is left";
}

TEST(LifecycleTest, DrainCancelsWhatDoesNotFinishInTime) {
  ServerConfig config = TestConfig();
  config.drain_timeout = absl::Milliseconds(200);
  TestServer server(config);
  OpenCall stuck(server.tcp_channel(), Call::kCompress);
  stuck.Send(Messages(MakeScript()).front());
  ASSERT_TRUE(stuck.Receive());
  const absl::Time start = absl::Now();
  server.server().Shutdown();
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
  EXPECT_FALSE(stuck.Finish().ok());
}

TEST(LifecycleTest, CompanyDoesNotMix) {
  TestServer server;
  constexpr size_t kCalls = 8;
  std::vector<Script> scripts;
  std::vector<std::string> solo;
  const std::unique_ptr<Stub> stub = v1::Compression::NewStub(server.unix_channel());
  const auto fingerprint = [](const Reply& reply) {
    std::string all = reply.end.plan().hash();
    for (const v1::LayerResult& layer : reply.layers) {
      for (const v1::TensorDescriptor& tensor : layer.tensors()) all += reply.bytes.at(tensor.id());
    }
    return all;
  };
  for (size_t i = 0; i < kCalls; ++i) {
    Script& script = scripts.emplace_back(MakeScript(
        {.num_layers = 4, .num_tokens = 400 + 37 * static_cast<int64_t>(i), .seed = 100 + i}));
    script.begin.set_tenant(absl::StrCat("tenant", i % 3));
    script.begin.mutable_policy()->set_scope(i % 2 == 0 ? v1::SCOPE_LAYER_HEAD : v1::SCOPE_GLOBAL);
    const Reply reply = Exchange(*stub, Call::kCompress, script);
    ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
    solo.push_back(fingerprint(reply));
  }
  std::vector<std::thread> threads;
  std::atomic<int> equal = 0;
  for (size_t i = 0; i < kCalls; ++i) {
    threads.emplace_back([&, i] {
      const std::unique_ptr<Stub> own =
          v1::Compression::NewStub(i % 2 == 0 ? server.unix_channel() : server.tcp_channel());
      for (int round = 0; round < 3; ++round) {
        if (fingerprint(Exchange(*own, Call::kCompress, scripts[i])) == solo[i]) ++equal;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(equal, 3 * static_cast<int>(kCalls));
  EXPECT_TRUE(server.ReturnsToBaseline());
}

TEST(LifecycleTest, MetricsMove) {
  TestServer server;
  const std::unique_ptr<Stub> stub = v1::Compression::NewStub(server.tcp_channel());
  const Reply reply = Exchange(*stub, Call::kCompress, MakeScript());
  ASSERT_TRUE(reply.status.ok());
  Script bad = MakeScript();
  std::vector<v1::CompressRequest> messages = Messages(bad);
  messages[1].set_crc32c(1);
  Exchange(*stub, Call::kCompress, messages);
  ASSERT_TRUE(server.ReturnsToBaseline());
  const std::string text = server.Http("/metrics");
  // Every line is a comment or "name{labels} number".
  for (const absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    double value = 0;
    EXPECT_TRUE(line[0] == '#' || absl::SimpleAtod(line.substr(line.rfind(' ') + 1), &value))
        << line;
  }
  const auto requests = [&](const std::string& code) {
    return std::max(
        MetricValue(text, "dynsplit_requests_total{code=\"" + code + "\",method=\"Compress\"}"),
        MetricValue(text, "dynsplit_requests_total{method=\"Compress\",code=\"" + code + "\"}"));
  };
  EXPECT_EQ(requests("OK"), 1);
  EXPECT_EQ(requests("DATA_LOSS"), 1);
  EXPECT_EQ(MetricValue(text, "dynsplit_checksum_failures_total"), 1);
  EXPECT_EQ(MetricValue(text, "dynsplit_tokens_in_total"), 96 * 2 * 2);
  EXPECT_EQ(MetricValue(text, "dynsplit_tokens_kept_total"), 48 * 2 * 2);
  EXPECT_EQ(MetricValue(text, "dynsplit_input_bytes_total{policy=\"dynsplit\"}"),
            static_cast<double>(reply.end.bytes_in()));
  EXPECT_EQ(MetricValue(text, "dynsplit_output_bytes_total{policy=\"dynsplit\"}"),
            static_cast<double>(reply.end.bytes_out()));
  EXPECT_EQ(MetricValue(text, "dynsplit_in_flight_bytes"), 0);
  EXPECT_EQ(MetricValue(text, "dynsplit_retained_attention_mass_mean_count"), 1);
  EXPECT_EQ(server.Http("/nowhere"), "<404>");
}

TEST(LifecycleTest, InformationAndProfiles) {
  TestServer server;
  const auto stub = v1::Info::NewStub(server.unix_channel());
  const auto call = [&](auto method, const auto& request, auto& response) {
    grpc::ClientContext context;
    return (stub.get()->*method)(&context, request, &response);
  };
  v1::ServerInfo info;
  ASSERT_TRUE(call(&v1::Info::Stub::GetServerInfo, v1::GetServerInfoRequest(), info).ok());
  EXPECT_EQ(info.backend(), "cpu");
  EXPECT_EQ(info.limits().max_in_flight_bytes(), TestConfig().max_in_flight_bytes);
  v1::ListPoliciesResponse policies;
  ASSERT_TRUE(call(&v1::Info::Stub::ListPolicies, v1::ListPoliciesRequest(), policies).ok());
  EXPECT_GE(policies.policies_size(), 10);
  for (const v1::PolicyInfo& policy : policies.policies()) {
    EXPECT_NE(policy.required_evidence(), v1::EVIDENCE_UNSPECIFIED);
    EXPECT_EQ(policy.usable_evidence(0), policy.required_evidence());
  }

  v1::PutDelimiterProfileRequest put;
  v1::PutDelimiterProfileResponse put_response;
  put.mutable_profile()->set_name("mine");
  put.mutable_profile()->add_weights()->set_token_id(5);
  put.mutable_profile()->mutable_weights(0)->set_weight(0.75);
  const auto method = &v1::Info::Stub::PutDelimiterProfile;
  ASSERT_TRUE(call(method, put, put_response).ok());
  EXPECT_EQ(call(method, put, put_response).error_code(), grpc::ALREADY_EXISTS);
  put.set_replace(true);
  ASSERT_TRUE(call(method, put, put_response).ok());
  EXPECT_TRUE(put_response.replaced());
  put.mutable_profile()->set_name(info.default_profile());
  EXPECT_EQ(call(method, put, put_response).error_code(), grpc::ALREADY_EXISTS);
  put.mutable_profile()->set_name("../mine");
  EXPECT_EQ(call(method, put, put_response).error_code(), grpc::INVALID_ARGUMENT);
  put.mutable_profile()->set_name("mine");
  put.mutable_profile()->mutable_weights(0)->set_weight(1.5);
  EXPECT_EQ(call(method, put, put_response).error_code(), grpc::INVALID_ARGUMENT);
  v1::GetDelimiterProfileRequest get;
  get.set_name("mine");
  v1::DelimiterProfile profile;
  ASSERT_TRUE(call(&v1::Info::Stub::GetDelimiterProfile, get, profile).ok());
  ASSERT_EQ(profile.weights_size(), 1);
  EXPECT_EQ(profile.weights(0).weight(), 0.75);
  get.set_name("yours");
  EXPECT_EQ(call(&v1::Info::Stub::GetDelimiterProfile, get, profile).error_code(), grpc::NOT_FOUND);

  // The stored profile is used.
  Script script = MakeScript();
  script.begin.mutable_policy()->mutable_segmentation()->set_profile("mine");
  const std::unique_ptr<Stub> compression = v1::Compression::NewStub(server.tcp_channel());
  const Reply reply = Exchange(*compression, Call::kCompress, script);
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.accepted.policy().segmentation().profile(), "mine");
}

TEST(LifecycleTest, RegionsAreOffByDefault) {
  TestServer server;
  const auto memory = v1::Memory::NewStub(server.unix_channel());
  v1::RegisterRegionRequest request;
  request.set_name("r");
  request.set_byte_size(4096);
  request.mutable_posix_shm()->set_key("nobody");
  grpc::ClientContext context;
  v1::RegisterRegionResponse response;
  const grpc::Status status = memory->Register(&context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::UNIMPLEMENTED);
  EXPECT_TRUE(absl::StrContains(status.error_message(), "regions")) << status.error_message();
  EXPECT_FALSE(wire::ReadError(status).reason.empty());
}

TEST(LifecycleTest, ReflectionListsTheServices) {
  TestServer server;
  grpc::GenericStub stub(server.tcp_channel());
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const auto next = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  const auto call = stub.PrepareCall(
      &context, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", &queue);
  call->StartCall(nullptr);
  ASSERT_TRUE(next());
  grpc::Slice request(std::string("\x3a\x00", 2));  // list_services = ""
  call->WriteLast(grpc::ByteBuffer(&request, 1), grpc::WriteOptions(), nullptr);
  ASSERT_TRUE(next());
  grpc::ByteBuffer response;
  call->Read(&response, nullptr);
  ASSERT_TRUE(next());
  grpc::Slice slice;
  ASSERT_TRUE(response.DumpToSingleSlice(&slice).ok());
  const std::string text(reinterpret_cast<const char*>(slice.begin()), slice.size());
  for (const char* service : {"dynsplit.v1.Compression", "dynsplit.v1.Info", "dynsplit.v1.Sessions",
                              "dynsplit.v1.Memory", "grpc.health.v1.Health"}) {
    EXPECT_TRUE(absl::StrContains(text, service)) << service;
  }
  grpc::Status status;
  call->Finish(&status, nullptr);
  next();
}

TEST(LifecycleTest, StartRefusesWhatIsTaken) {
  TestServer server;
  ServerConfig config = TestConfig();
  config.unix_socket = server.unix_socket();
  const auto start = [](const ServerConfig& options) {
    std::vector<std::unique_ptr<Backend>> backends;
    backends.push_back(*CreateCpuBackend({.num_threads = 1, .memory_limit_bytes = 0}));
    return rpc::Server::Start(options, std::move(backends), "test").status();
  };
  EXPECT_TRUE(absl::IsUnavailable(start(config)));
  config.unix_socket.clear();
  config.listen = absl::StrCat("127.0.0.1:", server.server().port());
  EXPECT_TRUE(absl::IsUnavailable(start(config)));
  config.listen = "127.0.0.1:0";
  config.metrics_listen = absl::StrCat("127.0.0.1:", server.server().http_port());
  EXPECT_TRUE(absl::IsUnavailable(start(config)));
  config.metrics_listen = "";
  config.default_profile = "nobody";
  EXPECT_TRUE(absl::IsInvalidArgument(start(config)));
  config.default_profile = "";
  config.unix_socket = std::string(DYNSPLIT_TEST_DATA) + "/README.md";
  EXPECT_TRUE(absl::IsInvalidArgument(start(config)));
}

TEST(Lifecycle, WithoutADefaultProfileRequestsNameTheirs) {
  ServerConfig config = TestConfig();
  config.default_profile = "";
  TestServer server(config);
  const auto stub = v1::Compression::NewStub(server.unix_channel());
  Script script = MakeScript();
  const Reply unnamed = Exchange(*stub, Call::kCompress, script);
  EXPECT_EQ(unnamed.status.error_code(), grpc::INVALID_ARGUMENT);
  ASSERT_EQ(unnamed.error.fields.size(), 1u);
  EXPECT_EQ(unnamed.error.fields[0].field, "policy.segmentation.profile");
  script.begin.mutable_policy()->mutable_segmentation()->set_profile("smollm2");
  EXPECT_TRUE(Exchange(*stub, Call::kCompress, script).status.ok());
  // Methods that read no token ids need none.
  script.begin.mutable_policy()->clear_segmentation();
  script.begin.mutable_policy()->set_preset("snapkv");
  EXPECT_TRUE(Exchange(*stub, Call::kCompress, script).status.ok());
}

}  // namespace
}  // namespace dynsplit::e2e

// SPDX-License-Identifier: Apache-2.0
//
// How a layer passes the device: one wait, nothing looked at or freed before it, and what the trace
// says of it.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/synchronization/notification.h"
#include "nlohmann/json.hpp"
#include "server/cpu/cpu_backend.h"
#include "server/runtime/trace.h"
#include "tests/e2e/harness.h"
#include "tests/oracle/late_backend.h"

namespace dynsplit::e2e {
namespace {

constexpr uint16_t kNaN = 0x7fc0;

class LayerPassesTest : public testing::Test {
 protected:
  LayerPassesTest()
      : server_(TestConfig(),
                OneBackend(MakeLateBackend(CreateCpuBackend({.num_threads = 2}).value(), record_))),
        stub_(v1::Compression::NewStub(server_.unix_channel())) {}
  ~LayerPassesTest() override {
    record_->set_on_synchronize(nullptr);
    EXPECT_TRUE(server_.ReturnsToBaseline());
    EXPECT_EQ(record_->num_freed_early(), 0);
  }

  Reply Run(const Script& script, Call call = Call::kCompress) {
    return Exchange(*stub_, call, script);
  }
  // Waits for the device per layer, beside those of the request.
  double WaitsPerLayer(const std::function<void(v1::Begin&)>& edit, Call call) {
    int64_t waits[2] = {};
    constexpr int32_t kLayers[2] = {2, 7};
    for (int i = 0; i < 2; ++i) {
      Script script = MakeScript({.num_layers = kLayers[i], .num_tokens = 300});
      edit(script.begin);
      const int64_t before = record_->num_synchronizations();
      const Reply reply = Run(script, call);
      EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
      waits[i] = record_->num_synchronizations() - before;
    }
    return static_cast<double>(waits[1] - waits[0]) / (kLayers[1] - kLayers[0]);
  }

  const std::shared_ptr<LateRecord> record_ = std::make_shared<LateRecord>();
  TestServer server_;
  std::unique_ptr<Stub> stub_;
};

TEST_F(LayerPassesTest, ALayerWaitsOnce) {
  for (const bool receipt : {false, true}) {
    const auto edit = [&](v1::Begin& begin) { begin.set_no_receipt(!receipt); };
    EXPECT_EQ(WaitsPerLayer(edit, Call::kCompress), 1) << receipt;
    EXPECT_EQ(WaitsPerLayer(edit, Call::kPlan), 1) << receipt;
  }
  // How many tokens whole blocks have is the device's to say.
  EXPECT_EQ(WaitsPerLayer([](v1::Begin& begin) { begin.mutable_policy()->set_preset("chunkkv"); },
                          Call::kCompress),
            2);
}

TEST_F(LayerPassesTest, ResultsAreThoseOfABackendThatWaits) {
  TestServer plain;
  const auto stub = v1::Compression::NewStub(plain.unix_channel());
  for (const char* preset : {"dynsplit", "snapkv", "chunkkv", "streamingllm", "quest"}) {
    for (const v1::Scope scope : {v1::SCOPE_LAYER, v1::SCOPE_GLOBAL, v1::SCOPE_LAYER_HEAD}) {
      Script script = MakeScript({.num_layers = 5, .num_tokens = 400});
      script.begin.mutable_policy()->set_preset(preset);
      script.begin.mutable_policy()->set_scope(scope);
      const Reply expected = Exchange(*stub, Call::kCompress, script);
      const Reply reply = Run(script);
      ASSERT_EQ(reply.status.error_code(), expected.status.error_code()) << preset;
      if (!expected.status.ok()) continue;  // a scope that this preset has not
      EXPECT_EQ(reply.end.plan().hash(), expected.end.plan().hash()) << preset;
      EXPECT_EQ(reply.bytes, expected.bytes) << preset;
      EXPECT_EQ(reply.end.receipt().SerializeAsString(), expected.end.receipt().SerializeAsString())
          << preset;
    }
  }
}

TEST_F(LayerPassesTest, AValueThatIsNotFiniteIsTheErrorWhateverCameOfIt) {
  for (const bool floor : {false, true}) {
    Script script = MakeScript({.num_layers = 4, .num_tokens = 300});
    // Out of reach from what these values make of the mass.
    if (floor) {
      script.begin.mutable_policy()->mutable_quality_floor()->set_min_retained_attention_mass(0.4);
      script.begin.mutable_policy()->mutable_quality_floor()->set_max_kept_ratio(0.5);
    }
    Tensor& keys = Find(script, v1::TENSOR_KIND_KEY, 2);
    for (size_t i = 0; i < keys.bytes.size() / 2; i += 16) {
      std::memcpy(&keys.bytes[2 * i], &kNaN, sizeof(kNaN));
    }
    for (const Call call : {Call::kCompress, Call::kPlan}) {
      const Reply reply = Run(script, call);
      EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
      ASSERT_EQ(reply.error.fields.size(), 1U) << reply.status.error_message();
      EXPECT_EQ(reply.error.fields[0].field, "tensors.keys");
      EXPECT_TRUE(absl::StrContains(reply.error.fields[0].description, "layer 2"))
          << reply.error.fields[0].description;
      EXPECT_TRUE(absl::StrContains(reply.error.fields[0].description, "row 0"))
          << reply.error.fields[0].description;
      EXPECT_LE(reply.layers.size(), 2U);  // nothing of the layer or of later ones has left
    }
  }
}

TEST_F(LayerPassesTest, CancellationBetweenEnqueueingAndTheWait) {
  const Script script = MakeScript({.num_layers = 3, .num_tokens = 300});
  const std::vector<v1::CompressRequest> messages = Messages(script);
  // The wait of the preparation, and of each layer.
  for (int at = 1; at <= 4; ++at) {
    grpc::ClientContext context;
    const auto stream = Open(*stub_, Call::kCompress, context);
    absl::Notification waiting;
    absl::Notification cancelled;
    auto waits = std::make_shared<std::atomic<int>>(0);
    record_->set_on_synchronize([&waiting, &cancelled, waits, at] {
      if (++*waits != at) return;
      waiting.Notify();
      cancelled.WaitForNotificationWithTimeout(absl::Seconds(10));
    });
    for (const v1::CompressRequest& message : messages) stream->Write(message);
    stream->WritesDone();
    EXPECT_TRUE(waiting.WaitForNotificationWithTimeout(absl::Seconds(10))) << at;
    context.TryCancel();
    v1::CompressResponse response;
    while (stream->Read(&response)) {
    }
    const grpc::Status status = stream->Finish();
    cancelled.Notify();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::CANCELLED) << at;
    EXPECT_TRUE(server_.ReturnsToBaseline()) << at;
    record_->set_on_synchronize(nullptr);
  }
}

// Wherever memory ends, no host memory goes while a copy is not done with it.
TEST(LayerMemoryTest, ShortageAtEveryAllocationFreesNothingEarly) {
  Script script = MakeScript({.num_layers = 2, .num_tokens = 300});
  script.begin.mutable_policy()->mutable_budget()->set_kept_ratio(0.5);
  int num_refused = 0;
  bool served = false;
  for (int64_t limit_bytes = 60'000; !served && limit_bytes < 2'000'000; limit_bytes += 4'000) {
    const auto record = std::make_shared<LateRecord>();
    TestServer server(
        TestConfig(),
        OneBackend(MakeLateBackend(
            CreateCpuBackend({.num_threads = 1, .memory_limit_bytes = limit_bytes}).value(),
            record)));
    const auto stub = v1::Compression::NewStub(server.unix_channel());
    const Reply reply = Exchange(*stub, Call::kCompress, script);
    served = reply.status.ok();
    if (!served) {
      ++num_refused;
      EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED)
          << reply.status.error_message();
    }
    EXPECT_TRUE(server.ReturnsToBaseline()) << limit_bytes;
    EXPECT_EQ(record->num_freed_early(), 0) << limit_bytes;
  }
  EXPECT_TRUE(served);
  EXPECT_GT(num_refused, 5);
}

// -- trace ----------------------------------------------------------------------------------------

struct Span {
  double begin_us = 0, end_us = 0;
};
// By layer and step.
using Spans = std::map<int32_t, std::map<std::string, Span>>;

double NowMicroseconds() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Spans ReadTrace(const std::string& path, const std::string& request_id) {
  Spans spans;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const nlohmann::json span = nlohmann::json::parse(line);
    if (span.at("request") != request_id) continue;
    const bool is_new =
        spans[span.at("layer").get<int32_t>()]
            .emplace(span.at("what").get<std::string>(),
                     Span{span.at("begin_us").get<double>(), span.at("end_us").get<double>()})
            .second;
    EXPECT_TRUE(is_new) << line;
  }
  return spans;
}

TEST(TraceTest, SpansFollowEachOtherAndCoverTheRequest) {
  std::string directory =
      (std::filesystem::temp_directory_path() / "dynsplit-trace-XXXXXX").string();
  ASSERT_NE(mkdtemp(directory.data()), nullptr);
  const absl::Cleanup clean = [&] {
    EXPECT_TRUE(OpenTrace("").ok());
    std::error_code ignored;
    std::filesystem::remove_all(directory, ignored);
  };
  ServerConfig config = TestConfig();
  config.trace = directory + "/trace.jsonl";
  TestServer server(config);
  const auto stub = v1::Compression::NewStub(server.unix_channel());
  Script script = MakeScript({.num_layers = 6, .num_tokens = 500});
  script.begin.set_request_id("traced \"request\"");
  const double begin_us = NowMicroseconds();
  const Reply reply = Exchange(*stub, Call::kCompress, script);
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  ASSERT_TRUE(server.ReturnsToBaseline());
  const double end_us = NowMicroseconds();

  const Spans spans = ReadTrace(config.trace, script.begin.request_id());
  ASSERT_EQ(spans.size(), 7U);  // the sequence's, and one a layer
  EXPECT_EQ(spans.at(-1).count("prepare"), 1U);
  const std::vector<std::string> steps = {"receive", "h2d",     "check", "score", "select",
                                          "gather",  "receipt", "d2h",   "send"};
  for (int32_t layer = 0; layer < 6; ++layer) {
    ASSERT_EQ(spans.at(layer).size(), steps.size()) << layer;
    double last_us = begin_us;
    for (const std::string& step : steps) {
      const Span& span = spans.at(layer).at(step);
      // Numbers are written with all their digits, and one clock is read for all of them.
      EXPECT_GE(span.begin_us, last_us) << layer << step;
      EXPECT_GE(span.end_us, span.begin_us) << layer << step;
      last_us = span.end_us;
    }
    EXPECT_LE(last_us, end_us);
    // No gap from copy to copy but for the check of values on the host.
    EXPECT_EQ(spans.at(layer).at("check").end_us, spans.at(layer).at("score").begin_us);
    EXPECT_EQ(spans.at(layer).at("score").end_us, spans.at(layer).at("select").begin_us);
    EXPECT_EQ(spans.at(layer).at("receipt").end_us, spans.at(layer).at("d2h").begin_us);
  }
}

TEST(TraceTest, AFileThatCannotBeOpenedIsRefused) {
  ServerConfig config = TestConfig();
  config.unix_socket = "/tmp/dynsplit-trace-refused.sock";
  config.trace = "/nonexistent/trace.jsonl";
  const auto server =
      rpc::Server::Start(config, CreateCpuBackend({.num_threads = 1}).value(), "test");
  ASSERT_FALSE(server.ok());
  EXPECT_TRUE(absl::StrContains(server.status().message(), "option trace is '/nonexistent/"))
      << server.status();
}

}  // namespace
}  // namespace dynsplit::e2e

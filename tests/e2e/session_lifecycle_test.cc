// SPDX-License-Identifier: Apache-2.0
//
// How sessions begin and end, who may use them, and what is refused. After every row others answer
// as before and no memory is left behind.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "proto/wire/status.h"
#include "tests/e2e/sequences.h"

namespace dynsplit::e2e {
namespace {

// Everything an error names, in one line.
std::string NamesOf(const absl::Status& status) {
  const wire::RichError error = wire::ReadError(status);
  std::string names = error.reason;
  for (const auto& field : error.fields) names += " " + field.field;
  for (const auto& violation : error.preconditions) names += " " + violation.type;
  return names;
}

void ExpectError(const absl::Status& status, absl::StatusCode code, const std::string& names) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_TRUE(absl::StrContains(NamesOf(status), names))
      << "names '" << NamesOf(status) << "': " << status;
  EXPECT_FALSE(status.message().empty());
}

constexpr auto kMissing = absl::StatusCode::kNotFound;
constexpr auto kExhausted = absl::StatusCode::kResourceExhausted;
constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;

// A server with a session that must answer the same when the test is over.
class SessionLifecycleTest : public testing::Test {
 protected:
  void Start(const ServerConfig& config = SessionConfig()) {
    server_ = std::make_unique<SessionServer>(config);
    witness_ = server_->Open(OpenJob(witness_sequence_, witness_sequence_.tokens())).session_id();
    expected_ = AnswerOf(server_->Select(StepOf(witness_sequence_, witness_)));
    held_bytes_ = server_->server().settled_bytes();
    EXPECT_GT(held_bytes_, 0);
  }
  void ExpectUnharmed() {
    EXPECT_TRUE(AnswerOf(server_->Select(StepOf(witness_sequence_, witness_))) == expected_);
    EXPECT_TRUE(server_->server().ReturnsToBaseline(held_bytes_));
  }
  void TearDown() override {
    if (server_ == nullptr) return;
    ExpectUnharmed();
    server_->Release(witness_);
    EXPECT_TRUE(server_->server().ReturnsToBaseline());
  }

  const Sequence witness_sequence_ = RandomSequence({.num_tokens = 200, .seed = 99});
  const Sequence sequence_ = RandomSequence({.num_tokens = 300, .seed = 5});
  std::unique_ptr<SessionServer> server_;
  std::string witness_, expected_;
  int64_t held_bytes_ = 0;
};

TEST_F(SessionLifecycleTest, ReleasedSessionsAreGoneAndRememberedAsSuch) {
  Start();
  const std::string id = server_->OpenAll(sequence_);
  EXPECT_GT(server_->server().held_bytes(), held_bytes_);
  EXPECT_GT(server_->Release(id), 0);
  EXPECT_EQ(server_->Release(id), 0);
  EXPECT_EQ(server_->Release(id), 0);
  Client& client = server_->client();
  ExpectError(client.Select(Request({StepOf(sequence_, id)})).status(), kMissing,
              "SESSION_RELEASED");
  CompressJob append = TokensJob(sequence_, 0, 10);
  append.begin.mutable_target()->set_session_id(id);
  append.begin.mutable_target()->set_position(300);
  ExpectError(client.AppendSession(append).status(), kMissing, "SESSION_RELEASED");
  CompressJob fetch;
  fetch.begin.mutable_target()->set_session_id(id);
  ExpectError(client.FetchSession(fetch).status(), kMissing, "SESSION_RELEASED");
  ExpectError(client.GetSession(GetRequest(id)).status(), kMissing, "SESSION_RELEASED");
  v1::RenewSessionRequest renew;
  renew.set_session_id(id);
  ExpectError(client.RenewSession(renew).status(), kMissing, "SESSION_RELEASED");
  // A batch with one that is gone answers for none.
  ExpectError(
      client.Select(Request({StepOf(witness_sequence_, witness_), StepOf(sequence_, id)})).status(),
      kMissing, "SESSION_RELEASED");
}

TEST_F(SessionLifecycleTest, UnknownAndForeignSessions) {
  Start();
  Client& client = server_->client();
  const std::string unknown = "no-such-session";
  ExpectError(client.Select(Request({StepOf(sequence_, unknown)})).status(), kMissing,
              "SESSION_UNKNOWN");
  ExpectError(client.GetSession(GetRequest(unknown)).status(), kMissing, "SESSION_UNKNOWN");
  ExpectError(client.ReleaseSession(ReleaseRequest(unknown)).status(), kMissing, "SESSION_UNKNOWN");
  CompressJob fetch;
  fetch.begin.mutable_target()->set_session_id(unknown);
  ExpectError(client.FetchSession(fetch).status(), kMissing, "SESSION_UNKNOWN");

  constexpr auto kDenied = absl::StatusCode::kPermissionDenied;
  constexpr char kOwner[] = "SESSION_OWNER";
  v1::SelectRequest select = Request({StepOf(witness_sequence_, witness_)});
  select.set_tenant("other");
  ExpectError(client.Select(select).status(), kDenied, kOwner);
  ExpectError(client.GetSession(GetRequest(witness_, "other")).status(), kDenied, kOwner);
  ExpectError(client.ReleaseSession(ReleaseRequest(witness_, "other")).status(), kDenied, kOwner);
  fetch.begin.mutable_target()->set_session_id(witness_);
  fetch.begin.set_tenant("other");
  ExpectError(client.FetchSession(fetch).status(), kDenied, kOwner);
  CompressJob append = AppendJob(sequence_, witness_, 200, 210);
  append.begin.set_tenant("other");
  ExpectError(client.AppendSession(append).status(), kDenied, kOwner);
}

TEST_F(SessionLifecycleTest, LeasesEndAndAreRenewedByUse) {
  Start();
  CompressJob job = OpenJob(sequence_, sequence_.tokens());
  job.begin.mutable_session()->set_lease_seconds(1);
  const std::string used = server_->Open(job).session_id();
  const std::string idle = server_->Open(job).session_id();
  const std::string renewed = server_->Open(job).session_id();
  v1::RenewSessionRequest renew;
  renew.set_session_id(renewed);
  renew.set_lease_seconds(100);
  const auto info = server_->client().RenewSession(renew);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_GT(info->lease_seconds_left(), 90);
  for (int i = 0; i < 8; ++i) {
    absl::SleepFor(absl::Milliseconds(200));
    EXPECT_FALSE(server_->Select(StepOf(sequence_, used)).tokens().empty());
  }
  const absl::Status expired =
      server_->client().Select(Request({StepOf(sequence_, idle)})).status();
  ExpectError(expired, kMissing, "SESSION_EXPIRED");
  // Get does not renew.
  for (int i = 0; i < 8; ++i) {
    absl::SleepFor(absl::Milliseconds(200));
    (void)server_->client().GetSession(GetRequest(used)).status();
  }
  ExpectError(server_->client().GetSession(GetRequest(used)).status(), kMissing, "SESSION_EXPIRED");
  EXPECT_GT(server_->Get(renewed).lease_seconds_left(), 80);
  ExpectError(server_->client().ReleaseSession(ReleaseRequest(idle)).status(), kMissing,
              "SESSION_EXPIRED");
  server_->Release(renewed);
}

TEST_F(SessionLifecycleTest, QuotaOfSessions) {
  ServerConfig config = SessionConfig();
  config.max_sessions = 2;
  Start(config);
  const std::string second = server_->OpenAll(sequence_);
  const absl::Status refused =
      server_->client().OpenSession(OpenJob(sequence_, sequence_.tokens())).status();
  ExpectError(refused, kExhausted, "");
  EXPECT_TRUE(wire::ReadError(refused).retry_after_ms.has_value()) << refused;
  server_->Release(second);
  server_->Release(server_->OpenAll(sequence_));
}

TEST_F(SessionLifecycleTest, QuotaOfATenantsBytes) {
  ServerConfig config = SessionConfig();
  config.tenant_session_bytes = 256 << 10;  // the witness takes 55 KiB, each of these 80
  Start(config);
  std::vector<std::string> ids;
  absl::Status refused;
  CompressJob job = OpenJob(sequence_, sequence_.tokens());
  for (int i = 0; i < 10 && refused.ok(); ++i) {
    const auto opened = server_->client().OpenSession(job);
    refused = opened.status();
    if (opened.ok()) ids.push_back(opened->end.session().session_id());
  }
  ExpectError(refused, kExhausted, "");
  EXPECT_TRUE(wire::ReadError(refused).retry_after_ms.has_value()) << refused;
  EXPECT_GE(ids.size(), 1U);
  EXPECT_LE(ids.size(), 3U);
  // Room reserved for later counts from the start.
  CompressJob roomy = OpenJob(sequence_, 10, 100'000);
  roomy.begin.set_tenant("roomy");
  ExpectError(server_->client().OpenSession(roomy).status(), kExhausted, "");
  // Another tenant has a quota of its own.
  job.begin.set_tenant("other");
  const auto other = server_->client().OpenSession(job);
  ASSERT_TRUE(other.ok()) << other.status();
  const std::string other_id = other->end.session().session_id();
  EXPECT_EQ(other->end.session().tenant(), "other");
  EXPECT_TRUE(server_->client().ReleaseSession(ReleaseRequest(other_id, "other")).ok());
  for (const std::string& id : ids) server_->Release(id);
}

TEST_F(SessionLifecycleTest, MoreThanDeviceAndHostTogetherHold) {
  ServerConfig config = SessionConfig();
  config.session_device_bytes = 256 << 10;
  config.session_host_bytes = 128 << 10;
  Start(config);
  std::vector<std::string> ids;
  absl::Status refused;
  for (int i = 0; i < 20 && refused.ok(); ++i) {
    const auto opened = server_->client().OpenSession(OpenJob(sequence_, sequence_.tokens()));
    refused = opened.status();
    if (opened.ok()) ids.push_back(opened->end.session().session_id());
  }
  ExpectError(refused, kExhausted, "");
  EXPECT_TRUE(wire::ReadError(refused).retry_after_ms.has_value()) << refused;
  EXPECT_GE(ids.size(), 2U);
  // What can never fit is said at once; a device session finds no room on the host.
  CompressJob huge = OpenJob(sequence_, sequence_.tokens(), 1'000'000);
  ExpectError(server_->client().OpenSession(huge).status(), kExhausted, "");
  for (const std::string& id : ids) server_->Release(id);
  // The witness may rest elsewhere now; it is the same size.
}

TEST_F(SessionLifecycleTest, AppendsAreAtTheEndAndWithinTheRoom) {
  Start();
  const std::string id = server_->Open(OpenJob(sequence_, 200, 50)).session_id();
  const std::string before = AnswerOf(server_->Select(StepOf(sequence_, id)));
  Client& client = server_->client();
  for (const int64_t position : {0, 199, 201, 250}) {
    CompressJob job = TokensJob(sequence_, 200, 210);
    job.begin.mutable_target()->set_session_id(id);
    job.begin.mutable_target()->set_position(position);
    ExpectError(client.AppendSession(job).status(), kPrecondition, "APPEND_POSITION");
  }
  const absl::Status full = client.AppendSession(AppendJob(sequence_, id, 200, 251)).status();
  ExpectError(full, kExhausted, "SESSION_FULL");
  EXPECT_FALSE(wire::ReadError(full).retry_after_ms.has_value());
  EXPECT_EQ(server_->Get(id).shape().num_tokens(), 200);
  EXPECT_TRUE(AnswerOf(server_->Select(StepOf(sequence_, id))) == before);
  EXPECT_EQ(server_->Append(sequence_, id, 200, 250).capacity_tokens(), 250);
  ExpectError(client.AppendSession(AppendJob(sequence_, id, 250, 251)).status(), kExhausted,
              "SESSION_FULL");
  server_->Release(id);
}

// A stream driven message by message.
struct RawCall {
  RawCall(SessionServer& server, SessionCall call, const CompressJob& job)
      : stub(v1::Sessions::NewStub(server.server().unix_channel())) {
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(30)));
    stream = e2e::Open(*stub, call, context);
    Script script;
    script.begin = job.begin;
    for (const InputTensor& input : job.tensors) {
      Tensor& tensor = script.tensors.emplace_back();
      tensor.bytes.assign(reinterpret_cast<const char*>(input.bytes.data()), input.bytes.size());
      tensor.descriptor.set_id(static_cast<uint32_t>(script.tensors.size()));
      tensor.descriptor.set_kind(input.kind);
      if (input.layer.has_value()) tensor.descriptor.set_layer(*input.layer);
      tensor.descriptor.set_dtype(input.dtype);
      tensor.descriptor.set_byte_size(static_cast<int64_t>(tensor.bytes.size()));
    }
    messages = Messages(script);
  }
  // Begin, and the answer that it was accepted.
  bool Begin() {
    v1::CompressResponse response;
    return stream->Write(messages[0]) && stream->Read(&response) && response.has_accepted();
  }
  absl::Status Finish() {
    for (v1::CompressResponse response; stream->Read(&response);) {
    }
    return wire::ToAbsl(stream->Finish());
  }

  std::unique_ptr<v1::Sessions::Stub> stub;
  grpc::ClientContext context;
  std::unique_ptr<CallStream> stream;
  std::vector<v1::CompressRequest> messages;
};

struct RawAppend : RawCall {
  RawAppend(SessionServer& server, const Sequence& sequence, const std::string& id, int64_t begin,
            int64_t end)
      : RawCall(server, SessionCall::kAppend, AppendJob(sequence, id, begin, end)) {}
};

TEST_F(SessionLifecycleTest, AppendsCutOffLeaveTheSessionAsItWas) {
  Start();
  const std::string id = server_->Open(OpenJob(sequence_, 200, 100)).session_id();
  const std::string before = AnswerOf(server_->Select(StepOf(sequence_, id)));
  const int64_t held = server_->server().settled_bytes();
  const size_t num_messages = RawAppend(*server_, sequence_, id, 200, 300).messages.size();
  ASSERT_EQ(num_messages, 2U + 5U);
  for (size_t sent = 1; sent < num_messages; ++sent) {
    RawAppend append(*server_, sequence_, id, 200, 300);
    ASSERT_TRUE(append.Begin()) << append.Finish();
    for (size_t i = 1; i < sent; ++i) ASSERT_TRUE(append.stream->Write(append.messages[i]));
    EXPECT_TRUE(AnswerOf(server_->Select(StepOf(sequence_, id))) == before);
    append.context.TryCancel();
    EXPECT_TRUE(absl::IsCancelled(append.Finish()));
    EXPECT_TRUE(server_->server().ReturnsToBaseline(held)) << sent;
    EXPECT_EQ(server_->Get(id).shape().num_tokens(), 200);
    EXPECT_TRUE(AnswerOf(server_->Select(StepOf(sequence_, id))) == before) << sent;
  }
  // Half-closed too early, and with a checksum that is wrong.
  {
    RawAppend append(*server_, sequence_, id, 200, 300);
    ASSERT_TRUE(append.Begin());
    append.stream->WritesDone();
    EXPECT_TRUE(absl::IsInvalidArgument(append.Finish()));
    RawAppend corrupt(*server_, sequence_, id, 200, 300);
    ASSERT_TRUE(corrupt.Begin());
    corrupt.messages[2].set_crc32c(corrupt.messages[2].crc32c() ^ 1);
    for (size_t i = 1; i < num_messages && corrupt.stream->Write(corrupt.messages[i]); ++i) {
    }
    EXPECT_TRUE(absl::IsDataLoss(corrupt.Finish()));
  }
  EXPECT_TRUE(AnswerOf(server_->Select(StepOf(sequence_, id))) == before);
  server_->Append(sequence_, id, 200, 300);
  const std::string whole = server_->OpenAll(sequence_);
  EXPECT_TRUE(AnswerOf(server_->Select(StepOf(sequence_, id))) ==
              AnswerOf(server_->Select(StepOf(sequence_, whole))));
  server_->Release(whole);
  server_->Release(id);
}

TEST_F(SessionLifecycleTest, OneAppendAtATime) {
  Start();
  const std::string id = server_->Open(OpenJob(sequence_, 200, 100)).session_id();
  {
    RawAppend append(*server_, sequence_, id, 200, 250);
    ASSERT_TRUE(append.Begin());
    ExpectError(server_->client().AppendSession(AppendJob(sequence_, id, 200, 250)).status(),
                kPrecondition, "APPEND_RUNNING");
    for (size_t i = 1; i < append.messages.size(); ++i) {
      ASSERT_TRUE(append.stream->Write(append.messages[i]));
    }
    append.stream->WritesDone();
    EXPECT_TRUE(append.Finish().ok());
  }
  EXPECT_EQ(server_->Append(sequence_, id, 250, 300).shape().num_tokens(), 300);
  server_->Release(id);
}

TEST_F(SessionLifecycleTest, ReleaseWhileInUseWaitsForTheUse) {
  Start();
  const std::string id = server_->Open(OpenJob(sequence_, 200, 100)).session_id();
  RawAppend append(*server_, sequence_, id, 200, 250);
  ASSERT_TRUE(append.Begin());
  server_->Release(id);
  ExpectError(server_->client().Select(Request({StepOf(sequence_, id)})).status(), kMissing,
              "SESSION_RELEASED");
  append.context.TryCancel();
  EXPECT_FALSE(append.Finish().ok());
}

TEST_F(SessionLifecycleTest, OpensCutOffLeaveNothing) {
  Start();
  const CompressJob job = OpenJob(sequence_, sequence_.tokens());
  const size_t num_messages = RawCall(*server_, SessionCall::kOpen, job).messages.size();
  for (size_t sent = 1; sent < num_messages; ++sent) {  // all but the end
    RawCall open(*server_, SessionCall::kOpen, job);
    ASSERT_TRUE(open.Begin()) << open.Finish();
    for (size_t i = 1; i < sent; ++i) ASSERT_TRUE(open.stream->Write(open.messages[i]));
    open.context.TryCancel();
    EXPECT_TRUE(absl::IsCancelled(open.Finish()));
    ExpectUnharmed();
  }
}

TEST_F(SessionLifecycleTest, MapNeedsDeviceMemory) {
  Start();
  v1::MapSessionRequest map;
  map.set_session_id(witness_);
  EXPECT_TRUE(absl::IsUnimplemented(server_->client().MapSession(map).status()));
  v1::UnmapSessionRequest unmap;
  unmap.set_session_id(witness_);
  EXPECT_FALSE(server_->client().UnmapSession(unmap).ok());
}

TEST(SessionDrainTest, OpenIsRefusedWhileSelectGoesOn) {
  const Sequence sequence = RandomSequence({.num_tokens = 300});
  ServerConfig config = SessionConfig();
  config.drain_timeout = absl::Seconds(20);
  SessionServer server(config);
  const std::string id = server.Open(OpenJob(sequence, 200, 100)).session_id();
  const std::string expected = AnswerOf(server.Select(StepOf(sequence, id)));
  // A stream that keeps the server from being done.
  RawAppend append(server, sequence, id, 200, 300);
  ASSERT_TRUE(append.Begin());
  std::thread drain([&] { server.server().server().Shutdown(); });
  absl::Status refused;
  EXPECT_TRUE(Eventually([&] {
    const auto opened = server.client().OpenSession(OpenJob(sequence, 200));
    refused = opened.status();
    if (opened.ok()) server.Release(opened->end.session().session_id());
    return !refused.ok();
  }));
  EXPECT_TRUE(absl::IsUnavailable(refused)) << refused;
  EXPECT_TRUE(wire::ReadError(refused).retry_after_ms.has_value());
  EXPECT_TRUE(AnswerOf(server.Select(StepOf(sequence, id))) == expected);
  EXPECT_EQ(server.Get(id).shape().num_tokens(), 200);
  for (size_t i = 1; i < append.messages.size(); ++i) {
    EXPECT_TRUE(append.stream->Write(append.messages[i]));
  }
  append.stream->WritesDone();
  EXPECT_TRUE(append.Finish().ok());
  drain.join();
}

TEST(SessionInfoTest, ServerSaysWhatItHas) {
  SessionServer server;
  const auto info = server.client().GetServerInfo();
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_TRUE(info->capabilities().sessions());
  bool shm = false;
  for (const int plane : info->capabilities().data_planes()) {
    shm |= plane == v1::Capabilities::DATA_PLANE_SHM;
  }
  EXPECT_TRUE(shm);
  const Sequence sequence = SampleSequence("prose");
  CompressJob job = OpenJob(sequence, 1000, 283);
  job.begin.set_tenant("me");
  job.begin.mutable_session()->set_lease_seconds(77);
  const v1::SessionInfo session = server.Open(job);
  EXPECT_GE(session.session_id().size(), 16U);
  EXPECT_EQ(session.shape().num_tokens(), 1000);
  EXPECT_EQ(session.shape().num_kv_heads(), 3);
  EXPECT_EQ(session.capacity_tokens(), 1283);
  EXPECT_EQ(session.tenant(), "me");
  EXPECT_EQ(session.options().lease_seconds(), 77);
  EXPECT_EQ(session.options().reserve_tokens(), 283);
  EXPECT_NEAR(session.lease_seconds_left(), 77, 5);
  EXPECT_EQ(session.policy().preset(), "dynsplit_index");
  EXPECT_EQ(session.policy().budget().kept_ratio(), 0.1);
  EXPECT_EQ(session.policy().segmentation().profile(), "smollm2_table7");
  EXPECT_FALSE(session.endpoint().empty());
  EXPECT_GT(session.num_blocks(), 1000 / 20);
  EXPECT_LT(session.num_blocks(), 1000 / 8 + 1);
  EXPECT_LT(session.open_block_begin(), 1000);
  const auto got = server.client().GetSession(GetRequest(session.session_id(), "me"));
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->bytes().SerializeAsString(), session.bytes().SerializeAsString());
  EXPECT_TRUE(server.client().ReleaseSession(ReleaseRequest(session.session_id(), "me")).ok());
  EXPECT_TRUE(server.server().ReturnsToBaseline());
}

}  // namespace
}  // namespace dynsplit::e2e

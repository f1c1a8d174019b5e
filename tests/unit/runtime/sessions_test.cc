// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/sessions.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/cpu/cpu_backend.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

constexpr int64_t kNumTokens = 64;

std::string Reason(const absl::Status& status) { return GetErrorDetails(status).type; }

class SessionStoreTest : public testing::Test {
 protected:
  void SetUp() override { Restart({}); }
  void TearDown() override {
    store_.reset();
    EXPECT_EQ(backend_->device_bytes_in_use(), 0);
    EXPECT_EQ(backend_->host_bytes_in_use(), 0);
  }

  void Restart(SessionStore::Options options) {
    options.now = [this] { return now_; };
    store_.reset();
    store_ = std::make_unique<SessionStore>(options);
  }

  static ResidentSpec Spec() {
    ResidentSpec spec;
    spec.shape = {.num_layers = 2,
                  .num_query_heads = 2,
                  .num_kv_heads = 1,
                  .num_tokens = kNumTokens,
                  .head_dim = 16};
    spec.policy = FindPreset("quest").value()->policy;
    spec.capacity_tokens = kNumTokens;
    return spec;
  }
  // Of a session with Spec().
  static int64_t KeyValueBytes() { return PredictResident(Spec()).key_value_bytes; }
  static int64_t IndexBytes() { return PredictResident(Spec()).index_bytes; }

  absl::StatusOr<std::string> TryOpen(SessionSettings settings = {.tenant = "a"}) {
    absl::StatusOr<std::shared_ptr<Session>> session =
        store_->Reserve(std::move(settings), Spec(), nullptr, *backend_);
    if (!session.ok()) return session.status();
    if (absl::Status status = store_->Materialize(**session, *stream_); !status.ok()) return status;
    std::vector<uint16_t> zeros(static_cast<size_t>(kNumTokens * 16), 0);
    {
      absl::MutexLock lock(&(*session)->mu);
      ResidentSequence& sequence = *(*session)->sequence;
      absl::Status status = sequence.Begin({}, kNumTokens, *stream_);
      for (int32_t layer = 0; layer < 2; ++layer) {
        LayerTensors tensors;
        tensors.layer = layer;
        tensors.keys = DenseView(zeros.data(), DType::kBFloat16, kNumTokens, 1, 16);
        tensors.values = tensors.keys;
        status.Update(sequence.StoreLayer(tensors, *stream_));
      }
      status.Update(sequence.Commit(*stream_));
      if (!status.ok()) return status;
    }
    store_->Publish(*session);
    return (*session)->id();
  }
  std::string Open(SessionSettings settings = {.tenant = "a"}) {
    absl::StatusOr<std::string> id = TryOpen(std::move(settings));
    EXPECT_TRUE(id.ok()) << id.status();
    return id.value_or("");
  }
  Residence ResidenceOf(const std::string& id) {
    SessionUse use = store_->Peek(id, "a").value();
    absl::ReaderMutexLock lock(&use->mu);
    return use->sequence->residence();
  }

  absl::Time now_ = absl::UnixEpoch();
  std::unique_ptr<Backend> backend_ = CreateCpuBackend({.num_threads = 1}).value();
  std::unique_ptr<Stream> stream_ = backend_->CreateStream().value();
  std::unique_ptr<SessionStore> store_;
};

TEST_F(SessionStoreTest, IdsAreLongAndDiffer) {
  const std::string first = Open();
  EXPECT_EQ(first.size(), 34U);
  EXPECT_NE(first, Open());
}

TEST_F(SessionStoreTest, EndingsAreToldApart) {
  const std::string released = Open();
  const std::string expired = Open({.tenant = "a", .lease = absl::Seconds(10)});
  EXPECT_EQ(store_->Release(released, "a").value(), KeyValueBytes() + IndexBytes());
  EXPECT_EQ(store_->Release(released, "a").value(), 0);
  now_ += absl::Seconds(10);
  EXPECT_EQ(Reason(store_->Use(released, "a").status()), "SESSION_RELEASED");
  const absl::Status gone = store_->Use(expired, "a").status();
  EXPECT_EQ(gone.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Reason(gone), "SESSION_EXPIRED");
  EXPECT_EQ(Reason(store_->Release(expired, "a").status()), "SESSION_EXPIRED");
  EXPECT_EQ(Reason(store_->Use("s-0", "a").status()), "SESSION_UNKNOWN");
  now_ += absl::Minutes(11);
  store_->Sweep();
  EXPECT_EQ(Reason(store_->Use(released, "a").status()), "SESSION_UNKNOWN");
  EXPECT_EQ(store_->totals().released, 1);
  EXPECT_EQ(store_->totals().expired, 1);
}

TEST_F(SessionStoreTest, OnlyTheOwnerMayTouchIt) {
  const std::string id = Open();
  for (const absl::Status& status :
       {store_->Use(id, "b").status(), store_->Peek(id, "b").status(), store_->Renew(id, "b", {}),
        store_->Release(id, "b").status(), store_->UseForAppend(id, "b", kNumTokens).status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied);
    EXPECT_EQ(Reason(status), "SESSION_OWNER");
  }
  ASSERT_TRUE(store_->Release(id, "a").ok());
  EXPECT_EQ(store_->Use(id, "b").status().code(), absl::StatusCode::kPermissionDenied);
}

TEST_F(SessionStoreTest, UseRenewsTheLeaseAndPeekDoesNot) {
  const std::string id = Open({.tenant = "a", .lease = absl::Seconds(10)});
  now_ += absl::Seconds(9);
  { const SessionUse use = store_->Use(id, "a").value(); }
  now_ += absl::Seconds(9);
  {
    const SessionUse use = store_->Peek(id, "a").value();
    EXPECT_EQ(store_->StateOf(*use.get()).lease_left, absl::Seconds(1));
  }
  now_ += absl::Seconds(1);
  EXPECT_EQ(Reason(store_->Peek(id, "a").status()), "SESSION_EXPIRED");
}

TEST_F(SessionStoreTest, RenewCanChangeTheLease) {
  const std::string id = Open({.tenant = "a", .lease = absl::Seconds(10)});
  ASSERT_TRUE(store_->Renew(id, "a", absl::Seconds(100)).ok());
  now_ += absl::Seconds(99);
  ASSERT_TRUE(store_->Renew(id, "a", absl::ZeroDuration()).ok());
  now_ += absl::Seconds(99);
  EXPECT_TRUE(store_->Peek(id, "a").ok());
}

TEST_F(SessionStoreTest, ASessionInUseDoesNotExpire) {
  const std::string id = Open({.tenant = "a", .lease = absl::Seconds(10)});
  {
    const SessionUse use = store_->Use(id, "a").value();
    now_ += absl::Seconds(100);
    store_->Sweep();
    EXPECT_TRUE(store_->Use(id, "a").ok());
  }
  EXPECT_TRUE(store_->Use(id, "a").ok());  // renewed up to the call's end
}

TEST_F(SessionStoreTest, SweepFreesMemory) {
  Open({.tenant = "a", .lease = absl::Seconds(10)});
  EXPECT_GT(backend_->device_bytes_in_use(), 0);
  now_ += absl::Seconds(10);
  store_->Sweep();
  EXPECT_EQ(backend_->device_bytes_in_use(), 0);
  EXPECT_EQ(store_->totals().num_sessions, 0);
  EXPECT_EQ(store_->totals().device_bytes, 0);
}

TEST_F(SessionStoreTest, MemoryGoesWithTheLastUser) {
  const std::string id = Open();
  {
    const SessionUse use = store_->Use(id, "a").value();
    ASSERT_TRUE(store_->Release(id, "a").ok());
    EXPECT_GT(backend_->device_bytes_in_use(), 0);
    absl::ReaderMutexLock lock(&use->mu);
    EXPECT_EQ(use->sequence->num_tokens(), kNumTokens);
  }
  EXPECT_EQ(backend_->device_bytes_in_use(), 0);
}

TEST_F(SessionStoreTest, AnUnpublishedSessionLeavesNothing) {
  Restart({.max_sessions = 1});
  {
    const std::shared_ptr<Session> session =
        store_->Reserve({.tenant = "a"}, Spec(), nullptr, *backend_).value();
    ASSERT_TRUE(store_->Materialize(*session, *stream_).ok());
    EXPECT_EQ(Reason(store_->Use(session->id(), "a").status()), "SESSION_UNKNOWN");
    EXPECT_EQ(store_->Reserve({.tenant = "a"}, Spec(), nullptr, *backend_).status().code(),
              absl::StatusCode::kResourceExhausted);
  }
  EXPECT_EQ(backend_->device_bytes_in_use(), 0);
  EXPECT_EQ(store_->totals().device_bytes, 0);
  Open();
}

TEST_F(SessionStoreTest, QuotasAreByTenant) {
  Restart({.max_tenant_bytes = 2 * (KeyValueBytes() + IndexBytes())});
  const std::string first = Open();
  Open();
  const absl::Status status = TryOpen().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(GetErrorDetails(status).retry_after_ms.has_value());
  Open({.tenant = "b"});
  ASSERT_TRUE(store_->Release(first, "a").ok());
  Open();
  ResidentSpec large = Spec();
  large.capacity_tokens = 4 * kNumTokens;
  EXPECT_EQ(Reason(store_->Reserve({.tenant = "c"}, large, nullptr, *backend_).status()),
            "SESSION_TOO_LARGE");
}

TEST_F(SessionStoreTest, TheLeastRecentlyUsedIsDemoted) {
  // Indices of four and K and V of two.
  Restart({.max_device_bytes = 4 * IndexBytes() + 2 * KeyValueBytes()});
  const std::string first = Open();
  now_ += absl::Seconds(1);
  const std::string second = Open();
  now_ += absl::Seconds(1);
  { const SessionUse use = store_->Use(first, "a").value(); }
  now_ += absl::Seconds(1);
  const std::string third = Open();
  EXPECT_EQ(ResidenceOf(first), Residence::kDevice);
  EXPECT_EQ(ResidenceOf(second), Residence::kHost);
  EXPECT_EQ(ResidenceOf(third), Residence::kDevice);
  EXPECT_EQ(store_->totals().demotions, 1);
  EXPECT_EQ(store_->totals().host_bytes, KeyValueBytes());

  SessionUse use = store_->Use(second, "a").value();
  EXPECT_FALSE(store_->ShouldRestore(*use.get()));
  ASSERT_TRUE(store_->Release(first, "a").ok());
  EXPECT_TRUE(store_->ShouldRestore(*use.get()));
  ASSERT_TRUE(store_->Restore(*use.get(), *stream_).ok());
  EXPECT_EQ(ResidenceOf(second), Residence::kDevice);
  EXPECT_EQ(store_->totals().restorations, 1);
  EXPECT_EQ(store_->totals().host_bytes, 0);
  EXPECT_FALSE(store_->ShouldRestore(*use.get()));
}

TEST_F(SessionStoreTest, MappedAndAppendedSessionsStay) {
  Restart({.max_device_bytes = 4 * IndexBytes() + 2 * KeyValueBytes()});
  SessionUse mapped = store_->Use(Open(), "a").value();
  SessionUse appended = store_->UseForAppend(Open(), "a", kNumTokens).value();
  ASSERT_TRUE(store_->Map(*mapped.get()).ok());
  const std::string third = Open();
  EXPECT_EQ(ResidenceOf(third), Residence::kHost);  // nothing could make way
  EXPECT_EQ(
      TryOpen({.tenant = "a", .placement = SessionSettings::Placement::kDevice}).status().code(),
      absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(store_->Unmap(*mapped.get()).ok());
  EXPECT_EQ(Reason(store_->Unmap(*mapped.get())), "SESSION_NOT_MAPPED");
  Open({.tenant = "a", .placement = SessionSettings::Placement::kDevice});
  absl::ReaderMutexLock lock(&mapped->mu);
  EXPECT_EQ(mapped->sequence->residence(), Residence::kHost);
  EXPECT_EQ(Reason(store_->Map(*mapped.get())), "SESSION_DEMOTED");
}

TEST_F(SessionStoreTest, HostPlacementIsNeverRestored) {
  const std::string id = Open({.tenant = "a", .placement = SessionSettings::Placement::kHost});
  EXPECT_EQ(ResidenceOf(id), Residence::kHost);
  const SessionUse use = store_->Use(id, "a").value();
  EXPECT_FALSE(store_->ShouldRestore(*use.get()));
}

TEST_F(SessionStoreTest, OneAppendAtATimeAndOnlyAtTheEnd) {
  const std::string id = Open();
  EXPECT_EQ(Reason(store_->UseForAppend(id, "a", kNumTokens - 1).status()), "APPEND_POSITION");
  {
    const SessionUse append = store_->UseForAppend(id, "a", kNumTokens).value();
    const absl::Status second = store_->UseForAppend(id, "a", kNumTokens).status();
    EXPECT_EQ(second.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(Reason(second), "APPEND_RUNNING");
    EXPECT_TRUE(store_->Use(id, "a").ok());
  }
  EXPECT_TRUE(store_->UseForAppend(id, "a", kNumTokens).ok());
}

}  // namespace
}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/select_batcher.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/notification.h"
#include "server/cpu/cpu_backend.h"
#include "server/pipeline/errors.h"
#include "tests/unit/runtime/hooked_backend.h"

namespace dynsplit {
namespace {

constexpr int32_t kLayers = 2;
constexpr int32_t kQueryHeads = 4;
constexpr int32_t kHeads = 2;
constexpr int32_t kDim = 16;
constexpr int64_t kBudget = 40;

std::vector<float> RandomFloats(size_t count, uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

// Counts operations; the first of them waits until it is told to go on.
class Gate {
 public:
  absl::Status Pass(std::string_view operation) {
    if (operation != "ScoreBlocks") return absl::OkStatus();
    if (num_passed_++ > 0) return absl::OkStatus();
    reached_.Notify();
    open_.WaitForNotification();
    return absl::OkStatus();
  }
  void WaitUntilReached() { reached_.WaitForNotification(); }
  void Open() { open_.Notify(); }
  int num_passed() const { return num_passed_; }

 private:
  std::atomic<int> num_passed_ = 0;
  absl::Notification reached_, open_;
};

class SelectBatcherTest : public testing::Test {
 protected:
  void SetUp() override {
    auto backend = std::make_unique<HookedBackend>(*CreateCpuBackend({.num_threads = 2}));
    backend_ = std::move(backend);
    stream_ = *backend_->CreateStream();
    store_ = std::make_unique<SessionStore>(SessionStore::Options{});
    regions_ = std::make_unique<RegionStore>(RegionStore::Options{},
                                             std::vector<Backend*>{backend_.get()});
    Restart({});
  }
  void TearDown() override {
    batcher_.reset();
    store_.reset();
    EXPECT_EQ(backend_->device_bytes_in_use(), 0);
    EXPECT_EQ(backend_->host_bytes_in_use(), 0);
  }

  void Restart(SelectBatch::Limits limits) {
    batcher_ = *SelectBatcher::Create(*backend_, *regions_, metrics_, limits);
  }

  std::string Open(int64_t num_tokens, uint64_t seed) {
    ResidentSpec spec;
    spec.shape = {.num_layers = kLayers,
                  .num_query_heads = kQueryHeads,
                  .num_kv_heads = kHeads,
                  .num_tokens = num_tokens,
                  .head_dim = kDim};
    spec.policy = FindPreset("quest").value()->policy;
    spec.key_dtype = spec.value_dtype = DType::kFloat32;
    spec.summary_dtype = DType::kFloat32;
    spec.capacity_tokens = num_tokens;
    const std::shared_ptr<Session> session =
        *store_->Reserve({.tenant = "a"}, spec, nullptr, *backend_);
    EXPECT_TRUE(store_->Materialize(*session, *stream_).ok());
    std::vector<float> rows = RandomFloats(static_cast<size_t>(num_tokens * kHeads * kDim), seed);
    {
      absl::MutexLock lock(&session->mu);
      ResidentSequence& sequence = *session->sequence;
      absl::Status status = sequence.Begin({}, num_tokens, *stream_);
      for (int32_t layer = 0; layer < kLayers; ++layer) {
        LayerTensors tensors;
        tensors.layer = layer;
        tensors.keys = DenseView(rows.data(), DType::kFloat32, num_tokens, kHeads, kDim);
        tensors.values = tensors.keys;
        status.Update(sequence.StoreLayer(tensors, *stream_));
      }
      status.Update(sequence.Commit(*stream_));
      EXPECT_TRUE(status.ok()) << status;
    }
    store_->Publish(session);
    return session->id();
  }

  // A call of one step; its result once it is done.
  struct Call {
    std::vector<float> queries;
    std::vector<StepSpec> steps;
    std::vector<SessionUse> sessions;
    AnswerBudget answer{1 << 20};
    std::atomic<bool> abandoned = false;
    absl::Notification done;
    absl::Status status;
    std::string tokens, scores;
  };

  std::unique_ptr<Call> MakeCall(const std::string& id, uint64_t seed) {
    auto call = std::make_unique<Call>();
    call->queries = RandomFloats(size_t{kLayers} * kQueryHeads * kDim, seed);
    StepSpec& step = call->steps.emplace_back();
    step.field = "sequences[0]";
    step.session_id = id;
    step.query_dtype = DType::kFloat32;
    step.query_data = {reinterpret_cast<const char*>(call->queries.data()),
                       call->queries.size() * sizeof(float)};
    step.tokens_per_head = kBudget;
    step.with_scores = true;
    call->sessions.push_back(*store_->Use(id, "a"));
    return call;
  }

  void Submit(Call& call) {
    batcher_->Submit({.steps = call.steps,
                      .sessions = call.sessions,
                      .answer = &call.answer,
                      .abandoned = [&call] { return call.abandoned.load(); },
                      .done =
                          [&call](absl::StatusOr<SelectResult> result) {
                            call.status = result.status();
                            if (result.ok()) Keep(result->steps[0], call);
                            call.sessions.clear();
                            call.done.Notify();
                          }});
  }

  static void Keep(const StepResult& step, Call& call) {
    const auto text = [](Bytes bytes) {
      return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    };
    call.tokens = text(step.tokens);
    for (const Bytes scores : step.scores) call.scores += text(scores);
  }

  static void Wait(Call& call) {
    ASSERT_TRUE(call.done.WaitForNotificationWithTimeout(absl::Seconds(30)));
  }

  // As the call would be answered alone.
  std::unique_ptr<Call> Alone(const std::string& id, uint64_t seed) {
    auto call = MakeCall(id, seed);
    Submit(*call);
    Wait(*call);
    EXPECT_TRUE(call->status.ok()) << call->status;
    return call;
  }

  // Starts a call that stays on the device until the gate opens; others wait behind it.
  std::unique_ptr<Call> Occupy(const std::string& id, Gate& gate) {
    backend_->SetHook([&gate](std::string_view operation) { return gate.Pass(operation); });
    auto call = MakeCall(id, 0);
    Submit(*call);
    gate.WaitUntilReached();
    return call;
  }

  std::unique_ptr<HookedBackend> backend_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<SessionStore> store_;
  std::unique_ptr<RegionStore> regions_;
  Metrics metrics_{"test", "cpu", "test"};
  std::unique_ptr<SelectBatcher> batcher_;
};

TEST_F(SelectBatcherTest, CallsThatWaitShareLaunchesAndAnswerAsIfAlone) {
  std::vector<std::string> ids;
  std::vector<std::unique_ptr<Call>> alone;
  for (uint64_t i = 0; i < 20; ++i) {
    ids.push_back(Open(160, i));
    alone.push_back(Alone(ids.back(), 100 + i));
    EXPECT_EQ(alone.back()->tokens.size(), kLayers * kHeads * kBudget * sizeof(int32_t));
  }
  Gate gate;
  const auto first = Occupy(ids[0], gate);
  std::vector<std::unique_ptr<Call>> calls;
  for (uint64_t i = 0; i < 20; ++i) {
    calls.push_back(MakeCall(ids[i], 100 + i));
    Submit(*calls.back());
  }
  gate.Open();
  Wait(*first);
  for (size_t i = 0; i < calls.size(); ++i) {
    Wait(*calls[i]);
    ASSERT_TRUE(calls[i]->status.ok()) << calls[i]->status;
    EXPECT_EQ(calls[i]->tokens, alone[i]->tokens) << i;
    EXPECT_EQ(calls[i]->scores, alone[i]->scores) << i;
  }
  EXPECT_EQ(gate.num_passed(), 2) << "20 calls that waited are one launch";
}

TEST_F(SelectBatcherTest, ABatchIsBounded) {
  Restart({.max_calls = 3, .max_layers = 4096, .max_bytes = 1 << 30});
  std::vector<std::string> ids;
  for (uint64_t i = 0; i < 7; ++i) ids.push_back(Open(128, i));
  const auto run = [&](int expected_launches) {
    Gate gate;
    const auto first = Occupy(ids[0], gate);
    std::vector<std::unique_ptr<Call>> calls;
    for (const std::string& id : ids) {
      calls.push_back(MakeCall(id, 7));
      Submit(*calls.back());
    }
    gate.Open();
    Wait(*first);
    for (const auto& call : calls) {
      Wait(*call);
      EXPECT_TRUE(call->status.ok()) << call->status;
    }
    EXPECT_EQ(gate.num_passed(), 1 + expected_launches);
    backend_->SetHook([](std::string_view) { return absl::OkStatus(); });
  };
  run(3);  // 3 + 3 + 1 calls
  Restart({.max_calls = 64, .max_layers = 2 * kLayers, .max_bytes = 1 << 30});
  run(4);  // 2 + 2 + 2 + 1 calls
  Restart({.max_calls = 64, .max_layers = 4096, .max_bytes = 1});
  run(7);  // an empty batch takes any call
}

TEST_F(SelectBatcherTest, ABadCallFailsAlone) {
  const std::string id = Open(128, 1);
  const std::string other = Open(128, 2);
  const auto alone = Alone(other, 5);
  Gate gate;
  const auto first = Occupy(id, gate);
  const auto too_many = MakeCall(id, 3);
  too_many->steps[0].tokens_per_head = 129;
  const auto not_finite = MakeCall(id, 4);
  not_finite->queries[7] = std::numeric_limits<float>::quiet_NaN();
  const auto too_long = MakeCall(id, 4);
  too_long->answer.Take(1 << 20);
  const auto good = MakeCall(other, 5);
  for (Call* call : {too_many.get(), not_finite.get(), too_long.get(), good.get()}) Submit(*call);
  gate.Open();
  for (Call* call : {first.get(), too_many.get(), not_finite.get(), too_long.get(), good.get()}) {
    Wait(*call);
  }
  EXPECT_TRUE(first->status.ok()) << first->status;
  EXPECT_EQ(GetErrorDetails(too_many->status).subject, "sequences[0].tokens_per_head");
  EXPECT_EQ(GetErrorDetails(not_finite->status).subject, "sequences[0].query_data");
  EXPECT_EQ(GetErrorDetails(too_long->status).subject, "sequences[0]");
  ASSERT_TRUE(good->status.ok()) << good->status;
  EXPECT_EQ(good->tokens, alone->tokens);
  EXPECT_EQ(gate.num_passed(), 2);
}

TEST_F(SelectBatcherTest, WhatFailsTogetherIsTriedByItself) {
  std::vector<std::string> ids;
  for (uint64_t i = 0; i < 4; ++i) ids.push_back(Open(128, i));
  Gate gate;
  const auto first = Occupy(ids[0], gate);
  std::vector<std::unique_ptr<Call>> calls;
  for (const std::string& id : ids) {
    calls.push_back(MakeCall(id, 7));
    Submit(*calls.back());
  }
  std::atomic<int> num_launches = 0;
  backend_->SetHook([&](std::string_view operation) {  // the shared launch, then the second call's
    if (operation != "ScoreBlocks") return absl::OkStatus();
    const int launch = num_launches++;
    return launch == 0 || launch == 2 ? absl::ResourceExhaustedError("injected") : absl::OkStatus();
  });
  gate.Open();
  Wait(*first);
  for (const auto& call : calls) Wait(*call);
  EXPECT_EQ(num_launches, 5);
  for (size_t i = 0; i < calls.size(); ++i) {
    EXPECT_EQ(calls[i]->status.code(),
              i == 1 ? absl::StatusCode::kResourceExhausted : absl::StatusCode::kOk);
  }
}

TEST_F(SelectBatcherTest, AFaultFailsAll) {
  const std::string id = Open(128, 1);
  const std::string other = Open(128, 2);
  Gate gate;
  const auto first = Occupy(id, gate);
  const auto a = MakeCall(id, 3);
  const auto b = MakeCall(other, 4);
  Submit(*a);
  Submit(*b);
  backend_->SetHook([](std::string_view operation) {
    return operation == "SelectBlocks" ? DeviceFault() : absl::OkStatus();
  });
  gate.Open();
  for (Call* call : {first.get(), a.get(), b.get()}) {
    Wait(*call);
    EXPECT_EQ(GetErrorDetails(call->status).type, "DEVICE_FAULT") << call->status;
  }
}

TEST_F(SelectBatcherTest, ASessionThatIsBeingChangedHoldsUpNobodyElse) {
  const std::string id = Open(128, 1);
  const std::string other = Open(128, 2);
  const auto waiting = MakeCall(id, 3);
  const auto free = MakeCall(other, 4);
  Session* const session = waiting->sessions[0].get();
  session->mu.Lock();
  Submit(*waiting);
  Submit(*free);
  Wait(*free);
  EXPECT_TRUE(free->status.ok()) << free->status;
  EXPECT_FALSE(waiting->done.HasBeenNotified());
  session->mu.Unlock();
  Wait(*waiting);
  EXPECT_TRUE(waiting->status.ok()) << waiting->status;
}

TEST_F(SelectBatcherTest, AbandonedCallsAreNotRun) {
  const std::string id = Open(128, 1);
  Gate gate;
  const auto first = Occupy(id, gate);
  const auto gone = MakeCall(id, 3);
  const auto stays = MakeCall(id, 4);
  Submit(*gone);
  Submit(*stays);
  gone->abandoned = true;
  gate.Open();
  for (Call* call : {first.get(), gone.get(), stays.get()}) Wait(*call);
  EXPECT_TRUE(absl::IsCancelled(gone->status));
  EXPECT_TRUE(stays->status.ok()) << stays->status;
}

}  // namespace
}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// Selects that share launches: the next step's tokens of the sessions of several calls, and the
// rows that move.
//
//     locks of a call's sessions, budgets, sizes of the answer    host, before any work; a call
//     each queries ──► blocks ──► tokens ──► slots and rows            device; all calls together
//     ──► what is answered inline                                 one copy back; inline rows a
//     second
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/runtime/select_plan.h"
#include "server/runtime/select_spec.h"

namespace dynsplit {

// One call, or the part of it that concerns one device.
struct SelectTask {
  std::span<const StepSpec> steps;
  std::span<const SessionUse> sessions;  // those of `steps`, all different
  AnswerBudget* answer = nullptr;        // outlives the task
  std::function<bool()> abandoned;       // nobody waits for it any more
  // Called exactly once; what the spans view may go with it.
  absl::AnyInvocable<void(absl::StatusOr<SelectResult>) &&> done;
};

class SessionLocks;

// Calls that run together, each as if it ran alone: one that is refused or fails leaves the others
// alone, but for a fault of the device, which all of them hear of. On failure nothing of the
// caller's rows is remembered. Queries in regions are not looked at: with NaNs among them the
// answer is some choice. Thread-compatible; used once.
class SelectBatch {
 public:
  struct Limits {
    int64_t max_calls = 64;
    int64_t max_layers = 4096;               // of all calls
    int64_t max_bytes = int64_t{256} << 20;  // queries, answers and scores of all calls
  };
  enum class Place : uint8_t {
    kTaken,  // the task has been moved from
    kBusy,   // a session is being changed, or another call's rows are being gathered from it
    kFull,   // calls after this one may not fit either; an empty batch takes any call
  };
  struct Answer {
    SelectTask task;
    absl::StatusOr<SelectResult> result;
  };

  SelectBatch(Limits limits, const RegionStore& regions, Backend& backend, Stream& stream);
  ~SelectBatch();
  SelectBatch(const SelectBatch&) = delete;
  SelectBatch& operator=(const SelectBatch&) = delete;

  Place Add(SelectTask& task);
  // As Add, but waits for the sessions. Requires: an empty batch.
  void AddWaiting(SelectTask task);
  int64_t num_calls() const { return static_cast<int64_t>(calls_.size()); }

  // `enqueued` is called when the device has all of the calls' work, but for rows that are answered
  // inline. Afterwards the sessions' locks are free.
  void Run(absl::FunctionRef<void()> enqueued);
  // Of all calls, in order; for the caller to hand out.
  std::vector<Answer> TakeAnswers();

 private:
  struct Call;

  void Take(SelectTask task, std::unique_ptr<SessionLocks> locks, absl::StatusOr<SelectPlan> plan);
  bool Fits(const SelectPlan& plan, const SelectLayout& layout) const;

  absl::Status Launch();
  absl::Status StageQueries();
  void CheckQueries(Call& call, const Buffer& host);
  void PrepareSlots(Call& call);
  void FillPlaces(Call& call);
  absl::Status SelectTokens();
  absl::Status SelectTokensOf(std::span<Call* const> calls);
  absl::Status RefreshAll();
  absl::Status CopyBack(const PlannedStep& step);
  absl::Status ReadBack();

  void CollectAll();
  void ReadRowsOfAll();
  void Collect(const PlannedStep& step, StepResult& result) const;
  void CollectChanges(Call& call, const PlannedStep& step, StepResult& result);
  void Remember(Call& call);
  void FailAll(const absl::Status& status);
  std::vector<Call*> Alive();

  template <typename T>
  T* Host(int64_t offset_bytes) const {
    return reinterpret_cast<T*>(host_->data() + offset_bytes);
  }

  const Limits limits_;
  const SelectContext context_;
  Backend& backend_;
  Stream& stream_;
  std::vector<std::unique_ptr<Call>> calls_;
  int64_t num_layers_ = 0;
  int64_t score_bytes_ = 0;
  SelectLayout layout_;
  Buffer queries_host_;
  Buffer queries_device_;
  Buffer out_;
  std::shared_ptr<const Buffer> host_;  // what came back
};

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// Selects in flight together share launches; a lone one waits for nobody.
//
//     call, nothing being launched ──► launched at once, with what waits, in the caller's thread
//     call, a batch being launched ──► waits; joins the next batch
//     a batch's work is enqueued, or has come back ──► what waits by then is launched
//
// Two batches may be on the device, so that one is launched while the other runs. A call waits for
// at most: the launching of the batch before its own, or, with two in flight, the end of the older
// one; where more wait than one batch takes, for the batches of those that came before. A call
// whose session is being changed waits for that by itself.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/runtime/executor.h"
#include "server/runtime/metrics.h"
#include "server/runtime/regions.h"
#include "server/runtime/select_work.h"

namespace dynsplit {

// Thread-safe.
class SelectBatcher {
 public:
  // References outlive the batcher.
  static absl::StatusOr<std::unique_ptr<SelectBatcher>> Create(Backend& backend,
                                                               const RegionStore& regions,
                                                               Metrics& metrics,
                                                               SelectBatch::Limits limits = {});
  // Requires: every task is done.
  ~SelectBatcher() = default;
  SelectBatcher(const SelectBatcher&) = delete;
  SelectBatcher& operator=(const SelectBatcher&) = delete;

  // May run the task, and others, before it returns.
  void Submit(SelectTask task);

 private:
  SelectBatcher(const RegionStore& regions, Metrics& metrics, SelectBatch::Limits limits)
      : limits_(limits), regions_(regions), metrics_(metrics) {}
  // True: the caller must launch a batch.
  bool TakeTurn() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Gives the turn to what waits.
  void PassOn() ABSL_LOCKS_EXCLUDED(mu_);
  void Lead(Backend& backend, Stream& stream);
  void Fill(SelectBatch& batch);
  void RunAlone(SelectTask task);
  void Deliver(std::vector<SelectBatch::Answer> answers);

  const SelectBatch::Limits limits_;
  const RegionStore& regions_;
  Metrics& metrics_;

  absl::Mutex mu_;
  std::deque<SelectTask> waiting_ ABSL_GUARDED_BY(mu_);
  bool launching_ ABSL_GUARDED_BY(mu_) = false;
  int32_t num_in_flight_ ABSL_GUARDED_BY(mu_) = 0;  // batches

  bool waits_for_device_ = false;       // constant after Create
  std::unique_ptr<Executor> executor_;  // goes first: its jobs use the rest
};

}  // namespace dynsplit

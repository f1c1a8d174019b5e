// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/select_batcher.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace dynsplit {
namespace {

constexpr int32_t kMaxInFlight = 2;
constexpr int32_t kNumWorkers = 4;
// Batches that callers' own threads wait for: gRPC has at least twice as many.
constexpr int32_t kNumVisitors = kMaxInFlight;
// Answers that one thread hands out; the others wait less than the last of them would.
constexpr size_t kAnswersPerThread = 8;

}  // namespace

absl::StatusOr<std::unique_ptr<SelectBatcher>> SelectBatcher::Create(Backend& backend,
                                                                     const RegionStore& regions,
                                                                     Metrics& metrics,
                                                                     SelectBatch::Limits limits) {
  std::unique_ptr<SelectBatcher> batcher(new SelectBatcher(regions, metrics, limits));
  // Where operations run on the calling thread, they would keep the caller's busy.
  batcher->waits_for_device_ = backend.info().name != "cpu";
  absl::StatusOr<std::unique_ptr<Executor>> executor =
      Executor::Create(backend, kNumWorkers, kNumVisitors);
  if (!executor.ok()) return executor.status();
  batcher->executor_ = *std::move(executor);
  return batcher;
}

bool SelectBatcher::TakeTurn() {
  if (waiting_.empty() || launching_ || num_in_flight_ == kMaxInFlight) return false;
  launching_ = true;
  ++num_in_flight_;
  return true;
}

void SelectBatcher::Submit(SelectTask task) {
  {
    absl::MutexLock lock(&mu_);
    waiting_.push_back(std::move(task));
    if (!TakeTurn()) return;
  }
  Executor::Job job = [this](Backend& backend, Stream& stream) { Lead(backend, stream); };
  if (waits_for_device_) {
    executor_->RunOrSubmit(std::move(job));
  } else {
    executor_->Submit(std::move(job));
  }
}

void SelectBatcher::PassOn() {
  {
    absl::MutexLock lock(&mu_);
    if (!TakeTurn()) return;
  }
  executor_->Submit([this](Backend& backend, Stream& stream) { Lead(backend, stream); });
}

void SelectBatcher::Lead(Backend& backend, Stream& stream) {
  SelectBatch batch(limits_, regions_, backend, stream);
  Fill(batch);
  if (batch.num_calls() > 0) metrics_.SelectsLaunched(batch.num_calls());
  batch.Run([this] {
    {
      absl::MutexLock lock(&mu_);
      launching_ = false;
    }
    PassOn();
  });
  {
    absl::MutexLock lock(&mu_);
    --num_in_flight_;
  }
  PassOn();
  Deliver(batch.TakeAnswers());
}

void SelectBatcher::Fill(SelectBatch& batch) {
  std::vector<SelectTask> abandoned;
  while (true) {
    SelectTask task;
    {
      absl::MutexLock lock(&mu_);
      if (waiting_.empty()) break;
      task = std::move(waiting_.front());
      waiting_.pop_front();
    }
    if (task.abandoned()) {
      abandoned.push_back(std::move(task));
      continue;
    }
    const SelectBatch::Place place = batch.Add(task);
    if (place == SelectBatch::Place::kFull) {
      absl::MutexLock lock(&mu_);
      waiting_.push_front(std::move(task));
      break;
    }
    if (place == SelectBatch::Place::kBusy) RunAlone(std::move(task));
  }
  for (SelectTask& task : abandoned) {
    std::move(task.done)(absl::CancelledError("the caller cancelled"));
  }
}

void SelectBatcher::RunAlone(SelectTask task) {
  executor_->Submit([this, task = std::move(task)](Backend& backend, Stream& stream) mutable {
    SelectBatch batch(limits_, regions_, backend, stream);
    batch.AddWaiting(std::move(task));
    metrics_.SelectsLaunched(1);
    batch.Run([] {});
    Deliver(batch.TakeAnswers());
  });
}

void SelectBatcher::Deliver(std::vector<SelectBatch::Answer> answers) {
  const auto hand_out = [](std::vector<SelectBatch::Answer> part) {
    for (SelectBatch::Answer& answer : part) {
      std::move(answer.task.done)(std::move(answer.result));
    }
  };
  while (answers.size() > kAnswersPerThread) {
    const auto first = answers.end() - static_cast<std::ptrdiff_t>(kAnswersPerThread);
    executor_->Submit(
        [hand_out, part = std::vector<SelectBatch::Answer>(std::make_move_iterator(first),
                                                           std::make_move_iterator(answers.end()))](
            Backend& /*backend*/, Stream& /*stream*/) mutable { hand_out(std::move(part)); });
    answers.erase(first, answers.end());
  }
  hand_out(std::move(answers));
}

}  // namespace dynsplit

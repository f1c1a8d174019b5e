// SPDX-License-Identifier: Apache-2.0
//
// Worker threads, each with its own stream of the backend. Jobs run first come, first served; each
// is one layer's work, so requests share the device layer by layer.
#pragma once

#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/pipeline/backend.h"

namespace dynsplit {

// Thread-safe.
class Executor {
 public:
  using Job = absl::AnyInvocable<void(Backend& backend, Stream& stream) &&>;

  // `backend` must outlive the executor. At most `num_visitors` threads at a time run a job of
  // their own in RunOrSubmit.
  static absl::StatusOr<std::unique_ptr<Executor>> Create(Backend& backend, int32_t num_workers,
                                                          int32_t num_visitors = 0);
  // Finishes the jobs that run; drops those that wait, without running them.
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  void Submit(Job job);
  // For short jobs: runs it in the calling thread where a visitor's stream is free, which saves two
  // changes of thread; else as Submit.
  void RunOrSubmit(Job job);
  Backend& backend() { return backend_; }
  int32_t num_workers() const { return static_cast<int32_t>(streams_.size()); }

 private:
  explicit Executor(Backend& backend) : backend_(backend) {}
  void Work(Stream& stream);

  // Constant after construction.
  Backend& backend_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<std::unique_ptr<Stream>> visitor_streams_;
  std::vector<std::thread> threads_;

  // Guarded by mu_.
  absl::Mutex mu_;
  std::deque<Job> jobs_ ABSL_GUARDED_BY(mu_);
  std::vector<Stream*> idle_visitors_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace dynsplit

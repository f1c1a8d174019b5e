// SPDX-License-Identifier: Apache-2.0
//
// A backend whose copies behave as on a device at its latest: what ToHost returns is garbage until
// its stream is synchronised, and host memory that a copy still reads or writes must not go. The
// operations are those of another backend. Finds, without a GPU, who looks or frees too early.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/pipeline/backend.h"

namespace dynsplit {

// What a LateBackend has seen; outlives it. Thread-safe.
class LateRecord {
 public:
  int64_t num_synchronizations() const { return num_synchronizations_.load(); }
  // Host buffers that went while a copy was not done with them.
  int64_t num_freed_early() const { return num_freed_early_.load(); }
  // Called at the beginning of every Synchronize, by the thread that waits.
  void set_on_synchronize(std::function<void()> hook) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  friend class LateBackend;
  friend class LateStream;
  void Use(const std::byte* host) ABSL_LOCKS_EXCLUDED(mu_);
  void Release(const std::byte* host) ABSL_LOCKS_EXCLUDED(mu_);
  void Freed(const std::byte* host) ABSL_LOCKS_EXCLUDED(mu_);
  void Synchronized() ABSL_LOCKS_EXCLUDED(mu_);

  std::atomic<int64_t> num_synchronizations_ = 0;
  std::atomic<int64_t> num_freed_early_ = 0;
  absl::Mutex mu_;
  std::map<const std::byte*, int> in_use_ ABSL_GUARDED_BY(mu_);  // copies, by host buffer
  std::function<void()> hook_ ABSL_GUARDED_BY(mu_);
};

std::unique_ptr<Backend> MakeLateBackend(std::unique_ptr<Backend> operations,
                                         std::shared_ptr<LateRecord> record);

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/synchronization/mutex.h"

namespace dynsplit::cpu {

// Fixed set of workers that share loops with their callers.
// Thread safety: ParallelFor may be called from any number of threads at once; loops then share the
// workers. It must not be called from inside a loop body.
class ThreadPool {
 public:
  // num_threads >= 1 counts the caller, so num_threads - 1 workers are started.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls body(chunk, slot) once for every chunk in [0, num_chunks), in no particular order, and
  // returns when all calls have returned. slot < num_slots() differs between threads that are
  // inside this loop at the same time: index scratch memory by it.
  using Body = absl::FunctionRef<void(int64_t chunk, int slot)>;
  void ParallelFor(int64_t num_chunks, Body body);

  int num_slots() const { return static_cast<int>(workers_.size()) + 1; }

 private:
  struct Loop {
    Body body;
    int64_t num_chunks;
    std::atomic<int64_t> next_chunk{0};
    // Guarded by mu_ of the pool.
    int num_joined = 0;  // slots given out
    int num_inside = 0;  // workers that may still touch this loop
  };

  static void RunChunks(Loop& loop, int slot);
  Loop* FindWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool HasWorkOrStops() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Work();

  std::vector<std::thread> workers_;  // constant after construction
  mutable absl::Mutex mu_;
  std::vector<Loop*> loops_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace dynsplit::cpu

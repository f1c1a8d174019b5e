// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/thread_pool.h"

#include <algorithm>

namespace dynsplit::cpu {

ThreadPool::ThreadPool(int num_threads) {
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { Work(); });
}

ThreadPool::~ThreadPool() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
  }
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::RunChunks(Loop& loop, int slot) {
  while (true) {
    const int64_t chunk = loop.next_chunk.fetch_add(1, std::memory_order_relaxed);
    if (chunk >= loop.num_chunks) return;
    loop.body(chunk, slot);
  }
}

void ThreadPool::ParallelFor(int64_t num_chunks, Body body) {
  if (num_chunks <= 0) return;
  if (num_chunks == 1 || workers_.empty()) {
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) body(chunk, 0);
    return;
  }
  Loop loop{.body = body, .num_chunks = num_chunks, .num_joined = 1};
  {
    absl::MutexLock lock(&mu_);
    loops_.push_back(&loop);
  }
  RunChunks(loop, 0);
  absl::MutexLock lock(&mu_);
  loops_.erase(std::find(loops_.begin(), loops_.end(), &loop));
  mu_.Await(absl::Condition(
      +[](Loop* l) { return l->num_inside == 0; }, &loop));
}

ThreadPool::Loop* ThreadPool::FindWork() const {
  Loop* best = nullptr;  // the loop with the fewest workers, so that callers get equal shares
  for (Loop* loop : loops_) {
    if (loop->next_chunk.load(std::memory_order_relaxed) >= loop->num_chunks) continue;
    if (best == nullptr || loop->num_inside < best->num_inside) best = loop;
  }
  return best;
}

bool ThreadPool::HasWorkOrStops() const { return stopping_ || FindWork() != nullptr; }

void ThreadPool::Work() {
  absl::MutexLock lock(&mu_);
  while (true) {
    mu_.Await(absl::Condition(this, &ThreadPool::HasWorkOrStops));
    if (stopping_) return;
    Loop* loop = FindWork();
    if (loop == nullptr) continue;  // its last chunk went in between: chunks are taken unlocked
    const int slot = loop->num_joined++;
    ++loop->num_inside;
    mu_.Unlock();
    RunChunks(*loop, slot);
    mu_.Lock();
    --loop->num_inside;
  }
}

}  // namespace dynsplit::cpu

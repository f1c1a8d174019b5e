// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/executor.h"

#include <utility>

namespace dynsplit {

absl::StatusOr<std::unique_ptr<Executor>> Executor::Create(Backend& backend, int32_t num_workers,
                                                           int32_t num_visitors) {
  auto executor = std::unique_ptr<Executor>(new Executor(backend));
  for (int32_t i = 0; i < num_workers + num_visitors; ++i) {
    absl::StatusOr<std::unique_ptr<Stream>> stream = backend.CreateStream();
    if (!stream.ok()) return stream.status();
    auto& streams = i < num_workers ? executor->streams_ : executor->visitor_streams_;
    streams.push_back(*std::move(stream));
  }
  {
    absl::MutexLock lock(&executor->mu_);
    for (const std::unique_ptr<Stream>& stream : executor->visitor_streams_) {
      executor->idle_visitors_.push_back(stream.get());
    }
  }
  for (const std::unique_ptr<Stream>& stream : executor->streams_) {
    executor->threads_.emplace_back([worker = executor.get(), &stream] { worker->Work(*stream); });
  }
  return executor;
}

Executor::~Executor() {
  std::deque<Job> dropped;
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    dropped.swap(jobs_);
  }
  for (std::thread& thread : threads_) thread.join();
}

void Executor::Submit(Job job) {
  absl::MutexLock lock(&mu_);
  if (!stopping_) jobs_.push_back(std::move(job));
}

void Executor::RunOrSubmit(Job job) {
  Stream* stream = nullptr;
  {
    absl::MutexLock lock(&mu_);
    if (!stopping_ && !idle_visitors_.empty()) {
      stream = idle_visitors_.back();
      idle_visitors_.pop_back();
    }
  }
  if (stream == nullptr) return Submit(std::move(job));
  std::move(job)(backend_, *stream);
  absl::MutexLock lock(&mu_);
  idle_visitors_.push_back(stream);
}

void Executor::Work(Stream& stream) {
  while (true) {
    Job job;
    {
      absl::MutexLock lock(&mu_);
      const auto has_work = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
        return stopping_ || !jobs_.empty();
      };
      mu_.Await(absl::Condition(&has_work));
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    std::move(job)(backend_, stream);
  }
}

}  // namespace dynsplit

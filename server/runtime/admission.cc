// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/admission.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/pipeline/errors.h"

namespace dynsplit {

Reservation::Reservation(Reservation&& other) noexcept { *this = std::move(other); }

Reservation& Reservation::operator=(Reservation&& other) noexcept {
  if (this != &other) {
    Release();
    admission_ = std::exchange(other.admission_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    waited_ = other.waited_;
    granted_ = other.granted_;
  }
  return *this;
}

void Reservation::Release() {
  if (admission_ == nullptr) return;
  std::exchange(admission_, nullptr)->Give(std::exchange(bytes_, 0), granted_);
}

Admission::Admission(Options options) : options_(options), timer_([this] { RunTimer(); }) {}

Admission::~Admission() {
  Drain(0);
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    timer_wakeup_.SignalAll();
  }
  timer_.join();
}

Admission::Ticket Admission::Request(const std::string& tenant, int64_t bytes, absl::Time deadline,
                                     Callback callback, Draining draining) {
  Answers answers;
  Ticket ticket = 0;
  {
    absl::MutexLock lock(&mu_);
    ticket = next_ticket_++;
    const absl::Time now = absl::Now();
    const bool fits_now = tenants_.empty() && bytes <= options_.capacity_bytes - reserved_bytes_;
    absl::Status refusal;
    if (drain_retry_after_ms_ >= 0 && draining == Draining::kRefuse) {
      refusal = RetryLater(absl::StatusCode::kUnavailable, "the server is draining",
                           drain_retry_after_ms_);
    } else if (bytes > options_.capacity_bytes) {
      refusal =
          WithReason(absl::StatusCode::kResourceExhausted, "REQUEST_TOO_LARGE",
                     absl::StrCat("the request needs ", bytes, " bytes of memory; the server has ",
                                  options_.capacity_bytes));
    } else if (deadline <= now) {
      refusal = absl::DeadlineExceededError("the deadline passed before memory was reserved");
    } else if (!fits_now && queue_depth_ >= options_.max_queue) {
      refusal = RetryLater(
          absl::StatusCode::kResourceExhausted,
          absl::StrCat("the queue is full: ", queue_depth_, " requests are waiting for memory"),
          RetryAfterMs());
    }
    if (!refusal.ok()) {
      answers.push_back({std::move(callback), refusal});
    } else {
      auto place = std::find_if(tenants_.begin(), tenants_.end(),
                                [&](const Tenant& t) { return t.name == tenant; });
      if (place == tenants_.end()) {
        tenants_.push_back({tenant, {}});
        place = std::prev(tenants_.end());
      }
      const absl::Time expiry = std::min(deadline, now + options_.queue_timeout);
      place->waiters.push_back(
          {ticket, bytes, now, deadline, expiry, std::move(callback), draining});
      ++queue_depth_;
      Grant(answers);
      timer_wakeup_.Signal();
    }
  }
  Deliver(std::move(answers));
  return ticket;
}

void Admission::Cancel(Ticket ticket) {
  Answers answers;
  {
    absl::MutexLock lock(&mu_);
    for (auto tenant = tenants_.begin(); tenant != tenants_.end(); ++tenant) {
      auto waiter = std::find_if(tenant->waiters.begin(), tenant->waiters.end(),
                                 [&](const Waiter& w) { return w.ticket == ticket; });
      if (waiter == tenant->waiters.end()) continue;
      answers.push_back({std::move(waiter->callback), absl::CancelledError("cancelled in queue")});
      tenant->waiters.erase(waiter);
      --queue_depth_;
      if (tenant->waiters.empty()) tenants_.erase(tenant);
      Grant(answers);
      break;
    }
  }
  Deliver(std::move(answers));
}

void Admission::Drain(int64_t retry_after_ms) {
  Answers answers;
  {
    absl::MutexLock lock(&mu_);
    drain_retry_after_ms_ = retry_after_ms;
    for (Tenant& tenant : tenants_) {
      std::deque<Waiter> stay;
      for (Waiter& waiter : tenant.waiters) {
        if (waiter.draining == Draining::kAdmit) {
          stay.push_back(std::move(waiter));
          continue;
        }
        --queue_depth_;
        answers.push_back(
            {std::move(waiter.callback),
             RetryLater(absl::StatusCode::kUnavailable, "the server is draining", retry_after_ms)});
      }
      tenant.waiters = std::move(stay);
    }
    std::erase_if(tenants_, [](const Tenant& tenant) { return tenant.waiters.empty(); });
    Grant(answers);
  }
  Deliver(std::move(answers));
}

int64_t Admission::reserved_bytes() const {
  absl::MutexLock lock(&mu_);
  return reserved_bytes_;
}

int64_t Admission::queue_depth() const {
  absl::MutexLock lock(&mu_);
  return queue_depth_;
}

void Admission::Give(int64_t bytes, absl::Time granted) {
  Answers answers;
  {
    absl::MutexLock lock(&mu_);
    reserved_bytes_ -= bytes;
    const double held = absl::ToDoubleSeconds(absl::Now() - granted);
    mean_hold_seconds_ += 0.1 * (held - mean_hold_seconds_);
    Grant(answers);
  }
  Deliver(std::move(answers));
}

void Admission::Grant(Answers& answers) {
  const absl::Time now = absl::Now();
  while (!tenants_.empty()) {
    Waiter& waiter = tenants_.front().waiters.front();
    if (waiter.bytes > options_.capacity_bytes - reserved_bytes_) return;
    reserved_bytes_ += waiter.bytes;
    --queue_depth_;
    answers.push_back(
        {std::move(waiter.callback), Reservation(this, waiter.bytes, now - waiter.since, now)});
    // The tenant goes to the back of the line.
    Tenant tenant = std::move(tenants_.front());
    tenants_.pop_front();
    tenant.waiters.pop_front();
    if (!tenant.waiters.empty()) tenants_.push_back(std::move(tenant));
  }
}

void Admission::Expire(absl::Time now, Answers& answers) {
  for (auto tenant = tenants_.begin(); tenant != tenants_.end();) {
    std::deque<Waiter>& waiters = tenant->waiters;
    for (auto waiter = waiters.begin(); waiter != waiters.end();) {
      if (waiter->expiry > now) {
        ++waiter;
        continue;
      }
      absl::Status status =
          waiter->deadline <= now
              ? absl::DeadlineExceededError("the deadline passed while waiting for memory")
              : RetryLater(absl::StatusCode::kResourceExhausted,
                           absl::StrCat("no memory became free within ",
                                        absl::FormatDuration(options_.queue_timeout)),
                           RetryAfterMs());
      answers.push_back({std::move(waiter->callback), std::move(status)});
      waiter = waiters.erase(waiter);
      --queue_depth_;
    }
    tenant = waiters.empty() ? tenants_.erase(tenant) : std::next(tenant);
  }
}

int64_t Admission::RetryAfterMs() const {
  const double seconds = mean_hold_seconds_ * static_cast<double>(queue_depth_ + 1);
  return static_cast<int64_t>(1000 * std::clamp(seconds, 0.05, 10.0));
}

void Admission::Deliver(Answers answers) {
  for (Answer& answer : answers) std::move(answer.callback)(std::move(answer.result));
}

void Admission::RunTimer() {
  mu_.Lock();
  while (!stopping_) {
    absl::Time next = absl::InfiniteFuture();
    for (const Tenant& tenant : tenants_) {
      for (const Waiter& waiter : tenant.waiters) next = std::min(next, waiter.expiry);
    }
    timer_wakeup_.WaitWithDeadline(&mu_, next);
    Answers answers;
    Expire(absl::Now(), answers);
    if (answers.empty()) continue;
    Grant(answers);  // the one that gave up may have been the one in front
    mu_.Unlock();
    Deliver(std::move(answers));
    mu_.Lock();
  }
  mu_.Unlock();
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// Who may use memory: reservations in bytes against one capacity, with a bounded queue. Tenants
// take turns; within a tenant first come, first served. The next in line is never overtaken, so
// large requests do not starve.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace dynsplit {

class Admission;

// Bytes held; given back on destruction. Move-only. May outlive the request's stream, not the
// Admission.
class Reservation {
 public:
  Reservation() = default;
  Reservation(Reservation&& other) noexcept;
  Reservation& operator=(Reservation&& other) noexcept;
  ~Reservation() { Release(); }

  int64_t bytes() const { return bytes_; }
  absl::Duration waited() const { return waited_; }
  void Release();

 private:
  friend class Admission;
  Reservation(Admission* admission, int64_t bytes, absl::Duration waited, absl::Time granted)
      : admission_(admission), bytes_(bytes), waited_(waited), granted_(granted) {}
  Admission* admission_ = nullptr;
  int64_t bytes_ = 0;
  absl::Duration waited_;
  absl::Time granted_;
};

// Thread-safe.
class Admission {
 public:
  struct Options {
    int64_t capacity_bytes = int64_t{16} << 30;
    int32_t max_queue = 64;                            // requests waiting
    absl::Duration queue_timeout = absl::Seconds(30);  // longest wait
  };
  // Called exactly once, without locks held: from Request itself where the answer is known at
  // once, else from the thread that gave memory back, or from the timer.
  using Callback = absl::AnyInvocable<void(absl::StatusOr<Reservation>) &&>;
  using Ticket = uint64_t;

  explicit Admission(Options options);
  ~Admission();  // Requires: all reservations returned, all callbacks called.
  Admission(const Admission&) = delete;
  Admission& operator=(const Admission&) = delete;

  // Reserves `bytes` for `tenant`, now or when others give back.
  //   RESOURCE_EXHAUSTED  queue full or queue_timeout over (with a retry hint); more than the
  //                       whole capacity (reason REQUEST_TOO_LARGE, no hint: retrying is no use)
  //   DEADLINE_EXCEEDED   `deadline` came first
  //   UNAVAILABLE         draining
  enum class Draining : uint8_t { kRefuse, kAdmit };
  Ticket Request(const std::string& tenant, int64_t bytes, absl::Time deadline, Callback callback,
                 Draining draining = Draining::kRefuse);
  // The waiting request's callback gets CANCELLED. No effect on answered tickets.
  void Cancel(Ticket ticket);
  // Waiting and new requests get UNAVAILABLE, but for those that finish what is begun.
  void Drain(int64_t retry_after_ms);

  int64_t reserved_bytes() const;
  int64_t queue_depth() const;

 private:
  friend class Reservation;
  struct Waiter {
    Ticket ticket = 0;
    int64_t bytes = 0;
    absl::Time since;
    absl::Time deadline;  // of the caller
    absl::Time expiry;    // min(deadline, since + queue_timeout)
    Callback callback;
    Draining draining = Draining::kRefuse;
  };
  struct Tenant {
    std::string name;
    std::deque<Waiter> waiters;  // never empty
  };
  struct Answer {
    Callback callback;
    absl::StatusOr<Reservation> result;
  };
  using Answers = std::vector<Answer>;

  void Give(int64_t bytes, absl::Time granted);
  void Grant(Answers& answers) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Expire(absl::Time now, Answers& answers) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int64_t RetryAfterMs() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static void Deliver(Answers answers);
  void RunTimer();

  // Constant after construction.
  const Options options_;

  // Guarded by mu_.
  mutable absl::Mutex mu_;
  std::deque<Tenant> tenants_ ABSL_GUARDED_BY(mu_);  // front is next in turn
  int64_t reserved_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t queue_depth_ ABSL_GUARDED_BY(mu_) = 0;
  Ticket next_ticket_ ABSL_GUARDED_BY(mu_) = 1;
  double mean_hold_seconds_ ABSL_GUARDED_BY(mu_) = 0.25;    // moving average, for retry hints
  int64_t drain_retry_after_ms_ ABSL_GUARDED_BY(mu_) = -1;  // >= 0: draining
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  absl::CondVar timer_wakeup_;
  std::thread timer_;
};

}  // namespace dynsplit

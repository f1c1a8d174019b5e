// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/admission.h"

#include <gtest/gtest.h>

#include <map>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

// Remembers what each request was told, in order.
class Asker {
 public:
  explicit Asker(Admission& admission) : admission_(admission) {}
  // Reservations given back below must let nobody in: the callback would find this object gone.
  ~Asker() { admission_.Drain(0); }

  Admission::Ticket Ask(const std::string& name, int64_t bytes, const std::string& tenant = "a",
                        absl::Time deadline = absl::InfiniteFuture()) {
    return admission_.Request(tenant, bytes, deadline,
                              [this, name](absl::StatusOr<Reservation> answer) {
                                absl::MutexLock lock(&mu_);
                                order_.push_back(name);
                                answers_[name] = std::move(answer);
                              });
  }
  std::vector<std::string> order() {
    absl::MutexLock lock(&mu_);
    return order_;
  }
  absl::Status status(const std::string& name) {
    absl::MutexLock lock(&mu_);
    const auto found = answers_.find(name);
    return found == answers_.end() ? absl::UnknownError("no answer yet") : found->second.status();
  }
  void Release(const std::string& name) {
    std::optional<absl::StatusOr<Reservation>> answer;
    absl::MutexLock lock(&mu_);
    answer = std::move(answers_.at(name));
    answers_.erase(name);
    mu_.Unlock();
    answer.reset();  // answers others, through this object
    mu_.Lock();
  }

 private:
  Admission& admission_;
  absl::Mutex mu_;
  std::vector<std::string> order_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, absl::StatusOr<Reservation>> answers_ ABSL_GUARDED_BY(mu_);
};

TEST(AdmissionTest, GrantsWhileThereIsRoomAndCountsBytes) {
  Admission admission({.capacity_bytes = 100});
  Asker asker(admission);
  asker.Ask("one", 60);
  asker.Ask("two", 40);
  EXPECT_TRUE(asker.status("one").ok());
  EXPECT_TRUE(asker.status("two").ok());
  EXPECT_EQ(admission.reserved_bytes(), 100);
  asker.Release("one");
  EXPECT_EQ(admission.reserved_bytes(), 40);
}

TEST(AdmissionTest, NobodyOvertakesTheNextInLine) {
  Admission admission({.capacity_bytes = 100});
  Asker asker(admission);
  asker.Ask("first", 80);
  asker.Ask("large", 90);
  asker.Ask("small", 10);  // would fit, but stands behind
  EXPECT_EQ(asker.order(), (std::vector<std::string>{"first"}));
  EXPECT_EQ(admission.queue_depth(), 2);
  asker.Release("first");
  EXPECT_EQ(asker.order(), (std::vector<std::string>{"first", "large", "small"}));
}

TEST(AdmissionTest, TenantsTakeTurns) {
  Admission admission({.capacity_bytes = 10});
  Asker asker(admission);
  asker.Ask("0", 10);
  for (const char* name : {"a1", "a2", "a3"}) asker.Ask(name, 10, "a");
  asker.Ask("b1", 10, "b");
  asker.Ask("b2", 10, "b");
  std::vector<std::string> served;
  std::string holder = "0";
  for (int i = 0; i < 5; ++i) {
    asker.Release(holder);
    holder = asker.order().back();
    served.push_back(holder);
  }
  EXPECT_EQ(served, (std::vector<std::string>{"a1", "b1", "a2", "b2", "a3"}));
}

TEST(AdmissionTest, RefusesBeyondQueueAndCapacity) {
  Admission admission({.capacity_bytes = 10, .max_queue = 1});
  Asker asker(admission);
  asker.Ask("holds", 10);
  asker.Ask("waits", 1);
  asker.Ask("full", 1);
  EXPECT_TRUE(absl::IsResourceExhausted(asker.status("full")));
  EXPECT_GT(GetErrorDetails(asker.status("full")).retry_after_ms.value_or(0), 0);
  asker.Ask("large", 11);
  EXPECT_EQ(GetErrorDetails(asker.status("large")).type, "REQUEST_TOO_LARGE");
  EXPECT_FALSE(GetErrorDetails(asker.status("large")).retry_after_ms.has_value());
}

TEST(AdmissionTest, WaitingEndsByTimeoutDeadlineAndCancel) {
  Admission admission({.capacity_bytes = 10, .queue_timeout = absl::Milliseconds(50)});
  Asker asker(admission);
  asker.Ask("holds", 10);
  asker.Ask("patient", 5);
  asker.Ask("hasty", 5, "a", absl::Now() + absl::Milliseconds(10));
  const Admission::Ticket ticket = asker.Ask("fickle", 5);
  asker.Ask("late", 5, "a", absl::Now() - absl::Seconds(1));
  EXPECT_TRUE(absl::IsDeadlineExceeded(asker.status("late")));
  admission.Cancel(ticket);
  EXPECT_TRUE(absl::IsCancelled(asker.status("fickle")));
  for (int i = 0; i < 200 && asker.order().size() < 5; ++i) absl::SleepFor(absl::Milliseconds(5));
  EXPECT_TRUE(absl::IsDeadlineExceeded(asker.status("hasty")));
  EXPECT_TRUE(absl::IsResourceExhausted(asker.status("patient")));
  EXPECT_EQ(admission.queue_depth(), 0);
  admission.Cancel(ticket);  // answered long ago
}

TEST(AdmissionTest, GivingUpInFrontLetsTheNextIn) {
  Admission admission({.capacity_bytes = 10});
  Asker asker(admission);
  asker.Ask("holds", 6);
  const Admission::Ticket ticket = asker.Ask("large", 9);
  asker.Ask("small", 4);
  admission.Cancel(ticket);
  EXPECT_TRUE(asker.status("small").ok());
}

TEST(AdmissionTest, DrainRefusesWaitingAndNew) {
  Admission admission({.capacity_bytes = 10});
  Asker asker(admission);
  asker.Ask("holds", 10);
  asker.Ask("waits", 10);
  admission.Drain(700);
  asker.Ask("new", 1);
  for (const char* name : {"waits", "new"}) {
    EXPECT_TRUE(absl::IsUnavailable(asker.status(name)));
    EXPECT_EQ(GetErrorDetails(asker.status(name)).retry_after_ms, 700);
  }
}

TEST(AdmissionTest, HoldsItsCapacityUnderThreads) {
  Admission admission({.capacity_bytes = 100, .max_queue = 1000});
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&admission, t] {
      for (int i = 0; i < 300; ++i) {
        absl::Notification done;
        admission.Request(std::to_string(t), 10 + i % 60, absl::InfiniteFuture(),
                          [&](absl::StatusOr<Reservation> reservation) {
                            EXPECT_TRUE(reservation.ok());
                            EXPECT_LE(admission.reserved_bytes(), 100);
                            done.Notify();
                          });
        done.WaitForNotification();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(admission.reserved_bytes(), 0);
}

}  // namespace
}  // namespace dynsplit

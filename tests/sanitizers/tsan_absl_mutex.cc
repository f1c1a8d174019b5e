// SPDX-License-Identifier: Apache-2.0
//
// Lets the thread sanitizer see absl::Mutex, CondVar and Notification of an uninstrumented Abseil
// library. Linked into thread-sanitizer builds only: these definitions take precedence over the
// shared library's, call it, and tell the sanitizer what happened before what. Without them every
// access under an absl::Mutex would be reported as a race.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "absl/base/config.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

// Of the sanitizer's runtime; no header declares them.
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);

namespace {

#define DYNSPLIT_STRING_(x) #x
#define DYNSPLIT_STRING(x) DYNSPLIT_STRING_(x)

// The library's own definition. `rest` is the mangled name behind the namespace: "5Mutex4LockEv".
template <typename Function>
Function Original(const char* qualifier, const char* rest) {
  const std::string space = DYNSPLIT_STRING(ABSL_OPTION_INLINE_NAMESPACE_NAME);
  const std::string inline_space =
      ABSL_OPTION_USE_INLINE_NAMESPACE == 1 ? std::to_string(space.size()) + space : "";
  const std::string name = std::string("_ZN") + qualifier + "4absl" + inline_space + rest;
  void* symbol = dlsym(RTLD_NEXT, name.c_str());
  if (symbol == nullptr) {
    std::fprintf(stderr, "tsan_absl_mutex: no %s in the Abseil library\n", name.c_str());
    std::abort();
  }
  return reinterpret_cast<Function>(symbol);
}

// Inside the library, conditions are evaluated on threads of which we cannot yet, or no longer, say
// that they hold the mutex.
class IgnoreReads {
 public:
  IgnoreReads() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
  ~IgnoreReads() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};

}  // namespace

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  static const auto original = Original<void (*)(Mutex*)>("", "5Mutex4LockEv");
  original(this);
  __tsan_acquire(this);
}

void Mutex::Unlock() {
  static const auto original = Original<void (*)(Mutex*)>("", "5Mutex6UnlockEv");
  __tsan_release(this);
  const IgnoreReads ignore;
  original(this);
}

bool Mutex::TryLock() {
  static const auto original = Original<bool (*)(Mutex*)>("", "5Mutex7TryLockEv");
  const bool locked = original(this);
  if (locked) __tsan_acquire(this);
  return locked;
}

void Mutex::ReaderLock() {
  static const auto original = Original<void (*)(Mutex*)>("", "5Mutex10ReaderLockEv");
  original(this);
  __tsan_acquire(this);
}

void Mutex::ReaderUnlock() {
  static const auto original = Original<void (*)(Mutex*)>("", "5Mutex12ReaderUnlockEv");
  __tsan_release(this);
  const IgnoreReads ignore;
  original(this);
}

void Mutex::LockWhen(const Condition& condition) {
  static const auto original =
      Original<void (*)(Mutex*, const Condition&)>("", "5Mutex8LockWhenERKNS0_9ConditionE");
  original(this, condition);
  __tsan_acquire(this);
}

// Awaiting gives the mutex up and takes it again. Conditions run inside, on any thread that holds
// it.
void Mutex::Await(const Condition& condition) {
  static const auto original =
      Original<void (*)(Mutex*, const Condition&)>("", "5Mutex5AwaitERKNS0_9ConditionE");
  __tsan_release(this);
  {
    const IgnoreReads ignore;
    original(this, condition);
  }
  __tsan_acquire(this);
}

bool Mutex::AwaitWithTimeout(const Condition& condition, absl::Duration timeout) {
  static const auto original = Original<bool (*)(Mutex*, const Condition&, absl::Duration)>(
      "", "5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  __tsan_release(this);
  bool met = false;
  {
    const IgnoreReads ignore;
    met = original(this, condition, timeout);
  }
  __tsan_acquire(this);
  return met;
}

bool Mutex::AwaitWithDeadline(const Condition& condition, absl::Time deadline) {
  static const auto original = Original<bool (*)(Mutex*, const Condition&, absl::Time)>(
      "", "5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE");
  __tsan_release(this);
  bool met = false;
  {
    const IgnoreReads ignore;
    met = original(this, condition, deadline);
  }
  __tsan_acquire(this);
  return met;
}

void CondVar::Wait(Mutex* mu) {
  static const auto original =
      Original<void (*)(CondVar*, Mutex*)>("", "7CondVar4WaitEPNS0_5MutexE");
  __tsan_release(mu);
  original(this, mu);
  __tsan_acquire(mu);
}

bool CondVar::WaitWithTimeout(Mutex* mu, absl::Duration timeout) {
  static const auto original = Original<bool (*)(CondVar*, Mutex*, absl::Duration)>(
      "", "7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE");
  __tsan_release(mu);
  const bool timed_out = original(this, mu, timeout);
  __tsan_acquire(mu);
  return timed_out;
}

bool CondVar::WaitWithDeadline(Mutex* mu, absl::Time deadline) {
  static const auto original = Original<bool (*)(CondVar*, Mutex*, absl::Time)>(
      "", "7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE");
  __tsan_release(mu);
  const bool timed_out = original(this, mu, deadline);
  __tsan_acquire(mu);
  return timed_out;
}

void Notification::Notify() {
  static const auto original = Original<void (*)(Notification*)>("", "12Notification6NotifyEv");
  __tsan_release(this);
  const IgnoreReads ignore;
  original(this);
}

void Notification::WaitForNotification() const {
  static const auto original =
      Original<void (*)(const Notification*)>("K", "12Notification19WaitForNotificationEv");
  original(this);
  __tsan_acquire(const_cast<Notification*>(this));
}

bool Notification::WaitForNotificationWithTimeout(absl::Duration timeout) const {
  static const auto original = Original<bool (*)(const Notification*, absl::Duration)>(
      "K", "12Notification30WaitForNotificationWithTimeoutENS0_8DurationE");
  const bool notified = original(this, timeout);
  if (notified) __tsan_acquire(const_cast<Notification*>(this));
  return notified;
}

ABSL_NAMESPACE_END
}  // namespace absl

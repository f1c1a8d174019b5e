// SPDX-License-Identifier: Apache-2.0
//
// Sessions: resident sequences under leases. Who owns them, how long they live, how much memory
// they may hold and where, and what became of those that are gone.
//
//     Reserve ──► (Request fills the sequence) ──► Publish ──► Use ... ──► Release | lease ends
//        │                                                                      │
//     quotas: sessions, bytes a tenant, bytes on the device and in host memory  remembered, so that
//     where the device is full, the least recently used session is demoted      answers are exact
//
// Locks. Session::mu guards the sequence: readers (Select, Fetch) share it, what changes the
// sequence (Append's commit, moving) excludes them. The store's own lock is never held while a
// session's is waited for.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/pipeline/resident.h"

namespace dynsplit {

class SessionStore;

// What the caller asked for.
struct SessionSettings {
  std::string tenant;
  absl::Duration lease = absl::Seconds(300);
  enum class Placement : uint8_t { kAny, kDevice, kHost } placement = Placement::kAny;
  int64_t reserve_tokens = 0;
};

// Thread-safe. Shared by the store and by calls in flight; its memory goes with the last of them.
class Session {
 public:
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const std::string& id() const { return id_; }
  const SessionSettings& settings() const { return settings_; }
  const ResidentSpec& spec() const { return spec_; }  // shape at opening
  Backend& backend() const { return backend_; }       // where it is, for good

  // Guards the sequence. Reader-held while views of it are in use.
  absl::Mutex mu;
  // Null before Materialize.
  std::unique_ptr<ResidentSequence> sequence ABSL_GUARDED_BY(mu);
  int64_t num_demotions ABSL_GUARDED_BY(mu) = 0;
  int64_t num_restorations ABSL_GUARDED_BY(mu) = 0;

  // One step of the reuse pipeline at a time. Acquired before mu.
  absl::Mutex slots_mu ABSL_ACQUIRED_BEFORE(mu);
  RowSlots slots ABSL_GUARDED_BY(slots_mu);

 private:
  friend class SessionStore;
  friend class SessionUse;
  Session(SessionStore& store, Backend& backend, std::string id, SessionSettings settings,
          ResidentSpec spec, std::shared_ptr<const DelimiterProfile> profile);

  SessionStore& store_;
  Backend& backend_;
  const std::string id_;
  const SessionSettings settings_;
  const ResidentSpec spec_;
  const std::shared_ptr<const DelimiterProfile> profile_;

  // Guarded by the store's lock.
  absl::Duration lease_;
  absl::Time expiry_ = absl::InfiniteFuture();
  absl::Time last_used_;
  int32_t num_users_ = 0;  // calls in flight; a session in use does not expire
  int32_t num_mappings_ = 0;
  bool appending_ = false;
  bool moving_ = false;
  bool published_ = false;
  Residence residence_ = Residence::kDevice;  // of K and V, once materialized
  int64_t key_value_bytes_ = 0;               // as predicted when reserved
  int64_t index_bytes_ = 0;
  bool materialized_ = false;
};

// Holds a session in use. Move-only.
class SessionUse {
 public:
  SessionUse() = default;
  SessionUse(SessionUse&& other) noexcept;
  SessionUse& operator=(SessionUse&& other) noexcept;
  ~SessionUse() { Reset(); }
  void Reset();
  Session* get() const { return session_.get(); }
  Session* operator->() const { return session_.get(); }
  explicit operator bool() const { return session_ != nullptr; }

 private:
  friend class SessionStore;
  enum class Purpose : uint8_t { kPeek, kUse, kAppend };
  SessionUse(std::shared_ptr<Session> session, Purpose purpose)
      : session_(std::move(session)), purpose_(purpose) {}
  std::shared_ptr<Session> session_;
  Purpose purpose_ = Purpose::kPeek;
};

// What Get says, beside what the sequence itself knows.
struct SessionState {
  absl::Duration lease;
  absl::Duration lease_left;
  int32_t num_mappings = 0;
};

// Thread-safe.
class SessionStore {
 public:
  struct Options {
    int32_t max_sessions = 1024;
    // K, V and indices of all sessions of one device; 0 = the backend's own cap
    int64_t max_device_bytes = 0;
    int64_t max_host_bytes = 0;    // likewise in pinned host memory; 0 = the backend's own cap
    int64_t max_tenant_bytes = 0;  // device and host together; 0 = no quota
    std::function<absl::Time()> now = absl::Now;
  };
  struct Totals {
    int64_t num_sessions = 0;
    int64_t device_bytes = 0, host_bytes = 0;
    int64_t opened = 0, released = 0, expired = 0, lost = 0, demotions = 0, restorations = 0;
  };

  // The store outlives every session.
  explicit SessionStore(Options options);
  ~SessionStore();
  SessionStore(const SessionStore&) = delete;
  SessionStore& operator=(const SessionStore&) = delete;

  // -- opening --
  // Takes a place and the tenant's quota. Nothing is allocated yet; the session is invisible to
  // others, and gone with the last pointer unless published. `backend` is where it will be, and
  // outlives the store.
  //   RESOURCE_EXHAUSTED  sessions, tenant's bytes (RetryInfo); more than can ever fit
  absl::StatusOr<std::shared_ptr<Session>> Reserve(SessionSettings settings, ResidentSpec spec,
                                                   std::shared_ptr<const DelimiterProfile> profile,
                                                   Backend& backend);
  // Allocates the sequence, demoting least recently used sessions of the device where that is what
  // it takes. May take long (pinning, copying): from a job. RESOURCE_EXHAUSTED with RetryInfo.
  absl::Status Materialize(Session& session, Stream& stream);
  // From now on the session can be used; its lease runs.
  void Publish(const std::shared_ptr<Session>& session);

  // -- using -- each renews the lease
  //   NOT_FOUND SESSION_UNKNOWN, SESSION_EXPIRED, SESSION_RELEASED; PERMISSION_DENIED
  //   SESSION_OWNER; DATA_LOSS SESSION_LOST when its device is gone
  absl::StatusOr<SessionUse> Use(std::string_view id, std::string_view tenant);
  // As Use, and no other append until the result is gone: FAILED_PRECONDITION APPEND_RUNNING,
  // APPEND_POSITION.
  absl::StatusOr<SessionUse> UseForAppend(std::string_view id, std::string_view tenant,
                                          int64_t position);
  // `lease` zero = unchanged.
  absl::Status Renew(std::string_view id, std::string_view tenant, absl::Duration lease);
  // Bytes given back (0 when it had been released before).
  absl::StatusOr<int64_t> Release(std::string_view id, std::string_view tenant);
  // Does not renew.
  absl::StatusOr<SessionUse> Peek(std::string_view id, std::string_view tenant);
  SessionState StateOf(const Session& session) const;
  // Mapped sessions stay where they are. FAILED_PRECONDITION when K and V are not on the device.
  absl::Status Map(Session& session);
  absl::Status Unmap(Session& session);  // FAILED_PRECONDITION when not mapped

  // -- moving --
  // True when K and V were demoted and would fit again now; the caller then runs Restore in a job.
  bool ShouldRestore(const Session& session) const;
  absl::Status Restore(Session& session, Stream& stream);

  // Ends leases that are over and sessions whose device has failed, so that nobody's quota is held
  // by them, and forgets old endings. Called every now and then.
  void Sweep();
  Totals totals() const;

 private:
  friend class Session;
  friend class SessionUse;
  enum class Ending : uint8_t { kReleased, kExpired, kLost };
  struct Tombstone {
    Ending ending;
    std::string tenant;
    absl::Time forget;
  };

  absl::StatusOr<std::shared_ptr<Session>> Find(std::string_view id, std::string_view tenant)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Removes a session from the table; the caller drops the pointer outside the lock.
  std::shared_ptr<Session> End(const std::string& id, Ending ending)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The session when its lease is over, taken out of the table.
  std::shared_ptr<Session> EndIfExpired(std::string_view id) ABSL_LOCKS_EXCLUDED(mu_);
  SessionUse Hold(std::shared_ptr<Session> session, SessionUse::Purpose purpose)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool HasRoom(const Session& session, Residence residence) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Adds (or takes away) the session's K and V where they are, and its index.
  void Charge(Session& session, Residence residence, int64_t sign)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CreateSequence(Session& session, Residence residence) ABSL_LOCKS_EXCLUDED(mu_);
  // Demotes the backend's least recently used session that may be; false when there is none.
  absl::StatusOr<bool> DemoteOne(const Backend& backend, Stream& stream) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status Move(Session& session, Residence residence, Stream& stream) ABSL_LOCKS_EXCLUDED(mu_);
  void GiveBack(Session& session) ABSL_LOCKS_EXCLUDED(mu_);
  void StopUsing(Session& session, SessionUse::Purpose purpose) ABSL_LOCKS_EXCLUDED(mu_);

  const Options options_;

  mutable absl::Mutex mu_;
  absl::flat_hash_map<std::string, std::shared_ptr<Session>> sessions_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<std::string, Tombstone> tombstones_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, int64_t, std::less<>> tenant_bytes_ ABSL_GUARDED_BY(mu_);
  int64_t num_reserved_ ABSL_GUARDED_BY(mu_) = 0;  // published or not
  absl::flat_hash_map<const Backend*, int64_t> device_bytes_ ABSL_GUARDED_BY(mu_);
  Totals totals_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dynsplit

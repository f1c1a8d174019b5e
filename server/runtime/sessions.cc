// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/sessions.h"

#include <sys/random.h>

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

// Endings are remembered for the lease's length, and at least this long.
constexpr absl::Duration kLeastMemory = absl::Minutes(10);
constexpr int64_t kRetryAfterMs = 1000;

std::string NewId() {
  std::array<char, 16> bytes;
  // 16 bytes are never cut short, and cannot fail once the system has started.
  if (getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) abort();
  return absl::StrCat("s-", absl::BytesToHexString({bytes.data(), bytes.size()}));
}

absl::Status Gone(std::string_view reason, std::string_view problem) {
  return WithReason(absl::StatusCode::kNotFound, reason, problem);
}

absl::Status NotOwner() {
  return WithReason(absl::StatusCode::kPermissionDenied, "SESSION_OWNER",
                    "the session belongs to another tenant");
}

}  // namespace

// -- Session, SessionUse --------------------------------------------------------------------------

Session::Session(SessionStore& store, Backend& backend, std::string id, SessionSettings settings,
                 ResidentSpec spec, std::shared_ptr<const DelimiterProfile> profile)
    : store_(store),
      backend_(backend),
      id_(std::move(id)),
      settings_(std::move(settings)),
      spec_(std::move(spec)),
      profile_(std::move(profile)),
      lease_(settings_.lease) {}

Session::~Session() {
  {
    absl::MutexLock lock(&slots_mu);
    slots = {};
  }
  {
    absl::MutexLock lock(&mu);
    sequence.reset();
  }
  store_.GiveBack(*this);
}

SessionUse::SessionUse(SessionUse&& other) noexcept
    : session_(std::exchange(other.session_, nullptr)), purpose_(other.purpose_) {}

SessionUse& SessionUse::operator=(SessionUse&& other) noexcept {
  if (this != &other) {
    Reset();
    session_ = std::exchange(other.session_, nullptr);
    purpose_ = other.purpose_;
  }
  return *this;
}

void SessionUse::Reset() {
  if (session_ == nullptr) return;
  const std::shared_ptr<Session> session = std::exchange(session_, nullptr);
  session->store_.StopUsing(*session, purpose_);
}

// -- opening --------------------------------------------------------------------------------------

SessionStore::SessionStore(Options options) : options_(std::move(options)) {}

SessionStore::~SessionStore() {
  absl::flat_hash_map<std::string, std::shared_ptr<Session>> sessions;
  absl::MutexLock lock(&mu_);
  sessions.swap(sessions_);
  mu_.Unlock();
  sessions.clear();
  mu_.Lock();
}

absl::StatusOr<std::shared_ptr<Session>> SessionStore::Reserve(
    SessionSettings settings, ResidentSpec spec, std::shared_ptr<const DelimiterProfile> profile,
    Backend& backend) {
  const ResidentLayout layout = PredictResident(spec);
  const int64_t bytes = layout.key_value_bytes + layout.index_bytes;
  const bool never =
      (options_.max_tenant_bytes > 0 && bytes > options_.max_tenant_bytes) ||
      (options_.max_device_bytes > 0 &&
       layout.index_bytes + (settings.placement == SessionSettings::Placement::kDevice
                                 ? layout.key_value_bytes
                                 : 0) >
           options_.max_device_bytes);
  if (never) {
    return WithReason(absl::StatusCode::kResourceExhausted, "SESSION_TOO_LARGE",
                      absl::StrCat("the session needs ", bytes, " bytes, ", layout.index_bytes,
                                   " of them for its index; that is more than this server gives"));
  }
  const std::string tenant = settings.tenant;
  std::shared_ptr<Session> session(new Session(*this, backend, NewId(), std::move(settings),
                                               std::move(spec), std::move(profile)));
  absl::MutexLock lock(&mu_);
  // Counted from here on: given back with the session.
  session->key_value_bytes_ = layout.key_value_bytes;
  session->index_bytes_ = layout.index_bytes;
  ++num_reserved_;
  int64_t& tenant_bytes = tenant_bytes_[tenant];
  tenant_bytes += bytes;
  absl::Status status;
  if (num_reserved_ > options_.max_sessions) {
    status = RetryLater(absl::StatusCode::kResourceExhausted,
                        absl::StrCat("the server has ", num_reserved_ - 1, " sessions, its most"),
                        kRetryAfterMs);
  } else if (options_.max_tenant_bytes > 0 && tenant_bytes > options_.max_tenant_bytes) {
    status = RetryLater(
        absl::StatusCode::kResourceExhausted,
        absl::StrCat("the tenant's sessions hold ", tenant_bytes - bytes, " bytes; with ", bytes,
                     " more it would exceed its quota of ", options_.max_tenant_bytes),
        kRetryAfterMs);
  }
  if (status.ok()) return session;
  mu_.Unlock();
  session = nullptr;  // gives back
  mu_.Lock();
  return status;
}

bool SessionStore::HasRoom(const Session& session, Residence residence) const {
  const int64_t index_bytes = session.materialized_ ? 0 : session.index_bytes_;
  const int64_t device_bytes =
      index_bytes + (residence == Residence::kDevice ? session.key_value_bytes_ : 0);
  const int64_t host_bytes = residence == Residence::kHost ? session.key_value_bytes_ : 0;
  const auto fits = [](int64_t used, int64_t more, int64_t most) {
    return most == 0 || more == 0 || used + more <= most;
  };
  const auto used = device_bytes_.find(&session.backend_);
  return fits(used == device_bytes_.end() ? 0 : used->second, device_bytes,
              options_.max_device_bytes) &&
         fits(totals_.host_bytes, host_bytes, options_.max_host_bytes);
}

void SessionStore::Charge(Session& session, Residence residence, int64_t sign) {
  const int64_t key_value_bytes = sign * session.key_value_bytes_;
  int64_t device_bytes = sign * session.index_bytes_;
  (residence == Residence::kDevice ? device_bytes : totals_.host_bytes) += key_value_bytes;
  totals_.device_bytes += device_bytes;
  device_bytes_[&session.backend_] += device_bytes;
}

absl::Status SessionStore::CreateSequence(Session& session, Residence residence) {
  {
    absl::MutexLock lock(&mu_);
    if (!HasRoom(session, residence)) {
      return absl::ResourceExhaustedError("the sessions' share of memory is used up");
    }
    Charge(session, residence, 1);
    session.residence_ = residence;
    session.materialized_ = true;
  }
  absl::StatusOr<std::unique_ptr<ResidentSequence>> sequence =
      ResidentSequence::Create(session.spec_, session.profile_, residence, session.backend_);
  if (sequence.ok()) {
    absl::MutexLock lock(&session.mu);
    session.sequence = *std::move(sequence);
    return absl::OkStatus();
  }
  absl::MutexLock lock(&mu_);
  Charge(session, residence, -1);
  session.materialized_ = false;
  return sequence.status();
}

absl::Status SessionStore::Materialize(Session& session, Stream& stream) {
  using Placement = SessionSettings::Placement;
  absl::Status status = absl::ResourceExhaustedError("");
  if (session.settings_.placement != Placement::kHost) {
    while (true) {
      status = CreateSequence(session, Residence::kDevice);
      if (!absl::IsResourceExhausted(status)) return status;
      const absl::StatusOr<bool> demoted = DemoteOne(session.backend_, stream);
      if (!demoted.ok()) return demoted.status();
      if (!*demoted) break;
    }
  }
  if (session.settings_.placement != Placement::kDevice) {
    // The index needs device memory, too.
    while (true) {
      status = CreateSequence(session, Residence::kHost);
      if (!absl::IsResourceExhausted(status)) return status;
      const absl::StatusOr<bool> demoted = DemoteOne(session.backend_, stream);
      if (!demoted.ok()) return demoted.status();
      if (!*demoted) break;
    }
  }
  return RetryLater(absl::StatusCode::kResourceExhausted,
                    absl::StrCat("no memory for ", session.key_value_bytes_,
                                 " bytes of K and V: ", std::string(status.message())),
                    kRetryAfterMs);
}

void SessionStore::Publish(const std::shared_ptr<Session>& session) {
  absl::MutexLock lock(&mu_);
  session->published_ = true;
  session->last_used_ = options_.now();
  session->expiry_ = session->last_used_ + session->lease_;
  sessions_[session->id_] = session;
  ++totals_.opened;
  totals_.num_sessions = static_cast<int64_t>(sessions_.size());
}

void SessionStore::GiveBack(Session& session) {
  absl::MutexLock lock(&mu_);
  if (session.key_value_bytes_ == 0) return;  // never counted
  --num_reserved_;
  const auto tenant = tenant_bytes_.find(session.settings_.tenant);
  tenant->second -= session.key_value_bytes_ + session.index_bytes_;
  if (tenant->second == 0) tenant_bytes_.erase(tenant);
  if (session.materialized_) Charge(session, session.residence_, -1);
}

// -- using ----------------------------------------------------------------------------------------

std::shared_ptr<Session> SessionStore::End(const std::string& id, Ending ending) {
  const auto found = sessions_.find(id);
  std::shared_ptr<Session> session = std::move(found->second);
  sessions_.erase(found);
  tombstones_[id] = {.ending = ending,
                     .tenant = session->settings_.tenant,
                     .forget = options_.now() + std::max(session->lease_, kLeastMemory)};
  int64_t& total = ending == Ending::kExpired    ? totals_.expired
                   : ending == Ending::kReleased ? totals_.released
                                                 : totals_.lost;
  ++total;
  totals_.num_sessions = static_cast<int64_t>(sessions_.size());
  return session;
}

std::shared_ptr<Session> SessionStore::EndIfExpired(std::string_view id) {
  absl::MutexLock lock(&mu_);
  const auto found = sessions_.find(absl::string_view(id.data(), id.size()));
  if (found == sessions_.end()) return nullptr;
  const Session& session = *found->second;
  if (session.num_users_ > 0 || session.expiry_ > options_.now()) return nullptr;
  return End(session.id_, Ending::kExpired);
}

absl::StatusOr<std::shared_ptr<Session>> SessionStore::Find(std::string_view id,
                                                            std::string_view tenant) {
  const absl::string_view key(id.data(), id.size());
  if (const auto found = sessions_.find(key); found != sessions_.end()) {
    if (found->second->settings_.tenant != tenant) return NotOwner();
    if (absl::Status status = found->second->backend_.Healthy(); !status.ok()) {
      return WithReason(
          absl::StatusCode::kDataLoss, "SESSION_LOST",
          absl::StrCat("the session was lost with the device: ", std::string(status.message())));
    }
    return found->second;
  }
  const auto ended = tombstones_.find(key);
  if (ended == tombstones_.end()) return Gone("SESSION_UNKNOWN", "there is no such session");
  if (ended->second.tenant != tenant) return NotOwner();
  if (ended->second.ending == Ending::kLost) {
    return WithReason(absl::StatusCode::kDataLoss, "SESSION_LOST",
                      "the session was lost with its device");
  }
  if (ended->second.ending == Ending::kReleased) {
    return Gone("SESSION_RELEASED", "the session has been released");
  }
  return Gone("SESSION_EXPIRED", "the session's lease has ended");
}

SessionUse SessionStore::Hold(std::shared_ptr<Session> session, SessionUse::Purpose purpose) {
  ++session->num_users_;
  if (purpose == SessionUse::Purpose::kAppend) session->appending_ = true;
  if (purpose != SessionUse::Purpose::kPeek) {
    session->last_used_ = options_.now();
    session->expiry_ = session->last_used_ + session->lease_;
  }
  return SessionUse(std::move(session), purpose);
}

absl::StatusOr<SessionUse> SessionStore::Use(std::string_view id, std::string_view tenant) {
  const std::shared_ptr<Session> expired = EndIfExpired(id);
  absl::MutexLock lock(&mu_);
  absl::StatusOr<std::shared_ptr<Session>> session = Find(id, tenant);
  if (!session.ok()) return session.status();
  return Hold(*std::move(session), SessionUse::Purpose::kUse);
}

absl::StatusOr<SessionUse> SessionStore::UseForAppend(std::string_view id, std::string_view tenant,
                                                      int64_t position) {
  SessionUse use;
  {
    const std::shared_ptr<Session> expired = EndIfExpired(id);
    absl::MutexLock lock(&mu_);
    absl::StatusOr<std::shared_ptr<Session>> session = Find(id, tenant);
    if (!session.ok()) return session.status();
    if ((*session)->appending_) {
      return PreconditionFailed("APPEND_RUNNING", "target.session_id",
                                "another append of the session has not ended");
    }
    use = Hold(*std::move(session), SessionUse::Purpose::kAppend);
  }
  // No other append can change the length now.
  int64_t num_tokens = 0;
  {
    absl::ReaderMutexLock lock(&use->mu);
    num_tokens = use->sequence->num_tokens();
  }
  if (position == num_tokens) return use;
  return PreconditionFailed(
      "APPEND_POSITION", "target.position",
      absl::StrCat("is ", position, "; the session has ", num_tokens, " tokens"));
}

void SessionStore::StopUsing(Session& session, SessionUse::Purpose purpose) {
  absl::MutexLock lock(&mu_);
  --session.num_users_;
  if (purpose == SessionUse::Purpose::kAppend) session.appending_ = false;
  if (purpose == SessionUse::Purpose::kPeek) return;
  // A long call renews the lease up to its end.
  session.expiry_ = std::max(session.expiry_, options_.now() + session.lease_);
}

absl::StatusOr<SessionUse> SessionStore::Peek(std::string_view id, std::string_view tenant) {
  const std::shared_ptr<Session> expired = EndIfExpired(id);
  absl::MutexLock lock(&mu_);
  absl::StatusOr<std::shared_ptr<Session>> session = Find(id, tenant);
  if (!session.ok()) return session.status();
  return Hold(*std::move(session), SessionUse::Purpose::kPeek);
}

absl::Status SessionStore::Renew(std::string_view id, std::string_view tenant,
                                 absl::Duration lease) {
  const std::shared_ptr<Session> expired = EndIfExpired(id);
  absl::MutexLock lock(&mu_);
  absl::StatusOr<std::shared_ptr<Session>> session = Find(id, tenant);
  if (!session.ok()) return session.status();
  if (lease > absl::ZeroDuration()) (*session)->lease_ = lease;
  (*session)->last_used_ = options_.now();
  (*session)->expiry_ = (*session)->last_used_ + (*session)->lease_;
  return absl::OkStatus();
}

absl::StatusOr<int64_t> SessionStore::Release(std::string_view id, std::string_view tenant) {
  const std::shared_ptr<Session> expired = EndIfExpired(id);
  std::shared_ptr<Session> released;  // freed outside the lock
  {
    absl::MutexLock lock(&mu_);
    absl::StatusOr<std::shared_ptr<Session>> session = Find(id, tenant);
    if (!session.ok()) {
      const bool before = GetErrorDetails(session.status()).type == "SESSION_RELEASED";
      if (before) return 0;
      return session.status();
    }
    released = End((*session)->id_, Ending::kReleased);
  }
  int64_t bytes = 0;
  {
    absl::MutexLock lock(&released->slots_mu);
    bytes = released->slots.held.size_bytes();
  }
  absl::ReaderMutexLock lock(&released->mu);
  return bytes + released->sequence->device_bytes() + released->sequence->host_bytes();
}

SessionState SessionStore::StateOf(const Session& session) const {
  absl::MutexLock lock(&mu_);
  return {.lease = session.lease_,
          .lease_left = session.published_ ? session.expiry_ - options_.now() : session.lease_,
          .num_mappings = session.num_mappings_};
}

absl::Status SessionStore::Map(Session& session) {
  absl::MutexLock lock(&mu_);
  if (session.residence_ != Residence::kDevice || session.moving_) {
    return PreconditionFailed("SESSION_DEMOTED", "session_id",
                              "K and V are in host memory now, and cannot be mapped");
  }
  ++session.num_mappings_;
  return absl::OkStatus();
}

absl::Status SessionStore::Unmap(Session& session) {
  absl::MutexLock lock(&mu_);
  if (session.num_mappings_ == 0) {
    return PreconditionFailed("SESSION_NOT_MAPPED", "session_id", "the session is not mapped");
  }
  --session.num_mappings_;
  return absl::OkStatus();
}

// -- moving ---------------------------------------------------------------------------------------

absl::Status SessionStore::Move(Session& session, Residence residence, Stream& stream) {
  absl::Status status;
  {
    absl::MutexLock lock(&session.mu);
    status = session.sequence->MoveTo(residence, stream);
    if (status.ok()) {
      ++(residence == Residence::kHost ? session.num_demotions : session.num_restorations);
    }
  }
  absl::MutexLock lock(&mu_);
  session.moving_ = false;
  if (!status.ok()) return status;
  Charge(session, session.residence_, -1);
  session.residence_ = residence;
  Charge(session, residence, 1);
  ++(residence == Residence::kHost ? totals_.demotions : totals_.restorations);
  return absl::OkStatus();
}

absl::StatusOr<bool> SessionStore::DemoteOne(const Backend& backend, Stream& stream) {
  std::shared_ptr<Session> victim;
  {
    absl::MutexLock lock(&mu_);
    for (const auto& [id, session] : sessions_) {
      if (&session->backend_ != &backend || session->residence_ != Residence::kDevice ||
          session->moving_ || session->appending_ || session->num_mappings_ > 0) {
        continue;
      }
      if (victim == nullptr || session->last_used_ < victim->last_used_) victim = session;
    }
    if (victim == nullptr || !HasRoom(*victim, Residence::kHost)) return false;
    victim->moving_ = true;
  }
  absl::Status status = Move(*victim, Residence::kHost, stream);
  if (absl::IsResourceExhausted(status)) return false;  // host memory is full, too
  if (!status.ok()) return status;
  return true;
}

bool SessionStore::ShouldRestore(const Session& session) const {
  if (session.settings_.placement == SessionSettings::Placement::kHost) return false;
  absl::MutexLock lock(&mu_);
  if (session.residence_ == Residence::kDevice || session.moving_ || !session.published_) {
    return false;
  }
  if (!HasRoom(session, Residence::kDevice)) return false;
  const Backend& backend = session.backend_;
  return backend.device_bytes_in_use() + session.key_value_bytes_ <= backend.info().memory_bytes;
}

absl::Status SessionStore::Restore(Session& session, Stream& stream) {
  {
    absl::MutexLock lock(&mu_);
    if (session.residence_ == Residence::kDevice || session.moving_) return absl::OkStatus();
    if (!HasRoom(session, Residence::kDevice)) {
      return absl::ResourceExhaustedError("the sessions' share of device memory is used up");
    }
    session.moving_ = true;
  }
  return Move(session, Residence::kDevice, stream);
}

// -- time -----------------------------------------------------------------------------------------

void SessionStore::Sweep() {
  std::vector<std::shared_ptr<Session>> ended;  // freed outside the lock
  absl::MutexLock lock(&mu_);
  const absl::Time now = options_.now();
  std::vector<std::pair<std::string, Ending>> over;
  for (const auto& [id, session] : sessions_) {
    if (session->num_users_ > 0) continue;
    if (session->expiry_ <= now) {
      over.emplace_back(id, Ending::kExpired);
    } else if (!session->backend_.Healthy().ok()) {
      over.emplace_back(id, Ending::kLost);
    }
  }
  ended.reserve(over.size());
  for (const auto& [id, ending] : over) ended.push_back(End(id, ending));
  absl::erase_if(tombstones_, [now](const auto& entry) { return entry.second.forget <= now; });
}

SessionStore::Totals SessionStore::totals() const {
  absl::MutexLock lock(&mu_);
  return totals_;
}

}  // namespace dynsplit

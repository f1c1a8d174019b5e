// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/begin_sessions.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/rpc/begin_adapter.h"
#include "server/rpc/session_adapter.h"

namespace dynsplit::rpc {
namespace {

// What Append and Fetch hold while they run.
struct Target {
  SessionUse session;
  SessionUse appending;
  TargetSession facts;
};

absl::StatusOr<Target> FindTarget(const v1::Begin& begin, Method method, SessionStore& store) {
  if (absl::Status status = CheckSessionFields(begin, method); !status.ok()) return status;
  absl::StatusOr<std::string> tenant = TenantFromProto(begin.tenant(), "tenant");
  if (!tenant.ok()) return tenant.status();
  const std::string& id = begin.target().session_id();
  Target target;
  if (method == Method::kAppend) {
    absl::StatusOr<SessionUse> appending =
        store.UseForAppend(id, *tenant, begin.target().position());
    if (!appending.ok()) return appending.status();
    target.appending = *std::move(appending);
  }
  absl::StatusOr<SessionUse> session = store.Use(id, *tenant);
  if (!session.ok()) return session.status();
  target.session = *std::move(session);
  target.facts.spec = target.session->spec();
  absl::ReaderMutexLock lock(&target.session->mu);
  target.facts.spec.shape.num_tokens = target.session->sequence->num_tokens();
  if (method == Method::kFetch) {
    target.facts.segmentation = target.session->sequence->segmentation();
  }
  return target;
}

// The device of the session or of the memory that the request names; else whichever has room.
absl::StatusOr<Backend*> ChooseBackend(const RequestSpec& spec, const DeviceSet& devices) {
  Backend* chosen = spec.session ? &spec.session->backend() : nullptr;
  for (const RequestTensor& tensor : spec.tensors) {
    Backend* const owner = tensor.located() ? tensor.place.region->backend() : nullptr;
    if (owner == nullptr || owner == chosen) continue;
    if (chosen != nullptr) {
      return InvalidField(tensor.field + ".location.region.name",
                          "is memory of another device than the session or the tensors before");
    }
    chosen = owner;
  }
  return chosen == nullptr ? &devices.Place().backend() : chosen;
}

}  // namespace

absl::StatusOr<RequestSpec> BeginRequest(const v1::Begin& begin, Method method,
                                         Services& services) {
  Target target;
  const bool targeted = method == Method::kAppend || method == Method::kFetch;
  if (targeted) {
    absl::StatusOr<Target> found = FindTarget(begin, method, services.sessions);
    if (!found.ok()) return found.status();
    target = *std::move(found);
  }
  absl::StatusOr<RequestSpec> spec =
      SpecFromBegin(begin, method,
                    {.profiles = services.profiles,
                     .regions = services.regions,
                     .target = targeted ? &target.facts : nullptr,
                     .max_total_tensors = services.config.max_total_tensors,
                     .fallback_request_id = absl::StrCat("r", absl::ToUnixMillis(services.started),
                                                         "-", services.next_request++)});
  if (!spec.ok()) return spec.status();
  spec->store = &services.sessions;
  spec->session = std::move(target.session);
  spec->appending = std::move(target.appending);
  absl::StatusOr<Backend*> backend = ChooseBackend(*spec, services.devices);
  if (!backend.ok()) return backend.status();
  spec->backend = *backend;
  if (spec->opening.has_value()) {
    absl::StatusOr<std::shared_ptr<Session>> opened = services.sessions.Reserve(
        spec->opening->settings, spec->opening->resident, spec->opening->profile, **backend);
    if (!opened.ok()) return opened.status();
    spec->opened = *std::move(opened);
  }
  return spec;
}

}  // namespace dynsplit::rpc

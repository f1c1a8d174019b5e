// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/session_service.h"

#include <utility>

#include "server/pipeline/errors.h"
#include "server/rpc/select_call.h"
#include "server/rpc/session_adapter.h"
#include "server/rpc/tensor_adapter.h"
#include "server/rpc/unary.h"
#include "server/runtime/session_work.h"

namespace dynsplit::rpc {
namespace {

void FillMapping(const SessionSnapshot& session, v1::SessionMapping& wire) {
  const ResidentLayout& layout = session.layout;
  wire.set_byte_size(layout.key_value_bytes);
  wire.set_capacity_tokens(layout.capacity_tokens);
  wire.set_row_bytes(session.spec.shape.head_dim * DTypeBytes(layout.key_dtype));
  wire.set_key_dtype(DTypeToProto(layout.key_dtype));
  wire.set_value_dtype(DTypeToProto(layout.value_dtype));
  for (int32_t layer = 0; layer < session.spec.shape.num_layers; ++layer) {
    const int64_t begin = layer * layout.layer_bytes;
    wire.add_key_offset_bytes(begin);
    wire.add_value_offset_bytes(begin + layout.value_offset_bytes);
    if (layout.key_scale_offset_bytes > 0) {
      wire.add_key_scale_offset_bytes(begin + layout.key_scale_offset_bytes);
    }
    if (layout.value_scale_offset_bytes > 0) {
      wire.add_value_scale_offset_bytes(begin + layout.value_scale_offset_bytes);
    }
  }
}

// A session named by a unary request, without renewing its lease.
template <typename Request>
absl::StatusOr<SessionUse> PeekAt(const Request& request, SessionStore& store) {
  if (request.session_id().empty()) return InvalidField("session_id", "is missing");
  absl::StatusOr<std::string> tenant = TenantFromProto(request.tenant(), "tenant");
  if (!tenant.ok()) return tenant.status();
  return store.Peek(request.session_id(), *tenant);
}

}  // namespace

grpc::ServerUnaryReactor* SessionsService::Select(grpc::CallbackServerContext* context,
                                                  const v1::SelectRequest* request,
                                                  v1::SelectResponse* response) {
  return StartSelectCall(services_, *request, *response, *context);
}

grpc::ServerUnaryReactor* SessionsService::Renew(grpc::CallbackServerContext* context,
                                                 const v1::RenewSessionRequest* request,
                                                 v1::SessionInfo* response) {
  absl::StatusOr<absl::Duration> lease =
      LeaseFromProto(request->lease_seconds(), absl::ZeroDuration(), "lease_seconds");
  if (!lease.ok()) return Reply(context, lease.status());
  absl::StatusOr<SessionUse> session = PeekAt(*request, services_.sessions);
  if (!session.ok()) return Reply(context, session.status());
  absl::Status status =
      services_.sessions.Renew((*session)->id(), (*session)->settings().tenant, *lease);
  if (!status.ok()) return Reply(context, status);
  *response = SessionToProto(Snapshot(*session->get(), services_.sessions), services_.endpoint());
  return Reply(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* SessionsService::Release(grpc::CallbackServerContext* context,
                                                   const v1::ReleaseSessionRequest* request,
                                                   v1::ReleaseSessionResponse* response) {
  if (request->session_id().empty()) {
    return Reply(context, InvalidField("session_id", "is missing"));
  }
  absl::StatusOr<std::string> tenant = TenantFromProto(request->tenant(), "tenant");
  if (!tenant.ok()) return Reply(context, tenant.status());
  const absl::StatusOr<int64_t> freed = services_.sessions.Release(request->session_id(), *tenant);
  if (freed.ok()) response->set_freed_bytes(*freed);
  return Reply(context, freed.status());
}

grpc::ServerUnaryReactor* SessionsService::Get(grpc::CallbackServerContext* context,
                                               const v1::GetSessionRequest* request,
                                               v1::SessionInfo* response) {
  absl::StatusOr<SessionUse> session = PeekAt(*request, services_.sessions);
  if (!session.ok()) return Reply(context, session.status());
  *response = SessionToProto(Snapshot(*session->get(), services_.sessions), services_.endpoint());
  return Reply(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* SessionsService::Map(grpc::CallbackServerContext* context,
                                               const v1::MapSessionRequest* request,
                                               v1::SessionMapping* response) {
  absl::StatusOr<SessionUse> session = PeekAt(*request, services_.sessions);
  if (!session.ok()) return Reply(context, session.status());
  absl::Status status =
      services_.sessions.Renew((*session)->id(), (*session)->settings().tenant, {});
  if (status.ok()) status = services_.sessions.Map(*session->get());
  if (!status.ok()) return Reply(context, status);
  absl::StatusOr<std::string> handle;
  {
    absl::ReaderMutexLock lock(&(*session)->mu);
    handle = (*session)->backend().ExportHandle((*session)->sequence->key_value());
  }
  if (!handle.ok()) {
    status = handle.status();
    status.Update(services_.sessions.Unmap(*session->get()));
    return Reply(context, status);
  }
  const SessionSnapshot snapshot = Snapshot(*session->get(), services_.sessions);
  response->set_handle(*handle);
  response->set_device_uuid((*session)->backend().info().uuid);
  FillMapping(snapshot, *response);
  *response->mutable_session() = SessionToProto(snapshot, services_.endpoint());
  return Reply(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* SessionsService::Unmap(grpc::CallbackServerContext* context,
                                                 const v1::UnmapSessionRequest* request,
                                                 v1::SessionInfo* response) {
  absl::StatusOr<SessionUse> session = PeekAt(*request, services_.sessions);
  if (!session.ok()) return Reply(context, session.status());
  absl::Status status = services_.sessions.Unmap(*session->get());
  if (status.ok()) {
    status = services_.sessions.Renew((*session)->id(), (*session)->settings().tenant, {});
  }
  if (!status.ok()) return Reply(context, status);
  *response = SessionToProto(Snapshot(*session->get(), services_.sessions), services_.endpoint());
  return Reply(context, absl::OkStatus());
}

}  // namespace dynsplit::rpc

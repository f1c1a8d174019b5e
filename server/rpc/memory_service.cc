// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/memory_service.h"

#include <utility>

#include "server/pipeline/errors.h"
#include "server/rpc/session_adapter.h"
#include "server/rpc/unary.h"
#include "server/runtime/log.h"

namespace dynsplit::rpc {
namespace {

absl::Status ServiceOff() {
  return WithReason(absl::StatusCode::kUnimplemented, "REGIONS_OFF",
                    "this server maps no memory of others (option regions); send tensors as chunks "
                    "of the stream instead");
}

absl::StatusOr<RegionStore::Registration> RegistrationFromProto(
    const v1::RegisterRegionRequest& wire) {
  RegionStore::Registration registration;
  registration.name = wire.name();
  registration.byte_size = wire.byte_size();
  registration.writable = wire.writable();
  absl::StatusOr<absl::Duration> lease =
      LeaseFromProto(wire.lease_seconds(), registration.lease, "lease_seconds");
  if (!lease.ok()) return lease.status();
  registration.lease = *lease;
  switch (wire.kind_case()) {
    case v1::RegisterRegionRequest::kPosixShm:
      if (wire.posix_shm().key().empty()) return InvalidField("posix_shm.key", "is missing");
      registration.shm_key = wire.posix_shm().key();
      registration.offset_bytes = wire.posix_shm().offset_bytes();
      return registration;
    case v1::RegisterRegionRequest::kCudaIpc:
      if (!wire.cuda_ipc().ready_event().empty()) {
        return WithReason(absl::StatusCode::kUnimplemented, "UNSUPPORTED_EVENT",
                          "cuda_ipc.ready_event: this server waits for no events; synchronise "
                          "before the call");
      }
      registration.ipc_handle = wire.cuda_ipc().handle();
      registration.device_uuid = wire.cuda_ipc().device_uuid();
      registration.offset_bytes = wire.cuda_ipc().offset_bytes();
      return registration;
    case v1::RegisterRegionRequest::kMemfd:
      return WithReason(absl::StatusCode::kUnimplemented, "UNSUPPORTED_MEMORY",
                        "memfd: this server has no side socket to receive descriptors; register "
                        "posix_shm or cuda_ipc");
    case v1::RegisterRegionRequest::KIND_NOT_SET:
      break;
  }
  return InvalidField("posix_shm", "is missing, and so are the other kinds of memory");
}

}  // namespace

grpc::ServerUnaryReactor* MemoryService::Register(grpc::CallbackServerContext* context,
                                                  const v1::RegisterRegionRequest* request,
                                                  v1::RegisterRegionResponse* response) {
  if (!services_.regions.enabled()) return Reply(context, ServiceOff());
  absl::StatusOr<RegionStore::Registration> registration = RegistrationFromProto(*request);
  if (!registration.ok()) return Reply(context, registration.status());
  // Mapping and pinning take as long as the region is large: not on gRPC's thread.
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  services_.devices.Place().executor().Submit(
      [this, reactor, response, registration = *std::move(registration)](Backend& /*backend*/,
                                                                         Stream& /*stream*/) {
        const absl::StatusOr<RegionStore::Info> info = services_.regions.Register(registration);
        if (info.ok()) {
          response->set_generation(info->generation);
          response->set_lease_seconds_left(absl::ToDoubleSeconds(info->lease_left));
          Log(LogLevel::kInfo, "region registered",
              {{"region", std::string_view(info->name)}, {"bytes", info->byte_size}});
        }
        Finish(*reactor, info.status());
      });
  return reactor;
}

grpc::ServerUnaryReactor* MemoryService::Unregister(grpc::CallbackServerContext* context,
                                                    const v1::UnregisterRegionRequest* request,
                                                    v1::UnregisterRegionResponse* /*response*/) {
  if (!services_.regions.enabled()) return Reply(context, ServiceOff());
  return Reply(context, services_.regions.Unregister(request->name(), request->generation()));
}

grpc::ServerUnaryReactor* MemoryService::List(grpc::CallbackServerContext* context,
                                              const v1::ListRegionsRequest* /*request*/,
                                              v1::ListRegionsResponse* response) {
  if (!services_.regions.enabled()) return Reply(context, ServiceOff());
  for (const RegionStore::Info& info : services_.regions.List()) {
    v1::Region& region = *response->add_regions();
    region.set_name(info.name);  // the generation is for its registrant alone
    region.set_byte_size(info.byte_size);
    region.set_writable(info.writable);
    region.set_lease_seconds_left(absl::ToDoubleSeconds(info.lease_left));
    region.set_num_users(info.num_users);
  }
  return Reply(context, absl::OkStatus());
}

}  // namespace dynsplit::rpc

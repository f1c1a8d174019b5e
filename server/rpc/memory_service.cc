// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/memory_service.h"

#include <atomic>
#include <string>
#include <utility>

#include "server/pipeline/errors.h"
#include "server/rpc/enum_map.h"
#include "server/rpc/result_adapter.h"
#include "server/rpc/session_adapter.h"
#include "server/rpc/unary.h"
#include "server/runtime/log.h"

namespace dynsplit::rpc {
namespace {

constexpr EnumMap<v1::Region::Kind, RegionStore::Kind, 3> kKinds = {
    {{v1::Region::KIND_POSIX_SHM, RegionStore::Kind::kPosixShm},
     {v1::Region::KIND_MEMFD, RegionStore::Kind::kMemFd},
     {v1::Region::KIND_CUDA_IPC, RegionStore::Kind::kCudaIpc}}};

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
  registration.owner = wire.owner();
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
      if (wire.memfd().token().empty()) return InvalidField("memfd.token", "is missing");
      registration.file_token = wire.memfd().token();
      registration.offset_bytes = wire.memfd().offset_bytes();
      return registration;
    case v1::RegisterRegionRequest::KIND_NOT_SET:
      break;
  }
  return InvalidField("posix_shm", "is missing, and so are the other kinds of memory");
}

// Attach: an owner for as long as its stream is open. Deletes itself.
class OwnerReactor final : public grpc::ServerBidiReactor<v1::AttachRequest, v1::AttachResponse> {
 public:
  explicit OwnerReactor(Services& services)
      : services_(services), owner_(services.regions.Attach()) {
    if (!owner_.ok()) {
      Finish(ErrorToGrpc(owner_.status()));
      return;
    }
    response_.set_owner(*owner_);
    StartRead(&request_);
    StartWrite(&response_);
  }

  // The first end that shows ends the owner: the reads' (half-closed, or connection gone), or the
  // cancellation.
  void OnReadDone(bool ok) override {
    if (ok) return StartRead(&request_);  // no meaning yet
    End(grpc::Status::OK);
  }
  void OnCancel() override { End(grpc::Status(grpc::StatusCode::CANCELLED, "the owner is gone")); }
  void OnDone() override {
    Detach();
    delete this;
  }

 private:
  void End(const grpc::Status& status) {
    if (Detach()) Finish(status);
  }

  // False where that has been done, or there is no owner.
  bool Detach() {
    if (!owner_.ok() || ended_.exchange(true)) return false;
    auto dropped = services_.regions.Detach(*owner_);
    Log(LogLevel::kInfo, "region owner detached",
        {{"regions", static_cast<int64_t>(dropped.size())}});
    // Unmapped elsewhere: this is gRPC's thread.
    services_.executor.Submit(
        [dropped = std::move(dropped)](Backend&, Stream&) mutable { dropped.clear(); });
    return true;
  }

  Services& services_;
  const absl::StatusOr<std::string> owner_;
  std::atomic<bool> ended_ = false;
  v1::AttachRequest request_;
  v1::AttachResponse response_;
};

}  // namespace

grpc::ServerBidiReactor<v1::AttachRequest, v1::AttachResponse>* MemoryService::Attach(
    grpc::CallbackServerContext* /*context*/) {
  return new OwnerReactor(services_);
}

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
    region.set_kind(kKinds.ToWire(info.kind));
    region.set_owned(info.owned);
  }
  return Reply(context, absl::OkStatus());
}

}  // namespace dynsplit::rpc

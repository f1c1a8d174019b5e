// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/compression_service.h"

#include "server/pipeline/errors.h"
#include "server/rpc/result_adapter.h"

namespace dynsplit::rpc {
namespace {

grpc::Status NoSessions() {
  return ErrorToGrpc(WithReason(
      absl::StatusCode::kUnimplemented, "UNSUPPORTED_SERVICE",
      "this server keeps no sessions; use Compression.Compress with TRANSFORM_INDEX instead"));
}

grpc::Status NoRegions() {
  return ErrorToGrpc(WithReason(
      absl::StatusCode::kUnimplemented, "UNSUPPORTED_SERVICE",
      "this server maps no shared memory; send tensors as chunks of the stream instead"));
}

grpc::ServerUnaryReactor* Refuse(grpc::CallbackServerContext* context, const grpc::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(status);
  return reactor;
}

// A stream that ends at once.
template <typename Reactor>
class RefusedStream final : public Reactor {
 public:
  explicit RefusedStream(const grpc::Status& status) { this->Finish(status); }
  void OnDone() override { delete this; }
};

}  // namespace

grpc::ServerReadReactor<v1::OpenSessionRequest>* SessionsService::Open(
    grpc::CallbackServerContext* /*context*/, v1::OpenSessionResponse* /*response*/) {
  return new RefusedStream<grpc::ServerReadReactor<v1::OpenSessionRequest>>(NoSessions());
}

grpc::ServerReadReactor<v1::AppendSessionRequest>* SessionsService::Append(
    grpc::CallbackServerContext* /*context*/, v1::AppendSessionResponse* /*response*/) {
  return new RefusedStream<grpc::ServerReadReactor<v1::AppendSessionRequest>>(NoSessions());
}

grpc::ServerWriteReactor<v1::FetchResponse>* SessionsService::Fetch(
    grpc::CallbackServerContext* /*context*/, const v1::FetchRequest* /*request*/) {
  return new RefusedStream<grpc::ServerWriteReactor<v1::FetchResponse>>(NoSessions());
}

grpc::ServerUnaryReactor* SessionsService::Select(grpc::CallbackServerContext* context,
                                                  const v1::SelectRequest* /*request*/,
                                                  v1::SelectResponse* /*response*/) {
  return Refuse(context, NoSessions());
}

grpc::ServerUnaryReactor* SessionsService::Renew(grpc::CallbackServerContext* context,
                                                 const v1::RenewSessionRequest* /*request*/,
                                                 v1::SessionInfo* /*response*/) {
  return Refuse(context, NoSessions());
}

grpc::ServerUnaryReactor* SessionsService::Release(grpc::CallbackServerContext* context,
                                                   const v1::ReleaseSessionRequest* /*request*/,
                                                   v1::ReleaseSessionResponse* /*response*/) {
  return Refuse(context, NoSessions());
}

grpc::ServerUnaryReactor* SessionsService::Get(grpc::CallbackServerContext* context,
                                               const v1::GetSessionRequest* /*request*/,
                                               v1::SessionInfo* /*response*/) {
  return Refuse(context, NoSessions());
}

grpc::ServerUnaryReactor* MemoryService::Register(grpc::CallbackServerContext* context,
                                                  const v1::RegisterRegionRequest* /*request*/,
                                                  v1::RegisterRegionResponse* /*response*/) {
  return Refuse(context, NoRegions());
}

grpc::ServerUnaryReactor* MemoryService::Unregister(grpc::CallbackServerContext* context,
                                                    const v1::UnregisterRegionRequest* /*request*/,
                                                    v1::UnregisterRegionResponse* /*response*/) {
  return Refuse(context, NoRegions());
}

grpc::ServerUnaryReactor* MemoryService::List(grpc::CallbackServerContext* context,
                                              const v1::ListRegionsRequest* /*request*/,
                                              v1::ListRegionsResponse* /*response*/) {
  return Refuse(context, NoRegions());
}

}  // namespace dynsplit::rpc

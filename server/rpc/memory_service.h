// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dynsplit/v1/memory.grpc.pb.h"
#include "server/rpc/services.h"

namespace dynsplit::rpc {

class MemoryService final : public v1::Memory::CallbackService {
 public:
  explicit MemoryService(Services& services) : services_(services) {}

  grpc::ServerBidiReactor<v1::AttachRequest, v1::AttachResponse>* Attach(
      grpc::CallbackServerContext* context) override;
  grpc::ServerUnaryReactor* Register(grpc::CallbackServerContext* context,
                                     const v1::RegisterRegionRequest* request,
                                     v1::RegisterRegionResponse* response) override;
  grpc::ServerUnaryReactor* Unregister(grpc::CallbackServerContext* context,
                                       const v1::UnregisterRegionRequest* request,
                                       v1::UnregisterRegionResponse* response) override;
  grpc::ServerUnaryReactor* List(grpc::CallbackServerContext* context,
                                 const v1::ListRegionsRequest* request,
                                 v1::ListRegionsResponse* response) override;

 private:
  Services& services_;
};

}  // namespace dynsplit::rpc

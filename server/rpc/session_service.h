// SPDX-License-Identifier: Apache-2.0
//
// Sessions as gRPC sees them. Open, Append and Fetch are compression streams.
#pragma once

#include "dynsplit/v1/sessions.grpc.pb.h"
#include "server/rpc/compression_call.h"
#include "server/rpc/services.h"

namespace dynsplit::rpc {

using UnarySessions = v1::Sessions::WithCallbackMethod_Select<
    v1::Sessions::WithCallbackMethod_Renew<v1::Sessions::WithCallbackMethod_Release<
        v1::Sessions::WithCallbackMethod_Get<v1::Sessions::WithCallbackMethod_Map<
            v1::Sessions::WithCallbackMethod_Unmap<v1::Sessions::Service>>>>>>;
using RawSessions =
    v1::Sessions::WithRawCallbackMethod_Open<v1::Sessions::WithRawCallbackMethod_Append<
        v1::Sessions::WithRawCallbackMethod_Fetch<UnarySessions>>>;

class SessionsService final : public RawSessions {
 public:
  explicit SessionsService(Services& services) : services_(services) {}

  FrameReactor* Open(grpc::CallbackServerContext* context) override {
    return StartCompressionCall(services_, Method::kOpen, *context);
  }
  FrameReactor* Append(grpc::CallbackServerContext* context) override {
    return StartCompressionCall(services_, Method::kAppend, *context);
  }
  FrameReactor* Fetch(grpc::CallbackServerContext* context) override {
    return StartCompressionCall(services_, Method::kFetch, *context);
  }
  grpc::ServerUnaryReactor* Select(grpc::CallbackServerContext* context,
                                   const v1::SelectRequest* request,
                                   v1::SelectResponse* response) override;
  grpc::ServerUnaryReactor* Renew(grpc::CallbackServerContext* context,
                                  const v1::RenewSessionRequest* request,
                                  v1::SessionInfo* response) override;
  grpc::ServerUnaryReactor* Release(grpc::CallbackServerContext* context,
                                    const v1::ReleaseSessionRequest* request,
                                    v1::ReleaseSessionResponse* response) override;
  grpc::ServerUnaryReactor* Get(grpc::CallbackServerContext* context,
                                const v1::GetSessionRequest* request,
                                v1::SessionInfo* response) override;
  grpc::ServerUnaryReactor* Map(grpc::CallbackServerContext* context,
                                const v1::MapSessionRequest* request,
                                v1::SessionMapping* response) override;
  grpc::ServerUnaryReactor* Unmap(grpc::CallbackServerContext* context,
                                  const v1::UnmapSessionRequest* request,
                                  v1::SessionInfo* response) override;

 private:
  Services& services_;
};

}  // namespace dynsplit::rpc

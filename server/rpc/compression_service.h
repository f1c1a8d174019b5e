// SPDX-License-Identifier: Apache-2.0
//
// The services as gRPC sees them: one line a method.
#pragma once

#include "dynsplit/v1/compression.grpc.pb.h"
#include "dynsplit/v1/memory.grpc.pb.h"
#include "dynsplit/v1/sessions.grpc.pb.h"
#include "server/rpc/compression_call.h"
#include "server/rpc/services.h"

namespace dynsplit::rpc {

// Messages are taken and given as bytes, so that tensors are copied once, to their place.
using RawCompression = v1::Compression::WithRawCallbackMethod_Compress<
    v1::Compression::WithRawCallbackMethod_Plan<v1::Compression::WithRawCallbackMethod_Apply<
        v1::Compression::WithRawCallbackMethod_Calibrate<v1::Compression::Service>>>>;

class CompressionService final : public RawCompression {
 public:
  explicit CompressionService(Services& services) : services_(services) {}

  CompressionReactor* Compress(grpc::CallbackServerContext* context) override {
    return StartCompressionCall(services_, Method::kCompress, *context);
  }
  CompressionReactor* Plan(grpc::CallbackServerContext* context) override {
    return StartCompressionCall(services_, Method::kPlan, *context);
  }
  CompressionReactor* Apply(grpc::CallbackServerContext* context) override {
    return StartCompressionCall(services_, Method::kApply, *context);
  }
  CompressionReactor* Calibrate(grpc::CallbackServerContext* context) override {
    return StartCompressionCall(services_, Method::kCalibrate, *context);
  }

 private:
  Services& services_;
};

// UNIMPLEMENTED, with the sentence that says what to use instead.
class SessionsService final : public v1::Sessions::CallbackService {
 public:
  grpc::ServerReadReactor<v1::OpenSessionRequest>* Open(grpc::CallbackServerContext* context,
                                                        v1::OpenSessionResponse* response) override;
  grpc::ServerReadReactor<v1::AppendSessionRequest>* Append(
      grpc::CallbackServerContext* context, v1::AppendSessionResponse* response) override;
  grpc::ServerWriteReactor<v1::FetchResponse>* Fetch(grpc::CallbackServerContext* context,
                                                     const v1::FetchRequest* request) override;
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
};

class MemoryService final : public v1::Memory::CallbackService {
 public:
  grpc::ServerUnaryReactor* Register(grpc::CallbackServerContext* context,
                                     const v1::RegisterRegionRequest* request,
                                     v1::RegisterRegionResponse* response) override;
  grpc::ServerUnaryReactor* Unregister(grpc::CallbackServerContext* context,
                                       const v1::UnregisterRegionRequest* request,
                                       v1::UnregisterRegionResponse* response) override;
  grpc::ServerUnaryReactor* List(grpc::CallbackServerContext* context,
                                 const v1::ListRegionsRequest* request,
                                 v1::ListRegionsResponse* response) override;
};

}  // namespace dynsplit::rpc

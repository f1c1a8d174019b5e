// SPDX-License-Identifier: Apache-2.0
//
// Compression as gRPC sees it: one line a method.
#pragma once

#include "dynsplit/v1/compression.grpc.pb.h"
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

  FrameReactor* Compress(grpc::CallbackServerContext* context) override {
    return StartCompressionCall(services_, Method::kCompress, *context);
  }
  FrameReactor* Plan(grpc::CallbackServerContext* context) override {
    return StartCompressionCall(services_, Method::kPlan, *context);
  }
  FrameReactor* Apply(grpc::CallbackServerContext* context) override {
    return StartCompressionCall(services_, Method::kApply, *context);
  }
  FrameReactor* Calibrate(grpc::CallbackServerContext* context) override {
    return StartCompressionCall(services_, Method::kCalibrate, *context);
  }

 private:
  Services& services_;
};

}  // namespace dynsplit::rpc

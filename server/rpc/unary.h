// SPDX-License-Identifier: Apache-2.0
//
// Unary handlers that answer at once.
#pragma once

#include "absl/status/status.h"
#include "grpcpp/grpcpp.h"
#include "server/rpc/result_adapter.h"

namespace dynsplit::rpc {

inline grpc::ServerUnaryReactor* Reply(grpc::CallbackServerContext* context,
                                       const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(status.ok() ? grpc::Status::OK : ErrorToGrpc(status));
  return reactor;
}

}  // namespace dynsplit::rpc

// SPDX-License-Identifier: Apache-2.0
//
// One Select call: refused at once, or run together with others in flight, on threads that are
// there for selects alone, so that a decode step never waits behind another request's layers.
#pragma once

#include "dynsplit/v1/sessions.pb.h"
#include "grpcpp/grpcpp.h"
#include "server/rpc/services.h"

namespace dynsplit::rpc {

grpc::ServerUnaryReactor* StartSelectCall(Services& services, const v1::SelectRequest& request,
                                          v1::SelectResponse& response,
                                          grpc::CallbackServerContext& context);

}  // namespace dynsplit::rpc

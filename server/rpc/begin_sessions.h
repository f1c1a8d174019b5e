// SPDX-License-Identifier: Apache-2.0
//
// Begin -> RequestSpec with the session it works on: looked up, or reserved.
#pragma once

#include "absl/status/statusor.h"
#include "dynsplit/v1/compression.pb.h"
#include "server/rpc/services.h"
#include "server/runtime/request_spec.h"

namespace dynsplit::rpc {

absl::StatusOr<RequestSpec> BeginRequest(const v1::Begin& begin, Method method, Services& services);

}  // namespace dynsplit::rpc

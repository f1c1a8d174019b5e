// SPDX-License-Identifier: Apache-2.0
//
// Info.Advise between the wire and the domain.
#pragma once

#include "absl/status/status.h"
#include "dynsplit/v1/info.pb.h"
#include "server/rpc/services.h"

namespace dynsplit::rpc {

// INVALID_ARGUMENT and UNIMPLEMENTED name the request's field.
absl::Status AdviseFromProto(const v1::AdviseRequest& request, const Services& services,
                             v1::AdviseResponse& response);

}  // namespace dynsplit::rpc

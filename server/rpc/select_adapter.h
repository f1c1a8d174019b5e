// SPDX-License-Identifier: Apache-2.0
//
// Select between the wire and the domain.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "dynsplit/v1/sessions.pb.h"
#include "server/runtime/select_spec.h"

namespace dynsplit::rpc {

inline constexpr int kMaxSequences = 1024;
inline constexpr int32_t kMaxStepQueries = 64;

// Everything that can be refused without the sessions. Results view the request's query data.
absl::StatusOr<std::vector<StepSpec>> StepsFromProto(const v1::SelectRequest& request);

// All but the seconds.
void SelectToProto(const SelectResult& result, v1::SelectResponse& response);

}  // namespace dynsplit::rpc

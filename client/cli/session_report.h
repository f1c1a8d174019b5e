// SPDX-License-Identifier: Apache-2.0
//
// What a session is and what its steps did, for people and for scripts.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "client/cli/decode_steps.h"
#include "dynsplit/v1/types.pb.h"

namespace dynsplit::cli {

// Id, policy, blocks, memory, lease.
std::string DescribeSession(const v1::SessionInfo& session);
// A table of the layers, then time and reuse.
std::string DescribeSteps(const StepsReport& steps);
// The same; with `with_tokens` also the tokens of the last step, [layers][groups][n].
nlohmann::json JsonSteps(const StepsReport& steps, bool with_tokens);

}  // namespace dynsplit::cli

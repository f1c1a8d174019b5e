// SPDX-License-Identifier: Apache-2.0
//
// Begin -> RequestSpec: everything that can be refused before the first byte of a tensor.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "dynsplit/v1/compression.pb.h"
#include "server/runtime/profiles.h"
#include "server/runtime/request_spec.h"

namespace dynsplit::rpc {

inline constexpr int32_t kMinChunkBytes = 4096;
inline constexpr int32_t kMaxChunkBytes = 3 << 20;

struct BeginLimits {
  int64_t max_total_tensors = 16384;
};

// Field paths in errors are relative to Begin. `fallback_request_id` names requests that do not
// name themselves.
absl::StatusOr<RequestSpec> SpecFromBegin(const v1::Begin& begin, Method method,
                                          const ProfileStore& profiles, const BeginLimits& limits,
                                          const std::string& fallback_request_id);

// "Compress", "Plan", ...
const char* MethodName(Method method);

}  // namespace dynsplit::rpc

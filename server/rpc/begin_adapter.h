// SPDX-License-Identifier: Apache-2.0
//
// Begin -> RequestSpec: everything that can be refused before the first byte of a tensor.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "dynsplit/v1/compression.pb.h"
#include "server/runtime/profiles.h"
#include "server/runtime/regions.h"
#include "server/runtime/request_spec.h"

namespace dynsplit::rpc {

inline constexpr int32_t kMinChunkBytes = 4096;
inline constexpr int32_t kMaxChunkBytes = 3 << 20;

// The session that Append and Fetch work on.
struct TargetSession {
  ResidentSpec spec;  // shape: as it is now
  Segmentation segmentation;
};

// What a Begin is read against. References outlive the call.
struct BeginContext {
  const ProfileStore& profiles;
  const RegionStore& regions;
  const TargetSession* target = nullptr;  // kAppend and kFetch only
  int64_t max_total_tensors = 16384;
  std::string fallback_request_id;  // names requests that do not name themselves
};

// Field paths in errors are relative to Begin. Sessions are neither made nor looked up.
absl::StatusOr<RequestSpec> SpecFromBegin(const v1::Begin& begin, Method method,
                                          const BeginContext& context);

// What the begin of a later shard says.
struct ShardNames {
  std::string request_id;
  std::string tenant;
};
absl::StatusOr<ShardNames> LaterShardFromBegin(const v1::Begin& begin);

// "Compress", "Plan", ...
const char* MethodName(Method method);

}  // namespace dynsplit::rpc

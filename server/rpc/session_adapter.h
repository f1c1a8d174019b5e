// SPDX-License-Identifier: Apache-2.0
//
// Sessions between the wire and the domain.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "dynsplit/v1/compression.pb.h"
#include "server/runtime/request_spec.h"

namespace dynsplit::rpc {

inline constexpr int32_t kMaxLeaseSeconds = 86400;

// Which of begin's session fields the method takes, and must have. Paths relative to Begin.
absl::Status CheckSessionFields(const v1::Begin& begin, Method method);

// A lease in seconds; 0 = `otherwise`.
absl::StatusOr<absl::Duration> LeaseFromProto(int32_t seconds, absl::Duration otherwise,
                                              const std::string& field);
// Tenants as requests name them: the default where empty.
absl::StatusOr<std::string> TenantFromProto(const std::string& tenant, const std::string& field);

// Policy and settings of a session of this shape; supplied types and profile are left open.
// `field` is the path of `policy`.
absl::StatusOr<SessionOpening> OpeningFromProto(const v1::SessionOptions& options,
                                                const v1::Policy& policy, const std::string& field,
                                                const SequenceShape& shape,
                                                const std::optional<Rope>& rope,
                                                const std::string& tenant);
// Completes what follows from the types of K and V.
void SetTypes(const v1::SessionOptions& options, DType key_dtype, DType value_dtype,
              ResidentSpec& resident);

// begin.target's layers and resume, policy and rope. Requires: spec's shape, rope and policy are
// the session's.
absl::Status DecodeFetch(const v1::Begin& begin, RequestSpec& spec);

// `num_blocks` of the index may be those expected.
v1::SessionBytes BytesToProto(const ResidentLayout& layout, Residence residence);
v1::SessionInfo SessionToProto(const SessionSnapshot& snapshot, const std::string& endpoint);

}  // namespace dynsplit::rpc

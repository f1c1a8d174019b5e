// SPDX-License-Identifier: Apache-2.0
//
// Policy, shape and rope between the wire and the domain. Checks what the types cannot hold
// (unknown enums, choices this server lacks); ranges are ValidatePolicy's.
#pragma once

#include <optional>

#include "absl/status/statusor.h"
#include "dynsplit/v1/types.pb.h"
#include "server/pipeline/plan.h"
#include "server/pipeline/policy.h"
#include "server/pipeline/types.h"

namespace dynsplit::rpc {

// The preset's row with every present choice replaced. A choice whose method changes starts from
// the method's own defaults. `field` is the path of `policy` in the request ("policy").
absl::StatusOr<Policy> PolicyFromProto(const v1::Policy& policy, const std::string& field);
// Every choice present.
v1::Policy PolicyToProto(const Policy& policy);

SequenceShape ShapeFromProto(const v1::SequenceShape& shape);
v1::SequenceShape ShapeToProto(const SequenceShape& shape);

// Requires: the shape is valid.
absl::StatusOr<Rope> RopeFromProto(const v1::Rope& rope, int32_t head_dim);

absl::StatusOr<Evidence> EvidenceFromProto(v1::Evidence evidence, const std::string& field);
v1::Evidence EvidenceToProto(Evidence evidence);

}  // namespace dynsplit::rpc

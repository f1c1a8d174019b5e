// SPDX-License-Identifier: Apache-2.0
//
// Errors with machine-readable details. Stages attach details as absl::Status payloads; the RPC
// layer turns them into google.rpc details. Messages always say field, value and limit.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace dynsplit {

// INVALID_ARGUMENT about one field. `field` is the proto path ("shape.num_tokens"), `problem` one
// sentence with the value and the limit ("is 0; must be in [1, 2147483647]").
absl::Status InvalidField(std::string_view field, std::string_view problem);

// FAILED_PRECONDITION; type is EVIDENCE_MISSING or QUALITY_FLOOR or PLAN_MISMATCH, subject what it
// is about.
absl::Status PreconditionFailed(std::string_view type, std::string_view subject,
                                std::string_view problem);

// NOT_FOUND of a named thing ("preset", "snapkw").
absl::Status NotFound(std::string_view resource_type, std::string_view name);

// ALREADY_EXISTS of a named thing.
absl::Status AlreadyExists(std::string_view resource_type, std::string_view name,
                           std::string_view problem);

// RESOURCE_EXHAUSTED or UNAVAILABLE that is worth another try after the delay.
absl::Status RetryLater(absl::StatusCode code, std::string_view problem, int64_t retry_after_ms);

// Reason-coded errors (DATA_LOSS, UNIMPLEMENTED, INTERNAL): reason is UPPER_SNAKE.
absl::Status WithReason(absl::StatusCode code, std::string_view reason, std::string_view problem);

// What the functions above attached; absent parts are empty.
struct ErrorDetails {
  std::string kind;     // "field", "precondition", "resource", "reason" or ""
  std::string type;     // precondition type, resource type or reason
  std::string subject;  // field path, precondition subject or resource name
  std::string problem;
  std::optional<int64_t> retry_after_ms;
};
ErrorDetails GetErrorDetails(const absl::Status& status);

}  // namespace dynsplit

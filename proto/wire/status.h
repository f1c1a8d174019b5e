// SPDX-License-Identifier: Apache-2.0
//
// Errors with google.rpc details, in both directions: the server fills a RichError and sends it, a
// client reads it back. In an absl::Status the same details travel as payloads, one a type, under
// the type URLs that google.protobuf.Any would use.
#pragma once

#include <grpcpp/support/status.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace dynsplit::wire {

// ErrorInfo.domain of every error this project makes.
inline constexpr std::string_view kErrorDomain = "dynsplit.v1";
// ErrorInfo.reason of a checksum mismatch.
inline constexpr std::string_view kChecksumMismatch = "CHECKSUM_MISMATCH";

struct RichError {
  struct FieldViolation {
    std::string field;  // proto path: "begin.shape.num_tokens"
    std::string description;
    bool operator==(const FieldViolation&) const = default;
  };
  struct PreconditionViolation {
    std::string type;  // EVIDENCE_MISSING, QUALITY_FLOOR, PLAN_MISMATCH
    std::string subject;
    std::string description;
    bool operator==(const PreconditionViolation&) const = default;
  };
  struct QuotaViolation {
    std::string subject;
    std::string description;
    bool operator==(const QuotaViolation&) const = default;
  };

  absl::StatusCode code = absl::StatusCode::kOk;
  std::string message;
  // Each is sent only where it is not empty.
  std::vector<FieldViolation> fields;                // BadRequest
  std::vector<PreconditionViolation> preconditions;  // PreconditionFailure
  std::vector<QuotaViolation> quotas;                // QuotaFailure
  std::string resource_type, resource_name;          // ResourceInfo
  std::string reason;                                // ErrorInfo; domain is kErrorDomain
  std::map<std::string, std::string> metadata;       // ErrorInfo; needs a reason
  std::optional<int64_t> retry_after_ms;             // RetryInfo

  bool operator==(const RichError&) const = default;
};

// DATA_LOSS about `what` of a tensor, beginning at `offset`.
absl::Status ChecksumMismatch(uint32_t tensor, uint64_t offset, std::string_view what,
                              uint32_t expected, uint32_t computed);

// The same error in the other form. Trailing metadata is limited to 8 KiB: in a grpc::Status long
// texts are cut and at most 16 violations of a kind sent.
grpc::Status ToGrpc(const RichError& error);
grpc::Status ToGrpc(const absl::Status& status);
absl::Status ToAbsl(const RichError& error);
absl::Status ToAbsl(const grpc::Status& status);

// Whatever details can be read; those that cannot are left out.
RichError ReadError(const grpc::Status& status);
RichError ReadError(const absl::Status& status);

}  // namespace dynsplit::wire

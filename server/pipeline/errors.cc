// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/errors.h"

#include "absl/strings/cord.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace dynsplit {
namespace {

// One payload a part, so that the details survive wrapping by other stages.
constexpr std::string_view kKindUrl = "dynsplit.dev/error/kind";
constexpr std::string_view kTypeUrl = "dynsplit.dev/error/type";
constexpr std::string_view kSubjectUrl = "dynsplit.dev/error/subject";
constexpr std::string_view kProblemUrl = "dynsplit.dev/error/problem";
constexpr std::string_view kRetryAfterUrl = "dynsplit.dev/error/retry_after_ms";

constexpr size_t kMaxQuotedName = 128;

// Debian's Abseil has a string_view of its own.
absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

void Attach(absl::Status& status, std::string_view url, std::string_view value) {
  if (!value.empty()) status.SetPayload(View(url), absl::Cord(View(value)));
}

absl::Status WithDetails(absl::Status status, std::string_view kind, std::string_view type,
                         std::string_view subject, std::string_view problem) {
  Attach(status, kKindUrl, kind);
  Attach(status, kTypeUrl, type);
  Attach(status, kSubjectUrl, subject);
  Attach(status, kProblemUrl, problem);
  return status;
}

absl::Status AboutResource(absl::StatusCode code, std::string_view resource_type,
                           std::string_view name, std::string_view problem) {
  // The name is the caller's: escaped and cut so that it cannot flood or forge a log line.
  const std::string quoted = absl::CEscape(View(name.substr(0, kMaxQuotedName)));
  return WithDetails(
      absl::Status(code, absl::StrCat(View(resource_type), " \"", quoted, "\" ", View(problem))),
      "resource", resource_type, quoted, problem);
}

std::string Payload(const absl::Status& status, std::string_view url) {
  const auto payload = status.GetPayload(View(url));
  return payload.has_value() ? std::string(*payload) : std::string();
}

}  // namespace

absl::Status InvalidField(std::string_view field, std::string_view problem) {
  return WithDetails(absl::InvalidArgumentError(absl::StrCat(View(field), " ", View(problem))),
                     "field", "", field, problem);
}

absl::Status PreconditionFailed(std::string_view type, std::string_view subject,
                                std::string_view problem) {
  return WithDetails(absl::FailedPreconditionError(
                         absl::StrCat(View(type), ": ", View(subject), " ", View(problem))),
                     "precondition", type, subject, problem);
}

absl::Status NotFound(std::string_view resource_type, std::string_view name) {
  return AboutResource(absl::StatusCode::kNotFound, resource_type, name, "is unknown");
}

absl::Status AlreadyExists(std::string_view resource_type, std::string_view name,
                           std::string_view problem) {
  return AboutResource(absl::StatusCode::kAlreadyExists, resource_type, name, problem);
}

absl::Status RetryLater(absl::StatusCode code, std::string_view problem, int64_t retry_after_ms) {
  absl::Status status = WithDetails(absl::Status(code, View(problem)), "", "", "", problem);
  Attach(status, kRetryAfterUrl, std::to_string(retry_after_ms));
  return status;
}

absl::Status WithReason(absl::StatusCode code, std::string_view reason, std::string_view problem) {
  return WithDetails(absl::Status(code, View(problem)), "reason", reason, "", problem);
}

ErrorDetails GetErrorDetails(const absl::Status& status) {
  ErrorDetails details;
  details.kind = Payload(status, kKindUrl);
  details.type = Payload(status, kTypeUrl);
  details.subject = Payload(status, kSubjectUrl);
  details.problem = Payload(status, kProblemUrl);
  int64_t retry_after_ms = 0;
  if (absl::SimpleAtoi(Payload(status, kRetryAfterUrl), &retry_after_ms)) {
    details.retry_after_ms = retry_after_ms;
  }
  return details;
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/errors.h"

#include <gtest/gtest.h>

namespace dynsplit {
namespace {

TEST(ErrorsTest, InvalidFieldSaysFieldAndProblem) {
  const absl::Status status = InvalidField("shape.num_tokens", "is 0; must be in [1, 7]");
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "shape.num_tokens is 0; must be in [1, 7]");
  const ErrorDetails details = GetErrorDetails(status);
  EXPECT_EQ(details.kind, "field");
  EXPECT_EQ(details.type, "");
  EXPECT_EQ(details.subject, "shape.num_tokens");
  EXPECT_EQ(details.problem, "is 0; must be in [1, 7]");
  EXPECT_FALSE(details.retry_after_ms.has_value());
}

TEST(ErrorsTest, PreconditionCarriesTypeAndSubject) {
  const absl::Status status =
      PreconditionFailed("QUALITY_FLOOR", "policy.quality_floor", "is out of reach");
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  const ErrorDetails details = GetErrorDetails(status);
  EXPECT_EQ(details.kind, "precondition");
  EXPECT_EQ(details.type, "QUALITY_FLOOR");
  EXPECT_EQ(details.subject, "policy.quality_floor");
  EXPECT_EQ(details.problem, "is out of reach");
}

TEST(ErrorsTest, NotFoundCannotForgeALogLine) {
  const absl::Status status = NotFound("preset", "a\n\"b" + std::string(1000, 'x'));
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  const std::string message(status.message());
  EXPECT_EQ(message.find('\n'), std::string::npos);
  EXPECT_LT(message.size(), 200u);
  const ErrorDetails details = GetErrorDetails(status);
  EXPECT_EQ(details.kind, "resource");
  EXPECT_EQ(details.type, "preset");
  EXPECT_EQ(details.subject.substr(0, 7), "a\\n\\\"bx");
}

TEST(ErrorsTest, RetryAndReason) {
  const absl::Status busy = RetryLater(absl::StatusCode::kResourceExhausted, "queue full", 250);
  EXPECT_EQ(busy.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(GetErrorDetails(busy).kind, "");
  EXPECT_EQ(GetErrorDetails(busy).problem, "queue full");
  EXPECT_EQ(GetErrorDetails(busy).retry_after_ms, 250);

  const absl::Status lost = WithReason(absl::StatusCode::kDataLoss, "CHUNK_CRC", "chunk 7 differs");
  EXPECT_EQ(lost.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(GetErrorDetails(lost).kind, "reason");
  EXPECT_EQ(GetErrorDetails(lost).type, "CHUNK_CRC");
}

TEST(ErrorsTest, ForeignStatusHasNoDetails) {
  const ErrorDetails details = GetErrorDetails(absl::InternalError("x"));
  EXPECT_EQ(details.kind + details.type + details.subject + details.problem, "");
  EXPECT_FALSE(details.retry_after_ms.has_value());
}

}  // namespace
}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "proto/wire/status.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "proto/wire/channel.h"

namespace dynsplit::wire {
namespace {

RichError FullError() {
  RichError error;
  error.code = absl::StatusCode::kInvalidArgument;
  error.message = "begin.shape.num_tokens is 0; must be in [1, 2147483647]";
  error.fields = {{"begin.shape.num_tokens", "is 0"}, {"begin.tenant", "is too long"}};
  error.preconditions = {{"EVIDENCE_MISSING", "QUERIES", "scoring needs window queries"}};
  error.quotas = {{"tenant:default", "4 requests in flight"}};
  error.resource_type = "preset";
  error.resource_name = "snapkw";
  error.reason = "SOME_REASON";
  error.metadata = {{"a", "1"}, {"b", "2"}};
  error.retry_after_ms = 1250;
  return error;
}

TEST(StatusTest, GrpcRoundTrip) {
  const grpc::Status status = ToGrpc(FullError());
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(status.error_message(), FullError().message);
  EXPECT_EQ(ReadError(status), FullError());
}

TEST(StatusTest, AbslRoundTrip) { EXPECT_EQ(ReadError(ToAbsl(FullError())), FullError()); }

TEST(StatusTest, AbslAndGrpcInTurn) {
  EXPECT_EQ(ReadError(ToAbsl(ToGrpc(ToAbsl(FullError())))), FullError());
}

TEST(StatusTest, OkHasNoDetails) {
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
  EXPECT_TRUE(ToAbsl(grpc::Status::OK).ok());
}

TEST(StatusTest, PlainStatusKeepsCodeAndMessage) {
  const absl::Status status =
      ToAbsl(grpc::Status(grpc::StatusCode::DEADLINE_EXCEEDED, "Deadline Exceeded"));
  EXPECT_EQ(status, absl::DeadlineExceededError("Deadline Exceeded"));
}

// What a client in another language sees.
TEST(StatusTest, DetailsAreStandardMessages) {
  google::rpc::Status rich;
  ASSERT_TRUE(rich.ParseFromString(ToGrpc(FullError()).error_details()));
  EXPECT_EQ(rich.code(), 3);
  ASSERT_EQ(rich.details_size(), 6);
  google::rpc::RetryInfo retry;
  bool found = false;
  for (const auto& detail : rich.details()) found |= detail.UnpackTo(&retry);
  ASSERT_TRUE(found);
  EXPECT_EQ(retry.retry_delay().seconds(), 1);
  EXPECT_EQ(retry.retry_delay().nanos(), 250'000'000);
}

TEST(StatusTest, RubbishDetailsAreLeftOut) {
  const grpc::Status status(grpc::StatusCode::INTERNAL, "no", "\xFF\xFF rubbish");
  const RichError error = ReadError(status);
  EXPECT_EQ(error.code, absl::StatusCode::kInternal);
  EXPECT_EQ(error.message, "no");
  EXPECT_TRUE(error.fields.empty());
}

TEST(StatusTest, HugeErrorsFitIntoTrailingMetadata) {
  RichError error = FullError();
  error.message = std::string(100'000, 'm');
  for (int i = 0; i < 1000; ++i) {
    error.fields.push_back({std::string(5000, 'f'), "\xC3\xA9" + std::string(5000, 'd')});
  }
  const grpc::Status status = ToGrpc(error);
  // Both travel in one 8 KiB block of metadata, the message twice and the details in base64 at
  // worst.
  EXPECT_LT(status.error_message().size() + status.error_details().size() * 4 / 3, 8000u);
  EXPECT_EQ(ReadError(status).reason, "SOME_REASON");
}

TEST(StatusTest, CutsBetweenCharacters) {
  RichError error;
  error.code = absl::StatusCode::kInternal;
  for (int i = 0; i < 1000; ++i) error.message += "\xE2\x82\xAC";
  const std::string message = ToGrpc(error).error_message();
  EXPECT_LE(message.size(), 1024u);
  EXPECT_EQ(message.size() % 3, 0u);
}

TEST(ChannelTest, LocalityOfTargets) {
  for (const char* target :
       {"unix:/run/d.sock", "unix:///run/d.sock", "unix-abstract:d", "localhost:7070", "localhost",
        "127.0.0.1:7070", "[::1]:7070", "dns:///localhost:1", "ipv4:127.0.0.1:1", "ipv6:[::1]:1"}) {
    EXPECT_EQ(LocalityOf(target), Locality::kSameHost) << target;
  }
  for (const char* target : {"10.0.0.1:7070", "example.com:1", "dns:///localhost.example.com:1",
                             "0.0.0.0:7070", "[::]:7070", "", "localhosts:1"}) {
    EXPECT_EQ(LocalityOf(target), Locality::kRemote) << target;
  }
}

}  // namespace
}  // namespace dynsplit::wire

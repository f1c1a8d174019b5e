// SPDX-License-Identifier: Apache-2.0
#include "proto/wire/status.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace dynsplit::wire {
namespace {

using ::google::protobuf::Any;

constexpr char kTypeUrlPrefix[] = "type.googleapis.com/";
constexpr size_t kMaxMessageBytes = 1024;
constexpr size_t kMaxTextBytes = 256;
constexpr size_t kMaxViolations = 16;
constexpr size_t kMaxDetailsBytes = 3072;

// At most `limit` bytes of text, cut between UTF-8 characters.
std::string Cut(std::string_view text, size_t limit) {
  if (text.size() <= limit) return std::string(text);
  while (limit > 0 && (static_cast<unsigned char>(text[limit]) & 0xC0) == 0x80) --limit;
  return std::string(text.substr(0, limit));
}

template <typename Detail>
void Pack(const Detail& detail, std::vector<Any>& details) {
  Any& any = details.emplace_back();
  any.set_type_url(kTypeUrlPrefix + Detail::descriptor()->full_name());
  detail.SerializeToString(any.mutable_value());
}

std::vector<Any> PackDetails(const RichError& error) {
  std::vector<Any> details;
  if (!error.reason.empty()) {
    google::rpc::ErrorInfo info;
    info.set_reason(error.reason);
    info.set_domain(std::string(kErrorDomain));
    info.mutable_metadata()->insert(error.metadata.begin(), error.metadata.end());
    Pack(info, details);
  }
  if (error.retry_after_ms.has_value()) {
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(*error.retry_after_ms / 1000);
    retry.mutable_retry_delay()->set_nanos(
        static_cast<int32_t>(*error.retry_after_ms % 1000 * 1'000'000));
    Pack(retry, details);
  }
  if (!error.resource_type.empty() || !error.resource_name.empty()) {
    google::rpc::ResourceInfo resource;
    resource.set_resource_type(error.resource_type);
    resource.set_resource_name(error.resource_name);
    Pack(resource, details);
  }
  if (!error.fields.empty()) {
    google::rpc::BadRequest request;
    for (const auto& violation : error.fields) {
      auto* packed = request.add_field_violations();
      packed->set_field(violation.field);
      packed->set_description(violation.description);
    }
    Pack(request, details);
  }
  if (!error.preconditions.empty()) {
    google::rpc::PreconditionFailure failure;
    for (const auto& violation : error.preconditions) {
      auto* packed = failure.add_violations();
      packed->set_type(violation.type);
      packed->set_subject(violation.subject);
      packed->set_description(violation.description);
    }
    Pack(failure, details);
  }
  if (!error.quotas.empty()) {
    google::rpc::QuotaFailure failure;
    for (const auto& violation : error.quotas) {
      auto* packed = failure.add_violations();
      packed->set_subject(violation.subject);
      packed->set_description(violation.description);
    }
    Pack(failure, details);
  }
  return details;
}

// Parses `value` where `url` names Detail.
template <typename Detail>
bool Unpack(std::string_view url, const std::string& value, Detail& detail) {
  if (url != kTypeUrlPrefix + Detail::descriptor()->full_name()) return false;
  return detail.ParseFromString(value);
}

// Milliseconds, rounded up so that nobody comes back too early.
int64_t ToMilliseconds(const google::protobuf::Duration& delay) {
  constexpr int64_t kMaxSeconds = 315'576'000'000;  // as Duration has it
  const int64_t seconds = std::clamp(int64_t{delay.seconds()}, int64_t{0}, kMaxSeconds);
  const int64_t nanos = std::clamp(int64_t{delay.nanos()}, int64_t{0}, int64_t{999'999'999});
  return seconds * 1000 + (nanos + 999'999) / 1'000'000;
}

void UnpackDetail(std::string_view url, const std::string& value, RichError& error) {
  google::rpc::ErrorInfo info;
  google::rpc::RetryInfo retry;
  google::rpc::ResourceInfo resource;
  google::rpc::BadRequest request;
  google::rpc::PreconditionFailure precondition;
  google::rpc::QuotaFailure quota;
  if (Unpack(url, value, info)) {
    error.reason = info.reason();
    error.metadata.insert(info.metadata().begin(), info.metadata().end());
  } else if (Unpack(url, value, retry)) {
    error.retry_after_ms = ToMilliseconds(retry.retry_delay());
  } else if (Unpack(url, value, resource)) {
    error.resource_type = resource.resource_type();
    error.resource_name = resource.resource_name();
  } else if (Unpack(url, value, request)) {
    for (const auto& violation : request.field_violations()) {
      error.fields.push_back({violation.field(), violation.description()});
    }
  } else if (Unpack(url, value, precondition)) {
    for (const auto& violation : precondition.violations()) {
      error.preconditions.push_back(
          {violation.type(), violation.subject(), violation.description()});
    }
  } else if (Unpack(url, value, quota)) {
    for (const auto& violation : quota.violations()) {
      error.quotas.push_back({violation.subject(), violation.description()});
    }
  }
}

// The error cut to what trailing metadata can carry.
RichError Shortened(RichError error) {
  error.message = Cut(error.message, kMaxMessageBytes);
  error.fields.resize(std::min(error.fields.size(), kMaxViolations));
  error.preconditions.resize(std::min(error.preconditions.size(), kMaxViolations));
  error.quotas.resize(std::min(error.quotas.size(), kMaxViolations));
  for (auto& violation : error.fields) {
    violation.field = Cut(violation.field, kMaxTextBytes);
    violation.description = Cut(violation.description, kMaxTextBytes);
  }
  for (auto& violation : error.preconditions) {
    violation.subject = Cut(violation.subject, kMaxTextBytes);
    violation.description = Cut(violation.description, kMaxTextBytes);
  }
  for (auto& violation : error.quotas) {
    violation.subject = Cut(violation.subject, kMaxTextBytes);
    violation.description = Cut(violation.description, kMaxTextBytes);
  }
  error.resource_name = Cut(error.resource_name, kMaxTextBytes);
  return error;
}

}  // namespace

absl::Status ChecksumMismatch(uint32_t tensor, uint64_t offset, std::string_view what,
                              uint32_t expected, uint32_t computed) {
  RichError error;
  error.code = absl::StatusCode::kDataLoss;
  error.message = absl::StrFormat("%s, tensor %u, offset %u: CRC32C is %08x, computed %08x", what,
                                  tensor, offset, expected, computed);
  error.reason = std::string(kChecksumMismatch);
  error.metadata = {{"tensor", absl::StrCat(tensor)}, {"offset", absl::StrCat(offset)}};
  return ToAbsl(error);
}

grpc::Status ToGrpc(const RichError& error) {
  if (error.code == absl::StatusCode::kOk) return grpc::Status::OK;
  const RichError shortened = Shortened(error);
  google::rpc::Status rich;
  rich.set_code(static_cast<int32_t>(shortened.code));
  rich.set_message(shortened.message);
  size_t size = 0;
  for (Any& detail : PackDetails(shortened)) {
    size += detail.ByteSizeLong();
    if (size > kMaxDetailsBytes) break;
    rich.add_details()->Swap(&detail);
  }
  return grpc::Status(static_cast<grpc::StatusCode>(shortened.code), shortened.message,
                      rich.SerializeAsString());
}

grpc::Status ToGrpc(const absl::Status& status) { return ToGrpc(ReadError(status)); }

absl::Status ToAbsl(const RichError& error) {
  absl::Status status(error.code, error.message);
  for (const Any& detail : PackDetails(error)) {
    status.SetPayload(detail.type_url(), absl::Cord(detail.value()));
  }
  return status;
}

absl::Status ToAbsl(const grpc::Status& status) { return ToAbsl(ReadError(status)); }

RichError ReadError(const grpc::Status& status) {
  RichError error;
  error.code = static_cast<absl::StatusCode>(status.error_code());
  if (status.ok()) return error;
  error.message = status.error_message();
  google::rpc::Status rich;
  if (!rich.ParseFromString(status.error_details())) return error;
  for (const Any& detail : rich.details()) UnpackDetail(detail.type_url(), detail.value(), error);
  return error;
}

RichError ReadError(const absl::Status& status) {
  RichError error;
  error.code = status.code();
  error.message = std::string(status.message());
  status.ForEachPayload([&error](absl::string_view url, const absl::Cord& value) {
    UnpackDetail(std::string_view(url.data(), url.size()), std::string(value), error);
  });
  return error;
}

}  // namespace dynsplit::wire

// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/advise_adapter.h"

#include <cmath>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/segmentation.h"
#include "server/rpc/policy_adapter.h"
#include "server/rpc/session_adapter.h"
#include "server/rpc/tensor_adapter.h"
#include "server/runtime/advice.h"

namespace dynsplit::rpc {
namespace {

absl::Status CheckNotNegative(const char* field, double value) {
  if (std::isfinite(value) && value >= 0) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("is ", value, "; must be finite and not negative"));
}

absl::StatusOr<DType> TypeOf(const v1::AdviseRequest& request) {
  if (request.dtype() == v1::DTYPE_UNSPECIFIED) return DType::kBFloat16;
  absl::StatusOr<DType> dtype = DTypeFromProto(request.dtype(), "dtype");
  if (dtype.ok() && *dtype == DType::kInt32) {
    return InvalidField("dtype", "is int32; K and V are not");
  }
  return dtype;
}

// What a session of that shape will weigh.
absl::Status AdviseSession(const v1::AdviseRequest& request, const SequenceShape& shape,
                           DType dtype, v1::AdviseResponse& response) {
  absl::StatusOr<SessionOpening> opening =
      OpeningFromProto(request.session(), request.session_policy(), "session_policy", shape,
                       std::nullopt, /*tenant=*/"");
  if (!opening.ok()) return opening.status();
  ResidentSpec& resident = opening->resident;
  SetTypes(request.session(), dtype, dtype, resident);
  const Residence residence = opening->settings.placement == SessionSettings::Placement::kHost
                                  ? Residence::kHost
                                  : Residence::kDevice;
  *response.mutable_policy() = PolicyToProto(resident.policy);
  *response.mutable_session_bytes() = BytesToProto(PredictResident(resident), residence);
  response.set_reason("a session drops nothing; these are the bytes that it will hold");
  return absl::OkStatus();
}

absl::StatusOr<AdviceRequest> RequestFromProto(const v1::AdviseRequest& wire,
                                               const SequenceShape& shape, DType dtype) {
  AdviceRequest request;
  request.shape = shape;
  request.dtype = dtype;
  request.link_bytes_per_second = wire.link_bytes_per_second();
  if (!(std::isfinite(request.link_bytes_per_second) && request.link_bytes_per_second > 0)) {
    return InvalidField("link_bytes_per_second", absl::StrCat("is ", request.link_bytes_per_second,
                                                              "; must be finite and > 0"));
  }
  request.goal_seconds = wire.time_to_first_token_seconds();
  absl::Status status = CheckNotNegative("time_to_first_token_seconds", request.goal_seconds);
  if (!status.ok()) return status;
  for (int i = 0; i < wire.evidence_size(); ++i) {
    const absl::StatusOr<Evidence> evidence =
        EvidenceFromProto(wire.evidence(i), absl::StrCat("evidence[", i, "]"));
    if (!evidence.ok()) return evidence.status();
    request.evidence.push_back(*evidence);
  }
  const double mass = wire.min_retained_attention_mass();
  if (!(mass >= 0 && mass <= 1)) {
    return InvalidField("min_retained_attention_mass",
                        absl::StrCat("is ", mass, "; must be in [0, 1]"));
  }
  if (mass > 0) request.min_mass = mass;
  request.max_divergence = wire.max_expected_divergence();
  status = CheckNotNegative("max_expected_divergence", request.max_divergence);
  if (!status.ok()) return status;
  return request;
}

void AdviceToProto(const Advice& advice, v1::AdviseResponse& response) {
  response.set_compress(advice.compress);
  if (advice.compress) *response.mutable_policy() = PolicyToProto(advice.policy);
  response.set_plain_seconds(advice.plain_seconds);
  response.set_compressed_seconds(advice.compressed_seconds);
  response.set_break_even_bytes_per_second(advice.break_even_bytes_per_second);
  response.set_reason(advice.reason);
  response.set_expected_retained_attention_mass(advice.expected.mass);
  response.set_expected_output_relative_error(advice.expected.error);
  response.set_expected_divergence(advice.expected.divergence);
  response.set_num_receipts(advice.num_receipts);
  response.set_num_timed_requests(advice.num_timed);
}

}  // namespace

absl::Status AdviseFromProto(const v1::AdviseRequest& request, const Services& services,
                             v1::AdviseResponse& response) {
  const SequenceShape shape = ShapeFromProto(request.shape());
  if (absl::Status status = ValidateShape(shape); !status.ok()) return status;
  const absl::StatusOr<DType> dtype = TypeOf(request);
  if (!dtype.ok()) return dtype.status();
  if (request.has_session()) return AdviseSession(request, shape, *dtype, response);
  const absl::StatusOr<AdviceRequest> wanted = RequestFromProto(request, shape, *dtype);
  if (!wanted.ok()) return wanted.status();
  Advice advice =
      Advise(*wanted, QualityTable::Builtin(), services.experience, services.backend().name);
  SegmentationPolicy& segmentation = advice.policy.segmentation;
  if (ReadsTokenIds(segmentation)) segmentation.profile = services.profiles.default_name();
  AdviceToProto(advice, response);
  return absl::OkStatus();
}

}  // namespace dynsplit::rpc

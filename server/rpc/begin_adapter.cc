// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/begin_adapter.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/rpc/begin_tensors.h"
#include "server/rpc/policy_adapter.h"
#include "server/rpc/session_adapter.h"
#include "server/rpc/shard_table.h"
#include "server/rpc/tensor_adapter.h"

namespace dynsplit::rpc {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;
constexpr int kHashDigits = 32;

absl::Status CheckRange(const std::string& field, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("is ", value, "; must be in [", low, ", ", high, "]"));
}

absl::Status CheckText(const std::string& field, const std::string& text, size_t most) {
  const bool printable =
      std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
  if (text.size() <= most && printable) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("has ", text.size(), " bytes; must be at most ", most,
                                          " printable ASCII characters"));
}

absl::Status DecodeNames(const v1::Begin& begin, const std::string& fallback_request_id,
                         RequestSpec& spec) {
  absl::Status status = CheckText("request_id", begin.request_id(), kMaxRequestIdBytes);
  if (!status.ok()) return status;
  spec.request_id = begin.request_id().empty() ? fallback_request_id : begin.request_id();
  absl::StatusOr<std::string> tenant = TenantFromProto(begin.tenant(), "tenant");
  if (!tenant.ok()) return tenant.status();
  spec.tenant = *std::move(tenant);
  return absl::OkStatus();
}

absl::Status CheckShards(const v1::Begin& begin) {
  const int32_t num_shards = begin.num_shards() == 0 ? 1 : begin.num_shards();
  absl::Status status = CheckRange("num_shards", num_shards, 1, kMaxShards);
  if (status.ok()) status = CheckRange("shard_index", begin.shard_index(), 0, num_shards - 1);
  if (!status.ok() || num_shards == 1 || !begin.request_id().empty()) return status;
  return InvalidField("request_id", "is missing; the shards of a request are joined by it");
}

absl::Status DecodeNumbers(const v1::Begin& begin, RequestSpec& spec) {
  const int32_t num_layers = spec.sequence.shape.num_layers;
  spec.max_open_layers =
      begin.max_open_layers() == 0 ? std::min(2, num_layers) : begin.max_open_layers();
  absl::Status status = CheckRange("max_open_layers", spec.max_open_layers, 1, num_layers);
  if (begin.max_chunk_bytes() != 0) spec.max_chunk_bytes = begin.max_chunk_bytes();
  status.Update(
      CheckRange("max_chunk_bytes", spec.max_chunk_bytes, kMinChunkBytes, kMaxChunkBytes));
  spec.num_shards = begin.num_shards() == 0 ? 1 : begin.num_shards();
  status.Update(CheckShards(begin));
  return status;
}

absl::Status CheckCalibration(const RequestSpec& spec, const Tensors& tensors) {
  const CalibrationOptions& options = spec.calibration;
  absl::Status status =
      CheckRange("calibration.num_future_queries", options.num_future_queries, 1, 64);
  status.Update(CheckRange("calibration.overlap_size", options.overlap_size, 1, 65536));
  status.Update(CheckRange("calibration.min_occurrences", options.min_occurrences, 1, INT32_MAX));
  status.Update(CheckRange("calibration.max_occurrences", options.max_occurrences, 1, INT32_MAX));
  if (!(options.alpha >= 0 && options.alpha <= 16)) {
    status.Update(InvalidField("calibration.alpha",
                               absl::StrCat("is ", options.alpha, "; must be in [0, 16]")));
  }
  for (const int32_t id : options.candidates) {
    if (id < 0) {
      status.Update(InvalidField("calibration.candidate_token_ids",
                                 absl::StrCat("has ", id, "; must be >= 0")));
    }
  }
  const int64_t num_queries =
      Find(tensors.layers.front(), TensorKind::kQueries)->tensor.view.num_tokens;
  status.Update(CheckBytes(*Find(tensors.sequence, TensorKind::kQueryPositions), 4 * num_queries));
  return status;
}

void DecodeCalibration(const v1::CalibrationOptions& wire, CalibrationOptions& options) {
  options.candidates.assign(wire.candidate_token_ids().begin(), wire.candidate_token_ids().end());
  if (wire.num_future_queries() != 0) options.num_future_queries = wire.num_future_queries();
  if (wire.overlap_size() != 0) options.overlap_size = wire.overlap_size();
  if (wire.has_alpha()) options.alpha = wire.alpha();
  if (wire.min_occurrences() != 0) options.min_occurrences = wire.min_occurrences();
  if (wire.max_occurrences() != 0) options.max_occurrences = wire.max_occurrences();
}

bool IsHash(const std::string& hex) {
  return hex.size() == kHashDigits && std::all_of(hex.begin(), hex.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

// Everything of begin.plan but the bulk, which arrives as tensors.
absl::Status DecodePlan(const v1::Plan& wire, RequestSpec& spec) {
  const SequenceShape& shape = spec.sequence.shape;
  if (ShapeFromProto(wire.shape()) != shape) {
    return InvalidField("plan.shape", "differs from shape");
  }
  if (wire.policy_version() != kPolicyVersion) {
    return PreconditionFailed(
        "PLAN_MISMATCH", "plan.policy_version",
        absl::StrCat("is ", wire.policy_version(), "; this server has ", kPolicyVersion));
  }
  if (!IsHash(wire.hash())) return InvalidField("plan.hash", "must be 32 lower-case hex digits");
  if (wire.layers_size() != shape.num_layers) {
    return InvalidField(
        "plan.layers", absl::StrCat("has ", wire.layers_size(), " entries; must have one a layer, ",
                                    shape.num_layers));
  }
  Plan plan;
  plan.shape = shape;
  plan.policy = spec.sequence.policy;
  plan.fallback_preset = wire.fallback_preset();
  absl::StatusOr<Evidence> evidence = EvidenceFromProto(wire.evidence(), "plan.evidence");
  if (!evidence.ok()) return evidence.status();
  plan.evidence = *evidence;
  for (int i = 0; i < wire.layers_size(); ++i) {
    const v1::LayerPlan& layer = wire.layers(i);
    const std::string field = absl::StrCat("plan.layers[", i, "]");
    absl::Status status = CheckRange(field + ".layer", layer.layer(), i, i);
    status.Update(
        CheckRange(field + ".num_kept_tokens", layer.num_kept_tokens(), 1, shape.num_tokens));
    if (status.ok() && layer.num_groups() != 1 && layer.num_groups() != shape.num_kv_heads) {
      status = InvalidField(
          field + ".num_groups",
          absl::StrCat("is ", layer.num_groups(), "; must be 1 or ", shape.num_kv_heads));
    }
    if (status.ok() && !IsHash(layer.hash())) {
      status = InvalidField(field + ".hash", "must be 32 lower-case hex digits");
    }
    if (!status.ok()) return status;
    plan.layers.push_back({.layer = i,
                           .groups = layer.num_groups(),
                           .num_kept = layer.num_kept_tokens(),
                           .dense = layer.dense(),
                           .raised_by_protection = layer.budget_raised_by_protection(),
                           .raised_by_quality_floor = layer.budget_raised_by_quality_floor(),
                           .kept = {}});
    spec.layer_hashes.push_back(layer.hash());
  }
  spec.plan_hash = wire.hash();
  spec.sequence.fallback_preset = wire.fallback_preset();
  spec.plan = std::move(plan);
  return absl::OkStatus();
}

absl::Status CheckPlanTensors(const RequestSpec& spec, const Tensors& tensors, int64_t num_blocks) {
  for (size_t layer = 0; layer < tensors.layers.size(); ++layer) {
    const LayerPlan& plan = spec.plan->layers[layer];
    absl::Status status = CheckBytes(*Find(tensors.layers[layer], TensorKind::kKeptTokens),
                                     4 * plan.groups * plan.num_kept);
    if (!status.ok()) return status;
  }
  if (num_blocks < 1 || num_blocks > spec.sequence.shape.num_tokens) {
    return InvalidField("plan.num_blocks", absl::StrCat("is ", num_blocks, "; must be in [1, ",
                                                        spec.sequence.shape.num_tokens, "]"));
  }
  return CheckBytes(*Find(tensors.sequence, TensorKind::kBlockStarts), 4 * (num_blocks + 1));
}

void FillSupply(const Tensors& tensors, SequenceSpec& sequence) {
  const Kinds& layer = tensors.layers.front();
  const DecodedTensor* packed = Find(layer, TensorKind::kKeyValue);
  const DecodedTensor* key = packed != nullptr ? packed : Find(layer, TensorKind::kKey);
  const DecodedTensor* value = packed != nullptr ? packed : Find(layer, TensorKind::kValue);
  sequence.supply.keys = key != nullptr;
  sequence.supply.values = value != nullptr;
  if (key != nullptr) sequence.key_dtype = key->tensor.view.dtype;
  if (value != nullptr) sequence.value_dtype = value->tensor.view.dtype;
  if (const DecodedTensor* queries = Find(layer, TensorKind::kQueries); queries != nullptr) {
    sequence.supply.num_window_queries = queries->tensor.view.num_tokens;
  }
  sequence.supply.lse = Find(layer, TensorKind::kLogSumExp) != nullptr;
  if (const DecodedTensor* scores = Find(layer, TensorKind::kAccumulatedScores);
      scores != nullptr) {
    sequence.supply.accumulated_rows =
        static_cast<int32_t>(scores->tensor.byte_size / 4 / sequence.shape.num_tokens);
  }
}

absl::Status CheckWindow(const RequestSpec& spec, const Tensors& tensors) {
  const DecodedTensor* queries = Find(tensors.layers.front(), TensorKind::kQueries);
  if (queries == nullptr || spec.method == Method::kCalibrate) return absl::OkStatus();
  const int64_t most = std::min(kMaxWindowQueries, spec.sequence.shape.num_tokens - 1);
  const int64_t rows = queries->tensor.view.num_tokens;
  if (rows >= 1 && rows <= most) return absl::OkStatus();
  return InvalidField(queries->tensor.field,
                      absl::StrCat("has ", rows, " window queries; must have 1 to ", most));
}

// Delimiters that the segmentation reads. `field` is the path of its policy.
absl::StatusOr<std::shared_ptr<const DelimiterProfile>> ChooseProfile(
    const ProfileStore& profiles, const std::string& field, SegmentationPolicy& segmentation) {
  if (segmentation.profile.empty() && profiles.default_name().empty()) {
    return InvalidField(field + ".segmentation.profile",
                        "is empty, and this server has no default profile; must name the one of "
                        "the request's tokenizer (Info.ListDelimiterProfiles)");
  }
  absl::StatusOr<std::shared_ptr<const DelimiterProfile>> profile =
      profiles.Find(segmentation.profile);
  if (profile.ok()) segmentation.profile = (*profile)->name();
  return profile;
}

// Delimiters that the request's policy, or the calibration, reads.
absl::Status ChooseProfile(const ProfileStore& profiles, RequestSpec& spec) {
  SegmentationPolicy& segmentation = spec.sequence.policy.segmentation;
  if (spec.method != Method::kCalibrate && !ReadsTokenIds(segmentation)) return absl::OkStatus();
  auto profile = ChooseProfile(profiles, "policy", segmentation);
  if (!profile.ok()) return profile.status();
  spec.profile = *std::move(profile);
  return absl::OkStatus();
}

// How the sequence is to rest.
absl::Status ResolveOpening(const v1::Begin& begin, const ProfileStore& profiles,
                            RequestSpec& spec) {
  if (spec.method != Method::kOpen && !begin.has_session()) return absl::OkStatus();
  const std::string field = spec.method == Method::kOpen ? "policy" : "session_policy";
  absl::StatusOr<SessionOpening> opening = OpeningFromProto(
      begin.session(), spec.method == Method::kOpen ? begin.policy() : begin.session_policy(),
      field, spec.sequence.shape, spec.sequence.rope, spec.tenant);
  if (!opening.ok()) return opening.status();
  SegmentationPolicy& segmentation = opening->resident.policy.segmentation;
  if (ReadsTokenIds(segmentation)) {
    auto profile = ChooseProfile(profiles, field, segmentation);
    if (!profile.ok()) return profile.status();
    opening->profile = *std::move(profile);
  }
  if (spec.method == Method::kOpen) spec.sequence.policy = opening->resident.policy;
  spec.opening = *std::move(opening);
  return absl::OkStatus();
}

absl::Status DecodeRope(const v1::Begin& begin, RequestSpec& spec) {
  if (!begin.has_rope()) return absl::OkStatus();
  absl::StatusOr<Rope> rope = RopeFromProto(begin.rope(), spec.sequence.shape.head_dim);
  if (!rope.ok()) return rope.status();
  spec.sequence.rope = *std::move(rope);
  return absl::OkStatus();
}

// Append and Fetch: what the session says.
absl::Status ResolveTarget(const v1::Begin& begin, const TargetSession& target, RequestSpec& spec) {
  if (!spec.sequence.rope.has_value()) spec.sequence.rope = target.spec.rope;
  spec.sequence.policy = target.spec.policy;
  if (spec.method == Method::kAppend) return absl::OkStatus();
  if (absl::Status status = DecodeFetch(begin, spec); !status.ok()) return status;
  spec.segmentation = target.segmentation;
  const ResidentLayout layout = PlanResident(target.spec, 0);
  spec.sequence.key_dtype = layout.key_dtype;
  spec.sequence.value_dtype = layout.value_dtype;
  const Rope* rope = spec.sequence.rope.has_value() ? &*spec.sequence.rope : nullptr;
  return ValidatePolicy(spec.sequence.policy, spec.sequence.shape, rope);
}

absl::Status ResolvePolicy(const v1::Begin& begin, const ProfileStore& profiles,
                           RequestSpec& spec) {
  const bool apply = spec.method == Method::kApply;
  if (apply != begin.has_plan()) {
    return InvalidField("plan",
                        apply ? "is missing; Apply executes it" : "is set; only Apply takes one");
  }
  absl::StatusOr<Policy> policy = apply ? PolicyFromProto(begin.plan().policy(), "plan.policy")
                                        : PolicyFromProto(begin.policy(), "policy");
  if (!policy.ok()) return policy.status();
  spec.sequence.policy = *std::move(policy);
  const Rope* rope = spec.sequence.rope.has_value() ? &*spec.sequence.rope : nullptr;
  absl::Status status = ValidatePolicy(spec.sequence.policy, spec.sequence.shape, rope);
  if (!status.ok() || apply) return status;
  return ChooseProfile(profiles, spec);
}

// Tokens that an append without a shape brings: as many as it has ids of, or else rows of keys.
int64_t AppendedTokens(const v1::Begin& begin, const SequenceShape& shape) {
  int64_t num_tokens = 0;
  for (const v1::TensorDescriptor& tensor : begin.tensors()) {
    if (tensor.kind() == v1::TENSOR_KIND_TOKEN_IDS) return tensor.byte_size() / 4;
    if (num_tokens > 0 || tensor.kind() != v1::TENSOR_KIND_KEY) continue;
    for (const v1::Dim& dim : tensor.dims()) {
      if (dim.axis() == v1::AXIS_TOKEN) num_tokens = dim.size();
    }
    const absl::StatusOr<DType> dtype = DTypeFromProto(tensor.dtype(), "");
    if (tensor.dims_size() > 0 || !dtype.ok()) continue;
    num_tokens = tensor.byte_size() / (DTypeBytes(*dtype) * shape.num_kv_heads * shape.head_dim);
  }
  return num_tokens;
}

absl::Status DecodeShape(const v1::Begin& begin, const TargetSession* target, RequestSpec& spec) {
  SequenceShape& shape = spec.sequence.shape;
  shape = ShapeFromProto(begin.shape());
  if (target == nullptr) return ValidateShape(shape);
  SequenceShape own = target->spec.shape;
  if (spec.method == Method::kAppend) {
    own.num_tokens = begin.has_shape() ? shape.num_tokens : AppendedTokens(begin, own);
  }
  if (begin.has_shape() && shape != own) {
    return InvalidField("shape", "differs from the session's; leave it out, or repeat it");
  }
  shape = own;
  return ValidateShape(shape);
}

absl::Status DecodeHead(const v1::Begin& begin, const BeginContext& context, RequestSpec& spec) {
  const Method method = spec.method;
  spec.sequence.with_receipt = !begin.no_receipt() && method <= Method::kApply;
  spec.shadow = begin.shadow();
  absl::Status status = DecodeNames(begin, context.fallback_request_id, spec);
  if (status.ok()) status = CheckSessionFields(begin, method);
  if (status.ok()) status = DecodeShape(begin, context.target, spec);
  if (status.ok()) status = DecodeNumbers(begin, spec);
  if (status.ok()) status = DecodeRope(begin, spec);
  if (status.ok() && spec.shadow && method != Method::kCompress) {
    status = InvalidField("shadow", "is set; only Compress has a shadow mode");
  }
  if (status.ok() && method > Method::kCalibrate && begin.has_plan()) {
    status = InvalidField("plan", "is set; only Apply takes one");
  }
  if (!status.ok()) return status;
  if (context.target != nullptr) return ResolveTarget(begin, *context.target, spec);
  if (method != Method::kOpen) {
    status = ResolvePolicy(begin, context.profiles, spec);
    if (!status.ok()) return status;
  }
  return ResolveOpening(begin, context.profiles, spec);
}

// Rows rest with a scale each: one for all of a head's rows would have to change as it grows.
absl::Status CheckRestingScales(const ResidentSpec& resident) {
  const EncodingPolicy& encoding = resident.policy.encoding;
  const auto as_is = [](DType dtype, EncodingPolicy::Format format) {
    return IsQuantized(dtype) && format == EncodingPolicy::Format::kAsIs;
  };
  if (!as_is(resident.key_dtype, encoding.key) && !as_is(resident.value_dtype, encoding.value)) {
    return absl::OkStatus();
  }
  return WithReason(absl::StatusCode::kUnimplemented, "UNSUPPORTED_SCALES",
                    "K or V come quantised with scales by head; sessions keep them as they are "
                    "with SCALE_GRANULARITY_TOKEN_HEAD, or encode them anew (policy.encoding)");
}

absl::Status CheckTensors(const v1::Begin& begin, const BeginContext& context,
                          const Tensors& tensors, RequestSpec& spec) {
  const Method method = spec.method;
  if (method == Method::kFetch) {
    spec.sequence.input_scale_granularity = ScaleGranularity::kTokenHead;
    return CheckFetchTensors(spec, tensors);
  }
  absl::Status status = CheckUniform(tensors);
  std::optional<ScaleGranularity> granularity;
  for (const Kinds& layer : tensors.layers) {
    if (status.ok()) status = CheckLayerSizes(layer, spec.sequence.shape, granularity);
  }
  if (status.ok()) status = CheckPaging(tensors, spec.sequence.shape);
  if (status.ok()) status = CheckDemand(spec, tensors);
  if (status.ok()) status = CheckWindow(spec, tensors);
  if (!status.ok()) return status;
  spec.sequence.input_scale_granularity = granularity.value_or(ScaleGranularity::kHead);
  FillSupply(tensors, spec.sequence);
  if (spec.opening.has_value()) {
    SetTypes(begin.session(), spec.sequence.key_dtype, spec.sequence.value_dtype,
             spec.opening->resident);
  }
  const ResidentSpec* const resident = spec.opening.has_value()    ? &spec.opening->resident
                                       : method == Method::kAppend ? &context.target->spec
                                                                   : nullptr;
  if (resident != nullptr && granularity == ScaleGranularity::kHead) {
    if (status = CheckRestingScales(*resident); !status.ok()) return status;
  }
  switch (method) {
    case Method::kOpen:
    case Method::kFetch:
      return absl::OkStatus();
    case Method::kAppend:
      return CheckAppendTypes(spec, context.target->spec);
    case Method::kCalibrate:
      DecodeCalibration(begin.calibration(), spec.calibration);
      return CheckCalibration(spec, tensors);
    case Method::kApply:
      status = DecodePlan(begin.plan(), spec);
      if (status.ok()) status = CheckPlanTensors(spec, tensors, begin.plan().num_blocks());
      return status;
    case Method::kCompress:
    case Method::kPlan:
      break;
  }
  status = ResolveEvidence(spec.sequence);
  // A fallback may cut otherwise than the policy it replaces.
  if (status.ok() && !spec.sequence.fallback_preset.empty()) {
    status = CheckDemand(spec, tensors);
    if (status.ok()) status = ChooseProfile(context.profiles, spec);
  }
  return status;
}

}  // namespace

const char* MethodName(Method method) {
  switch (method) {
    case Method::kCompress:
      return "Compress";
    case Method::kPlan:
      return "Plan";
    case Method::kApply:
      return "Apply";
    case Method::kCalibrate:
      return "Calibrate";
    case Method::kOpen:
      return "Open";
    case Method::kAppend:
      return "Append";
    case Method::kFetch:
      return "Fetch";
  }
  return "";
}

absl::StatusOr<ShardNames> LaterShardFromBegin(const v1::Begin& begin) {
  RequestSpec spec;
  absl::Status status = CheckShards(begin);
  if (status.ok()) status = DecodeNames(begin, "", spec);
  if (!status.ok()) return status;
  v1::Begin rest = begin;
  rest.clear_request_id();
  rest.clear_tenant();
  rest.clear_shard_index();
  rest.clear_num_shards();
  if (rest.ByteSizeLong() != 0) {
    return InvalidField("shard_index",
                        absl::StrCat("is ", begin.shard_index(),
                                     "; begin of a later shard holds only request_id, tenant, "
                                     "shard_index and num_shards"));
  }
  return ShardNames{.request_id = std::move(spec.request_id), .tenant = std::move(spec.tenant)};
}

absl::StatusOr<RequestSpec> SpecFromBegin(const v1::Begin& begin, Method method,
                                          const BeginContext& context) {
  RequestSpec spec;
  spec.method = method;
  absl::Status status = DecodeHead(begin, context, spec);
  if (!status.ok()) return status;
  absl::StatusOr<Tensors> tensors = DecodeTensors(begin, spec.sequence.shape, context);
  if (!tensors.ok()) return tensors.status();
  status = CheckTensors(begin, context, *tensors, spec);
  if (!status.ok()) return status;
  spec.tensors.reserve(tensors->all.size());
  for (DecodedTensor& decoded : tensors->all) spec.tensors.push_back(std::move(decoded.tensor));
  status = DecodeOutput(begin, context.regions, spec);
  if (!status.ok()) return status;
  return spec;
}

}  // namespace dynsplit::rpc

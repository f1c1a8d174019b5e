// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/policy_adapter.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "server/pipeline/quality.h"
#include "server/rpc/enum_map.h"

namespace dynsplit::rpc {
namespace {

constexpr EnumMap<v1::Segmentation::Method, SegmentationPolicy::Method, 4> kSegmentations = {
    {{v1::Segmentation::METHOD_NONE, SegmentationPolicy::Method::kNone},
     {v1::Segmentation::METHOD_FIXED, SegmentationPolicy::Method::kFixed},
     {v1::Segmentation::METHOD_DELIMITER_SET, SegmentationPolicy::Method::kDelimiterSet},
     {v1::Segmentation::METHOD_DYNAMIC, SegmentationPolicy::Method::kDynamic}}};

constexpr EnumMap<v1::Scoring::Method, ScoringPolicy::Method, 7> kScorings = {
    {{v1::Scoring::METHOD_RECENCY, ScoringPolicy::Method::kRecency},
     {v1::Scoring::METHOD_KEY_NORM, ScoringPolicy::Method::kKeyNorm},
     {v1::Scoring::METHOD_KEY_DIFFERENCE, ScoringPolicy::Method::kKeyDifference},
     {v1::Scoring::METHOD_WINDOW_QUERIES, ScoringPolicy::Method::kWindowQueries},
     {v1::Scoring::METHOD_ACCUMULATED, ScoringPolicy::Method::kAccumulated},
     {v1::Scoring::METHOD_BLOCK_BOUND, ScoringPolicy::Method::kBlockBound},
     {v1::Scoring::METHOD_BLOCK_MEAN_KEY, ScoringPolicy::Method::kBlockMeanKey}}};

constexpr EnumMap<v1::Scoring::QueryReduction, ScoringPolicy::QueryReduction, 2> kQueryReductions =
    {{{v1::Scoring::QUERY_REDUCTION_MEAN, ScoringPolicy::QueryReduction::kMean},
      {v1::Scoring::QUERY_REDUCTION_ROOT_MEAN_SQUARE,
       ScoringPolicy::QueryReduction::kRootMeanSquare}}};
constexpr EnumMap<v1::Scoring::Pooling, ScoringPolicy::Pooling, 2> kPoolings = {
    {{v1::Scoring::POOLING_AVERAGE, ScoringPolicy::Pooling::kAverage},
     {v1::Scoring::POOLING_MAX, ScoringPolicy::Pooling::kMax}}};

constexpr EnumMap<v1::Scoring::BlockReduction, ScoringPolicy::BlockReduction, 3> kReductions = {
    {{v1::Scoring::BLOCK_REDUCTION_MEAN, ScoringPolicy::BlockReduction::kMean},
     {v1::Scoring::BLOCK_REDUCTION_SUM, ScoringPolicy::BlockReduction::kSum},
     {v1::Scoring::BLOCK_REDUCTION_MAX, ScoringPolicy::BlockReduction::kMax}}};

constexpr EnumMap<v1::Scoring::LseBase, bool, 2> kLseBases = {
    {{v1::Scoring::LSE_BASE_E, false}, {v1::Scoring::LSE_BASE_2, true}}};

constexpr EnumMap<v1::Budget::Method, bool, 1> kBudgets = {{{v1::Budget::METHOD_UNIFORM, true}}};

constexpr EnumMap<v1::Transform, Transform, 2> kTransforms = {
    {{v1::TRANSFORM_INDEX, Transform::kIndex}, {v1::TRANSFORM_EVICT, Transform::kEvict}}};

constexpr EnumMap<v1::Encoding::Format, EncodingPolicy::Format, 3> kFormats = {
    {{v1::Encoding::FORMAT_AS_IS, EncodingPolicy::Format::kAsIs},
     {v1::Encoding::FORMAT_FLOAT8_E4M3, EncodingPolicy::Format::kFloat8E4M3},
     {v1::Encoding::FORMAT_INT8, EncodingPolicy::Format::kInt8}}};

constexpr EnumMap<v1::ScaleGranularity, ScaleGranularity, 2> kGranularities = {
    {{v1::SCALE_GRANULARITY_HEAD, ScaleGranularity::kHead},
     {v1::SCALE_GRANULARITY_TOKEN_HEAD, ScaleGranularity::kTokenHead}}};

constexpr EnumMap<v1::Scope, Scope, 3> kScopes = {{{v1::SCOPE_GLOBAL, Scope::kGlobal},
                                                   {v1::SCOPE_LAYER, Scope::kLayer},
                                                   {v1::SCOPE_LAYER_HEAD, Scope::kLayerHead}}};

constexpr EnumMap<v1::Positions, Positions, 2> kPositions = {
    {{v1::POSITIONS_ORIGINAL, Positions::kOriginal},
     {v1::POSITIONS_CONTIGUOUS, Positions::kContiguous}}};

constexpr EnumMap<v1::Evidence, Evidence, 5> kEvidence = {
    {{v1::EVIDENCE_NONE, Evidence::kNone},
     {v1::EVIDENCE_KEYS, Evidence::kKeys},
     {v1::EVIDENCE_WINDOW_QUERIES, Evidence::kWindowQueries},
     {v1::EVIDENCE_WINDOW_QUERIES_WITH_LSE, Evidence::kWindowQueriesWithLse},
     {v1::EVIDENCE_ACCUMULATED_SCORES, Evidence::kAccumulatedScores}}};

constexpr int32_t kDefaultFixedBlock = 16;

absl::Status MergeSegmentation(const v1::Segmentation& wire, const std::string& field,
                               SegmentationPolicy& policy) {
  const SegmentationPolicy::Method before = policy.method;
  absl::Status status = Assign(kSegmentations, wire.method(), &v1::Segmentation::Method_IsValid,
                               field + ".method", policy.method);
  if (!status.ok()) return status;
  if (policy.method != before) {
    const SegmentationPolicy::Method method = policy.method;
    policy = SegmentationPolicy();
    policy.method = method;
    if (policy.method == SegmentationPolicy::Method::kFixed) {
      policy.block_size = kDefaultFixedBlock;
      policy.max_deviation = 0;
    }
  }
  if (wire.block_size() != 0) {
    policy.block_size = wire.block_size();
    if (policy.method == SegmentationPolicy::Method::kDynamic) {
      policy.max_deviation = std::max(0, policy.block_size - 1);
    }
  }
  if (wire.has_max_deviation()) policy.max_deviation = wire.max_deviation();
  if (wire.has_balance()) policy.balance = wire.balance();
  if (!wire.profile().empty()) policy.profile = wire.profile();
  return absl::OkStatus();
}

absl::Status MergeScoring(const v1::Scoring& wire, const std::string& field,
                          ScoringPolicy& policy) {
  const ScoringPolicy::Method before = policy.method;
  absl::Status status = Assign(kScorings, wire.method(), &v1::Scoring::Method_IsValid,
                               field + ".method", policy.method);
  if (!status.ok()) return status;
  if (policy.method != before) {
    const ScoringPolicy::Method method = policy.method;
    policy = ScoringPolicy();
    policy.method = method;
    if (policy.method != ScoringPolicy::Method::kWindowQueries) policy.pooling_kernel = 1;
  }
  if (wire.num_window_queries() != 0) policy.num_window_queries = wire.num_window_queries();
  if (wire.pooling_kernel() != 0) policy.pooling_kernel = wire.pooling_kernel();
  if (wire.softmax_scale() != 0) policy.softmax_scale = wire.softmax_scale();
  if (wire.refinement_factor() != 0) policy.refinement_factor = wire.refinement_factor();
  status = Assign(kPoolings, wire.pooling(), &v1::Scoring::Pooling_IsValid, field + ".pooling",
                  policy.pooling);
  status.Update(Assign(kReductions, wire.block_reduction(), &v1::Scoring::BlockReduction_IsValid,
                       field + ".block_reduction", policy.block_reduction));
  status.Update(Assign(kQueryReductions, wire.query_reduction(),
                       &v1::Scoring::QueryReduction_IsValid, field + ".query_reduction",
                       policy.query_reduction));
  status.Update(Assign(kLseBases, wire.lse_base(), &v1::Scoring::LseBase_IsValid,
                       field + ".lse_base", policy.lse_base_2));
  return status;
}

absl::Status MergeBudget(const v1::Budget& wire, const std::string& field, BudgetPolicy& policy) {
  switch (wire.target_case()) {
    case v1::Budget::kKeptRatio:
      policy.target = BudgetPolicy::Target::kRatio;
      policy.kept_ratio = wire.kept_ratio();
      break;
    case v1::Budget::kTokensPerHead:
      policy.target = BudgetPolicy::Target::kTokens;
      policy.tokens_per_head = wire.tokens_per_head();
      break;
    case v1::Budget::kBytes:
      policy.target = BudgetPolicy::Target::kBytes;
      policy.bytes = wire.bytes();
      break;
    case v1::Budget::TARGET_NOT_SET:
      break;
  }
  if (wire.has_whole_blocks()) policy.whole_blocks = wire.whole_blocks();
  bool uniform = true;
  return Assign(kBudgets, wire.method(), &v1::Budget::Method_IsValid, field + ".method", uniform);
}

absl::Status MergeEncoding(const v1::Encoding& wire, const std::string& field,
                           EncodingPolicy& policy) {
  absl::Status status =
      Assign(kFormats, wire.key(), &v1::Encoding::Format_IsValid, field + ".key", policy.key);
  status.Update(Assign(kFormats, wire.value(), &v1::Encoding::Format_IsValid, field + ".value",
                       policy.value));
  if (wire.scale_granularity() != v1::SCALE_GRANULARITY_UNSPECIFIED) {
    ScaleGranularity granularity = ScaleGranularity::kHead;
    status.Update(Assign(kGranularities, wire.scale_granularity(), &v1::ScaleGranularity_IsValid,
                         field + ".scale_granularity", granularity));
    policy.scale_granularity = granularity;
  }
  return status;
}

void MergeProtection(const v1::Protection& wire, ProtectionPolicy& policy) {
  if (wire.has_num_sink_tokens()) policy.num_sink_tokens = wire.num_sink_tokens();
  if (wire.has_num_recent_tokens()) policy.num_recent_tokens = wire.num_recent_tokens();
  if (wire.pinned_size() > 0) policy.pinned.clear();
  for (const v1::TokenSpan& span : wire.pinned()) {
    policy.pinned.push_back({.begin = span.begin(), .end = span.end()});
  }
  if (wire.dense_layers_size() > 0) {
    policy.dense_layers.assign(wire.dense_layers().begin(), wire.dense_layers().end());
  }
}

absl::Status MergeQualityFloor(const v1::QualityFloor& wire, const std::string& field,
                               const std::string& preset, QualityFloor& floor) {
  floor.min_retained_attention_mass = wire.min_retained_attention_mass();
  floor.max_output_relative_error = wire.max_output_relative_error();
  if (wire.max_kept_ratio() != 0) floor.max_kept_ratio = wire.max_kept_ratio();
  const double divergence = wire.max_expected_divergence();
  if (divergence == 0) return absl::OkStatus();
  if (!(std::isfinite(divergence) && divergence > 0)) {
    return InvalidField(field + ".max_expected_divergence",
                        absl::StrCat("is ", divergence, "; must be finite and not negative"));
  }
  // The loss is a function of the error, which is what a layer can be held to.
  const double error = QualityTable::Builtin().LossOf(preset).of_error.ValueFor(divergence);
  double& bound = floor.max_output_relative_error;
  bound = bound == 0 ? error : std::min(bound, error);
  return absl::OkStatus();
}

v1::Budget BudgetToProto(const BudgetPolicy& policy) {
  v1::Budget wire;
  switch (policy.target) {
    case BudgetPolicy::Target::kRatio:
      wire.set_kept_ratio(policy.kept_ratio);
      break;
    case BudgetPolicy::Target::kTokens:
      wire.set_tokens_per_head(policy.tokens_per_head);
      break;
    case BudgetPolicy::Target::kBytes:
      wire.set_bytes(policy.bytes);
      break;
  }
  wire.set_method(v1::Budget::METHOD_UNIFORM);
  wire.set_whole_blocks(policy.whole_blocks);
  return wire;
}

v1::Scoring ScoringToProto(const ScoringPolicy& policy) {
  v1::Scoring wire;
  wire.set_method(kScorings.ToWire(policy.method));
  wire.set_num_window_queries(policy.num_window_queries);
  wire.set_pooling_kernel(policy.pooling_kernel);
  wire.set_pooling(kPoolings.ToWire(policy.pooling));
  wire.set_block_reduction(kReductions.ToWire(policy.block_reduction));
  wire.set_lse_base(kLseBases.ToWire(policy.lse_base_2));
  wire.set_softmax_scale(policy.softmax_scale);
  wire.set_query_reduction(kQueryReductions.ToWire(policy.query_reduction));
  wire.set_refinement_factor(policy.refinement_factor);
  return wire;
}

v1::Protection ProtectionToProto(const ProtectionPolicy& policy) {
  v1::Protection wire;
  wire.set_num_sink_tokens(static_cast<int32_t>(policy.num_sink_tokens));
  wire.set_num_recent_tokens(static_cast<int32_t>(policy.num_recent_tokens));
  for (const TokenSpan& span : policy.pinned) {
    v1::TokenSpan& added = *wire.add_pinned();
    added.set_begin(span.begin);
    added.set_end(span.end);
  }
  wire.mutable_dense_layers()->Add(policy.dense_layers.begin(), policy.dense_layers.end());
  return wire;
}

}  // namespace

absl::StatusOr<Policy> PolicyFromProto(const v1::Policy& wire, const std::string& field) {
  absl::StatusOr<const Preset*> preset =
      FindPreset(wire.preset().empty() ? std::string_view("dynsplit") : wire.preset());
  if (!preset.ok()) return preset.status();
  Policy policy = (*preset)->policy;
  absl::Status status =
      MergeSegmentation(wire.segmentation(), field + ".segmentation", policy.segmentation);
  status.Update(MergeScoring(wire.scoring(), field + ".scoring", policy.scoring));
  status.Update(MergeBudget(wire.budget(), field + ".budget", policy.budget));
  status.Update(Assign(kTransforms, wire.transform(), &v1::Transform_IsValid, field + ".transform",
                       policy.transform));
  status.Update(MergeEncoding(wire.encoding(), field + ".encoding", policy.encoding));
  // What an index preset refines goes with its index.
  if (policy.transform != Transform::kIndex && wire.scoring().refinement_factor() == 0) {
    policy.scoring.refinement_factor = 0;
  }
  MergeProtection(wire.protection(), policy.protection);
  status.Update(Assign(kScopes, wire.scope(), &v1::Scope_IsValid, field + ".scope", policy.scope));
  status.Update(Assign(kPositions, wire.positions(), &v1::Positions_IsValid, field + ".positions",
                       policy.positions));
  if (wire.has_quality_floor()) {
    status.Update(MergeQualityFloor(wire.quality_floor(), field + ".quality_floor", policy.preset,
                                    policy.quality_floor));
  }
  if (!status.ok()) return status;
  policy.allow_fallback = wire.allow_fallback();
  if (wire.page_size() != 0) policy.page_size = wire.page_size();
  return policy;
}

v1::Policy PolicyToProto(const Policy& policy) {
  v1::Policy wire;
  wire.set_preset(policy.preset);
  v1::Segmentation& segmentation = *wire.mutable_segmentation();
  segmentation.set_method(kSegmentations.ToWire(policy.segmentation.method));
  segmentation.set_block_size(policy.segmentation.block_size);
  segmentation.set_max_deviation(policy.segmentation.max_deviation);
  segmentation.set_balance(policy.segmentation.balance);
  segmentation.set_profile(policy.segmentation.profile);
  *wire.mutable_scoring() = ScoringToProto(policy.scoring);
  *wire.mutable_budget() = BudgetToProto(policy.budget);
  wire.set_transform(kTransforms.ToWire(policy.transform));
  v1::Encoding& encoding = *wire.mutable_encoding();
  encoding.set_key(kFormats.ToWire(policy.encoding.key));
  encoding.set_value(kFormats.ToWire(policy.encoding.value));
  if (policy.encoding.scale_granularity.has_value()) {
    encoding.set_scale_granularity(kGranularities.ToWire(*policy.encoding.scale_granularity));
  }
  *wire.mutable_protection() = ProtectionToProto(policy.protection);
  wire.set_scope(kScopes.ToWire(policy.scope));
  wire.set_positions(kPositions.ToWire(policy.positions));
  v1::QualityFloor& floor = *wire.mutable_quality_floor();
  floor.set_min_retained_attention_mass(policy.quality_floor.min_retained_attention_mass);
  floor.set_max_output_relative_error(policy.quality_floor.max_output_relative_error);
  floor.set_max_kept_ratio(policy.quality_floor.max_kept_ratio);
  wire.set_allow_fallback(policy.allow_fallback);
  wire.set_page_size(policy.page_size);
  return wire;
}

SequenceShape ShapeFromProto(const v1::SequenceShape& shape) {
  return {.num_layers = shape.num_layers(),
          .num_query_heads = shape.num_query_heads(),
          .num_kv_heads = shape.num_kv_heads(),
          .num_tokens = shape.num_tokens(),
          .head_dim = shape.head_dim()};
}

v1::SequenceShape ShapeToProto(const SequenceShape& shape) {
  v1::SequenceShape wire;
  wire.set_num_layers(shape.num_layers);
  wire.set_num_query_heads(shape.num_query_heads);
  wire.set_num_kv_heads(shape.num_kv_heads);
  wire.set_num_tokens(shape.num_tokens);
  wire.set_head_dim(shape.head_dim);
  return wire;
}

absl::StatusOr<Rope> RopeFromProto(const v1::Rope& wire, int32_t head_dim) {
  Rope rope;
  rope.rotary_dim = wire.rotary_dim() == 0 ? head_dim : wire.rotary_dim();
  rope.interleaved = wire.interleaved();
  if (rope.rotary_dim < 2 || rope.rotary_dim > head_dim || rope.rotary_dim % 2 != 0) {
    return InvalidField(
        "rope.rotary_dim",
        absl::StrCat("is ", rope.rotary_dim, "; must be even and in [2, ", head_dim, "]"));
  }
  const double theta = wire.theta() == 0 ? 10000 : wire.theta();
  if (!(std::isfinite(theta) && theta > 1)) {
    return InvalidField("rope.theta", absl::StrCat("is ", theta, "; must be finite and > 1"));
  }
  const auto num_pairs = static_cast<size_t>(rope.rotary_dim / 2);
  double factor = 1;
  switch (wire.scaling()) {
    case v1::Rope::SCALING_UNSPECIFIED:
      break;
    case v1::Rope::SCALING_LINEAR:
      factor = wire.scaling_factor();
      if (!(std::isfinite(factor) && factor >= 1)) {
        return InvalidField("rope.scaling_factor",
                            absl::StrCat("is ", factor, "; must be finite and >= 1"));
      }
      break;
    case v1::Rope::SCALING_TABLE: {
      const auto num_given = static_cast<size_t>(wire.inverse_frequencies_size());
      if (num_given != num_pairs) {
        return InvalidField("rope.inverse_frequencies",
                            absl::StrCat("has ", num_given, " values; must have ", num_pairs));
      }
      for (const double frequency : wire.inverse_frequencies()) {
        if (!std::isfinite(frequency)) {
          return InvalidField("rope.inverse_frequencies", "has a value that is not finite");
        }
      }
      rope.inverse_frequencies.assign(wire.inverse_frequencies().begin(),
                                      wire.inverse_frequencies().end());
      return rope;
    }
    default:
      return InvalidField("rope.scaling", absl::StrCat("is ", static_cast<int>(wire.scaling()),
                                                       "; no such value is defined"));
  }
  for (size_t i = 0; i < num_pairs; ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / rope.rotary_dim;
    rope.inverse_frequencies.push_back(std::pow(theta, exponent) / factor);
  }
  return rope;
}

absl::StatusOr<Evidence> EvidenceFromProto(v1::Evidence wire, const std::string& field) {
  Evidence evidence = Evidence::kNone;
  absl::Status status = Assign(kEvidence, wire, &v1::Evidence_IsValid, field, evidence);
  if (!status.ok()) return status;
  return evidence;
}

v1::Evidence EvidenceToProto(Evidence evidence) { return kEvidence.ToWire(evidence); }

}  // namespace dynsplit::rpc

// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/policy.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

constexpr int32_t kMaxLayers = 1024;
constexpr int32_t kMaxQueryHeads = 1024;
constexpr int32_t kMinHeadDim = 8;
constexpr int32_t kMaxHeadDim = 512;
constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
constexpr int32_t kMaxFixedBlock = 65536;
constexpr int32_t kMaxDynamicBlock = 4096;
constexpr int32_t kMaxWindowQueries = 1024;
constexpr int32_t kMaxPoolingKernel = 63;
constexpr int32_t kMaxRefinementFactor = 16;
constexpr size_t kMaxProfileName = 64;

absl::Status CheckRange(std::string_view field, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("is ", value, "; must be in [", low, ", ", high, "]"));
}

// Refuses NaN as well.
absl::Status CheckUnit(std::string_view field, double value) {
  if (value >= 0 && value <= 1) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("is ", value, "; must be in [0, 1]"));
}

absl::Status CheckShare(std::string_view field, double value) {
  if (value > 0 && value <= 1) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("is ", value, "; must be in (0, 1]"));
}

absl::Status CheckFiniteNotNegative(std::string_view field, double value) {
  if (std::isfinite(value) && value >= 0) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("is ", value, "; must be finite and not negative"));
}

absl::Status ValidateSegmentation(const SegmentationPolicy& segmentation) {
  const bool dynamic = segmentation.method == SegmentationPolicy::Method::kDynamic;
  if (auto status = CheckRange("policy.segmentation.block_size", segmentation.block_size, 1,
                               dynamic ? kMaxDynamicBlock : kMaxFixedBlock);
      !status.ok()) {
    return status;
  }
  // A cut must make progress: block_size - max_deviation >= 1.
  if (auto status = CheckRange("policy.segmentation.max_deviation", segmentation.max_deviation, 0,
                               dynamic ? segmentation.block_size - 1 : kMaxFixedBlock);
      !status.ok()) {
    return status;
  }
  if (auto status = CheckUnit("policy.segmentation.balance", segmentation.balance); !status.ok()) {
    return status;
  }
  const bool name_ok =
      segmentation.profile.size() <= kMaxProfileName &&
      std::all_of(segmentation.profile.begin(), segmentation.profile.end(), [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '.' || c == '-';
      });
  if (!name_ok) {
    return InvalidField("policy.segmentation.profile",
                        "is no profile name; must be at most 64 characters of [a-z0-9_.-]");
  }
  return absl::OkStatus();
}

absl::Status ValidateScoring(const ScoringPolicy& scoring) {
  if (auto status = CheckRange("policy.scoring.num_window_queries", scoring.num_window_queries, 0,
                               kMaxWindowQueries);
      !status.ok()) {
    return status;
  }
  if (auto status =
          CheckRange("policy.scoring.pooling_kernel", scoring.pooling_kernel, 1, kMaxPoolingKernel);
      !status.ok()) {
    return status;
  }
  if (scoring.pooling_kernel % 2 == 0) {
    return InvalidField("policy.scoring.pooling_kernel",
                        absl::StrCat("is ", scoring.pooling_kernel, "; must be odd"));
  }
  if (scoring.query_reduction != ScoringPolicy::QueryReduction::kMean &&
      scoring.method != ScoringPolicy::Method::kWindowQueries) {
    return InvalidField("policy.scoring.query_reduction",
                        "is QUERY_REDUCTION_ROOT_MEAN_SQUARE; only METHOD_WINDOW_QUERIES has it");
  }
  if (auto status = CheckFiniteNotNegative("policy.scoring.softmax_scale", scoring.softmax_scale);
      !status.ok()) {
    return status;
  }
  // The kernels take it as a float, where it must not vanish or overflow.
  const auto scale = static_cast<float>(scoring.softmax_scale);
  if (scoring.softmax_scale != 0 && !(std::isnormal(scale))) {
    return InvalidField("policy.scoring.softmax_scale",
                        absl::StrCat("is ", scoring.softmax_scale,
                                     "; must be a normal 32-bit float, or 0 for 1/sqrt(head_dim)"));
  }
  return absl::OkStatus();
}

// Candidates are what blocks of an index propose.
absl::Status ValidateRefinement(const Policy& policy) {
  constexpr char kField[] = "policy.scoring.refinement_factor";
  const ScoringPolicy& scoring = policy.scoring;
  if (auto status = CheckRange(kField, scoring.refinement_factor, 0, kMaxRefinementFactor);
      !status.ok()) {
    return status;
  }
  const bool by_blocks = scoring.method == ScoringPolicy::Method::kBlockBound ||
                         scoring.method == ScoringPolicy::Method::kBlockMeanKey;
  if (!scoring.refines() || (by_blocks && policy.transform == Transform::kIndex)) {
    return absl::OkStatus();
  }
  return InvalidField(kField, absl::StrCat("is ", scoring.refinement_factor,
                                           "; must be at most 1 without TRANSFORM_INDEX and "
                                           "METHOD_BLOCK_BOUND or METHOD_BLOCK_MEAN_KEY"));
}

absl::Status ValidateBudget(const Policy& policy, const SequenceShape& shape) {
  const BudgetPolicy& budget = policy.budget;
  switch (budget.target) {
    case BudgetPolicy::Target::kRatio:
      if (auto status = CheckShare("policy.budget.kept_ratio", budget.kept_ratio); !status.ok()) {
        return status;
      }
      break;
    case BudgetPolicy::Target::kTokens:
      if (auto status = CheckRange("policy.budget.tokens_per_head", budget.tokens_per_head, 1,
                                   shape.num_tokens);
          !status.ok()) {
        return status;
      }
      break;
    case BudgetPolicy::Target::kBytes:
      // The true minimum depends on the encoding: BudgetForLayer knows it.
      if (budget.bytes < 1) {
        return InvalidField("policy.budget.bytes",
                            absl::StrCat("is ", budget.bytes, "; must be at least 1"));
      }
      break;
  }
  if (!budget.whole_blocks) return absl::OkStatus();
  if (budget.target != BudgetPolicy::Target::kRatio) {
    return InvalidField("policy.budget.whole_blocks",
                        "is set without kept_ratio; whole blocks are counted by ratio only");
  }
  if (policy.scope == Scope::kLayerHead) {
    return InvalidField("policy.budget.whole_blocks",
                        "is set with SCOPE_LAYER_HEAD; heads would keep unequal numbers of tokens");
  }
  return absl::OkStatus();
}

// The preset's own count stands for "all" on a shorter sequence, so that defaults fit every length.
int64_t LargestCount(const Policy& policy, const SequenceShape& shape,
                     int64_t ProtectionPolicy::*count) {
  const absl::StatusOr<const Preset*> preset = FindPreset(policy.preset);
  if (!preset.ok()) return shape.num_tokens;
  return std::max(shape.num_tokens, (*preset)->policy.protection.*count);
}

absl::Status ValidateProtection(const Policy& policy, const SequenceShape& shape) {
  const ProtectionPolicy& protection = policy.protection;
  if (auto status = CheckRange("policy.protection.num_sink_tokens", protection.num_sink_tokens, 0,
                               LargestCount(policy, shape, &ProtectionPolicy::num_sink_tokens));
      !status.ok()) {
    return status;
  }
  if (auto status =
          CheckRange("policy.protection.num_recent_tokens", protection.num_recent_tokens, 0,
                     LargestCount(policy, shape, &ProtectionPolicy::num_recent_tokens));
      !status.ok()) {
    return status;
  }
  int32_t previous_end = 0;
  for (size_t i = 0; i < protection.pinned.size(); ++i) {
    const TokenSpan& span = protection.pinned[i];
    if (span.begin < previous_end || span.begin >= span.end || span.end > shape.num_tokens) {
      return InvalidField(absl::StrCat("policy.protection.pinned[", i, "]"),
                          absl::StrCat("is [", span.begin, ", ", span.end,
                                       "); spans must be ascending, disjoint, not empty and within "
                                       "[0, ",
                                       shape.num_tokens, "]"));
    }
    previous_end = span.end;
  }
  int32_t previous_layer = -1;
  for (size_t i = 0; i < protection.dense_layers.size(); ++i) {
    const int32_t layer = protection.dense_layers[i];
    if (layer <= previous_layer || layer >= shape.num_layers) {
      return InvalidField(
          absl::StrCat("policy.protection.dense_layers[", i, "]"),
          absl::StrCat("is ", layer, "; must be ascending and in [0, ", shape.num_layers, ")"));
    }
    previous_layer = layer;
  }
  return absl::OkStatus();
}

absl::Status ValidateQualityFloor(const Policy& policy) {
  const QualityFloor& floor = policy.quality_floor;
  if (auto status = CheckUnit("policy.quality_floor.min_retained_attention_mass",
                              floor.min_retained_attention_mass);
      !status.ok()) {
    return status;
  }
  if (auto status = CheckFiniteNotNegative("policy.quality_floor.max_output_relative_error",
                                           floor.max_output_relative_error);
      !status.ok()) {
    return status;
  }
  if (auto status = CheckShare("policy.quality_floor.max_kept_ratio", floor.max_kept_ratio);
      !status.ok()) {
    return status;
  }
  if (floor.empty()) return absl::OkStatus();
  if (policy.budget.target == BudgetPolicy::Target::kRatio &&
      policy.transform == Transform::kEvict && policy.budget.kept_ratio > floor.max_kept_ratio) {
    return InvalidField("policy.quality_floor.max_kept_ratio",
                        absl::StrCat("is ", floor.max_kept_ratio,
                                     "; must be at least policy.budget.kept_ratio, which is ",
                                     policy.budget.kept_ratio));
  }
  if (policy.scope == Scope::kGlobal) {
    return WithReason(absl::StatusCode::kUnimplemented, "QUALITY_FLOOR_SCOPE",
                      "policy.quality_floor with SCOPE_GLOBAL is not supported; use SCOPE_LAYER or "
                      "SCOPE_LAYER_HEAD");
  }
  return absl::OkStatus();
}

absl::Status ValidateRope(const Rope& rope, const SequenceShape& shape) {
  if (rope.rotary_dim < 2 || rope.rotary_dim > shape.head_dim || rope.rotary_dim % 2 != 0) {
    return InvalidField(
        "rope.rotary_dim",
        absl::StrCat("is ", rope.rotary_dim, "; must be even and in [2, ", shape.head_dim, "]"));
  }
  if (rope.inverse_frequencies.size() != static_cast<size_t>(rope.rotary_dim / 2)) {
    return InvalidField("rope.inverse_frequencies",
                        absl::StrCat("has ", rope.inverse_frequencies.size(),
                                     " entries; must have ", rope.rotary_dim / 2));
  }
  for (size_t i = 0; i < rope.inverse_frequencies.size(); ++i) {
    if (!std::isfinite(rope.inverse_frequencies[i])) {
      return InvalidField(absl::StrCat("rope.inverse_frequencies[", i, "]"),
                          absl::StrCat("is ", rope.inverse_frequencies[i], "; must be finite"));
    }
  }
  return absl::OkStatus();
}

absl::Status ValidatePositions(const Policy& policy, const SequenceShape& shape, const Rope* rope) {
  if (rope != nullptr) {
    if (auto status = ValidateRope(*rope, shape); !status.ok()) return status;
  }
  if (policy.positions != Positions::kContiguous) return absl::OkStatus();
  if (policy.transform == Transform::kIndex) {
    return InvalidField("policy.positions",
                        "is POSITIONS_CONTIGUOUS with TRANSFORM_INDEX; an index keeps all tokens "
                        "where they are");
  }
  if (rope == nullptr) {
    return InvalidField("rope", "is absent; POSITIONS_CONTIGUOUS re-rotates keys and needs it");
  }
  return absl::OkStatus();
}

}  // namespace

Evidence RequiredEvidence(const Policy& policy) {
  // An index drops nothing; it only reads keys for its summaries.
  if (policy.transform == Transform::kIndex) return Evidence::kKeys;
  switch (policy.scoring.method) {
    case ScoringPolicy::Method::kRecency:
      return Evidence::kNone;
    case ScoringPolicy::Method::kKeyNorm:
    case ScoringPolicy::Method::kKeyDifference:
      return Evidence::kKeys;
    case ScoringPolicy::Method::kWindowQueries:
    case ScoringPolicy::Method::kBlockBound:
    case ScoringPolicy::Method::kBlockMeanKey:
      return Evidence::kWindowQueries;
    case ScoringPolicy::Method::kAccumulated:
      return Evidence::kAccumulatedScores;
  }
  return Evidence::kNone;
}

std::string_view EvidenceName(Evidence evidence) {
  switch (evidence) {
    case Evidence::kNone:
      return "none";
    case Evidence::kKeys:
      return "keys";
    case Evidence::kWindowQueries:
      return "window queries";
    case Evidence::kWindowQueriesWithLse:
      return "window queries with log-sum-exp";
    case Evidence::kAccumulatedScores:
      return "accumulated scores";
  }
  return "unknown";
}

absl::Status ValidateShape(const SequenceShape& shape) {
  if (auto status = CheckRange("shape.num_layers", shape.num_layers, 1, kMaxLayers); !status.ok()) {
    return status;
  }
  if (auto status = CheckRange("shape.num_query_heads", shape.num_query_heads, 1, kMaxQueryHeads);
      !status.ok()) {
    return status;
  }
  if (auto status = CheckRange("shape.num_kv_heads", shape.num_kv_heads, 1, shape.num_query_heads);
      !status.ok()) {
    return status;
  }
  if (shape.num_query_heads % shape.num_kv_heads != 0) {
    return InvalidField(
        "shape.num_query_heads",
        absl::StrCat("is ", shape.num_query_heads,
                     "; must be a multiple of num_kv_heads, which is ", shape.num_kv_heads));
  }
  if (auto status = CheckRange("shape.num_tokens", shape.num_tokens, 1, kMaxTokens); !status.ok()) {
    return status;
  }
  if (auto status = CheckRange("shape.head_dim", shape.head_dim, kMinHeadDim, kMaxHeadDim);
      !status.ok()) {
    return status;
  }
  if (shape.head_dim % kMinHeadDim != 0) {
    return InvalidField("shape.head_dim",
                        absl::StrCat("is ", shape.head_dim, "; must be a multiple of 8"));
  }
  // Bounds every byte size derived from the shape: K and V of all layers in the widest type, with
  // room for page padding, scales and summaries.
  constexpr int64_t kMaxElements = int64_t{1} << 56;
  const int64_t elements_per_token =
      int64_t{shape.num_layers} * shape.num_query_heads * shape.head_dim;
  if (elements_per_token > kMaxElements / shape.num_tokens) {
    return InvalidField(
        "shape", absl::StrCat("has ", elements_per_token, " elements a token and ",
                              shape.num_tokens, " tokens; their product must be at most 2^56"));
  }
  return absl::OkStatus();
}

absl::Status ValidatePolicy(const Policy& policy, const SequenceShape& shape, const Rope* rope) {
  if (auto status = ValidateSegmentation(policy.segmentation); !status.ok()) return status;
  if (auto status = ValidateScoring(policy.scoring); !status.ok()) return status;
  if (auto status = ValidateRefinement(policy); !status.ok()) return status;
  if (auto status = ValidateBudget(policy, shape); !status.ok()) return status;
  if (auto status = ValidateProtection(policy, shape); !status.ok()) return status;
  if (auto status = ValidatePositions(policy, shape, rope); !status.ok()) return status;
  if (auto status = ValidateQualityFloor(policy); !status.ok()) return status;
  constexpr std::array<int32_t, 4> kPageSizes = {16, 32, 64, 128};
  if (std::find(kPageSizes.begin(), kPageSizes.end(), policy.page_size) == kPageSizes.end()) {
    return InvalidField("policy.page_size",
                        absl::StrCat("is ", policy.page_size, "; must be 16, 32, 64 or 128"));
  }
  return absl::OkStatus();
}

}  // namespace dynsplit

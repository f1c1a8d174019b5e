// SPDX-License-Identifier: Apache-2.0
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/pipeline/plan.h"

namespace dynsplit {
namespace {

const char* Name(SegmentationPolicy::Method method) {
  switch (method) {
    case SegmentationPolicy::Method::kNone:
      return "none";
    case SegmentationPolicy::Method::kFixed:
      return "fixed";
    case SegmentationPolicy::Method::kDelimiterSet:
      return "delimiter_set";
    case SegmentationPolicy::Method::kDynamic:
      return "dynamic";
  }
  return "?";
}

const char* Name(ScoringPolicy::Method method) {
  switch (method) {
    case ScoringPolicy::Method::kRecency:
      return "recency";
    case ScoringPolicy::Method::kKeyNorm:
      return "key_norm";
    case ScoringPolicy::Method::kKeyDifference:
      return "key_difference";
    case ScoringPolicy::Method::kWindowQueries:
      return "window_queries";
    case ScoringPolicy::Method::kAccumulated:
      return "accumulated";
    case ScoringPolicy::Method::kBlockBound:
      return "block_bound";
    case ScoringPolicy::Method::kBlockMeanKey:
      return "block_mean_key";
  }
  return "?";
}

const char* Name(ScoringPolicy::QueryReduction reduction) {
  return reduction == ScoringPolicy::QueryReduction::kRootMeanSquare ? "root_mean_square" : "mean";
}

const char* Name(ScoringPolicy::Pooling pooling) {
  return pooling == ScoringPolicy::Pooling::kMax ? "max" : "average";
}

const char* Name(ScoringPolicy::BlockReduction reduction) {
  switch (reduction) {
    case ScoringPolicy::BlockReduction::kMean:
      return "mean";
    case ScoringPolicy::BlockReduction::kSum:
      return "sum";
    case ScoringPolicy::BlockReduction::kMax:
      return "max";
  }
  return "?";
}

const char* Name(BudgetPolicy::Target target) {
  switch (target) {
    case BudgetPolicy::Target::kRatio:
      return "ratio";
    case BudgetPolicy::Target::kTokens:
      return "tokens";
    case BudgetPolicy::Target::kBytes:
      return "bytes";
  }
  return "?";
}

const char* Name(EncodingPolicy::Format format) {
  switch (format) {
    case EncodingPolicy::Format::kAsIs:
      return "as_is";
    case EncodingPolicy::Format::kFloat8E4M3:
      return "fp8_e4m3";
    case EncodingPolicy::Format::kInt8:
      return "int8";
  }
  return "?";
}

const char* Name(const std::optional<ScaleGranularity>& granularity) {
  if (!granularity.has_value()) return "default";
  return *granularity == ScaleGranularity::kHead ? "head" : "token_head";
}

const char* Name(Scope scope) {
  switch (scope) {
    case Scope::kGlobal:
      return "global";
    case Scope::kLayer:
      return "layer";
    case Scope::kLayerHead:
      return "layer_head";
  }
  return "?";
}

// Shortest is not needed, exact is: 17 digits tell all doubles apart. +0 so that -0 equals 0.
std::string Exact(double value) { return absl::StrFormat("%.17g", value + 0.0); }

std::string SegmentationText(const SegmentationPolicy& policy) {
  return absl::StrCat("segmentation{method=", Name(policy.method),
                      " block_size=", policy.block_size, " max_deviation=", policy.max_deviation,
                      " balance=", Exact(policy.balance), " profile=\"",
                      absl::CEscape(policy.profile), "\"}");
}

// The refinement is named only where it is set: most policies have none.
std::string ScoringText(const ScoringPolicy& policy) {
  const std::string refinement =
      policy.refinement_factor == 0 ? ""
                                    : absl::StrCat(" refinement_factor=", policy.refinement_factor);
  return absl::StrCat(
      "scoring{method=", Name(policy.method), " num_window_queries=", policy.num_window_queries,
      " pooling_kernel=", policy.pooling_kernel, " pooling=", Name(policy.pooling),
      " block_reduction=", Name(policy.block_reduction), " lse_base_2=", policy.lse_base_2 ? 1 : 0,
      " softmax_scale=", Exact(policy.softmax_scale),
      " query_reduction=", Name(policy.query_reduction), refinement, "}");
}

std::string BudgetText(const BudgetPolicy& policy) {
  return absl::StrCat("budget{target=", Name(policy.target),
                      " kept_ratio=", Exact(policy.kept_ratio),
                      " tokens_per_head=", policy.tokens_per_head, " bytes=", policy.bytes,
                      " whole_blocks=", policy.whole_blocks ? 1 : 0, "}");
}

std::string ProtectionText(const ProtectionPolicy& policy) {
  std::string text = absl::StrCat("protection{num_sink_tokens=", policy.num_sink_tokens,
                                  " num_recent_tokens=", policy.num_recent_tokens, " pinned=[");
  for (const TokenSpan& span : policy.pinned) {
    absl::StrAppend(&text, "[", span.begin, ",", span.end, ")");
  }
  absl::StrAppend(&text, "] dense_layers=[");
  for (const int32_t layer : policy.dense_layers) absl::StrAppend(&text, layer, ",");
  return absl::StrCat(text, "]}");
}

}  // namespace

std::string CanonicalPolicy(const Policy& policy) {
  const QualityFloor& floor = policy.quality_floor;
  return absl::StrCat(
      "preset=\"", absl::CEscape(policy.preset), "\" ", SegmentationText(policy.segmentation), " ",
      ScoringText(policy.scoring), " ", BudgetText(policy.budget),
      " transform=", policy.transform == Transform::kIndex ? "index" : "evict",
      " encoding{key=", Name(policy.encoding.key), " value=", Name(policy.encoding.value),
      " scale_granularity=", Name(policy.encoding.scale_granularity), "} ",
      ProtectionText(policy.protection), " scope=", Name(policy.scope),
      " positions=", policy.positions == Positions::kOriginal ? "original" : "contiguous",
      " quality_floor{min_retained_attention_mass=", Exact(floor.min_retained_attention_mass),
      " max_output_relative_error=", Exact(floor.max_output_relative_error),
      " max_kept_ratio=", Exact(floor.max_kept_ratio),
      "} allow_fallback=", policy.allow_fallback ? 1 : 0, " page_size=", policy.page_size);
}

}  // namespace dynsplit

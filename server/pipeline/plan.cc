// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/plan.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

// Hashes read memory as it lies, and are defined over little-endian bytes.
static_assert(std::endian::native == std::endian::little);

template <typename T>
void AppendValue(std::string& bytes, T value) {
  char raw[sizeof(T)];
  std::memcpy(raw, &value, sizeof(T));
  bytes.append(raw, sizeof(T));
}

void AppendHash(std::string& bytes, const Hash128& hash) {
  for (const uint8_t byte : hash) bytes.push_back(static_cast<char>(byte));
}

Hash128 HashBytes(const void* data, size_t size_bytes) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, size_bytes));
  Hash128 hash;
  std::memcpy(hash.data(), canonical.digest, hash.size());
  return hash;
}

Hash128 HashInts(const std::vector<int32_t>& values) {
  return HashBytes(values.data(), values.size() * sizeof(int32_t));
}

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

std::string ScoringText(const ScoringPolicy& policy) {
  return absl::StrCat(
      "scoring{method=", Name(policy.method), " num_window_queries=", policy.num_window_queries,
      " pooling_kernel=", policy.pooling_kernel, " pooling=", Name(policy.pooling),
      " block_reduction=", Name(policy.block_reduction), " lse_base_2=", policy.lse_base_2 ? 1 : 0,
      " softmax_scale=", Exact(policy.softmax_scale), "}");
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

absl::Status ValidateStarts(const Segmentation& segmentation, int64_t num_tokens) {
  const std::vector<int32_t>& starts = segmentation.starts;
  if (starts.size() < 2 || starts.front() != 0 || starts.back() != num_tokens) {
    return InvalidField(
        "plan.block_starts",
        absl::StrCat("has ", starts.size(), " entries that do not run from 0 to ", num_tokens));
  }
  for (size_t i = 1; i < starts.size(); ++i) {
    if (starts[i] <= starts[i - 1]) {
      return InvalidField(
          absl::StrCat("plan.block_starts[", i, "]"),
          absl::StrCat("is ", starts[i], "; must be greater than its predecessor ", starts[i - 1]));
    }
  }
  if (!std::binary_search(starts.begin(), starts.end(), segmentation.open_begin)) {
    return InvalidField(
        "plan.open_block_begin",
        absl::StrCat("is ", segmentation.open_begin, "; must be a block start or ", num_tokens));
  }
  return absl::OkStatus();
}

absl::Status ValidateLayerCounts(const Plan& plan, const LayerPlan& layer,
                                 const std::string& field) {
  const int64_t num_tokens = plan.shape.num_tokens;
  if (layer.num_kept < 1 || layer.num_kept > num_tokens) {
    return InvalidField(field + ".num_kept_tokens",
                        absl::StrCat("is ", layer.num_kept, "; must be in [1, ", num_tokens, "]"));
  }
  const bool keeps_all = layer.num_kept == num_tokens;
  const bool must_keep_all = layer.dense || plan.policy.transform == Transform::kIndex;
  if (must_keep_all && !keeps_all) {
    return InvalidField(
        field + ".num_kept_tokens",
        absl::StrCat("is ", layer.num_kept, "; a dense layer keeps all ", num_tokens));
  }
  // A layer that keeps everything has one set for all heads, whatever the scope.
  const int32_t num_groups =
      plan.policy.scope == Scope::kLayerHead && !keeps_all ? plan.shape.num_kv_heads : 1;
  const bool groups_ok =
      layer.groups == num_groups || (keeps_all && layer.groups == plan.shape.num_kv_heads);
  if (!groups_ok) {
    return InvalidField(field + ".num_groups",
                        absl::StrCat("is ", layer.groups, "; must be ", num_groups));
  }
  const auto expected = static_cast<uint64_t>(layer.groups) * static_cast<uint64_t>(layer.num_kept);
  if (layer.kept.size() != expected) {
    return InvalidField(field + ".kept_tokens",
                        absl::StrCat("has ", layer.kept.size(), " entries; must have ", expected));
  }
  return absl::OkStatus();
}

absl::Status ValidateLayer(const Plan& plan, const LayerPlan& layer, const std::string& field) {
  if (auto status = ValidateLayerCounts(plan, layer, field); !status.ok()) return status;
  const auto num_kept = static_cast<size_t>(layer.num_kept);
  for (size_t i = 0; i < layer.kept.size(); ++i) {
    const int32_t least = i % num_kept == 0 ? 0 : layer.kept[i - 1] + 1;
    if (layer.kept[i] < least || layer.kept[i] >= plan.shape.num_tokens) {
      return InvalidField(absl::StrCat(field, ".kept_tokens[", i, "]"),
                          absl::StrCat("is ", layer.kept[i], "; must be in [", least, ", ",
                                       plan.shape.num_tokens, ")"));
    }
  }
  return absl::OkStatus();
}

// The same error with its field under "plan".
absl::Status WithinPlan(const absl::Status& status) {
  const ErrorDetails details = GetErrorDetails(status);
  if (details.kind != "field") return status;
  return InvalidField("plan." + details.subject, details.problem);
}

}  // namespace

std::string ToHex(const Hash128& hash) {
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(hash.data()), hash.size()));
}

Hash128 LayerPlan::Hash() const {
  std::string bytes;
  AppendValue(bytes, layer);
  AppendValue(bytes, groups);
  AppendValue(bytes, num_kept);
  AppendValue(bytes, static_cast<uint8_t>(dense ? 1 : 0));
  AppendHash(bytes, HashInts(kept));
  return HashBytes(bytes.data(), bytes.size());
}

PlanHasher::PlanHasher(const SequenceShape& shape, const Policy& policy,
                       const Segmentation& segmentation) {
  AppendValue(bytes_, shape.num_layers);
  AppendValue(bytes_, shape.num_query_heads);
  AppendValue(bytes_, shape.num_kv_heads);
  AppendValue(bytes_, shape.num_tokens);
  AppendValue(bytes_, shape.head_dim);
  const std::string policy_text = CanonicalPolicy(policy);
  AppendValue(bytes_, static_cast<uint64_t>(policy_text.size()));
  bytes_ += policy_text;
  AppendValue(bytes_, kPolicyVersion);
  AppendValue(bytes_, static_cast<uint64_t>(segmentation.starts.size()));
  AppendHash(bytes_, HashInts(segmentation.starts));
}

void PlanHasher::Add(const LayerPlan& layer) { AppendHash(bytes_, layer.Hash()); }

Hash128 PlanHasher::Finish() const { return HashBytes(bytes_.data(), bytes_.size()); }

Hash128 HashPlan(const Plan& plan) {
  PlanHasher hasher(plan.shape, plan.policy, plan.segmentation);
  for (const LayerPlan& layer : plan.layers) hasher.Add(layer);
  return hasher.Finish();
}

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

std::string RepresentationSalt(const Policy& policy, const Hash128& plan_hash, bool lossless) {
  if (lossless) return "";
  std::string bytes = CanonicalPolicy(policy);
  AppendHash(bytes, plan_hash);
  return absl::StrCat("dynsplit-", kPolicyVersion, "-",
                      ToHex(HashBytes(bytes.data(), bytes.size())));
}

absl::Status ValidatePlan(const Plan& plan) {
  if (auto status = ValidateShape(plan.shape); !status.ok()) return WithinPlan(status);
  // Whether keys can be turned is judged with the request, which carries the frequencies: here any
  // valid embedding will do.
  const Rope any_rope = {.rotary_dim = 2, .interleaved = false, .inverse_frequencies = {1.0}};
  if (auto status = ValidatePolicy(plan.policy, plan.shape, &any_rope); !status.ok()) {
    return WithinPlan(status);
  }
  if (plan.policy_version != kPolicyVersion) {
    return InvalidField("plan.policy_version",
                        absl::StrCat("is ", plan.policy_version, "; this server executes plans of ",
                                     kPolicyVersion));
  }
  if (auto status = ValidateStarts(plan.segmentation, plan.shape.num_tokens); !status.ok()) {
    return status;
  }
  int32_t previous = -1;
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    const LayerPlan& layer = plan.layers[i];
    const std::string field = absl::StrCat("plan.layers[", i, "]");
    if (layer.layer <= previous || layer.layer >= plan.shape.num_layers) {
      return InvalidField(field + ".layer",
                          absl::StrCat("is ", layer.layer, "; must be ascending and in [0, ",
                                       plan.shape.num_layers, ")"));
    }
    previous = layer.layer;
    if (auto status = ValidateLayer(plan, layer, field); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/plan.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
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

void PlanHasher::Add(const Hash128& layer) { AppendHash(bytes_, layer); }

Hash128 PlanHasher::Finish() const { return HashBytes(bytes_.data(), bytes_.size()); }

Hash128 HashPlan(const Plan& plan) {
  PlanHasher hasher(plan.shape, plan.policy, plan.segmentation);
  for (const LayerPlan& layer : plan.layers) hasher.Add(layer);
  return hasher.Finish();
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

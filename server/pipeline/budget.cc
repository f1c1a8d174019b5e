// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/budget.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

int64_t CeilDiv(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// No epsilon: the product of a caller's double is the very expression that reference
// implementations truncate.
int64_t ShareOf(int64_t total, double ratio) {
  const auto share = static_cast<int64_t>(std::floor(static_cast<double>(total) * ratio));
  return std::clamp<int64_t>(share, 1, total);
}

bool IsDense(const Policy& policy, int32_t layer) {
  const auto& dense_layers = policy.protection.dense_layers;
  return policy.transform == Transform::kIndex ||
         std::binary_search(dense_layers.begin(), dense_layers.end(), layer);
}

// Tokens whose pages fit into this layer's share of the bytes target.
absl::StatusOr<int64_t> TokensForBytes(const Policy& policy, const SequenceShape& shape,
                                       const OutputCost& cost) {
  const auto num_dense = static_cast<int64_t>(policy.protection.dense_layers.size());
  const int64_t num_sparse = shape.num_layers - num_dense;
  const int64_t dense_bytes =
      num_dense *
      (cost.bytes_per_layer + CeilDiv(shape.num_tokens, policy.page_size) * cost.bytes_per_page);
  const int64_t least_bytes =
      dense_bytes + num_sparse * (cost.bytes_per_layer + cost.bytes_per_page);
  if (policy.budget.bytes < least_bytes) {
    return InvalidField("policy.budget.bytes",
                        absl::StrCat("is ", policy.budget.bytes, "; must be at least ", least_bytes,
                                     ": ", num_dense, " dense layers and one page of ",
                                     policy.page_size, " slots in each of the other ", num_sparse));
  }
  const int64_t layer_bytes = (policy.budget.bytes - dense_bytes) / num_sparse;
  const int64_t num_pages = (layer_bytes - cost.bytes_per_layer) / cost.bytes_per_page;
  if (num_pages >= CeilDiv(shape.num_tokens, policy.page_size)) return shape.num_tokens;
  return num_pages * policy.page_size;
}

}  // namespace

std::vector<uint8_t> ProtectedTokens(const Policy& policy, const SequenceShape& shape,
                                     const Segmentation& segmentation, int64_t num_window_queries) {
  const int64_t num_tokens = shape.num_tokens;
  std::vector<uint8_t> flags(static_cast<size_t>(num_tokens), 0);
  const auto protect = [&flags](int64_t begin, int64_t end) {
    std::fill(flags.begin() + begin, flags.begin() + end, uint8_t{1});
  };
  const ProtectionPolicy& protection = policy.protection;
  protect(0, std::min(protection.num_sink_tokens, num_tokens));
  const int64_t num_recent =
      std::min(std::max(protection.num_recent_tokens, num_window_queries), num_tokens);
  protect(num_tokens - num_recent, num_tokens);
  for (const TokenSpan& span : protection.pinned) protect(span.begin, span.end);
  if (policy.segmentation.method == SegmentationPolicy::Method::kDynamic &&
      policy.transform == Transform::kEvict) {
    protect(segmentation.open_begin, num_tokens);
  }
  return flags;
}

absl::StatusOr<LayerBudget> BudgetForLayer(const Policy& policy, const SequenceShape& shape,
                                           int32_t layer, int64_t num_blocks, int64_t num_protected,
                                           const OutputCost& cost) {
  LayerBudget budget;
  if (IsDense(policy, layer)) {
    budget.num_kept = shape.num_tokens;
    budget.dense = true;
    return budget;
  }
  if (policy.budget.whole_blocks) {
    budget.num_whole_blocks = ShareOf(num_blocks, policy.budget.kept_ratio);
    return budget;
  }
  switch (policy.budget.target) {
    case BudgetPolicy::Target::kRatio:
      budget.num_kept = ShareOf(shape.num_tokens, policy.budget.kept_ratio);
      break;
    case BudgetPolicy::Target::kTokens:
      budget.num_kept = std::min(policy.budget.tokens_per_head, shape.num_tokens);
      break;
    case BudgetPolicy::Target::kBytes: {
      const absl::StatusOr<int64_t> num_kept = TokensForBytes(policy, shape, cost);
      if (!num_kept.ok()) return num_kept.status();
      budget.num_kept = *num_kept;
      break;
    }
  }
  if (budget.num_kept < num_protected) {
    budget.num_kept = num_protected;
    budget.raised_by_protection = true;
  }
  return budget;
}

}  // namespace dynsplit

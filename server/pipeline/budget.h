// SPDX-License-Identifier: Apache-2.0
//
// Stage 3, how much stays: policy and shape -> tokens (or whole blocks) a layer keeps, and which
// tokens are protected. Pure functions.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "server/pipeline/policy.h"
#include "server/pipeline/segmentation.h"
#include "server/pipeline/types.h"

namespace dynsplit {

struct LayerBudget {
  int64_t num_kept = 0;          // tokens per KV head; 0 in whole-block mode
  int64_t num_whole_blocks = 0;  // 0 in exact mode
  bool dense = false;            // everything stays
  bool raised_by_protection = false;
  bool operator==(const LayerBudget&) const = default;
};

// [T] flags, 1 = kept whatever its score: sinks, recent tokens (at least `num_window_queries`),
// pinned spans, and the open block of a dynamic segmentation that is to be evicted from.
std::vector<uint8_t> ProtectedTokens(const Policy& policy, const SequenceShape& shape,
                                     const Segmentation& segmentation, int64_t num_window_queries);

// Budget of `layer`. `token_bytes` is what one kept token of one KV head costs in the output (K + V
// + its share of scales), used by the bytes target, which is spread evenly over the layers that are
// not dense. INVALID_ARGUMENT if a bytes target is smaller than the dense layers plus one token a
// head.
absl::StatusOr<LayerBudget> BudgetForLayer(const Policy& policy, const SequenceShape& shape,
                                           int32_t layer, int64_t num_blocks, int64_t num_protected,
                                           double token_bytes);

}  // namespace dynsplit

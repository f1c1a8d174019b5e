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
  bool dense = false;            // everything stays: a dense layer, or the index transform
  bool raised_by_protection = false;
  bool operator==(const LayerBudget&) const = default;
};

// [T] flags, 1 = kept whatever its score: sinks, recent tokens (at least `num_window_queries`),
// pinned spans, and the open block of a dynamic segmentation that is to be evicted from.
std::vector<uint8_t> ProtectedTokens(const Policy& policy, const SequenceShape& shape,
                                     const Segmentation& segmentation, int64_t num_window_queries);

// What a layer's K and V cost in the output, scales included: bytes_per_layer + num_pages *
// bytes_per_page. Both > 0 but for bytes_per_layer, which is 0 unless scales are per head.
struct OutputCost {
  int64_t bytes_per_layer = 0;
  int64_t bytes_per_page = 0;
};

// Budget of `layer`. A bytes target pays for the dense layers first and spreads the rest evenly
// over the others, in whole pages. INVALID_ARGUMENT if it is smaller than the dense layers plus one
// page in each other layer. In whole-block mode protection is left to the selection, which keeps
// every block that holds a protected token.
absl::StatusOr<LayerBudget> BudgetForLayer(const Policy& policy, const SequenceShape& shape,
                                           int32_t layer, int64_t num_blocks, int64_t num_protected,
                                           const OutputCost& cost);

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// Column means of softmax attention: what a key receives from a set of query rows. ScoreWindow and
// ScoreBlocks are this with different keys.
#pragma once

#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "server/cpu/operations.h"
#include "server/cpu/row_blocks.h"

namespace dynsplit::cpu {

struct AttentionMeansParams {
  const RowBlocks& rows;
  int64_t num_keys = 0;
  int32_t depth = 0;
  // Writes keys [begin, end) that the rows of `set` attend to: [end - begin, depth].
  absl::FunctionRef<void(int64_t set, int64_t begin, int64_t end, float* out)> load_keys;
  // Key t has position t and is seen by rows whose limit is >= t. False: all keys are seen.
  bool causal = true;
  const float* key_weights = nullptr;  // [num_keys] multiplicity in the denominator; null = 1
  // Log-sum-exp of row (set, row); null = computed.
  const absl::FunctionRef<float(int64_t set, int64_t row)>* lse = nullptr;
  float row_weight = 1;   // factor of every softmax
  bool squares = false;   // add squares of row_weight * softmax instead
  float* sums = nullptr;  // out [num_sets, num_keys]: sum over rows of row_weight * softmax
};
absl::Status AttentionMeans(const AttentionMeansParams& params, const Workspace& workspace);

}  // namespace dynsplit::cpu

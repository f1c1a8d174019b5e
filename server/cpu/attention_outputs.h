// SPDX-License-Identifier: Apache-2.0
//
// Softmax attention of row blocks over a stretch of keys, as partial results that combine exactly:
// a maximum, sums of exponentials relative to it, and weighted values. MeasureAttention,
// MeasureSpans and AttendTokens are made of these.
#pragma once

#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "server/cpu/operations.h"
#include "server/cpu/row_blocks.h"

namespace dynsplit::cpu {

// Result of one row block: arrays of `columns` floats.
struct AttentionResult {
  const float* max = nullptr;      // of the logits
  const float* sum = nullptr;      // of exponentials relative to max
  const float* partial[3] = {};    // the partial sums of the params
  const float* outputs = nullptr;  // [D, columns], not yet divided by sum; null without values
};

struct AttentionOutputsParams {
  const RowBlocks& rows;  // set = KV head
  int64_t num_keys = 0;   // a head
  int32_t head_dim = 0;
  bool with_values = false;  // else sums only
  // Writes keys [begin, end) of a head and, with values, theirs: [end - begin, head_dim] each.
  absl::FunctionRef<void(int32_t head, int64_t begin, int64_t end, float* keys, float* values)>
      load;
  const int32_t* positions = nullptr;  // of key t of KV head h: positions[h * stride + t];
  int64_t positions_stride = 0;        // null = t. Ascending.
  // Partial sum 0 takes key t of head h with weight key_weights[h * stride + t].
  const float* key_weights = nullptr;
  int64_t key_weights_stride = 0;
  // Or, where set, partial sum n takes the keys a row sees at positions in [begin, end).
  struct Range {
    int32_t begin = 0;
    int32_t end = 0;
  };
  const absl::FunctionRef<Range(int n, int64_t row)>* partial_ranges = nullptr;
};
// Calls finish(index of the row block, its result) once for each block, perhaps at the same time.
absl::Status AttentionOutputs(const AttentionOutputsParams& params, const Workspace& workspace,
                              absl::FunctionRef<void(int64_t, const AttentionResult&)> finish);

}  // namespace dynsplit::cpu

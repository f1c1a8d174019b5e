// SPDX-License-Identifier: Apache-2.0
//
// What scoring by queries has in common: softmax of query rows over items (keys, or blocks), and
// the mean weight each item gets.
//
//   logit[i,a,n] = scale * (q . items[n])                      without items_low
//                = scale * sum_c max(q_c items[n]_c, q_c items_low[n]_c), items >= items_low
//   p[i,a,n]     = exp(logit) / sum over visible n of length_n * exp(logit)
//   out[.., n]   = factor * sum over i (and the group's heads, unless per_query_head) of
//                  p[i,a,n]^power
//
// A power is one of the exponent: twice the logit less twice the log-sum-exp, at no cost.
// The second form is a product of twice the channels: max(q,0) . items + min(q,0) . items_low.
//
// Two passes: the rows' log-sum-exp, then column sums. Logits are computed twice and never stored.
// Row r of KV head h is head h * group + r / window_padded, query r % window_padded.
#pragma once

#include <algorithm>
#include <cstdint>

#include "absl/status/status.h"
#include "cuda/operations.h"
#include "server/pipeline/types.h"

namespace dynsplit::kernels {

struct ColumnSoftmax {
  TensorView queries;                     // [W, Hq, D]
  TensorView items;                       // [N, Hkv, D]
  TensorView items_low;                   // same shape and type as items; data null = first form
  const int32_t* block_starts = nullptr;  // [N + 1], lengths; null = 1 each
  bool causal = false;                    // query i sees items n <= N - W + i; else all
  int64_t num_columns = 0;                // only columns n < num_columns are written
  bool per_query_head = false;
  float softmax_scale = 0;
  const float* lse = nullptr;  // [W, Hq] natural log of the denominators; null = computed
  float power = 1;             // of the weights that are summed
  float factor = 1;
  float* out = nullptr;  // [Hkv, N], or [Hq, N] per query head
};

// What both implementations choose from; plain numbers.
struct ColumnShape {
  int64_t num_items = 0;
  int64_t num_columns = 0;
  int32_t num_kv_heads = 0;
  int32_t group = 0;   // query heads a KV head
  int32_t window = 0;  // queries
  int32_t depth = 0;   // channels of the product: D or 2 D
};
ColumnShape ShapeOf(const ColumnSoftmax& op);

// Tensor cores: rows in tiles of 16, channels in steps of 32.
struct MmaConfig {
  int steps = 0;             // of 32 channels: 2, 4 or 8
  int row_tiles = 0;         // of 16 rows (or items) a warp holds in registers: 2, or 1 for 8 steps
  int window_padded = 0;     // multiple of 16
  int rows = 0;              // group * window_padded
  int warps_along_rows = 0;  // log-sum-exp pass: 1, 2, 4 or 8 of the block's 8 warps
  int row_blocks = 0;
  int splits = 0;          // of the items, log-sum-exp pass
  int rows_per_stage = 0;  // column pass: query rows in shared memory at a time
  int column_blocks = 0;   // column pass: thread blocks a KV head

  int warps_along_items() const { return 8 / warps_along_rows; }
  int num_partials() const { return splits * warps_along_items(); }
};
inline constexpr int kMmaMaxDepth = 256;
MmaConfig ChooseMmaConfig(const ColumnShape& shape, int num_sms);

// Any types and depth, fp32 arithmetic.
struct SimtConfig {
  int rows = 0;  // group * window
  int depth_padded = 0;
  int splits = 0;
};
SimtConfig ChooseSimtConfig(const ColumnShape& shape, int num_sms);

// True if the tensor cores take it: 16-bit items and queries of one type, depth <= kMmaMaxDepth.
bool UsesTensorCores(const ColumnSoftmax& op);

// True if warpgroups take it, which is faster where they do: Hopper, the first form without
// lengths, summed over the group, aligned rows of 64 or 128 channels.
bool UsesGroupMma(const ColumnSoftmax& op);

absl::Status RunColumnSoftmax(const ColumnSoftmax& op, const Launch& launch);
absl::Status RunColumnSoftmaxGroup(const ColumnSoftmax& op, const Launch& launch);
absl::Status RunColumnSoftmaxMma(const ColumnSoftmax& op, const Launch& launch);
absl::Status RunColumnSoftmaxSimt(const ColumnSoftmax& op, const Launch& launch);

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// Both variants are a softmax of dot products. The bound is one of twice the depth: where max >=
// min, max(q * max, q * min) = q+ * max + q- * min with q+ = max(q, 0), q- = min(q, 0).
#include <algorithm>
#include <utility>

#include "server/cpu/attention_means.h"
#include "server/cpu/decode.h"
#include "server/cpu/operations.h"
#include "server/cpu/row_blocks.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {

absl::Status ScoreBlocks(const ScoreBlocksParams& params, const Workspace& workspace) {
  const TensorView& queries = params.queries;
  const int32_t head_dim = queries.head_dim;
  const int32_t group = queries.num_heads / params.num_kv_heads;
  const bool bound = params.mean == nullptr;
  const int32_t depth = bound ? 2 * head_dim : head_dim;
  const auto summary = [&](const void* base) {
    return DenseView(base, params.dtype, params.num_blocks, params.num_kv_heads, head_dim);
  };

  auto lengths = workspace.Scratch<float>(params.num_blocks);
  if (!lengths.ok()) return lengths.status();
  for (int64_t j = 0; j < params.num_blocks; ++j) {
    lengths->as<float>()[j] =
        static_cast<float>(params.block_starts[j + 1] - params.block_starts[j]);
  }
  const auto load_query = [&](int64_t set, int64_t row, float* out) {
    const int64_t i = QueryOfRow(row, queries.num_tokens);
    const auto a = static_cast<int32_t>(set * group + GroupHeadOfRow(row, queries.num_tokens));
    DecodeRow(queries.dtype, RowAddress(queries, i, a), RowScale(queries, i, a), head_dim, out);
    for (int32_t c = 0; c < head_dim; ++c) {
      const float q = out[c] * params.softmax_scale;
      out[c] = bound ? std::max(q, 0.0F) : q;
      if (bound) out[head_dim + c] = std::min(q, 0.0F);
    }
  };
  const auto limit = [](int64_t /*row*/) { return int32_t{0}; };
  auto rows = RowBlocks::Create({.num_sets = params.num_kv_heads,
                                 .rows_per_set = queries.num_tokens * group,
                                 .depth = depth,
                                 .load = load_query,
                                 .limit = limit},
                                workspace);
  if (!rows.ok()) return rows.status();
  const auto load_keys = [&](int64_t set, int64_t begin, int64_t end, float* out) {
    const auto head = static_cast<int32_t>(set);
    DecodeTile(summary(bound ? params.max : params.mean), head, begin, end, depth, out);
    if (bound) DecodeTile(summary(params.min), head, begin, end, depth, out + head_dim);
  };
  return AttentionMeans({.rows = *rows,
                         .num_keys = params.num_blocks,
                         .depth = depth,
                         .load_keys = load_keys,
                         .causal = false,
                         .key_weights = lengths->as<float>(),
                         .row_weight = 1.0F / static_cast<float>(queries.num_tokens),
                         .sums = params.block_scores},
                        workspace);
}

}  // namespace dynsplit::cpu

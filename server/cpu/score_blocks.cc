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
namespace {

// One of the summaries as a tensor of blocks.
TensorView SummaryView(const ScoreBlocksItem& item, int32_t num_kv_heads, const std::byte* data) {
  TensorView view =
      DenseView(data, item.summaries.dtype, item.num_blocks, num_kv_heads, item.queries.head_dim);
  view.token_stride_bytes = item.summaries.block_stride_bytes;
  view.head_stride_bytes = item.summaries.head_stride_bytes;
  return view;
}

absl::Status ScoreItem(const ScoreBlocksItem& item, const ScoreBlocksParams& params,
                       const Workspace& workspace) {
  const TensorView& queries = item.queries;
  const BlockSummaries& summaries = item.summaries;
  const int32_t head_dim = queries.head_dim;
  const int32_t group = queries.num_heads / params.num_kv_heads;
  const bool bound = summaries.min != nullptr;
  const int32_t depth = bound ? 2 * head_dim : head_dim;

  auto lengths = workspace.Scratch<float>(item.num_blocks);
  if (!lengths.ok()) return lengths.status();
  for (int64_t j = 0; j < item.num_blocks; ++j) {
    lengths->as<float>()[j] = static_cast<float>(item.block_starts[j + 1] - item.block_starts[j]);
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
  const auto load = [&](const std::byte* data, const float* scales, int64_t set, int64_t begin,
                        int64_t end, float* out) {
    const auto head = static_cast<int32_t>(set);
    const TensorView view = SummaryView(item, params.num_kv_heads, data);
    if (scales == nullptr) return DecodeTile(view, head, begin, end, depth, out);
    for (int64_t j = begin; j < end; ++j, out += depth) {
      DecodeRow(view.dtype, RowAddress(view, j, head),
                scales[set * summaries.scale_head_stride + j], head_dim, out);
    }
  };
  const auto load_keys = [&](int64_t set, int64_t begin, int64_t end, float* out) {
    if (!bound) return load(summaries.mean, summaries.mean_scales, set, begin, end, out);
    load(summaries.max, summaries.bound_scales, set, begin, end, out);
    load(summaries.min, summaries.bound_scales, set, begin, end, out + head_dim);
  };
  return AttentionMeans({.rows = *rows,
                         .num_keys = item.num_blocks,
                         .depth = depth,
                         .load_keys = load_keys,
                         .causal = false,
                         .key_weights = lengths->as<float>(),
                         .row_weight = 1.0F / static_cast<float>(queries.num_tokens),
                         .sums = item.block_scores},
                        workspace);
}

}  // namespace

absl::Status ScoreBlocks(const ScoreBlocksParams& params, const Workspace& workspace) {
  for (const ScoreBlocksItem& item : params.items) {
    if (auto status = ScoreItem(item, params, workspace); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

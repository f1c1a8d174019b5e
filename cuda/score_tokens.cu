// SPDX-License-Identifier: Apache-2.0
//
// Tokens are blocks of one token whose keys are their summaries: the tile kernel of ScoreBlocks
// reads them where they lie. Rows that it does not take are gathered, and scored by columns.
#include <vector>

#include "cuda/column_softmax.h"
#include "cuda/operations.h"
#include "cuda/score_blocks.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

ScoreTileItem TileItem(const ScoreTokensItem& item, int32_t groups) {
  const TensorView& keys = item.keys;
  const bool by_token = keys.scale_granularity == ScaleGranularity::kTokenHead;
  return {.queries = item.queries,
          .rows = keys.data,
          .high = nullptr,
          .row_stride_bytes = keys.token_stride_bytes,
          .head_stride_bytes = keys.head_stride_bytes,
          .places = item.tokens,
          .places_per_head = groups > 1,
          .scales = keys.scales,
          .scale_row_stride = by_token ? keys.num_heads : 0,
          .scale_head_stride = 1,
          .block_starts = nullptr,
          .num_rows = item.num_tokens,
          .scores = item.token_scores};
}

// Whether the items agree in what ScoreTiles takes as common.
bool ShareStrides(const ScoreTokensItem& a, const ScoreTokensItem& b) {
  return a.queries.token_stride_bytes == b.queries.token_stride_bytes &&
         a.queries.head_stride_bytes == b.queries.head_stride_bytes &&
         a.keys.token_stride_bytes == b.keys.token_stride_bytes &&
         a.keys.scale_granularity == b.keys.scale_granularity;
}

absl::Status ScoreByColumns(const ScoreTokensItem& item, const ScoreTokensParams& params,
                            const Launch& launch) {
  if (item.num_tokens == 0) return absl::OkStatus();
  const int64_t heads = item.keys.num_heads;
  const int64_t row_bytes = item.keys.head_dim * DTypeBytes(item.keys.dtype);
  TensorView keys = item.keys;
  keys.num_tokens = item.num_tokens;
  Buffer rows;
  Buffer scales;
  if (item.tokens != nullptr) {
    const bool by_token = keys.scale_granularity == ScaleGranularity::kTokenHead;
    absl::StatusOr<Buffer> row_memory = launch.Scratch(item.num_tokens * heads * row_bytes);
    if (!row_memory.ok()) return row_memory.status();
    rows = *std::move(row_memory);
    if (keys.scales != nullptr) {
      absl::StatusOr<Buffer> scale_memory = launch.Scratch(
          (by_token ? item.num_tokens : 1) * heads * static_cast<int64_t>(sizeof(float)));
      if (!scale_memory.ok()) return scale_memory.status();
      scales = *std::move(scale_memory);
    }
    const GatherPagesItem gather = {.source = item.keys,
                                    .kept = item.tokens,
                                    .groups = params.groups,
                                    .num_kept = item.num_tokens,
                                    .page_size = 1,
                                    .format = EncodingPolicy::Format::kAsIs,
                                    .scale_granularity = keys.scale_granularity,
                                    .out_dtype = keys.dtype,
                                    .rotation = {},
                                    .pages = rows.data(),
                                    .scales = scales.as<float>()};
    if (absl::Status status = GatherPages({.items = {&gather, 1}}, launch); !status.ok()) {
      return status;
    }
    const ScaleGranularity granularity = keys.scale_granularity;
    keys = DenseView(rows.data(), keys.dtype, item.num_tokens, keys.num_heads, keys.head_dim);
    keys.scales = scales.as<float>();
    keys.scale_granularity = granularity;
  }
  ColumnSoftmax op;
  op.queries = item.queries;
  op.items = keys;
  op.num_columns = item.num_tokens;
  op.softmax_scale = params.softmax_scale;
  op.factor = 1.0F / static_cast<float>(item.queries.num_tokens);
  op.out = item.token_scores;
  return RunColumnSoftmax(op, launch);
}

}  // namespace

absl::Status ScoreTokens(const ScoreTokensParams& params, const Launch& launch) {
  if (params.items.empty()) return absl::OkStatus();
  const ScoreTokensItem& like = params.items[0];
  const int32_t heads = like.keys.num_heads;
  ScoreShape shape = {
      .query_dtype = like.queries.dtype,
      .summary_dtype = like.keys.dtype,
      .head_dim = like.queries.head_dim,
      .num_kv_heads = heads,
      .rows = static_cast<int32_t>(like.queries.num_heads / heads * like.queries.num_tokens),
      .aligned = true};
  std::vector<ScoreTileItem> items;
  for (const ScoreTokensItem& item : params.items) {
    items.push_back(TileItem(item, params.groups));
    shape.aligned = shape.aligned && item.keys.block_table == nullptr &&
                    HasAlignedRows(items.back()) && ShareStrides(item, like);
  }
  if (UsesScoreTiles(shape)) return ScoreTiles(items, shape, params.softmax_scale, launch);
  for (const ScoreTokensItem& item : params.items) {
    if (absl::Status status = ScoreByColumns(item, params, launch); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::kernels

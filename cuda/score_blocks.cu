// SPDX-License-Identifier: Apache-2.0
#include "cuda/column_softmax.h"
#include "cuda/operations.h"

namespace dynsplit::kernels {
namespace {

// Summaries are dense.
TensorView SummaryView(const ScoreBlocksParams& params, const void* data) {
  const int64_t row_bytes = params.queries.head_dim * DTypeBytes(params.dtype);
  TensorView view;
  view.data = static_cast<const std::byte*>(data);
  view.dtype = params.dtype;
  view.num_tokens = params.num_blocks;
  view.num_heads = params.num_kv_heads;
  view.head_dim = params.queries.head_dim;
  view.token_stride_bytes = row_bytes * params.num_kv_heads;
  view.head_stride_bytes = row_bytes;
  return view;
}

}  // namespace

absl::Status ScoreBlocks(const ScoreBlocksParams& params, const Launch& launch) {
  ColumnSoftmax op;
  op.queries = params.queries;
  op.items = SummaryView(params, params.mean != nullptr ? params.mean : params.max);
  op.items_low = SummaryView(params, params.mean != nullptr ? nullptr : params.min);
  op.block_starts = params.block_starts;
  op.num_columns = params.num_blocks;
  op.softmax_scale = params.softmax_scale;
  op.factor = 1.0F / static_cast<float>(params.queries.num_tokens);
  op.out = params.block_scores;
  return RunColumnSoftmax(op, launch);
}

}  // namespace dynsplit::kernels

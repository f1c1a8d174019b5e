// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "cuda/column_softmax.h"
#include "cuda/cuda_status.h"
#include "cuda/operations.h"
#include "cuda/score_blocks.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;

// Bound variant, or means.
bool IsBound(const ScoreBlocksItem& item) { return item.summaries.min != nullptr; }

ScoreTileItem TileItem(const ScoreBlocksItem& item) {
  const BlockSummaries& s = item.summaries;
  const bool bound = IsBound(item);
  return {.queries = item.queries,
          .rows = bound ? s.min : s.mean,
          .high = bound ? s.max : nullptr,
          .row_stride_bytes = s.block_stride_bytes,
          .head_stride_bytes = s.head_stride_bytes,
          .scales = bound ? s.bound_scales : s.mean_scales,
          .scale_row_stride = 1,
          .scale_head_stride = s.scale_head_stride,
          .block_starts = item.block_starts,
          .num_rows = item.num_blocks,
          .scores = item.block_scores};
}

// [Hkv, stride] -> [B, Hkv], as a TensorView has its scales.
__global__ void __launch_bounds__(kThreads)
    TransposeScalesKernel(const float* scales, int64_t stride, int heads, int64_t count,
                          float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = scales[i % heads * stride + i / heads];
}

absl::Status ScoreByColumns(const ScoreBlocksParams& params, const ScoreBlocksItem& item,
                            const Launch& launch) {
  if (item.num_blocks == 0) return absl::OkStatus();
  const BlockSummaries& s = item.summaries;
  const bool bound = IsBound(item);
  Buffer scales;
  if (s.dtype == DType::kFloat8E4M3) {
    const int64_t count = item.num_blocks * params.num_kv_heads;
    absl::StatusOr<Buffer> scratch = launch.Scratch(count * static_cast<int64_t>(sizeof(float)));
    if (!scratch.ok()) return scratch.status();
    scales = *std::move(scratch);
    TransposeScalesKernel<<<static_cast<unsigned>(CeilDiv(count, kThreads)), kThreads, 0,
                            launch.stream>>>(bound ? s.bound_scales : s.mean_scales,
                                             s.scale_head_stride, params.num_kv_heads, count,
                                             scales.as<float>());
    if (absl::Status status = LaunchStatus("TransposeScalesKernel"); !status.ok()) return status;
  }
  const auto rows_of = [&](const std::byte* data) {
    TensorView view;
    view.data = data;
    view.dtype = s.dtype;
    view.num_tokens = item.num_blocks;
    view.num_heads = params.num_kv_heads;
    view.head_dim = item.queries.head_dim;
    view.token_stride_bytes = s.block_stride_bytes;
    view.head_stride_bytes = s.head_stride_bytes;
    view.scales = scales.as<float>();
    view.scale_granularity = ScaleGranularity::kTokenHead;
    return view;
  };
  ColumnSoftmax op;
  op.queries = item.queries;
  op.items = rows_of(bound ? s.max : s.mean);
  op.items_low = rows_of(bound ? s.min : nullptr);
  op.block_starts = item.block_starts;
  op.num_columns = item.num_blocks;
  op.softmax_scale = params.softmax_scale;
  op.factor = 1.0F / static_cast<float>(item.queries.num_tokens);
  op.out = item.block_scores;
  return RunColumnSoftmax(op, launch);
}

}  // namespace

absl::Status ScoreBlocks(const ScoreBlocksParams& params, const Launch& launch) {
  if (params.items.empty()) return absl::OkStatus();
  const TensorView& queries = params.items[0].queries;
  ScoreShape shape = {
      .query_dtype = queries.dtype,
      .summary_dtype = params.items[0].summaries.dtype,
      .head_dim = queries.head_dim,
      .num_kv_heads = params.num_kv_heads,
      .rows = static_cast<int32_t>(queries.num_heads / params.num_kv_heads * queries.num_tokens),
      .aligned = true};
  std::vector<ScoreTileItem> items;
  for (const ScoreBlocksItem& item : params.items) {
    items.push_back(TileItem(item));
    shape.aligned = shape.aligned && HasAlignedRows(items.back());
  }
  if (UsesScoreTiles(shape)) return ScoreTiles(items, shape, params.softmax_scale, launch);
  for (const ScoreBlocksItem& item : params.items) {
    if (absl::Status status = ScoreByColumns(params, item, launch); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::kernels

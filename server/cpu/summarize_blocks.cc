// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <utility>

#include "server/cpu/decode.h"
#include "server/cpu/encode_bounds.h"
#include "server/cpu/operations.h"
#include "server/cpu/row_math.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {

constexpr int64_t kTileFloats = 4096;  // decoded at a time: stays in the first-level cache
constexpr int64_t kBlocksPerChunk = 16;

struct Fold {
  int64_t tile_rows;
  float* rows;  // [tile_rows, D]
  float* min;
  float* max;
  float* sum;
};

// Where row `block` of a head lies behind a pointer of the summaries.
int64_t RowOffset(const BlockSummaries& s, int64_t block, int32_t head) {
  return block * s.block_stride_bytes + head * s.head_stride_bytes;
}

void AddPositiveZero(float* values, int64_t count) {  // -0 becomes +0
  for (int64_t c = 0; c < count; ++c) values[c] += 0.0F;
}

void StoreBounds(const SummarizeBlocksParams& p, int64_t block, int32_t head, const Fold& fold) {
  const BlockSummaries& s = p.summaries;
  const int64_t dim = p.keys.head_dim;
  float scale = 1;
  if (s.dtype == DType::kFloat8E4M3) {
    scale = BoundScale(std::max(LargestMagnitude(fold.min, dim), LargestMagnitude(fold.max, dim)));
    s.bound_scales[head * s.scale_head_stride + block] = scale;
  }
  AddPositiveZero(fold.min, dim);
  AddPositiveZero(fold.max, dim);
  const int64_t offset = RowOffset(s, block, head);
  EncodeBounds(s.dtype, Rounding::kDown, fold.min, scale, dim, s.min + offset);
  EncodeBounds(s.dtype, Rounding::kUp, fold.max, scale, dim, s.max + offset);
}

void StoreMean(const SummarizeBlocksParams& p, int64_t block, int32_t head, const Fold& fold) {
  const BlockSummaries& s = p.summaries;
  const int64_t dim = p.keys.head_dim;
  const auto length = static_cast<float>(p.block_starts[block + 1] - p.block_starts[block]);
  for (int64_t c = 0; c < dim; ++c) fold.sum[c] /= length;
  float scale = 1;
  if (s.dtype == DType::kFloat8E4M3) {
    scale = BoundScale(LargestMagnitude(fold.sum, dim));
    s.mean_scales[head * s.scale_head_stride + block] = scale;
  }
  EncodeRow(s.dtype, fold.sum, scale, dim, s.mean + RowOffset(s, block, head));
}

void SummarizeBlock(const SummarizeBlocksParams& p, int64_t block, int32_t head, const Fold& fold) {
  const int64_t dim = p.keys.head_dim;
  const int64_t begin = p.block_starts[block];
  const int64_t end = p.block_starts[block + 1];
  const bool bounds = p.summaries.min != nullptr;
  const bool mean = p.summaries.mean != nullptr;
  std::fill(fold.min, fold.min + dim, std::numeric_limits<float>::infinity());
  std::fill(fold.max, fold.max + dim, -std::numeric_limits<float>::infinity());
  std::fill(fold.sum, fold.sum + dim, 0.0F);
  for (int64_t t = begin; t < end; t += fold.tile_rows) {
    const int64_t last = std::min(t + fold.tile_rows, end);
    DecodeTile(p.keys, head, t, last, dim, fold.rows);
    FoldRows({.rows = fold.rows,
              .num_rows = last - t,
              .count = dim,
              .min = bounds ? fold.min : nullptr,
              .max = bounds ? fold.max : nullptr,
              .sum = mean ? fold.sum : nullptr});
  }
  if (bounds) StoreBounds(p, block, head, fold);
  if (mean) StoreMean(p, block, head, fold);
}

// Heads that lie one after the other, in keys and summaries, are one long row: read as it lies in
// memory.
SummarizeBlocksParams MergeHeads(SummarizeBlocksParams params) {
  TensorView& keys = params.keys;
  const BlockSummaries& s = params.summaries;
  if (keys.scales == nullptr && s.dtype != DType::kFloat8E4M3 &&
      keys.head_stride_bytes == keys.head_dim * DTypeBytes(keys.dtype) &&
      s.head_stride_bytes == keys.head_dim * DTypeBytes(s.dtype)) {
    keys.head_dim *= keys.num_heads;
    keys.num_heads = 1;
  }
  return params;
}

}  // namespace

absl::Status SummarizeBlocks(const SummarizeBlocksParams& unmerged, const Workspace& workspace) {
  const SummarizeBlocksParams params = MergeHeads(unmerged);
  const int64_t dim = params.keys.head_dim;
  const int64_t tile_rows = std::max<int64_t>(1, kTileFloats / dim);
  const int64_t slot_floats = (tile_rows + 3) * dim;
  auto scratch = workspace.Scratch<float>(workspace.threads.num_slots() * slot_floats);
  if (!scratch.ok()) return scratch.status();
  const int64_t chunks = CeilDiv(params.num_blocks - params.first_block, kBlocksPerChunk);
  workspace.threads.ParallelFor(chunks, [&](int64_t chunk, int slot) {
    float* rows = scratch->as<float>() + slot * slot_floats;
    float* folded = rows + tile_rows * dim;
    const Fold fold{tile_rows, rows, folded, folded + dim, folded + 2 * dim};
    const int64_t begin = params.first_block + chunk * kBlocksPerChunk;
    const int64_t end = std::min(begin + kBlocksPerChunk, params.num_blocks);
    for (int64_t block = begin; block < end; ++block) {
      for (int32_t head = 0; head < params.keys.num_heads; ++head) {
        SummarizeBlock(params, block, head, fold);
      }
    }
  });
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

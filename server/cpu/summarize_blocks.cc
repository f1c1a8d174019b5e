// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <utility>

#include "server/cpu/decode.h"
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

void SummarizeBlock(const SummarizeBlocksParams& p, int64_t block, int32_t head, const Fold& fold) {
  const int64_t dim = p.keys.head_dim;
  const int64_t begin = p.block_starts[block];
  const int64_t end = p.block_starts[block + 1];
  const bool extremes = p.min != nullptr;
  const bool mean = p.mean != nullptr;
  std::fill(fold.min, fold.min + dim, std::numeric_limits<float>::infinity());
  std::fill(fold.max, fold.max + dim, -std::numeric_limits<float>::infinity());
  std::fill(fold.sum, fold.sum + dim, 0.0F);
  for (int64_t t = begin; t < end; t += fold.tile_rows) {
    const int64_t last = std::min(t + fold.tile_rows, end);
    DecodeTile(p.keys, head, t, last, dim, fold.rows);
    FoldRows({.rows = fold.rows,
              .num_rows = last - t,
              .count = dim,
              .min = extremes ? fold.min : nullptr,
              .max = extremes ? fold.max : nullptr,
              .sum = mean ? fold.sum : nullptr});
  }
  const int64_t offset = (block * p.keys.num_heads + head) * dim * DTypeBytes(p.out_dtype);
  const auto store = [&](const float* values, void* out) {
    EncodeRow(p.out_dtype, values, 1.0F, dim, static_cast<std::byte*>(out) + offset);
  };
  if (extremes) {
    for (int64_t c = 0; c < dim; ++c) {  // -0 becomes +0
      fold.min[c] += 0.0F;
      fold.max[c] += 0.0F;
    }
    store(fold.min, p.min);
    store(fold.max, p.max);
  }
  if (mean) {
    const auto length = static_cast<float>(end - begin);
    for (int64_t c = 0; c < dim; ++c) fold.sum[c] /= length;
    store(fold.sum, p.mean);
  }
}

// Heads that lie one after the other are one long row: read as it lies in memory.
SummarizeBlocksParams MergeHeads(SummarizeBlocksParams params) {
  TensorView& keys = params.keys;
  if (keys.scales == nullptr && keys.head_stride_bytes == keys.head_dim * DTypeBytes(keys.dtype)) {
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
  const int64_t chunks = CeilDiv(params.num_blocks, kBlocksPerChunk);
  workspace.threads.ParallelFor(chunks, [&](int64_t chunk, int slot) {
    float* rows = scratch->as<float>() + slot * slot_floats;
    float* folded = rows + tile_rows * dim;
    const Fold fold{tile_rows, rows, folded, folded + dim, folded + 2 * dim};
    const int64_t end = std::min((chunk + 1) * kBlocksPerChunk, params.num_blocks);
    for (int64_t block = chunk * kBlocksPerChunk; block < end; ++block) {
      for (int32_t head = 0; head < params.keys.num_heads; ++head) {
        SummarizeBlock(params, block, head, fold);
      }
    }
  });
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

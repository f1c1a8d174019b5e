// SPDX-License-Identifier: Apache-2.0
#include "cuda/score_blocks.h"

#include <algorithm>

namespace dynsplit::kernels {
namespace {

constexpr int64_t kVectorBytes = 16;
constexpr int32_t kMaxChannels = 256;
constexpr int64_t kItemFloats = 64;

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return DivideUp(a, b) * b; }

}  // namespace

bool UsesScoreTiles(const ScoreShape& shape) {
  if (!shape.aligned || DTypeBytes(shape.query_dtype) != 2 || shape.head_dim > kMaxChannels ||
      shape.head_dim * DTypeBytes(shape.summary_dtype) % kVectorBytes != 0) {
    return false;
  }
  if (shape.summary_dtype == DType::kFloat8E4M3 || shape.summary_dtype == DType::kInt8) {
    return shape.rows <= kScoreMaxRows;
  }
  return shape.summary_dtype == shape.query_dtype && shape.rows <= kScoreMaxRows16Bit;
}

int32_t ScoreTileChannels(int32_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : kMaxChannels;
}

ScoreScratch ScoreScratchOf(const ScoreShape& shape, int64_t num_blocks) {
  ScoreScratch scratch;
  scratch.stride = RoundUp(num_blocks, kScoreStride);
  scratch.tiles = DivideUp(num_blocks, kScoreTileBlocks);
  const int64_t rows = int64_t{shape.num_kv_heads} * shape.rows;
  scratch.num_floats = RoundUp(rows * (scratch.stride + 2 * scratch.tiles), kItemFloats);
  return scratch;
}

int64_t ScoreBatchSize(const ScoreShape& shape, std::span<const int64_t> num_blocks) {
  const auto most =
      static_cast<int64_t>(std::min<size_t>(num_blocks.size(), size_t{kScoreBatchItems}));
  int64_t size = 0;
  int64_t bytes = 0;
  for (; size < most; ++size) {
    const ScoreScratch scratch = ScoreScratchOf(shape, num_blocks[static_cast<size_t>(size)]);
    bytes += scratch.num_floats * static_cast<int64_t>(sizeof(float));
    if (size > 0 && bytes > kScoreScratchBytes) break;
  }
  return size;
}

}  // namespace dynsplit::kernels

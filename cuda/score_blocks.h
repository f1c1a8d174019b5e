// SPDX-License-Identifier: Apache-2.0
//
// How ScoreBlocks and ScoreTokens are cut into launches: plain numbers, tested without a device.
//
// The tile kernel (score_blocks_mma.cu) takes 16-bit and one-byte rows, be they summaries of blocks
// or keys of tokens: a pass over them that leaves logits and partial sums of the softmax in
// scratch, and a pass over those. What it does not take goes through column_softmax.h, which reads
// rows twice but needs no scratch for logits.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "cuda/operations.h"
#include "server/pipeline/backend.h"
#include "server/pipeline/types.h"

namespace dynsplit::kernels {

inline constexpr int kScoreTileBlocks = 128;   // blocks (or tokens) of a thread block
inline constexpr int kScoreStride = 8;         // rows of logits are whole 32-byte sectors
inline constexpr int kScoreBatchItems = 64;    // items of a launch: 5 KiB of kernel parameters
inline constexpr int kScoreMaxRows = 256;      // query rows (heads of the group x W) a KV head
inline constexpr int kScoreMaxRows16Bit = 64;  // beyond, computing logits twice costs less
inline constexpr int64_t kScoreScratchBytes = int64_t{64} << 20;  // of a launch of several items

struct ScoreShape {
  DType query_dtype = DType::kBFloat16;
  DType summary_dtype = DType::kBFloat16;
  int32_t head_dim = 0;
  int32_t num_kv_heads = 0;
  int32_t rows = 0;      // query rows a KV head
  bool aligned = false;  // rows of queries and summaries may be read 16 bytes at a time
};

bool UsesScoreTiles(const ScoreShape& shape);

// Channels that the kernel is compiled for: 64, 128 or 256.
int32_t ScoreTileChannels(int32_t head_dim);

// Scratch of one item, in floats: logits [Hkv, rows, stride], then partial sums (two floats each)
// [Hkv, rows, tiles].
struct ScoreScratch {
  int64_t stride = 0;
  int64_t tiles = 0;
  int64_t num_floats = 0;  // a multiple of 64
};
ScoreScratch ScoreScratchOf(const ScoreShape& shape, int64_t num_blocks);

// How many of the items, given by their numbers of blocks, the next launch takes: at least one.
int64_t ScoreBatchSize(const ScoreShape& shape, std::span<const int64_t> num_blocks);

// What an item's queries meet: summaries of its blocks, or keys of its tokens.
struct ScoreTileItem {
  TensorView queries;               // [W, Hq, D]
  const std::byte* rows = nullptr;  // minima, means or keys
  const std::byte* high = nullptr;  // maxima: the bound; else null
  int64_t row_stride_bytes = 0;
  int64_t head_stride_bytes = 0;
  const int32_t* places = nullptr;  // row of each place: [num_rows] a KV head or for all heads;
                                    // null = in order, as bounds must lie
  bool places_per_head = false;
  const float* scales = nullptr;  // of row r of head h at r * scale_row_stride + h *
  int64_t scale_row_stride = 0;   // scale_head_stride; quantised rows only
  int64_t scale_head_stride = 0;
  const int32_t* block_starts = nullptr;  // [num_rows + 1], lengths; null = 1 each
  int64_t num_rows = 0;
  float* scores = nullptr;  // out [Hkv, num_rows]
};

// True if rows of queries and of what they meet may be read 16 bytes at a time.
bool HasAlignedRows(const ScoreTileItem& item);

// Items in batches of two launches each. Requires: UsesScoreTiles; all items have equal queries'
// strides, row and scale strides, and variant; quantised rows have scales.
absl::Status ScoreTiles(std::span<const ScoreTileItem> items, const ScoreShape& shape,
                        float softmax_scale, const Launch& launch);

}  // namespace dynsplit::kernels

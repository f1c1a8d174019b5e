// SPDX-License-Identifier: Apache-2.0
//
// How ScoreBlocks is cut into launches: plain numbers, tested without a device.
//
// The tile kernel (score_blocks_mma.cu) takes 16-bit and e4m3 summaries: a pass over them that
// leaves logits and partial sums of the softmax in scratch, and a pass over those. What it does not
// take goes through column_softmax.h, which reads summaries twice but needs no scratch for logits.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "cuda/operations.h"
#include "server/pipeline/backend.h"
#include "server/pipeline/types.h"

namespace dynsplit::kernels {

inline constexpr int kScoreTileBlocks = 128;   // blocks of a thread block
inline constexpr int kScoreStride = 8;         // rows of logits are whole 32-byte sectors
inline constexpr int kScoreBatchItems = 64;    // items of a launch: 4 KiB of kernel parameters
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

// Bound variant, or means.
inline bool IsBound(const ScoreBlocksItem& item) { return item.summaries.min != nullptr; }

// One batch of items, in two launches. Requires: UsesScoreTiles, 1 to kScoreBatchItems items.
absl::Status ScoreTiles(const ScoreBlocksParams& params, const ScoreShape& shape,
                        std::span<const ScoreBlocksItem> items, const Launch& launch);

}  // namespace dynsplit::kernels

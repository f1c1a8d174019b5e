// SPDX-License-Identifier: Apache-2.0
//
// Launch configurations are pure functions: checked here over many shapes, without a device.
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <span>
#include <vector>

#include "cuda/column_softmax.h"
#include "cuda/device_memory.h"
#include "cuda/score_blocks.h"
#include "cuda/segment_tokens.h"
#include "cuda/select_blocks.h"

namespace dynsplit {
namespace {

using kernels::ChooseMmaConfig;
using kernels::ChooseSimtConfig;
using kernels::ColumnShape;
using kernels::MmaConfig;
using kernels::ScoreBatchSize;
using kernels::ScoreScratch;
using kernels::ScoreScratchOf;
using kernels::ScoreShape;
using kernels::SelectRunBlocks;
using kernels::SelectTeamSize;
using kernels::SimtConfig;
using kernels::UsesScoreTiles;

constexpr int64_t kSharedLimit = 227 * 1024 / 2;  // two blocks on an SM

class ConfigTest : public testing::TestWithParam<ColumnShape> {};

TEST_P(ConfigTest, MmaCoversRowsAndItemsWithinSharedMemory) {
  const ColumnShape& shape = GetParam();
  for (int num_sms : {1, 108, 132}) {
    const MmaConfig config = ChooseMmaConfig(shape, num_sms);
    EXPECT_GE(config.steps * 32, shape.depth);
    EXPECT_EQ(config.window_padded % 16, 0);
    EXPECT_GE(config.window_padded, shape.window);
    EXPECT_EQ(config.rows, config.window_padded * shape.group);
    EXPECT_EQ(config.warps_along_rows * config.warps_along_items(), 8);
    EXPECT_GE(config.row_blocks * config.warps_along_rows * config.row_tiles * 16, config.rows);
    EXPECT_GE(config.splits, 1);
    EXPECT_LE(config.splits, (shape.num_items + 63) / 64);
    EXPECT_GE(config.rows_per_stage, 16);
    EXPECT_EQ(config.rows_per_stage % 16, 0);
    EXPECT_LE(config.rows_per_stage * (config.steps * 64 + 4), kSharedLimit);
    EXPECT_GE(config.column_blocks, 1);
  }
}

TEST_P(ConfigTest, SimtCoversDepth) {
  const ColumnShape& shape = GetParam();
  const SimtConfig config = ChooseSimtConfig(shape, 132);
  EXPECT_GE(config.depth_padded, shape.depth);
  EXPECT_EQ(config.depth_padded % 32, 0);
  EXPECT_EQ(config.rows, shape.group * shape.window);
  EXPECT_GE(config.splits, 1);
  EXPECT_LE(config.splits, (shape.num_items + 63) / 64);
}

INSTANTIATE_TEST_SUITE_P(Shapes, ConfigTest,
                         testing::Values(ColumnShape{2, 1, 1, 1, 1, 8},
                                         ColumnShape{131072, 131008, 8, 4, 64, 128},
                                         ColumnShape{65, 1, 128, 1, 64, 64},
                                         ColumnShape{1 << 30, 1 << 29, 1, 128, 1, 96},
                                         ColumnShape{9362, 9362, 8, 4, 64, 256},
                                         ColumnShape{100, 30, 40, 1, 70, 256}));

ScoreShape DecodeShape() {
  return {.query_dtype = DType::kBFloat16,
          .summary_dtype = DType::kFloat8E4M3,
          .head_dim = 128,
          .num_kv_heads = 8,
          .rows = 4,
          .aligned = true};
}

TEST(ScoreConfigTest, TilesTakeSixteenByteRowsOfFactorsThatMeet) {
  const auto takes = [](auto change) {
    ScoreShape shape = DecodeShape();
    change(shape);
    return UsesScoreTiles(shape);
  };
  EXPECT_TRUE(UsesScoreTiles(DecodeShape()));
  EXPECT_TRUE(takes([](ScoreShape& s) { s.query_dtype = DType::kFloat16; }));
  EXPECT_TRUE(takes([](ScoreShape& s) { s.summary_dtype = DType::kInt8; }));
  EXPECT_TRUE(takes([](ScoreShape& s) { s.head_dim = 16; }));
  EXPECT_TRUE(takes([](ScoreShape& s) { s.head_dim = 256; }));
  EXPECT_TRUE(takes([](ScoreShape& s) { s.rows = kernels::kScoreMaxRows; }));
  EXPECT_FALSE(takes([](ScoreShape& s) { s.aligned = false; }));
  EXPECT_FALSE(takes([](ScoreShape& s) { s.summary_dtype = DType::kFloat8E5M2; }));
  EXPECT_FALSE(takes([](ScoreShape& s) { s.query_dtype = DType::kFloat32; }));
  EXPECT_FALSE(takes([](ScoreShape& s) { s.head_dim = 24; }));
  EXPECT_FALSE(takes([](ScoreShape& s) { s.head_dim = 272; }));
  EXPECT_FALSE(takes([](ScoreShape& s) { s.rows = kernels::kScoreMaxRows + 1; }));

  const auto takes_bf16 = [&takes](auto change) {
    return takes([&change](ScoreShape& s) {
      s.summary_dtype = DType::kBFloat16;
      change(s);
    });
  };
  EXPECT_TRUE(takes_bf16([](ScoreShape&) {}));
  EXPECT_TRUE(takes_bf16([](ScoreShape& s) { s.head_dim = 24; }));
  EXPECT_FALSE(takes_bf16([](ScoreShape& s) { s.head_dim = 20; }));
  EXPECT_FALSE(takes_bf16([](ScoreShape& s) { s.query_dtype = DType::kFloat16; }));
  EXPECT_FALSE(takes_bf16([](ScoreShape& s) { s.rows = kernels::kScoreMaxRows16Bit + 1; }));
  EXPECT_FALSE(takes([](ScoreShape& s) { s.summary_dtype = DType::kFloat32; }));
}

TEST(ScoreConfigTest, ChannelsCoverHeadDim) {
  for (int32_t head_dim = 8; head_dim <= 256; head_dim += 8) {
    EXPECT_GE(kernels::ScoreTileChannels(head_dim), head_dim);
  }
  EXPECT_EQ(kernels::ScoreTileChannels(64), 64);
  EXPECT_EQ(kernels::ScoreTileChannels(128), 128);
}

TEST(ScoreConfigTest, ScratchHoldsLogitsAndSums) {
  for (int64_t num_blocks : {1, 8, 127, 128, 129, 9362, 1 << 20}) {
    for (int32_t rows : {1, 3, 20}) {
      ScoreShape shape = DecodeShape();
      shape.rows = rows;
      const ScoreScratch scratch = ScoreScratchOf(shape, num_blocks);
      EXPECT_GE(scratch.stride, num_blocks);
      EXPECT_EQ(scratch.stride % 8, 0);
      EXPECT_GE(scratch.tiles * kernels::kScoreTileBlocks, num_blocks);
      EXPECT_LT((scratch.tiles - 1) * kernels::kScoreTileBlocks, num_blocks);
      EXPECT_GE(scratch.num_floats, 8 * rows * (scratch.stride + 2 * scratch.tiles));
      EXPECT_EQ(scratch.num_floats * sizeof(float) % 256, 0);
    }
  }
}

TEST(ScoreConfigTest, BatchesTakeAllItemsWithinTheirLimits) {
  const ScoreShape shape = DecodeShape();
  const std::vector<std::vector<int64_t>> cases = {{1},
                                                   std::vector<int64_t>(32, 9362),
                                                   std::vector<int64_t>(1000, 3),
                                                   {int64_t{1} << 24, 1, int64_t{1} << 24}};
  for (const std::vector<int64_t>& num_blocks : cases) {
    for (size_t first = 0; first < num_blocks.size();) {
      const std::span<const int64_t> rest = std::span(num_blocks).subspan(first);
      const int64_t size = ScoreBatchSize(shape, rest);
      ASSERT_GE(size, 1);
      ASSERT_LE(size, std::min<int64_t>(kernels::kScoreBatchItems, std::ssize(rest)));
      int64_t bytes = 0;
      for (int64_t n : rest.first(static_cast<size_t>(size))) {
        bytes += ScoreScratchOf(shape, n).num_floats * 4;
      }
      if (size > 1) {
        EXPECT_LE(bytes, kernels::kScoreScratchBytes);
      }
      first += static_cast<size_t>(size);
    }
  }
  EXPECT_EQ(ScoreBatchSize(shape, std::vector<int64_t>(32, 9362)), 32);
  EXPECT_EQ(ScoreBatchSize(shape, std::vector<int64_t>(1000, 3)), kernels::kScoreBatchItems);
}

TEST(SelectConfigTest, RunsCoverBlocksWithAWarpEach) {
  for (int team_size : {1, 2, 8}) {
    for (int64_t num_blocks : {0, 1, 31, 32, 33, 9362, 32 * 1024, 32 * 1024 + 1, 1 << 30}) {
      const int64_t run_blocks = SelectRunBlocks(num_blocks, team_size);
      EXPECT_GE(run_blocks, 32);
      EXPECT_EQ(run_blocks % 32, 0);
      EXPECT_LE((num_blocks + run_blocks - 1) / run_blocks,
                team_size * kernels::kSelectThreads / 32);
    }
  }
  EXPECT_EQ(SelectRunBlocks(1024, 1), 32);
  EXPECT_EQ(SelectRunBlocks(1024 + 1, 1), 64);
  EXPECT_EQ(SelectRunBlocks(1024 + 1, 2), 32);
}

TEST(SelectConfigTest, TeamsRunAtOnceAndHaveWork) {
  EXPECT_EQ(SelectTeamSize(9362, 8, 132, 8), 8);
  EXPECT_EQ(SelectTeamSize(9362, 8, 132, 1), 1);  // no clusters
  EXPECT_EQ(SelectTeamSize(9362, 128, 132, 8), 1);
  EXPECT_EQ(SelectTeamSize(1024, 1, 132, 8), 1);
  EXPECT_EQ(SelectTeamSize(1025, 1, 132, 8), 2);
  for (int64_t num_teams : {1, 3, 8, 33, 64, 1000}) {
    for (int64_t num_blocks : {0, 1, 5000, 1 << 20}) {
      const int size = SelectTeamSize(num_blocks, num_teams, 132, 8);
      EXPECT_TRUE(size == 1 || size * num_teams <= 132);
      EXPECT_EQ(size & (size - 1), 0);
      EXPECT_LE(size, 8);
    }
  }
}

TEST(SegmentConfigTest, ChunksHoldTheLongestBlockAndTheLastPosition) {
  for (int32_t lookahead : {1, 20, 1023, 1024, 1025, 8191}) {
    for (int64_t num_tokens : {1, 1023, 1024, 1'000'000, 2'147'483'647}) {
      const kernels::SegmentShape shape = kernels::SegmentShapeOf(num_tokens, lookahead);
      EXPECT_GE(shape.chunk_tokens, lookahead);
      EXPECT_EQ(shape.chunk_tokens % kernels::kSegmentChunkTokens, 0);
      EXPECT_GT(int64_t{shape.num_chunks} * shape.chunk_tokens, num_tokens);
      EXPECT_LE(int64_t{shape.num_chunks - 1} * shape.chunk_tokens, num_tokens);
      EXPECT_GE(shape.num_spans * kernels::kSegmentSpanChunks, shape.num_chunks);
      EXPECT_LE(shape.ChunkSharedBytes(lookahead / 2), 163 * 1024);  // compute capability 8.0
      EXPECT_LE(shape.EmitSharedBytes(), 48 * 1024);
    }
  }
}

TEST(PinnedCacheTest, ClassesAreAtMostAQuarterLarger) {
  int64_t last = 0;
  for (int64_t size = 1; size < (int64_t{1} << 40); size += 1 + size / 7) {
    const int64_t class_bytes = PinnedCache::ClassBytes(size);
    EXPECT_GE(class_bytes, size);
    EXPECT_LE(class_bytes, std::max<int64_t>(4096, size + size / 4 + 1));
    EXPECT_GE(class_bytes, last);
    EXPECT_EQ(PinnedCache::ClassBytes(class_bytes), class_bytes);
    last = class_bytes;
  }
}

}  // namespace
}  // namespace dynsplit

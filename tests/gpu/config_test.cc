// SPDX-License-Identifier: Apache-2.0
//
// Launch configurations are pure functions: checked here over many shapes, without a device.
#include <gtest/gtest.h>

#include "cuda/column_softmax.h"
#include "cuda/device_memory.h"

namespace dynsplit {
namespace {

using kernels::ChooseMmaConfig;
using kernels::ChooseSimtConfig;
using kernels::ColumnShape;
using kernels::MmaConfig;
using kernels::SimtConfig;

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

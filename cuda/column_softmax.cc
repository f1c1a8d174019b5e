// SPDX-License-Identifier: Apache-2.0
#include "cuda/column_softmax.h"

namespace dynsplit::kernels {
namespace {

constexpr int64_t kBlocksPerSm = 2;
constexpr int64_t kMmaTileItems = 64;       // log-sum-exp pass
constexpr int64_t kStageBytes = 64 * 1024;  // shared memory for queries, column pass
constexpr int64_t kWarps = 8;

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return DivideUp(a, b) * b; }

}  // namespace

ColumnShape ShapeOf(const ColumnSoftmax& op) {
  return {.num_items = op.items.num_tokens,
          .num_columns = op.num_columns,
          .num_kv_heads = op.items.num_heads,
          .group = op.queries.num_heads / op.items.num_heads,
          .window = static_cast<int32_t>(op.queries.num_tokens),
          .depth = op.items.head_dim * (op.items_low.data != nullptr ? 2 : 1)};
}

MmaConfig ChooseMmaConfig(const ColumnShape& shape, int num_sms) {
  MmaConfig config;
  config.steps = shape.depth <= 64 ? 2 : shape.depth <= 128 ? 4 : 8;
  config.row_tiles = config.steps == 8 ? 1 : 2;
  config.window_padded = static_cast<int>(RoundUp(shape.window, 16));
  config.rows = shape.group * config.window_padded;

  const int64_t rows_per_warp = 16L * config.row_tiles;
  config.warps_along_rows = 1;
  while (config.warps_along_rows < kWarps &&
         config.warps_along_rows * rows_per_warp < config.rows) {
    config.warps_along_rows *= 2;
  }
  config.row_blocks =
      static_cast<int>(DivideUp(config.rows, config.warps_along_rows * rows_per_warp));
  const int64_t blocks = kBlocksPerSm * num_sms;
  config.splits = static_cast<int>(
      std::clamp<int64_t>(blocks / (int64_t{shape.num_kv_heads} * config.row_blocks), 1,
                          DivideUp(shape.num_items, kMmaTileItems)));

  const int64_t row_bytes = config.steps * 64L;
  config.rows_per_stage =
      static_cast<int>(std::min<int64_t>(config.rows, kStageBytes / row_bytes / 16 * 16));
  config.column_blocks = static_cast<int>(std::clamp<int64_t>(
      DivideUp(blocks, shape.num_kv_heads), 1,
      std::max<int64_t>(DivideUp(shape.num_columns, kWarps * rows_per_warp), 1)));
  return config;
}

SimtConfig ChooseSimtConfig(const ColumnShape& shape, int num_sms) {
  constexpr int64_t kTile = 64;
  SimtConfig config;
  config.rows = shape.group * shape.window;
  config.depth_padded = static_cast<int>(RoundUp(shape.depth, 32));
  const int64_t row_blocks = DivideUp(config.rows, kTile) * shape.num_kv_heads;
  config.splits = static_cast<int>(
      std::clamp<int64_t>(DivideUp(4L * num_sms, row_blocks), 1, DivideUp(shape.num_items, kTile)));
  return config;
}

bool UsesTensorCores(const ColumnSoftmax& op) {
  return DTypeBytes(op.items.dtype) == 2 && op.queries.dtype == op.items.dtype &&
         ShapeOf(op).depth <= kMmaMaxDepth;
}

absl::Status RunColumnSoftmax(const ColumnSoftmax& op, const Launch& launch) {
  if (UsesGroupMma(op)) return RunColumnSoftmaxGroup(op, launch);
  return UsesTensorCores(op) ? RunColumnSoftmaxMma(op, launch) : RunColumnSoftmaxSimt(op, launch);
}

}  // namespace dynsplit::kernels

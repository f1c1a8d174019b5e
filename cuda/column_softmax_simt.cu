// SPDX-License-Identifier: Apache-2.0
//
// column_softmax.h in fp32 arithmetic, for every type and depth. A block computes tiles of 64 rows
// by 64 items, 4 x 4 to a thread.
#include "cuda/column_softmax.cuh"
#include "cuda/simt_tile.cuh"

namespace dynsplit::kernels {
namespace {

// Item rows for SimtTile: the channels of items_low behind those of items.
struct ItemSource {
  const ColumnArgs& args;
  int h;
  __device__ void Load(int64_t n, int chunk, float (&values)[kChunk]) const {
    if (n >= args.shape.num_items || chunk * kChunk >= args.shape.depth) return;
    const int head_chunks = args.op.items.head_dim / kChunk;
    if (chunk < head_chunks) {
      LoadAnyValues(args.op.items, args.aligned, n, h, chunk, values);
    } else {
      LoadAnyValues(args.op.items_low, args.aligned, n, h, chunk - head_chunks, values);
    }
  }
};

// Packed query rows of a head.
struct QuerySource {
  const float* rows_base;
  int num_rows;
  int depth_padded;
  __device__ void Load(int64_t row, int chunk, float (&values)[kChunk]) const {
    if (row >= num_rows) return;
    LoadValues<float>(reinterpret_cast<const std::byte*>(rows_base + row * depth_padded), chunk,
                      true, 1.0F, values);
  }
};

__device__ QuerySource QueriesOf(const ColumnArgs& args, int h, int depth_padded) {
  return {
      static_cast<const float*>(args.queries) + static_cast<int64_t>(h) * args.rows * depth_padded,
      args.rows, depth_padded};
}

// grid (splits, row blocks, KV heads)
__global__ void __launch_bounds__(kSimtThreads)
    SimtRowsKernel(ColumnArgs args, int depth_padded, int tiles_per_split) {
  __shared__ SimtTile tile;
  const int h = static_cast<int>(blockIdx.z);
  const int tx = static_cast<int>(threadIdx.x) % kSimtSide;
  const int ty = static_cast<int>(threadIdx.x) / kSimtSide;
  const int first_row = static_cast<int>(blockIdx.y) * kSimtTile;
  const QuerySource queries = QueriesOf(args, h, depth_padded);
  const ItemSource items = {args, h};
  SoftmaxSum rows[kSimtPart];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tiles_per_split * kSimtTile;
  const int64_t end =
      min(begin + static_cast<int64_t>(tiles_per_split) * kSimtTile, args.shape.num_items);
  for (int64_t first = begin; first < end; first += kSimtTile) {
    float logits[kSimtPart][kSimtPart] = {};
    MultiplyTile(tile, queries, first_row, items, first, depth_padded, logits);
#pragma unroll
    for (int j = 0; j < kSimtPart; ++j) {
      const int64_t n = first + tx * kSimtPart + j;
      const float length = LogLength(args, n);
#pragma unroll
      for (int i = 0; i < kSimtPart; ++i) {
        if (n <= LastVisible(args, first_row + ty * kSimtPart + i)) {
          rows[i].Add(fmaf(logits[i][j], args.scale_log2, length));
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kSimtPart; ++i) {
    rows[i].MergeLanes(kSimtSide);
    const int r = first_row + ty * kSimtPart + i;
    if (tx == 0 && r < args.rows) {
      args.partials[(static_cast<int64_t>(h) * args.rows + r) * args.num_partials + blockIdx.x] =
          make_float2(rows[i].maximum, rows[i].sum);
    }
  }
}

// Column sums over rows [row_begin, row_end); the result is in threads with ty == 0.
__device__ void SumSegment(const ColumnArgs& args, SimtTile& tile, int h, int depth_padded,
                           int64_t first_item, int row_begin, int row_end,
                           float (&sums)[kSimtPart]) {
  __shared__ float parts[kSimtSide][kSimtTile];
  const int tx = static_cast<int>(threadIdx.x) % kSimtSide;
  const int ty = static_cast<int>(threadIdx.x) / kSimtSide;
  const QuerySource queries = QueriesOf(args, h, depth_padded);
  const ItemSource items = {args, h};
#pragma unroll
  for (int j = 0; j < kSimtPart; ++j) sums[j] = 0;
  for (int first_row = row_begin; first_row < row_end; first_row += kSimtTile) {
    float logits[kSimtPart][kSimtPart] = {};
    MultiplyTile(tile, queries, first_row, items, first_item, depth_padded, logits);
#pragma unroll
    for (int i = 0; i < kSimtPart; ++i) {
      const int r = first_row + ty * kSimtPart + i;
      if (r >= row_end) continue;
      const float lse = args.lse_log2[static_cast<int64_t>(h) * args.rows + r];
#pragma unroll
      for (int j = 0; j < kSimtPart; ++j) {
        sums[j] += Exp2(fmaf(logits[i][j], args.scale_log2, -lse));
      }
    }
  }
  __syncthreads();  // `parts` of an earlier segment has been read
#pragma unroll
  for (int j = 0; j < kSimtPart; ++j) parts[ty][tx * kSimtPart + j] = sums[j];
  __syncthreads();
  if (ty != 0) return;
#pragma unroll
  for (int j = 0; j < kSimtPart; ++j) {
    sums[j] = 0;
    for (int other = 0; other < kSimtSide; ++other) sums[j] += parts[other][tx * kSimtPart + j];
  }
}

// grid (item tiles, KV heads)
__global__ void __launch_bounds__(kSimtThreads)
    SimtColumnsKernel(ColumnArgs args, int depth_padded) {
  __shared__ SimtTile tile;
  const int h = static_cast<int>(blockIdx.y);
  const int64_t first_item = static_cast<int64_t>(blockIdx.x) * kSimtTile;
  const int segments = args.op.per_query_head ? args.shape.group : 1;
  const int segment_rows = args.rows / segments;
  for (int segment = 0; segment < segments; ++segment) {
    float sums[kSimtPart];
    SumSegment(args, tile, h, depth_padded, first_item, segment * segment_rows,
               (segment + 1) * segment_rows, sums);
    if (threadIdx.x >= kSimtSide) continue;
    const int64_t out_row = static_cast<int64_t>(h) * segments + segment;
#pragma unroll
    for (int j = 0; j < kSimtPart; ++j) {
      const int64_t n = first_item + static_cast<int>(threadIdx.x) * kSimtPart + j;
      if (n < args.shape.num_columns) {
        args.op.out[out_row * args.shape.num_items + n] = sums[j] * args.op.factor;
      }
    }
  }
}

absl::Status SumRows(const ColumnArgs& args, const SimtConfig& config, cudaStream_t stream) {
  const int64_t tiles = CeilDiv(args.shape.num_items, kSimtTile);
  const dim3 grid(static_cast<unsigned>(config.splits),
                  static_cast<unsigned>(CeilDiv(config.rows, kSimtTile)),
                  static_cast<unsigned>(args.shape.num_kv_heads));
  SimtRowsKernel<<<grid, kSimtThreads, 0, stream>>>(
      args, config.depth_padded, static_cast<int>(CeilDiv(tiles, config.splits)));
  return LaunchStatus("SimtRowsKernel");
}

absl::Status SumColumns(const ColumnArgs& args, const SimtConfig& config, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(args.shape.num_columns, kSimtTile)),
                  static_cast<unsigned>(args.shape.num_kv_heads));
  SimtColumnsKernel<<<grid, kSimtThreads, 0, stream>>>(args, config.depth_padded);
  return LaunchStatus("SimtColumnsKernel");
}

}  // namespace

absl::Status RunColumnSoftmaxSimt(const ColumnSoftmax& op, const Launch& launch) {
  const ColumnShape shape = ShapeOf(op);
  const SimtConfig config = ChooseSimtConfig(shape, launch.num_sms);
  ColumnArgs args = {.op = op,
                     .shape = shape,
                     .aligned = HasAlignedChunks(op.items) &&
                                (op.items_low.data == nullptr || HasAlignedChunks(op.items_low)),
                     .window_padded = shape.window,
                     .rows = config.rows,
                     .scale_log2 = op.softmax_scale * kLog2E,
                     .queries = nullptr,
                     .partials = nullptr,
                     .num_partials = config.splits,
                     .lse_log2 = nullptr};
  const ColumnScratch scratch = ScratchOf(args, config.depth_padded, sizeof(float));
  absl::StatusOr<Buffer> memory = launch.Scratch(scratch.size_bytes());
  if (!memory.ok()) return memory.status();
  scratch.Assign(memory->data(), args);
  absl::Status status = PackQueries<float>(args, config.depth_padded, launch.stream);
  if (status.ok() && op.lse == nullptr) status.Update(SumRows(args, config, launch.stream));
  if (status.ok()) status.Update(JoinRows(args, launch.stream));
  args.scale_log2 *= op.power;
  if (status.ok()) status.Update(SumColumns(args, config, launch.stream));
  return status;
}

}  // namespace dynsplit::kernels

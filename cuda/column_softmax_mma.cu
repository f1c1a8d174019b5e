// SPDX-License-Identifier: Apache-2.0
//
// column_softmax.h on tensor cores: bf16 or fp16 products, fp32 sums (mma.sync m16n8k16).
#include <cuda_pipeline_primitives.h>

#include "cuda/column_softmax.cuh"
#include "cuda/mma.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTileItems = 64;  // items in shared memory at a time, log-sum-exp pass
constexpr int kStages = 2;

// Address of 8 channels of item n, the channels of items_low behind those of items.
// Requires: chunk * 8 < depth, n < num_items.
template <typename T>
__device__ const std::byte* ItemChunk(const ColumnArgs& args, int64_t n, int h, int chunk) {
  const int head_chunks = args.op.items.head_dim / kChunk;
  if (chunk < head_chunks) {
    return RowAddress(args.op.items, n, h) + chunk * static_cast<int>(sizeof(Chunk<T>));
  }
  return RowAddress(args.op.items_low, n, h) +
         (chunk - head_chunks) * static_cast<int>(sizeof(Chunk<T>));
}

// ---- pass 1: log-sum-exp of the rows -----------------------------------------------------------

template <typename T, int KS>
__device__ void FetchItems(const ColumnArgs& args, int h, int64_t first, uint4* stage) {
  constexpr int kRowChunks = KS * 4;
  for (int unit = static_cast<int>(threadIdx.x); unit < kTileItems * kRowChunks; unit += kThreads) {
    const int row = unit / kRowChunks;
    const int chunk = unit % kRowChunks;
    const int64_t n = first + row;
    uint4* const to = SharedChunk<KS>(stage, row, chunk);
    if (n >= args.shape.num_items || chunk * kChunk >= args.shape.depth) {
      *to = make_uint4(0, 0, 0, 0);
    } else if (args.aligned) {
      __pipeline_memcpy_async(to, ItemChunk<T>(args, n, h, chunk), sizeof(uint4));
    } else {
      *to = LoadBits<T>(ItemChunk<T>(args, n, h, chunk), false);
    }
  }
  __pipeline_commit();
}

// Packed query rows of row tile `tile`; zeros beyond the rows.
template <int KS>
__device__ RowTile<KS> LoadQueryTile(const ColumnArgs& args, int h, int tile, int lane) {
  RowTile<KS> out;
  const bool valid = tile * kTileRows < args.rows;  // rows are whole tiles
  const auto* const packed = static_cast<const uint4*>(args.queries);
  const int64_t row =
      static_cast<int64_t>(h) * args.rows + (valid ? tile * kTileRows : 0) + lane / 4;
#pragma unroll
  for (int step = 0; step < KS; ++step) {
    const int chunk = 4 * step + lane % 4;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    out.Set(step, valid ? packed[row * (KS * 4) + chunk] : zero,
            valid ? packed[(row + 8) * (KS * 4) + chunk] : zero);
  }
  return out;
}

// Warps share the rows first, then the items of a tile. grid (splits, row blocks, KV heads)
template <typename T, int KS, int MT>
__global__ void __launch_bounds__(kThreads, 2)
    SumRowsKernel(ColumnArgs args, int warps_along_rows, int tiles_per_split) {
  extern __shared__ uint4 stages[];
  constexpr int kStageChunks = kTileItems * KS * 4;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_row = warp % warps_along_rows;
  const int warp_item = warp / warps_along_rows;
  const int warps_along_items = kWarps / warps_along_rows;
  const int h = static_cast<int>(blockIdx.z);
  const int first_tile = (static_cast<int>(blockIdx.y) * warps_along_rows + warp_row) * MT;

  RowTile<KS> queries[MT];
  SoftmaxSum rows[MT][2];
  int64_t last_visible[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    queries[m] = LoadQueryTile<KS>(args, h, first_tile + m, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      last_visible[m][half] = LastVisible(args, (first_tile + m) * kTileRows + half * 8 + lane / 4);
    }
  }

  const int64_t num_items = args.shape.num_items;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tiles_per_split * kTileItems;
  const int64_t end = min(begin + static_cast<int64_t>(tiles_per_split) * kTileItems, num_items);
  const int64_t first_masked =  // items from here on are hidden from some row
      args.op.causal ? num_items - args.shape.window + 1 : num_items;
  if (begin < end) FetchItems<T, KS>(args, h, begin, stages);
  int stage = 0;
  for (int64_t first = begin; first < end; first += kTileItems, stage ^= 1) {
    if (first + kTileItems < end) {
      FetchItems<T, KS>(args, h, first + kTileItems, stages + (stage ^ 1) * kStageChunks);
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    __syncthreads();
    const bool masked = first + kTileItems > first_masked;
    for (int col = warp_item * kTileCols; col < kTileItems; col += warps_along_items * kTileCols) {
      float logits[MT][4];
      Multiply<T, KS, MT>(logits, queries, stages + stage * kStageChunks, col, lane);
      const int64_t n = first + col + lane % 4 * 2;
      const float length0 = LogLength(args, n);
      const float length1 = LogLength(args, n + 1);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float x0 = fmaf(logits[m][2 * half], args.scale_log2, length0);
          const float x1 = fmaf(logits[m][2 * half + 1], args.scale_log2, length1);
          if (!masked || n <= last_visible[m][half]) rows[m][half].Add(x0);
          if (!masked || n + 1 <= last_visible[m][half]) rows[m][half].Add(x1);
        }
      }
    }
    __syncthreads();  // the stage is free again
  }

  const int partial = static_cast<int>(blockIdx.x) * warps_along_items + warp_item;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[m][half].MergeLanes(4);
      const int r = (first_tile + m) * kTileRows + half * 8 + lane / 4;
      if (lane % 4 == 0 && r < args.rows) {
        args.partials[(static_cast<int64_t>(h) * args.rows + r) * args.num_partials + partial] =
            make_float2(rows[m][half].maximum, rows[m][half].sum);
      }
    }
  }
}

// ---- pass 2: column sums -----------------------------------------------------------------------

template <typename T, int KS>
__device__ RowTile<KS> LoadItemTile(const ColumnArgs& args, int h, int64_t first, int lane) {
  RowTile<KS> out;
  const int64_t upper_item = first + lane / 4;
  const int64_t lower_item = upper_item + 8;
#pragma unroll
  for (int step = 0; step < KS; ++step) {
    const int chunk = 4 * step + lane % 4;
    uint4 upper = make_uint4(0, 0, 0, 0);
    uint4 lower = make_uint4(0, 0, 0, 0);
    if (chunk * kChunk < args.shape.depth) {
      if (upper_item < args.shape.num_columns) {
        upper = LoadBits<T>(ItemChunk<T>(args, upper_item, h, chunk), args.aligned);
      }
      if (lower_item < args.shape.num_columns) {
        lower = LoadBits<T>(ItemChunk<T>(args, lower_item, h, chunk), args.aligned);
      }
    }
    out.Set(step, upper, lower);
  }
  return out;
}

// Copies packed query rows [first, first + rows) and their log-sum-exp; all threads take part.
template <int KS>
__device__ void FetchQueries(const ColumnArgs& args, int h, int first, int rows, uint4* shared,
                             float* shared_lse) {
  constexpr int kRowChunks = KS * 4;
  const int64_t row_base = static_cast<int64_t>(h) * args.rows + first;
  const auto* const packed = static_cast<const uint4*>(args.queries) + row_base * kRowChunks;
  for (int unit = static_cast<int>(threadIdx.x); unit < rows * kRowChunks; unit += kThreads) {
    const int row = unit / kRowChunks;
    __pipeline_memcpy_async(SharedChunk<KS>(shared, row, unit % kRowChunks), packed + unit,
                            sizeof(uint4));
  }
  __pipeline_commit();
  for (int row = static_cast<int>(threadIdx.x); row < rows; row += kThreads) {
    shared_lse[row] = args.lse_log2[row_base + row];
  }
  __pipeline_wait_prior(0);
}

// Writes the columns' sums of output row `out_row`; lanes of a quad hold parts of the same columns.
template <int MT>
__device__ void WriteColumns(const ColumnArgs& args, int64_t out_row, int64_t first_item, int lane,
                             float (&sums)[MT][2]) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = GroupSum(sums[m][half], 4);
      const int64_t n = first_item + m * kTileRows + half * 8 + lane / 4;
      if (lane % 4 == 0 && n < args.shape.num_columns) {
        args.op.out[out_row * args.shape.num_items + n] = sum * args.op.factor;
      }
      sums[m][half] = 0;
    }
  }
}

// Warps hold items in registers and pass over all query rows. grid (column blocks, KV heads)
template <typename T, int KS, int MT>
__global__ void __launch_bounds__(kThreads, 2)
    SumColumnsKernel(ColumnArgs args, int rows_per_stage) {
  extern __shared__ uint4 shared_queries[];
  auto* const shared_lse = reinterpret_cast<float*>(shared_queries + rows_per_stage * KS * 4);
  constexpr int kBlockItems = kWarps * MT * kTileRows;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int h = static_cast<int>(blockIdx.y);
  const bool resident = rows_per_stage >= args.rows;  // one stage holds all rows
  bool fetched = false;
  for (int64_t block_first = static_cast<int64_t>(blockIdx.x) * kBlockItems;
       block_first < args.shape.num_columns;
       block_first += static_cast<int64_t>(gridDim.x) * kBlockItems) {
    const int64_t first_item = block_first + warp * (MT * kTileRows);
    RowTile<KS> items[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      items[m] = LoadItemTile<T, KS>(args, h, first_item + m * kTileRows, lane);
    }
    float sums[MT][2] = {};
    for (int first_row = 0; first_row < args.rows; first_row += rows_per_stage) {
      const int rows = min(rows_per_stage, args.rows - first_row);
      if (!resident || !fetched) {
        __syncthreads();  // the last stage is done with
        FetchQueries<KS>(args, h, first_row, rows, shared_queries, shared_lse);
        __syncthreads();
        fetched = true;
      }
#pragma unroll 2
      for (int row = 0; row < rows; row += kTileCols) {
        float logits[MT][4];
        Multiply<T, KS, MT>(logits, items, shared_queries, row, lane);
        const float2 lse = *reinterpret_cast<const float2*>(shared_lse + row + lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            sums[m][half] += Exp2(fmaf(logits[m][2 * half], args.scale_log2, -lse.x)) +
                             Exp2(fmaf(logits[m][2 * half + 1], args.scale_log2, -lse.y));
          }
        }
        const int done = first_row + row + kTileCols;
        if (args.op.per_query_head && done % args.window_padded == 0) {
          WriteColumns<MT>(
              args, static_cast<int64_t>(h) * args.shape.group + done / args.window_padded - 1,
              first_item, lane, sums);
        }
      }
    }
    if (!args.op.per_query_head) WriteColumns<MT>(args, h, first_item, lane, sums);
  }
}

// ---- launch ------------------------------------------------------------------------------------

template <typename Kernel>
absl::Status AllowShared(Kernel* kernel, int64_t bytes) {
  return CudaStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(bytes)),
                    "cudaFuncSetAttribute");
}

template <typename T, int KS, int MT>
absl::Status SumRows(const ColumnArgs& args, const MmaConfig& config, cudaStream_t stream) {
  constexpr int64_t kSharedBytes = int64_t{kStages} * kTileItems * KS * 4 * sizeof(uint4);
  absl::Status status = AllowShared(SumRowsKernel<T, KS, MT>, kSharedBytes);
  if (!status.ok()) return status;
  const int64_t tiles = CeilDiv(args.shape.num_items, kTileItems);
  const dim3 grid(static_cast<unsigned>(config.splits), static_cast<unsigned>(config.row_blocks),
                  static_cast<unsigned>(args.shape.num_kv_heads));
  SumRowsKernel<T, KS, MT><<<grid, kThreads, kSharedBytes, stream>>>(
      args, config.warps_along_rows, static_cast<int>(CeilDiv(tiles, config.splits)));
  return LaunchStatus("SumRowsKernel");
}

template <typename T, int KS, int MT>
absl::Status SumColumns(const ColumnArgs& args, const MmaConfig& config, cudaStream_t stream) {
  const int64_t shared_bytes =
      config.rows_per_stage * static_cast<int64_t>(KS * 4 * sizeof(uint4) + sizeof(float));
  absl::Status status = AllowShared(SumColumnsKernel<T, KS, MT>, shared_bytes);
  if (!status.ok()) return status;
  const dim3 grid(static_cast<unsigned>(config.column_blocks),
                  static_cast<unsigned>(args.shape.num_kv_heads));
  SumColumnsKernel<T, KS, MT>
      <<<grid, kThreads, static_cast<size_t>(shared_bytes), stream>>>(args, config.rows_per_stage);
  return LaunchStatus("SumColumnsKernel");
}

template <typename T, int KS, int MT>
absl::Status Run(ColumnArgs args, const MmaConfig& config, cudaStream_t stream) {
  absl::Status status = PackQueries<T>(args, config.steps * 32, stream);
  if (status.ok() && args.op.lse == nullptr) {
    status.Update(SumRows<T, KS, MT>(args, config, stream));
  }
  if (status.ok()) status.Update(JoinRows(args, stream));
  args.scale_log2 *= args.op.power;
  if (status.ok()) status.Update(SumColumns<T, KS, MT>(args, config, stream));
  return status;
}

template <typename T>
absl::Status RunType(const ColumnArgs& args, const MmaConfig& config, cudaStream_t stream) {
  switch (config.steps) {
    case 2:
      return Run<T, 2, 2>(args, config, stream);
    case 4:
      return Run<T, 4, 2>(args, config, stream);
    default:
      return Run<T, 8, 1>(args, config, stream);
  }
}

}  // namespace

absl::Status RunColumnSoftmaxMma(const ColumnSoftmax& op, const Launch& launch) {
  const ColumnShape shape = ShapeOf(op);
  const MmaConfig config = ChooseMmaConfig(shape, launch.num_sms);
  ColumnArgs args = {.op = op,
                     .shape = shape,
                     .aligned = HasAlignedChunks(op.items) &&
                                (op.items_low.data == nullptr || HasAlignedChunks(op.items_low)),
                     .window_padded = config.window_padded,
                     .rows = config.rows,
                     .scale_log2 = op.softmax_scale * kLog2E,
                     .queries = nullptr,
                     .partials = nullptr,
                     .num_partials = config.num_partials(),
                     .lse_log2 = nullptr};
  const ColumnScratch scratch = ScratchOf(args, config.steps * 32, 2);
  absl::StatusOr<Buffer> memory = launch.Scratch(scratch.size_bytes());
  if (!memory.ok()) return memory.status();
  scratch.Assign(memory->data(), args);
  return op.items.dtype == DType::kFloat16 ? RunType<__half>(args, config, launch.stream)
                                           : RunType<__nv_bfloat16>(args, config, launch.stream);
}

}  // namespace dynsplit::kernels

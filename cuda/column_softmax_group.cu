// SPDX-License-Identifier: Apache-2.0
//
// column_softmax.h by warpgroups (group_mma.cuh), for what window scores are: items without
// lengths, rows summed over the group. Bound by reading the items once a pass and by the tensor
// cores alike (rows * depth products an item), so exponentials, copies and products of different
// tiles run side by side.
//
//   pass 1  a warpgroup holds the sums of 64 rows by a batch of items: each row's log-sum-exp over
//           a split of the items
//   pass 2  a warpgroup holds the sums of 64 items by a batch of rows: each item's weights, summed
//           over all rows
//
// All rows of a KV head stay in shared memory; items pass through it, a tile ahead.
#include <algorithm>

#include "cuda/async_copy.cuh"
#include "cuda/column_softmax.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/group_mma.cuh"

namespace dynsplit::kernels {
namespace {

// Warpgroups of a thread block, as many as the registers serve: one multiplies while the others
// take exponentials.
constexpr int kGroups = 4;
constexpr int kThreads = kGroups * kGroupThreads;
constexpr int kStages = 2;
constexpr int kBlockRows = kGroups * kGroupRows;  // pass 1
constexpr int kTileItems = 256;
constexpr int kBatchItems = 128;

struct GroupArgs {
  ColumnSoftmax op;
  ColumnShape shape;
  int rows;          // of a KV head: group * window
  int first_row;     // pass 2: rows [first_row, first_row + kBlockRows) are added
  float scale_log2;  // softmax_scale * log2(e), > 0; times power in pass 2
  float2* partials;  // [Hkv, rows, splits]: maximum and sum, base 2; null where lse is supplied
  int splits;
};

__device__ const std::byte* QueryRow(const GroupArgs& args, int h, int row) {
  const int g = row / args.shape.window;
  return RowAddress(args.op.queries, row - g * args.shape.window, h * args.shape.group + g);
}

#ifdef DYNSPLIT_HAS_GROUP_MMA

// Until all threads of the warpgroup are here.
__device__ void SyncGroup() {
  constexpr int kFirstBarrier = Turns::kFirstBarrier + kGroups;
  asm volatile(
      "bar.sync %0, %1;" ::"r"(kFirstBarrier + static_cast<int>(threadIdx.x) / kGroupThreads),
      "n"(kGroupThreads)
      : "memory");
}

// Rows [first, first + num_rows) of queries as arrays of kArrayRows rows; zeros beyond the rows.
template <int kSteps, int kArrayRows>
__device__ void FillRows(const GroupArgs& args, int h, int first, int num_rows, std::byte* shared) {
  constexpr int kRowChunks = kSteps * 2;
  for (int unit = static_cast<int>(threadIdx.x); unit < num_rows * kRowChunks; unit += kThreads) {
    const int row = unit / kRowChunks;
    const int chunk = unit % kRowChunks;
    const bool valid = first + row < args.rows;
    const std::byte* const from = QueryRow(args, h, valid ? first + row : 0) + chunk * kChunkBytes;
    std::byte* const array = shared + row / kArrayRows * (kArrayRows * kSteps * 32);
    CopyAsync<kChunkBytes>(array + SwizzledByte<kArrayRows>(row % kArrayRows, chunk), from, valid);
  }
  CommitCopies();
}

// An array of kRows items from `first` on, zeros beyond them, by kTeam threads.
template <int kSteps, int kRows, int kTeam>
__device__ void FetchItems(const GroupArgs& args, int h, int64_t first, std::byte* array) {
  CopySwizzledRows<kSteps, kRows, kTeam>(args.op.items, args.shape.num_items, h, first, array);
  CommitCopies();
}

// A batch of products: 64 rows of one array times kCols of another, from `first_col` on. The next
// warpgroup's are enqueued behind it.
template <typename T, int kSteps, int kArrayCols, int kCols>
__device__ void MultiplyBatch(uint32_t rows, uint32_t cols, int first_col, const Turns& turns,
                              float (&sum)[kCols / 2]) {
  turns.Wait();
  BeginGroupMma();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    GroupMma<T>(sum, SwizzledRows<kGroupRows>(rows, 0, step),
                SwizzledRows<kArrayCols>(cols, first_col, step), step);
  }
  CommitGroupMma();
  turns.Pass();
  WaitForGroupMma<0>();
  Own(sum);
}

// ---- pass 1 ------------------------------------------------------------------------------------

// Adds one row's logits of a batch, against the maximum known so far: the true one would cost an
// operation a logit. Where that may have overflowed (a weight of 2^64 is far from it), and at
// first, the maximum is brought up to date and the sum taken again.
__device__ void AddRow(const float (&logits)[kBatchItems / 2], int half, float scale_log2,
                       SoftmaxSum& row) {
  constexpr float kMostSum = 0x1p64F;
  const auto weights = [&](float maximum) {
    float sums[2] = {};
#pragma unroll
    for (int j = 0; j < kBatchItems / 8; ++j) {
      sums[0] += Exp2(fmaf(logits[4 * j + 2 * half], scale_log2, -maximum));
      sums[1] += Exp2(fmaf(logits[4 * j + 2 * half + 1], scale_log2, -maximum));
    }
    return sums[0] + sums[1];
  };
  float sum = weights(row.maximum);
  if (!(sum <= kMostSum)) {
    float largest = logits[2 * half];
#pragma unroll
    for (int j = 0; j < kBatchItems / 8; ++j) {
      largest = fmaxf(largest, fmaxf(logits[4 * j + 2 * half], logits[4 * j + 2 * half + 1]));
    }
    const float maximum = fmaxf(row.maximum, largest * scale_log2);
    row.sum *= Exp2(row.maximum - maximum);
    row.maximum = maximum;
    sum = weights(maximum);
  }
  row.sum += sum;
}

// Hides items beyond the last that a row sees. `first` and `first_row`: of the batch.
__device__ void MaskItems(const GroupArgs& args, int64_t first, int first_row,
                          float (&logits)[kBatchItems / 2]) {
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + thread / kWarp * 16 + thread % kWarp / 4 + half * 8;
    const int64_t last = args.op.causal
                             ? args.shape.num_items - args.shape.window + row % args.shape.window
                             : args.shape.num_items - 1;
    const int64_t last_here = last - first - thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < kBatchItems / 4; ++i) {
      float& logit = logits[i / 2 * 4 + 2 * half + i % 2];
      if (i / 2 * 8 + i % 2 > last_here) logit = -INFINITY;
    }
  }
}

__device__ void WritePartials(const GroupArgs& args, int h, int first_row,
                              const SoftmaxSum (&rows)[2]) {
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    SoftmaxSum total = rows[half];
    total.MergeLanes(4);
    const int row = first_row + thread / kWarp * 16 + thread % kWarp / 4 + half * 8;
    if (thread % 4 == 0 && row < args.rows) {
      args.partials[(static_cast<int64_t>(h) * args.rows + row) * args.splits + blockIdx.x] =
          make_float2(total.maximum, total.sum);
    }
  }
}

// grid (splits, row blocks, KV heads)
template <typename T, int kSteps>
__global__ void __launch_bounds__(kThreads, 1) SumRowsKernel(GroupArgs args) {
  extern __shared__ std::byte shared[];
  constexpr int kRowBytes = kSteps * 32;
  std::byte* const queries = AlignShared(shared);
  std::byte* const stages = queries + kBlockRows * kRowBytes;
  WaitForEarlierGrids();
  AllowDependents();
  const int h = static_cast<int>(blockIdx.z);
  const int group = GroupIndex();
  const int block_row = static_cast<int>(blockIdx.y) * kBlockRows;
  const int first_row = block_row + group * kGroupRows;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTileItems;
  const int64_t end = args.shape.num_items;
  const int64_t first_masked =  // items from here on are hidden from some row
      args.op.causal ? end - args.shape.window + 1 : end;
  int64_t first = static_cast<int64_t>(blockIdx.x) * kTileItems;
  FillRows<kSteps, kGroupRows>(args, h, block_row, kBlockRows, queries);
  FetchItems<kSteps, kTileItems, kThreads>(args, h, first, stages);
  const uint32_t rows_address = SharedAddress(queries) + group * kGroupRows * kRowBytes;
  const Turns turns(group, kGroups);
  SoftmaxSum rows[2];
  float logits[kBatchItems / 2];
  for (int stage = 0; first < end; first += stride, stage ^= 1) {
    WaitForCopies<0>();
    ShowToGroupMma();
    __syncthreads();  // the tile is here, and the one before done with
    if (first + stride < end) {
      FetchItems<kSteps, kTileItems, kThreads>(args, h, first + stride,
                                               stages + (stage ^ 1) * kTileItems * kRowBytes);
    }
    const uint32_t tile = SharedAddress(stages + stage * kTileItems * kRowBytes);
#pragma unroll 1
    for (int batch = 0; batch < kTileItems; batch += kBatchItems) {
      MultiplyBatch<T, kSteps, kTileItems, kBatchItems>(rows_address, tile, batch, turns, logits);
      if (first + batch + kBatchItems > first_masked) {
        MaskItems(args, first + batch, first_row, logits);
      }
      AddRow(logits, 0, args.scale_log2, rows[0]);
      AddRow(logits, 1, args.scale_log2, rows[1]);
    }
  }
  WritePartials(args, h, first_row, rows);
}

// ---- pass 2 ------------------------------------------------------------------------------------

// Where a row's offset lies: what a thread wants of 16 rows is together.
__device__ int OffsetPlace(int row) {
  return row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2;
}

// Minus the log-sum-exp of the rows from args.first_row on, base 2, times power; -infinity beyond
// the rows.
__device__ void FillOffsets(const GroupArgs& args, int h, int num_rows, float* offsets) {
  for (int place = static_cast<int>(threadIdx.x); place < num_rows; place += kThreads) {
    const int row = args.first_row + place;
    float lse = INFINITY;
    if (row < args.rows && args.op.lse != nullptr) {
      const int g = row / args.shape.window;
      const int64_t i = row - g * args.shape.window;
      lse = args.op.lse[i * args.op.queries.num_heads + h * args.shape.group + g] * kLog2E;
    } else if (row < args.rows) {
      const float2* const parts =
          args.partials + (static_cast<int64_t>(h) * args.rows + row) * args.splits;
      SoftmaxSum total;
      for (int part = 0; part < args.splits; ++part) total.Merge({parts[part].x, parts[part].y});
      lse = total.maximum + log2f(total.sum);
    }
    offsets[OffsetPlace(place)] = -lse * args.op.power;
  }
}

// Adds the rows' weights to the thread's two items.
template <int kCols>
__device__ void AddRows(float (&logits)[kCols / 2], float scale_log2, const float* offsets,
                        float (&sums)[2]) {
  const int quad_lane = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int j = 0; j < kCols / 16; ++j) {
    const float4 offset = *reinterpret_cast<const float4*>(offsets + 16 * j + 4 * quad_lane);
    const float* const first = logits + 8 * j;
    sums[0] += Exp2(fmaf(first[0], scale_log2, offset.x));
    sums[1] += Exp2(fmaf(first[2], scale_log2, offset.x));
    sums[0] += Exp2(fmaf(first[1], scale_log2, offset.y));
    sums[1] += Exp2(fmaf(first[3], scale_log2, offset.y));
    sums[0] += Exp2(fmaf(first[4], scale_log2, offset.z));
    sums[1] += Exp2(fmaf(first[6], scale_log2, offset.z));
    sums[0] += Exp2(fmaf(first[5], scale_log2, offset.w));
    sums[1] += Exp2(fmaf(first[7], scale_log2, offset.w));
  }
}

// Writes the sums of the warpgroup's items, and begins anew.
__device__ void WriteSums(const GroupArgs& args, int h, int64_t first, float (&sums)[2]) {
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = GroupSum(sums[half], 4);
    const int64_t n = first + thread / kWarp * 16 + thread % kWarp / 4 + half * 8;
    if (thread % 4 == 0 && n < args.shape.num_columns) {
      float& out = args.op.out[h * args.shape.num_items + n];
      out = (args.first_row > 0 ? out : 0) + sum * args.op.factor;
    }
    sums[half] = 0;
  }
}

// grid (blocks, KV heads)
template <typename T, int kSteps, int kCols>
__global__ void __launch_bounds__(kThreads, 1) SumColumnsKernel(GroupArgs args) {
  extern __shared__ std::byte shared[];
  constexpr int kRowBytes = kSteps * 32;
  constexpr int kTileBytes = kGroupRows * kRowBytes;
  const int h = static_cast<int>(blockIdx.y);
  const int group = GroupIndex();
  const int num_rows = (min(args.rows - args.first_row, kBlockRows) + kCols - 1) / kCols * kCols;
  std::byte* const stages = AlignShared(shared) + group * kStages * kTileBytes;
  std::byte* const rows = AlignShared(shared) + kGroups * kStages * kTileBytes;
  auto* const offsets = reinterpret_cast<float*>(rows + num_rows * kRowBytes);
  WaitForEarlierGrids();
  AllowDependents();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kGroups * kGroupRows);
  const int64_t lead = static_cast<int64_t>(group) * kGroupRows;
  const int64_t end = args.shape.num_columns;
  int64_t first = static_cast<int64_t>(blockIdx.x) * (kGroups * kGroupRows);  // of the block
  FillRows<kSteps, kCols>(args, h, args.first_row, num_rows, rows);
  FetchItems<kSteps, kGroupRows, kGroupThreads>(args, h, first + lead, stages);
  FillOffsets(args, h, num_rows, offsets);
  WaitForCopies<0>();
  ShowToGroupMma();
  __syncthreads();

  const uint32_t base = SharedAddress(AlignShared(shared));
  const uint32_t stages_address = base + static_cast<uint32_t>(group * kStages * kTileBytes);
  const uint32_t rows_address = base + static_cast<uint32_t>(kGroups * kStages * kTileBytes);
  const int num_batches = num_rows / kCols;
  const Turns turns(group, kGroups);
  float logits[kCols / 2];
  float sums[2] = {};
  for (int stage = 0; first < end; first += stride, stage ^= 1) {
    WaitForCopies<0>();
    ShowToGroupMma();
    SyncGroup();  // the tile is here, and the one before done with
    if (first + stride < end) {
      FetchItems<kSteps, kGroupRows, kGroupThreads>(args, h, first + stride + lead,
                                                    stages + (stage ^ 1) * kTileBytes);
    }
    const uint32_t tile = stages_address + static_cast<uint32_t>(stage * kTileBytes);
    uint32_t batch = rows_address;
    const float* batch_offsets = offsets;
#pragma unroll 1
    for (int i = 0; i < num_batches; ++i) {
      MultiplyBatch<T, kSteps, kCols, kCols>(tile, batch, 0, turns, logits);
      AddRows<kCols>(logits, args.scale_log2, batch_offsets, sums);
      batch += kCols * kRowBytes;
      batch_offsets += kCols;
    }
    WriteSums(args, h, first + lead, sums);
  }
}

#else

template <typename T, int kSteps>
__global__ void SumRowsKernel(GroupArgs) {}
template <typename T, int kSteps, int kCols>
__global__ void SumColumnsKernel(GroupArgs) {}

#endif  // DYNSPLIT_HAS_GROUP_MMA

// ---- launch ------------------------------------------------------------------------------------

absl::Status LaunchGroups(void (*kernel)(GroupArgs), const char* name, dim3 grid,
                          int64_t shared_bytes, const GroupArgs& args, cudaStream_t stream) {
  const int64_t bytes = shared_bytes + kSharedAlignment;
  absl::Status status =
      CudaStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)),
                 "cudaFuncSetAttribute");
  if (!status.ok()) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  return CudaStatus(LaunchDependent(config, kernel, args), name);
}

template <typename T, int kSteps>
absl::Status SumRows(const GroupArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.splits),
                  static_cast<unsigned>(CeilDiv(args.rows, kBlockRows)),
                  static_cast<unsigned>(args.shape.num_kv_heads));
  return LaunchGroups(SumRowsKernel<T, kSteps>, "SumRowsKernel", grid,
                      int64_t{kBlockRows + kStages * kTileItems} * kSteps * 32, args, stream);
}

template <typename T, int kSteps, int kCols>
absl::Status SumColumns(const GroupArgs& args, int num_sms, cudaStream_t stream) {
  const int64_t num_rows = CeilDiv(std::min(args.rows - args.first_row, kBlockRows), kCols) * kCols;
  const int64_t tiles = CeilDiv(args.shape.num_columns, kGroups * kGroupRows);
  const int64_t blocks =
      std::clamp<int64_t>(num_sms / args.shape.num_kv_heads, 1, std::max<int64_t>(tiles, 1));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(args.shape.num_kv_heads));
  return LaunchGroups(SumColumnsKernel<T, kSteps, kCols>, "SumColumnsKernel", grid,
                      kGroups * kStages * kGroupRows * kSteps * 32 +
                          num_rows * (kSteps * 32 + static_cast<int64_t>(sizeof(float))),
                      args, stream);
}

template <typename T, int kSteps>
absl::Status Run(GroupArgs args, const Launch& launch) {
  if (args.op.lse == nullptr) {
    absl::Status status = SumRows<T, kSteps>(args, launch.stream);
    if (!status.ok()) return status;
  }
  args.scale_log2 *= args.op.power;
  for (; args.first_row < args.rows; args.first_row += kBlockRows) {
    const int rows = args.rows - args.first_row;
    absl::Status status =
        rows <= 32   ? SumColumns<T, kSteps, 32>(args, launch.num_sms, launch.stream)
        : rows <= 64 ? SumColumns<T, kSteps, 64>(args, launch.num_sms, launch.stream)
                     : SumColumns<T, kSteps, 128>(args, launch.num_sms, launch.stream);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status RunType(const GroupArgs& args, const Launch& launch) {
  return args.shape.depth == 64 ? Run<T, 4>(args, launch) : Run<T, 8>(args, launch);
}

}  // namespace

bool UsesGroupMma(const ColumnSoftmax& op) {
#ifndef DYNSPLIT_GROUP_MMA
  return false;  // not compiled for a device that has it
#endif
  const ColumnShape shape = ShapeOf(op);
  return UsesTensorCores(op) && op.items_low.data == nullptr && op.block_starts == nullptr &&
         !op.per_query_head && op.softmax_scale > 0 && (shape.depth == 64 || shape.depth == 128) &&
         HasAlignedChunks(op.items) && HasAlignedChunks(op.queries) && DeviceHasGroupMma();
}

absl::Status RunColumnSoftmaxGroup(const ColumnSoftmax& op, const Launch& launch) {
  GroupArgs args = {.op = op,
                    .shape = ShapeOf(op),
                    .rows = 0,
                    .first_row = 0,
                    .scale_log2 = op.softmax_scale * kLog2E,
                    .partials = nullptr,
                    .splits = 0};
  args.rows = args.shape.group * args.shape.window;
  Buffer partials;
  if (op.lse == nullptr) {
    const int64_t row_blocks = CeilDiv(args.rows, kBlockRows) * args.shape.num_kv_heads;
    args.splits = static_cast<int>(std::clamp<int64_t>(launch.num_sms / row_blocks, 1,
                                                       CeilDiv(args.shape.num_items, kTileItems)));
    absl::StatusOr<Buffer> memory =
        launch.Scratch(int64_t{args.shape.num_kv_heads} * args.rows * args.splits *
                       static_cast<int64_t>(sizeof(float2)));
    if (!memory.ok()) return memory.status();
    partials = *std::move(memory);
    args.partials = partials.as<float2>();
  }
  return op.items.dtype == DType::kFloat16 ? RunType<__half>(args, launch)
                                           : RunType<__nv_bfloat16>(args, launch);
}

}  // namespace dynsplit::kernels

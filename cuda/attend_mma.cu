// SPDX-License-Identifier: Apache-2.0
//
// One pass of MeasureAttention on tensor cores, for 16-bit keys and values of one type and at most
// 128 channels. A warp holds 16 query rows and their output; keys and values pass through shared
// memory in two stages. Weights, and queries that were turned, are split into a high and a low half
// of the 16-bit type, so that the error of the products stays near that of fp32.
#include <cuda_pipeline_primitives.h>

#include "cuda/attend.cuh"
#include "cuda/cuda_status.h"
#include "cuda/mma.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlockRows = kWarps * kTileRows;
static_assert(kBlockRows == kAttendTile);
constexpr int kTileItems = kAttendTile;
constexpr int kItemTiles = kTileItems / kTileCols;
constexpr int kStages = 2;

// Values are read transposed, eight items of one chunk at a time: chunk c of item n lies at
// c ^ (n & 7).
template <int KS>
__device__ uint4* ValueChunk(uint4* tile, int item, int chunk) {
  return tile + item * (KS * 4) + (chunk ^ (item & 7));
}

template <typename T>
__device__ void FetchChunk(uint4* to, const std::byte* from, bool valid, bool aligned) {
  if (!valid) {
    *to = make_uint4(0, 0, 0, 0);
  } else if (aligned) {
    __pipeline_memcpy_async(to, from, sizeof(uint4));
  } else {
    *to = LoadBits<T>(from, false);
  }
}

// Keys of items [first, first + kTileItems), then their values, into a stage.
template <typename T, int KS, bool kWithValues>
__device__ void FetchItems(const Pass& pass, int h, int64_t first, uint4* stage) {
  constexpr int kRowChunks = KS * 4;
  uint4* const values = stage + kTileItems * kRowChunks;
  for (int unit = static_cast<int>(threadIdx.x); unit < kTileItems * kRowChunks; unit += kThreads) {
    const int item = unit / kRowChunks;
    const int chunk = unit % kRowChunks;
    const int64_t n = first + item;
    const bool valid = n < pass.num_items && chunk * kChunk < pass.keys.head_dim;
    const int offset = chunk * static_cast<int>(sizeof(uint4));
    const int64_t row = valid && pass.keys_by_position ? pass.Position(h, n) : n;
    FetchChunk<T>(SharedChunk<KS>(stage, item, chunk),
                  valid ? RowAddress(pass.keys, row, h) + offset : nullptr, valid,
                  pass.keys_aligned);
    if constexpr (kWithValues) {
      FetchChunk<T>(ValueChunk<KS>(values, item, chunk),
                    valid ? RowAddress(pass.values, n, h) + offset : nullptr, valid,
                    pass.values_aligned);
    }
  }
  __pipeline_commit();
}

template <int KS>
__device__ RowTile<KS> LoadQueries(const void* packed, const Queries& queries, int h, int first_row,
                                   int lane) {
  RowTile<KS> tile;
  const auto* const chunks = static_cast<const uint4*>(packed);
  const uint4 zero = make_uint4(0, 0, 0, 0);
  const int row = first_row + lane / 4;
  const int64_t base = static_cast<int64_t>(h) * queries.rows;
  const int row_chunks = queries.depth_padded / kChunk;
#pragma unroll
  for (int step = 0; step < KS; ++step) {
    const int chunk = 4 * step + lane % 4;
    const bool inside = chunk < row_chunks;
    tile.Set(
        step, inside && row < queries.rows ? chunks[(base + row) * row_chunks + chunk] : zero,
        inside && row + 8 < queries.rows ? chunks[(base + row + 8) * row_chunks + chunk] : zero);
  }
  return tile;
}

// What a thread holds of its warp's rows: row lane / 4 (half 0) and lane / 4 + 8 (half 1).
template <int KS>
struct RowState {
  float maximum[2];
  float sum[2];  // of this lane's columns
  float output[KS * 4][4];
  int64_t last_visible[2];
};

// logits -> weights relative to the new maxima.
template <int KS, bool kWithValues>
__device__ void Weigh(const Pass& pass, int h, int64_t first, int lane,
                      float (&logits)[kItemTiles][4], RowState<KS>& state) {
  const int64_t last = min(first + kTileItems, pass.num_items) - 1;
  const bool masked = first + kTileItems > pass.num_items ||
                      pass.Position(h, last) > pass.num_tokens - pass.queries.window;
  float largest[2] = {state.maximum[0], state.maximum[1]};
#pragma unroll
  for (int tile = 0; tile < kItemTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float logit = logits[tile][i] * pass.scale_log2;
      if (masked) {
        const int64_t n = first + tile * kTileCols + lane % 4 * 2 + i % 2;
        if (n > last || pass.Position(h, n) > state.last_visible[i / 2]) logit = -INFINITY;
      }
      logits[tile][i] = logit;
      largest[i / 2] = fmaxf(largest[i / 2], logit);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    largest[half] = GroupMax(largest[half], 4);
    const float shrink = Exp2(state.maximum[half] - largest[half]);
    state.maximum[half] = largest[half];
    state.sum[half] *= shrink;
    if constexpr (kWithValues) {
#pragma unroll
      for (int tile = 0; tile < KS * 4; ++tile) {
        state.output[tile][2 * half] *= shrink;
        state.output[tile][2 * half + 1] *= shrink;
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kItemTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      logits[tile][i] = Exp2(logits[tile][i] - state.maximum[i / 2]);
      state.sum[i / 2] += logits[tile][i];
    }
  }
}

// output += weights * values, weights split in two halves.
template <typename T, int KS>
__device__ void AddValues(const float (&weights)[kItemTiles][4], uint4* values, int lane,
                          RowState<KS>& state) {
#pragma unroll
  for (int step = 0; step < kTileItems / 16; ++step) {
    uint32_t high[4];
    uint32_t low[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float* const pair = &weights[2 * step + part / 2][part % 2 * 2];
      high[part] = PackPair<T>(pair[0], pair[1]);
      low[part] = PackPair<T>(Remainder<T>(pair[0]), Remainder<T>(pair[1]));
    }
    const int item = step * 16 + (lane / 8 % 2) * 8 + lane % 8;
#pragma unroll
    for (int chunk = 0; chunk < KS * 4; chunk += 2) {
      uint32_t b[4];
      LoadTransposed(b, ValueChunk<KS>(values, item, chunk + lane / 16));
      Mma<T>(state.output[chunk], high, b[0], b[1]);
      Mma<T>(state.output[chunk], low, b[0], b[1]);
      Mma<T>(state.output[chunk + 1], high, b[2], b[3]);
      Mma<T>(state.output[chunk + 1], low, b[2], b[3]);
    }
  }
}

template <int KS, bool kWithValues>
__device__ void WriteRows(const Pass& pass, int h, int first_row, int lane, RowState<KS>& state) {
  const int64_t all_rows = static_cast<int64_t>(pass.num_kv_heads) * pass.queries.rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = GroupSum(state.sum[half], 4);
    const int r = first_row + half * 8 + lane / 4;
    if (r >= pass.queries.rows) continue;
    const int64_t row = blockIdx.x * all_rows + static_cast<int64_t>(h) * pass.queries.rows + r;
    if (lane % 4 == 0) pass.out.sums[row] = make_float2(state.maximum[half], sum);
    if constexpr (kWithValues) {
#pragma unroll
      for (int tile = 0; tile < KS * 4; ++tile) {
        const int channel = tile * kTileCols + lane % 4 * 2;
        if (channel < pass.values.head_dim) {
          *reinterpret_cast<float2*>(pass.out.outputs + row * pass.values.head_dim + channel) =
              make_float2(state.output[tile][2 * half], state.output[tile][2 * half + 1]);
        }
      }
    }
  }
}

// grid (splits, row blocks, KV heads)
template <typename T, int KS, bool kWithValues, bool kTurned>
__global__ void __launch_bounds__(kThreads, kTurned ? 2 : 3)
    AttendMmaKernel(Pass pass, int tiles_per_split) {
  extern __shared__ uint4 stages[];
  constexpr int kSideChunks = kTileItems * KS * 4;
  constexpr int kStageChunks = kSideChunks * (kWithValues ? 2 : 1);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int h = static_cast<int>(blockIdx.z);
  const int first_row = static_cast<int>(blockIdx.y) * kBlockRows + warp * kTileRows;

  RowTile<KS> queries[kTurned ? 2 : 1];
  queries[0] = LoadQueries<KS>(pass.queries.high, pass.queries, h, first_row, lane);
  if constexpr (kTurned) {
    queries[1] = LoadQueries<KS>(pass.queries.low, pass.queries, h, first_row, lane);
  }
  RowState<KS> state;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = first_row + half * 8 + lane / 4;
    state.maximum[half] = kNoLogit;
    state.sum[half] = 0;
    state.last_visible[half] = pass.num_tokens - pass.queries.window + r % pass.queries.window;
  }
#pragma unroll
  for (int tile = 0; tile < KS * 4; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.output[tile][i] = 0;
  }

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tiles_per_split * kTileItems;
  const int64_t end =
      min(begin + static_cast<int64_t>(tiles_per_split) * kTileItems, pass.num_items);
  if (begin < end) FetchItems<T, KS, kWithValues>(pass, h, begin, stages);
  int stage = 0;
  for (int64_t first = begin; first < end; first += kTileItems, stage ^= 1) {
    if (first + kTileItems < end) {
      FetchItems<T, KS, kWithValues>(pass, h, first + kTileItems,
                                     stages + (stage ^ 1) * kStageChunks);
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    __syncthreads();
    uint4* const keys = stages + stage * kStageChunks;
    float logits[kItemTiles][4];
#pragma unroll
    for (int tile = 0; tile < kItemTiles; ++tile) {
      float sums[kTurned ? 2 : 1][4];
      Multiply<T, KS>(sums, queries, keys, tile * kTileCols, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logits[tile][i] = kTurned ? sums[0][i] + sums[kTurned ? 1 : 0][i] : sums[0][i];
      }
    }
    Weigh<KS, kWithValues>(pass, h, first, lane, logits, state);
    if constexpr (kWithValues) AddValues<T, KS>(logits, keys + kSideChunks, lane, state);
    __syncthreads();  // the stage is free again
  }
  WriteRows<KS, kWithValues>(pass, h, first_row, lane, state);
}

template <typename T, int KS, bool kWithValues, bool kTurned>
absl::Status LaunchPass(const Pass& pass, cudaStream_t stream) {
  constexpr int kSharedBytes =
      kStages * kTileItems * KS * 4 * static_cast<int>(sizeof(uint4)) * (kWithValues ? 2 : 1);
  const auto kernel = AttendMmaKernel<T, KS, kWithValues, kTurned>;
  absl::Status status = CudaStatus(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
      "cudaFuncSetAttribute");
  if (!status.ok()) return status;
  const dim3 grid(static_cast<unsigned>(pass.out.splits),
                  static_cast<unsigned>(CeilDiv(pass.queries.rows, kBlockRows)),
                  static_cast<unsigned>(pass.num_kv_heads));
  const auto tiles_per_split =
      static_cast<int>(CeilDiv(CeilDiv(pass.num_items, kTileItems), pass.out.splits));
  kernel<<<grid, kThreads, kSharedBytes, stream>>>(pass, tiles_per_split);
  return LaunchStatus("AttendMmaKernel");
}

template <typename T, int KS>
absl::Status LaunchDepth(const Pass& pass, cudaStream_t stream) {
  if (pass.values.data == nullptr) return LaunchPass<T, KS, false, false>(pass, stream);
  if (pass.queries.low != nullptr) return LaunchPass<T, KS, true, true>(pass, stream);
  return LaunchPass<T, KS, true, false>(pass, stream);
}

template <typename T>
absl::Status LaunchType(const Pass& pass, cudaStream_t stream) {
  return pass.keys.head_dim <= 64 ? LaunchDepth<T, 2>(pass, stream)
                                  : LaunchDepth<T, 4>(pass, stream);
}

}  // namespace

bool UsesTensorCores(const Pass& pass, DType queries_dtype) {
  return DTypeBytes(pass.keys.dtype) == 2 && queries_dtype == pass.keys.dtype &&
         pass.keys.head_dim <= kAttendMmaMaxDim &&
         (pass.values.data == nullptr || pass.values.dtype == pass.keys.dtype);
}

absl::Status AttendMma(const Pass& pass, cudaStream_t stream) {
  return pass.keys.dtype == DType::kFloat16 ? LaunchType<__half>(pass, stream)
                                            : LaunchType<__nv_bfloat16>(pass, stream);
}

}  // namespace dynsplit::kernels

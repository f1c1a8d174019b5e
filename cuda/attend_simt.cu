// SPDX-License-Identifier: Apache-2.0
//
// One pass of MeasureAttention in fp32 arithmetic, for every type and head dimension.
#include "cuda/attend.cuh"
#include "cuda/cuda_status.h"
#include "cuda/simt_tile.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kValueColumns = 128;  // channels of the output a thread block accumulates
constexpr int kValueRows = 32;      // items of V in shared memory at a time
static_assert(kSimtTile == kAttendTile);
constexpr int kColumnsPerThread = kValueColumns / kSimtSide;

struct KeySource {
  const Pass& pass;
  int h;
  __device__ void Load(int64_t n, int chunk, float (&out)[kChunk]) const {
    if (n >= pass.num_items || chunk * kChunk >= pass.keys.head_dim) return;
    const int64_t row = pass.keys_by_position ? pass.Position(h, n) : n;
    LoadAnyValues(pass.keys, pass.keys_aligned, row, h, chunk, out);
  }
};

struct QuerySource {
  const float* rows_base;
  int num_rows;
  int depth_padded;
  __device__ void Load(int64_t row, int chunk, float (&out)[kChunk]) const {
    if (row >= num_rows) return;
    LoadValues<float>(reinterpret_cast<const std::byte*>(rows_base + row * depth_padded), chunk,
                      true, 1.0F, out);
  }
};

// Thread (tx, ty) holds rows 4 ty .. + 3; sums are equal in all tx.
struct AttendState {
  float maximum[kSimtPart];
  float sum[kSimtPart];
  float output[kSimtPart][kColumnsPerThread];
};

// Weights of a tile relative to the new maxima, into `weights` [item][row]; rescales the state.
template <bool kWithValues>
__device__ void Weigh(const Pass& pass, int h, int first_row, int64_t first_item,
                      float (&logits)[kSimtPart][kSimtPart], AttendState& state,
                      float (&weights)[kSimtTile][kSimtPitch]) {
  const int tx = static_cast<int>(threadIdx.x) % kSimtSide;
  const int ty = static_cast<int>(threadIdx.x) / kSimtSide;
  const int window = pass.queries.window;
  int64_t positions[kSimtPart];
#pragma unroll
  for (int j = 0; j < kSimtPart; ++j) {
    const int64_t n = first_item + tx * kSimtPart + j;
    positions[j] = n < pass.num_items ? pass.Position(h, n) : pass.num_tokens;  // never visible
  }
#pragma unroll
  for (int i = 0; i < kSimtPart; ++i) {
    const int row = first_row + ty * kSimtPart + i;
    const int64_t last_visible = pass.num_tokens - window + row % window;
    float largest = kNoLogit;
#pragma unroll
    for (int j = 0; j < kSimtPart; ++j) {
      logits[i][j] *= pass.scale_log2;
      if (positions[j] <= last_visible) largest = fmaxf(largest, logits[i][j]);
    }
    largest = fmaxf(GroupMax(largest, kSimtSide), state.maximum[i]);
    const float shrink = Exp2(state.maximum[i] - largest);
    state.maximum[i] = largest;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kSimtPart; ++j) {
      const float weight = positions[j] <= last_visible ? Exp2(logits[i][j] - largest) : 0.0F;
      sum += weight;
      if (kWithValues) weights[tx * kSimtPart + j][ty * kSimtPart + i] = weight;
    }
    state.sum[i] = fmaf(state.sum[i], shrink, GroupSum(sum, kSimtSide));
    if (kWithValues) {
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; ++c) state.output[i][c] *= shrink;
    }
  }
}

// state.output += weights^T * values of the tile's items, `slice` times kValueColumns channels on.
__device__ void AddValues(const Pass& pass, int h, int slice, int64_t first_item,
                          float (&values)[kValueRows][kValueColumns],
                          const float (&weights)[kSimtTile][kSimtPitch], AttendState& state) {
  constexpr int kRowChunks = kValueColumns / kChunk;
  const int tx = static_cast<int>(threadIdx.x) % kSimtSide;
  const int ty = static_cast<int>(threadIdx.x) / kSimtSide;
  for (int part = 0; part < kSimtTile; part += kValueRows) {
    __syncthreads();  // weights are written, the logits' tile and the last values are done with
    for (int unit = static_cast<int>(threadIdx.x); unit < kValueRows * kRowChunks;
         unit += kSimtThreads) {
      const int row = unit / kRowChunks;
      const int chunk = slice * kRowChunks + unit % kRowChunks;
      const int64_t n = first_item + part + row;
      float loaded[kChunk] = {};
      if (n < pass.num_items && chunk * kChunk < pass.values.head_dim) {
        LoadAnyValues(pass.values, pass.values_aligned, n, h, chunk, loaded);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[row][unit % kRowChunks * kChunk + i] = loaded[i];
    }
    __syncthreads();
#pragma unroll 4
    for (int row = 0; row < kValueRows; ++row) {
      const float4 w = *reinterpret_cast<const float4*>(&weights[part + row][ty * kSimtPart]);
      const float w_part[kSimtPart] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; ++c) {
        const float value = values[row][c * kSimtSide + tx];
#pragma unroll
        for (int i = 0; i < kSimtPart; ++i) {
          state.output[i][c] = fmaf(w_part[i], value, state.output[i][c]);
        }
      }
    }
  }
}

// grid (splits, row blocks, KV heads * value slices)
template <bool kWithValues>
__global__ void __launch_bounds__(kSimtThreads) AttendKernel(Pass pass, int tiles_per_split) {
  __shared__ union {
    SimtTile tile;
    float values[kValueRows][kValueColumns];
  } shared;
  __shared__ float weights[kWithValues ? kSimtTile : 1][kSimtPitch];
  float(&tile_weights)[kSimtTile][kSimtPitch] =
      reinterpret_cast<float(&)[kSimtTile][kSimtPitch]>(weights);
  const int h = static_cast<int>(blockIdx.z) % pass.num_kv_heads;
  const int slice = static_cast<int>(blockIdx.z) / pass.num_kv_heads;
  const int first_row = static_cast<int>(blockIdx.y) * kSimtTile;
  const int rows = pass.queries.rows;
  const QuerySource queries = {
      pass.queries.packed + static_cast<int64_t>(h) * rows * pass.queries.depth_padded, rows,
      pass.queries.depth_padded};
  const KeySource keys = {pass, h};
  AttendState state;
#pragma unroll
  for (int i = 0; i < kSimtPart; ++i) {
    state.maximum[i] = kNoLogit;
    state.sum[i] = 0;
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c) state.output[i][c] = 0;
  }
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tiles_per_split * kSimtTile;
  const int64_t end =
      min(begin + static_cast<int64_t>(tiles_per_split) * kSimtTile, pass.num_items);
  for (int64_t first = begin; first < end; first += kSimtTile) {
    float logits[kSimtPart][kSimtPart] = {};
    MultiplyTile(shared.tile, queries, first_row, keys, first, pass.queries.depth_padded, logits);
    Weigh<kWithValues>(pass, h, first_row, first, logits, state, tile_weights);
    if constexpr (kWithValues) AddValues(pass, h, slice, first, shared.values, tile_weights, state);
  }

  const int tx = static_cast<int>(threadIdx.x) % kSimtSide;
  const int ty = static_cast<int>(threadIdx.x) / kSimtSide;
  const int64_t all_rows = static_cast<int64_t>(pass.num_kv_heads) * rows;
#pragma unroll
  for (int i = 0; i < kSimtPart; ++i) {
    const int r = first_row + ty * kSimtPart + i;
    if (r >= rows) continue;
    const int64_t row = blockIdx.x * all_rows + static_cast<int64_t>(h) * rows + r;
    if (slice == 0 && tx == 0) pass.out.sums[row] = make_float2(state.maximum[i], state.sum[i]);
    if constexpr (kWithValues) {
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; ++c) {
        const int channel = slice * kValueColumns + c * kSimtSide + tx;
        if (channel < pass.values.head_dim) {
          pass.out.outputs[row * pass.values.head_dim + channel] = state.output[i][c];
        }
      }
    }
  }
}

}  // namespace

absl::Status AttendSimt(const Pass& pass, cudaStream_t stream) {
  const bool with_values = pass.values.data != nullptr;
  const int64_t slices = with_values ? CeilDiv(pass.values.head_dim, kValueColumns) : 1;
  const dim3 grid(static_cast<unsigned>(pass.out.splits),
                  static_cast<unsigned>(CeilDiv(pass.queries.rows, kSimtTile)),
                  static_cast<unsigned>(pass.num_kv_heads * slices));
  const auto tiles_per_split =
      static_cast<int>(CeilDiv(CeilDiv(pass.num_items, kSimtTile), pass.out.splits));
  if (with_values) {
    AttendKernel<true><<<grid, kSimtThreads, 0, stream>>>(pass, tiles_per_split);
  } else {
    AttendKernel<false><<<grid, kSimtThreads, 0, stream>>>(pass, tiles_per_split);
  }
  return LaunchStatus("AttendKernel");
}

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "cuda/cuda_status.h"
#include "cuda/operations.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;

__device__ void Store(float value, float* out) { *out = value; }
__device__ void Store(float value, __half* out) { *out = __float2half_rn(value); }
__device__ void Store(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

// Outputs are of our own making, 256-byte aligned; rows are whole chunks.
template <typename Out>
__device__ void StoreValues(const float (&values)[kChunk], void* base, int64_t chunk) {
  Chunk<Out> out;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) Store(values[i], &out.values[i]);
  static_cast<Chunk<Out>*>(base)[chunk] = out;
}

// Thread = one chunk of one head of one block; neighbours take neighbouring chunks, so that a
// block's tokens are read in whole rows. Sums run in token order.
template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads)
    SummarizeBlocksKernel(SummarizeBlocksParams params, bool aligned) {
  const TensorView& keys = params.keys;
  const int chunks = keys.head_dim / kChunk;
  const int64_t row_chunks = static_cast<int64_t>(keys.num_heads) * chunks;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t block = unit / row_chunks;
  if (block >= params.num_blocks) return;
  const auto rest = static_cast<int>(unit - block * row_chunks);
  const int h = rest / chunks;
  const int chunk = rest - h * chunks;
  const int32_t begin = params.block_starts[block];
  const int32_t end = params.block_starts[block + 1];
  float low[kChunk];
  float high[kChunk];
  float sum[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    low[i] = INFINITY;
    high[i] = -INFINITY;
    sum[i] = 0;
  }
#pragma unroll 4
  for (int32_t t = begin; t < end; ++t) {
    float values[kChunk];
    LoadValues<T>(RowAddress(keys, t, h), chunk, aligned, RowScale(keys, t, h), values);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      low[i] = fminf(low[i], values[i]);
      high[i] = fmaxf(high[i], values[i]);
      sum[i] += values[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    low[i] += 0.0F;  // -0 becomes +0: which zero is smaller differs between processors
    high[i] += 0.0F;
  }
  if (params.min != nullptr) StoreValues<Out>(low, params.min, unit);
  if (params.max != nullptr) StoreValues<Out>(high, params.max, unit);
  if (params.mean != nullptr) {
    const auto length = static_cast<float>(end - begin);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum[i] /= length;
    StoreValues<Out>(sum, params.mean, unit);
  }
}

}  // namespace

absl::Status SummarizeBlocks(const SummarizeBlocksParams& params, const Launch& launch) {
  const TensorView& keys = params.keys;
  const int64_t units = params.num_blocks * keys.num_heads * (keys.head_dim / kChunk);
  if (units == 0) return absl::OkStatus();
  const auto grid = static_cast<unsigned>(CeilDiv(units, kThreads));
  const bool aligned = HasAlignedChunks(keys);
  DispatchDType(keys.dtype, [&]<typename T>() {
    if constexpr (sizeof(T) == 2) {
      if (params.out_dtype == keys.dtype) {
        SummarizeBlocksKernel<T, T><<<grid, kThreads, 0, launch.stream>>>(params, aligned);
        return;
      }
    }
    SummarizeBlocksKernel<T, float><<<grid, kThreads, 0, launch.stream>>>(params, aligned);
  });
  return LaunchStatus("SummarizeBlocksKernel");
}

}  // namespace dynsplit::kernels

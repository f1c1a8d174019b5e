// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "cuda/cuda_status.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/operations.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 128;      // blocks of a thread block
constexpr int kTileTokens = 4096;  // scores in shared memory at a time
constexpr int kVector = 4;         // of a 16-byte load

using Reduction = ScoringPolicy::BlockReduction;

// Scores of tokens [begin, end) from token `base` on, to tile[token - base]. Requires: the score of
// token `base`, which may lie before `begin`, is 16-byte aligned.
__device__ void LoadTile(const float* scores, int64_t begin, int64_t end, int64_t base,
                         float (&tile)[kTileTokens]) {
  constexpr int kStep = kThreads * kVector;
  constexpr int kLoads = kTileTokens / kStep;
  const int first = static_cast<int>(threadIdx.x) * kVector;
  const auto is_whole = [&](int load) {
    const int64_t t = base + first + load * kStep;
    return t >= begin && t + kVector <= end;
  };
  float4 vectors[kLoads];  // all requested before the first is used
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    if (is_whole(i)) {
      vectors[i] = *reinterpret_cast<const float4*>(scores + base + first + i * kStep);
    }
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int at = first + i * kStep;
    if (is_whole(i)) {
      *reinterpret_cast<float4*>(tile + at) = vectors[i];
    } else {
      for (int k = 0; k < kVector; ++k) {
        const int64_t t = base + at + k;
        if (t >= begin && t < end) tile[at + k] = scores[t];
      }
    }
  }
}

// One thread a (block, row), in token order: the sum is the same on all backends. The blocks of a
// thread block are neighbours, so that it reads a row's tokens once, in vectors. grid (blocks,
// rows)
__global__ void __launch_bounds__(kThreads) ReduceBlocksKernel(ReduceBlocksParams params) {
  __shared__ alignas(16) float tile[kTileTokens];
  WaitForEarlierGrids();
  AllowDependents();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads;
  const int64_t last = min(first + kThreads, params.num_blocks);
  const int64_t block = min(first + threadIdx.x, last - 1);
  const int64_t row = blockIdx.y;
  const float* const scores = params.token_scores + row * params.num_tokens;
  const int64_t range_begin = params.block_starts[first];
  const int64_t range_end = params.block_starts[last];
  const int32_t begin = params.block_starts[block];
  const int32_t end = params.block_starts[block + 1];
  const bool is_max = params.reduction == Reduction::kMax;
  float result = is_max ? -INFINITY : 0.0F;
  const auto address = reinterpret_cast<uintptr_t>(scores + range_begin);
  const auto skew = static_cast<int64_t>(address / sizeof(float) % kVector);
  for (int64_t base = range_begin - skew; base < range_end; base += kTileTokens) {
    LoadTile(scores, range_begin, range_end, base, tile);
    __syncthreads();
    const auto from = static_cast<int>(max(begin - base, int64_t{0}));
    const auto to = static_cast<int>(min(end - base, int64_t{kTileTokens}));
#pragma unroll 4
    for (int i = from; i < to; ++i) {
      const float score = tile[i];
      result = is_max ? (score > result ? score : result) : result + score;
    }
    __syncthreads();
  }
  if (params.reduction == Reduction::kMean) result /= static_cast<float>(end - begin);
  if (first + threadIdx.x < last) params.block_scores[row * params.num_blocks + block] = result;
}

}  // namespace

absl::Status ReduceBlocks(const ReduceBlocksParams& params, const Launch& launch) {
  if (params.num_blocks == 0 || params.rows == 0) return absl::OkStatus();
  const dim3 grid(static_cast<unsigned>(CeilDiv(params.num_blocks, kThreads)),
                  static_cast<unsigned>(params.rows));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = launch.stream;
  return CudaStatus(LaunchDependent(config, ReduceBlocksKernel, params), "ReduceBlocksKernel");
}

}  // namespace dynsplit::kernels

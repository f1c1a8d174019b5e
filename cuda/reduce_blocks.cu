// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "cuda/cuda_status.h"
#include "cuda/operations.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 128;

using Reduction = ScoringPolicy::BlockReduction;

// One thread a (block, row), in token order: the sum is the same on all backends. A block's scores
// share cache lines with its neighbours', which neighbouring threads read. grid (blocks, rows)
__global__ void __launch_bounds__(kThreads) ReduceBlocksKernel(ReduceBlocksParams params) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block >= params.num_blocks) return;
  const int64_t row = blockIdx.y;
  const float* const scores = params.token_scores + row * params.num_tokens;
  const int32_t begin = params.block_starts[block];
  const int32_t end = params.block_starts[block + 1];
  const bool is_max = params.reduction == Reduction::kMax;
  float result = is_max ? -INFINITY : 0.0F;
#pragma unroll 8
  for (int32_t t = begin; t < end; ++t) {
    const float score = scores[t];
    result = is_max ? (score > result ? score : result) : result + score;
  }
  if (params.reduction == Reduction::kMean) result /= static_cast<float>(end - begin);
  params.block_scores[row * params.num_blocks + block] = result;
}

}  // namespace

absl::Status ReduceBlocks(const ReduceBlocksParams& params, const Launch& launch) {
  if (params.num_blocks == 0 || params.rows == 0) return absl::OkStatus();
  const dim3 grid(static_cast<unsigned>(CeilDiv(params.num_blocks, kThreads)),
                  static_cast<unsigned>(params.rows));
  ReduceBlocksKernel<<<grid, kThreads, 0, launch.stream>>>(params);
  return LaunchStatus("ReduceBlocksKernel");
}

}  // namespace dynsplit::kernels

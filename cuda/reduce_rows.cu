// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/cuda_status.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/operations.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridX = 1 << 20;

// grid (columns, rows_out), strided over columns
__global__ void __launch_bounds__(kThreads) ReduceRowsKernel(ReduceRowsParams params) {
  WaitForEarlierGrids();
  AllowDependents();
  const int rows = params.rows_in / params.rows_out;
  const float* const in = params.in + static_cast<int64_t>(blockIdx.y) * rows * params.columns;
  float* const out = params.out + static_cast<int64_t>(blockIdx.y) * params.columns;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < params.columns;
       c += stride) {
    float sum = 0;
    for (int row = 0; row < rows; ++row) sum += in[row * params.columns + c];
    if (params.mean) sum /= static_cast<float>(rows);
    out[c] = params.accumulate ? out[c] + sum : sum;
  }
}

}  // namespace

absl::Status ReduceRows(const ReduceRowsParams& params, const Launch& launch) {
  if (params.columns == 0 || params.rows_out == 0) return absl::OkStatus();
  const dim3 grid(static_cast<unsigned>(std::min(CeilDiv(params.columns, kThreads), kMaxGridX)),
                  static_cast<unsigned>(params.rows_out));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = launch.stream;
  return CudaStatus(LaunchDependent(config, ReduceRowsKernel, params), "ReduceRowsKernel");
}

}  // namespace dynsplit::kernels

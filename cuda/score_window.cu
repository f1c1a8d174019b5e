// SPDX-License-Identifier: Apache-2.0
//
// Window scores: column means of the window's attention (column_softmax.h), then pooling along the
// tokens. Average pooling commutes with the mean over the group's heads; max pooling does not and
// takes the means of each query head.
#include <algorithm>
#include <cmath>

#include "cuda/column_softmax.h"
#include "cuda/cuda_status.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/operations.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;

struct PoolArgs {
  const float* means;  // [Hkv * rows_per_head, T], valid for t < num_columns
  int rows_per_head;   // 1, or the group's size
  int64_t num_tokens;
  int64_t num_columns;  // T - W
  int kernel;
  float factor;
  float* scores;  // [Hkv, T]
};

constexpr int kTileTokens = 1024;  // of a thread block
constexpr int kMostHalo = 64;      // neighbours on a side that shared memory has room for

// Means of tokens around `t` pooled, in the order of tokens; `means` begins at token `base`.
template <bool kMax>
__device__ float Pooled(const PoolArgs& args, const float* means, int64_t base, int64_t t) {
  const int64_t begin = max(t - args.kernel / 2, int64_t{0}) - base;
  const int64_t end = min(t + args.kernel / 2, args.num_columns - 1) - base;
  float pooled = kMax ? -INFINITY : 0.0F;
  for (int64_t u = begin; u <= end; ++u) {
    pooled = kMax ? fmaxf(pooled, means[u]) : pooled + means[u];
  }
  return pooled;
}

// scores = factor * sum over the head's rows of pooled means; zero for window tokens.
// grid (tiles, KV heads)
template <bool kMax>
__global__ void __launch_bounds__(kThreads) PoolKernel(PoolArgs args) {
  __shared__ float tile[kTileTokens + 2 * kMostHalo];
  WaitForEarlierGrids();
  AllowDependents();
  constexpr int kTokens = kTileTokens / kThreads;  // of a thread
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileTokens;
  const int64_t h = blockIdx.y;
  const int halo = args.kernel / 2;
  const bool shared = halo <= kMostHalo;
  float totals[kTokens] = {};
  for (int row = 0; row < args.rows_per_head; ++row) {
    const float* const means = args.means + (h * args.rows_per_head + row) * args.num_tokens;
    if (shared) {
      __syncthreads();
      for (int i = thread; i < kTileTokens + 2 * halo; i += kThreads) {
        const int64_t t = first - halo + i;
        if (t >= 0 && t < args.num_columns) tile[i] = means[t];
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int64_t t = first + i * kThreads + thread;
      if (t >= args.num_columns) break;
      totals[i] +=
          shared ? Pooled<kMax>(args, tile, first - halo, t) : Pooled<kMax>(args, means, 0, t);
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t t = first + i * kThreads + thread;
    if (t < args.num_tokens) args.scores[h * args.num_tokens + t] = totals[i] * args.factor;
  }
}

absl::Status Pool(const PoolArgs& args, bool is_max, int num_heads, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(args.num_tokens, kTileTokens)),
                  static_cast<unsigned>(num_heads));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return CudaStatus(LaunchDependent(config, is_max ? PoolKernel<true> : PoolKernel<false>, args),
                    "PoolKernel");
}

}  // namespace

absl::Status ScoreWindow(const ScoreWindowParams& params, const Launch& launch) {
  const int group = params.queries.num_heads / params.keys.num_heads;
  const int64_t num_tokens = params.keys.num_tokens;
  const int64_t window = params.queries.num_tokens;
  const bool is_max = params.pooling == ScoringPolicy::Pooling::kMax && params.pooling_kernel > 1;
  const int rows_per_head = is_max ? group : 1;
  absl::StatusOr<Buffer> means = launch.Scratch(num_tokens * params.keys.num_heads * rows_per_head *
                                                static_cast<int64_t>(sizeof(float)));
  if (!means.ok()) return means.status();
  ColumnSoftmax op;
  op.queries = params.queries;
  op.items = params.keys;
  op.causal = true;
  op.num_columns = num_tokens - window;
  op.per_query_head = is_max;
  op.softmax_scale = params.softmax_scale;
  op.lse = params.lse;
  op.factor = 1.0F / static_cast<float>(window * group);
  op.out = means->as<float>();
  absl::Status status = RunColumnSoftmax(op, launch);
  if (!status.ok()) return status;
  return Pool({.means = means->as<float>(),
               .rows_per_head = rows_per_head,
               .num_tokens = num_tokens,
               .num_columns = op.num_columns,
               .kernel = params.pooling_kernel,
               .factor = is_max ? 1.0F : 1.0F / static_cast<float>(params.pooling_kernel),
               .scores = params.scores},
              is_max, params.keys.num_heads, launch.stream);
}

}  // namespace dynsplit::kernels

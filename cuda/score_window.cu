// SPDX-License-Identifier: Apache-2.0
//
// Window scores: column means of the window's attention (column_softmax.h), then pooling along the
// tokens. Average pooling commutes with the mean over the group's heads; max pooling does not and
// takes the means of each query head. Roots of mean squares are over the group at once.
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
  bool root;  // of the means, before they are pooled
  float factor;
  float* scores;  // [Hkv, T]
};

constexpr int kTileTokens = 1024;  // of a thread block
constexpr int kMostHalo = 64;      // neighbours on a side that shared memory has room for

__device__ float MeanAt(const PoolArgs& args, const float* means, int64_t t) {
  return args.root ? sqrtf(means[t]) : means[t];
}

// Means of tokens around `t` pooled, in the order of tokens. at(u): the mean of token u.
template <bool kMax, typename At>
__device__ float Pooled(const PoolArgs& args, At at, int64_t t) {
  const int64_t begin = max(t - args.kernel / 2, int64_t{0});
  const int64_t end = min(t + args.kernel / 2, args.num_columns - 1);
  float pooled = kMax ? -INFINITY : 0.0F;
  for (int64_t u = begin; u <= end; ++u) {
    pooled = kMax ? fmaxf(pooled, at(u)) : pooled + at(u);
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
        if (t >= 0 && t < args.num_columns) tile[i] = MeanAt(args, means, t);
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int64_t t = first + i * kThreads + thread;
      if (t >= args.num_columns) break;
      const auto near = [&](int64_t u) { return tile[u - first + halo]; };
      const auto far = [&](int64_t u) { return MeanAt(args, means, u); };
      totals[i] += shared ? Pooled<kMax>(args, near, t) : Pooled<kMax>(args, far, t);
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
  const bool root = params.reduction == ScoringPolicy::QueryReduction::kRootMeanSquare;
  const bool per_query_head = is_max && !root;
  const int rows_per_head = per_query_head ? group : 1;
  absl::StatusOr<Buffer> means = launch.Scratch(num_tokens * params.keys.num_heads * rows_per_head *
                                                static_cast<int64_t>(sizeof(float)));
  if (!means.ok()) return means.status();
  ColumnSoftmax op;
  op.queries = params.queries;
  op.items = params.keys;
  op.causal = true;
  op.num_columns = num_tokens - window;
  op.per_query_head = per_query_head;
  op.softmax_scale = params.softmax_scale;
  op.lse = params.lse;
  op.power = root ? 2.0F : 1.0F;
  op.factor = 1.0F / static_cast<float>(window * group);
  op.out = means->as<float>();
  absl::Status status = RunColumnSoftmax(op, launch);
  if (!status.ok()) return status;
  return Pool({.means = means->as<float>(),
               .rows_per_head = rows_per_head,
               .num_tokens = num_tokens,
               .num_columns = op.num_columns,
               .kernel = params.pooling_kernel,
               .root = root,
               .factor = is_max ? 1.0F : 1.0F / static_cast<float>(params.pooling_kernel),
               .scores = params.scores},
              is_max, params.keys.num_heads, launch.stream);
}

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/cuda_status.h"
#include "cuda/operations.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerGroup = 4;      // tokens a lane group scores
constexpr int kTokensPerSplit = 512;  // least work of a block that sums directions
constexpr int kMaxGroupChannels = kThreads * kChunk * kMaxChunksPerLane;

// A row of keys in the registers of its lane group: lane l holds chunks l and l + lanes.
struct Row {
  float values[kMaxChunksPerLane][kChunk];
};

template <typename T>
__device__ Row LoadRow(const TensorView& keys, bool aligned, int64_t t, int h, int lane,
                       int lanes) {
  Row row = {};
  if (t >= keys.num_tokens) return row;
  const std::byte* const address = RowAddress(keys, t, h);
  const float scale = RowScale(keys, t, h);
#pragma unroll
  for (int part = 0; part < kMaxChunksPerLane; ++part) {
    const int chunk = lane + part * lanes;
    if (chunk * kChunk < keys.head_dim) {
      LoadValues<T>(address, chunk, aligned, scale, row.values[part]);
    }
  }
  return row;
}

__device__ float Dot(const Row& a, const Row& b, int lanes) {
  float sum = 0;
#pragma unroll
  for (int part = 0; part < kMaxChunksPerLane; ++part) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum = fmaf(a.values[part][i], b.values[part][i], sum);
  }
  return GroupSum(sum, lanes);
}

// grid (token tiles, heads)
template <typename T>
__global__ void __launch_bounds__(kThreads)
    KeyNormKernel(TensorView keys, bool aligned, int lanes, float* scores) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int groups = kThreads / lanes;
  const int h = static_cast<int>(blockIdx.y);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * groups * kRowsPerGroup +
                        static_cast<int>(threadIdx.x) / lanes;
#pragma unroll
  for (int i = 0; i < kRowsPerGroup; ++i) {
    const int64_t t = first + static_cast<int64_t>(i) * groups;
    const Row row = LoadRow<T>(keys, aligned, t, h, lane, lanes);
    const float norm = sqrtf(Dot(row, row, lanes));
    if (lane == 0 && t < keys.num_tokens) scores[h * keys.num_tokens + t] = -norm;
  }
}

// partial[split, h, :] = sum of k / ||k|| over the split's tokens. grid (splits, heads)
template <typename T>
__global__ void __launch_bounds__(kThreads)
    SumDirectionsKernel(TensorView keys, bool aligned, int lanes, int64_t tokens_per_split,
                        float* partial) {
  __shared__ float sums[kMaxGroupChannels];
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = kThreads / lanes;
  const int h = static_cast<int>(blockIdx.y);
  const int64_t begin = blockIdx.x * tokens_per_split;
  const int64_t end = min(begin + tokens_per_split, keys.num_tokens);
  Row sum = {};
  for (int64_t base = begin; base < end; base += groups) {
    const int64_t t = base + group;
    const Row row = LoadRow<T>(keys, aligned, t < end ? t : keys.num_tokens, h, lane, lanes);
    const float norm = sqrtf(Dot(row, row, lanes));
    const float inverse = norm > 0 ? 1.0F / norm : 0.0F;
#pragma unroll
    for (int part = 0; part < kMaxChunksPerLane; ++part) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        sum.values[part][i] = fmaf(row.values[part][i], inverse, sum.values[part][i]);
      }
    }
  }
#pragma unroll
  for (int part = 0; part < kMaxChunksPerLane; ++part) {
    const int channel = (lane + part * lanes) * kChunk;
    if (channel < keys.head_dim) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        sums[group * keys.head_dim + channel + i] = sum.values[part][i];
      }
    }
  }
  __syncthreads();
  float* const out =
      partial + (static_cast<int64_t>(blockIdx.x) * keys.num_heads + h) * keys.head_dim;
  for (int c = static_cast<int>(threadIdx.x); c < keys.head_dim; c += kThreads) {
    float total = 0;
    for (int g = 0; g < groups; ++g) total += sums[g * keys.head_dim + c];
    out[c] = total;
  }
}

// mean[i] = sum over splits of partial[split, i] / num_tokens, i < count = heads * head_dim.
__global__ void MeanDirectionKernel(const float* partial, int splits, int count, int64_t num_tokens,
                                    float* mean) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  float total = 0;
  for (int split = 0; split < splits; ++split) {
    total += partial[static_cast<int64_t>(split) * count + i];
  }
  mean[i] = total / static_cast<float>(num_tokens);
}

// grid (token tiles, heads)
template <typename T>
__global__ void __launch_bounds__(kThreads)
    KeyDifferenceKernel(TensorView keys, bool aligned, int lanes, const float* mean,
                        float* scores) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int groups = kThreads / lanes;
  const int h = static_cast<int>(blockIdx.y);
  Row direction = {};
#pragma unroll
  for (int part = 0; part < kMaxChunksPerLane; ++part) {
    const int channel = (lane + part * lanes) * kChunk;
    if (channel < keys.head_dim) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        direction.values[part][i] = mean[static_cast<int64_t>(h) * keys.head_dim + channel + i];
      }
    }
  }
  const float direction_norm = sqrtf(Dot(direction, direction, lanes));
  const int64_t first = static_cast<int64_t>(blockIdx.x) * groups * kRowsPerGroup +
                        static_cast<int>(threadIdx.x) / lanes;
#pragma unroll
  for (int i = 0; i < kRowsPerGroup; ++i) {
    const int64_t t = first + static_cast<int64_t>(i) * groups;
    const Row row = LoadRow<T>(keys, aligned, t, h, lane, lanes);
    const float dot = Dot(row, direction, lanes);
    const float norm = sqrtf(Dot(row, row, lanes)) * direction_norm;
    if (lane == 0 && t < keys.num_tokens) {
      scores[h * keys.num_tokens + t] = norm > 0 ? -dot / norm : 0.0F;
    }
  }
}

dim3 TokenGrid(const TensorView& keys, int lanes) {
  const int tokens_per_block = kThreads / lanes * kRowsPerGroup;
  return {static_cast<unsigned>(CeilDiv(keys.num_tokens, tokens_per_block)),
          static_cast<unsigned>(keys.num_heads)};
}

absl::Status ScoreDifferences(const ScoreKeysParams& params, int lanes, const Launch& launch) {
  const TensorView& keys = params.keys;
  const bool aligned = HasAlignedChunks(keys);
  const int64_t splits = std::clamp<int64_t>(CeilDiv(keys.num_tokens, kTokensPerSplit), 1,
                                             CeilDiv(4L * launch.num_sms, keys.num_heads));
  const int64_t tokens_per_split = CeilDiv(keys.num_tokens, splits);
  const int count = keys.num_heads * keys.head_dim;
  absl::StatusOr<Buffer> scratch =
      launch.Scratch((splits + 1) * count * static_cast<int64_t>(sizeof(float)));
  if (!scratch.ok()) return scratch.status();
  auto* const mean = scratch->as<float>();
  float* const partial = mean + count;
  const dim3 split_grid(static_cast<unsigned>(splits), static_cast<unsigned>(keys.num_heads));
  DispatchDType(keys.dtype, [&]<typename T>() {
    SumDirectionsKernel<T><<<split_grid, kThreads, 0, launch.stream>>>(keys, aligned, lanes,
                                                                       tokens_per_split, partial);
  });
  if (absl::Status status = LaunchStatus("SumDirectionsKernel"); !status.ok()) return status;
  MeanDirectionKernel<<<static_cast<unsigned>(CeilDiv(count, kThreads)), kThreads, 0,
                        launch.stream>>>(partial, static_cast<int>(splits), count, keys.num_tokens,
                                         mean);
  if (absl::Status status = LaunchStatus("MeanDirectionKernel"); !status.ok()) return status;
  DispatchDType(keys.dtype, [&]<typename T>() {
    KeyDifferenceKernel<T><<<TokenGrid(keys, lanes), kThreads, 0, launch.stream>>>(
        keys, aligned, lanes, mean, params.scores);
  });
  return LaunchStatus("KeyDifferenceKernel");
}

}  // namespace

absl::Status ScoreKeys(const ScoreKeysParams& params, const Launch& launch) {
  const int lanes = LanesPerRow(params.keys.head_dim);
  if (params.method == ScoringPolicy::Method::kKeyDifference) {
    return ScoreDifferences(params, lanes, launch);
  }
  DispatchDType(params.keys.dtype, [&]<typename T>() {
    KeyNormKernel<T><<<TokenGrid(params.keys, lanes), kThreads, 0, launch.stream>>>(
        params.keys, HasAlignedChunks(params.keys), lanes, params.scores);
  });
  return LaunchStatus("KeyNormKernel");
}

}  // namespace dynsplit::kernels

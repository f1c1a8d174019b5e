// SPDX-License-Identifier: Apache-2.0
//
// Calibration queries stand far apart and see different keys, so each has thread blocks of its own:
// a lane group takes one key at a time and keeps running sums of the three spans for up to
// kHeadsPerBlock query heads of the group.
#include <algorithm>
#include <cmath>

#include "cuda/cuda_status.h"
#include "cuda/exponent.cuh"
#include "cuda/operations.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kHeadsPerBlock = 8;
constexpr int kMaxHeadDim = 512;
constexpr int kKeysPerSplit = 1024;  // least work of a thread block
constexpr int kBlocksPerSm = 8;

// Sums of 2^(x - maximum) over the three spans.
struct SpanSums {
  float maximum = kNoLogit;
  float sums[3] = {0, 0, 0};

  __device__ void Add(float x, int span) {
    if (x > maximum) {
      Scale(Exp2(maximum - x));
      maximum = x;
    }
    const float weight = Exp2(x - maximum);
#pragma unroll
    for (int i = 0; i < 3; ++i) sums[i] += i == span ? weight : 0.0F;
  }
  __device__ void Scale(float factor) {
#pragma unroll
    for (int i = 0; i < 3; ++i) sums[i] *= factor;
  }
  __device__ void Merge(SpanSums other) {
    const float larger = fmaxf(maximum, other.maximum);
    Scale(Exp2(maximum - larger));
    other.Scale(Exp2(other.maximum - larger));
#pragma unroll
    for (int i = 0; i < 3; ++i) sums[i] += other.sums[i];
    maximum = larger;
  }
};

struct SpanArgs {
  MeasureSpansParams params;
  bool queries_aligned;
  bool keys_aligned;
  int group;
  int head_tiles;  // of kHeadsPerBlock heads, a KV head
  int lanes;
  int splits;
  int64_t keys_per_split;
  SpanSums* partials;  // [N, Hq, splits]
};

// grid (splits, N, KV heads * head tiles)
__global__ void __launch_bounds__(kThreads) SpanSumsKernel(SpanArgs args) {
  __shared__ float queries[kHeadsPerBlock][kMaxHeadDim];
  __shared__ SpanSums group_sums[kThreads];
  const MeasureSpansParams& params = args.params;
  const TensorView& keys = params.keys;
  const int lanes = args.lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int key_group = static_cast<int>(threadIdx.x) / lanes;
  const int key_groups = kThreads / lanes;
  const int64_t n = blockIdx.y;
  const int h = static_cast<int>(blockIdx.z) / args.head_tiles;
  const int first_head =
      h * args.group + static_cast<int>(blockIdx.z) % args.head_tiles * kHeadsPerBlock;
  const int heads = min(kHeadsPerBlock, (h + 1) * args.group - first_head);
  const int chunks = keys.head_dim / kChunk;
  for (int unit = static_cast<int>(threadIdx.x); unit < kHeadsPerBlock * chunks; unit += kThreads) {
    const int head = unit / chunks;
    const int chunk = unit % chunks;
    float values[kChunk] = {};
    if (head < heads) {
      LoadAnyValues(params.queries, args.queries_aligned, n, first_head + head, chunk, values);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) queries[head][chunk * kChunk + i] = values[i];
  }
  __syncthreads();

  const float scale_log2 = params.softmax_scale * kLog2E;
  const int32_t lo = params.lo[n];
  const int32_t hi = params.hi[n];
  const int64_t begin = blockIdx.x * args.keys_per_split;
  const int64_t end =
      min(begin + args.keys_per_split, static_cast<int64_t>(params.positions[n]) + 1);
  SpanSums sums[kHeadsPerBlock];
  for (int64_t base = begin; base < end; base += key_groups) {
    const int64_t t = base + key_group;
    float dots[kHeadsPerBlock] = {};
    for (int chunk = lane; chunk < chunks && t < end; chunk += lanes) {
      float key[kChunk];
      LoadAnyValues(keys, args.keys_aligned, t, h, chunk, key);
#pragma unroll
      for (int head = 0; head < kHeadsPerBlock; ++head) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          dots[head] = fmaf(queries[head][chunk * kChunk + i], key[i], dots[head]);
        }
      }
    }
    const int span = t < lo ? 0 : t < hi ? 1 : 2;
#pragma unroll
    for (int head = 0; head < kHeadsPerBlock; ++head) {
      const float dot = GroupSum(dots[head], lanes);
      if (t < end) sums[head].Add(dot * scale_log2, span);
    }
  }
  for (int head = 0; head < heads; ++head) {
    SpanSums mine;
#pragma unroll
    for (int i = 0; i < kHeadsPerBlock; ++i) {
      if (i == head) mine = sums[i];
    }
    __syncthreads();
    if (lane == 0) group_sums[key_group] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
      SpanSums total;
      for (int i = 0; i < key_groups; ++i) total.Merge(group_sums[i]);
      args.partials[(n * params.queries.num_heads + first_head + head) * args.splits + blockIdx.x] =
          total;
    }
  }
}

// masses[n, :] = mean over query heads. One warp a query, lanes over heads.
__global__ void __launch_bounds__(kThreads) JoinSpansKernel(SpanArgs args) {
  const MeasureSpansParams& params = args.params;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (n >= params.queries.num_tokens) return;
  const int heads = params.queries.num_heads;
  float masses[3] = {0, 0, 0};
  for (int a = lane; a < heads; a += kWarp) {
    SpanSums total;
    for (int split = 0; split < args.splits; ++split) {
      total.Merge(args.partials[(n * heads + a) * args.splits + split]);
    }
    const float sum = total.sums[0] + total.sums[1] + total.sums[2];
#pragma unroll
    for (int i = 0; i < 3; ++i) masses[i] += total.sums[i] / sum;
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const float mass = GroupSum(masses[i], kWarp) / static_cast<float>(heads);
    if (lane == 0) params.masses[n * 3 + i] = mass;
  }
}

}  // namespace

absl::Status MeasureSpans(const MeasureSpansParams& params, const Launch& launch) {
  const int64_t num_queries = params.queries.num_tokens;
  if (num_queries == 0) return absl::OkStatus();
  const int group = params.queries.num_heads / params.keys.num_heads;
  const auto head_tiles = static_cast<int>(CeilDiv(group, kHeadsPerBlock));
  const int64_t blocks = num_queries * params.keys.num_heads * head_tiles;
  const int64_t splits =
      std::clamp<int64_t>(CeilDiv(int64_t{kBlocksPerSm} * launch.num_sms, blocks), 1,
                          CeilDiv(params.keys.num_tokens, kKeysPerSplit));
  absl::StatusOr<Buffer> partials = launch.Scratch(num_queries * params.queries.num_heads * splits *
                                                   static_cast<int64_t>(sizeof(SpanSums)));
  if (!partials.ok()) return partials.status();
  const SpanArgs args = {.params = params,
                         .queries_aligned = HasAlignedChunks(params.queries),
                         .keys_aligned = HasAlignedChunks(params.keys),
                         .group = group,
                         .head_tiles = head_tiles,
                         .lanes = LanesPerRow(params.keys.head_dim),
                         .splits = static_cast<int>(splits),
                         .keys_per_split = CeilDiv(params.keys.num_tokens, splits),
                         .partials = partials->as<SpanSums>()};
  constexpr int64_t kMaxGridY = 65535;
  if (num_queries > kMaxGridY) {
    return absl::InvalidArgumentError("more than 65535 calibration queries in one call");
  }
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(num_queries),
                  static_cast<unsigned>(params.keys.num_heads * head_tiles));
  SpanSumsKernel<<<grid, kThreads, 0, launch.stream>>>(args);
  if (absl::Status status = LaunchStatus("SpanSumsKernel"); !status.ok()) return status;
  JoinSpansKernel<<<static_cast<unsigned>(CeilDiv(num_queries * kWarp, kThreads)), kThreads, 0,
                    launch.stream>>>(args);
  return LaunchStatus("JoinSpansKernel");
}

}  // namespace dynsplit::kernels

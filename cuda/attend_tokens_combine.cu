// SPDX-License-Identifier: Apache-2.0
//
// AttendTokens: items in launches of what fits in a kernel's parameters, each a grid over splits
// and one that joins them.
#include <algorithm>
#include <array>

#include "cuda/attend_tokens.cuh"
#include "cuda/attend_tokens.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/exponent.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kVector = 4;        // channels a lane holds at a time
constexpr int kMaxVectors = 4;    // of a lane
constexpr int kMaxHeadDim = 512;  // ValidateShape
static_assert(kMaxHeadDim == kWarp * kVector * kMaxVectors);
constexpr int64_t kAlignment = 256;
constexpr float kLn2 = 0.6931471805599453F;

struct CombineItem {
  void* output;
  float* lse;
  AttendCut cut;
};

struct CombineBatch {
  CombineItem items[kAttendMaxLaunchItems];
  AttendPartials in;
  int group;
  int head_dim;
  DType dtype;
};

__device__ void Store(void* output, DType dtype, int64_t at, float value) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<__half*>(output)[at] = __float2half_rn(value);
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(output)[at] = __float2bfloat16_rn(value);
      break;
    default:
      static_cast<float*>(output)[at] = value;
  }
}

// grid (query heads, items). Warp w takes every eighth split from w on; then the warps are joined
// in their order.
__global__ void __launch_bounds__(kThreads)
    AttendCombineKernel(const __grid_constant__ CombineBatch batch) {
  __shared__ float4 parts[kWarps][kWarp * kMaxVectors];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int a = static_cast<int>(blockIdx.x);
  const int h = a / batch.group;
  const CombineItem& item = batch.items[blockIdx.y];
  const int splits = item.cut.splits;
  const int64_t first =
      (item.cut.first_partial + static_cast<int64_t>(h) * splits) * batch.group + a % batch.group;
  const int vectors = batch.head_dim / kVector;
  WaitForEarlierGrids();
  SoftmaxSum total;  // equal in all threads
  for (int s = lane; s < splits; s += kWarp) {
    const float2 part = batch.in.sums[first + static_cast<int64_t>(s) * batch.group];
    total.Merge({part.x, part.y});
  }
  total.MergeLanes(kWarp);

  float4 output[kMaxVectors] = {};
#pragma unroll 4
  for (int s = warp; s < splits; s += kWarps) {
    const int64_t row = first + static_cast<int64_t>(s) * batch.group;
    const float weight = Exp2(batch.in.sums[row].x - total.maximum);
    const auto* const from =
        reinterpret_cast<const float4*>(batch.in.outputs + row * batch.head_dim);
#pragma unroll
    for (int v = 0; v < kMaxVectors; ++v) {
      const int at = lane + v * kWarp;
      if (at >= vectors) continue;
      const float4 part = from[at];
      output[v].x = fmaf(part.x, weight, output[v].x);
      output[v].y = fmaf(part.y, weight, output[v].y);
      output[v].z = fmaf(part.z, weight, output[v].z);
      output[v].w = fmaf(part.w, weight, output[v].w);
    }
  }
#pragma unroll
  for (int v = 0; v < kMaxVectors; ++v) parts[warp][lane + v * kWarp] = output[v];
  __syncthreads();
  for (int channel = static_cast<int>(threadIdx.x); channel < batch.head_dim; channel += kThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += reinterpret_cast<const float*>(parts[w])[channel];
    Store(item.output, batch.dtype, static_cast<int64_t>(a) * batch.head_dim + channel,
          total.sum > 0 ? sum / total.sum : 0.0F);
  }
  if (item.lse != nullptr && threadIdx.x == 0) {
    item.lse[a] = total.sum > 0 ? (total.maximum + log2f(total.sum)) * kLn2 : -INFINITY;
  }
}

cudaError_t Combine(const AttendLaunch& launch, cudaStream_t stream) {
  const AttendTokensItem& like = launch.items[0];
  CombineBatch batch = {};
  batch.in = launch.out;
  batch.group = launch.group();
  batch.head_dim = like.queries.head_dim;
  batch.dtype = like.queries.dtype;
  for (size_t i = 0; i < launch.items.size(); ++i) {
    batch.items[i] = {
        .output = launch.items[i].output, .lse = launch.items[i].lse, .cut = launch.cuts[i]};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(like.queries.num_heads),
                        static_cast<unsigned>(launch.items.size()));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return LaunchDependent(config, AttendCombineKernel, batch);
}

int64_t SumsBytes(const AttendShape& shape, int64_t num_items, int num_sms) {
  const int64_t rows = MaxAttendPartials(num_items, shape.num_kv_heads, num_sms) *
                       (shape.num_query_heads / shape.num_kv_heads);
  return CeilDiv(rows * static_cast<int64_t>(sizeof(float2)), kAlignment) * kAlignment;
}

AttendShape ShapeOf(const AttendTokensItem& item) {
  return {.num_query_heads = item.queries.num_heads,
          .num_kv_heads = item.keys.num_heads,
          .head_dim = item.queries.head_dim};
}

}  // namespace

int64_t AttendWorkspaceBytes(const AttendShape& shape, int64_t num_items, int num_sms) {
  const int64_t rows = MaxAttendPartials(num_items, shape.num_kv_heads, num_sms) *
                       (shape.num_query_heads / shape.num_kv_heads);
  return SumsBytes(shape, num_items, num_sms) +
         rows * shape.head_dim * static_cast<int64_t>(sizeof(float));
}

cudaError_t AttendTokensIn(const AttendTokensParams& params, int num_sms, void* workspace,
                           cudaStream_t stream) {
  if (params.items.empty()) return cudaSuccess;
  const auto num_items = static_cast<int64_t>(params.items.size());
  const AttendShape shape = ShapeOf(params.items[0]);
  const bool tensor_cores = UsesTensorCores(params);
  auto* const base = static_cast<std::byte*>(workspace);
  const AttendPartials partials = {
      .sums = reinterpret_cast<float2*>(base),
      .outputs = reinterpret_cast<float*>(base + SumsBytes(shape, num_items, num_sms))};
  const size_t most = tensor_cores ? kAttendMmaItems : kAttendSimtItems;
  for (size_t at = 0; at < params.items.size(); at += most) {
    AttendLaunch launch;
    launch.items = params.items.subspan(at, std::min(most, params.items.size() - at));
    std::array<int64_t, kAttendMaxLaunchItems> num_rows = {};
    std::array<AttendCut, kAttendMaxLaunchItems> cuts;
    const size_t count = launch.items.size();
    for (size_t i = 0; i < count; ++i) {
      num_rows[i] = launch.items[i].num_tokens + launch.items[i].tail_keys.num_tokens;
    }
    launch.num_blocks =
        PlanAttend(std::span(num_rows).first(count), shape.num_kv_heads, num_sms, cuts);
    launch.cuts = std::span<const AttendCut>(cuts).first(count);
    launch.tokens_per_head = params.groups > 1;
    launch.scale_log2 = params.softmax_scale * kLog2E;
    launch.out = partials;
    cudaError_t error =
        tensor_cores ? AttendTokensMma(launch, stream) : AttendTokensSimt(launch, stream);
    if (error == cudaSuccess) error = Combine(launch, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace dynsplit::kernels

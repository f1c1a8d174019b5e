// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <climits>

#include "cuda/cuda_status.h"
#include "cuda/operations.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kChunksPerThread = 8;

__global__ void FillInt32(int32_t* out, int32_t value) { *out = value; }

// Each block checks `tokens_per_block` tokens of all heads.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    CheckFiniteKernel(TensorView view, bool aligned, int tokens_per_block, int32_t* first_bad) {
  const auto heads = static_cast<uint32_t>(view.num_heads);
  const auto chunks = static_cast<uint32_t>(view.head_dim / kChunk);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tokens_per_block;
  const int64_t tokens = min(static_cast<int64_t>(tokens_per_block), view.num_tokens - begin);
  const uint32_t units = static_cast<uint32_t>(tokens) * heads * chunks;
  int bad = INT_MAX;
#pragma unroll 4
  for (uint32_t unit = threadIdx.x; unit < units; unit += kThreads) {
    const uint32_t row = unit / chunks;
    const uint32_t local_token = row / heads;
    const int head = static_cast<int>(row - local_token * heads);
    const int64_t t = begin + local_token;
    float values[kChunk];
    LoadValues<T>(RowAddress(view, t, head), static_cast<int>(unit - row * chunks), aligned,
                  RowScale(view, t, head), values);
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) finite &= static_cast<bool>(isfinite(values[i]));
    if (!finite) bad = min(bad, static_cast<int>(t));
  }
  if (bad != INT_MAX) atomicMin(first_bad, bad);
}

}  // namespace

absl::Status CheckFinite(const CheckFiniteParams& params, const Launch& launch) {
  const TensorView& view = params.tensor;
  FillInt32<<<1, 1, 0, launch.stream>>>(params.first_bad_token,
                                        static_cast<int32_t>(view.num_tokens));
  if (absl::Status status = LaunchStatus("FillInt32"); !status.ok()) return status;
  if (view.num_tokens == 0) return absl::OkStatus();
  const int64_t token_chunks = static_cast<int64_t>(view.num_heads) * (view.head_dim / kChunk);
  const int64_t tokens_per_block = std::max<int64_t>(1, kThreads * kChunksPerThread / token_chunks);
  const auto grid = static_cast<unsigned>(CeilDiv(view.num_tokens, tokens_per_block));
  DispatchDType(view.dtype, [&]<typename T>() {
    CheckFiniteKernel<T><<<grid, kThreads, 0, launch.stream>>>(
        view, HasAlignedChunks(view), static_cast<int>(tokens_per_block), params.first_bad_token);
  });
  return LaunchStatus("CheckFiniteKernel");
}

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// Minima, maxima and means of unequal blocks. A row is one block of one head; 2^n lanes share it, a
// lane per chunk (two above 256 channels), so that tokens are read in whole rows and what a row's
// scale depends on is a few shuffles away. Sums run in token order.
#include <cmath>

#include "cuda/cuda_status.h"
#include "cuda/operations.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;  // tokens
constexpr int kMinScaleExponent = -120;
constexpr int kE4M3LargestCode = 0x7E;  // 448

enum class Rounding { kNearest, kDown, kUp };

// Every Encode turns what rounds to -0 into +0: which zero is smaller differs between processors.
template <Rounding kRounding>
__device__ void Encode(float value, float /*scale*/, float* out) {
  *out = value + 0.0F;
}
template <Rounding kRounding>
__device__ void Encode(float value, float /*scale*/, __half* out) {
  const __half rounded = kRounding == Rounding::kNearest ? __float2half_rn(value)
                         : kRounding == Rounding::kDown  ? __float2half_rd(value)
                                                         : __float2half_ru(value);
  const uint16_t bits = __half_as_ushort(rounded);
  *out = __ushort_as_half(bits == 0x8000 ? 0 : bits);
}
template <Rounding kRounding>
__device__ void Encode(float value, float /*scale*/, __nv_bfloat16* out) {
  const __nv_bfloat16 rounded = kRounding == Rounding::kNearest ? __float2bfloat16_rn(value)
                                : kRounding == Rounding::kDown  ? __float2bfloat16_rd(value)
                                                                : __float2bfloat16_ru(value);
  const uint16_t bits = __bfloat16_as_ushort(rounded);
  *out = __ushort_as_bfloat16(bits == 0x8000 ? 0 : bits);
}
// The nearest magnitude, then one code on where that lies on the wrong side of the value. Codes of
// one sign ascend with the magnitude; code * scale is exact, a power of two >= 2^-120 times at
// least 2^-9.
template <Rounding kRounding>
__device__ void Encode(float value, float scale, E4M3* out) {
  const float magnitude = fabsf(value);
  const float inverse = __uint_as_float((254U << 23) - __float_as_uint(scale));  // 2^-n of 2^n
  int code = __nv_cvt_float_to_fp8(magnitude * inverse, __NV_SATFINITE, __NV_E4M3);
  if constexpr (kRounding != Rounding::kNearest) {
    const float nearest = Decode(E4M3{static_cast<uint8_t>(code)}) * scale;
    if ((kRounding == Rounding::kDown) == (value < 0)) {
      if (nearest < magnitude) code = min(code + 1, kE4M3LargestCode);
    } else if (nearest > magnitude) {
      --code;
    }
  }
  out->code = static_cast<uint8_t>(value < 0 && code != 0 ? code | 0x80 : code);
}

// Smallest power of two s >= 2^-120 with amax <= 448 s = 1.75 * 2^8 s; 1 for 0.
__device__ float ScaleOf(float amax) {
  if (amax == 0) return 1.0F;
  const uint32_t bits = __float_as_uint(amax);
  const bool above = (bits & 0x7FFFFF) > 0x600000;  // the mantissa is more than 1.75
  const int exponent = static_cast<int>(bits >> 23) - 127 - 8 + (above ? 1 : 0);
  return __uint_as_float(static_cast<uint32_t>(max(exponent, kMinScaleExponent) + 127) << 23);
}

// What a lane gathers of a row: its chunks lane, lane + lanes.
template <int kParts>
struct Fold {
  float low[kParts][kChunk];
  float high[kParts][kChunk];
  float sum[kParts][kChunk];  // then the mean
};

struct Row {
  int64_t block;
  int h;
  int lane;
  int lanes;
  bool valid;
};

// Row addresses are multiples of a chunk: summaries are of our own making.
template <typename Out, Rounding kRounding>
__device__ void StoreChunk(const float (&values)[kChunk], float scale, std::byte* row, int chunk) {
  Chunk<Out> out;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) Encode<kRounding>(values[i], scale, &out.values[i]);
  reinterpret_cast<Chunk<Out>*>(row)[chunk] = out;
}

// All lanes of the warp take part.
template <int kParts>
__device__ void StoreScales(const SummarizeBlocksParams& p, const Row& row,
                            const Fold<kParts>& fold, float& bound_scale, float& mean_scale) {
  float bound = 0;
  float mean = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    if ((row.lane + part * row.lanes) * kChunk >= p.keys.head_dim) continue;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      bound = fmaxf(bound, fmaxf(fabsf(fold.low[part][i]), fabsf(fold.high[part][i])));
      mean = fmaxf(mean, fabsf(fold.sum[part][i]));
    }
  }
  bound_scale = ScaleOf(GroupMax(bound, row.lanes));
  mean_scale = ScaleOf(GroupMax(mean, row.lanes));
  if (!row.valid || row.lane != 0) return;
  const BlockSummaries& out = p.summaries;
  const int64_t at = row.h * out.scale_head_stride + row.block;
  if (out.min != nullptr) out.bound_scales[at] = bound_scale;
  if (out.mean != nullptr) out.mean_scales[at] = mean_scale;
}

template <typename Out, int kParts>
__device__ void StoreSummaries(const SummarizeBlocksParams& p, const Row& row,
                               const Fold<kParts>& fold) {
  const BlockSummaries& out = p.summaries;
  float bound_scale = 1;
  float mean_scale = 1;
  if constexpr (std::is_same_v<Out, E4M3>) StoreScales(p, row, fold, bound_scale, mean_scale);
  if (!row.valid) return;
  const int64_t at = row.block * out.block_stride_bytes + row.h * out.head_stride_bytes;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int chunk = row.lane + part * row.lanes;
    if (chunk * kChunk >= p.keys.head_dim) continue;
    if (out.min != nullptr) {
      StoreChunk<Out, Rounding::kDown>(fold.low[part], bound_scale, out.min + at, chunk);
      StoreChunk<Out, Rounding::kUp>(fold.high[part], bound_scale, out.max + at, chunk);
    }
    if (out.mean != nullptr) {
      StoreChunk<Out, Rounding::kNearest>(fold.sum[part], mean_scale, out.mean + at, chunk);
    }
  }
}

// A lane's chunks of the next tokens, all requested before the first is used.
template <typename T, int kParts>
struct RawTokens {
  Chunk<T> chunks[kAhead][kParts];
  float scales[kAhead];

  // Of the tokens from `first` on; the last one again beyond `end`.
  __device__ void Load(const SummarizeBlocksParams& p, const Row& row, int32_t first, int32_t end,
                       bool aligned) {
    const std::byte* rows[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int32_t t = min(first + i, end - 1);
      rows[i] = RowAddress(p.keys, t, row.h);
      if constexpr (sizeof(T) == 1) scales[i] = RowScale(p.keys, t, row.h);
    }
    if (aligned) {
      LoadChunks(p, row, rows, true);
    } else {
      LoadChunks(p, row, rows, false);
    }
  }

 private:
  __device__ void LoadChunks(const SummarizeBlocksParams& p, const Row& row,
                             const std::byte* const (&rows)[kAhead], bool aligned) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        // A lane whose second chunk is beyond the head reads its first again.
        const int chunk = row.lane + part * row.lanes;
        const int inside = chunk * kChunk < p.keys.head_dim ? chunk : row.lane;
        chunks[i][part] =
            LoadChunk<T>(rows[i] + inside * static_cast<int>(kChunk * sizeof(T)), aligned);
      }
    }
  }
};

template <typename T, int kParts>
__device__ void FoldTokens(const SummarizeBlocksParams& p, const Row& row, bool aligned,
                           Fold<kParts>& fold) {
  const TensorView& keys = p.keys;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      fold.low[part][i] = INFINITY;
      fold.high[part][i] = -INFINITY;
      fold.sum[part][i] = 0;
    }
  }
  const int32_t begin = row.valid ? p.block_starts[row.block] : 0;
  const int32_t end =
      row.valid && row.lane * kChunk < keys.head_dim ? p.block_starts[row.block + 1] : begin;
  for (int32_t t = begin; t < end; t += kAhead) {
    RawTokens<T, kParts> raw;
    raw.Load(p, row, t, end, aligned);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      // Branch-free, so that no request waits for the use of another: a repeated token changes
      // neither extreme, and adds exactly 0 to the sum (keys are finite).
      const float weight = t + i < end ? 1.0F : 0.0F;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int c = 0; c < kChunk; ++c) {
          float value = Decode(raw.chunks[i][part].values[c]);
          if constexpr (sizeof(T) == 1) value = __fmul_rn(value, raw.scales[i]);
          fold.low[part][c] = fminf(fold.low[part][c], value);
          fold.high[part][c] = fmaxf(fold.high[part][c], value);
          fold.sum[part][c] = __fmaf_rn(value, weight, fold.sum[part][c]);
        }
      }
    }
  }
  if (p.summaries.mean == nullptr) return;
  const auto length = static_cast<float>(end - begin);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) fold.sum[part][i] /= length;
  }
}

// `heads_inner`: neighbouring rows are of neighbouring heads, else of neighbouring blocks,
// whichever lie closer in memory.
template <typename T, int kParts>
__global__ void __launch_bounds__(kThreads, kParts == 1 ? 3 : 2)
    SummarizeBlocksKernel(SummarizeBlocksParams p, int lanes, bool heads_inner, bool aligned) {
  const int heads = p.keys.num_heads;
  const int64_t blocks = p.num_blocks - p.first_block;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int64_t inner = heads_inner ? heads : blocks;
  const int64_t outer = index / inner;
  const int64_t rest = index - outer * inner;
  const Row row = {.block = p.first_block + (heads_inner ? outer : rest),
                   .h = static_cast<int>(heads_inner ? rest : outer),
                   .lane = static_cast<int>(threadIdx.x) % lanes,
                   .lanes = lanes,
                   .valid = index < blocks * heads};
  Fold<kParts> fold;
  FoldTokens<T>(p, row, aligned, fold);
  switch (p.summaries.dtype) {
    case DType::kFloat8E4M3:
      return StoreSummaries<E4M3>(p, row, fold);
    case DType::kBFloat16:
      return StoreSummaries<__nv_bfloat16>(p, row, fold);
    case DType::kFloat16:
      return StoreSummaries<__half>(p, row, fold);
    default:
      return StoreSummaries<float>(p, row, fold);
  }
}

}  // namespace

absl::Status SummarizeBlocks(const SummarizeBlocksParams& params, const Launch& launch) {
  const TensorView& keys = params.keys;
  const int64_t rows = (params.num_blocks - params.first_block) * keys.num_heads;
  if (rows <= 0) return absl::OkStatus();
  const int lanes = LanesPerRow(keys.head_dim);
  const auto grid = static_cast<unsigned>(CeilDiv(rows * lanes, kThreads));
  const bool aligned = HasAlignedChunks(keys);
  const bool heads_inner = keys.head_stride_bytes <= keys.token_stride_bytes;
  DispatchDType(keys.dtype, [&]<typename T>() {
    if (keys.head_dim <= kWarp * kChunk) {
      SummarizeBlocksKernel<T, 1>
          <<<grid, kThreads, 0, launch.stream>>>(params, lanes, heads_inner, aligned);
    } else {
      SummarizeBlocksKernel<T, kMaxChunksPerLane>
          <<<grid, kThreads, 0, launch.stream>>>(params, lanes, heads_inner, aligned);
    }
  });
  return LaunchStatus("SummarizeBlocksKernel");
}

}  // namespace dynsplit::kernels

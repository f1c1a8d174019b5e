// SPDX-License-Identifier: Apache-2.0
//
// Two ways: rows that keep their bits are copied in the widest vectors their addresses allow; rows
// that are turned or encoded pass through registers, a row spread over a group of lanes. Scales per
// head need the head's largest magnitude first: an own pass over the kept rows.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/cuda_status.h"
#include "cuda/operations.h"
#include "cuda/rotation.cuh"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 4;
constexpr int kAmaxRowsPerGroup = 8;
constexpr float kE4M3Max = 448.0F;
constexpr float kInt8Max = 127.0F;

using Format = EncodingPolicy::Format;

struct Pages {
  TensorView source;
  const int32_t* kept;
  int64_t num_kept;
  int64_t num_slots;  // whole pages
  bool kept_per_head;
  bool aligned;  // HasAlignedChunks(source)
  RotationTable rotation;
  std::byte* pages;
  int64_t slot_stride_bytes;
  int64_t head_stride_bytes;
  bool dense;        // rows of all slots and heads are consecutive
  bool out_aligned;  // every output chunk may be written with one access
  float* scales;
  int64_t scale_slot_stride;  // of scales per token
  int64_t scale_head_stride;
};

// Token in slot `slot` of head `h`. Requires: slot < num_kept.
__device__ int64_t TokenAt(const Pages& p, int64_t slot, int h) {
  if (p.kept == nullptr) return slot;
  return p.kept[(p.kept_per_head ? h * p.num_kept : 0) + slot];
}

__device__ std::byte* OutputRow(const Pages& p, int64_t slot, int h) {
  return p.pages + slot * p.slot_stride_bytes + h * p.head_stride_bytes;
}

__device__ float* TokenScale(const Pages& p, int64_t slot, int h) {
  return p.scales + slot * p.scale_slot_stride + h * p.scale_head_stride;
}

// ---- copies ------------------------------------------------------------------------------------

// Each block copies `slots_per_block` slots of all heads, in the order of a dense output:
// consecutive units, which need no addresses of their own.
template <typename Vector, bool kDense>
__global__ void __launch_bounds__(kThreads)
    CopyPagesKernel(Pages p, uint32_t row_vectors, int slots_per_block) {
  const auto heads = static_cast<uint32_t>(p.source.num_heads);
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x) * slots_per_block;
  const int64_t slots = min(static_cast<int64_t>(slots_per_block), p.num_slots - first_slot);
  const uint32_t units = static_cast<uint32_t>(slots) * heads * row_vectors;
  Vector* const out = reinterpret_cast<Vector*>(p.pages) + first_slot * heads * row_vectors;
  for (uint32_t base = threadIdx.x; base < units; base += kThreads * kUnitsPerThread) {
    Vector values[kUnitsPerThread] = {};  // all loads are in flight before the first store
    Vector* to[kUnitsPerThread];
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      const uint32_t unit = base + i * kThreads;
      const uint32_t row = unit / row_vectors;
      const uint32_t local_slot = row / heads;
      const auto h = static_cast<int>(row - local_slot * heads);
      const int64_t slot = first_slot + local_slot;
      const uint32_t vector = unit - row * row_vectors;
      if (unit < units && slot < p.num_kept) {
        const auto* const from =
            reinterpret_cast<const Vector*>(RowAddress(p.source, TokenAt(p, slot, h), h));
        values[i] = from[vector];
      }
      to[i] = kDense ? out + unit : reinterpret_cast<Vector*>(OutputRow(p, slot, h)) + vector;
    }
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      if (base + i * kThreads < units) *to[i] = values[i];
    }
  }
}

// Scales of quantised input travel with their rows. count = heads, or slots * heads.
__global__ void __launch_bounds__(kThreads) CopyScalesKernel(Pages p, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  if (p.source.scale_granularity == ScaleGranularity::kHead) {
    p.scales[i] = p.source.scales[i];
    return;
  }
  const int64_t slot = i / p.source.num_heads;
  const auto h = static_cast<int>(i - slot * p.source.num_heads);
  *TokenScale(p, slot, h) = slot < p.num_kept ? RowScale(p.source, TokenAt(p, slot, h), h) : 1.0F;
}

// Widest vector that divides every address and the row.
int64_t VectorBytes(const Pages& p) {
  const TensorView& source = p.source;
  int64_t bits = reinterpret_cast<intptr_t>(source.data) | source.token_stride_bytes |
                 source.head_stride_bytes | source.head_dim * DTypeBytes(source.dtype) |
                 reinterpret_cast<intptr_t>(p.pages) | p.slot_stride_bytes | p.head_stride_bytes;
  if (source.block_table != nullptr) bits |= source.page_stride_bytes;
  int64_t bytes = 16;
  while (bits % bytes != 0) bytes /= 2;
  return bytes;
}

template <typename Vector>
void LaunchCopy(const Pages& p, cudaStream_t stream) {
  const int64_t row_vectors =
      p.source.head_dim * DTypeBytes(p.source.dtype) / static_cast<int64_t>(sizeof(Vector));
  const int64_t slots_per_block =
      std::max<int64_t>(1, kThreads * kUnitsPerThread / (row_vectors * p.source.num_heads));
  const auto grid = static_cast<unsigned>(CeilDiv(p.num_slots, slots_per_block));
  const auto kernel = p.dense ? CopyPagesKernel<Vector, true> : CopyPagesKernel<Vector, false>;
  kernel<<<grid, kThreads, 0, stream>>>(p, static_cast<uint32_t>(row_vectors),
                                        static_cast<int>(slots_per_block));
}

absl::Status CopyPages(const Pages& p, const Launch& launch) {
  switch (VectorBytes(p)) {
    case 16:
      LaunchCopy<uint4>(p, launch.stream);
      break;
    case 8:
      LaunchCopy<uint2>(p, launch.stream);
      break;
    case 4:
      LaunchCopy<uint32_t>(p, launch.stream);
      break;
    case 2:
      LaunchCopy<uint16_t>(p, launch.stream);
      break;
    default:
      LaunchCopy<uint8_t>(p, launch.stream);
  }
  if (absl::Status status = LaunchStatus("CopyPagesKernel"); !status.ok()) return status;
  if (p.source.scales == nullptr || p.scales == nullptr) return absl::OkStatus();
  const int64_t count = p.source.scale_granularity == ScaleGranularity::kHead
                            ? p.source.num_heads
                            : p.num_slots * p.source.num_heads;
  CopyScalesKernel<<<static_cast<unsigned>(CeilDiv(count, kThreads)), kThreads, 0, launch.stream>>>(
      p, count);
  return LaunchStatus("CopyScalesKernel");
}

// ---- turned and encoded rows -------------------------------------------------------------------

template <typename T>
__device__ float LoadElement(const std::byte* row, int channel, float scale) {
  const float value = Decode(reinterpret_cast<const T*>(row)[channel]);
  return sizeof(T) == 1 ? __fmul_rn(value, scale) : value;
}

// Turns a chunk of a row by -delta positions. Partners of other chunks are read from the row.
template <typename T>
__device__ void TurnChunk(const Pages& p, const std::byte* row, float scale, int delta, int chunk,
                          float (&values)[kChunk]) {
  const RotationTable& rotation = p.rotation;
  const int first = chunk * kChunk;
  if (first >= rotation.rotary_dim) return;
  if (rotation.interleaved) {
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) {
      if (first + i < rotation.rotary_dim) {
        const float2 angle = AngleOf(rotation, delta, (first + i) / 2);
        const float x = values[i];
        const float y = values[i + 1];
        values[i] = TurnX(x, y, angle);
        values[i + 1] = TurnY(x, y, angle);
      }
    }
    return;
  }
  const int half = rotation.rotary_dim / 2;
  float partners[kChunk];
  if (half % kChunk == 0) {
    const int partner = first < half ? chunk + half / kChunk : chunk - half / kChunk;
    LoadValues<T>(row, partner, p.aligned, scale, partners);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int channel = first + i;
      const int partner = channel < half ? channel + half : channel - half;
      partners[i] = channel < rotation.rotary_dim ? LoadElement<T>(row, partner, scale) : 0.0F;
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int channel = first + i;
    if (channel < half) {
      values[i] = TurnX(values[i], partners[i], AngleOf(rotation, delta, channel));
    } else if (channel < rotation.rotary_dim) {
      values[i] = TurnY(partners[i], values[i], AngleOf(rotation, delta, channel - half));
    }
  }
}

// The lane's chunks of (slot, h), decoded and turned; zeros in slots without a token.
template <typename T>
__device__ void LoadRow(const Pages& p, int64_t slot, int h, int lane, int lanes,
                        float (&values)[kMaxChunksPerLane][kChunk]) {
#pragma unroll
  for (int part = 0; part < kMaxChunksPerLane; ++part) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[part][i] = 0;
  }
  if (slot >= p.num_kept) return;
  const int64_t t = TokenAt(p, slot, h);
  const std::byte* const row = RowAddress(p.source, t, h);
  const float scale = RowScale(p.source, t, h);
#pragma unroll
  for (int part = 0; part < kMaxChunksPerLane; ++part) {
    const int chunk = lane + part * lanes;
    if (chunk * kChunk < p.source.head_dim) {
      LoadValues<T>(row, chunk, p.aligned, scale, values[part]);
      if (p.rotation.rotary_dim > 0) {
        TurnChunk<T>(p, row, scale, static_cast<int>(t - slot), chunk, values[part]);
      }
    }
  }
}

__device__ float Amax(const float (&values)[kMaxChunksPerLane][kChunk]) {
  float amax = 0;
#pragma unroll
  for (int part = 0; part < kMaxChunksPerLane; ++part) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) amax = fmaxf(amax, fabsf(values[part][i]));
  }
  return amax;
}

// An amax so small that the quotient is zero counts as zero.
template <typename Out>
__device__ float ScaleOf(float amax) {
  const float scale = __fdiv_rn(amax, std::is_same_v<Out, int8_t> ? kInt8Max : kE4M3Max);
  return scale == 0 ? 1.0F : scale;
}

// amax_bits[h] = largest magnitude of the head's kept rows, as the bits of a float: those of
// non-negative floats order as integers, and a maximum does not depend on the order of atomics.
// grid (slot tiles, heads)
template <typename T>
__global__ void __launch_bounds__(kThreads)
    AmaxKernel(Pages p, int lanes, unsigned int* amax_bits) {
  __shared__ float warp_amax[kThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x);
  const int h = static_cast<int>(blockIdx.y);
  const int groups = kThreads / lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * groups * kAmaxRowsPerGroup;
  float amax = 0;
  for (int i = 0; i < kAmaxRowsPerGroup; ++i) {
    float values[kMaxChunksPerLane][kChunk];
    LoadRow<T>(p, first + i * groups + thread / lanes, h, thread % lanes, lanes, values);
    amax = fmaxf(amax, Amax(values));
  }
  amax = GroupMax(amax, kWarp);
  if (thread % kWarp == 0) warp_amax[thread / kWarp] = amax;
  __syncthreads();
  if (thread == 0) {
    for (float other : warp_amax) amax = fmaxf(amax, other);
    atomicMax(&amax_bits[h], __float_as_uint(amax));
  }
}

template <typename Out>
__global__ void HeadScalesKernel(const unsigned int* amax_bits, int heads, float* scales) {
  const int h = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (h < heads) scales[h] = ScaleOf<Out>(__uint_as_float(amax_bits[h]));
}

__device__ void Encode(float value, float, float* out) { *out = value; }
__device__ void Encode(float value, float, __half* out) { *out = __float2half_rn(value); }
__device__ void Encode(float value, float, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(value);
}
__device__ void Encode(float value, float scale, E4M3* out) {
  out->code = __nv_cvt_float_to_fp8(__fdiv_rn(value, scale), __NV_SATFINITE, __NV_E4M3);
}
__device__ void Encode(float value, float scale, int8_t* out) {
  const float code = rintf(__fdiv_rn(value, scale));
  *out = static_cast<int8_t>(fminf(fmaxf(code, -kInt8Max), kInt8Max));
}

template <typename Out>
__device__ void StoreChunk(std::byte* address, const Chunk<Out>& chunk, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Chunk<Out>*>(address) = chunk;
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) reinterpret_cast<Out*>(address)[i] = chunk.values[i];
}

// A lane group writes one row (slot, head); rows of a block are consecutive in a dense output.
template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads)
    EncodePagesKernel(Pages p, int lanes, bool scale_per_token) {
  constexpr bool kScaled = sizeof(Out) == 1;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes;
  const int64_t heads = p.source.num_heads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + thread / lanes;
  const int64_t slot = row / heads;
  const int h = static_cast<int>(row - slot * heads);
  float values[kMaxChunksPerLane][kChunk];
  LoadRow<T>(p, slot, h, lane, lanes, values);
  float scale = 1;
  if constexpr (kScaled) {
    if (scale_per_token) {
      scale = ScaleOf<Out>(GroupMax(Amax(values), lanes));
      if (lane == 0 && slot < p.num_slots) *TokenScale(p, slot, h) = scale;
    } else {
      scale = p.scales[h];
    }
  }
  if (slot >= p.num_slots) return;
  std::byte* const out = OutputRow(p, slot, h);
#pragma unroll
  for (int part = 0; part < kMaxChunksPerLane; ++part) {
    const int chunk = lane + part * lanes;
    if (chunk * kChunk < p.source.head_dim) {
      Chunk<Out> codes;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) Encode(values[part][i], scale, &codes.values[i]);
      StoreChunk(out + chunk * static_cast<int>(sizeof(codes.values)), codes, p.out_aligned);
    }
  }
}

template <typename Out>
absl::Status ComputeHeadScales(const Pages& p, int lanes, const Launch& launch) {
  const TensorView& source = p.source;
  const int64_t bytes = source.num_heads * static_cast<int64_t>(sizeof(unsigned int));
  absl::StatusOr<Buffer> amax = launch.Scratch(bytes);
  if (!amax.ok()) return amax.status();
  absl::Status status =
      CudaStatus(cudaMemsetAsync(amax->data(), 0, static_cast<size_t>(bytes), launch.stream),
                 "cudaMemsetAsync");
  if (!status.ok()) return status;
  const int64_t rows_per_block = static_cast<int64_t>(kThreads / lanes) * kAmaxRowsPerGroup;
  const dim3 grid(static_cast<unsigned>(CeilDiv(std::max<int64_t>(p.num_kept, 1), rows_per_block)),
                  static_cast<unsigned>(source.num_heads));
  DispatchDType(source.dtype, [&]<typename T>() {
    AmaxKernel<T><<<grid, kThreads, 0, launch.stream>>>(p, lanes, amax->as<unsigned int>());
  });
  if (status = LaunchStatus("AmaxKernel"); !status.ok()) return status;
  HeadScalesKernel<Out>
      <<<static_cast<unsigned>(CeilDiv(source.num_heads, kThreads)), kThreads, 0, launch.stream>>>(
          amax->as<unsigned int>(), source.num_heads, p.scales);
  return LaunchStatus("HeadScalesKernel");
}

template <typename Out>
absl::Status EncodePages(const Pages& p, ScaleGranularity granularity, const Launch& launch) {
  const int lanes = LanesPerRow(p.source.head_dim);
  const bool per_token = granularity == ScaleGranularity::kTokenHead;
  if (sizeof(Out) == 1 && !per_token) {
    absl::Status status = ComputeHeadScales<Out>(p, lanes, launch);
    if (!status.ok()) return status;
  }
  const auto grid =
      static_cast<unsigned>(CeilDiv(p.num_slots * p.source.num_heads, kThreads / lanes));
  DispatchDType(p.source.dtype, [&]<typename T>() {
    EncodePagesKernel<T, Out><<<grid, kThreads, 0, launch.stream>>>(p, lanes, per_token);
  });
  return LaunchStatus("EncodePagesKernel");
}

// Addresses of input and output; zero strides are those of a dense output.
Pages PlanPages(const GatherPagesParams& params) {
  const int64_t heads = params.source.num_heads;
  const int64_t element_bytes = DTypeBytes(params.out_dtype);
  const int64_t row_bytes = params.source.head_dim * element_bytes;
  const auto or_dense = [](int64_t stride, int64_t dense) { return stride != 0 ? stride : dense; };
  const int64_t slot_stride = or_dense(params.slot_stride_bytes, heads * row_bytes);
  const int64_t head_stride = or_dense(params.head_stride_bytes, row_bytes);
  const int64_t bits = reinterpret_cast<intptr_t>(params.pages) | slot_stride | head_stride;
  return {
      .source = params.source,
      .kept = params.kept,
      .num_kept = params.num_kept,
      .num_slots = CeilDiv(params.num_kept, params.page_size) * params.page_size,
      .kept_per_head = params.groups > 1,
      .aligned = HasAlignedChunks(params.source),
      .rotation = params.rotation,
      .pages = static_cast<std::byte*>(params.pages),
      .slot_stride_bytes = slot_stride,
      .head_stride_bytes = head_stride,
      .dense = slot_stride == heads * row_bytes && head_stride == row_bytes,
      .out_aligned = bits % std::min<int64_t>(kChunk * element_bytes, 16) == 0,
      .scales = params.scales,
      .scale_slot_stride = params.scale_head_stride != 0 ? 1 : heads,
      .scale_head_stride = or_dense(params.scale_head_stride, 1),
  };
}

}  // namespace

absl::Status GatherPages(const GatherPagesParams& params, const Launch& launch) {
  const Pages p = PlanPages(params);
  if (p.num_slots == 0) return absl::OkStatus();
  if (params.format == Format::kFloat8E4M3) {
    return EncodePages<E4M3>(p, params.scale_granularity, launch);
  }
  if (params.format == Format::kInt8) {
    return EncodePages<int8_t>(p, params.scale_granularity, launch);
  }
  if (params.rotation.rotary_dim == 0) return CopyPages(p, launch);
  switch (params.out_dtype) {
    case DType::kFloat16:
      return EncodePages<__half>(p, params.scale_granularity, launch);
    case DType::kFloat32:
      return EncodePages<float>(p, params.scale_granularity, launch);
    default:
      return EncodePages<__nv_bfloat16>(p, params.scale_granularity, launch);
  }
}

}  // namespace dynsplit::kernels

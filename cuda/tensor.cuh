// SPDX-License-Identifier: Apache-2.0
//
// Reading TensorView on the device: decoding, addressing, and vector loads of 8 channels. A "chunk"
// is 8 consecutive channels of a row; head_dim is a multiple of 8, so rows are whole chunks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "server/pipeline/types.h"

namespace dynsplit::kernels {

inline constexpr int kChunk = 8;  // channels
inline constexpr int kWarp = 32;
inline constexpr unsigned kFullWarp = 0xFFFFFFFFU;

// Storage of the quantised types.
struct E4M3 {
  uint8_t code;
};
struct E5M2 {
  uint8_t code;
};

__device__ inline float Decode(float value) { return value; }
__device__ inline float Decode(__half value) { return __half2float(value); }
__device__ inline float Decode(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float Decode(E4M3 value) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(value.code, __NV_E4M3)));
}
__device__ inline float Decode(E5M2 value) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(value.code, __NV_E5M2)));
}
__device__ inline float Decode(int8_t value) { return static_cast<float>(value); }

// Calls f.template operator()<T>() with the storage type of `dtype`.
template <typename F>
auto DispatchDType(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f.template operator()<__half>();
    case DType::kBFloat16:
      return f.template operator()<__nv_bfloat16>();
    case DType::kFloat8E4M3:
      return f.template operator()<E4M3>();
    case DType::kFloat8E5M2:
      return f.template operator()<E5M2>();
    case DType::kInt8:
      return f.template operator()<int8_t>();
    case DType::kFloat32:
    case DType::kInt32:  // no operation takes an int32 tensor
      break;
  }
  return f.template operator()<float>();
}

// True if every chunk of the view may be read with 16-byte loads (8-byte loads for 1-byte types).
inline bool HasAlignedChunks(const TensorView& view) {
  const int64_t chunk_bytes = kChunk * DTypeBytes(view.dtype);
  const int64_t alignment = chunk_bytes < 16 ? chunk_bytes : 16;
  int64_t bits =
      reinterpret_cast<intptr_t>(view.data) | view.token_stride_bytes | view.head_stride_bytes;
  if (view.block_table != nullptr) bits |= view.page_stride_bytes;
  return bits % alignment == 0;
}

// Requires: t < 2^31.
__device__ inline const std::byte* RowAddress(const TensorView& view, int64_t t, int h) {
  const std::byte* const base = view.data + h * view.head_stride_bytes;
  if (view.block_table == nullptr) return base + t * view.token_stride_bytes;
  const auto token = static_cast<uint32_t>(t);
  const auto page_size = static_cast<uint32_t>(view.page_size);
  const uint32_t entry = token / page_size;
  return base + view.block_table[entry] * view.page_stride_bytes +
         static_cast<int64_t>(token - entry * page_size) * view.token_stride_bytes;
}

__device__ inline float RowScale(const TensorView& view, int64_t t, int h) {
  if (view.scales == nullptr) return 1.0F;
  return view.scale_granularity == ScaleGranularity::kHead ? view.scales[h]
                                                           : view.scales[t * view.num_heads + h];
}

template <typename T>
struct alignas(sizeof(T) == 1 ? 8 : 16) Chunk {
  T values[kChunk];
};

template <typename T>
__device__ inline Chunk<T> LoadChunk(const std::byte* address, bool aligned) {
  if (aligned) return *reinterpret_cast<const Chunk<T>*>(address);
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) chunk.values[i] = reinterpret_cast<const T*>(address)[i];
  return chunk;
}

// Decoded chunk `chunk` of the row at `row`, times the row's scale (1 for unquantised types).
template <typename T>
__device__ inline void LoadValues(const std::byte* row, int chunk, bool aligned, float scale,
                                  float (&out)[kChunk]) {
  const Chunk<T> raw = LoadChunk<T>(row + chunk * static_cast<int>(kChunk * sizeof(T)), aligned);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    out[i] = Decode(raw.values[i]);
    if constexpr (sizeof(T) == 1) out[i] = __fmul_rn(out[i], scale);
  }
}

// The same with the type looked up at run time, for kernels bound by arithmetic.
__device__ inline void LoadAnyValues(const TensorView& view, bool aligned, int64_t t, int h,
                                     int chunk, float (&out)[kChunk]) {
  const std::byte* const row = RowAddress(view, t, h);
  const float scale = RowScale(view, t, h);
  switch (view.dtype) {
    case DType::kFloat16:
      return LoadValues<__half>(row, chunk, aligned, scale, out);
    case DType::kBFloat16:
      return LoadValues<__nv_bfloat16>(row, chunk, aligned, scale, out);
    case DType::kFloat8E4M3:
      return LoadValues<E4M3>(row, chunk, aligned, scale, out);
    case DType::kFloat8E5M2:
      return LoadValues<E5M2>(row, chunk, aligned, scale, out);
    case DType::kInt8:
      return LoadValues<int8_t>(row, chunk, aligned, scale, out);
    case DType::kFloat32:
    case DType::kInt32:
      return LoadValues<float>(row, chunk, aligned, scale, out);
  }
}

// Lanes that share a row in kernels of one lane a chunk: a power of two, at most a warp (so a lane
// has at most kMaxChunksPerLane chunks at head_dim 512).
inline constexpr int kMaxChunksPerLane = 2;
inline int LanesPerRow(int head_dim) {
  int lanes = 1;
  while (lanes < kWarp && lanes * kChunk < head_dim) lanes *= 2;
  return lanes;
}

// Sum and maximum over groups of `lanes` consecutive lanes; all lanes of the warp take part.
__device__ inline float GroupSum(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}
__device__ inline float GroupMax(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// How rows of keys and values pass through shared memory on their way to the tensor cores: layout,
// asynchronous copies, and the widening of quantised types.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/async_copy.cuh"
#include "cuda/attend_tokens.cuh"
#include "cuda/mma.cuh"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {

// Of a thread block: two fit on an SM of 9.0, one on any since 8.0.
inline constexpr int kAttendSharedBytes = 96 << 10;
inline constexpr int kAttendMaxStages = 8;
inline constexpr int kScaleTypes = 2;  // of keys, of values

// The factors' type, for rows stored as S.
template <typename S>
using Factor = std::conditional_t<sizeof(S) == 1, __nv_bfloat16, S>;

// A warp's stages. One stage: 16 rows of keys, 16 of values, and their scales (quantised types).
template <typename S, int KS>
struct Stage {
  static constexpr int kDim = KS * 32;
  static constexpr int kRowChunks = kDim * static_cast<int>(sizeof(S)) / kChunkBytes;
  static constexpr int kSideChunks = kAttendStepRows * kRowChunks;
  static constexpr int kScaleChunks =
      sizeof(S) == 1 ? kScaleTypes * kAttendStepRows * static_cast<int>(sizeof(float)) / kChunkBytes
                     : 0;
  static constexpr int kChunks = 2 * kSideChunks + kScaleChunks;
  static constexpr int kBlockBytes = kAttendWarps * kChunks * kChunkBytes;
  static constexpr int kCount = std::min(kAttendMaxStages, kAttendSharedBytes / kBlockBytes);
  static constexpr int kSharedBytes = kCount * kBlockBytes;

  // Where chunks of a row lie, so that a phase of a shared-memory access touches all banks. Keys
  // are read as in mma.cuh: for codes, a phase is four rows of two chunks.
  __device__ static int KeyAt(int row, int chunk) {
    int swizzle = (row & 1) << 2;
    if constexpr (sizeof(S) == 1) swizzle = kRowChunks == 8 ? (row & 3) << 1 : row & 2;
    return row * kRowChunks + (chunk ^ swizzle);
  }
  // Values are read one chunk of eight rows at a time.
  __device__ static int ValueAt(int row, int chunk) {
    const int swizzle = kRowChunks >= 8 ? row & 7 : (row >> 1) & 3;
    return kSideChunks + row * kRowChunks + (chunk ^ swizzle);
  }
  __device__ static float* Scales(uint4* stage) {
    return reinterpret_cast<float*>(stage + 2 * kSideChunks);
  }
};

// ---- codes of quantised types -> bfloat16, exactly ---------------------------------------------

__device__ inline __nv_bfloat162 AsPair(uint32_t bits) {
  return *reinterpret_cast<const __nv_bfloat162*>(&bits);
}
__device__ inline uint32_t AsBits(__nv_bfloat162 pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A pair of codes, each in the high byte of its half; the low bytes are anything. Exponent and
// mantissa of an 8-bit float are those of a bfloat16 that is 2^(127 - bias) times smaller,
// subnormals included.
__device__ inline uint32_t WidenHighBytes(uint32_t codes, E4M3) {
  constexpr uint32_t kTwoTo120 = 0x7B807B80U;
  const uint32_t bits = ((codes >> 4) & 0x07F007F0U) | (codes & 0x80008000U);
  return AsBits(__hmul2(AsPair(bits), AsPair(kTwoTo120)));
}
__device__ inline uint32_t WidenHighBytes(uint32_t codes, E5M2) {
  constexpr uint32_t kTwoTo112 = 0x77807780U;
  const uint32_t bits = ((codes >> 3) & 0x0FE00FE0U) | (codes & 0x80008000U);
  return AsBits(__hmul2(AsPair(bits), AsPair(kTwoTo112)));
}
// 128 + the low seven bits, less 128 or (sign set) 256.
__device__ inline uint32_t WidenHighBytes(uint32_t codes, int8_t) {
  constexpr uint32_t k128 = 0x43004300U;
  const uint32_t low = ((codes >> 8) & 0x007F007FU) | k128;
  const uint32_t sign = ((codes >> 8) & 0x00800080U) | k128;
  return AsBits(__hsub2(AsPair(low), AsPair(sign)));
}

// Bytes 0 and 2 (even), 1 and 3 (odd) of a word of codes.
template <typename S>
__device__ inline uint32_t WidenEven(uint32_t codes) {
  return WidenHighBytes(codes << 8, S{});
}
template <typename S>
__device__ inline uint32_t WidenOdd(uint32_t codes) {
  return WidenHighBytes(codes, S{});
}

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// fp32 product of 64 rows by 64 rows, 4 x 4 results to each of 256 threads: thread (tx, ty) holds
// rows 4 ty .. 4 ty + 3 of the left side and 4 tx .. 4 tx + 3 of the right.
#pragma once

#include "cuda/tensor.cuh"

namespace dynsplit::kernels {

inline constexpr int kSimtTile = 64;
inline constexpr int kSimtSide = 16;
inline constexpr int kSimtPart = kSimtTile / kSimtSide;
inline constexpr int kSimtThreads = kSimtSide * kSimtSide;
inline constexpr int kSimtDepth = 32;  // channels in shared memory at a time
inline constexpr int kSimtPitch = kSimtTile + 4;

struct SimtTile {
  alignas(16) float left[kSimtDepth][kSimtPitch];
  alignas(16) float right[kSimtDepth][kSimtPitch];
};

template <typename Source>
__device__ void FillSide(float (&side)[kSimtDepth][kSimtPitch], const Source& source,
                         int64_t first_row, int first_chunk) {
  static_assert(kSimtTile * kSimtDepth / kChunk == kSimtThreads, "one chunk a thread");
  constexpr int kRowChunks = kSimtDepth / kChunk;
  const int row = static_cast<int>(threadIdx.x) / kRowChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kRowChunks;
  float values[kChunk] = {};
  source.Load(first_row + row, first_chunk + chunk, values);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) side[chunk * kChunk + i][row] = values[i];
}

// Adds the products of `left` rows from left_first and `right` rows from right_first over channels
// [0, depth), depth a multiple of 32. Sources leave values alone (zero) beyond their rows and
// channels. All threads of the block take part; the tile is free again after the next barrier.
template <typename Left, typename Right>
__device__ void MultiplyTile(SimtTile& tile, const Left& left, int64_t left_first,
                             const Right& right, int64_t right_first, int depth,
                             float (&sums)[kSimtPart][kSimtPart]) {
  const int tx = static_cast<int>(threadIdx.x) % kSimtSide;
  const int ty = static_cast<int>(threadIdx.x) / kSimtSide;
  for (int first = 0; first < depth; first += kSimtDepth) {
    __syncthreads();
    FillSide(tile.left, left, left_first, first / kChunk);
    FillSide(tile.right, right, right_first, first / kChunk);
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < kSimtDepth; ++c) {
      const float4 a = *reinterpret_cast<const float4*>(&tile.left[c][ty * kSimtPart]);
      const float4 b = *reinterpret_cast<const float4*>(&tile.right[c][tx * kSimtPart]);
      const float a_part[kSimtPart] = {a.x, a.y, a.z, a.w};
      const float b_part[kSimtPart] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < kSimtPart; ++i) {
#pragma unroll
        for (int j = 0; j < kSimtPart; ++j) sums[i][j] = fmaf(a_part[i], b_part[j], sums[i][j]);
      }
    }
  }
}

}  // namespace dynsplit::kernels

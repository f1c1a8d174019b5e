// SPDX-License-Identifier: Apache-2.0
//
// Products on tensor cores: bf16 or fp16 factors, fp32 sums (mma.sync m16n8k16).
//
// A product does not depend on the order of its channels, so operands are fed in an order that
// suits 16-byte loads: of every 32 channels, thread q of a quad supplies 8q .. 8q+7, four to each
// of two m16n8k16 steps. Both operands follow that order.
//
// Shared memory rows are KS * 64 bytes; chunk c of row n lies at c ^ 4 (n & 1), so that the eight
// lanes of a 16-byte phase (two rows, four chunks) touch all 32 banks.
#pragma once

#include <type_traits>

#include "cuda/tensor.cuh"

namespace dynsplit::kernels {

inline constexpr int kTileRows = 16;  // of the register operand
inline constexpr int kTileCols = 8;   // of the shared-memory operand

template <typename T>
__device__ inline void Mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// 16 rows in registers: thread (row, quad lane q) holds rows `row` and `row + 8`.
template <int KS>
struct RowTile {
  uint32_t a[2 * KS][4];

  __device__ void Set(int step, uint4 upper, uint4 lower) {
    a[2 * step][0] = upper.x;
    a[2 * step][1] = lower.x;
    a[2 * step][2] = upper.y;
    a[2 * step][3] = lower.y;
    a[2 * step + 1][0] = upper.z;
    a[2 * step + 1][1] = lower.z;
    a[2 * step + 1][2] = upper.w;
    a[2 * step + 1][3] = lower.w;
  }
};

template <int KS>
__device__ inline uint4* SharedChunk(uint4* tile, int row, int chunk) {
  return tile + row * (KS * 4) + (chunk ^ ((row & 1) << 2));
}

// sums[m] = products of row tile m with the 8 shared rows from `row` on.
template <typename T, int KS, int MT>
__device__ inline void Multiply(float (&sums)[MT][4], const RowTile<KS> (&tiles)[MT], uint4* shared,
                                int row, int lane) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[m][i] = 0;
  }
#pragma unroll
  for (int step = 0; step < KS; ++step) {
    const uint4 b = *SharedChunk<KS>(shared, row + lane / 4, 4 * step + lane % 4);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      Mma<T>(sums[m], tiles[m].a[2 * step], b.x, b.y);
      Mma<T>(sums[m], tiles[m].a[2 * step + 1], b.z, b.w);
    }
  }
}

template <typename T>
__device__ inline uint4 LoadBits(const std::byte* address, bool aligned) {
  const Chunk<T> chunk = LoadChunk<T>(address, aligned);
  return *reinterpret_cast<const uint4*>(&chunk);
}

template <typename T>
__device__ inline uint32_t PackPair(float low, float high) {
  const T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  return *reinterpret_cast<const uint32_t*>(pair);
}
// What rounding to T loses.
template <typename T>
__device__ inline float Remainder(float value) {
  return value - static_cast<float>(static_cast<T>(value));
}

// Four 8 x 8 matrices of 16-bit elements, transposed; lane l gives the address of row l % 8 of
// matrix l / 8.
__device__ inline void LoadTransposed(uint32_t (&out)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// Turning by whole positions, as RotationTable says: every product and sum is rounded on its own.
#pragma once

#include <cstdint>

#include "server/pipeline/backend.h"

namespace dynsplit::kernels {

inline constexpr int kCoarseStep = 256;

// (cos, sin) of the sum of two angles.
__device__ inline float2 AngleProduct(float2 coarse, float2 fine) {
  return {__fsub_rn(__fmul_rn(coarse.x, fine.x), __fmul_rn(coarse.y, fine.y)),
          __fadd_rn(__fmul_rn(coarse.y, fine.x), __fmul_rn(coarse.x, fine.y))};
}

// (cos, sin) of delta times the frequency of `pair`; see RotationTable.
__device__ inline float2 AngleOf(const RotationTable& rotation, int delta, int pair) {
  const int64_t pairs = rotation.rotary_dim / 2;
  const auto* const coarse_table = reinterpret_cast<const float2*>(rotation.coarse);
  const auto* const fine_table = reinterpret_cast<const float2*>(rotation.fine);
  return AngleProduct(coarse_table[delta / kCoarseStep * pairs + pair],
                      fine_table[delta % kCoarseStep * pairs + pair]);
}

// x cos + y sin, and y cos - x sin.
__device__ inline float TurnX(float x, float y, float2 angle) {
  return __fadd_rn(__fmul_rn(x, angle.x), __fmul_rn(y, angle.y));
}
__device__ inline float TurnY(float x, float y, float2 angle) {
  return __fsub_rn(__fmul_rn(y, angle.x), __fmul_rn(x, angle.y));
}

}  // namespace dynsplit::kernels

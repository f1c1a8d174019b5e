// SPDX-License-Identifier: Apache-2.0
//
// Exponentials and softmax sums in base 2.
#pragma once

#include "cuda/tensor.cuh"

namespace dynsplit::kernels {

inline constexpr float kLog2E = 1.4426950408889634F;
inline constexpr float kNoLogit = -1e30F;  // below every logit, yet differences stay finite

// 2^x, relative error 2^-22; results below 2^-126 are zero.
__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Running maximum and sum of 2^(x - maximum).
struct SoftmaxSum {
  float maximum = kNoLogit;
  float sum = 0;

  __device__ void Add(float x) {
    if (x > maximum) {
      sum *= Exp2(maximum - x);
      maximum = x;
    }
    sum += Exp2(x - maximum);
  }
  __device__ void Merge(SoftmaxSum other) {
    const float larger = fmaxf(maximum, other.maximum);
    sum = sum * Exp2(maximum - larger) + other.sum * Exp2(other.maximum - larger);
    maximum = larger;
  }
  // Over groups of `lanes` lanes; all lanes of the warp take part.
  __device__ void MergeLanes(int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      Merge({__shfl_xor_sync(kFullWarp, maximum, offset), __shfl_xor_sync(kFullWarp, sum, offset)});
    }
  }
};

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// Scores as integers, for radix selection and sorting.
#pragma once

#include <cmath>
#include <cstdint>

namespace dynsplit::kernels {

// Unsigned integers in the order of scores: NaN as -infinity, -0 as 0.
__device__ inline uint32_t OrderedScore(float score) {
  if (isnan(score)) score = -INFINITY;
  if (score == 0) score = 0;
  const uint32_t bits = __float_as_uint(score);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

}  // namespace dynsplit::kernels

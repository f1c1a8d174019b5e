// SPDX-License-Identifier: Apache-2.0
//
// x / d rounded once, as __fdiv_rn has it, for many x and one d: five operations instead of a
// division.
//
// With r = RN(1/d): q0 = RN(x r) is within 2 ulp of x/d. One correction, q1 = RN(q0 + r (x - q0
// d)), leaves an error below (1/2 + 2^-21) ulp, whatever the rounding of the residual; so q1 is
// faithful, its residual x - q1 d is exact, and by Markstein's theorem (r is correctly rounded) the
// second correction gives RN(x/d). No step may under- or overflow, which
//   2^-80 <= d < 2^120,  |x / d| <= 2^120  and  2^-100 <= |x| < 2^127
// grants: r >= 2^-120 is normal, and residuals are multiples of 2^-148. Smaller x come out below
// 2^-19 in magnitude, though not always rounded right, with the sign of x/d.
#pragma once

namespace dynsplit::kernels {

inline constexpr float kSmallestDivisor = 0x1p-80F;
inline constexpr float kLargestDivisor = 0x1p120F;  // itself excluded
inline constexpr float kSmallestDividend = 0x1p-100F;

// Requires: divisor in [kSmallestDivisor, kLargestDivisor), reciprocal == __frcp_rn(divisor).
__device__ inline float Quotient(float x, float divisor, float reciprocal) {
  const float estimate = __fmul_rn(x, reciprocal);
  const float faithful = __fmaf_rn(__fmaf_rn(-estimate, divisor, x), reciprocal, estimate);
  const float rounded = __fmaf_rn(__fmaf_rn(-faithful, divisor, x), reciprocal, faithful);
  return copysignf(rounded, x);  // a residual of zero loses the sign of zero
}

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// Division by a number that is known before the launch: a product and a shift (Granlund and
// Montgomery, 1994).
#pragma once

#include <cstdint>

namespace dynsplit::kernels {

class FastDivisor {
 public:
  FastDivisor() = default;
  // Requires: 1 <= divisor <= 2^31.
  explicit FastDivisor(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while ((int64_t{1} << shift_) < divisor) ++shift_;
    const uint64_t rest = (uint64_t{1} << shift_) - static_cast<uint64_t>(divisor);
    multiplier_ = static_cast<uint32_t>((rest << 32) / static_cast<uint64_t>(divisor) + 1);
  }

  __host__ __device__ uint32_t divisor() const { return divisor_; }
  // Requires: n < 2^31.
  __device__ uint32_t Divide(uint32_t n) const { return (__umulhi(n, multiplier_) + n) >> shift_; }

 private:
  uint32_t divisor_ = 1;
  uint32_t multiplier_ = 1;
  uint32_t shift_ = 0;
};

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// The number formats by definition: sign, exponent, fraction. Shares no code with the backends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "server/pipeline/types.h"

namespace dynsplit::oracle {

// Code or float at `element`, as a number; scales are not applied.
float DecodeElement(DType dtype, const std::byte* element);

// Rounds to nearest even and stores. float16 and bfloat16 overflow to infinity; fp8 and int8
// saturate (448, 57344, 127).
void EncodeElement(DType dtype, float value, std::byte* element);

// Stores the largest number of the type that is <= value (up: the smallest >= value); zeros as +0.
// Types of at most 16 bits; bfloat16 and float16 have infinities, |value| <= 448 for kFloat8E4M3.
void EncodeBound(DType dtype, double value, bool up, std::byte* element);

// Address and value (code * scale, one fp32 rounding) of an element of a view in host memory.
const std::byte* ElementAddress(const TensorView& view, int64_t token, int32_t head, int32_t c);
float ElementValue(const TensorView& view, int64_t token, int32_t head, int32_t c);
float ElementScale(const TensorView& view, int64_t token, int32_t head);

// Four sums side by side: one alone waits for each addition, and the largest shapes have many.
template <typename T>
double Dot(const std::vector<T>& a, const std::vector<T>& b) {
  double sums[4] = {};
  size_t c = 0;
  for (; c + 4 <= a.size(); c += 4) {
    for (size_t i = 0; i < 4; ++i) sums[i] += double{a[c + i]} * double{b[c + i]};
  }
  for (; c < a.size(); ++c) sums[0] += double{a[c]} * double{b[c]};
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace dynsplit::oracle

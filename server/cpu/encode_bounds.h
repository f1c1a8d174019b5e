// SPDX-License-Identifier: Apache-2.0
//
// Bounds in fewer bits that still bound.
#pragma once

#include <cstddef>
#include <cstdint>

#include "server/pipeline/types.h"

namespace dynsplit::cpu {

// Smallest power of two s >= 2^-120 with amax <= 448 * s; 1 where amax is 0.
float BoundScale(float amax);

enum class Rounding : uint8_t { kDown, kUp };

// out * scale = largest number of the type <= value (kDown) or smallest >= value (kUp); zeros come
// out as +0. Types: kFloat32 and kFloat16, whose values must be exact; kBFloat16; kFloat8E4M3, with
// a power of two as scale, which the others ignore, and |value| <= 448 * scale.
void EncodeBounds(DType dtype, Rounding rounding, const float* values, float scale, int64_t count,
                  std::byte* out);

}  // namespace dynsplit::cpu

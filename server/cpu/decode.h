// SPDX-License-Identifier: Apache-2.0
//
// Any element type <-> float, vectorised. The rounding is that of server/pipeline/numeric.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "server/pipeline/types.h"

namespace dynsplit::cpu {

// out[0, count) = element * scale, in one fp32 rounding (none where scale is 1). No alignment is
// required of either side. dtype is not kInt32.
void DecodeRow(DType dtype, const std::byte* row, float scale, int64_t count, float* out);

// Rows [begin, end) of one head: out[(t - begin) * stride + c]. Requires: stride >= head_dim.
void DecodeTile(const TensorView& view, int32_t head, int64_t begin, int64_t end, int64_t stride,
                float* out);

// out = round(values / scale): nearest even; fp8 saturates at 448, int8 at +-127. Other types
// ignore scale. Not for kFloat8E5M2 and kInt32, which are never written.
void EncodeRow(DType dtype, const float* values, float scale, int64_t count, std::byte* out);

// DecodeRow without a scale, TurnBack (row_math.h) of channels half apart, EncodeRow, to the same
// bits, without a trip through memory. False, and `out` untouched, where that is not written for:
// types but bf16, channels that do not fill vectors.
struct TurnRowParams {
  DType dtype = DType::kBFloat16;  // of row and out
  int64_t count = 0;
  int64_t rotary_dim = 0;
  const std::byte* row = nullptr;
  const float* cos = nullptr;  // [rotary_dim / 2]
  const float* sin = nullptr;
  std::byte* out = nullptr;  // not row
  bool stream = false;       // around the caches where aligned; visible to others after FlushStream
};
bool TurnRow(const TurnRowParams& params);

// Largest magnitude; 0 for none.
float LargestMagnitude(const float* values, int64_t count);

// True if one of `count` contiguous elements decodes to NaN or infinity without a scale.
bool HasNonFinite(DType dtype, const std::byte* elements, int64_t count);

// The instruction set in use, for example "AVX3_DL".
const char* VectorTargetName();

}  // namespace dynsplit::cpu

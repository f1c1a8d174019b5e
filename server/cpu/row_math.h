// SPDX-License-Identifier: Apache-2.0
//
// Vectorised arithmetic on rows of floats. No alignment is required.
#pragma once

#include <cstdint>

#include "server/pipeline/backend.h"

namespace dynsplit::cpu {

float DotProduct(const float* a, const float* b, int64_t count);
// sum[c] += row[c] * factor
void AddScaled(const float* row, float factor, int64_t count, float* sum);

// Folds rows [num_rows, count] into min, max (null: not wanted) and sum (null: not wanted), which
// hold the result of the rows before. Sums are taken in row order.
struct FoldParams {
  const float* rows = nullptr;
  int64_t num_rows = 0;
  int64_t count = 0;
  float* min = nullptr;
  float* max = nullptr;
  float* sum = nullptr;
};
void FoldRows(const FoldParams& params);

// cos and sin of `delta` positions: [rotary_dim / 2] each. Every product and sum is rounded on its
// own, as all backends do.
void RotationAngles(const RotationTable& rotation, int64_t delta, float* cos, float* sin);
// Turns channels [0, rotary_dim) of a row by minus those angles, with the same roundings.
void TurnBack(const RotationTable& rotation, const float* cos, const float* sin, float* row);

}  // namespace dynsplit::cpu

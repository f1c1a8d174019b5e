// SPDX-License-Identifier: Apache-2.0
//
// Attention of a few query rows over a tile of keys, the piece that all attention operations share.
//
// Query rows are the vector dimension: a RowBlock holds up to kBlockColumns of them transposed, so
// that a tile of logits is [keys][columns], masks, maxima and sums over keys are plain vector
// operations, and keys are read as they lie in memory.
#pragma once

#include <cstdint>

namespace dynsplit::cpu {

inline constexpr int64_t kColumnAlignment = 16;  // of RowBlock columns
inline constexpr int64_t kBlockColumns = 64;     // most columns of a block
inline constexpr int64_t kTileRows = 240;        // keys of a tile; divisible by all kernel heights

// c[r][j] = or += sum over k of a[r * a_row_stride + k * a_depth_stride] * b[k][j]
struct MultiplyParams {
  const float* a = nullptr;
  int64_t a_row_stride = 0;
  int64_t a_depth_stride = 0;
  const float* b = nullptr;  // [depth, columns]
  int64_t rows = 0;
  int64_t depth = 0;
  int64_t columns = 0;  // a multiple of kColumnAlignment
  bool accumulate = false;
  float* c = nullptr;  // [rows, columns]
};
void MultiplyTile(const MultiplyParams& params);

// Logits of keys (rows) for queries (columns). Column j sees row r if position(r) <= limits[j],
// position(r) = positions[r], or first_position + r where positions is null. limits null = no mask.
struct LogitTile {
  float* values = nullptr;  // [rows, columns]
  int64_t rows = 0;
  int64_t columns = 0;
  const int32_t* positions = nullptr;
  int32_t first_position = 0;
  const int32_t* limits = nullptr;
};

// max[j] = max(max[j], visible logits of column j).
void UpdateMax(const LogitTile& tile, float* max);
// values = exp(value - reference[j]), 0 where not visible or reference is -infinity;
// sum[j] += weights[r] * values (weights null = 1).
void Exponentiate(const LogitTile& tile, const float* reference, const float* weights, float* sum);
// sum[j] += weights[r] * value over the visible rows; weights null = 1.
void AddColumnSums(const LogitTile& tile, const float* weights, float* sum);
// The same over visible rows with position(r) >= floors[j], unweighted.
void AddColumnSumsFrom(const LogitTile& tile, const int32_t* floors, float* sum);
// out[r] += sum over j of values[r][j] * weights[j].
void AddRowSums(const LogitTile& tile, const float* weights, float* out);
// out[r] += sum over j of (values[r][j] * weights[j])^2.
void AddRowSquares(const LogitTile& tile, const float* weights, float* out);

// out[j] = exp(from[j] - to[j]); 0 where from is -infinity.
void ExpDifference(const float* from, const float* to, int64_t columns, float* out);
// rows[r][j] *= factors[j]
void ScaleColumns(float* rows, int64_t num_rows, int64_t columns, const float* factors);

}  // namespace dynsplit::cpu

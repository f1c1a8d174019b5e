// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/attention_tile.h"

#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "server/cpu/attention_tile.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace dynsplit::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// At most 16 lanes: kColumnAlignment.
using Floats = hn::CappedTag<float, 16>;
using Ints = hn::RebindToSigned<Floats>;
using VFloat = hn::Vec<Floats>;
using VInt = hn::Vec<Ints>;

// Accumulators fit the registers: 32 of them with AVX-512 and NEON, else 16.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64
constexpr int kMaxVectors = 4;
#else
constexpr int kMaxVectors = 2;
#endif
constexpr int KernelRows(int vectors) {
  return kMaxVectors == 4 ? (vectors == 1 ? 12 : 24 / vectors) : 12 / vectors;
}

// kRows x kVectors accumulators; rows broadcast from a, vectors loaded from b.
template <int kRows, int kVectors>
HWY_INLINE void MultiplyKernel(const MultiplyParams& p, int64_t row, int64_t column) {
  const Floats d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  float* c = p.c + row * p.columns + column;
  VFloat sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = p.accumulate ? hn::LoadU(d, c + r * p.columns + v * lanes) : hn::Zero(d);
    }
  }
  const float* HWY_RESTRICT a = p.a + row * p.a_row_stride;
  const float* HWY_RESTRICT b = p.b + column;
  for (int64_t k = 0; k < p.depth; ++k) {
    VFloat vectors[kVectors];
    for (int v = 0; v < kVectors; ++v) vectors[v] = hn::LoadU(d, b + v * lanes);
    for (int r = 0; r < kRows; ++r) {
      const VFloat broadcast = hn::Set(d, a[r * p.a_row_stride]);
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = hn::MulAdd(broadcast, vectors[v], sums[r][v]);
      }
    }
    a += p.a_depth_stride;
    b += p.columns;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) hn::StoreU(sums[r][v], d, c + r * p.columns + v * lanes);
  }
}

template <int kVectors>
HWY_INLINE void MultiplyColumns(const MultiplyParams& p, int64_t column) {
  constexpr int kRows = KernelRows(kVectors);
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) MultiplyKernel<kRows, kVectors>(p, row, column);
  for (; row + 2 <= p.rows; row += 2) MultiplyKernel<2, kVectors>(p, row, column);
  for (; row < p.rows; ++row) MultiplyKernel<1, kVectors>(p, row, column);
}

void MultiplyTile(const MultiplyParams& p) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(Floats()));
  int64_t column = 0;
  while (column < p.columns) {
    const int64_t vectors = (p.columns - column) / lanes;
    if (kMaxVectors == 4 && vectors >= 4) {
      MultiplyColumns<kMaxVectors == 4 ? 4 : 1>(p, column);
      column += 4 * lanes;
    } else if (kMaxVectors == 4 && vectors == 3) {
      MultiplyColumns<kMaxVectors == 4 ? 3 : 1>(p, column);
      column += 3 * lanes;
    } else if (vectors >= 2) {
      MultiplyColumns<2>(p, column);
      column += 2 * lanes;
    } else {
      MultiplyColumns<1>(p, column);
      column += lanes;
    }
  }
}

// e^x for x <= 88, relative error < 2e-7; 0 below -87.3 (-infinity included). x = n ln 2 + r with
// |r| <= ln 2 / 2; the Taylor polynomial of degree 7 is off by r^8 / 8! < 6e-9.
HWY_INLINE VFloat Exp(VFloat x) {
  const Floats d;
  const Ints di;
  const VFloat clamped = hn::Min(hn::Max(x, hn::Set(d, -87.3F)), hn::Set(d, 88.0F));
  const VInt n = hn::NearestInt(hn::Mul(clamped, hn::Set(d, 1.44269504F)));
  const VFloat nf = hn::ConvertTo(d, n);
  VFloat r = hn::NegMulAdd(nf, hn::Set(d, 0.693359375F), clamped);
  r = hn::NegMulAdd(nf, hn::Set(d, -2.12194440e-4F), r);
  VFloat p = hn::Set(d, 1.0F / 5040);
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F / 720));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F / 120));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F / 24));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F / 6));
  p = hn::MulAdd(p, r, hn::Set(d, 0.5F));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F));
  const VFloat power = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(n, hn::Set(di, 127))));
  return hn::IfThenElseZero(hn::Ge(x, hn::Set(d, -87.3F)), hn::Mul(p, power));
}

HWY_INLINE int32_t Position(const LogitTile& tile, int64_t row) {
  return tile.positions != nullptr ? tile.positions[row]
                                   : tile.first_position + static_cast<int32_t>(row);
}

// Keeps `value` where the column sees the row, else `other`.
HWY_INLINE VFloat Visible(const LogitTile& tile, int64_t row, int64_t column, VFloat value,
                          VFloat other) {
  const Ints di;
  const auto hidden = hn::Gt(hn::Set(di, Position(tile, row)), hn::LoadU(di, tile.limits + column));
  return hn::IfThenElse(hn::RebindMask(Floats(), hidden), other, value);
}

// Calls f(row, visible value) down a column of vectors.
template <typename F>
HWY_INLINE void ForColumn(const LogitTile& tile, int64_t column, float hidden_value, F f) {
  const Floats d;
  const VFloat hidden = hn::Set(d, hidden_value);
  if (tile.limits == nullptr) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      f(r, hn::LoadU(d, tile.values + r * tile.columns + column));
    }
    return;
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const VFloat value = hn::LoadU(d, tile.values + r * tile.columns + column);
    f(r, Visible(tile, r, column, value, hidden));
  }
}

void UpdateMax(const LogitTile& tile, float* max) {
  const Floats d;
  for (int64_t column = 0; column < tile.columns; column += static_cast<int64_t>(hn::Lanes(d))) {
    VFloat largest = hn::LoadU(d, max + column);
    ForColumn(tile, column, -std::numeric_limits<float>::infinity(),
              [&](int64_t /*r*/, VFloat value) HWY_ATTR { largest = hn::Max(value, largest); });
    hn::StoreU(largest, d, max + column);
  }
}

void Exponentiate(const LogitTile& tile, const float* reference, const float* weights, float* sum) {
  const Floats d;
  const float infinity = std::numeric_limits<float>::infinity();
  for (int64_t column = 0; column < tile.columns; column += static_cast<int64_t>(hn::Lanes(d))) {
    VFloat ref = hn::LoadU(d, reference + column);
    // Nothing visible so far: all logits are -infinity, and so is their distance to +infinity.
    ref = hn::IfThenElse(hn::Eq(ref, hn::Set(d, -infinity)), hn::Set(d, infinity), ref);
    VFloat total = hn::LoadU(d, sum + column);
    ForColumn(tile, column, -infinity, [&](int64_t r, VFloat value) HWY_ATTR {
      const VFloat e = Exp(hn::Sub(value, ref));
      hn::StoreU(e, d, tile.values + r * tile.columns + column);
      total = weights == nullptr ? hn::Add(total, e) : hn::MulAdd(hn::Set(d, weights[r]), e, total);
    });
    hn::StoreU(total, d, sum + column);
  }
}

void AddColumnSums(const LogitTile& tile, const float* weights, float* sum) {
  const Floats d;
  for (int64_t column = 0; column < tile.columns; column += static_cast<int64_t>(hn::Lanes(d))) {
    VFloat total = hn::LoadU(d, sum + column);
    ForColumn(tile, column, 0.0F, [&](int64_t r, VFloat value) HWY_ATTR {
      total = weights == nullptr ? hn::Add(total, value)
                                 : hn::MulAdd(hn::Set(d, weights[r]), value, total);
    });
    hn::StoreU(total, d, sum + column);
  }
}

void AddColumnSumsFrom(const LogitTile& tile, const int32_t* floors, float* sum) {
  const Floats d;
  const Ints di;
  for (int64_t column = 0; column < tile.columns; column += static_cast<int64_t>(hn::Lanes(d))) {
    const VInt floor = hn::LoadU(di, floors + column);
    VFloat total = hn::LoadU(d, sum + column);
    ForColumn(tile, column, 0.0F, [&](int64_t r, VFloat value) HWY_ATTR {
      const auto below = hn::Gt(floor, hn::Set(di, Position(tile, r)));
      total = hn::Add(total, hn::IfThenZeroElse(hn::RebindMask(d, below), value));
    });
    hn::StoreU(total, d, sum + column);
  }
}

// add(value, weight, total) for the values of a row.
template <typename Add>
void AddRows(const LogitTile& tile, const float* weights, Add add, float* out) {
  const Floats d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* row = tile.values + r * tile.columns;
    VFloat total = hn::Zero(d);
    for (int64_t column = 0; column < tile.columns; column += lanes) {
      total = add(hn::LoadU(d, row + column), hn::LoadU(d, weights + column), total);
    }
    out[r] += hn::GetLane(hn::SumOfLanes(d, total));
  }
}

void AddRowSums(const LogitTile& tile, const float* weights, float* out) {
  AddRows(
      tile, weights,
      [](VFloat value, VFloat weight, VFloat total) { return hn::MulAdd(value, weight, total); },
      out);
}

void AddRowSquares(const LogitTile& tile, const float* weights, float* out) {
  AddRows(
      tile, weights,
      [](VFloat value, VFloat weight, VFloat total) {
        const VFloat product = hn::Mul(value, weight);
        return hn::MulAdd(product, product, total);
      },
      out);
}

void ExpDifference(const float* from, const float* to, int64_t columns, float* out) {
  const Floats d;
  const VFloat lowest = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int64_t column = 0; column < columns; column += static_cast<int64_t>(hn::Lanes(d))) {
    const VFloat start = hn::LoadU(d, from + column);
    const VFloat e = Exp(hn::Sub(start, hn::LoadU(d, to + column)));
    hn::StoreU(hn::IfThenZeroElse(hn::Eq(start, lowest), e), d, out + column);
  }
}

void ScaleColumns(float* rows, int64_t num_rows, int64_t columns, const float* factors) {
  const Floats d;
  for (int64_t column = 0; column < columns; column += static_cast<int64_t>(hn::Lanes(d))) {
    const VFloat factor = hn::LoadU(d, factors + column);
    for (int64_t r = 0; r < num_rows; ++r) {
      float* value = rows + r * columns + column;
      hn::StoreU(hn::Mul(hn::LoadU(d, value), factor), d, value);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dynsplit::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dynsplit::cpu {
HWY_EXPORT(MultiplyTile);
HWY_EXPORT(UpdateMax);
HWY_EXPORT(Exponentiate);
HWY_EXPORT(AddColumnSums);
HWY_EXPORT(AddColumnSumsFrom);
HWY_EXPORT(AddRowSums);
HWY_EXPORT(AddRowSquares);
HWY_EXPORT(ExpDifference);
HWY_EXPORT(ScaleColumns);

void MultiplyTile(const MultiplyParams& params) { HWY_DYNAMIC_DISPATCH(MultiplyTile)(params); }

void UpdateMax(const LogitTile& tile, float* max) { HWY_DYNAMIC_DISPATCH(UpdateMax)(tile, max); }

void Exponentiate(const LogitTile& tile, const float* reference, const float* weights, float* sum) {
  HWY_DYNAMIC_DISPATCH(Exponentiate)(tile, reference, weights, sum);
}

void AddColumnSums(const LogitTile& tile, const float* weights, float* sum) {
  HWY_DYNAMIC_DISPATCH(AddColumnSums)(tile, weights, sum);
}

void AddColumnSumsFrom(const LogitTile& tile, const int32_t* floors, float* sum) {
  HWY_DYNAMIC_DISPATCH(AddColumnSumsFrom)(tile, floors, sum);
}

void AddRowSums(const LogitTile& tile, const float* weights, float* out) {
  HWY_DYNAMIC_DISPATCH(AddRowSums)(tile, weights, out);
}

void AddRowSquares(const LogitTile& tile, const float* weights, float* out) {
  HWY_DYNAMIC_DISPATCH(AddRowSquares)(tile, weights, out);
}

void ExpDifference(const float* from, const float* to, int64_t columns, float* out) {
  HWY_DYNAMIC_DISPATCH(ExpDifference)(from, to, columns, out);
}

void ScaleColumns(float* rows, int64_t num_rows, int64_t columns, const float* factors) {
  HWY_DYNAMIC_DISPATCH(ScaleColumns)(rows, num_rows, columns, factors);
}
}  // namespace dynsplit::cpu
#endif  // HWY_ONCE

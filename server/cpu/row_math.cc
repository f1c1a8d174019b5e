// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/row_math.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "server/cpu/row_math.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace dynsplit::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using VFloat = hn::Vec<Floats>;

float DotProduct(const float* a, const float* b, int64_t count) {
  const Floats d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  VFloat sum0 = hn::Zero(d);
  VFloat sum1 = hn::Zero(d);
  int64_t c = 0;
  for (; c + 2 * lanes <= count; c += 2 * lanes) {
    sum0 = hn::MulAdd(hn::LoadU(d, a + c), hn::LoadU(d, b + c), sum0);
    sum1 = hn::MulAdd(hn::LoadU(d, a + c + lanes), hn::LoadU(d, b + c + lanes), sum1);
  }
  for (; c + lanes <= count; c += lanes) {
    sum0 = hn::MulAdd(hn::LoadU(d, a + c), hn::LoadU(d, b + c), sum0);
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(sum0, sum1)));
  for (; c < count; ++c) sum += a[c] * b[c];
  return sum;
}

void AddScaled(const float* row, float factor, int64_t count, float* sum) {
  const Floats d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const VFloat f = hn::Set(d, factor);
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) {
    hn::StoreU(hn::MulAdd(hn::LoadU(d, row + c), f, hn::LoadU(d, sum + c)), d, sum + c);
  }
  for (; c < count; ++c) sum[c] += row[c] * factor;
}

// Row by row, as memory lies: a column of rows whose distance is a power of two shares cache sets.
void FoldRows(const FoldParams& p) {
  const Floats d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t whole = p.count / lanes * lanes;
  for (int64_t r = 0; r < p.num_rows; ++r) {
    const float* row = p.rows + r * p.count;
    if (p.min != nullptr) {
      for (int64_t c = 0; c < whole; c += lanes) {
        const VFloat value = hn::LoadU(d, row + c);
        hn::StoreU(hn::Min(hn::LoadU(d, p.min + c), value), d, p.min + c);
        hn::StoreU(hn::Max(hn::LoadU(d, p.max + c), value), d, p.max + c);
      }
      for (int64_t c = whole; c < p.count; ++c) {
        p.min[c] = std::min(p.min[c], row[c]);
        p.max[c] = std::max(p.max[c], row[c]);
      }
    }
    if (p.sum != nullptr) {
      for (int64_t c = 0; c < whole; c += lanes) {
        hn::StoreU(hn::Add(hn::LoadU(d, p.sum + c), hn::LoadU(d, row + c)), d, p.sum + c);
      }
      for (int64_t c = whole; c < p.count; ++c) p.sum[c] += row[c];
    }
  }
}

void RotationAngles(const RotationTable& rotation, int64_t delta, float* cos, float* sin) {
  const Floats d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t half = rotation.rotary_dim / 2;
  const float* coarse = rotation.coarse + delta / 256 * rotation.rotary_dim;
  const float* fine = rotation.fine + delta % 256 * rotation.rotary_dim;
  int64_t i = 0;
  for (; i + lanes <= half; i += lanes) {
    VFloat cc, cs, fc, fs;
    hn::LoadInterleaved2(d, coarse + 2 * i, cc, cs);
    hn::LoadInterleaved2(d, fine + 2 * i, fc, fs);
    hn::StoreU(hn::Sub(hn::Mul(cc, fc), hn::Mul(cs, fs)), d, cos + i);
    hn::StoreU(hn::Add(hn::Mul(cc, fs), hn::Mul(cs, fc)), d, sin + i);
  }
  for (; i < half; ++i) {
    const float cc = coarse[2 * i];
    const float cs = coarse[2 * i + 1];
    const float fc = fine[2 * i];
    const float fs = fine[2 * i + 1];
    cos[i] = cc * fc - cs * fs;
    sin[i] = cc * fs + cs * fc;
  }
}

void TurnBack(const RotationTable& rotation, const float* cos, const float* sin, float* row) {
  const Floats d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t half = rotation.rotary_dim / 2;
  int64_t i = 0;
  for (; i + lanes <= half; i += lanes) {
    VFloat x, y;
    if (rotation.interleaved) {
      hn::LoadInterleaved2(d, row + 2 * i, x, y);
    } else {
      x = hn::LoadU(d, row + i);
      y = hn::LoadU(d, row + half + i);
    }
    const VFloat c = hn::LoadU(d, cos + i);
    const VFloat s = hn::LoadU(d, sin + i);
    const VFloat turned_x = hn::Add(hn::Mul(x, c), hn::Mul(y, s));
    const VFloat turned_y = hn::Sub(hn::Mul(y, c), hn::Mul(x, s));
    if (rotation.interleaved) {
      hn::StoreInterleaved2(turned_x, turned_y, d, row + 2 * i);
    } else {
      hn::StoreU(turned_x, d, row + i);
      hn::StoreU(turned_y, d, row + half + i);
    }
  }
  for (; i < half; ++i) {
    float& x = row[rotation.interleaved ? 2 * i : i];
    float& y = row[rotation.interleaved ? 2 * i + 1 : i + half];
    const float turned_x = x * cos[i] + y * sin[i];
    const float turned_y = y * cos[i] - x * sin[i];
    x = turned_x;
    y = turned_y;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dynsplit::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dynsplit::cpu {
HWY_EXPORT(DotProduct);
HWY_EXPORT(AddScaled);
HWY_EXPORT(FoldRows);
HWY_EXPORT(RotationAngles);
HWY_EXPORT(TurnBack);

float DotProduct(const float* a, const float* b, int64_t count) {
  return HWY_DYNAMIC_DISPATCH(DotProduct)(a, b, count);
}

void AddScaled(const float* row, float factor, int64_t count, float* sum) {
  HWY_DYNAMIC_DISPATCH(AddScaled)(row, factor, count, sum);
}

void FoldRows(const FoldParams& params) { HWY_DYNAMIC_DISPATCH(FoldRows)(params); }

void RotationAngles(const RotationTable& rotation, int64_t delta, float* cos, float* sin) {
  HWY_DYNAMIC_DISPATCH(RotationAngles)(rotation, delta, cos, sin);
}

void TurnBack(const RotationTable& rotation, const float* cos, const float* sin, float* row) {
  HWY_DYNAMIC_DISPATCH(TurnBack)(rotation, cos, sin, row);
}
}  // namespace dynsplit::cpu
#endif  // HWY_ONCE

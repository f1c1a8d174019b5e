// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/encode_bounds.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "server/cpu/decode.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "server/cpu/encode_bounds.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace dynsplit::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using Words = hn::RebindToUnsigned<Floats>;
using Ints = hn::RebindToSigned<Floats>;
using VFloat = hn::Vec<Floats>;
using VWord = hn::Vec<Words>;

// Codes are cut towards zero; where that loses something on the side of the rounding, they go one
// step away from zero. `wrong_sign` is the sign bit of values that cutting rounds the right way.
struct BoundToBFloat16 {
  using Element = uint16_t;
  VWord wrong_sign;

  HWY_INLINE VWord operator()(VFloat value) const {
    const Words d;
    const VWord bits = hn::BitCast(d, value);
    const auto inexact = hn::Ne(hn::And(bits, hn::Set(d, 0xFFFFU)), hn::Zero(d));
    const auto cut_wrongly = hn::Ne(hn::And(bits, hn::Set(d, 0x80000000U)), wrong_sign);
    const VWord step = hn::IfThenElseZero(hn::And(inexact, cut_wrongly), hn::Set(d, 1U));
    const VWord code = hn::Add(hn::ShiftRight<16>(bits), step);
    const auto zero = hn::Eq(hn::And(code, hn::Set(d, 0x7FFFU)), hn::Zero(d));
    return hn::IfThenZeroElse(zero, code);
  }
};

struct BoundToE4M3 {
  using Element = uint8_t;
  VWord wrong_sign;
  VFloat inverse_scale;

  HWY_INLINE VWord operator()(VFloat value) const {
    const Words d;
    const Floats df;
    const VWord sign = hn::And(hn::BitCast(d, value), hn::Set(d, 0x80000000U));
    const VFloat magnitude = hn::Mul(hn::Abs(value), inverse_scale);
    const VWord bits = hn::BitCast(d, magnitude);
    // From 2^-6 on: exponent bias 7 for 127, 3 fraction bits for 23.
    const VWord normal = hn::ShiftRight<20>(hn::Sub(bits, hn::Set(d, 120U << 23)));
    const auto normal_inexact = hn::Ne(hn::And(bits, hn::Set(d, 0xFFFFFU)), hn::Zero(d));
    // Below, in steps of 2^-9. What the scale has made zero is not, unless the value is.
    const VFloat steps = hn::Mul(magnitude, hn::Set(df, 512.0F));
    const hn::Vec<Ints> whole = hn::ConvertTo(Ints(), hn::Min(steps, hn::Set(df, 8.0F)));
    const auto vanished = hn::And(hn::Eq(magnitude, hn::Zero(df)), hn::Ne(value, hn::Zero(df)));
    const auto tiny_inexact = hn::Or(hn::Ne(hn::ConvertTo(df, whole), steps), vanished);

    const auto tiny = hn::Lt(magnitude, hn::Set(df, 0x1p-6F));
    const auto inexact =
        hn::IfThenElse(hn::RebindMask(d, tiny), hn::VecFromMask(d, hn::RebindMask(d, tiny_inexact)),
                       hn::VecFromMask(d, normal_inexact));
    const auto cut_wrongly = hn::Ne(sign, wrong_sign);
    const VWord step =
        hn::IfThenElseZero(hn::And(hn::MaskFromVec(inexact), cut_wrongly), hn::Set(d, 1U));
    const VWord cut = hn::IfThenElse(hn::RebindMask(d, tiny), hn::BitCast(d, whole), normal);
    const VWord code = hn::Add(cut, step);
    const auto zero = hn::Eq(code, hn::Zero(d));
    return hn::IfThenZeroElse(zero, hn::Or(code, hn::ShiftRight<24>(sign)));
  }
};

template <typename Encode>
HWY_INLINE void EncodeElements(const Encode& encode, const float* values, int64_t count,
                               std::byte* out) {
  using Element = typename Encode::Element;
  const Floats d;
  const hn::Rebind<Element, Floats> dx;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto* elements = reinterpret_cast<Element*>(out);
  const auto convert = [&](VFloat value) HWY_ATTR {
    return hn::DemoteTo(dx, hn::BitCast(Ints(), encode(value)));
  };
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) {
    hn::StoreU(convert(hn::LoadU(d, values + c)), dx, elements + c);
  }
  if (hn::MaxLanes(d) == 1 || c >= count) return;  // one lane leaves no rest
  HWY_ALIGN float rest[hn::MaxLanes(d)] = {};
  HWY_ALIGN Element encoded[hn::MaxLanes(dx)];
  std::memcpy(rest, values + c, static_cast<size_t>(count - c) * sizeof(float));
  hn::Store(convert(hn::Load(d, rest)), dx, encoded);
  std::memcpy(elements + c, encoded, static_cast<size_t>(count - c) * sizeof(Element));
}

void EncodeNarrowed(DType dtype, Rounding rounding, const float* values, float scale, int64_t count,
                    std::byte* out) {
  const Words d;
  const VWord wrong_sign = hn::Set(d, rounding == Rounding::kUp ? 0x80000000U : 0U);
  if (dtype == DType::kBFloat16) {
    EncodeElements(BoundToBFloat16{wrong_sign}, values, count, out);
  } else {
    EncodeElements(BoundToE4M3{wrong_sign, hn::Set(Floats(), 1.0F / scale)}, values, count, out);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dynsplit::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dynsplit::cpu {
HWY_EXPORT(EncodeNarrowed);

float BoundScale(float amax) {
  if (amax == 0) return 1;
  const auto bits = std::bit_cast<uint32_t>(amax);
  const int exponent = static_cast<int>(bits >> 23) - 127;
  // 448 = 1.75 * 2^8.
  const int scale_exponent =
      std::max((bits & 0x7FFFFFU) <= 0x600000U ? exponent - 8 : exponent - 7, -120);
  return std::bit_cast<float>(static_cast<uint32_t>(scale_exponent + 127) << 23);
}

void EncodeBounds(DType dtype, Rounding rounding, const float* values, float scale, int64_t count,
                  std::byte* out) {
  if (dtype == DType::kBFloat16 || dtype == DType::kFloat8E4M3) {
    return HWY_DYNAMIC_DISPATCH(EncodeNarrowed)(dtype, rounding, values, scale, count, out);
  }
  EncodeRow(dtype, values, 1.0F, count, out);
}
}  // namespace dynsplit::cpu
#endif  // HWY_ONCE

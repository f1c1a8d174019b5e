// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/decode.h"

#include <algorithm>
#include <cstring>

#include "server/cpu/tensor.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "server/cpu/decode.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace dynsplit::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using Words = hn::RebindToUnsigned<Floats>;
using Ints = hn::RebindToSigned<Floats>;
using Halves = hn::Rebind<uint16_t, Floats>;
using Bytes = hn::Rebind<uint8_t, Floats>;
using SignedBytes = hn::Rebind<int8_t, Floats>;
using VFloat = hn::Vec<Floats>;
using VWord = hn::Vec<Words>;

// One functor a type: raw bits of a vector of elements -> float.
struct FromFloat32 {
  using Element = uint32_t;
  using Tag = Words;
  HWY_INLINE VFloat operator()(VWord bits) const { return hn::BitCast(Floats(), bits); }
};

struct FromBFloat16 {
  using Element = uint16_t;
  using Tag = Halves;
  HWY_INLINE VFloat operator()(hn::Vec<Halves> bits) const {
    return hn::BitCast(Floats(), hn::ShiftLeft<16>(hn::PromoteTo(Words(), bits)));
  }
};

// Small formats: shifting magnitude bits to float's places leaves the value 2^-scale_exponent too
// small, subnormals included; one exact multiplication mends it.
HWY_INLINE VFloat Widen(VWord magnitude, VWord sign, float factor) {
  const Floats d;
  const VFloat value = hn::Mul(hn::BitCast(d, magnitude), hn::Set(d, factor));
  return hn::BitCast(d, hn::Or(hn::BitCast(Words(), value), sign));
}

struct FromFloat16 {
  using Element = uint16_t;
  using Tag = Halves;
  HWY_INLINE VFloat operator()(hn::Vec<Halves> bits) const {
    const Words d;
    const VWord x = hn::PromoteTo(d, bits);
    const VWord magnitude = hn::And(x, hn::Set(d, 0x7FFFU));
    const VWord sign = hn::ShiftLeft<16>(hn::Xor(x, magnitude));
    const VFloat value = Widen(hn::ShiftLeft<13>(magnitude), sign, 0x1p112F);
    const auto special = hn::Gt(magnitude, hn::Set(d, 0x7BFFU));
    const VWord exponent = hn::IfThenElseZero(special, hn::Set(d, 0x7F800000U));
    return hn::BitCast(Floats(), hn::Or(hn::BitCast(d, value), exponent));
  }
};

struct FromE4M3 {
  using Element = uint8_t;
  using Tag = Bytes;
  HWY_INLINE VFloat operator()(hn::Vec<Bytes> bits) const {
    const Words d;
    const VWord x = hn::PromoteTo(d, bits);
    const VWord magnitude = hn::And(x, hn::Set(d, 0x7FU));
    const VWord sign = hn::ShiftLeft<24>(hn::Xor(x, magnitude));
    const VFloat value = Widen(hn::ShiftLeft<20>(magnitude), sign, 0x1p120F);
    const auto special = hn::Eq(magnitude, hn::Set(d, 0x7FU));
    const VWord nan = hn::IfThenElseZero(special, hn::Set(d, 0x7FC00000U));
    return hn::BitCast(Floats(), hn::Or(hn::BitCast(d, value), nan));
  }
};

struct FromE5M2 {
  using Element = uint8_t;
  using Tag = Bytes;
  HWY_INLINE VFloat operator()(hn::Vec<Bytes> bits) const {
    const Words d;
    const VWord x = hn::PromoteTo(d, bits);
    const VWord magnitude = hn::And(x, hn::Set(d, 0x7FU));
    const VWord sign = hn::ShiftLeft<24>(hn::Xor(x, magnitude));
    const VFloat value = Widen(hn::ShiftLeft<21>(magnitude), sign, 0x1p112F);
    const auto special = hn::Gt(magnitude, hn::Set(d, 0x7BU));
    const VWord exponent = hn::IfThenElseZero(special, hn::Set(d, 0x7F800000U));
    return hn::BitCast(Floats(), hn::Or(hn::BitCast(d, value), exponent));
  }
};

struct FromInt8 {
  using Element = int8_t;
  using Tag = SignedBytes;
  HWY_INLINE VFloat operator()(hn::Vec<SignedBytes> bits) const {
    return hn::ConvertTo(Floats(), hn::PromoteTo(Ints(), bits));
  }
};

template <typename Decode>
HWY_INLINE void DecodeElements(Decode decode, const std::byte* row, float scale, int64_t count,
                               float* out) {
  using Element = typename Decode::Element;
  const Floats d;
  const typename Decode::Tag dx;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const VFloat factor = hn::Set(d, scale);
  const auto* elements = reinterpret_cast<const Element*>(row);
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) {
    hn::StoreU(hn::Mul(decode(hn::LoadU(dx, elements + c)), factor), d, out + c);
  }
  if (hn::MaxLanes(d) == 1 || c >= count) return;  // one lane leaves no rest
  HWY_ALIGN Element rest[hn::MaxLanes(dx)] = {};
  HWY_ALIGN float decoded[hn::MaxLanes(d)];
  std::memcpy(rest, elements + c, static_cast<size_t>(count - c) * sizeof(Element));
  hn::Store(hn::Mul(decode(hn::Load(dx, rest)), factor), d, decoded);
  std::memcpy(out + c, decoded, static_cast<size_t>(count - c) * sizeof(float));
}

template <typename Decode>
HWY_INLINE void DecodeRows(Decode decode, const TensorView& view, int32_t head, int64_t begin,
                           int64_t end, int64_t stride, float* out) {
  for (int64_t t = begin; t < end; ++t) {
    DecodeElements(decode, RowAddress(view, t, head), RowScale(view, t, head), view.head_dim, out);
    out += stride;
  }
}

// Calls f with the functor of the type.
template <typename F>
HWY_INLINE void WithDecoder(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(FromFloat32());
    case DType::kFloat16:
      return f(FromFloat16());
    case DType::kBFloat16:
      return f(FromBFloat16());
    case DType::kFloat8E4M3:
      return f(FromE4M3());
    case DType::kFloat8E5M2:
      return f(FromE5M2());
    case DType::kInt8:
      return f(FromInt8());
    case DType::kInt32:
      return;
  }
}

void DecodeRow(DType dtype, const std::byte* row, float scale, int64_t count, float* out) {
  WithDecoder(dtype, [&](auto decode) HWY_ATTR { DecodeElements(decode, row, scale, count, out); });
}

void DecodeTile(const TensorView& view, int32_t head, int64_t begin, int64_t end, int64_t stride,
                float* out) {
  WithDecoder(view.dtype, [&](auto decode) HWY_ATTR {
    DecodeRows(decode, view, head, begin, end, stride, out);
  });
}

// Round to nearest even of a float's magnitude bits to `kShift` fewer fraction bits.
template <int kShift>
HWY_INLINE VWord RoundAway(VWord bits) {
  const Words d;
  const VWord odd = hn::And(hn::ShiftRight<kShift>(bits), hn::Set(d, 1U));
  const VWord half = hn::Set(d, (1U << (kShift - 1)) - 1);
  return hn::ShiftRight<kShift>(hn::Add(bits, hn::Add(half, odd)));
}

struct ToFloat32 {
  using Element = uint32_t;
  using Tag = Words;
  HWY_INLINE VWord operator()(VFloat value) const { return hn::BitCast(Words(), value); }
};

struct ToBFloat16 {
  using Element = uint16_t;
  using Tag = Halves;
  // The code in the upper half of each word.
  static HWY_INLINE VWord Upper(VFloat value) {
    const Words d;
    const VWord bits = hn::BitCast(d, value);
    const VWord odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d, 1U));
    const VWord rounded = hn::Add(bits, hn::Add(odd, hn::Set(d, 0x7FFFU)));
    const VWord quiet = hn::Or(bits, hn::Set(d, 0x400000U));
    return hn::IfThenElse(hn::RebindMask(d, hn::IsNaN(value)), quiet, rounded);
  }
  HWY_INLINE hn::Vec<Halves> operator()(VFloat value) const {
    return hn::DemoteTo(Halves(), hn::BitCast(Ints(), hn::ShiftRight<16>(Upper(value))));
  }
};

// `kFraction` fraction bits, exponent bias `kBias`; magnitude bits in, code out. Below the smallest
// normal number, adding a power of two whose last place is the smallest subnormal rounds there.
template <int kFraction, int kBias>
HWY_INLINE VWord NarrowMagnitude(VWord magnitude) {
  const Words d;
  const Floats df;
  constexpr uint32_t kSmallestNormal = (128U - kBias) << 23;
  constexpr uint32_t kMagic = (127U - kBias + 23 - kFraction + 1) << 23;
  constexpr uint32_t kRebias = (127U - kBias) << 23;
  const VFloat magic = hn::BitCast(df, hn::Set(d, kMagic));
  const VWord subnormal =
      hn::Sub(hn::BitCast(d, hn::Add(hn::BitCast(df, magnitude), magic)), hn::Set(d, kMagic));
  const VWord normal = RoundAway<23 - kFraction>(hn::Sub(magnitude, hn::Set(d, kRebias)));
  return hn::IfThenElse(hn::Lt(magnitude, hn::Set(d, kSmallestNormal)), subnormal, normal);
}

struct ToFloat16 {
  using Element = uint16_t;
  using Tag = Halves;
  HWY_INLINE hn::Vec<Halves> operator()(VFloat value) const {
    const Words d;
    const VWord bits = hn::BitCast(d, value);
    const VWord magnitude = hn::And(bits, hn::Set(d, 0x7FFFFFFFU));
    const VWord sign = hn::ShiftRight<16>(hn::Xor(bits, magnitude));
    // 65536 and all above are infinity; 65520 to 65536 round there by themselves.
    const VWord clamped = hn::Min(magnitude, hn::Set(d, 0x47800000U));
    VWord code = NarrowMagnitude<10, 15>(clamped);
    const auto nan = hn::Gt(magnitude, hn::Set(d, 0x7F800000U));
    code = hn::IfThenElse(nan, hn::Set(d, 0x7E00U), code);
    return hn::DemoteTo(Halves(), hn::BitCast(Ints(), hn::Or(code, sign)));
  }
};

struct ToE4M3 {
  using Element = uint8_t;
  using Tag = Bytes;
  HWY_INLINE hn::Vec<Bytes> operator()(VFloat value) const {
    const Words d;
    const VWord bits = hn::BitCast(d, value);
    const VWord magnitude = hn::And(bits, hn::Set(d, 0x7FFFFFFFU));
    const VWord sign = hn::ShiftRight<24>(hn::Xor(bits, magnitude));
    VWord code = NarrowMagnitude<3, 7>(hn::Min(magnitude, hn::Set(d, 0x43E00000U)));  // 448
    const auto nan = hn::Gt(magnitude, hn::Set(d, 0x7F800000U));
    code = hn::IfThenElse(nan, hn::Set(d, 0x7FU), code);
    return hn::DemoteTo(Bytes(), hn::BitCast(Ints(), hn::Or(code, sign)));
  }
};

struct ToInt8 {
  using Element = int8_t;
  using Tag = SignedBytes;
  HWY_INLINE hn::Vec<SignedBytes> operator()(VFloat value) const {
    const Floats d;
    const VFloat clamped = hn::Min(hn::Max(value, hn::Set(d, -127.0F)), hn::Set(d, 127.0F));
    return hn::DemoteTo(SignedBytes(), hn::NearestInt(clamped));
  }
};

template <typename Encode>
HWY_INLINE void EncodeElements(Encode encode, const float* values, float scale, int64_t count,
                               std::byte* out) {
  using Element = typename Encode::Element;
  const Floats d;
  const typename Encode::Tag dx;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const VFloat divisor = hn::Set(d, scale);
  auto* elements = reinterpret_cast<Element*>(out);
  const auto convert = [&](VFloat value) HWY_ATTR {
    return encode(sizeof(Element) == 1 ? hn::Div(value, divisor) : value);
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

void EncodeRow(DType dtype, const float* values, float scale, int64_t count, std::byte* out) {
  switch (dtype) {
    case DType::kFloat32:
      return EncodeElements(ToFloat32(), values, scale, count, out);
    case DType::kFloat16:
      return EncodeElements(ToFloat16(), values, scale, count, out);
    case DType::kBFloat16:
      return EncodeElements(ToBFloat16(), values, scale, count, out);
    case DType::kFloat8E4M3:
      return EncodeElements(ToE4M3(), values, scale, count, out);
    case DType::kInt8:
      return EncodeElements(ToInt8(), values, scale, count, out);
    case DType::kFloat8E5M2:
    case DType::kInt32:
      return;
  }
}

#if HWY_TARGET == HWY_SCALAR
bool TurnRow(const TurnRowParams& /*params*/) { return false; }  // one lane has no halves
#else
using Codes = hn::Repartition<uint16_t, Floats>;  // as many bytes as a vector of floats

HWY_INLINE void StoreCodes(hn::Vec<Codes> codes, bool stream, uint16_t* out) {
  if (stream) {
    hn::Stream(codes, Codes(), out);
  } else {
    hn::StoreU(codes, Codes(), out);
  }
}

// Channels i.. and half + i.. turn together, two vectors of each a step.
bool TurnRow(const TurnRowParams& p) {
  const Floats d;
  const Codes dc;
  const Halves dx;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t half = p.rotary_dim / 2;
  if (p.dtype != DType::kBFloat16 || half % (2 * lanes) != 0) return false;
  const auto* in = reinterpret_cast<const uint16_t*>(p.row);
  auto* out = reinterpret_cast<uint16_t*>(p.out);
  const bool stream = p.stream && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const auto turn = [&](int64_t j, VWord& turned_x, VWord& turned_y) HWY_ATTR {
    const VFloat x = FromBFloat16()(hn::LoadU(dx, in + j));
    const VFloat y = FromBFloat16()(hn::LoadU(dx, in + half + j));
    const VFloat c = hn::LoadU(d, p.cos + j);
    const VFloat s = hn::LoadU(d, p.sin + j);
    turned_x = ToBFloat16::Upper(hn::Add(hn::Mul(x, c), hn::Mul(y, s)));
    turned_y = ToBFloat16::Upper(hn::Sub(hn::Mul(y, c), hn::Mul(x, s)));
  };
  for (int64_t i = 0; i < half; i += 2 * lanes) {
    VWord x0, x1, y0, y1;
    turn(i, x0, y0);
    turn(i + lanes, x1, y1);
    StoreCodes(hn::ConcatOdd(dc, hn::BitCast(dc, x1), hn::BitCast(dc, x0)), stream, out + i);
    StoreCodes(hn::ConcatOdd(dc, hn::BitCast(dc, y1), hn::BitCast(dc, y0)), stream, out + half + i);
  }
  std::memcpy(out + p.rotary_dim, in + p.rotary_dim,
              static_cast<size_t>(p.count - p.rotary_dim) * sizeof(uint16_t));
  return true;
}
#endif

float LargestMagnitude(const float* values, int64_t count) {
  const Floats d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  VFloat largest = hn::Zero(d);
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) {
    largest = hn::Max(largest, hn::Abs(hn::LoadU(d, values + c)));
  }
  float result = hn::GetLane(hn::MaxOfLanes(d, largest));
  for (; c < count; ++c) result = std::max(result, values[c] < 0 ? -values[c] : values[c]);
  return result;
}

// True if (element & mask) reaches `special` for one of them; both as unsigned integers.
template <typename T>
HWY_INLINE bool AnyReaches(const T* elements, int64_t count, T mask, T special) {
  const hn::ScalableTag<T> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto largest = hn::Zero(d);
  const auto bits = hn::Set(d, mask);
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) {
    largest = hn::Max(largest, hn::And(hn::LoadU(d, elements + c), bits));
  }
  HWY_ALIGN T lane_values[hn::MaxLanes(d)];
  hn::Store(largest, d, lane_values);
  T result = 0;
  for (int64_t i = 0; i < lanes; ++i) result = std::max(result, lane_values[i]);
  for (; c < count; ++c) result = std::max(result, static_cast<T>(elements[c] & mask));
  return result >= special;
}

bool HasNonFinite(DType dtype, const std::byte* elements, int64_t count) {
  const auto* words = reinterpret_cast<const uint32_t*>(elements);
  const auto* halves = reinterpret_cast<const uint16_t*>(elements);
  const auto* bytes = reinterpret_cast<const uint8_t*>(elements);
  switch (dtype) {
    case DType::kFloat32:
      return AnyReaches<uint32_t>(words, count, 0x7FFFFFFF, 0x7F800000);
    case DType::kFloat16:
      return AnyReaches<uint16_t>(halves, count, 0x7FFF, 0x7C00);
    case DType::kBFloat16:
      return AnyReaches<uint16_t>(halves, count, 0x7FFF, 0x7F80);
    case DType::kFloat8E4M3:
      return AnyReaches<uint8_t>(bytes, count, 0x7F, 0x7F);
    case DType::kFloat8E5M2:
      return AnyReaches<uint8_t>(bytes, count, 0x7F, 0x7C);
    case DType::kInt8:
    case DType::kInt32:
      return false;
  }
  return false;
}

const char* VectorTargetName() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace dynsplit::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dynsplit::cpu {
HWY_EXPORT(DecodeRow);
HWY_EXPORT(DecodeTile);
HWY_EXPORT(EncodeRow);
HWY_EXPORT(TurnRow);
HWY_EXPORT(LargestMagnitude);
HWY_EXPORT(HasNonFinite);
HWY_EXPORT(VectorTargetName);

void DecodeRow(DType dtype, const std::byte* row, float scale, int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(DecodeRow)(dtype, row, scale, count, out);
}

void DecodeTile(const TensorView& view, int32_t head, int64_t begin, int64_t end, int64_t stride,
                float* out) {
  HWY_DYNAMIC_DISPATCH(DecodeTile)(view, head, begin, end, stride, out);
}

void EncodeRow(DType dtype, const float* values, float scale, int64_t count, std::byte* out) {
  HWY_DYNAMIC_DISPATCH(EncodeRow)(dtype, values, scale, count, out);
}

bool TurnRow(const TurnRowParams& params) { return HWY_DYNAMIC_DISPATCH(TurnRow)(params); }

float LargestMagnitude(const float* values, int64_t count) {
  return HWY_DYNAMIC_DISPATCH(LargestMagnitude)(values, count);
}

bool HasNonFinite(DType dtype, const std::byte* elements, int64_t count) {
  return HWY_DYNAMIC_DISPATCH(HasNonFinite)(dtype, elements, count);
}

const char* VectorTargetName() { return HWY_DYNAMIC_DISPATCH(VectorTargetName)(); }
}  // namespace dynsplit::cpu
#endif  // HWY_ONCE

// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/numeric.h"

#include <algorithm>
#include <bit>

namespace dynsplit {
namespace {

constexpr uint32_t kMagnitudeMask = 0x7fffffff;
constexpr uint32_t kInfinityBits = 0x7f800000;
constexpr int kFloatMantissaBits = 23;
constexpr int kFloatBias = 127;

bool IsNan(uint32_t bits) { return (bits & kMagnitudeMask) > kInfinityBits; }

// Drops the low `shift` bits, rounding to nearest, ties to even. 1 <= shift <= 24.
constexpr uint32_t ShiftRoundEven(uint32_t value, int shift) {
  const uint32_t odd = (value >> shift) & 1;
  return (value + (1u << (shift - 1)) - 1 + odd) >> shift;
}

// Code of a magnitude in a format of the given field widths. A magnitude beyond the format's range
// gives a code beyond its largest, so that the caller chooses between saturation and infinity.
template <int kExponentBits, int kMantissaBits>
uint32_t RoundMagnitude(uint32_t magnitude_bits) {
  constexpr int kRebias = kFloatBias - ((1 << (kExponentBits - 1)) - 1);
  constexpr int kShift = kFloatMantissaBits - kMantissaBits;
  const int exponent = static_cast<int>(magnitude_bits >> kFloatMantissaBits) - kRebias;
  if (exponent >= 1) {
    constexpr uint32_t kRebiasBits = static_cast<uint32_t>(kRebias) << kFloatMantissaBits;
    return ShiftRoundEven(magnitude_bits - kRebiasBits, kShift);
  }
  // Subnormal in the target. Below half of its smallest step everything is zero, which covers
  // subnormal floats as well.
  const int shift = kShift + 1 - exponent;
  if (shift > kFloatMantissaBits + 1) return 0;
  constexpr uint32_t kImplicitBit = 1u << kFloatMantissaBits;
  return ShiftRoundEven((magnitude_bits & (kImplicitBit - 1)) | kImplicitBit, shift);
}

// Value of a finite magnitude code.
template <int kExponentBits, int kMantissaBits>
float DecodeMagnitude(uint32_t code) {
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  if (code >> kMantissaBits == 0) {
    constexpr uint32_t kStepExponent =
        static_cast<uint32_t>(kFloatBias + 1 - kBias - kMantissaBits);
    const auto step = std::bit_cast<float>(kStepExponent << kFloatMantissaBits);
    return static_cast<float>(code) * step;
  }
  constexpr uint32_t kRebiasBits = static_cast<uint32_t>(kFloatBias - kBias) << kFloatMantissaBits;
  return std::bit_cast<float>((code << (kFloatMantissaBits - kMantissaBits)) + kRebiasBits);
}

float WithSign(float magnitude, bool negative) { return negative ? -magnitude : magnitude; }

float NanWithSign(bool negative) {
  return std::bit_cast<float>(negative ? 0xffc00000u : 0x7fc00000u);
}

float InfinityWithSign(bool negative) {
  return std::bit_cast<float>(kInfinityBits | (negative ? 0x80000000u : 0u));
}

}  // namespace

float BFloat16ToFloat(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

uint16_t FloatToBFloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  // Rounding could carry a NaN's payload away: keep its upper bits and make it quiet.
  if (IsNan(bits)) return static_cast<uint16_t>((bits >> 16) | 0x0040);
  return static_cast<uint16_t>(ShiftRoundEven(bits & kMagnitudeMask, 16) | (bits >> 31 << 15));
}

float Float16ToFloat(uint16_t bits) {
  const bool negative = (bits & 0x8000) != 0;
  const uint32_t magnitude = bits & 0x7fff;
  if (magnitude > 0x7c00) return NanWithSign(negative);
  if (magnitude == 0x7c00) return InfinityWithSign(negative);
  return WithSign(DecodeMagnitude<5, 10>(magnitude), negative);
}

uint16_t FloatToFloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 31 << 15;
  if (IsNan(bits)) return static_cast<uint16_t>(sign | 0x7e00);
  const uint32_t magnitude = RoundMagnitude<5, 10>(bits & kMagnitudeMask);
  return static_cast<uint16_t>(sign | std::min<uint32_t>(magnitude, 0x7c00));
}

float Float8E4M3ToFloat(uint8_t code) {
  const bool negative = (code & 0x80) != 0;
  const uint32_t magnitude = code & 0x7f;
  if (magnitude == 0x7f) return NanWithSign(negative);
  return WithSign(DecodeMagnitude<4, 3>(magnitude), negative);
}

uint8_t FloatToFloat8E4M3(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 31 << 7;
  if (IsNan(bits)) return static_cast<uint8_t>(sign | 0x7f);
  const uint32_t magnitude = RoundMagnitude<4, 3>(bits & kMagnitudeMask);
  return static_cast<uint8_t>(sign | std::min<uint32_t>(magnitude, 0x7e));
}

float Float8E5M2ToFloat(uint8_t code) {
  const bool negative = (code & 0x80) != 0;
  const uint32_t magnitude = code & 0x7f;
  if (magnitude > 0x7c) return NanWithSign(negative);
  if (magnitude == 0x7c) return InfinityWithSign(negative);
  return WithSign(DecodeMagnitude<5, 2>(magnitude), negative);
}

uint8_t FloatToFloat8E5M2(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 31 << 7;
  if (IsNan(bits)) return static_cast<uint8_t>(sign | 0x7f);
  const uint32_t magnitude = RoundMagnitude<5, 2>(bits & kMagnitudeMask);
  return static_cast<uint8_t>(sign | std::min<uint32_t>(magnitude, 0x7b));
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/numeric.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>

namespace dynsplit {
namespace {

// One storage format, by its conversions and its extremes.
struct Format {
  std::string name;
  uint32_t num_codes;
  uint32_t sign_bit;
  uint32_t largest_finite;  // magnitude code
  uint32_t beyond_largest;  // code that values past the range get
  float largest_value;
  float smallest_value;  // subnormal
  float (*decode)(uint32_t);
  uint32_t (*encode)(float);
};

const Format kFormats[] = {
    {"bf16", 1u << 16, 0x8000, 0x7f7f, 0x7f80, 3.3895313892515355e38f, 9.183549615799121e-41f,
     [](uint32_t code) { return BFloat16ToFloat(static_cast<uint16_t>(code)); },
     [](float value) -> uint32_t { return FloatToBFloat16(value); }},
    {"fp16", 1u << 16, 0x8000, 0x7bff, 0x7c00, 65504.0f, 5.960464477539063e-08f,
     [](uint32_t code) { return Float16ToFloat(static_cast<uint16_t>(code)); },
     [](float value) -> uint32_t { return FloatToFloat16(value); }},
    {"fp8_e4m3", 1u << 8, 0x80, 0x7e, 0x7e, 448.0f, 0.001953125f,
     [](uint32_t code) { return Float8E4M3ToFloat(static_cast<uint8_t>(code)); },
     [](float value) -> uint32_t { return FloatToFloat8E4M3(value); }},
    {"fp8_e5m2", 1u << 8, 0x80, 0x7b, 0x7b, 57344.0f, 1.52587890625e-05f,
     [](uint32_t code) { return Float8E5M2ToFloat(static_cast<uint8_t>(code)); },
     [](float value) -> uint32_t { return FloatToFloat8E5M2(value); }},
};

class NumericTest : public testing::TestWithParam<Format> {};

TEST_P(NumericTest, EveryCodeSurvivesTheRoundTrip) {
  const Format& format = GetParam();
  int num_nan = 0;
  for (uint32_t code = 0; code < format.num_codes; ++code) {
    const float value = format.decode(code);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(format.decode(format.encode(value)))) << code;
      ++num_nan;
    } else if (std::isinf(value)) {
      EXPECT_EQ(format.encode(value), (code & format.sign_bit) | format.beyond_largest) << code;
    } else {
      EXPECT_EQ(format.encode(value), code) << value;
      EXPECT_EQ(std::signbit(value), (code & format.sign_bit) != 0) << code;
    }
  }
  EXPECT_GE(num_nan, 2);
}

TEST_P(NumericTest, CodesAscendWithTheirValues) {
  const Format& format = GetParam();
  EXPECT_EQ(format.decode(0), 0.0f);
  EXPECT_EQ(format.decode(1), format.smallest_value);
  EXPECT_EQ(format.decode(format.largest_finite), format.largest_value);
  for (uint32_t code = 0; code < format.largest_finite; ++code) {
    ASSERT_LT(format.decode(code), format.decode(code + 1)) << code;
  }
}

TEST_P(NumericTest, MidpointsGoToTheEvenNeighbourAndTheirNeighboursToTheNearest) {
  const Format& format = GetParam();
  const float infinity = std::numeric_limits<float>::infinity();
  for (uint32_t code = 0; code < format.largest_finite; ++code) {
    const double low = format.decode(code);
    const double high = format.decode(code + 1);
    const auto middle = static_cast<float>((low + high) / 2);
    ASSERT_EQ(static_cast<double>(middle), (low + high) / 2) << "not exact at " << code;
    const uint32_t even = code % 2 == 0 ? code : code + 1;
    ASSERT_EQ(format.encode(middle), even) << middle;
    ASSERT_EQ(format.encode(-middle), even | format.sign_bit) << middle;
    ASSERT_EQ(format.encode(std::nextafter(middle, 0.0f)), code) << middle;
    ASSERT_EQ(format.encode(std::nextafter(middle, infinity)), code + 1) << middle;
  }
}

TEST_P(NumericTest, ValuesPastTheRangeKeepTheirSign) {
  const Format& format = GetParam();
  const float infinity = std::numeric_limits<float>::infinity();
  const float largest = std::numeric_limits<float>::max();
  for (const float value : {infinity, largest}) {
    EXPECT_EQ(format.encode(value), format.beyond_largest) << value;
    EXPECT_EQ(format.encode(-value), format.beyond_largest | format.sign_bit) << value;
  }
  EXPECT_EQ(format.encode(std::numeric_limits<float>::denorm_min()), 0u);
  EXPECT_EQ(format.encode(-0.0f), format.sign_bit);
}

TEST_P(NumericTest, RandomFloatsGoToTheNearestCode) {
  const Format& format = GetParam();
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> exponent(-30, 18);
  for (int i = 0; i < 2000; ++i) {
    const auto value = static_cast<float>(std::exp2(exponent(random)));
    if (value > format.largest_value) continue;
    // Nearest by exhaustion of the two neighbours that enclose the value.
    uint32_t low = 0;
    uint32_t high = format.largest_finite;
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      (format.decode(middle) <= value ? low : high) = middle;
    }
    const double below = static_cast<double>(value) - format.decode(low);
    const double above = static_cast<double>(format.decode(high)) - value;
    if (below == above) continue;  // the midpoint test covers ties
    EXPECT_EQ(format.encode(value), below < above ? low : high) << value;
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, NumericTest, testing::ValuesIn(kFormats),
                         [](const auto& format) { return format.param.name; });

TEST(NumericTest, NanOfAnyPayloadStaysNan) {
  for (const uint32_t bits : {0x7f800001u, 0x7f80ffffu, 0x7fffffffu, 0xff800001u, 0xffc00000u}) {
    float value = 0;
    static_assert(sizeof(value) == sizeof(bits));
    std::memcpy(&value, &bits, sizeof(value));
    EXPECT_TRUE(std::isnan(BFloat16ToFloat(FloatToBFloat16(value)))) << bits;
    EXPECT_TRUE(std::isnan(Float16ToFloat(FloatToFloat16(value)))) << bits;
    EXPECT_TRUE(std::isnan(Float8E4M3ToFloat(FloatToFloat8E4M3(value)))) << bits;
    EXPECT_TRUE(std::isnan(Float8E5M2ToFloat(FloatToFloat8E5M2(value)))) << bits;
  }
}

}  // namespace
}  // namespace dynsplit

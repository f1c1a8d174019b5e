// SPDX-License-Identifier: Apache-2.0
#include "tests/oracle/numbers.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <vector>

namespace dynsplit::oracle {
namespace {

// Exact, and far cheaper than the library's: most of the suite's time goes into making tensors.
constexpr int kDoubleBias = 1023;
constexpr int kDoubleFractionBits = 52;

constexpr double PowerOfTwo(int exponent) {  // of a normal double
  return std::bit_cast<double>(static_cast<uint64_t>(exponent + kDoubleBias)
                               << kDoubleFractionBits);
}

int ExponentOf(double magnitude) {  // normal and positive, as all floats but 0 are
  return static_cast<int>(std::bit_cast<uint64_t>(magnitude) >> kDoubleFractionBits) - kDoubleBias;
}

// A binary format of fewer than 32 bits with gradual underflow.
struct Format {
  int exponent_bits;
  int fraction_bits;
  bool has_infinity;  // IEEE specials; otherwise only the all-ones code is NaN
  bool saturates;

  constexpr int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  constexpr int max_exponent_code() const { return (1 << exponent_bits) - 1; }
  constexpr double largest() const {
    const int exponent = (has_infinity ? max_exponent_code() - 1 : max_exponent_code()) - bias();
    const int steps = (1 << fraction_bits) - (has_infinity ? 1 : 2);
    return (1 + steps * PowerOfTwo(-fraction_bits)) * PowerOfTwo(exponent);
  }
};

constexpr Format kFloat16Format{5, 10, true, false};
constexpr Format kBFloat16Format{8, 7, true, false};
constexpr Format kE4M3Format{4, 3, false, true};
constexpr Format kE5M2Format{5, 2, true, true};

double Decode(const Format& format, uint32_t bits) {
  const uint32_t fraction = bits & ((1U << format.fraction_bits) - 1);
  const int exponent = static_cast<int>(bits >> format.fraction_bits) & format.max_exponent_code();
  const bool negative = (bits >> (format.fraction_bits + format.exponent_bits)) & 1U;
  double magnitude = 0;
  if (format.has_infinity && exponent == format.max_exponent_code()) {
    magnitude = fraction == 0 ? std::numeric_limits<double>::infinity()
                              : std::numeric_limits<double>::quiet_NaN();
  } else if (!format.has_infinity && exponent == format.max_exponent_code() &&
             fraction == (1U << format.fraction_bits) - 1) {
    magnitude = std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, 1 - format.bias() - format.fraction_bits);
  } else {
    magnitude = std::ldexp((1U << format.fraction_bits) + fraction,
                           exponent - format.bias() - format.fraction_bits);
  }
  return negative ? -magnitude : magnitude;
}

// Instantiated by format: its numbers are constants in the hottest code of the suite.
template <const Format& format>
uint32_t Encode(float value) {
  const uint32_t sign =
      std::signbit(value) ? 1U << (format.exponent_bits + format.fraction_bits) : 0U;
  const auto infinity = static_cast<uint32_t>(format.max_exponent_code()) << format.fraction_bits;
  if (std::isnan(value)) {
    return sign | infinity | ((1U << format.fraction_bits) - 1);
  }
  double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  if (!std::isinf(magnitude)) {
    const int exponent = std::max(ExponentOf(magnitude), 1 - format.bias());
    const double quantum = PowerOfTwo(exponent - format.fraction_bits);
    magnitude = std::nearbyint(magnitude / quantum) * quantum;  // division by 2^n: exact
  }
  if (magnitude > format.largest()) {
    if (!format.saturates) return sign | infinity;
    magnitude = format.largest();
  }
  if (magnitude == 0) return sign;
  const int exponent = std::max(ExponentOf(magnitude), 1 - format.bias());
  const auto steps = static_cast<uint32_t>(magnitude * PowerOfTwo(format.fraction_bits - exponent));
  const uint32_t hidden = 1U << format.fraction_bits;
  if (steps < hidden) return sign | steps;  // subnormal
  const auto code = static_cast<uint32_t>(exponent + format.bias());
  return sign | (code << format.fraction_bits) | (steps - hidden);
}

// Value of every code.
template <const Format& format>
const std::vector<float>& Decoded() {
  static const auto& values = *[] {
    const uint32_t num_codes = 1U << (1 + format.exponent_bits + format.fraction_bits);
    auto* const decoded = new std::vector<float>;
    decoded->reserve(num_codes);
    for (uint32_t code = 0; code < num_codes; ++code) {
      decoded->push_back(static_cast<float>(Decode(format, code)));
    }
    return decoded;
  }();
  return values;
}

template <typename T>
T Load(const std::byte* element) {
  T value;
  std::memcpy(&value, element, sizeof(T));
  return value;
}

template <typename T>
void Store(std::byte* element, T value) {
  std::memcpy(element, &value, sizeof(T));
}

}  // namespace

float DecodeElement(DType dtype, const std::byte* element) {
  switch (dtype) {
    case DType::kFloat32:
      return Load<float>(element);
    case DType::kFloat16:
      return Decoded<kFloat16Format>()[Load<uint16_t>(element)];
    case DType::kBFloat16:
      return Decoded<kBFloat16Format>()[Load<uint16_t>(element)];
    case DType::kFloat8E4M3:
      return Decoded<kE4M3Format>()[Load<uint8_t>(element)];
    case DType::kFloat8E5M2:
      return Decoded<kE5M2Format>()[Load<uint8_t>(element)];
    case DType::kInt8:
      return static_cast<float>(Load<int8_t>(element));
    case DType::kInt32:
      return static_cast<float>(Load<int32_t>(element));
  }
  return 0;
}

void EncodeElement(DType dtype, float value, std::byte* element) {
  switch (dtype) {
    case DType::kFloat32:
      return Store(element, value);
    case DType::kFloat16:
      return Store(element, static_cast<uint16_t>(Encode<kFloat16Format>(value)));
    case DType::kBFloat16:
      return Store(element, static_cast<uint16_t>(Encode<kBFloat16Format>(value)));
    case DType::kFloat8E4M3:
      return Store(element, static_cast<uint8_t>(Encode<kE4M3Format>(value)));
    case DType::kFloat8E5M2:
      return Store(element, static_cast<uint8_t>(Encode<kE5M2Format>(value)));
    case DType::kInt8:
      return Store(element,
                   static_cast<int8_t>(std::clamp(std::nearbyint(value), -127.0F, 127.0F)));
    case DType::kInt32:
      return Store(element, static_cast<int32_t>(std::nearbyint(value)));
  }
}

namespace {

struct Number {
  double value;
  std::vector<std::byte> element;
};

// All numbers of a type but -0, ascending.
std::vector<Number> AllNumbers(DType dtype) {
  const auto size = static_cast<size_t>(DTypeBytes(dtype));
  std::vector<Number> numbers;
  for (uint32_t code = 0; code < 1U << (8 * size); ++code) {
    std::vector<std::byte> element(size);
    std::memcpy(element.data(), &code, size);
    const double value = DecodeElement(dtype, element.data());
    if (std::isnan(value) || (value == 0 && std::signbit(value))) continue;
    numbers.push_back({value, element});
  }
  std::sort(numbers.begin(), numbers.end(),
            [](const Number& a, const Number& b) { return a.value < b.value; });
  return numbers;
}

const std::vector<Number>& NumbersOf(DType dtype) {
  static auto& tables = *new std::map<DType, std::vector<Number>>;
  std::vector<Number>& table = tables[dtype];
  if (table.empty()) table = AllNumbers(dtype);
  return table;
}

}  // namespace

void EncodeBound(DType dtype, double value, bool up, std::byte* element) {
  const std::vector<Number>& numbers = NumbersOf(dtype);
  auto bound = std::lower_bound(numbers.begin(), numbers.end(), value,
                                [](const Number& n, double x) { return n.value < x; });
  if (!up && bound->value > value) --bound;
  std::copy(bound->element.begin(), bound->element.end(), element);
}

const std::byte* ElementAddress(const TensorView& view, int64_t token, int32_t head, int32_t c) {
  int64_t row = token * view.token_stride_bytes;
  if (view.block_table != nullptr) {
    row = view.block_table[token / view.page_size] * view.page_stride_bytes +
          (token % view.page_size) * view.token_stride_bytes;
  }
  return view.data + row + head * view.head_stride_bytes + c * DTypeBytes(view.dtype);
}

float ElementScale(const TensorView& view, int64_t token, int32_t head) {
  if (view.scales == nullptr) return 1;
  return view.scale_granularity == ScaleGranularity::kHead
             ? view.scales[head]
             : view.scales[token * view.num_heads + head];
}

float ElementValue(const TensorView& view, int64_t token, int32_t head, int32_t c) {
  const float code = DecodeElement(view.dtype, ElementAddress(view, token, head, c));
  return view.scales == nullptr ? code : code * ElementScale(view, token, head);
}

}  // namespace dynsplit::oracle

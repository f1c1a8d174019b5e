// SPDX-License-Identifier: Apache-2.0
#include "client/cli/attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace dynsplit::cli {
namespace {

float FromFloat16(uint16_t bits) {
  const auto sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const int exponent = bits >> 10 & 0x1F;
  const auto fraction = static_cast<uint32_t>(bits & 0x3FF);
  if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000 | fraction << 13);
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(fraction | 0x400), exponent - 25);
  return sign == 0 ? magnitude : -magnitude;
}

// `count` elements of a capture's type from `first` on.
std::vector<float> Decode(v1::DType dtype, absl::Span<const std::byte> bytes, size_t first,
                          size_t count) {
  std::vector<float> values(count);
  if (dtype == v1::DTYPE_FLOAT32) {
    std::memcpy(values.data(), bytes.data() + first * 4, count * 4);
    return values;
  }
  for (size_t i = 0; i < count; ++i) {
    uint16_t bits = 0;
    std::memcpy(&bits, bytes.data() + (first + i) * 2, 2);
    values[i] = dtype == v1::DTYPE_FLOAT16
                    ? FromFloat16(bits)
                    : std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
  return values;
}

}  // namespace

std::vector<double> AttentionMass(const Capture& capture, const Capture::Layer& layer,
                                  absl::Span<const std::byte> query, int64_t num_tokens,
                                  absl::Span<const int32_t> chosen, int32_t groups,
                                  double softmax_scale) {
  const auto dim = static_cast<size_t>(capture.shape.head_dim());
  const auto kv_heads = static_cast<size_t>(capture.shape.num_kv_heads());
  const auto query_heads = static_cast<size_t>(capture.shape.num_query_heads());
  const auto tokens = static_cast<size_t>(num_tokens);
  const double scale = softmax_scale > 0 ? softmax_scale : 1 / std::sqrt(static_cast<double>(dim));
  const std::vector<float> q = Decode(capture.dtype, query, 0, query_heads * dim);
  const std::vector<float> keys = Decode(capture.dtype, layer.key, 0, tokens * kv_heads * dim);
  const size_t set_size = chosen.size() / static_cast<size_t>(groups);
  std::vector<double> masses(query_heads);
  std::vector<double> weights(tokens);
  for (size_t head = 0; head < query_heads; ++head) {
    const size_t kv_head = head / (query_heads / kv_heads);
    for (size_t t = 0; t < tokens; ++t) {
      const float* key = &keys[(t * kv_heads + kv_head) * dim];
      double dot = 0;
      for (size_t c = 0; c < dim; ++c) dot += double{q[head * dim + c]} * double{key[c]};
      weights[t] = scale * dot;
    }
    const double largest = *std::max_element(weights.begin(), weights.end());
    double total = 0;
    for (double& weight : weights) total += weight = std::exp(weight - largest);
    double held = 0;
    for (const int32_t token : chosen.subspan(groups == 1 ? 0 : kv_head * set_size, set_size)) {
      held += weights[static_cast<size_t>(token)];
    }
    masses[head] = held / total;
  }
  return masses;
}

}  // namespace dynsplit::cli

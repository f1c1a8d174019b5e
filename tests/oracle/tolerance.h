// SPDX-License-Identifier: Apache-2.0
//
// Error bounds of fp32 accumulation (Higham, Accuracy and Stability of Numerical Algorithms, ch.
// 3): a sum of n products, in any order, is off by at most n * u * sum |a_i b_i| to first order. u
// here is 2^-23, one unit in the last place, so that accumulators that truncate are covered too.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "server/pipeline/types.h"
#include "tests/oracle/numbers.h"

namespace dynsplit::oracle {

inline constexpr double kUnit = 0x1p-23;

// Largest Euclidean norm of a row.
inline double LargestNorm(const TensorView& view) {
  double largest = 0;
  for (int64_t t = 0; t < view.num_tokens; ++t) {
    for (int32_t h = 0; h < view.num_heads; ++h) {
      double sum = 0;
      for (int32_t c = 0; c < view.head_dim; ++c) {
        const double value = ElementValue(view, t, h, c);
        sum += value * value;
      }
      largest = std::max(largest, std::sqrt(sum));
    }
  }
  return largest;
}

// Relative error of a softmax weight over `num_terms` logits scale * q.k, |q.k| <= dot_bound of
// `head_dim` products. The logit is off by d = scale * dot_bound * u * (head_dim + 8), where the 8
// covers scaling, the subtraction of the maximum or of a supplied fp32 log-sum-exp, and the log of
// the sum; numerator and denominator each move by a factor e^d; the denominator's sum and a
// following sum of weights add num_terms * u; exp itself 16 u.
inline double SoftmaxError(double scale, double dot_bound, int32_t head_dim, int64_t num_terms) {
  const double log_terms = std::log(static_cast<double>(num_terms) + 1);
  const double logit = kUnit * (scale * dot_bound * (head_dim + 8) + 4 * log_terms);
  return std::expm1(2 * logit) + static_cast<double>(num_terms + 16) * kUnit;
}

// |actual - expected| <= relative * |expected| + absolute, and as many of them. `actual` and
// `expected` are any containers of numbers.
template <typename A, typename E>
void ExpectNear(const std::vector<A>& actual, const std::vector<E>& expected, double relative,
                double absolute, std::string_view what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = std::fabs(double{actual[i]} - double{expected[i]});
    const double bound = relative * std::fabs(double{expected[i]}) + absolute;
    ASSERT_TRUE(error <= bound) << what << "[" << i << "]: " << actual[i] << ", expected "
                                << expected[i] << " within " << bound;
  }
}

// Equal as numbers (-0 equals 0), and as many of them.
template <typename A, typename E>
void ExpectEqual(const std::vector<A>& actual, const std::vector<E>& expected,
                 std::string_view what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(actual[i], expected[i]) << what << "[" << i << "]";
  }
}

// Equal bit for bit, and as many of them.
template <typename T>
void ExpectSameBits(const std::vector<T>& actual, const std::vector<T>& expected,
                    std::string_view what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  const auto* bytes = reinterpret_cast<const std::byte*>(actual.data());
  const auto* want = reinterpret_cast<const std::byte*>(expected.data());
  const auto* end = bytes + actual.size() * sizeof(T);
  const auto* different = std::mismatch(bytes, end, want).first;
  ASSERT_TRUE(different == end) << what << " differ first at "
                                << (different - bytes) / static_cast<int64_t>(sizeof(T));
}

}  // namespace dynsplit::oracle

// SPDX-License-Identifier: Apache-2.0
//
// What must hold whatever the implementation: bounds, identities and limits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "server/cpu/cpu_backend.h"
#include "tests/oracle/device_session.h"
#include "tests/oracle/numbers.h"
#include "tests/oracle/random_tensors.h"

namespace dynsplit {
namespace {

using oracle::DeviceSession;
using oracle::HostTensor;
using oracle::ParityShape;

Backend& TheBackend() {
  static const auto& backend =
      *new std::unique_ptr<Backend>(CreateCpuBackend({.num_threads = 2}).value());
  return *backend;
}

double Dot(const TensorView& a, int64_t row_a, int32_t head_a, const TensorView& b, int64_t row_b,
           int32_t head_b) {
  double sum = 0;
  for (int32_t c = 0; c < a.head_dim; ++c) {
    sum += double{oracle::ElementValue(a, row_a, head_a, c)} *
           oracle::ElementValue(b, row_b, head_b, c);
  }
  return sum;
}

struct MinMax {
  std::vector<float> min, max;
};

MinMax Summarize(const HostTensor& keys, const std::vector<int32_t>& starts) {
  DeviceSession session(TheBackend());
  const TensorView view = session.Upload(keys);
  const auto num_blocks = static_cast<int64_t>(starts.size()) - 1;
  const int64_t count = num_blocks * view.num_heads * view.head_dim;
  auto min = session.Poisoned<float>(count);
  auto max = session.Poisoned<float>(count);
  EXPECT_TRUE(TheBackend()
                  .SummarizeBlocks(
                      {.keys = view,
                       .block_starts = session.Upload(starts),
                       .num_blocks = num_blocks,
                       .summaries = DenseSummaries(DType::kFloat32, view.num_heads, view.head_dim,
                                                   min.data(), max.data(), nullptr)},
                      session.stream())
                  .ok());
  return {session.Read(std::move(min)), session.Read(std::move(max))};
}

double Bound(const TensorView& queries, int64_t i, int32_t a, const MinMax& summary,
             int64_t first) {
  double sum = 0;
  for (int32_t c = 0; c < queries.head_dim; ++c) {
    const double q = oracle::ElementValue(queries, i, a, c);
    const auto index = static_cast<size_t>(first + c);
    sum += std::max(q * summary.max[index], q * summary.min[index]);
  }
  return sum;
}

TEST(BlockBound, IsAtLeastEveryLogitOfTheBlock) {
  const ParityShape shape{.name = "bound",
                          .num_tokens = 400,
                          .num_query_heads = 6,
                          .num_kv_heads = 2,
                          .head_dim = 64,
                          .num_queries = 5};
  const HostTensor keys = HostTensor::Cache(shape, 1);
  const HostTensor queries = HostTensor::Queries(shape, 2);
  const std::vector<int32_t> starts = oracle::RandomBlockStarts(shape, 3);
  const MinMax summary = Summarize(keys, starts);
  for (int32_t a = 0; a < 6; ++a) {
    for (size_t j = 0; j + 1 < starts.size(); ++j) {
      const int64_t first = (static_cast<int64_t>(j) * 2 + a / 3) * shape.head_dim;
      const double bound = Bound(queries.view(), 0, a, summary, first);
      for (int32_t t = starts[j]; t < starts[j + 1]; ++t) {
        ASSERT_GE(bound * (1 + 1e-12) + 1e-12, Dot(queries.view(), 0, a, keys.view(), t, a / 3));
      }
    }
  }
}

TEST(BlockBound, OfIdenticalKeysIsTheLogit) {
  // With one key a block, the softmax over blocks weighted by length is attention itself: a block
  // of n identical keys gets per token what each of them gets in ScoreWindow.
  ParityShape shape{.name = "identical",
                    .num_tokens = 96,
                    .num_query_heads = 2,
                    .num_kv_heads = 1,
                    .head_dim = 64,
                    .num_queries = 1,
                    .dtype = DType::kFloat32,
                    .query_dtype = DType::kFloat32};
  const std::vector<int32_t> starts = {0, 10, 14, 40, 41, 80, 96};
  HostTensor keys = HostTensor::Cache(shape, 4);
  const HostTensor queries = HostTensor::Queries(shape, 5);
  for (size_t j = 0; j + 1 < starts.size(); ++j) {
    for (int32_t t = starts[j] + 1; t < starts[j + 1]; ++t) {
      for (int32_t c = 0; c < shape.head_dim; ++c) {
        keys.Set(t, 0, c, oracle::ElementValue(keys.view(), starts[j], 0, c));
      }
    }
  }
  const MinMax summary = Summarize(keys, starts);
  for (size_t j = 0; j + 1 < starts.size(); ++j) {
    EXPECT_EQ(Bound(queries.view(), 0, 0, summary, static_cast<int64_t>(j) * shape.head_dim),
              Dot(queries.view(), 0, 0, keys.view(), starts[j], 0));
  }
  DeviceSession session(TheBackend());
  auto block_scores = session.Poisoned<float>(6);
  auto token_scores = session.Poisoned<float>(96);
  const TensorView device_queries = session.Upload(queries);
  const ScoreBlocksItem item{
      .queries = device_queries,
      .summaries = DenseSummaries(DType::kFloat32, 1, shape.head_dim, session.Upload(summary.min),
                                  session.Upload(summary.max), nullptr),
      .block_starts = session.Upload(starts),
      .num_blocks = 6,
      .block_scores = block_scores.data()};
  ASSERT_TRUE(TheBackend()
                  .ScoreBlocks({.items = {&item, 1}, .num_kv_heads = 1, .softmax_scale = 0.125F},
                               session.stream())
                  .ok());
  ASSERT_TRUE(TheBackend()
                  .ScoreWindow({.queries = device_queries,
                                .keys = session.Upload(keys),
                                .softmax_scale = 0.125F,
                                .scores = token_scores.data()},
                               session.stream())
                  .ok());
  const auto blocks = session.Read(std::move(block_scores));
  const auto tokens = session.Read(std::move(token_scores));
  // ScoreBlocks sums over the group of two, ScoreWindow takes its mean.
  for (size_t j = 0; j + 1 < starts.size(); ++j) {
    EXPECT_NEAR(blocks[j], 2 * tokens[static_cast<size_t>(starts[j])], 1e-5 * blocks[j]);
  }
}

TEST(MeasureSpans, MassesAddUpToOne) {
  const ParityShape shape{.name = "spans",
                          .num_tokens = 3000,
                          .num_query_heads = 8,
                          .num_kv_heads = 2,
                          .head_dim = 64,
                          .num_queries = 70};
  const HostTensor keys = HostTensor::Cache(shape, 6);
  const HostTensor queries = HostTensor::Queries(shape, 7);
  std::vector<int32_t> positions, lo, hi;
  for (int32_t n = 0; n < shape.num_queries; ++n) {
    positions.push_back(n * 42);
    hi.push_back(std::max(0, n * 42 - n % 5));
    lo.push_back(std::max(0, hi.back() - 128));
  }
  DeviceSession session(TheBackend());
  auto masses = session.Poisoned<float>(3 * shape.num_queries);
  ASSERT_TRUE(TheBackend()
                  .MeasureSpans({.queries = session.Upload(queries),
                                 .positions = session.Upload(positions),
                                 .lo = session.Upload(lo),
                                 .hi = session.Upload(hi),
                                 .keys = session.Upload(keys),
                                 .softmax_scale = 0.125F,
                                 .masses = masses.data()},
                                session.stream())
                  .ok());
  const auto values = session.Read(std::move(masses));
  for (size_t n = 0; n < positions.size(); ++n) {
    EXPECT_NEAR(values[3 * n] + values[3 * n + 1] + values[3 * n + 2], 1, 2e-6);
    EXPECT_EQ(values[3 * n] == 0, lo[n] == 0);
  }
}

struct Loss {
  std::vector<float> mass, err_sq, ref_sq;
};

// Keeps everything, as is.
TEST(MeasureAttention, FullBudgetLosesNothing) {
  const ParityShape shape{.name = "full",
                          .num_tokens = 1500,
                          .num_query_heads = 8,
                          .num_kv_heads = 2,
                          .head_dim = 128,
                          .num_queries = 32};
  const HostTensor keys = HostTensor::Cache(shape, 8);
  const HostTensor values = HostTensor::Cache(shape, 9);
  const HostTensor queries = HostTensor::Queries(shape, 10);
  std::vector<int32_t> kept(static_cast<size_t>(shape.num_tokens));
  std::iota(kept.begin(), kept.end(), 0);
  DeviceSession session(TheBackend());
  const TensorView device_keys = session.Upload(keys);
  const TensorView device_values = session.Upload(values);
  auto mass = session.Poisoned<float>(8);
  auto err_sq = session.Poisoned<float>(8);
  auto ref_sq = session.Poisoned<float>(8);
  ASSERT_TRUE(TheBackend()
                  .MeasureAttention({.queries = session.Upload(queries),
                                     .keys = device_keys,
                                     .values = device_values,
                                     .kept_keys = device_keys,
                                     .kept_values = device_values,
                                     .kept = session.Upload(kept),
                                     .num_kept = shape.num_tokens,
                                     .rotation = {},
                                     .softmax_scale = 0.088F,
                                     .mass = mass.data(),
                                     .err_sq = err_sq.data(),
                                     .ref_sq = ref_sq.data()},
                                    session.stream())
                  .ok());
  const auto errors = session.Read(std::move(err_sq));
  const auto references = session.Read(std::move(ref_sq));
  for (float m : session.Read(std::move(mass))) EXPECT_NEAR(m, 1, 1e-5);
  for (size_t a = 0; a < errors.size(); ++a) {
    EXPECT_GT(references[a], 0);
    EXPECT_LE(errors[a], 1e-9F * references[a]);
  }
}

TEST(GatherPages, TurnedKeysEqualKeysMadeAtTheNewPositions) {
  // Unrotated keys x; the cache holds rope(x, p). Kept as slot s they must equal rope(x, s).
  constexpr int64_t kTokens = 5000;
  constexpr int32_t kDim = 64;
  const ParityShape shape{
      .name = "rope", .num_tokens = kTokens, .head_dim = kDim, .dtype = DType::kFloat32};
  const HostTensor plain = HostTensor::Cache(shape, 11);
  HostTensor keys = plain;
  const auto rope = [&](int64_t token, int64_t position, int32_t c) {
    const int32_t pair = c % (kDim / 2);
    const double angle = static_cast<double>(position) * std::pow(10000.0, -2.0 * pair / kDim);
    const double x = oracle::ElementValue(plain.view(), token, 0, pair);
    const double y = oracle::ElementValue(plain.view(), token, 0, pair + kDim / 2);
    return c < kDim / 2 ? x * std::cos(angle) - y * std::sin(angle)
                        : y * std::cos(angle) + x * std::sin(angle);
  };
  std::vector<int32_t> kept;
  for (int32_t t = 3; t < kTokens; t += 7) kept.push_back(t);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int32_t c = 0; c < kDim; ++c) keys.Set(t, 0, c, static_cast<float>(rope(t, t, c)));
  }
  DeviceSession session(TheBackend());
  const auto num_kept = static_cast<int64_t>(kept.size());
  auto pages = session.Poisoned<float>((num_kept + 15) / 16 * 16 * kDim);
  const oracle::HostRotation rotation = oracle::MakeRotation(kTokens, kDim, false);
  const GatherPagesItem item{.source = session.Upload(keys),
                             .kept = session.Upload(kept),
                             .num_kept = num_kept,
                             .out_dtype = DType::kFloat32,
                             .rotation = session.Upload(rotation),
                             .pages = pages.data()};
  ASSERT_TRUE(TheBackend().GatherPages({.items = {&item, 1}}, session.stream()).ok());
  const auto out = session.Read(std::move(pages));
  for (int64_t s = 0; s < num_kept; ++s) {
    for (int32_t c = 0; c < kDim; ++c) {
      // Table entries, their product and the turn: a few units in the last place of |key|.
      ASSERT_NEAR(out[static_cast<size_t>(s * kDim + c)], rope(kept[static_cast<size_t>(s)], s, c),
                  4e-6)
          << "slot " << s << " channel " << c;
    }
  }
}

}  // namespace
}  // namespace dynsplit

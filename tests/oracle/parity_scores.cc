// SPDX-License-Identifier: Apache-2.0
//
// Parity of the scoring operations.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/oracle/device_session.h"
#include "tests/oracle/parity_suite.h"
#include "tests/oracle/reference.h"
#include "tests/oracle/tolerance.h"

namespace dynsplit::oracle {
namespace {

using Pooling = ScoringPolicy::Pooling;
using Reduction = ScoringPolicy::BlockReduction;

float DefaultScale(const ParityShape& shape) {
  return static_cast<float>(1 / std::sqrt(static_cast<double>(shape.head_dim)));
}

std::vector<float> RandomScores(int64_t count, uint64_t seed) {
  Random random(seed);
  std::vector<float> scores(static_cast<size_t>(count));
  for (float& score : scores) score = random.Normal();
  return scores;
}

}  // namespace

void CheckScoreWindow(Backend& backend, const ParityShape& shape) {
  if (shape.num_queries >= shape.num_tokens) GTEST_SKIP() << "no token before the window";
  const HostTensor keys = HostTensor::Cache(shape, 1);
  const HostTensor queries = HostTensor::Queries(shape, 2);
  const int64_t count = shape.num_kv_heads * shape.num_tokens;
  ScoreWindowParams host{.queries = queries.view(),
                         .keys = keys.view(),
                         .softmax_scale = DefaultScale(shape),
                         .pooling_kernel = shape.pooling_kernel,
                         .pooling = shape.pooling};
  const std::vector<double> exact_lse = WindowLse(host.queries, host.keys, host.softmax_scale);
  const std::vector<float> lse(exact_lse.begin(), exact_lse.end());
  const double relative =
      SoftmaxError(host.softmax_scale, LargestNorm(host.queries) * LargestNorm(host.keys),
                   shape.head_dim, shape.num_tokens) +
      (shape.num_queries * shape.group_size() + shape.pooling_kernel) * kUnit;

  DeviceSession session(backend);
  ScoreWindowParams device = host;
  device.queries = session.Upload(queries);
  device.keys = session.Upload(keys);
  const float* device_lse = session.Upload(lse);
  const auto run = [&](const char* what, double absolute = 1e-30) {
    Output<float> scores = session.Poisoned<float>(count);
    device.scores = scores.data();
    ASSERT_TRUE(backend.ScoreWindow(device, session.stream()).ok());
    ExpectNear(session.Read(std::move(scores)), ScoreWindow(host), relative, absolute, what);
  };
  run("scores, log-sum-exp computed");
  host.lse = lse.data();
  device.lse = device_lse;
  run("scores, log-sum-exp supplied");
  // The root of a square that underflows.
  constexpr double kLeastRoot = 1e-18;
  host.reduction = device.reduction = ScoringPolicy::QueryReduction::kRootMeanSquare;
  run("root mean squares, log-sum-exp supplied", kLeastRoot);
  host.lse = device.lse = nullptr;
  run("root mean squares, log-sum-exp computed", kLeastRoot);
  host.reduction = device.reduction = ScoringPolicy::QueryReduction::kMean;
  if (!shape.small()) return;
  for (Pooling pooling : {Pooling::kAverage, Pooling::kMax}) {
    for (int32_t kernel : {1, 3, 31}) {
      host.pooling = device.pooling = pooling;
      host.pooling_kernel = device.pooling_kernel = kernel;
      run(pooling == Pooling::kMax ? "max pooling" : "average pooling");
    }
  }
}

void CheckScoreKeys(Backend& backend, const ParityShape& shape) {
  HostTensor keys = HostTensor::Cache(shape, 3);
  for (int32_t c = 0; c < shape.head_dim; ++c) keys.Set(0, 0, c, 0.0F);  // a zero key
  DeviceSession session(backend);
  ScoreKeysParams device{.keys = session.Upload(keys)};
  for (auto method : {ScoringPolicy::Method::kKeyNorm, ScoringPolicy::Method::kKeyDifference}) {
    Output<float> scores = session.Poisoned<float>(shape.num_kv_heads * shape.num_tokens);
    device.method = method;
    device.scores = scores.data();
    ASSERT_TRUE(backend.ScoreKeys(device, session.stream()).ok());
    const std::vector<double> expected = ScoreKeys({.keys = keys.view(), .method = method});
    const double dot = (shape.head_dim + 8) * kUnit;
    if (method == ScoringPolicy::Method::kKeyNorm) {
      ExpectNear(session.Read(std::move(scores)), expected, dot, 1e-30, "norm");
      continue;
    }
    // cos(k, m): the mean m of T unit vectors is off by T * u in norm, which turns it by T * u /
    // ||m||; then two norms and a product of D terms.
    double smallest = 1;
    for (double norm : MeanUnitKeyNorm(keys.view())) smallest = std::min(smallest, norm);
    const double turn = (static_cast<double>(shape.num_tokens) * kUnit + 2 * dot) / smallest;
    ExpectNear(session.Read(std::move(scores)), expected, 0, 2 * turn + 4 * dot, "difference");
  }
}

void CheckReduceRows(Backend& backend, const ParityShape& shape) {
  const std::vector<float> in = RandomScores(shape.num_query_heads * shape.num_tokens, 4);
  DeviceSession session(backend);
  const float* device_in = session.Upload(in);
  for (int32_t rows_out : {shape.num_query_heads, shape.num_kv_heads, 1}) {
    const std::vector<float> before = RandomScores(rows_out * shape.num_tokens, 5);
    for (bool mean : {false, true}) {
      for (bool accumulate : {false, true}) {
        std::vector<float> start = before;
        ReduceRowsParams params{.in = in.data(),
                                .rows_in = shape.num_query_heads,
                                .rows_out = rows_out,
                                .columns = shape.num_tokens,
                                .mean = mean,
                                .accumulate = accumulate,
                                .out = start.data()};
        const std::vector<float> expected = ReduceRows(params);
        Output<float> out = session.Poisoned<float>(rows_out * shape.num_tokens);
        params.in = device_in;
        params.out = out.data();
        if (accumulate) {  // a sum of one row is a copy: puts `before` into the output
          ReduceRowsParams copy{.in = session.Upload(before),
                                .rows_in = rows_out,
                                .rows_out = rows_out,
                                .columns = shape.num_tokens,
                                .out = out.data()};
          ASSERT_TRUE(backend.ReduceRows(copy, session.stream()).ok());
        }
        ASSERT_TRUE(backend.ReduceRows(params, session.stream()).ok());
        ExpectEqual(session.Read(std::move(out)), expected, "rows");
      }
    }
  }
}

void CheckReduceBlocks(Backend& backend, const ParityShape& shape) {
  const std::vector<float> scores = RandomScores(shape.num_kv_heads * shape.num_tokens, 6);
  const std::vector<int32_t> starts = RandomBlockStarts(shape, 7);
  const auto num_blocks = static_cast<int64_t>(starts.size()) - 1;
  DeviceSession session(backend);
  ReduceBlocksParams host{.token_scores = scores.data(),
                          .rows = shape.num_kv_heads,
                          .num_tokens = shape.num_tokens,
                          .block_starts = starts.data(),
                          .num_blocks = num_blocks};
  ReduceBlocksParams device = host;
  device.token_scores = session.Upload(scores);
  device.block_starts = session.Upload(starts);
  for (Reduction reduction : {Reduction::kMean, Reduction::kSum, Reduction::kMax}) {
    host.reduction = device.reduction = reduction;
    Output<float> out = session.Poisoned<float>(host.rows * num_blocks);
    device.block_scores = out.data();
    ASSERT_TRUE(backend.ReduceBlocks(device, session.stream()).ok());
    ExpectEqual(session.Read(std::move(out)), ReduceBlocks(host), "block scores");
  }
}

// Blocks longer than what is held of a row at a time, next to one-token blocks; rows of odd length.
void CheckReduceLong(Backend& backend) {
  constexpr int64_t kTokens = 20011;
  constexpr int32_t kRows = 3;
  const std::vector<float> scores = RandomScores(kRows * kTokens, 8);
  std::vector<std::vector<int32_t>> cases = {{0, kTokens}, {0, 1, kTokens - 1, kTokens}, {}};
  for (int32_t t = 0; t <= 300; ++t) cases[2].push_back(t);
  for (int32_t t : {4396, 4397, 12600, static_cast<int32_t>(kTokens)}) cases[2].push_back(t);
  for (const std::vector<int32_t>& starts : cases) {
    DeviceSession session(backend);
    ReduceBlocksParams host{.token_scores = scores.data(),
                            .rows = kRows,
                            .num_tokens = kTokens,
                            .block_starts = starts.data(),
                            .num_blocks = static_cast<int64_t>(starts.size()) - 1};
    ReduceBlocksParams device = host;
    device.token_scores = session.Upload(scores);
    device.block_starts = session.Upload(starts);
    for (Reduction reduction : {Reduction::kMean, Reduction::kSum, Reduction::kMax}) {
      host.reduction = device.reduction = reduction;
      Output<float> out = session.Poisoned<float>(host.rows * host.num_blocks);
      device.block_scores = out.data();
      ASSERT_TRUE(backend.ReduceBlocks(device, session.stream()).ok());
      ExpectEqual(session.Read(std::move(out)), ReduceBlocks(host), "block scores");
    }
  }
}

}  // namespace dynsplit::oracle

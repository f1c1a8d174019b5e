// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/oracle/numbers.h"
#include "tests/oracle/reference.h"

namespace dynsplit::oracle {
namespace {

using Matrix = std::vector<std::vector<double>>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Matrix HeadRows(const TensorView& view, int32_t head) {
  Matrix rows(static_cast<size_t>(view.num_tokens));
  for (int64_t t = 0; t < view.num_tokens; ++t) {
    rows[static_cast<size_t>(t)].reserve(static_cast<size_t>(view.head_dim));
    for (int32_t c = 0; c < view.head_dim; ++c) {
      rows[static_cast<size_t>(t)].push_back(ElementValue(view, t, head, c));
    }
  }
  return rows;
}

double LogSumExp(const std::vector<double>& logits) {
  double largest = -kInfinity;
  for (double x : logits) largest = std::max(largest, x);
  double sum = 0;
  for (double x : logits) sum += std::exp(x - largest);
  return largest + std::log(sum);
}

std::vector<double> Pool(const std::vector<double>& p, int32_t kernel,
                         ScoringPolicy::Pooling pooling) {
  const auto n = static_cast<int64_t>(p.size());
  std::vector<double> out(p.size());
  for (int64_t t = 0; t < n; ++t) {
    double sum = 0;
    double largest = -kInfinity;
    for (int64_t u = std::max<int64_t>(0, t - kernel / 2); u <= std::min(n - 1, t + kernel / 2);
         ++u) {
      sum += p[static_cast<size_t>(u)];
      largest = std::max(largest, p[static_cast<size_t>(u)]);
    }
    out[static_cast<size_t>(t)] =
        pooling == ScoringPolicy::Pooling::kAverage ? sum / kernel : largest;
  }
  return out;
}

}  // namespace

std::vector<double> WindowLse(const TensorView& queries, const TensorView& keys, double scale) {
  const int32_t group = queries.num_heads / keys.num_heads;
  const int64_t first = keys.num_tokens - queries.num_tokens;
  std::vector<double> lse(static_cast<size_t>(queries.num_tokens * queries.num_heads));
  Matrix k;  // of the group's head
  for (int32_t a = 0; a < queries.num_heads; ++a) {
    const Matrix q = HeadRows(queries, a);
    if (a % group == 0) k = HeadRows(keys, a / group);
    for (int64_t i = 0; i < queries.num_tokens; ++i) {
      std::vector<double> logits;
      for (int64_t t = 0; t <= first + i; ++t) {
        logits.push_back(scale * Dot(q[static_cast<size_t>(i)], k[static_cast<size_t>(t)]));
      }
      lse[static_cast<size_t>(i * queries.num_heads + a)] = LogSumExp(logits);
    }
  }
  return lse;
}

std::vector<double> ScoreWindow(const ScoreWindowParams& params) {
  const TensorView& keys = params.keys;
  const TensorView& queries = params.queries;
  const int64_t num_tokens = keys.num_tokens;
  const int64_t window = queries.num_tokens;
  const int32_t group = queries.num_heads / keys.num_heads;
  std::vector<double> computed;
  if (params.lse == nullptr) computed = WindowLse(queries, keys, params.softmax_scale);
  std::vector<double> scores(static_cast<size_t>(keys.num_heads * num_tokens), 0.0);
  const bool squares = params.reduction == ScoringPolicy::QueryReduction::kRootMeanSquare;
  std::vector<double> mean;
  Matrix k;  // of the group's head
  for (int32_t a = 0; a < queries.num_heads; ++a) {
    const int32_t h = a / group;
    const Matrix q = HeadRows(queries, a);
    if (a % group == 0) k = HeadRows(keys, h);
    if (!squares || a % group == 0) mean.assign(static_cast<size_t>(num_tokens - window), 0.0);
    for (int64_t i = 0; i < window; ++i) {
      const int64_t row = i * queries.num_heads + a;
      const double lse =
          params.lse != nullptr ? params.lse[row] : computed[static_cast<size_t>(row)];
      for (size_t t = 0; t < mean.size(); ++t) {
        const double weight =
            std::exp(double{params.softmax_scale} * Dot(q[static_cast<size_t>(i)], k[t]) - lse);
        mean[t] += (squares ? weight * weight / group : weight) / static_cast<double>(window);
      }
    }
    if (squares) {
      if (a % group < group - 1) continue;  // one mean over the group's heads
      for (double& square : mean) square = std::sqrt(square) * group;
    }
    const std::vector<double> pooled = Pool(mean, params.pooling_kernel, params.pooling);
    for (size_t t = 0; t < pooled.size(); ++t) {
      scores[static_cast<size_t>(h * num_tokens) + t] += pooled[t] / group;
    }
  }
  return scores;
}

std::vector<double> MeanUnitKeyNorm(const TensorView& keys) {
  std::vector<double> norms;
  for (int32_t h = 0; h < keys.num_heads; ++h) {
    std::vector<double> mean(static_cast<size_t>(keys.head_dim), 0.0);
    for (const std::vector<double>& row : HeadRows(keys, h)) {
      const double norm = std::sqrt(Dot(row, row));
      if (norm == 0) continue;
      for (size_t c = 0; c < row.size(); ++c) {
        mean[c] += row[c] / norm / static_cast<double>(keys.num_tokens);
      }
    }
    norms.push_back(std::sqrt(Dot(mean, mean)));
  }
  return norms;
}

std::vector<double> ScoreKeys(const ScoreKeysParams& params) {
  const TensorView& keys = params.keys;
  std::vector<double> scores;
  for (int32_t h = 0; h < keys.num_heads; ++h) {
    const Matrix rows = HeadRows(keys, h);
    if (params.method == ScoringPolicy::Method::kKeyNorm) {
      for (const auto& row : rows) scores.push_back(-std::sqrt(Dot(row, row)));
      continue;
    }
    std::vector<double> mean(static_cast<size_t>(keys.head_dim), 0.0);
    for (const auto& row : rows) {
      const double norm = std::sqrt(Dot(row, row));
      if (norm == 0) continue;
      for (size_t c = 0; c < row.size(); ++c) {
        mean[c] += row[c] / norm / static_cast<double>(keys.num_tokens);
      }
    }
    const double mean_norm = std::sqrt(Dot(mean, mean));
    for (const auto& row : rows) {
      const double norm = std::sqrt(Dot(row, row)) * mean_norm;
      scores.push_back(norm == 0 ? 0.0 : -Dot(row, mean) / norm);
    }
  }
  return scores;
}

std::vector<float> ReduceRows(const ReduceRowsParams& params) {
  const int32_t fold = params.rows_in / params.rows_out;
  std::vector<float> out;
  for (int32_t r = 0; r < params.rows_out; ++r) {
    for (int64_t c = 0; c < params.columns; ++c) {
      float sum = 0;
      for (int32_t i = 0; i < fold; ++i) sum += params.in[(r * fold + i) * params.columns + c];
      if (params.mean) sum /= static_cast<float>(fold);
      out.push_back(params.accumulate ? params.out[r * params.columns + c] + sum : sum);
    }
  }
  return out;
}

std::vector<float> ReduceBlocks(const ReduceBlocksParams& params) {
  using Reduction = ScoringPolicy::BlockReduction;
  std::vector<float> out;
  for (int32_t r = 0; r < params.rows; ++r) {
    for (int64_t j = 0; j < params.num_blocks; ++j) {
      float sum = 0;
      float largest = -std::numeric_limits<float>::infinity();
      for (int32_t t = params.block_starts[j]; t < params.block_starts[j + 1]; ++t) {
        const float score = params.token_scores[r * params.num_tokens + t];
        sum += score;
        if (score > largest) largest = score;
      }
      const int32_t length = params.block_starts[j + 1] - params.block_starts[j];
      if (params.reduction == Reduction::kMax) {
        out.push_back(largest);
      } else if (params.reduction == Reduction::kSum) {
        out.push_back(sum);
      } else {
        out.push_back(sum / static_cast<float>(length));
      }
    }
  }
  return out;
}

}  // namespace dynsplit::oracle

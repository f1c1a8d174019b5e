// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "server/cpu/attention_means.h"
#include "server/cpu/decode.h"
#include "server/cpu/operations.h"
#include "server/cpu/row_blocks.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {

constexpr int64_t kPoolChunk = 4096;  // tokens

// out[t] = or += factor * pool of in[0, n) around t, for t in [begin, end).
struct PoolParams {
  const float* in = nullptr;
  int64_t n = 0;
  int32_t kernel = 1;
  ScoringPolicy::Pooling pooling = ScoringPolicy::Pooling::kAverage;
  float factor = 1;
  bool accumulate = false;
  float* out = nullptr;
};

void Pool(const PoolParams& p, int64_t begin, int64_t end) {
  const int64_t half = p.kernel / 2;
  const bool average = p.pooling == ScoringPolicy::Pooling::kAverage;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = std::max<int64_t>(0, t - half);
    const int64_t last = std::min(p.n - 1, t + half);
    float value = average ? 0.0F : -std::numeric_limits<float>::infinity();
    for (int64_t u = first; u <= last; ++u) {
      value = average ? value + p.in[u] : std::max(value, p.in[u]);
    }
    if (average) value /= static_cast<float>(p.kernel);
    p.out[t] = (p.accumulate ? p.out[t] : 0.0F) + value * p.factor;
  }
}

}  // namespace

absl::Status ScoreWindow(const ScoreWindowParams& params, const Workspace& workspace) {
  const TensorView& queries = params.queries;
  const TensorView& keys = params.keys;
  const int64_t window = queries.num_tokens;
  const int64_t num_tokens = keys.num_tokens;
  const int32_t group = queries.num_heads / keys.num_heads;
  const bool squares = params.reduction == ScoringPolicy::QueryReduction::kRootMeanSquare;
  // Averages commute with the mean over the group, maxima do not: then each query head is a set.
  const bool by_query_head = params.pooling == ScoringPolicy::Pooling::kMax &&
                             params.pooling_kernel > 1 && group > 1 && !squares;
  const int64_t sets_per_head = by_query_head ? group : 1;
  const int64_t num_sets = keys.num_heads * sets_per_head;
  const int64_t rows_per_set = window * (group / sets_per_head);
  const auto query_head = [&](int64_t set, int64_t row) {
    return static_cast<int32_t>(set * (group / sets_per_head) + GroupHeadOfRow(row, window));
  };

  const auto load_query = [&](int64_t set, int64_t row, float* out) {
    const int64_t i = QueryOfRow(row, window);
    const int32_t a = query_head(set, row);
    DecodeRow(queries.dtype, RowAddress(queries, i, a), RowScale(queries, i, a), queries.head_dim,
              out);
    for (int32_t c = 0; c < queries.head_dim; ++c) out[c] *= params.softmax_scale;
  };
  const auto limit = [&](int64_t row) {
    return static_cast<int32_t>(num_tokens - window + QueryOfRow(row, window));
  };
  auto rows = RowBlocks::Create({.num_sets = num_sets,
                                 .rows_per_set = rows_per_set,
                                 .depth = queries.head_dim,
                                 .load = load_query,
                                 .limit = limit},
                                workspace);
  if (!rows.ok()) return rows.status();
  auto sums = workspace.Scratch<float>(num_sets * num_tokens);
  if (!sums.ok()) return sums.status();

  const auto load_keys = [&](int64_t set, int64_t begin, int64_t end, float* out) {
    DecodeTile(keys, static_cast<int32_t>(set / sets_per_head), begin, end, keys.head_dim, out);
  };
  const auto supplied_lse = [&](int64_t set, int64_t row) {
    return params.lse[QueryOfRow(row, window) * queries.num_heads + query_head(set, row)];
  };
  const absl::FunctionRef<float(int64_t, int64_t)> lse(supplied_lse);
  // Of a mean over the window, then over the group; of squares, over both at once.
  const float row_weight = squares ? 1.0F / std::sqrt(static_cast<float>(window * group))
                                   : 1.0F / static_cast<float>(window);
  absl::Status status = AttentionMeans({.rows = *rows,
                                        .num_keys = num_tokens,
                                        .depth = keys.head_dim,
                                        .load_keys = load_keys,
                                        .lse = params.lse != nullptr ? &lse : nullptr,
                                        .row_weight = row_weight,
                                        .squares = squares,
                                        .sums = sums->as<float>()},
                                       workspace);
  if (!status.ok()) return status;

  const int64_t num_scored = num_tokens - window;
  if (squares) {
    float* const values = sums->as<float>();
    std::transform(values, values + num_sets * num_tokens, values,
                   [](float square) { return std::sqrt(square); });
  }
  const int64_t chunks = CeilDiv(num_tokens, kPoolChunk);
  workspace.threads.ParallelFor(keys.num_heads * chunks, [&](int64_t chunk, int /*slot*/) {
    const int64_t h = chunk / chunks;
    const int64_t begin = chunk % chunks * kPoolChunk;
    const int64_t end = std::min(begin + kPoolChunk, num_tokens);
    float* out = params.scores + h * num_tokens;
    for (int64_t s = 0; s < sets_per_head; ++s) {
      Pool({.in = sums->as<float>() + (h * sets_per_head + s) * num_tokens,
            .n = num_scored,
            .kernel = params.pooling_kernel,
            .pooling = params.pooling,
            .factor = squares ? 1.0F : 1.0F / static_cast<float>(group),
            .accumulate = s > 0,
            .out = out},
           begin, std::min(end, num_scored));
    }
    std::fill(out + std::clamp(num_scored, begin, end), out + end, 0.0F);
  });
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

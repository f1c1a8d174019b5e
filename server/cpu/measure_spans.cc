// SPDX-License-Identifier: Apache-2.0
#include <utility>
#include <vector>

#include "server/cpu/attention_outputs.h"
#include "server/cpu/decode.h"
#include "server/cpu/operations.h"
#include "server/cpu/row_blocks.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {

absl::Status MeasureSpans(const MeasureSpansParams& params, const Workspace& workspace) {
  const TensorView& queries = params.queries;
  const int64_t count = queries.num_tokens;
  const int32_t group = queries.num_heads / params.keys.num_heads;
  const auto load = [&](int64_t set, int64_t row, float* out) {
    const int64_t n = QueryOfRow(row, count);
    const auto a = static_cast<int32_t>(set * group + GroupHeadOfRow(row, count));
    DecodeRow(queries.dtype, RowAddress(queries, n, a), RowScale(queries, n, a), queries.head_dim,
              out);
    for (int32_t c = 0; c < queries.head_dim; ++c) out[c] *= params.softmax_scale;
  };
  const auto limit = [&](int64_t row) { return params.positions[QueryOfRow(row, count)]; };
  auto rows = RowBlocks::Create({.num_sets = params.keys.num_heads,
                                 .rows_per_set = count * group,
                                 .depth = queries.head_dim,
                                 .load = load,
                                 .limit = limit},
                                workspace);
  if (!rows.ok()) return rows.status();

  const auto span = [&](int n, int64_t row) -> AttentionOutputsParams::Range {
    const int64_t i = QueryOfRow(row, count);
    if (n == 0) return {0, params.lo[i]};
    if (n == 1) return {params.lo[i], params.hi[i]};
    return {params.hi[i], params.positions[i] + 1};
  };
  const absl::FunctionRef<AttentionOutputsParams::Range(int, int64_t)> partial_ranges(span);
  struct Masses {
    float drop, overlap, own;
  };
  std::vector<Masses> by_head(static_cast<size_t>(count * queries.num_heads));  // [Hq, N]
  const auto load_keys = [&](int32_t head, int64_t begin, int64_t end, float* keys,
                             float* /*values*/) {
    DecodeTile(params.keys, head, begin, end, params.keys.head_dim, keys);
  };
  absl::Status status = AttentionOutputs(
      {.rows = *rows,
       .num_keys = params.keys.num_tokens,
       .head_dim = params.keys.head_dim,
       .load = load_keys,
       .partial_ranges = &partial_ranges},
      workspace, [&](int64_t index, const AttentionResult& result) {
        const RowBlock& block = rows->blocks()[static_cast<size_t>(index)];
        for (int64_t j = 0; j < block.num_rows; ++j) {
          const float sum = result.sum[j];
          by_head[static_cast<size_t>(block.set * count * group + block.first_row + j)] = {
              result.partial[0][j] / sum, result.partial[1][j] / sum, result.partial[2][j] / sum};
        }
      });
  if (!status.ok()) return status;
  for (int64_t n = 0; n < count; ++n) {
    Masses mean = {0, 0, 0};
    for (int32_t a = 0; a < queries.num_heads; ++a) {
      const Masses& masses = by_head[static_cast<size_t>(a * count + n)];
      mean.drop += masses.drop;
      mean.overlap += masses.overlap;
      mean.own += masses.own;
    }
    const auto heads = static_cast<float>(queries.num_heads);
    params.masses[3 * n] = mean.drop / heads;
    params.masses[3 * n + 1] = mean.overlap / heads;
    params.masses[3 * n + 2] = mean.own / heads;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

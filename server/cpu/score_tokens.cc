// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/attention_means.h"
#include "server/cpu/decode.h"
#include "server/cpu/operations.h"
#include "server/cpu/row_blocks.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {

absl::Status ScoreItem(const ScoreTokensItem& item, const ScoreTokensParams& params,
                       const Workspace& workspace) {
  if (item.num_tokens == 0) return absl::OkStatus();
  const TensorView& queries = item.queries;
  const TensorView& keys = item.keys;
  const int32_t dim = queries.head_dim;
  const int32_t group = queries.num_heads / keys.num_heads;
  const auto load_query = [&](int64_t set, int64_t row, float* out) {
    const int64_t i = QueryOfRow(row, queries.num_tokens);
    const auto a = static_cast<int32_t>(set * group + GroupHeadOfRow(row, queries.num_tokens));
    DecodeRow(queries.dtype, RowAddress(queries, i, a), RowScale(queries, i, a), dim, out);
    for (int32_t c = 0; c < dim; ++c) out[c] *= params.softmax_scale;
  };
  const auto no_limit = [](int64_t /*row*/) { return int32_t{0}; };
  auto rows = RowBlocks::Create({.num_sets = keys.num_heads,
                                 .rows_per_set = queries.num_tokens * group,
                                 .depth = dim,
                                 .load = load_query,
                                 .limit = no_limit},
                                workspace);
  if (!rows.ok()) return rows.status();
  const auto load_keys = [&](int64_t set, int64_t begin, int64_t end, float* out) {
    const auto head = static_cast<int32_t>(set);
    if (item.tokens == nullptr) return DecodeTile(keys, head, begin, end, dim, out);
    const int32_t* tokens = item.tokens + (params.groups == 1 ? 0 : set) * item.num_tokens;
    for (int64_t j = begin; j < end; ++j, out += dim) {
      DecodeRow(keys.dtype, RowAddress(keys, tokens[j], head), RowScale(keys, tokens[j], head), dim,
                out);
    }
  };
  return AttentionMeans({.rows = *rows,
                         .num_keys = item.num_tokens,
                         .depth = dim,
                         .load_keys = load_keys,
                         .causal = false,
                         .row_weight = 1.0F / static_cast<float>(queries.num_tokens),
                         .sums = item.token_scores},
                        workspace);
}

}  // namespace

absl::Status ScoreTokens(const ScoreTokensParams& params, const Workspace& workspace) {
  for (const ScoreTokensItem& item : params.items) {
    if (auto status = ScoreItem(item, params, workspace); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

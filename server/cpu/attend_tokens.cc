// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "server/cpu/attention_outputs.h"
#include "server/cpu/decode.h"
#include "server/cpu/operations.h"
#include "server/cpu/row_blocks.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {

// The rows that a head attends to: chosen ones, then the tail.
class RowLoader {
 public:
  RowLoader(const AttendTokensItem& item, int32_t groups) : item_(item), groups_(groups) {}

  int64_t num_rows() const { return item_.num_tokens + item_.tail_keys.num_tokens; }
  // Rows [begin, end) of `chosen` and `tail` behind each other: [end - begin, D].
  void Load(const TensorView& chosen, const TensorView& tail, int32_t head, int64_t begin,
            int64_t end, float* out) const {
    const int64_t dim = chosen.head_dim;
    const int64_t split = std::clamp(item_.num_tokens, begin, end);
    if (item_.tokens == nullptr) {
      DecodeTile(chosen, head, begin, split, dim, out);
    } else {
      const int32_t* tokens = item_.tokens + (groups_ == 1 ? 0 : head) * item_.num_tokens;
      for (int64_t r = begin; r < split; ++r) {
        DecodeRow(chosen.dtype, RowAddress(chosen, tokens[r], head),
                  RowScale(chosen, tokens[r], head), dim, out + (r - begin) * dim);
      }
    }
    DecodeTile(tail, head, split - item_.num_tokens, end - item_.num_tokens, dim,
               out + (split - begin) * dim);
  }

 private:
  const AttendTokensItem& item_;
  const int32_t groups_;
};

void StoreOutput(const AttendTokensItem& item, const RowBlock& block,
                 const AttentionResult& result) {
  const TensorView& queries = item.queries;
  const int32_t group = queries.num_heads / item.keys.num_heads;
  const int64_t dim = queries.head_dim;
  std::vector<float> row(static_cast<size_t>(dim));
  for (int64_t j = 0; j < block.num_rows; ++j) {
    const int64_t a = block.set * group + block.first_row + j;
    for (int64_t c = 0; c < dim; ++c) {
      row[static_cast<size_t>(c)] = result.outputs[c * block.columns + j] / result.sum[j];
    }
    EncodeRow(queries.dtype, row.data(), 1.0F, dim,
              static_cast<std::byte*>(item.output) + a * dim * DTypeBytes(queries.dtype));
    if (item.lse != nullptr) item.lse[a] = result.max[j] + std::log(result.sum[j]);
  }
}

absl::Status AttendItem(const AttendTokensItem& item, const AttendTokensParams& params,
                        const Workspace& workspace) {
  const TensorView& queries = item.queries;
  const int32_t group = queries.num_heads / item.keys.num_heads;
  const auto load_query = [&](int64_t set, int64_t row, float* out) {
    const auto a = static_cast<int32_t>(set * group + row);
    DecodeRow(queries.dtype, RowAddress(queries, 0, a), 1.0F, queries.head_dim, out);
    for (int32_t c = 0; c < queries.head_dim; ++c) out[c] *= params.softmax_scale;
  };
  const auto no_limit = [](int64_t /*row*/) { return std::numeric_limits<int32_t>::max(); };
  auto rows = RowBlocks::Create({.num_sets = item.keys.num_heads,
                                 .rows_per_set = group,
                                 .depth = queries.head_dim,
                                 .load = load_query,
                                 .limit = no_limit},
                                workspace);
  if (!rows.ok()) return rows.status();
  const RowLoader loader(item, params.groups);
  const auto load = [&](int32_t head, int64_t begin, int64_t end, float* keys, float* values) {
    loader.Load(item.keys, item.tail_keys, head, begin, end, keys);
    loader.Load(item.values, item.tail_values, head, begin, end, values);
  };
  return AttentionOutputs({.rows = *rows,
                           .num_keys = loader.num_rows(),
                           .head_dim = queries.head_dim,
                           .with_values = true,
                           .load = load},
                          workspace, [&](int64_t index, const AttentionResult& result) {
                            StoreOutput(item, rows->blocks()[static_cast<size_t>(index)], result);
                          });
}

}  // namespace

absl::Status AttendTokens(const AttendTokensParams& params, const Workspace& workspace) {
  for (const AttendTokensItem& item : params.items) {
    if (auto status = AttendItem(item, params, workspace); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

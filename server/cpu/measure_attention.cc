// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <utility>
#include <vector>

#include "server/cpu/attention_outputs.h"
#include "server/cpu/decode.h"
#include "server/cpu/operations.h"
#include "server/cpu/row_math.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {

class Measurement {
 public:
  Measurement(const MeasureAttentionParams& params, const Workspace& workspace)
      : p_(params),
        workspace_(workspace),
        window_(params.queries.num_tokens),
        dim_(params.queries.head_dim),
        group_(params.queries.num_heads / params.keys.num_heads),
        rows_per_head_(window_ * group_),
        with_values_(params.values.data != nullptr && params.kept_keys.data != nullptr),
        mass_(static_cast<size_t>(rows_per_head_ * params.keys.num_heads)),
        err_sq_(mass_.size()),
        ref_sq_(mass_.size()) {}

  absl::Status Run();

 private:
  absl::StatusOr<RowBlocks> Rows(bool turned) const;
  absl::StatusOr<Buffer> KeptWeights() const;
  absl::Status AttendFull();
  absl::Status AttendKept();
  size_t RowIndex(const RowBlock& block, int64_t column) const {
    return static_cast<size_t>(block.set * rows_per_head_ + block.first_row + column);
  }
  // Output c of a row; a row that sees nothing has output 0.
  static float Output(const AttentionResult& result, const RowBlock& block, int64_t c, int64_t j) {
    return result.sum[j] > 0 ? result.outputs[c * block.columns + j] / result.sum[j] : 0.0F;
  }

  const MeasureAttentionParams& p_;
  const Workspace& workspace_;
  const int64_t window_;
  const int64_t dim_;
  const int64_t group_;
  const int64_t rows_per_head_;
  const bool with_values_;
  std::vector<float> mass_, err_sq_, ref_sq_;  // by row: (head, a_in_group, i)
  Buffer full_;                                // [rows, D] outputs over everything
};

absl::StatusOr<RowBlocks> Measurement::Rows(bool turned) const {
  std::vector<float> cos(static_cast<size_t>(p_.rotation.rotary_dim / 2 + 1));
  std::vector<float> sin(cos.size());
  if (turned) RotationAngles(p_.rotation, p_.query_shift, cos.data(), sin.data());
  const TensorView& queries = p_.queries;
  const auto load = [&](int64_t set, int64_t row, float* out) {
    const int64_t i = QueryOfRow(row, window_);
    const auto a = static_cast<int32_t>(set * group_ + GroupHeadOfRow(row, window_));
    DecodeRow(queries.dtype, RowAddress(queries, i, a), RowScale(queries, i, a), dim_, out);
    if (turned) TurnBack(p_.rotation, cos.data(), sin.data(), out);
    for (int64_t c = 0; c < dim_; ++c) out[c] *= p_.softmax_scale;
  };
  const auto limit = [&](int64_t row) {
    return static_cast<int32_t>(p_.keys.num_tokens - window_ + QueryOfRow(row, window_));
  };
  return RowBlocks::Create({.num_sets = p_.keys.num_heads,
                            .rows_per_set = rows_per_head_,
                            .depth = static_cast<int32_t>(dim_),
                            .load = load,
                            .limit = limit},
                           workspace_);
}

// 1 for kept tokens, 0 for others: [groups, T].
absl::StatusOr<Buffer> Measurement::KeptWeights() const {
  const int64_t num_tokens = p_.keys.num_tokens;
  auto weights = workspace_.Scratch<float>(p_.groups * num_tokens);
  if (!weights.ok()) return weights.status();
  workspace_.threads.ParallelFor(p_.groups, [&](int64_t g, int /*slot*/) {
    float* row = weights->as<float>() + g * num_tokens;
    std::fill(row, row + num_tokens, 0.0F);
    for (int64_t s = 0; s < p_.num_kept; ++s) row[p_.kept[g * p_.num_kept + s]] = 1.0F;
  });
  return weights;
}

absl::Status Measurement::AttendFull() {
  auto rows = Rows(/*turned=*/false);
  if (!rows.ok()) return rows.status();
  auto weights = KeptWeights();
  if (!weights.ok()) return weights.status();
  const auto load = [&](int32_t head, int64_t begin, int64_t end, float* keys, float* values) {
    DecodeTile(p_.keys, head, begin, end, dim_, keys);
    if (with_values_) DecodeTile(p_.values, head, begin, end, dim_, values);
  };
  return AttentionOutputs(
      {.rows = *rows,
       .num_keys = p_.keys.num_tokens,
       .head_dim = p_.keys.head_dim,
       .with_values = with_values_,
       .load = load,
       .key_weights = weights->as<float>(),
       .key_weights_stride = p_.groups == 1 ? 0 : p_.keys.num_tokens},
      workspace_, [&](int64_t index, const AttentionResult& result) {
        const RowBlock& block = rows->blocks()[static_cast<size_t>(index)];
        for (int64_t j = 0; j < block.num_rows; ++j) {
          mass_[RowIndex(block, j)] = result.partial[0][j] / result.sum[j];
          for (int64_t c = 0; with_values_ && c < dim_; ++c) {
            full_.as<float>()[static_cast<int64_t>(RowIndex(block, j)) * dim_ + c] =
                Output(result, block, c, j);
          }
        }
      });
}

absl::Status Measurement::AttendKept() {
  auto rows = Rows(/*turned=*/p_.rotation.rotary_dim > 0);
  if (!rows.ok()) return rows.status();
  const auto load = [&](int32_t head, int64_t begin, int64_t end, float* keys, float* values) {
    DecodeTile(p_.kept_keys, head, begin, end, dim_, keys);
    DecodeTile(p_.kept_values, head, begin, end, dim_, values);
  };
  return AttentionOutputs({.rows = *rows,
                           .num_keys = p_.kept_keys.num_tokens,
                           .head_dim = p_.kept_keys.head_dim,
                           .with_values = true,
                           .load = load,
                           .positions = p_.kept,
                           .positions_stride = p_.groups == 1 ? 0 : p_.num_kept},
                          workspace_, [&](int64_t index, const AttentionResult& result) {
                            const RowBlock& block = rows->blocks()[static_cast<size_t>(index)];
                            for (int64_t j = 0; j < block.num_rows; ++j) {
                              const float* full = full_.as<float>() +
                                                  static_cast<int64_t>(RowIndex(block, j)) * dim_;
                              float err_sq = 0;
                              float ref_sq = 0;
                              for (int64_t c = 0; c < dim_; ++c) {
                                const float difference = Output(result, block, c, j) - full[c];
                                err_sq += difference * difference;
                                ref_sq += full[c] * full[c];
                              }
                              err_sq_[RowIndex(block, j)] = err_sq;
                              ref_sq_[RowIndex(block, j)] = ref_sq;
                            }
                          });
}

absl::Status Measurement::Run() {
  if (with_values_) {
    auto full = workspace_.Scratch<float>(static_cast<int64_t>(mass_.size()) * dim_);
    if (!full.ok()) return full.status();
    full_ = *std::move(full);
  }
  absl::Status status = AttendFull();
  if (status.ok() && with_values_) status = AttendKept();
  if (!status.ok()) return status;
  const auto sum_of_head = [&](const std::vector<float>& rows, int32_t a) {
    float sum = 0;
    for (int64_t i = 0; i < window_; ++i) sum += rows[static_cast<size_t>(a * window_ + i)];
    return sum;
  };
  for (int32_t a = 0; a < p_.queries.num_heads; ++a) {
    p_.mass[a] = sum_of_head(mass_, a) / static_cast<float>(window_);
    if (!with_values_) continue;
    p_.err_sq[a] = sum_of_head(err_sq_, a);
    p_.ref_sq[a] = sum_of_head(ref_sq_, a);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status MeasureAttention(const MeasureAttentionParams& params, const Workspace& workspace) {
  return Measurement(params, workspace).Run();
}

}  // namespace dynsplit::cpu

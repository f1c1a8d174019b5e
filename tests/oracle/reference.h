// SPDX-License-Identifier: Apache-2.0
//
// The operations of server/pipeline/backend.h as plain loops, in double where the contract asks for
// a float result and in the contract's own fp32 steps where it asks for equal bytes. All pointers
// in the params are host pointers; output pointers are ignored, results are returned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "server/pipeline/backend.h"

namespace dynsplit::oracle {

std::vector<double> ScoreWindow(const ScoreWindowParams& params);  // [Hkv, T]
// Log-sum-exp of the scaled causal logits: [W, Hq].
std::vector<double> WindowLse(const TensorView& queries, const TensorView& keys, double scale);
std::vector<double> ScoreKeys(const ScoreKeysParams& params);  // [Hkv, T]
// Norm of the mean unit key, per head (conditioning of kKeyDifference).
std::vector<double> MeanUnitKeyNorm(const TensorView& keys);
std::vector<float> ReduceRows(const ReduceRowsParams& params);  // reads params.out to accumulate
std::vector<float> ReduceBlocks(const ReduceBlocksParams& params);  // [rows, B]

struct Summaries {
  std::vector<double> min, max, mean;  // [B, Hkv, D], not yet rounded to out_dtype
};
Summaries SummarizeBlocks(const SummarizeBlocksParams& params);
std::vector<double> ScoreBlocks(const ScoreBlocksParams& params);  // [Hkv, B]

struct Selection {
  std::vector<std::vector<int32_t>> kept;  // per group, ascending
};
Selection SelectTokens(const SelectTokensParams& params);

DType EncodedType(DType source, EncodingPolicy::Format format, bool rotated);
struct Pages {
  std::vector<std::byte> bytes;  // [num_pages, page_size, Hkv, D]
  std::vector<float> scales;     // empty, [Hkv] or [num_pages, page_size, Hkv]
};
Pages GatherPages(const GatherPagesParams& params);

struct AttentionLoss {
  std::vector<double> mass, err_sq, ref_sq;  // [Hq]; the last two empty without values
};
AttentionLoss MeasureAttention(const MeasureAttentionParams& params);
std::vector<double> MeasureSpans(const MeasureSpansParams& params);  // [N, 3]
int32_t CheckFinite(const CheckFiniteParams& params);

// Turns channels [0, rotary_dim) of `row` by -delta positions, in fp32 with one rounding for each
// product and sum.
void TurnBack(const RotationTable& rotation, int64_t delta, std::vector<float>& row);

}  // namespace dynsplit::oracle

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
#include "server/pipeline/segmentation.h"

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
  std::vector<double> min, max, mean;  // [B, Hkv, D], not yet rounded to a type
};
Summaries SummarizeBlocks(const SummarizeBlocksParams& params);
// Rounds summaries of all blocks to params.summaries.dtype (bounds outward, means to nearest) and
// writes those of [first_block, num_blocks) to the params' pointers, which are host pointers here.
void StoreSummaries(const Summaries& summaries, const SummarizeBlocksParams& params);
// Smallest power of two >= 2^-120 with amax <= 448 times it; 1 for 0.
double PowerOfTwoScale(double amax);
// Element c of row (block j, head h) of params.min, max or mean, decoded.
double SummaryValue(const BlockSummaries& summaries, const std::byte* base, const float* scales,
                    int64_t j, int32_t h, int32_t c);
std::vector<double> ScoreBlocks(const ScoreBlocksItem& item, int32_t num_kv_heads,
                                float softmax_scale);  // [Hkv, B]

struct Selection {
  std::vector<std::vector<int32_t>> kept;  // per group, ascending
};
Selection SelectTokens(const SelectTokensParams& params);

Segmentation SegmentTokens(const SegmentTokensParams& params);

std::vector<double> ScoreTokens(const ScoreTokensItem& item, int32_t groups,
                                float softmax_scale);  // [Hkv, n]

std::vector<int32_t> SelectBlocks(const SelectBlocksItem& item, int32_t groups);  // [groups, n]

// Both in the fp32 logits' reach; output [Hq, D], lse [Hq].
struct Attention {
  std::vector<double> output, lse;
};
Attention AttendTokens(const AttendTokensItem& item, int32_t groups, float softmax_scale);
// In place: held, rows, scales, moved_slots and num_moved of the item are host memory here.
void RefreshRows(const RefreshRowsItem& item, int32_t groups, int64_t num_rows);

DType EncodedType(DType source, EncodingPolicy::Format format, bool rotated);
struct Pages {
  std::vector<std::byte> bytes;  // [num_pages, page_size, Hkv, D]
  std::vector<float> scales;     // empty, [Hkv] or [num_pages, page_size, Hkv]
};
Pages GatherPages(const GatherPagesItem& item);

struct AttentionLoss {
  std::vector<double> mass, err_sq, ref_sq;  // [Hq]; the last two empty without values
};
AttentionLoss MeasureAttention(const MeasureAttentionParams& params);
std::vector<double> MeasureSpans(const MeasureSpansParams& params);  // [N, 3]
int32_t CheckFinite(const CheckFiniteItem& item);

// Turns channels [0, rotary_dim) of `row` by -delta positions, in fp32 with one rounding for each
// product and sum.
void TurnBack(const RotationTable& rotation, int64_t delta, std::vector<float>& row);

}  // namespace dynsplit::oracle

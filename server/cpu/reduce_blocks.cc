// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>

#include "server/cpu/operations.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {

using Reduction = ScoringPolicy::BlockReduction;
constexpr int64_t kChunk = 512;  // blocks

float Reduce(const float* scores, int64_t length, Reduction reduction) {
  if (reduction == Reduction::kMax) {
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t t = 0; t < length; ++t) {
      if (scores[t] > largest) largest = scores[t];  // false for NaN, which orders lowest
    }
    return largest;
  }
  float sum = 0;  // one addition after the other: the same roundings everywhere
  for (int64_t t = 0; t < length; ++t) sum += scores[t];
  return reduction == Reduction::kMean ? sum / static_cast<float>(length) : sum;
}

}  // namespace

absl::Status ReduceBlocks(const ReduceBlocksParams& params, const Workspace& workspace) {
  const int64_t chunks = CeilDiv(params.num_blocks, kChunk);
  workspace.threads.ParallelFor(params.rows * chunks, [&](int64_t chunk, int /*slot*/) {
    const int64_t r = chunk / chunks;
    const int64_t begin = chunk % chunks * kChunk;
    const int64_t end = std::min(begin + kChunk, params.num_blocks);
    const float* scores = params.token_scores + r * params.num_tokens;
    for (int64_t j = begin; j < end; ++j) {
      const int32_t first = params.block_starts[j];
      params.block_scores[r * params.num_blocks + j] =
          Reduce(scores + first, params.block_starts[j + 1] - first, params.reduction);
    }
  });
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

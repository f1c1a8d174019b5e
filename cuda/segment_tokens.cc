// SPDX-License-Identifier: Apache-2.0
#include "cuda/segment_tokens.h"

#include <algorithm>
#include <bit>

namespace dynsplit::kernels {

int64_t SegmentShape::ChunkSharedBytes(int32_t max_deviation) const {
  constexpr auto kDouble = static_cast<int64_t>(sizeof(double));
  constexpr auto kFloat = static_cast<int64_t>(sizeof(float));
  constexpr auto kLength = static_cast<int64_t>(sizeof(uint16_t));
  return (max_deviation + 1) * kDouble + (int64_t{chunk_tokens} + lookahead) * kFloat +
         chunk_tokens * kLength;
}

int64_t SegmentShape::EmitSharedBytes() const {
  return 2 * int64_t{chunk_tokens} * static_cast<int64_t>(sizeof(uint16_t));
}

SegmentShape SegmentShapeOf(int64_t num_tokens, int32_t lookahead) {
  SegmentShape shape;
  shape.lookahead = lookahead;
  shape.chunk_tokens = std::max(
      kSegmentChunkTokens, static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(lookahead))));
  shape.num_chunks = static_cast<int32_t>(num_tokens / shape.chunk_tokens + 1);
  shape.num_spans = (shape.num_chunks + kSegmentSpanChunks - 1) / kSegmentSpanChunks;
  return shape;
}

}  // namespace dynsplit::kernels

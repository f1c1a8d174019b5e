// SPDX-License-Identifier: Apache-2.0
//
// How SegmentTokens is cut into chunks. Plain numbers, tested without a device.
#pragma once

#include <cstdint>

namespace dynsplit::kernels {

inline constexpr int32_t kSegmentChunkTokens = 1024;  // at least
inline constexpr int32_t kSegmentSpanChunks = 32;

struct SegmentShape {
  int32_t lookahead = 0;     // tokens that decide a block's end, and the longest block
  int32_t chunk_tokens = 0;  // power of two >= lookahead: a block never skips a chunk
  int32_t num_chunks = 0;    // position num_tokens lies in the last
  int32_t num_spans = 0;     // of kSegmentSpanChunks chunks

  int64_t ChunkSharedBytes(int32_t max_deviation) const;  // of the kernel that cuts
  int64_t EmitSharedBytes() const;                        // of the one that writes starts
};

// Requires: 0 < num_tokens < 2^31, 0 < lookahead < 2^13.
SegmentShape SegmentShapeOf(int64_t num_tokens, int32_t lookahead);

}  // namespace dynsplit::kernels

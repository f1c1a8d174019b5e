// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/backend.h"

namespace dynsplit {

DType OutputDType(DType source, EncodingPolicy::Format format, bool rotated) {
  switch (format) {
    case EncodingPolicy::Format::kFloat8E4M3:
      return DType::kFloat8E4M3;
    case EncodingPolicy::Format::kInt8:
      return DType::kInt8;
    case EncodingPolicy::Format::kAsIs:
      break;
  }
  // A turned key is no longer one of the input's codes.
  return rotated && IsQuantized(source) ? DType::kBFloat16 : source;
}

int64_t MaxSegmentStarts(int64_t num_tokens, int32_t block_size, int32_t max_deviation) {
  // Closed blocks have at least this length; then the open block's start, and the end.
  return num_tokens / (block_size - max_deviation) + 2;
}

BlockSummaries DenseSummaries(DType dtype, int32_t num_kv_heads, int32_t head_dim, void* min,
                              void* max, void* mean) {
  const int64_t row_bytes = head_dim * DTypeBytes(dtype);
  BlockSummaries summaries;
  summaries.dtype = dtype;
  summaries.min = static_cast<std::byte*>(min);
  summaries.max = static_cast<std::byte*>(max);
  summaries.mean = static_cast<std::byte*>(mean);
  summaries.block_stride_bytes = num_kv_heads * row_bytes;
  summaries.head_stride_bytes = row_bytes;
  return summaries;
}

}  // namespace dynsplit

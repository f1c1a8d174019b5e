// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "server/pipeline/types.h"

namespace dynsplit::cpu {

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline const std::byte* RowAddress(const TensorView& view, int64_t token, int32_t head) {
  int64_t offset = 0;
  if (view.block_table == nullptr) {
    offset = token * view.token_stride_bytes;
  } else {
    offset = view.block_table[token / view.page_size] * view.page_stride_bytes +
             (token % view.page_size) * view.token_stride_bytes;
  }
  return view.data + offset + head * view.head_stride_bytes;
}

// 1 where the type has no scales.
inline float RowScale(const TensorView& view, int64_t token, int32_t head) {
  if (view.scales == nullptr) return 1.0F;
  return view.scale_granularity == ScaleGranularity::kHead
             ? view.scales[head]
             : view.scales[token * view.num_heads + head];
}

}  // namespace dynsplit::cpu

// SPDX-License-Identifier: Apache-2.0
//
// What the two ways of GatherPages share: an item with its strides filled in.
#pragma once

#include <cuda_runtime_api.h>

#include <span>

#include "absl/status/status.h"
#include "cuda/operations.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {

struct Pages {
  TensorView source;
  const int32_t* kept;
  int64_t num_kept;
  int64_t num_slots;  // whole pages
  std::byte* pages;
  int64_t slot_stride_bytes;
  int64_t head_stride_bytes;
  float* scales;
  int64_t scale_slot_stride;  // of scales per token
  int64_t scale_head_stride;
  bool kept_per_head;
};
Pages PlanPages(const GatherPagesItem& item);

inline constexpr int kGatherBatchItems = 16;  // of a launch, so that parameters stay below 4 KiB

// Rows that keep their bits. Requires: at most kGatherBatchItems items, for which CanCopyTogether
// holds of each and the first.
absl::Status CopyPages(std::span<const GatherPagesItem> items, const Launch& launch);
bool CanCopyTogether(const GatherPagesItem& a, const GatherPagesItem& b);

// Rows that are turned or encoded; likewise.
absl::Status EncodePages(std::span<const GatherPagesItem> items, const Launch& launch);
bool CanEncodeTogether(const GatherPagesItem& a, const GatherPagesItem& b);

// Token in slot `slot` of head `h`. Requires: slot < num_kept.
__device__ inline int64_t TokenAt(const Pages& p, int64_t slot, int h) {
  if (p.kept == nullptr) return slot;
  return p.kept[(p.kept_per_head ? h * p.num_kept : 0) + slot];
}

__device__ inline std::byte* OutputRow(const Pages& p, int64_t slot, int h) {
  return p.pages + slot * p.slot_stride_bytes + h * p.head_stride_bytes;
}

__device__ inline float* TokenScale(const Pages& p, int64_t slot, int h) {
  return p.scales + slot * p.scale_slot_stride + h * p.scale_head_stride;
}

}  // namespace dynsplit::kernels

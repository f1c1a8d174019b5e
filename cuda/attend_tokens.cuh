// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of AttendTokens share. A thread block attends one split of one KV head of one
// item and leaves, for each of the group's query heads, the maximum of the logits (base 2), the sum
// of weights relative to it, and the weighted sum of values; AttendCombineKernel joins the splits
// in their order. Logical rows of an item are its num_tokens chosen ones, then the tail's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "cuda/attend_tokens_plan.h"
#include "cuda/tensor.cuh"
#include "server/pipeline/backend.h"

namespace dynsplit::kernels {

inline constexpr int kAttendThreads = kAttendWarps * kWarp;

struct AttendPartials {
  float2* sums = nullptr;    // [partials, group]: maximum (base 2) and sum
  float* outputs = nullptr;  // [partials, group, D], not divided by the sum
};

// Items of one launch; at most the path's number of items.
struct AttendLaunch {
  std::span<const AttendTokensItem> items;
  std::span<const AttendCut> cuts;
  int32_t num_blocks = 0;  // = partials
  bool tokens_per_head = false;
  float scale_log2 = 0;
  AttendPartials out;

  int group() const { return items[0].queries.num_heads / items[0].keys.num_heads; }
};

// Position of a block's work within its item; f(i) is the cut of item i.
template <typename CutOf>
__device__ inline int ItemOfBlock(int num_items, int block, CutOf&& cut_of) {
  int low = 0;
  int high = num_items - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (cut_of(middle).first_partial <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Tensor cores: at most 16 query heads a KV head, D 64 or 128, queries of a 16-bit type, keys and
// values of one type, which is theirs or a quantised one, rows in multiples of 16 bytes, not paged.
inline constexpr int kAttendMmaItems = kAttendMaxLaunchItems;
bool UsesTensorCores(const AttendTokensParams& params);
cudaError_t AttendTokensMma(const AttendLaunch& launch, cudaStream_t stream);

// Everything else, in fp32 arithmetic.
inline constexpr int kAttendSimtItems = 32;
cudaError_t AttendTokensSimt(const AttendLaunch& launch, cudaStream_t stream);

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// One pass of MeasureAttention: softmax attention of the window's query rows over a set of items,
// split over thread blocks. Row r of KV head h is head h * group + r / window, query r % window.
#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "cuda/exponent.cuh"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {

// Queries as rows [Hkv, rows, depth_padded]. high + low are the fp32 rows in halves of the keys'
// 16-bit type (tensor cores), null for others; low is null where the queries are of that type to
// begin with.
struct Queries {
  const float* packed = nullptr;
  const void* high = nullptr;
  const void* low = nullptr;
  int window = 0;
  int group = 0;
  int rows = 0;
  int depth_padded = 0;
};

// Partial results of a pass; row index is h * rows + r.
struct Partials {
  float2* sums = nullptr;    // [splits, Hkv * rows]: maximum (base 2) and sum
  float* outputs = nullptr;  // [splits, Hkv * rows, D], not divided by the sum; null without values
  int splits = 0;
};

inline constexpr int kMarkedItems = 64;  // of an element of Pass::marks

struct Pass {
  Queries queries;
  TensorView keys;
  bool keys_aligned = false;
  TensorView values;  // data null: sums only
  bool values_aligned = false;
  const int32_t* positions = nullptr;  // [groups, num_items] position of item n; null = n
  bool positions_per_head = false;
  bool keys_by_position = false;  // keys are the original ones: item n is row positions[n]
  int64_t num_items = 0;
  int64_t num_tokens = 0;  // T
  int num_kv_heads = 0;
  float scale_log2 = 0;
  Partials out;
  // Original items to take the sums of on the way: bit n % 64 of element n / 64, a group each
  // mark_stride() elements. Null = none. AttendGroup only.
  const uint2* marks = nullptr;
  float2* marked_sums = nullptr;  // as out.sums

  __host__ __device__ int64_t mark_stride() const {
    return (num_items + kMarkedItems - 1) / kMarkedItems;
  }
  __device__ int64_t Position(int h, int64_t n) const {
    return positions == nullptr ? n : positions[(positions_per_head ? h * num_items : 0) + n];
  }
};

inline constexpr int kAttendMmaMaxDim = 128;
// True for 16-bit queries, keys and values of one type, of at most kAttendMmaMaxDim channels.
bool UsesTensorCores(const Pass& pass, DType queries_dtype);
absl::Status AttendMma(const Pass& pass, cudaStream_t stream);
// Any types and head dimension, fp32 arithmetic on the packed queries.
absl::Status AttendSimt(const Pass& pass, cudaStream_t stream);
inline constexpr int kAttendTile = 64;  // rows of a thread block, and items at a time, in both

// Faster where it serves: Hopper, with values, 64 or 128 channels, aligned rows; for original items
// and for kept ones with their own keys.
bool UsesGroupMma(const Pass& pass, DType queries_dtype);
int GroupSplits(const Pass& pass, int num_sms);  // one wave of thread blocks
absl::Status AttendGroup(const Pass& pass, cudaStream_t stream);

}  // namespace dynsplit::kernels

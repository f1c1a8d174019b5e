// SPDX-License-Identifier: Apache-2.0
//
// Device parts that both implementations of column_softmax.h share.
#pragma once

#include <cmath>

#include "cuda/column_softmax.h"
#include "cuda/cuda_status.h"
#include "cuda/exponent.cuh"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {

struct ColumnArgs {
  ColumnSoftmax op;
  ColumnShape shape;
  bool aligned;         // chunks of items and items_low
  int window_padded;    // rows a query head
  int rows;             // rows a KV head
  float scale_log2;     // softmax_scale * log2(e); times power in the column pass
  const void* queries;  // packed [Hkv, rows, depth_padded]
  float2* partials;     // [Hkv, rows, num_partials]: maximum and sum, base 2
  int num_partials;
  float* lse_log2;  // [Hkv, rows], times power; +infinity in padding rows
};

// Last item that row `r` sees.
__device__ inline int64_t LastVisible(const ColumnArgs& args, int r) {
  if (!args.op.causal) return args.shape.num_items - 1;
  const int i = min(r % args.window_padded, args.shape.window - 1);
  return args.shape.num_items - args.shape.window + i;
}

// log2 of the item's weight.
__device__ inline float LogLength(const ColumnArgs& args, int64_t n) {
  if (args.op.block_starts == nullptr || n >= args.shape.num_items) return 0;
  return log2f(static_cast<float>(args.op.block_starts[n + 1] - args.op.block_starts[n]));
}

// Packs queries as [Hkv, rows, depth_padded] of Out, zeros in the padding. grid-strided by chunk.
template <typename Out>
__global__ void PackQueriesKernel(ColumnArgs args, bool aligned, int depth_padded, int64_t count,
                                  Chunk<Out>* out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const TensorView& queries = args.op.queries;
  const int row_chunks = depth_padded / kChunk;
  const int64_t row = index / row_chunks;
  const auto chunk = static_cast<int>(index - row * row_chunks);
  const auto h = static_cast<int>(row / args.rows);
  const auto r = static_cast<int>(row - static_cast<int64_t>(h) * args.rows);
  const int g = r / args.window_padded;
  const int i = r - g * args.window_padded;
  float values[kChunk] = {};
  if (i < args.shape.window && chunk * kChunk < args.shape.depth) {
    const int head_chunks = queries.head_dim / kChunk;
    const bool low = chunk >= head_chunks;
    LoadAnyValues(queries, aligned, i, h * args.shape.group + g, low ? chunk - head_chunks : chunk,
                  values);
    if (args.op.items_low.data != nullptr) {
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        values[c] = low ? fminf(values[c], 0.0F) : fmaxf(values[c], 0.0F);
      }
    }
  }
  Chunk<Out> packed;
#pragma unroll
  for (int c = 0; c < kChunk; ++c) packed.values[c] = static_cast<Out>(values[c]);
  out[index] = packed;
}

// One warp a row: joins the row's partial sums, or takes the supplied log-sum-exp.
inline constexpr int kJoinThreads = 256;
static __global__ void __launch_bounds__(kJoinThreads) JoinRowsKernel(ColumnArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kJoinThreads + threadIdx.x) / kWarp;
  if (row >= static_cast<int64_t>(args.shape.num_kv_heads) * args.rows) return;
  const auto h = static_cast<int>(row / args.rows);
  const auto r = static_cast<int>(row - static_cast<int64_t>(h) * args.rows);
  const int g = r / args.window_padded;
  const int i = r - g * args.window_padded;
  float lse_log2 = INFINITY;
  if (i < args.shape.window && args.op.lse != nullptr) {
    lse_log2 =
        args.op
            .lse[static_cast<int64_t>(i) * args.op.queries.num_heads + h * args.shape.group + g] *
        kLog2E;
  } else if (i < args.shape.window) {
    SoftmaxSum total;
    for (int part = lane; part < args.num_partials; part += kWarp) {
      const float2 partial = args.partials[row * args.num_partials + part];
      total.Merge({partial.x, partial.y});
    }
    total.MergeLanes(kWarp);
    lse_log2 = total.maximum + log2f(total.sum);
  }
  if (lane == 0) args.lse_log2[row] = lse_log2 * args.op.power;
}

// Scratch of a run; the packed queries first.
struct ColumnScratch {
  int64_t queries_bytes = 0;
  int64_t partials_bytes = 0;
  int64_t lse_bytes = 0;
  static int64_t Align(int64_t size) { return CeilDiv(size, 256) * 256; }
  int64_t size_bytes() const {
    return Align(queries_bytes) + Align(partials_bytes) + Align(lse_bytes);
  }
  void Assign(std::byte* base, ColumnArgs& args) const {
    args.queries = base;
    args.partials = reinterpret_cast<float2*>(base + Align(queries_bytes));
    args.lse_log2 = reinterpret_cast<float*>(base + Align(queries_bytes) + Align(partials_bytes));
  }
};

inline ColumnScratch ScratchOf(const ColumnArgs& args, int depth_padded, int element_bytes) {
  const int64_t rows = static_cast<int64_t>(args.shape.num_kv_heads) * args.rows;
  return {.queries_bytes = rows * depth_padded * element_bytes,
          .partials_bytes = args.op.lse != nullptr
                                ? 0
                                : rows * args.num_partials * static_cast<int64_t>(sizeof(float2)),
          .lse_bytes = rows * static_cast<int64_t>(sizeof(float))};
}

template <typename Out>
absl::Status PackQueries(const ColumnArgs& args, int depth_padded, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t count =
      static_cast<int64_t>(args.shape.num_kv_heads) * args.rows * (depth_padded / kChunk);
  PackQueriesKernel<Out><<<static_cast<unsigned>(CeilDiv(count, kThreads)), kThreads, 0, stream>>>(
      args, HasAlignedChunks(args.op.queries), depth_padded, count,
      static_cast<Chunk<Out>*>(const_cast<void*>(args.queries)));
  return LaunchStatus("PackQueriesKernel");
}

inline absl::Status JoinRows(const ColumnArgs& args, cudaStream_t stream) {
  const int64_t threads = static_cast<int64_t>(args.shape.num_kv_heads) * args.rows * kWarp;
  JoinRowsKernel<<<static_cast<unsigned>(CeilDiv(threads, kJoinThreads)), kJoinThreads, 0,
                   stream>>>(args);
  return LaunchStatus("JoinRowsKernel");
}

}  // namespace dynsplit::kernels

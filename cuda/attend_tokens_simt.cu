// SPDX-License-Identifier: Apache-2.0
//
// AttendTokens in fp32 arithmetic, for every type, head dimension, stride and number of heads.
// LanesPerRow lanes share a row; each such group of lanes keeps its own softmax over every n-th
// row, for kHeads query heads.
#include "cuda/attend_tokens.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/exponent.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kHeads = 4;  // query heads of a thread block
constexpr int kMaxOutputs = kAttendThreads * kChunk * kMaxChunksPerLane;  // of a head, all groups

struct SimtItem {
  AttendTokensItem item;
  AttendCut cut;
  bool queries_aligned;
  bool keys_aligned;
  bool values_aligned;
  bool tail_keys_aligned;
  bool tail_values_aligned;
};

struct SimtBatch {
  SimtItem items[kAttendSimtItems];
  AttendPartials out;
  int num_items;
  int group;
  int lanes;
  bool tokens_per_head;
  float scale_log2;
};
static_assert(sizeof(SimtBatch) < 32000, "parameters of a kernel are at most 32764 bytes");

// What a lane holds of its group's softmax.
struct LaneState {
  float maximum[kHeads];
  float sum[kHeads];
  float output[kHeads][kMaxChunksPerLane][kChunk];
};
using LaneQueries = float[kHeads][kMaxChunksPerLane][kChunk];

__device__ void LoadQueries(const SimtBatch& batch, const SimtItem& entry, int h, int first_head,
                            int lane, LaneQueries& queries) {
  const TensorView& view = entry.item.queries;
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
#pragma unroll
    for (int part = 0; part < kMaxChunksPerLane; ++part) {
      const int chunk = lane + part * batch.lanes;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) queries[j][part][i] = 0;
      if (first_head + j < batch.group && chunk * kChunk < view.head_dim) {
        LoadAnyValues(view, entry.queries_aligned, 0, h * batch.group + first_head + j, chunk,
                      queries[j][part]);
      }
    }
  }
}

// The lane's chunks of row `index`; zeros beyond the row.
__device__ void LoadRow(const TensorView& view, bool aligned, int64_t index, int h, int lane,
                        int lanes, float (&out)[kMaxChunksPerLane][kChunk]) {
#pragma unroll
  for (int part = 0; part < kMaxChunksPerLane; ++part) {
    const int chunk = lane + part * lanes;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[part][i] = 0;
    if (chunk * kChunk < view.head_dim) LoadAnyValues(view, aligned, index, h, chunk, out[part]);
  }
}

// Takes logical row `row` into the state; all lanes of the warp take part, with valid rows or not.
__device__ void AddRow(const SimtBatch& batch, const SimtItem& entry, int h, int64_t row,
                       bool valid, int lane, const LaneQueries& queries, LaneState& state) {
  const AttendTokensItem& item = entry.item;
  const bool in_tail = row >= item.num_tokens;
  int64_t index = in_tail ? row - item.num_tokens : row;
  if (valid && !in_tail && item.tokens != nullptr) {
    index = item.tokens[(batch.tokens_per_head ? h * item.num_tokens : 0) + row];
  }
  float loaded[kMaxChunksPerLane][kChunk] = {};
  if (valid) {
    LoadRow(in_tail ? item.tail_keys : item.keys,
            in_tail ? entry.tail_keys_aligned : entry.keys_aligned, index, h, lane, batch.lanes,
            loaded);
  }
  float weights[kHeads];
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    float logit = 0;
#pragma unroll
    for (int part = 0; part < kMaxChunksPerLane; ++part) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) logit = fmaf(queries[j][part][i], loaded[part][i], logit);
    }
    logit = GroupSum(logit, batch.lanes) * batch.scale_log2;
    if (!valid) logit = kNoLogit;
    const float larger = fmaxf(state.maximum[j], logit);
    const float shrink = Exp2(state.maximum[j] - larger);
    weights[j] = valid ? Exp2(logit - larger) : 0.0F;
    state.maximum[j] = larger;
    state.sum[j] = fmaf(state.sum[j], shrink, weights[j]);
#pragma unroll
    for (int part = 0; part < kMaxChunksPerLane; ++part) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) state.output[j][part][i] *= shrink;
    }
  }
  if (!valid) return;
  LoadRow(in_tail ? item.tail_values : item.values,
          in_tail ? entry.tail_values_aligned : entry.values_aligned, index, h, lane, batch.lanes,
          loaded);
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
#pragma unroll
    for (int part = 0; part < kMaxChunksPerLane; ++part) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        state.output[j][part][i] = fmaf(weights[j], loaded[part][i], state.output[j][part][i]);
      }
    }
  }
}

// Joins the groups of lanes in their order and writes the block's part of its partial.
__device__ void WritePartial(const SimtBatch& batch, int head_dim, int first_head,
                             const LaneState& state) {
  __shared__ float2 sums[kHeads][kAttendThreads];
  __shared__ float outputs[kMaxOutputs];  // [groups of lanes, head_dim], of one head at a time
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % batch.lanes;
  const int own = thread / batch.lanes;
  const int groups = kAttendThreads / batch.lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * batch.group + first_head;
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    __syncthreads();  // the last head's outputs are read
    if (lane == 0) sums[j][own] = make_float2(state.maximum[j], state.sum[j]);
#pragma unroll
    for (int part = 0; part < kMaxChunksPerLane; ++part) {
      const int chunk = lane + part * batch.lanes;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (chunk * kChunk < head_dim) {
          outputs[own * head_dim + chunk * kChunk + i] = state.output[j][part][i];
        }
      }
    }
    __syncthreads();
    if (first_head + j >= batch.group) continue;
    for (int channel = thread; channel < head_dim; channel += kAttendThreads) {
      SoftmaxSum total;
      for (int i = 0; i < groups; ++i) total.Merge({sums[j][i].x, sums[j][i].y});
      float output = 0;
      for (int i = 0; i < groups; ++i) {
        output = fmaf(outputs[i * head_dim + channel], Exp2(sums[j][i].x - total.maximum), output);
      }
      batch.out.outputs[(first + j) * head_dim + channel] = output;
      if (channel == 0) batch.out.sums[first + j] = make_float2(total.maximum, total.sum);
    }
  }
}

// grid (partials, blocks of query heads)
__global__ void __launch_bounds__(kAttendThreads)
    AttendTokensSimtKernel(const __grid_constant__ SimtBatch batch) {
  AllowDependents();
  const int lane = static_cast<int>(threadIdx.x) % batch.lanes;
  const int own = static_cast<int>(threadIdx.x) / batch.lanes;
  const int groups = kAttendThreads / batch.lanes;
  const auto block = static_cast<int>(blockIdx.x);
  const int first_head = static_cast<int>(blockIdx.y) * kHeads;
  const SimtItem& entry = batch.items[ItemOfBlock(
      batch.num_items, block, [&](int i) -> const AttendCut& { return batch.items[i].cut; })];
  const AttendCut& cut = entry.cut;
  const int local = block - cut.first_partial;
  const int h = local / cut.splits;
  const int64_t begin = static_cast<int64_t>(local - h * cut.splits) * cut.rows_per_split;
  const int64_t end =
      min(begin + cut.rows_per_split, entry.item.num_tokens + entry.item.tail_keys.num_tokens);
  LaneQueries queries;
  LoadQueries(batch, entry, h, first_head, lane, queries);
  LaneState state;
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    state.maximum[j] = kNoLogit;
    state.sum[j] = 0;
#pragma unroll
    for (int part = 0; part < kMaxChunksPerLane; ++part) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) state.output[j][part][i] = 0;
    }
  }
  for (int64_t first = begin; first < end; first += groups) {
    AddRow(batch, entry, h, first + own, first + own < end, lane, queries, state);
  }
  WritePartial(batch, entry.item.queries.head_dim, first_head, state);
}

}  // namespace

cudaError_t AttendTokensSimt(const AttendLaunch& launch, cudaStream_t stream) {
  SimtBatch batch = {};
  batch.out = launch.out;
  batch.num_items = static_cast<int>(launch.items.size());
  batch.group = launch.group();
  batch.lanes = LanesPerRow(launch.items[0].queries.head_dim);
  batch.tokens_per_head = launch.tokens_per_head;
  batch.scale_log2 = launch.scale_log2;
  for (size_t i = 0; i < launch.items.size(); ++i) {
    const AttendTokensItem& item = launch.items[i];
    batch.items[i] = {.item = item,
                      .cut = launch.cuts[i],
                      .queries_aligned = HasAlignedChunks(item.queries),
                      .keys_aligned = HasAlignedChunks(item.keys),
                      .values_aligned = HasAlignedChunks(item.values),
                      .tail_keys_aligned = HasAlignedChunks(item.tail_keys),
                      .tail_values_aligned = HasAlignedChunks(item.tail_values)};
  }
  const dim3 grid(static_cast<unsigned>(launch.num_blocks),
                  static_cast<unsigned>(CeilDiv(batch.group, kHeads)));
  AttendTokensSimtKernel<<<grid, kAttendThreads, 0, stream>>>(batch);
  return cudaGetLastError();
}

}  // namespace dynsplit::kernels

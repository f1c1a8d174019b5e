// SPDX-License-Identifier: Apache-2.0
//
// One thread block selects for one group of one item, without scratch. Everything is integer
// arithmetic on ordered scores, so the result is exact and the same on every run.
//
//   threshold  the score of the last block taken, by weighted radix selection: a block weighs its
//              free tokens, those between the prefix and the suffix that are taken in any case.
//              Histograms are of integers, so the order of atomics does not show
//   sum        per run of consecutive blocks: free tokens above the threshold, and at it
//   emit       by prefix sums over the runs, then over the blocks of a run: what each block gives,
//              and where. A warp's lanes write neighbouring tokens, whichever blocks they are of
//
// Scores and starts are read once a step, but for the first time from the caches.
#include <algorithm>

#include "cuda/cuda_status.h"
#include "cuda/operations.h"
#include "cuda/ordered_score.cuh"
#include "cuda/select_blocks.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = kSelectThreads;
constexpr int kWarps = kThreads / kWarp;
constexpr int kThreadBlocksPerSm = 2;
constexpr int kLinesAhead = 4;  // of 32 blocks, requested before the first is used
constexpr int kRadixPasses = 3;
constexpr int kRadixBits = 11;  // in the last pass 10
constexpr int kBins = 1 << kRadixBits;
constexpr int kScoreBits = 32;

struct Item {
  const float* scores;  // [groups, B]
  const int32_t* starts;
  int32_t* tokens;  // [groups, num_selected]
  int32_t num_blocks;
  int32_t num_tokens;
  int32_t prefix_end;
  int32_t suffix_begin;
  int32_t num_selected;
  int32_t run_blocks;
};

struct Batch {
  Item items[kSelectBatchItems];
};

struct Block {
  uint32_t key;   // of its score
  int32_t begin;  // first free token
  int32_t count;  // free tokens
};

// Free tokens of a run: above the threshold, and at it; then those before the run: taken, and at
// the threshold.
struct Run {
  int32_t taken;
  int32_t ties;
};

struct Shared {
  int32_t bins[kBins];
  Run runs[kThreads];
  int32_t warp_sums[kWarps];
  uint32_t threshold;
  int32_t wanted;  // free tokens still to take among those with the threshold's known digits
};

// A thread's view of its group.
struct Group {
  const Item& item;
  const float* scores;
  int lane;
  int warp;

  // Beyond the last block: no tokens. Branch-free, so that requests do not wait for each other.
  __device__ Block Load(uint32_t block) const {
    const auto last = static_cast<uint32_t>(item.num_blocks) - 1;
    const uint32_t i = min(block, last);
    const int32_t begin = max(item.starts[i], item.prefix_end);
    const int32_t end = min(item.starts[i + 1], item.suffix_begin);
    return {OrderedScore(scores[i]), begin, block <= last ? max(end - begin, 0) : 0};
  }
  __device__ int num_runs() const {
    return static_cast<int>((static_cast<uint32_t>(item.num_blocks) + item.run_blocks - 1) /
                            item.run_blocks);
  }
};

__device__ int32_t InclusiveWarpSum(int32_t value, int lane) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int32_t other = __shfl_up_sync(kFullWarp, value, offset);
    if (lane >= offset) value += other;
  }
  return value;
}

// Sum over the threads before this one; all threads of the block take part.
__device__ int32_t SumBefore(int32_t value, const Group& group, Shared& shared) {
  const int32_t inclusive = InclusiveWarpSum(value, group.lane);
  if (group.lane == kWarp - 1) shared.warp_sums[group.warp] = inclusive;
  __syncthreads();
  const int32_t before =
      __reduce_add_sync(kFullWarp, group.lane < group.warp ? shared.warp_sums[group.lane] : 0);
  __syncthreads();  // the sums have been read
  return before + inclusive - value;
}

// What the ties before have left of `wanted` for `ties` tokens.
__device__ int32_t TakeTies(int32_t wanted, int32_t ties_before, int32_t ties) {
  return min(max(wanted - ties_before, 0), ties);
}

// All lanes of the warp take part. A warp of one digit, as equal scores have it, adds once.
__device__ void AddToBin(int32_t (&bins)[kBins], bool counts, uint32_t digit, int32_t weight,
                         int lane) {
  const unsigned votes = __ballot_sync(kFullWarp, counts);
  if (votes == 0) return;
  const int leader = __ffs(static_cast<int>(votes)) - 1;
  const uint32_t first = __shfl_sync(kFullWarp, digit, leader);
  if (__all_sync(kFullWarp, !counts || digit == first)) {
    const int32_t sum = __reduce_add_sync(kFullWarp, counts ? weight : 0);
    if (lane == leader) atomicAdd(&bins[first], sum);
  } else if (counts) {
    atomicAdd(&bins[digit], weight);
  }
}

// Finds the digit at `shift` of the threshold: from the highest bin down, the one in which the
// wanted tokens end. Requires: they end in one.
__device__ void FindDigit(int shift, const Group& group, Shared& shared) {
  constexpr int kBinsPerThread = kBins / kThreads;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
  int32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) sum += shared.bins[top - i];
  const int32_t wanted = shared.wanted;
  const int32_t before = SumBefore(sum, group, shared);
  if (before >= wanted || before + sum < wanted) return;
  int32_t left = wanted - before;
  int bin = top;
  while (shared.bins[bin] < left) left -= shared.bins[bin--];
  shared.threshold |= static_cast<uint32_t>(bin) << shift;
  shared.wanted = left;
}

// Leaves the threshold, and how many tokens to take of the blocks at it, in shared memory.
__device__ void FindThreshold(int32_t num_free, const Group& group, Shared& shared) {
  if (threadIdx.x == 0) {
    shared.threshold = num_free > 0 ? 0 : ~0U;
    shared.wanted = num_free;
  }
  for (int pass = 0; num_free > 0 && pass < kRadixPasses; ++pass) {
    const int shift = max(kScoreBits - (pass + 1) * kRadixBits, 0);
    const int known_bits = pass * kRadixBits;
    const uint32_t known = pass == 0 ? 0 : ~0U << (kScoreBits - known_bits);
    const uint32_t digits = pass + 1 < kRadixPasses ? kBins - 1 : kBins / 2 - 1;
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads)
      shared.bins[bin] = 0;
    __syncthreads();
    const uint32_t threshold = shared.threshold;
    for (uint32_t line = group.warp * kWarp; line < static_cast<uint32_t>(group.item.num_blocks);
         line += kLinesAhead * kThreads) {
      Block blocks[kLinesAhead];
#pragma unroll
      for (int i = 0; i < kLinesAhead; ++i)
        blocks[i] = group.Load(line + i * kThreads + group.lane);
#pragma unroll
      for (const Block& block : blocks) {
        const bool counts = block.count > 0 && (block.key & known) == threshold;
        AddToBin(shared.bins, counts, block.key >> shift & digits, block.count, group.lane);
      }
    }
    __syncthreads();
    FindDigit(shift, group, shared);
    __syncthreads();
  }
  __syncthreads();
}

// What each run gives and where its tokens go, by prefix sums over the runs.
__device__ void SumRuns(const Group& group, Shared& shared) {
  const uint32_t threshold = shared.threshold;
  const int num_runs = group.num_runs();
  for (int run = group.warp; run < num_runs; run += kWarps) {
    const uint32_t first = static_cast<uint32_t>(run) * group.item.run_blocks;
    Run sums = {0, 0};
    for (int32_t line = 0; line < group.item.run_blocks; line += kWarp) {
      const Block block = group.Load(first + line + group.lane);
      sums.taken += block.key > threshold ? block.count : 0;
      sums.ties += block.key == threshold ? block.count : 0;
    }
    sums.taken = __reduce_add_sync(kFullWarp, sums.taken);
    sums.ties = __reduce_add_sync(kFullWarp, sums.ties);
    if (group.lane == 0) shared.runs[run] = sums;
  }
  __syncthreads();
  const auto run = static_cast<int>(threadIdx.x);
  Run sums = {0, 0};
  if (run < num_runs) sums = shared.runs[run];
  const int32_t ties_before = SumBefore(sums.ties, group, shared);
  sums.taken += TakeTies(shared.wanted, ties_before, sums.ties);
  const int32_t taken_before = SumBefore(sums.taken, group, shared);
  if (run < num_runs) shared.runs[run] = {taken_before, ties_before};
  __syncthreads();
}

// Writes the tokens that 32 blocks give, lane by lane `count` from `begin` on, in order; returns
// their number. All lanes of the warp take part.
__device__ int32_t EmitLine(int32_t begin, int32_t count, int lane, int32_t* out) {
  if (__ballot_sync(kFullWarp, count > 0) == 0) return 0;
  const int32_t end = InclusiveWarpSum(count, lane);
  const int32_t shift = begin - (end - count);  // token - place
  const int32_t total = __shfl_sync(kFullWarp, end, kWarp - 1);
  for (int32_t first = 0; first < total; first += kWarp) {
    const int32_t place = first + lane;
    int owner = 0;  // lanes whose tokens end at or before the place
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      if (__shfl_sync(kFullWarp, end, owner + step - 1) <= place) owner += step;
    }
    const int32_t token = place + __shfl_sync(kFullWarp, shift, owner);
    if (place < total) out[place] = token;
  }
  return total;
}

__device__ void EmitRuns(const Group& group, const Shared& shared, int32_t* out) {
  const uint32_t threshold = shared.threshold;
  const int32_t wanted = shared.wanted;
  const int num_runs = group.num_runs();
  for (int run = group.warp; run < num_runs; run += kWarps) {
    const uint32_t first = static_cast<uint32_t>(run) * group.item.run_blocks;
    Run before = shared.runs[run];
    for (int32_t line = 0; line < group.item.run_blocks; line += kWarp) {
      const Block block = group.Load(first + line + group.lane);
      const int32_t ties = block.key == threshold ? block.count : 0;
      int32_t taken = block.key > threshold ? block.count : 0;
      if (__ballot_sync(kFullWarp, ties > 0) != 0) {
        const int32_t ties_end = InclusiveWarpSum(ties, group.lane);
        taken += TakeTies(wanted, before.ties + ties_end - ties, ties);
        before.ties += __shfl_sync(kFullWarp, ties_end, kWarp - 1);
      }
      before.taken += EmitLine(block.begin, taken, group.lane, out + before.taken);
    }
  }
}

// grid (groups, items)
__global__ void __launch_bounds__(kThreads, kThreadBlocksPerSm)
    SelectBlocksKernel(const __grid_constant__ Batch batch) {
  __shared__ Shared shared;
  const Item& item = batch.items[blockIdx.y];
  const Group group = {.item = item,
                       .scores = item.scores + static_cast<int64_t>(blockIdx.x) * item.num_blocks,
                       .lane = static_cast<int>(threadIdx.x) % kWarp,
                       .warp = static_cast<int>(threadIdx.x) / kWarp};
  int32_t* const out = item.tokens + static_cast<int64_t>(blockIdx.x) * item.num_selected;
  const int32_t num_suffix = item.num_tokens - item.suffix_begin;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < item.prefix_end; i += kThreads) {
    out[i] = i;
  }
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < num_suffix; i += kThreads) {
    out[item.num_selected - num_suffix + i] = item.suffix_begin + i;
  }
  FindThreshold(item.num_selected - num_suffix - item.prefix_end, group, shared);
  SumRuns(group, shared);
  EmitRuns(group, shared, out + item.prefix_end);
}

}  // namespace

absl::Status SelectBlocks(const SelectBlocksParams& params, const Launch& launch) {
  if (params.groups == 0) return absl::OkStatus();
  for (size_t first = 0; first < params.items.size(); first += kSelectBatchItems) {
    const auto items = params.items.subspan(
        first, std::min<size_t>(kSelectBatchItems, params.items.size() - first));
    Batch batch = {};
    for (size_t i = 0; i < items.size(); ++i) {
      const SelectBlocksItem& item = items[i];
      batch.items[i] = {.scores = item.block_scores,
                        .starts = item.block_starts,
                        .tokens = item.tokens,
                        .num_blocks = static_cast<int32_t>(item.num_blocks),
                        .num_tokens = static_cast<int32_t>(item.num_tokens),
                        .prefix_end = static_cast<int32_t>(item.prefix_end),
                        .suffix_begin = static_cast<int32_t>(item.suffix_begin),
                        .num_selected = static_cast<int32_t>(item.num_selected),
                        .run_blocks = static_cast<int32_t>(SelectRunBlocks(item.num_blocks))};
    }
    const dim3 grid(static_cast<unsigned>(params.groups), static_cast<unsigned>(items.size()));
    SelectBlocksKernel<<<grid, kThreads, 0, launch.stream>>>(batch);
    if (absl::Status status = LaunchStatus("SelectBlocksKernel"); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::kernels

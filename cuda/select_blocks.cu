// SPDX-License-Identifier: Apache-2.0
//
// One thread block selects for one group of one item, without scratch. Everything is integer
// arithmetic on ordered scores, so the result is exact and the same on every run.
//
//   load       every warp takes a run of consecutive blocks, in lines of 32, and keeps keys and
//              weights in registers, unless the item is so long that each step reads them again
//   threshold  the score of the last block taken, by weighted radix selection: a block weighs its
//              free tokens, those between the prefix and the suffix that are taken in any case.
//              Digits are of the distance from the lowest score, from its first bit that is not
//              always 0: scores share their leading bits, and lanes would wait for each other at
//              few bins. Histograms are of integers, so the order of atomics does not show
//   sum        per warp: free tokens above the threshold, and at it
//   emit       by prefix sums over the warps, then over the blocks of a line: what each block
//              gives, and where. A warp's lanes write neighbouring tokens, whichever blocks they
//              are of
#include <algorithm>

#include "cuda/cuda_status.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/operations.h"
#include "cuda/ordered_score.cuh"
#include "cuda/select_blocks.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = kSelectThreads;
constexpr int kWarps = kThreads / kWarp;
static_assert(kWarps == kWarp, "a lane each for the sums of all warps");
constexpr int kLinesAhead = 4;  // requested before the first is used, where none are held
constexpr int kRadixBits = 11;
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

// Free tokens: above the threshold, and at it; or those before a warp's: taken, and at the
// threshold.
struct Sums {
  int32_t taken;
  int32_t ties;
};

struct Range {
  uint32_t lowest;
  uint32_t highest;
};

struct Shared {
  int32_t bins[kBins];
  int32_t shifts[kWarps][kWarp];  // token - place, of the blocks of a line that give any
  Range ranges[kWarps];
  Sums sums[kWarps];
  int32_t bin_sums[kWarps];
  uint32_t threshold;
  int32_t wanted;  // free tokens still to take among those with the threshold's known digits
};

// What a warp takes of its group.
struct Run {
  const Item& item;
  const float* scores;
  uint32_t first;
  uint32_t end;
  int num_lines;
  int lane;
  int warp;

  __device__ Run(const Item& item_of, int group)
      : item(item_of),
        scores(item.scores + static_cast<int64_t>(group) * item.num_blocks),
        lane(static_cast<int>(threadIdx.x) % kWarp),
        warp(static_cast<int>(threadIdx.x) / kWarp) {
    const auto num_blocks = static_cast<uint32_t>(item.num_blocks);
    first = min(static_cast<uint32_t>(warp) * item.run_blocks, num_blocks);
    end = min(first + item.run_blocks, num_blocks);
    num_lines = static_cast<int>((end - first + kWarp - 1) / kWarp);
  }
  // Beyond the run: no tokens. Branch-free, so that requests do not wait for each other. Requires:
  // num_lines > 0.
  __device__ Block Load(int line) const {
    const uint32_t block = first + line * kWarp + lane;
    const uint32_t i = min(block, end - 1);
    const int32_t begin = max(item.starts[i], item.prefix_end);
    const int32_t stop = min(item.starts[i + 1], item.suffix_begin);
    return {OrderedScore(scores[i]), begin, block < end ? max(stop - begin, 0) : 0};
  }
};

// The lines of a run, kHeld of them in registers; with 0, read again each time.
template <int kHeld>
struct Lines {
  Block held[kHeld > 0 ? kHeld : 1];
  uint32_t lowest = 0;  // subtracted from keys

  __device__ explicit Lines(const Run& run) {
    if (run.num_lines == 0) return;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = run.Load(i);
  }
  // Calls f(block), in order. All lanes of the warp take part.
  template <typename F>
  __device__ void ForEach(const Run& run, F&& f) const {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (i < run.num_lines) f(Block{held[i].key - lowest, held[i].begin, held[i].count});
      }
    } else {
      for (int line = 0; line < run.num_lines; line += kLinesAhead) {
        Block blocks[kLinesAhead];
#pragma unroll
        for (int i = 0; i < kLinesAhead; ++i) blocks[i] = run.Load(line + i);
#pragma unroll
        for (const Block& block : blocks) f(Block{block.key - lowest, block.begin, block.count});
      }
    }
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
__device__ void FindDigit(int shift, const Run& run, Shared& shared) {
  constexpr int kBinsPerThread = kBins / kThreads;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
  int32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) sum += shared.bins[top - i];
  const int32_t wanted = shared.wanted;
  const int32_t inclusive = InclusiveWarpSum(sum, run.lane);
  if (run.lane == kWarp - 1) shared.bin_sums[run.warp] = inclusive;
  __syncthreads();
  const int32_t warps_before =
      __reduce_add_sync(kFullWarp, run.lane < run.warp ? shared.bin_sums[run.lane] : 0);
  const int32_t before = warps_before + inclusive - sum;
  if (before >= wanted || before + sum < wanted) return;
  int32_t left = wanted - before;
  int bin = top;
  while (shared.bins[bin] < left) left -= shared.bins[bin--];
  shared.threshold |= static_cast<uint32_t>(bin) << shift;
  shared.wanted = left;
}

// Of the blocks with free tokens.
template <int kHeld>
__device__ Range FindRange(const Run& run, const Lines<kHeld>& lines, Shared& shared) {
  Range range = {~0U, 0};
  lines.ForEach(run, [&](const Block& block) {
    if (block.count == 0) return;
    range.lowest = min(range.lowest, block.key);
    range.highest = max(range.highest, block.key);
  });
  range.lowest = __reduce_min_sync(kFullWarp, range.lowest);
  range.highest = __reduce_max_sync(kFullWarp, range.highest);
  if (run.lane == 0) shared.ranges[run.warp] = range;
  __syncthreads();
  range = shared.ranges[run.lane];
  return {__reduce_min_sync(kFullWarp, range.lowest), __reduce_max_sync(kFullWarp, range.highest)};
}

// Leaves the threshold, a distance from the lowest key, and how many tokens to take of the blocks
// at it, in shared memory.
template <int kHeld>
__device__ void FindThreshold(int32_t num_free, const Run& run, Lines<kHeld>& lines,
                              Shared& shared) {
  if (threadIdx.x == 0) {
    shared.threshold = 0;
    shared.wanted = num_free;
  }
  const Range range = FindRange(run, lines, shared);
  lines.lowest = range.lowest;
  for (int top = kScoreBits - __clz(static_cast<int>(range.highest - range.lowest)); top > 0;) {
    const int shift = max(top - kRadixBits, 0);
    const uint32_t num_digits = 1U << (top - shift);
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads)
      shared.bins[bin] = 0;
    __syncthreads();
    const uint32_t threshold = shared.threshold;
    lines.ForEach(run, [&](const Block& block) {
      // The digit itself where those above agree, else too large.
      const uint32_t digit = (block.key ^ threshold) >> shift;
      AddToBin(shared.bins, block.count > 0 && digit < num_digits, digit, block.count, run.lane);
    });
    __syncthreads();
    FindDigit(shift, run, shared);
    __syncthreads();
    top = shift;
  }
}

// Of the warps before this one.
template <int kHeld>
__device__ Sums SumBefore(const Run& run, const Lines<kHeld>& lines, Shared& shared) {
  const uint32_t threshold = shared.threshold;
  Sums sums = {0, 0};
  lines.ForEach(run, [&](const Block& block) {
    sums.taken += block.key > threshold ? block.count : 0;
    sums.ties += block.key == threshold ? block.count : 0;
  });
  sums.taken = __reduce_add_sync(kFullWarp, sums.taken);
  sums.ties = __reduce_add_sync(kFullWarp, sums.ties);
  if (run.lane == 0) shared.sums[run.warp] = sums;
  __syncthreads();
  sums = shared.sums[run.lane];
  const int32_t ties_before = InclusiveWarpSum(sums.ties, run.lane) - sums.ties;
  sums.taken += TakeTies(shared.wanted, ties_before, sums.ties);
  const int32_t taken_before = InclusiveWarpSum(sums.taken, run.lane) - sums.taken;
  return {__shfl_sync(kFullWarp, taken_before, run.warp),
          __shfl_sync(kFullWarp, ties_before, run.warp)};
}

// Writes the tokens that the blocks of a line give, lane by lane `count` from `begin` on, in order;
// returns their number. All lanes of the warp take part.
__device__ int32_t EmitLine(int32_t begin, int32_t count, int lane, int32_t (&shifts)[kWarp],
                            int32_t* out) {
  const bool gives = count > 0;
  const unsigned givers = __ballot_sync(kFullWarp, gives);
  if (givers == 0) return 0;
  const int32_t end = InclusiveWarpSum(count, lane);
  const int32_t begin_place = end - count;
  const unsigned upto = kFullWarp >> (kWarp - 1 - lane);  // this lane and those before
  if (gives) shifts[__popc(givers & upto) - 1] = begin - begin_place;
  __syncwarp();
  const int32_t total = __shfl_sync(kFullWarp, end, kWarp - 1);
  int begun = 0;  // of the givers
#pragma unroll 1
  for (int32_t first = 0; first < total; first += kWarp) {
    const auto offset = static_cast<uint32_t>(begin_place - first);
    const unsigned begins =
        __reduce_or_sync(kFullWarp, gives && offset < kWarp ? 1U << offset : 0U);
    const int32_t place = first + lane;
    const int owner = begun + __popc(begins & upto) - 1;
    if (place < total) out[place] = place + shifts[owner];
    begun += __popc(begins);
  }
  __syncwarp();  // the shifts have been read
  return total;
}

// Reads the lines again, from the nearest cache: unrolled over registers, the code would be long
// and each instruction of it fetched for one use.
__device__ void Emit(const Run& run, uint32_t lowest, Sums before, Shared& shared, int32_t* out) {
  if (run.num_lines == 0) return;
  const uint32_t threshold = shared.threshold;
  const int32_t wanted = shared.wanted;
  Block next = run.Load(0);
#pragma unroll 1
  for (int line = 0; line < run.num_lines; ++line) {
    const Block block = next;
    next = run.Load(line + 1);
    const uint32_t distance = block.key - lowest;
    const int32_t ties = distance == threshold ? block.count : 0;
    int32_t taken = distance > threshold ? block.count : 0;
    if (__ballot_sync(kFullWarp, ties > 0) != 0) {
      const int32_t ties_end = InclusiveWarpSum(ties, run.lane);
      taken += TakeTies(wanted, before.ties + ties_end - ties, ties);
      before.ties += __shfl_sync(kFullWarp, ties_end, kWarp - 1);
    }
    before.taken +=
        EmitLine(block.begin, taken, run.lane, shared.shifts[run.warp], out + before.taken);
  }
}

// Thread blocks of an SM: two where their registers allow it.
constexpr int Residency(int held) { return held == kSelectFewLines ? 2 : 1; }

// grid (groups, items)
template <int kHeld>
__global__ void __launch_bounds__(kThreads, Residency(kHeld))
    SelectBlocksKernel(const __grid_constant__ Batch batch) {
  __shared__ Shared shared;
  AllowDependents();
  const Item& item = batch.items[blockIdx.y];
  const Run run(item, static_cast<int>(blockIdx.x));
  WaitForEarlierGrids();
  Lines<kHeld> lines(run);
  int32_t* const out = item.tokens + static_cast<int64_t>(blockIdx.x) * item.num_selected;
  const int32_t num_suffix = item.num_tokens - item.suffix_begin;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < item.prefix_end; i += kThreads) {
    out[i] = i;
  }
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < num_suffix; i += kThreads) {
    out[item.num_selected - num_suffix + i] = item.suffix_begin + i;
  }
  const int32_t num_free = item.num_selected - num_suffix - item.prefix_end;
  if (num_free == 0) return;
  FindThreshold(num_free, run, lines, shared);
  const Sums before = SumBefore(run, lines, shared);
  Emit(run, lines.lowest, before, shared, out + item.prefix_end);
}

// The kernel that holds runs of so many blocks.
auto KernelOf(int64_t run_blocks) {
  if (run_blocks <= kSelectFewLines * kWarp) return SelectBlocksKernel<kSelectFewLines>;
  if (run_blocks <= kSelectManyLines * kWarp) return SelectBlocksKernel<kSelectManyLines>;
  return SelectBlocksKernel<0>;
}

}  // namespace

absl::Status SelectBlocks(const SelectBlocksParams& params, const Launch& launch) {
  if (params.groups == 0) return absl::OkStatus();
  for (size_t first = 0; first < params.items.size(); first += kSelectBatchItems) {
    const auto items = params.items.subspan(
        first, std::min<size_t>(kSelectBatchItems, params.items.size() - first));
    Batch batch = {};
    int64_t most_run_blocks = 0;
    for (size_t i = 0; i < items.size(); ++i) {
      const SelectBlocksItem& item = items[i];
      const int64_t run_blocks = SelectRunBlocks(item.num_blocks);
      most_run_blocks = std::max(most_run_blocks, run_blocks);
      batch.items[i] = {.scores = item.block_scores,
                        .starts = item.block_starts,
                        .tokens = item.tokens,
                        .num_blocks = static_cast<int32_t>(item.num_blocks),
                        .num_tokens = static_cast<int32_t>(item.num_tokens),
                        .prefix_end = static_cast<int32_t>(item.prefix_end),
                        .suffix_begin = static_cast<int32_t>(item.suffix_begin),
                        .num_selected = static_cast<int32_t>(item.num_selected),
                        .run_blocks = static_cast<int32_t>(run_blocks)};
    }
    cudaLaunchConfig_t config = {};
    config.gridDim =
        dim3(static_cast<unsigned>(params.groups), static_cast<unsigned>(items.size()));
    config.blockDim = dim3(kThreads);
    config.stream = launch.stream;
    absl::Status status =
        CudaStatus(LaunchDependent(config, KernelOf(most_run_blocks), batch), "SelectBlocksKernel");
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// What SelectBlocks and SelectTokens share: a team of thread blocks chooses among weighted items in
// the order (key desc, index asc) until a given weight is reached. Everything is integer arithmetic
// on ordered scores, so the result is exact and the same on every run.
//
//   load       every warp of the team takes a run of consecutive items, in lines of 32, and keeps
//              keys and weights in registers, unless there are so many that each step reads them
//              again
//   threshold  the key of the last item taken, by weighted radix selection. Digits are of the
//              distance from the lowest key, from its first bit that is not always 0: scores share
//              their leading bits, and lanes would wait for each other at few bins. Each thread
//              block fills a histogram of its own, sums its share of the bins over the team, and
//              reads the sums. Histograms are of integers, so the order of atomics does not show.
//              Once the items of the bin that the budget ends in are few, they are compared
//              with each other instead
//   sum        per warp: weights above the threshold, and at it; ties are taken in order
//   emit       what the blocks of a line give, at places from prefix sums. A warp's lanes write
//              neighbouring tokens, whichever blocks they are of
#pragma once

#include <cstdint>

#include "cuda/cluster.cuh"
#include "cuda/ordered_score.cuh"
#include "cuda/select_blocks.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {

inline constexpr int kSelectWarps = kSelectThreads / kWarp;
static_assert(kSelectWarps == kWarp, "a lane each for the sums of all warps");
inline constexpr int kRadixBits = 11;
inline constexpr int kBins = 1 << kRadixBits;
static_assert(kBins == 2 * kSelectThreads, "two bins a thread");
inline constexpr int kFew = 256;  // items of a team that are compared with each other
inline constexpr int kFewLanes = kSelectThreads / kFew;

struct Weighted {
  uint32_t key;    // of its score
  int32_t weight;  // >= 0
};

struct Sums {
  int32_t first;
  int32_t second;
};

// Of the items with a weight.
struct Extent {
  uint32_t lowest;  // key
  uint32_t highest;
  int32_t weight;  // all of it
  int32_t num_items;
};

struct SelectShared {
  alignas(16) int32_t bins[kBins];     // of this thread block
  int2 team_bins[kSelectThreads / 2];  // of the team: this thread block's share of them
  Weighted few[kFew];                  // of this thread block; keys are distances from the lowest
  Weighted team_few[kFew];
  int32_t num_few;  // of this thread block, those without room too
  Extent extents[kSelectWarps];
  Extent extent;  // of this thread block
  Sums warp_sums[kSelectWarps];
  int32_t bin_sums[kSelectWarps];
  uint32_t threshold;
  int32_t wanted;      // weight still to take among items with the threshold's known digits
  int32_t bin_weight;  // of all those items
};

// What is taken: items above, and of those at it the first ones, up to `wanted`.
struct Threshold {
  uint32_t lowest = 0;
  uint32_t value = ~0U;  // distance from lowest, in steps of 2^shift
  int shift = 0;
  int32_t wanted = 0;

  __device__ uint32_t Distance(uint32_t key) const { return (key - lowest) >> shift; }
  // Of an item with a weight.
  __device__ bool IsAbove(uint32_t key) const { return Distance(key) > value; }
  __device__ bool IsTie(uint32_t key) const { return Distance(key) == value; }
  // What the ties before leave of `wanted` for one of this weight.
  __device__ int32_t TakeTie(int32_t ties_before, int32_t weight) const {
    return min(max(wanted - ties_before, 0), weight);
  }
};

// The items that a warp takes.
struct Run {
  uint32_t first;
  uint32_t end;
  int num_lines;
  int lane;
  int warp;

  // Requires: 0 <= begin <= end_of_all.
  __device__ Run(const Team& team, uint32_t begin, uint32_t end_of_all, uint32_t run_items)
      : lane(static_cast<int>(threadIdx.x) % kWarp), warp(static_cast<int>(threadIdx.x) / kWarp) {
    const auto before = static_cast<uint64_t>(team.rank * kSelectWarps + warp) * run_items;
    first = begin + static_cast<uint32_t>(min(before, static_cast<uint64_t>(end_of_all - begin)));
    end = first + min(run_items, end_of_all - first);
    num_lines = static_cast<int>((end - first + kWarp - 1) / kWarp);
  }
  // Of this lane; beyond the run in its last line.
  __device__ uint32_t Index(int line) const {
    return first + static_cast<uint32_t>(line * kWarp + lane);
  }
};

// The lines of a run, kHeld of them in registers; with 0, read again each time. A source has
// Weigh(i, counts), which returns weight 0 unless `counts`.
template <int kHeld, typename Source>
class Lines {
 public:
  __device__ Lines(const Source& source, const Run& run) : source_(source), run_(run) {
    if (run.num_lines == 0) return;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held_[i] = Load(i);
  }
  // Calls f(item), in order. All lanes of the warp take part.
  template <typename F>
  __device__ void ForEach(F&& f) const {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (i < run_.num_lines) f(held_[i]);
      }
    } else {
      for (int line = 0; line < run_.num_lines; line += kAhead) {
        Weighted items[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) items[i] = Load(line + i);
#pragma unroll
        for (const Weighted& item : items) f(item);
      }
    }
  }

 private:
  static constexpr int kAhead = 4;  // requested before the first is used
  // Branch-free, so that requests do not wait for each other. Requires: the run is not empty.
  __device__ Weighted Load(int line) const {
    const uint32_t i = run_.Index(line);
    return source_.Weigh(min(i, run_.end - 1), i < run_.end);
  }

  const Source& source_;
  const Run& run_;
  Weighted held_[kHeld > 0 ? kHeld : 1];
};

__device__ inline int32_t InclusiveWarpSum(int32_t value, int lane) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int32_t other = __shfl_up_sync(kFullWarp, value, offset);
    if (lane >= offset) value += other;
  }
  return value;
}

// All lanes of the warp take part. A warp of one digit, as equal scores have it, adds once.
__device__ inline void AddToBin(int32_t* bins, bool counts, uint32_t digit, int32_t weight,
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

// The weights of two neighbouring bins over the team. Requires: the team has filled its bins.
__device__ inline int2 TeamBins(const Team& team, int pair, SelectShared& shared) {
  if (team.size == 1) return reinterpret_cast<const int2*>(shared.bins)[pair];
  // Neighbouring lanes read the same two bins of the thread blocks of the team.
  const int share = kSelectThreads / team.size;  // pairs; the size is a power of two
  const int rank = static_cast<int>(threadIdx.x) % team.size;
  const int place = static_cast<int>(threadIdx.x) / team.size;
  int2 sum = reinterpret_cast<const int2*>(team.At(shared.bins, rank))[team.rank * share + place];
  for (int offset = 1; offset < team.size; offset *= 2) {
    sum.x += __shfl_xor_sync(kFullWarp, sum.x, offset);
    sum.y += __shfl_xor_sync(kFullWarp, sum.y, offset);
  }
  if (rank == 0) shared.team_bins[place] = sum;
  team.Sync();
  return team.At(shared.team_bins, pair / share)[pair % share];
}

// Finds the digit at `shift` of the threshold: from the highest bin down, the one in which the
// wanted weight ends. Requires: it ends in one; the team has filled its bins.
__device__ inline void FindDigit(const Team& team, int shift, const Run& run,
                                 SelectShared& shared) {
  const int pair = kSelectThreads - 1 - static_cast<int>(threadIdx.x);
  const int2 weights = TeamBins(team, pair, shared);
  const int32_t wanted = shared.wanted;
  const int32_t sum = weights.x + weights.y;
  const int32_t inclusive = InclusiveWarpSum(sum, run.lane);
  if (run.lane == kWarp - 1) shared.bin_sums[run.warp] = inclusive;
  __syncthreads();
  const int32_t warps_before =
      __reduce_add_sync(kFullWarp, run.lane < run.warp ? shared.bin_sums[run.lane] : 0);
  const int32_t before = warps_before + inclusive - sum;
  if (before >= wanted || before + sum < wanted) return;
  const bool in_upper = before + weights.y >= wanted;
  shared.threshold |= static_cast<uint32_t>(2 * pair + (in_upper ? 1 : 0)) << shift;
  shared.wanted = wanted - before - (in_upper ? 0 : weights.y);
  shared.bin_weight = in_upper ? weights.y : weights.x;
}

// Of all items of the team.
template <typename ItemLines>
__device__ Extent FindExtent(const Team& team, const ItemLines& lines, const Run& run,
                             SelectShared& shared) {
  Extent extent = {~0U, 0, 0, 0};
  lines.ForEach([&](const Weighted& item) {
    if (item.weight == 0) return;
    extent.lowest = min(extent.lowest, item.key);
    extent.highest = max(extent.highest, item.key);
    extent.weight += item.weight;
    ++extent.num_items;
  });
  const auto over_warp = [](const Extent& e) {
    return Extent{__reduce_min_sync(kFullWarp, e.lowest), __reduce_max_sync(kFullWarp, e.highest),
                  __reduce_add_sync(kFullWarp, e.weight),
                  __reduce_add_sync(kFullWarp, e.num_items)};
  };
  extent = over_warp(extent);
  if (run.lane == 0) shared.extents[run.warp] = extent;
  __syncthreads();
  extent = over_warp(shared.extents[run.lane]);
  if (team.size == 1) return extent;
  if (threadIdx.x == 0) shared.extent = extent;
  team.Sync();
  extent = {~0U, 0, 0, 0};
  if (run.lane < team.size) extent = *team.At(&shared.extent, run.lane);
  return over_warp(extent);
}

// Whether so much weight is likely that of a few items.
__device__ inline bool IsFew(const Extent& extent, int32_t weight) {
  constexpr int64_t kExpected = kFew * 3 / 4;
  return int64_t{weight} * extent.num_items <= kExpected * extent.weight;
}

// Finds all digits of the threshold below `shift`, where those at and above it are known: compares
// the items that have these with each other. False, and nothing found, if they are more than a
// few; the same for all threads of the team.
template <typename ItemLines>
__device__ bool FindAmongFew(const Team& team, const ItemLines& lines, uint32_t lowest, int shift,
                             const Run& run, SelectShared& shared) {
  const uint32_t threshold = shared.threshold;
  const int32_t wanted = shared.wanted;
  if (threadIdx.x == 0) shared.num_few = 0;
  __syncthreads();
  lines.ForEach([&](const Weighted& item) {
    const uint32_t distance = item.key - lowest;
    if (item.weight == 0 || (distance ^ threshold) >> shift != 0) return;
    const int32_t place = atomicAdd(&shared.num_few, 1);
    if (place < kFew) shared.few[place] = {distance, item.weight};
  });
  team.Sync();
  const int32_t of_rank = run.lane < team.size ? *team.At(&shared.num_few, run.lane) : 0;
  const int32_t end = InclusiveWarpSum(of_rank, run.lane);
  const int32_t total = __shfl_sync(kFullWarp, end, kWarp - 1);
  if (total > kFew) return false;
  const int32_t first = __shfl_sync(kFullWarp, end - of_rank, run.warp);
  const int32_t count = __shfl_sync(kFullWarp, of_rank, run.warp);
  if (run.warp < team.size) {
    const Weighted* const few = team.At(shared.few, run.warp);
    for (int32_t i = run.lane; i < count; i += kWarp) shared.team_few[first + i] = few[i];
  }
  __syncthreads();
  // Each item by kFewLanes lanes, which share the others.
  const int32_t own = static_cast<int32_t>(threadIdx.x) / kFewLanes;
  const uint32_t distance = shared.team_few[min(own, total - 1)].key;
  int32_t above = 0;
  int32_t ties = 0;
  for (int32_t i = static_cast<int32_t>(threadIdx.x) % kFewLanes; i < total; i += kFewLanes) {
    const Weighted other = shared.team_few[i];
    above += other.key > distance ? other.weight : 0;
    ties += other.key == distance ? other.weight : 0;
  }
#pragma unroll
  for (int offset = 1; offset < kFewLanes; offset *= 2) {
    above += __shfl_xor_sync(kFullWarp, above, offset);
    ties += __shfl_xor_sync(kFullWarp, ties, offset);
  }
  if (above < wanted && above + ties >= wanted) {  // all lanes for which it holds are of one key
    shared.threshold = distance;
    shared.wanted = wanted - above;
  }
  __syncthreads();
  return true;
}

// The threshold at which `wanted` is reached. Requires: the items weigh at least that.
template <typename ItemLines>
__device__ Threshold FindThreshold(const Team& team, const ItemLines& lines, const Extent& extent,
                                   int32_t wanted, const Run& run, SelectShared& shared) {
  Threshold found;
  if (wanted == 0) return found;  // the same for all threads of the team
  if (threadIdx.x == 0) {
    shared.threshold = 0;
    shared.wanted = wanted;
  }
  found.lowest = extent.lowest;
  const int num_bits = 32 - __clz(static_cast<int>(extent.highest - extent.lowest));
  for (int top = num_bits; top > 0;) {
    const int shift = max(top - kRadixBits, 0);
    const uint32_t num_digits = 1U << (top - shift);
    // What the team reads of the last pass it has read before it summed the bins up.
    reinterpret_cast<int2*>(shared.bins)[threadIdx.x] = {0, 0};
    __syncthreads();
    const uint32_t threshold = shared.threshold;
    lines.ForEach([&](const Weighted& item) {
      // The digit itself where those above agree, else too large.
      const uint32_t digit = ((item.key - found.lowest) ^ threshold) >> shift;
      AddToBin(shared.bins, item.weight > 0 && digit < num_digits, digit, item.weight, run.lane);
    });
    team.Sync();
    FindDigit(team, shift, run, shared);
    __syncthreads();
    top = shift;
    found.shift = shift;
    if (shared.wanted == shared.bin_weight) break;  // the bin is taken whole
    if (top > 0 && IsFew(extent, shared.bin_weight) &&
        FindAmongFew(team, lines, found.lowest, shift, run, shared)) {
      found.shift = 0;
      break;
    }
  }
  if (num_bits == 0) __syncthreads();
  found.value = shared.threshold >> found.shift;
  found.wanted = shared.wanted;
  return found;
}

// Sums over the warps of the team before this one; those of the team through `of_block`, which
// nothing else uses.
__device__ inline Sums SumBefore(const Team& team, Sums of_lane, const Run& run,
                                 Sums (&warp_sums)[kSelectWarps], Sums& of_block) {
  const auto over_warp = [](const Sums& s) {
    return Sums{__reduce_add_sync(kFullWarp, s.first), __reduce_add_sync(kFullWarp, s.second)};
  };
  __syncthreads();  // what was in the sums has been read
  const Sums of_warp = over_warp(of_lane);
  if (run.lane == 0) warp_sums[run.warp] = of_warp;
  __syncthreads();
  const Sums sums = warp_sums[run.lane];
  const Sums before = over_warp(run.lane < run.warp ? sums : Sums{0, 0});
  if (team.size == 1) return before;
  const Sums all = over_warp(sums);
  if (threadIdx.x == 0) of_block = all;
  team.Sync();
  Sums blocks = {0, 0};
  if (run.lane < team.rank) blocks = *team.At(&of_block, run.lane);
  blocks = over_warp(blocks);
  return {before.first + blocks.first, before.second + blocks.second};
}

// Weights above the threshold, and at it, of the warps before this one.
template <typename ItemLines>
__device__ Sums SumTaken(const Team& team, const ItemLines& lines, const Threshold& threshold,
                         const Run& run, SelectShared& shared, Sums& of_block) {
  Sums sums = {0, 0};
  lines.ForEach([&](const Weighted& item) {
    if (item.weight == 0) return;
    sums.first += threshold.IsAbove(item.key) ? item.weight : 0;
    sums.second += threshold.IsTie(item.key) ? item.weight : 0;
  });
  return SumBefore(team, sums, run, shared.warp_sums, of_block);
}

// What the items of a line give, lane by lane; `ties` are those before, and are counted on. All
// lanes of the warp take part.
__device__ inline int32_t TakeLine(const Threshold& threshold, const Weighted& item, int lane,
                                   int32_t& ties) {
  const bool counts = item.weight > 0;
  const int32_t tie = counts && threshold.IsTie(item.key) ? item.weight : 0;
  int32_t taken = counts && threshold.IsAbove(item.key) ? item.weight : 0;
  if (__any_sync(kFullWarp, tie > 0)) {
    const int32_t ties_end = InclusiveWarpSum(tie, lane);
    taken += threshold.TakeTie(ties + ties_end - tie, tie);
    ties += __shfl_sync(kFullWarp, ties_end, kWarp - 1);
  }
  return taken;
}

inline constexpr int32_t kWrittenElsewhere = INT32_MIN;

// Writes the tokens that the blocks of a line give, in order: of each lane `size` of them from
// token `begin` on, to places [end - size, end), where end = InclusiveWarpSum(size); the places of
// a lane with begin == kWrittenElsewhere are left alone. All lanes of the warp take part.
__device__ inline void EmitLine(int32_t begin, int32_t size, int32_t end, int lane,
                                int32_t (&shifts)[kWarp], int32_t* out) {
  const bool gives = size > 0;
  const unsigned givers = __ballot_sync(kFullWarp, gives);
  if (givers == 0) return;
  const int32_t begin_place = end - size;
  const unsigned upto = kFullWarp >> (kWarp - 1 - lane);  // this lane and those before
  if (gives) {
    shifts[__popc(givers & upto) - 1] =
        begin == kWrittenElsewhere ? kWrittenElsewhere : begin - begin_place;
  }
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
    if (place < total) {
      const int32_t shift = shifts[owner];
      if (shift != kWrittenElsewhere) out[place] = place + shift;
    }
    begun += __popc(begins);
  }
  __syncwarp();  // the shifts have been read
}

}  // namespace dynsplit::kernels

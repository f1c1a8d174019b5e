// SPDX-License-Identifier: Apache-2.0
//
// One team of thread blocks selects for one group of one item, without scratch, as
// block_selection.cuh says. A block weighs its free tokens: those between the prefix and the suffix
// that are taken in any case.
#include <algorithm>

#include "cuda/block_selection.cuh"
#include "cuda/cuda_status.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/operations.h"
#include "cuda/select_blocks.h"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = kSelectThreads;

struct Item {
  const float* scores;  // [groups, B]
  const int32_t* starts;
  const int32_t* names;  // [groups, T] or null
  int32_t* tokens;       // [groups, num_selected]
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

struct FreeBlock {
  Weighted weighted;
  int32_t begin;  // first free token
};

// The blocks of one group.
struct FreeBlocks {
  const Item& item;
  const float* scores;

  __device__ FreeBlocks(const Item& of, int64_t group)
      : item(of), scores(of.scores + group * of.num_blocks) {}
  __device__ static int32_t NameOf(int32_t token) { return token; }
  __device__ FreeBlock Load(uint32_t i, bool counts) const {
    const int32_t begin = max(item.starts[i], item.prefix_end);
    const int32_t end = min(item.starts[i + 1], item.suffix_begin);
    return {{OrderedScore(scores[i]), counts ? max(end - begin, 0) : 0}, begin};
  }
  __device__ Weighted Weigh(uint32_t i, bool counts) const { return Load(i, counts).weighted; }
};

// The same where every token is a block, and may go by another name.
struct FreeTokens {
  const Item& item;
  const float* scores;
  const int32_t* names;

  __device__ FreeTokens(const Item& of, int64_t group)
      : item(of),
        scores(of.scores + group * of.num_blocks),
        names(of.names == nullptr ? nullptr : of.names + group * of.num_tokens) {}
  __device__ int32_t NameOf(int32_t token) const { return names == nullptr ? token : names[token]; }
  __device__ Weighted Weigh(uint32_t i, bool counts) const {
    const auto token = static_cast<int32_t>(i);
    const bool free = counts && token >= item.prefix_end && token < item.suffix_begin;
    return {OrderedScore(scores[i]), free ? 1 : 0};
  }
};

struct Shared {
  SelectShared select;
  Sums sums;
  int32_t shifts[kSelectWarps][kWarp];  // token - place, of the blocks of a line that give any
};

// Reads the lines again, from the nearest cache: unrolled over registers, the code would be long
// and each instruction of it fetched for one use.
__device__ void Emit(const FreeBlocks& blocks, const Run& run, const Threshold& threshold,
                     const Sums& before, int32_t (&shifts)[kWarp], int32_t* out) {
  if (run.num_lines == 0) return;
  const auto load = [&](int line) {
    const uint32_t i = run.Index(line);
    return blocks.Load(min(i, run.end - 1), i < run.end);
  };
  int32_t ties = before.second;
  out += before.first + min(ties, threshold.wanted);
  FreeBlock next = load(0);
#pragma unroll 1
  for (int line = 0; line < run.num_lines; ++line) {
    const FreeBlock block = next;
    next = load(line + 1);
    const int32_t taken = TakeLine(threshold, block.weighted, run.lane, ties);
    const int32_t end = InclusiveWarpSum(taken, run.lane);
    EmitLine(block.begin, taken, end, run.lane, shifts, out);
    out += __shfl_sync(kFullWarp, end, kWarp - 1);
  }
}

// A line's tokens lie at neighbouring places, one a lane that gives it.
__device__ void Emit(const FreeTokens& tokens, const Run& run, const Threshold& threshold,
                     const Sums& before, int32_t (&)[kWarp], int32_t* out) {
  int32_t ties = before.second;
  out += before.first + min(ties, threshold.wanted);
#pragma unroll 1
  for (int line = 0; line < run.num_lines; ++line) {
    const uint32_t i = run.Index(line);
    const Weighted token = tokens.Weigh(min(i, run.end - 1), i < run.end);
    const int32_t taken = TakeLine(threshold, token, run.lane, ties);
    const unsigned takers = __ballot_sync(kFullWarp, taken > 0);
    if (taken > 0) {
      out[__popc(takers & ((1U << run.lane) - 1))] = tokens.NameOf(static_cast<int32_t>(i));
    }
    out += __popc(takers);
  }
}

// Thread blocks of an SM: two where their registers allow it.
constexpr int Residency(int held) { return held == kSelectFewLines ? 2 : 1; }

// grid (team, groups, items)
template <int kHeld, typename Blocks>
__global__ void __launch_bounds__(kThreads, Residency(kHeld))
    SelectBlocksKernel(const __grid_constant__ Batch batch) {
  __shared__ Shared shared;
  AllowDependents();
  const Team team = Team::OfCluster();
  const Item& item = batch.items[blockIdx.z];
  const int64_t group = blockIdx.y;
  const Blocks blocks(item, group);
  const Run run(team, 0, static_cast<uint32_t>(item.num_blocks),
                static_cast<uint32_t>(item.run_blocks));
  WaitForEarlierGrids();
  const Lines<kHeld, Blocks> lines(blocks, run);
  int32_t* const out = item.tokens + group * item.num_selected;
  const int32_t num_suffix = item.num_tokens - item.suffix_begin;
  const int32_t step = team.size * kThreads;
  for (int32_t i = team.rank * kThreads + static_cast<int32_t>(threadIdx.x); i < item.prefix_end;
       i += step) {
    out[i] = blocks.NameOf(i);
  }
  for (int32_t i = team.rank * kThreads + static_cast<int32_t>(threadIdx.x); i < num_suffix;
       i += step) {
    out[item.num_selected - num_suffix + i] = blocks.NameOf(item.suffix_begin + i);
  }
  const int32_t num_free = item.num_selected - num_suffix - item.prefix_end;
  if (num_free == 0) return;  // of the whole team
  const Extent extent = FindExtent(team, lines, run, shared.select);
  const Threshold threshold = FindThreshold(team, lines, extent, num_free, run, shared.select);
  const Sums before = SumTaken(team, lines, threshold, run, shared.select, shared.sums);
  team.Arrive();
  Emit(blocks, run, threshold, before, shared.shifts[run.warp], out + item.prefix_end);
  team.Wait();
}

// The kernel that holds runs of so many blocks.
template <typename Blocks>
auto KernelOf(int64_t run_blocks) {
  if (run_blocks <= kSelectFewLines * kWarp) return SelectBlocksKernel<kSelectFewLines, Blocks>;
  if (run_blocks <= kSelectManyLines * kWarp) return SelectBlocksKernel<kSelectManyLines, Blocks>;
  return SelectBlocksKernel<0, Blocks>;
}

}  // namespace

absl::Status SelectBlocks(const SelectBlocksParams& params, const Launch& launch) {
  if (params.groups == 0) return absl::OkStatus();
  for (size_t first = 0; first < params.items.size(); first += kSelectBatchItems) {
    const auto items = params.items.subspan(
        first, std::min<size_t>(kSelectBatchItems, params.items.size() - first));
    int64_t most_blocks = 0;
    for (const SelectBlocksItem& item : items) most_blocks = std::max(most_blocks, item.num_blocks);
    const int team_size = SelectTeamSize(most_blocks, params.groups * std::ssize(items),
                                         launch.num_sms, ClusterLimit());
    Batch batch = {};
    for (size_t i = 0; i < items.size(); ++i) {
      const SelectBlocksItem& item = items[i];
      batch.items[i] = {
          .scores = item.block_scores,
          .starts = item.block_starts,
          .names = item.names,
          .tokens = item.tokens,
          .num_blocks = static_cast<int32_t>(item.num_blocks),
          .num_tokens = static_cast<int32_t>(item.num_tokens),
          .prefix_end = static_cast<int32_t>(item.prefix_end),
          .suffix_begin = static_cast<int32_t>(item.suffix_begin),
          .num_selected = static_cast<int32_t>(item.num_selected),
          .run_blocks = static_cast<int32_t>(SelectRunBlocks(item.num_blocks, team_size))};
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(team_size), static_cast<unsigned>(params.groups),
                          static_cast<unsigned>(items.size()));
    config.blockDim = dim3(kThreads);
    config.stream = launch.stream;
    const int64_t run_blocks = SelectRunBlocks(most_blocks, team_size);
    const auto kernel = items[0].block_starts == nullptr ? KernelOf<FreeTokens>(run_blocks)
                                                         : KernelOf<FreeBlocks>(run_blocks);
    absl::Status status =
        CudaStatus(LaunchDependent(config, kernel, batch, team_size), "SelectBlocksKernel");
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::kernels

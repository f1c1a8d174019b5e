// SPDX-License-Identifier: Apache-2.0
//
// Selection without the host, and without a sort: block_selection.cuh finds the score at which the
// budget ends and what each block gives.
//
//   rank    how many protected tokens lie before every 32nd token, so that those of any block, and
//           the place of any token, are two look-ups away. Every thread block keeps all of it in
//           shared memory, where that has room, and finds it before the grid before has ended;
//           else a grid of its own leaves it in scratch
//   select  a team of thread blocks a group: threshold, prefix sums, kept tokens. A block weighs
//           its unprotected tokens; in whole-block mode 1, or 0 where it is kept in any case
//   cut     the one block that gives a part, where token scores say which: one warp compares its
//           tokens with each other, or where they are many, one thread block finds their threshold
//           in the same way
#include <algorithm>

#include "cuda/block_selection.cuh"
#include "cuda/cuda_status.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/operations.h"
#include "cuda/select_blocks.h"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = kSelectThreads;
constexpr uint32_t kWordTokens = 32;

// Of 32 tokens.
struct alignas(8) RankWord {
  uint32_t mask;   // bit i: token i is protected
  int32_t before;  // protected tokens before the first
};

struct Flags {
  const uint8_t* protected_tokens = nullptr;
  int64_t num_tokens = 0;
  int32_t num_words = 0;
};

struct RankArgs {
  Flags flags;
  RankWord* words = nullptr;  // [num_words]
  int32_t run_words = 0;
};

struct Selection {
  SelectTokensParams params;
  int32_t num_words;
  const RankWord* words;  // null: each thread block ranks
  int32_t run_words;      // of its warps
  int32_t run_blocks;
};

// Bit i: byte i of four is not 0.
__device__ uint32_t ByteBits(uint32_t bytes) {
  constexpr uint32_t kGather = 0x01020408;  // bit 8i to bit 24 + i; no two products meet
  return (__vcmpne4(bytes, 0) & 0x01010101U) * kGather >> 24 & 0xFU;
}

__device__ uint32_t ProtectedMask(const Flags& of, uint32_t word) {
  const int64_t begin = static_cast<int64_t>(word) * kWordTokens;
  const uint8_t* const flags = of.protected_tokens + begin;
  uint32_t mask = 0;
  if (begin + kWordTokens <= of.num_tokens && reinterpret_cast<uintptr_t>(flags) % 16 == 0) {
    const auto* const vectors = reinterpret_cast<const uint4*>(flags);
    const uint4 low = vectors[0];
    const uint4 high = vectors[1];
    mask = ByteBits(low.x) | ByteBits(low.y) << 4 | ByteBits(low.z) << 8 | ByteBits(low.w) << 12 |
           ByteBits(high.x) << 16 | ByteBits(high.y) << 20 | ByteBits(high.z) << 24 |
           ByteBits(high.w) << 28;
  } else {
    const auto count = static_cast<int>(min(of.num_tokens - begin, int64_t{kWordTokens}));
    for (int i = 0; i < count; ++i) mask |= flags[i] != 0 ? 1U << i : 0U;
  }
  return mask;
}

// Writes the words of a run with so many protected tokens before it. mask_of(line) is 0 beyond the
// run. All lanes of the warp take part.
template <typename MaskOf>
__device__ void WriteRanks(const Run& run, int32_t before, MaskOf&& mask_of, RankWord* words) {
  for (int line = 0; line < run.num_lines; ++line) {
    const uint32_t mask = mask_of(line);
    const int32_t end = InclusiveWarpSum(__popc(mask), run.lane);
    const uint32_t word = run.Index(line);
    if (word < run.end) words[word] = {mask, before + end - __popc(mask)};
    before += __shfl_sync(kFullWarp, end, kWarp - 1);
  }
}

// grid (team)
__global__ void __launch_bounds__(kThreads) RankKernel(const __grid_constant__ RankArgs args) {
  __shared__ Sums warp_sums[kSelectWarps];
  __shared__ Sums block_sums;
  AllowDependents();
  const Team team = Team::OfCluster();
  const Run run(team, 0, static_cast<uint32_t>(args.flags.num_words),
                static_cast<uint32_t>(args.run_words));
  const auto mask_of = [&](int line) {
    const uint32_t word = run.Index(line);
    return word < run.end ? ProtectedMask(args.flags, word) : 0U;
  };
  // Flags come from the host, never from the grid before: they may be read while it still runs.
  int32_t count = 0;
#pragma unroll 4
  for (int line = 0; line < run.num_lines; ++line) count += __popc(mask_of(line));
  WaitForEarlierGrids();
  const int32_t before = SumBefore(team, {count, 0}, run, warp_sums, block_sums).first;
  team.Arrive();
  WriteRanks(run, before, mask_of, args.words);
  team.Wait();
}

// Protected tokens, by token.
struct Ranks {
  const RankWord* words;

  __device__ RankWord WordOf(uint32_t token) const {
    const uint2 word = reinterpret_cast<const uint2*>(words)[token / kWordTokens];
    return {word.x, static_cast<int32_t>(word.y)};
  }
  __device__ static int32_t Before(const RankWord& word, uint32_t token) {
    return word.before + __popc(word.mask & ((1U << token % kWordTokens) - 1));
  }
  __device__ int32_t Before(uint32_t token) const { return Before(WordOf(token), token); }
  __device__ static bool IsProtected(const RankWord& word, uint32_t token) {
    return (word.mask >> token % kWordTokens & 1U) != 0;
  }
};

struct Block {
  Weighted weighted;
  int32_t begin;
  int32_t length;
  int32_t num_protected;
};

// The blocks of one group.
struct Blocks {
  const float* scores;
  const int32_t* starts;
  Ranks ranks;
  bool whole;

  __device__ Block Load(uint32_t i, bool counts) const {
    const int32_t begin = starts[i];
    const int32_t end = starts[i + 1];
    const int32_t num_protected =
        ranks.Before(static_cast<uint32_t>(end)) - ranks.Before(static_cast<uint32_t>(begin));
    const int32_t weight = whole ? (num_protected == 0 ? 1 : 0) : end - begin - num_protected;
    return {{OrderedScore(scores[i]), counts ? weight : 0},
            begin,
            counts ? end - begin : 0,
            counts ? num_protected : 0};
  }
  __device__ Weighted Weigh(uint32_t i, bool counts) const { return Load(i, counts).weighted; }
};

// The tokens of one group.
struct Tokens {
  const float* scores;
  Ranks ranks;

  __device__ Weighted Weigh(uint32_t token, bool counts) const {
    const bool is_protected = Ranks::IsProtected(ranks.WordOf(token), token);
    return {OrderedScore(scores[token]), counts && !is_protected ? 1 : 0};
  }
};

// The block that gives its best tokens, where a warp cannot hold them.
struct Cut {
  int32_t begin;
  int32_t length;
  int32_t taken;  // unprotected tokens; 0 = no such block
  int32_t* out;
};

struct Shared {
  SelectShared select;
  Sums sums[2];
  int32_t shifts[kSelectWarps][kWarp];
  Cut cut;
};

// Words that each thread block of a team finds for all of it.
__host__ __device__ int32_t MaskShare(int32_t num_words, int team_size) {
  return (num_words + team_size - 1) / team_size;
}

// Ranks all tokens into `words`, which has room for the team's share of masks behind them, too.
// Touches no other memory but the flags.
__device__ void RankHere(const Team& team, const Flags& flags, int32_t run_words, Shared& shared,
                         RankWord* words) {
  const auto num_words = static_cast<uint32_t>(flags.num_words);
  const auto share = static_cast<uint32_t>(MaskShare(flags.num_words, team.size));
  auto* const masks = reinterpret_cast<uint32_t*>(words + num_words);
  const uint32_t first = static_cast<uint32_t>(team.rank) * share;
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < share; i += kThreads) {
    masks[i] = first + i < num_words ? ProtectedMask(flags, first + i) : 0U;
  }
  team.Sync();  // what the others read is left alone from here on
  const Team alone;
  const Run run(alone, 0, num_words, static_cast<uint32_t>(run_words));
  int32_t count = 0;
#pragma unroll 4
  for (int line = 0; line < run.num_lines; ++line) {
    const uint32_t word = run.Index(line);
    if (word >= run.end) continue;
    const uint32_t mask = team.At(masks, static_cast<int>(word / share))[word % share];
    words[word].mask = mask;
    count += __popc(mask);
  }
  const int32_t before =
      SumBefore(alone, {count, 0}, run, shared.select.warp_sums, shared.sums[0]).first;
  const auto mask_of = [&](int line) {
    const uint32_t word = run.Index(line);
    return word < run.end ? words[word].mask : 0U;
  };
  WriteRanks(run, before, mask_of, words);
  __syncthreads();
}

// One warp writes a block's protected tokens, and the first `taken` of the others.
__device__ void EmitMixed(const Ranks& ranks, int32_t begin, int32_t length, int32_t taken,
                          int lane, int32_t* out) {
  const int32_t before = ranks.Before(static_cast<uint32_t>(begin));
#pragma unroll 4
  for (int32_t i = lane; i < length; i += kWarp) {
    const auto token = static_cast<uint32_t>(begin + i);
    const RankWord word = ranks.WordOf(token);
    const int32_t num_protected = Ranks::Before(word, token) - before;
    const int32_t num_free = i - num_protected;
    if (Ranks::IsProtected(word, token) || num_free < taken) {
      out[num_protected + min(num_free, taken)] = begin + i;
    }
  }
}

// One warp writes the protected tokens of a block of at most 32, and its best `taken` others.
__device__ void EmitFewOfCut(const Tokens& tokens, int32_t begin, int32_t length, int32_t taken,
                             int lane, int32_t* out) {
  const int32_t token = begin + min(lane, length - 1);
  const bool counts = lane < length;
  const Weighted weighted = tokens.Weigh(static_cast<uint32_t>(token), counts);
  int32_t better = 0;  // by (score desc, token asc)
#pragma unroll
  for (int i = 0; i < kWarp; ++i) {
    const uint32_t key = __shfl_sync(kFullWarp, weighted.key, i);
    const int32_t weight = __shfl_sync(kFullWarp, weighted.weight, i);
    better += key > weighted.key || (key == weighted.key && i < lane) ? weight : 0;
  }
  const bool kept = counts && (weighted.weight == 0 || better < taken);  // weightless: protected
  const unsigned votes = __ballot_sync(kFullWarp, kept);
  if (kept) out[__popc(votes & ((1U << lane) - 1))] = token;
}

// One thread block writes the cut block's protected tokens and its best others.
__device__ void EmitCut(const Tokens& tokens, const Cut& cut, Shared& shared) {
  const Team alone;
  const auto begin = static_cast<uint32_t>(cut.begin);
  const auto length = static_cast<uint32_t>(cut.length);
  const Run run(alone, begin, begin + length, (length + kThreads - 1) / kThreads * kWarp);
  const Lines<0, Tokens> lines(tokens, run);
  const Extent extent = FindExtent(alone, lines, run, shared.select);
  const Threshold threshold = FindThreshold(alone, lines, extent, cut.taken, run, shared.select);
  const Sums before = SumTaken(alone, lines, threshold, run, shared.select, shared.sums[0]);
  int32_t ties = before.second;
  int32_t place = tokens.ranks.Before(run.first) - tokens.ranks.Before(begin) + before.first +
                  min(ties, threshold.wanted);
  for (int line = 0; line < run.num_lines; ++line) {
    const uint32_t token = run.Index(line);
    const bool counts = token < run.end;
    const uint32_t readable = min(token, run.end - 1);
    const Weighted weighted = tokens.Weigh(readable, counts);
    const int32_t taken = TakeLine(threshold, weighted, run.lane, ties);
    const bool kept = counts && (taken > 0 || weighted.weight == 0);  // weightless: protected
    const unsigned votes = __ballot_sync(kFullWarp, kept);
    if (kept) {
      cut.out[place + __popc(votes & ((1U << run.lane) - 1))] = static_cast<int32_t>(token);
    }
    place += __popc(votes);
  }
}

// What one warp writes of its run.
struct Emitter {
  const Blocks& blocks;
  const Tokens& tokens;  // scores null: of a block in part, its leading ones
  const Run& run;
  const Threshold& threshold;

  __device__ Block Load(int line) const {
    const uint32_t i = run.Index(line);
    return blocks.Load(min(i, run.end - 1), i < run.end);
  }
  // Of a block that gives `taken` of its weight.
  __device__ int32_t Size(const Block& block, int32_t taken) const {
    if (!blocks.whole) return block.num_protected + taken;
    return taken > 0 || block.num_protected > 0 ? block.length : 0;
  }
  // Kept tokens of the run; `ties` are those before. All lanes of the warp take part.
  __device__ int32_t LaneSizes(int32_t ties) const {
    int32_t size = 0;
    for (int line = 0; line < run.num_lines; ++line) {
      const Block block = Load(line);
      size += Size(block, TakeLine(threshold, block.weighted, run.lane, ties));
    }
    return size;
  }
  // Returns where the run's tokens end. Requires: the run is not empty.
  __device__ int32_t* Emit(int32_t ties, Shared& shared, int32_t* out) const {
    Block next = Load(0);
#pragma unroll 1
    for (int line = 0; line < run.num_lines; ++line) {
      const Block block = next;
      next = Load(line + 1);
      const int32_t taken = TakeLine(threshold, block.weighted, run.lane, ties);
      const int32_t size = Size(block, taken);
      const int32_t end = InclusiveWarpSum(size, run.lane);
      const bool is_part = !blocks.whole && taken < block.weighted.weight;
      const bool is_cut = is_part && taken > 0 && tokens.scores != nullptr;
      const bool is_mixed = is_part && block.num_protected > 0 && !is_cut;
      EmitLine(is_cut || is_mixed ? kWrittenElsewhere : block.begin, size, end, run.lane,
               shared.shifts[run.warp], out);
      const bool is_few = is_cut && block.length <= kWarp;
      if (is_cut && !is_few) shared.cut = {block.begin, block.length, taken, out + end - size};
      const unsigned few = __ballot_sync(kFullWarp, is_few);
      for (unsigned parts = few | __ballot_sync(kFullWarp, is_mixed); parts != 0;
           parts &= parts - 1) {
        const int lane = __ffs(static_cast<int>(parts)) - 1;
        const int32_t begin = __shfl_sync(kFullWarp, block.begin, lane);
        const int32_t length = __shfl_sync(kFullWarp, block.length, lane);
        const int32_t of_block = __shfl_sync(kFullWarp, taken, lane);
        int32_t* const place = out + __shfl_sync(kFullWarp, end - size, lane);
        if ((few >> lane & 1U) != 0) {
          EmitFewOfCut(tokens, begin, length, of_block, run.lane, place);
        } else {
          EmitMixed(blocks.ranks, begin, length, of_block, run.lane, place);
        }
      }
      out += __shfl_sync(kFullWarp, end, kWarp - 1);
    }
    return out;
  }
};

// Weight to take beyond what is kept in any case.
__device__ int32_t WantedWeight(const SelectTokensParams& p, int32_t weight) {
  const int64_t wanted = p.num_whole_blocks > 0 ? p.num_whole_blocks - (p.num_blocks - weight)
                                                : p.num_kept - (p.num_tokens - weight);
  return static_cast<int32_t>(max(wanted, int64_t{0}));
}

// grid (team, groups)
template <int kHeld>
__global__ void __launch_bounds__(kThreads)
    SelectTokensKernel(const __grid_constant__ Selection s) {
  __shared__ Shared shared;
  AllowDependents();
  const SelectTokensParams& p = s.params;
  const Team team = Team::OfCluster();
  const int64_t group = blockIdx.y;
  const bool whole = p.num_whole_blocks > 0;
  extern __shared__ RankWord shared_words[];
  if (s.words == nullptr) {
    // Flags come from the host, never from the grid before: they may be read while it still runs.
    RankHere(team, {p.protected_tokens, p.num_tokens, s.num_words}, s.run_words, shared,
             shared_words);
  }
  const Ranks ranks = {s.words == nullptr ? shared_words : s.words};
  const Blocks blocks = {p.block_scores + group * p.num_blocks, p.block_starts, ranks, whole};
  const Tokens tokens = {
      p.token_scores == nullptr ? nullptr : p.token_scores + group * p.num_tokens, ranks};
  const Run run(team, 0, static_cast<uint32_t>(p.num_blocks), static_cast<uint32_t>(s.run_blocks));
  if (threadIdx.x == 0) shared.cut.taken = 0;
  WaitForEarlierGrids();
  const Lines<kHeld, Blocks> lines(blocks, run);
  const Extent extent = FindExtent(team, lines, run, shared.select);
  const Threshold threshold =
      FindThreshold(team, lines, extent, WantedWeight(p, extent.weight), run, shared.select);
  const Sums before = SumTaken(team, lines, threshold, run, shared.select, shared.sums[0]);
  const Emitter emitter = {blocks, tokens, run, threshold};
  int32_t place = before.first + min(before.second, threshold.wanted);
  if (whole) {  // blocks were counted so far, not their tokens
    const int32_t size = emitter.LaneSizes(before.second);
    place = SumBefore(team, {size, 0}, run, shared.select.warp_sums, shared.sums[1]).first;
  } else if (run.num_lines > 0) {
    place += blocks.ranks.Before(static_cast<uint32_t>(p.block_starts[run.first]));
  }
  team.Arrive();
  int32_t* const kept = p.kept + group * (whole ? p.num_tokens : p.num_kept);
  if (run.num_lines > 0) {
    const int32_t* const end = emitter.Emit(before.second, shared, kept + place);
    if (run.end == p.num_blocks && run.lane == 0) {
      p.kept_counts[group] = static_cast<int32_t>(end - kept);
    }
  }
  if (p.token_scores != nullptr && !whole) {
    __syncthreads();
    const Cut cut = shared.cut;
    if (cut.taken > 0) EmitCut(tokens, cut, shared);
  }
  team.Wait();
}

// The kernel that holds runs of so many blocks.
auto KernelOf(int64_t run_blocks) {
  if (run_blocks <= kSelectFewLines * kWarp) return SelectTokensKernel<kSelectFewLines>;
  if (run_blocks <= kSelectManyLines * kWarp) return SelectTokensKernel<kSelectManyLines>;
  return SelectTokensKernel<0>;
}

cudaLaunchConfig_t ConfigOf(int team_size, int32_t groups, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(team_size), static_cast<unsigned>(groups));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return config;
}

// Bytes of shared memory that a thread block may have for ranks.
int64_t RankRoom() {
  int device = 0;
  int bytes = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                            device) == cudaSuccess;
  return known ? std::max<int64_t>(bytes - static_cast<int64_t>(sizeof(Shared)), 0) : 0;
}

absl::Status RankProtected(RankArgs args, const Launch& launch) {
  const int team_size = SelectTeamSize(args.flags.num_words, 1, launch.num_sms, ClusterLimit());
  args.run_words = static_cast<int32_t>(SelectRunBlocks(args.flags.num_words, team_size));
  return CudaStatus(
      LaunchDependent(ConfigOf(team_size, 1, launch.stream), RankKernel, args, team_size),
      "RankKernel");
}

}  // namespace

absl::Status SelectTokens(const SelectTokensParams& params, const Launch& launch) {
  if (params.groups == 0 || params.num_blocks == 0) return absl::OkStatus();
  // One word holds token num_tokens.
  const auto num_words = static_cast<int32_t>(params.num_tokens / kWordTokens + 1);
  const int64_t word_bytes = int64_t{num_words} * static_cast<int64_t>(sizeof(RankWord));
  const int team_size =
      SelectTeamSize(params.num_blocks, params.groups, launch.num_sms, ClusterLimit());
  const int64_t run_blocks = SelectRunBlocks(params.num_blocks, team_size);
  const auto kernel = KernelOf(run_blocks);
  cudaLaunchConfig_t config = ConfigOf(team_size, params.groups, launch.stream);
  Selection selection = {.params = params,
                         .num_words = num_words,
                         .words = nullptr,
                         .run_words = static_cast<int32_t>(SelectRunBlocks(num_words, 1)),
                         .run_blocks = static_cast<int32_t>(run_blocks)};
  const int64_t rank_room = RankRoom();
  const int64_t rank_bytes = word_bytes + int64_t{MaskShare(num_words, team_size)} *
                                              static_cast<int64_t>(sizeof(uint32_t));
  if (rank_bytes <= rank_room) {
    // The same room for every call: calls of other sizes may be on their way.
    absl::Status status =
        CudaStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(rank_room)),
                   "cudaFuncSetAttribute");
    if (!status.ok()) return status;
    config.dynamicSmemBytes = static_cast<size_t>(rank_bytes);
    return CudaStatus(LaunchDependent(config, kernel, selection, team_size), "SelectTokensKernel");
  }
  absl::StatusOr<Buffer> words = launch.Scratch(word_bytes);
  if (!words.ok()) return words.status();
  absl::Status status =
      RankProtected({.flags = {params.protected_tokens, params.num_tokens, num_words},
                     .words = words->as<RankWord>()},
                    launch);
  if (!status.ok()) return status;
  selection.words = words->as<RankWord>();
  return CudaStatus(LaunchDependent(config, kernel, selection, team_size), "SelectTokensKernel");
}

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// Selection without the host: one radix sort ranks the blocks of all groups, prefix sums over the
// ranks say what each block gives, prefix sums over the blocks say where it goes. Everything is
// integer arithmetic on ordered keys, so the result is exact and the same on every run.
//
//   count    unprotected tokens of each block
//   rank     radix sort by (group, score desc), stable: ties stay in block order
//   take     what each block gives, by prefix sums over the ranks; at most one block a group is cut
//   cut      threshold score of the tokens of the cut block (exact mode with token scores)
//   emit     kept tokens at offsets from prefix sums over the blocks
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include <algorithm>
#include <bit>

#include "cuda/cuda_status.h"
#include "cuda/operations.h"
#include "cuda/ordered_score.cuh"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kScoreBits = 32;
constexpr int kRadixBits = 8;
constexpr int kRadixBins = 1 << kRadixBits;

struct Selection {
  SelectTokensParams params;
  int lanes;               // lanes that share a block's tokens
  int32_t* unprotected;    // [B] tokens of the block that are not protected
  int64_t* rank_counts;    // [groups, B] what the block of this rank could give
  int64_t* rank_starts;    // [groups, B] exclusive prefix sums of rank_counts
  const int32_t* by_rank;  // [groups, B] blocks in rank order
  int32_t* take;           // [groups, B] unprotected tokens that the block gives
  int64_t* block_counts;   // [groups, B] tokens kept
  int64_t* block_offsets;  // [groups, B] exclusive prefix sums of block_counts
  int32_t* cut_block;      // [groups] block that gives a part, or -1
  uint32_t* cut_score;     // [groups] ordered score of the last token taken from it
  int32_t* cut_ties;       // [groups] tokens of exactly that score that are taken
};

// A group of `lanes` lanes works on a block; all lanes of the warp stay together. Calls
// f(token, in_block) for consecutive runs of `lanes` tokens.
template <typename F>
__device__ void ForEachToken(int32_t begin, int32_t end, int lane, int lanes, F&& f) {
  const auto length = static_cast<unsigned>(end - begin);
  const auto rounds = (length + lanes - 1) / lanes;
  const unsigned most = __reduce_max_sync(kFullWarp, rounds);
  for (unsigned round = 0; round < most; ++round) {
    const unsigned offset = round * lanes + lane;
    f(begin + static_cast<int32_t>(offset), offset < length);
  }
}

// Lanes of this lane's group for which `flag` holds, as bits from 0.
__device__ unsigned GroupBallot(bool flag, int lane, int lanes) {
  const unsigned votes = __ballot_sync(kFullWarp, flag);
  const int shift = (static_cast<int>(threadIdx.x) % kWarp) - lane;
  const unsigned mask = lanes == kWarp ? kFullWarp : (1U << lanes) - 1;
  return (votes >> shift) & mask;
}

__device__ int CountBelow(unsigned votes, int lane) { return __popc(votes & ((1U << lane) - 1)); }

__global__ void __launch_bounds__(kThreads) CountUnprotectedKernel(Selection s) {
  const SelectTokensParams& p = s.params;
  const int lane = static_cast<int>(threadIdx.x) % s.lanes;
  const int64_t block = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / s.lanes;
  const bool valid = block < p.num_blocks;
  const int32_t begin = valid ? p.block_starts[block] : 0;
  const int32_t end = valid ? p.block_starts[block + 1] : 0;
  int32_t count = 0;
  ForEachToken(begin, end, lane, s.lanes, [&](int32_t t, bool in_block) {
    count += __popc(GroupBallot(in_block && p.protected_tokens[t] == 0, lane, s.lanes));
  });
  if (valid && lane == 0) s.unprotected[block] = count;
}

// Sort keys ascend with rank: group, then (whole blocks) blocks without a protected token last,
// then falling scores. grid (blocks, groups)
__global__ void __launch_bounds__(kThreads)
    MakeKeysKernel(Selection s, uint64_t* keys, int32_t* blocks) {
  const SelectTokensParams& p = s.params;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block >= p.num_blocks) return;
  const int64_t group = blockIdx.y;
  const int64_t i = group * p.num_blocks + block;
  uint64_t major = static_cast<uint64_t>(group);
  if (p.num_whole_blocks > 0) {
    const int32_t length = p.block_starts[block + 1] - p.block_starts[block];
    major = major * 2 + (s.unprotected[block] == length ? 1 : 0);
  }
  keys[i] = major << kScoreBits | static_cast<uint32_t>(~OrderedScore(p.block_scores[i]));
  blocks[i] = static_cast<int32_t>(block);
}

__global__ void __launch_bounds__(kThreads) RankCountsKernel(Selection s, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) s.rank_counts[i] = s.unprotected[s.by_rank[i]];
}

// grid (ranks, groups)
__global__ void __launch_bounds__(kThreads) TakeKernel(Selection s) {
  const SelectTokensParams& p = s.params;
  const int64_t rank = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (rank >= p.num_blocks) return;
  const int64_t group = blockIdx.y;
  const int64_t row = group * p.num_blocks;
  const int32_t block = s.by_rank[row + rank];
  const int32_t available = s.unprotected[block];
  const int32_t length = p.block_starts[block + 1] - p.block_starts[block];
  int32_t taken = 0;
  if (p.num_whole_blocks > 0) {
    taken = rank < p.num_whole_blocks || available < length ? available : 0;
  } else {
    const int64_t last = row + p.num_blocks - 1;
    const int64_t total = s.rank_starts[last] + s.rank_counts[last] - s.rank_starts[row];
    const int64_t room = p.num_kept - (p.num_tokens - total);  // after the protected tokens
    const int64_t before = s.rank_starts[row + rank] - s.rank_starts[row];
    taken =
        static_cast<int32_t>(min(max(room - before, int64_t{0}), static_cast<int64_t>(available)));
    if (taken > 0 && taken < available) s.cut_block[group] = block;
  }
  s.take[row + block] = taken;
  s.block_counts[row + block] = length - available + taken;
}

// The cut block's take-th best unprotected token, by radix selection from the top byte down. One
// thread block a group; the histogram is of integers, so the order of atomics does not show.
__global__ void __launch_bounds__(kThreads) CutKernel(Selection s) {
  const SelectTokensParams& p = s.params;
  __shared__ int32_t bins[kRadixBins];
  __shared__ uint32_t prefix;
  __shared__ int32_t wanted;  // tokens still to take among those with the prefix
  const int64_t group = blockIdx.x;
  const int32_t block = s.cut_block[group];
  if (block < 0) return;
  const float* const scores = p.token_scores + group * p.num_tokens;
  const int32_t begin = p.block_starts[block];
  const int32_t end = p.block_starts[block + 1];
  if (threadIdx.x == 0) {
    prefix = 0;
    wanted = s.take[group * p.num_blocks + block];
  }
  for (int shift = kScoreBits - kRadixBits; shift >= 0; shift -= kRadixBits) {
    static_assert(kRadixBins == kThreads);
    bins[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t known = shift + kRadixBits == kScoreBits ? 0 : ~0U << (shift + kRadixBits);
    for (int32_t t = begin + static_cast<int32_t>(threadIdx.x); t < end; t += kThreads) {
      if (p.protected_tokens[t] != 0) continue;
      const uint32_t score = OrderedScore(scores[t]);
      if ((score & known) == prefix) atomicAdd(&bins[(score >> shift) % kRadixBins], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int bin = kRadixBins - 1;
      while (bins[bin] < wanted) wanted -= bins[bin--];
      prefix |= static_cast<uint32_t>(bin) << shift;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    s.cut_score[group] = prefix;
    s.cut_ties[group] = wanted;
  }
}

// Writes each block's kept tokens; grid (blocks, groups).
__global__ void __launch_bounds__(kThreads) EmitKernel(Selection s) {
  const SelectTokensParams& p = s.params;
  const int lane = static_cast<int>(threadIdx.x) % s.lanes;
  const int64_t block = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / s.lanes;
  const int64_t group = blockIdx.y;
  const int64_t row = group * p.num_blocks;
  const bool valid = block < p.num_blocks;
  const int32_t begin = valid ? p.block_starts[block] : 0;
  const int32_t end = valid ? p.block_starts[block + 1] : 0;
  const int64_t stride = p.num_whole_blocks > 0 ? p.num_tokens : p.num_kept;
  const int64_t offset = valid ? s.block_offsets[row + block] - s.block_offsets[row] : 0;
  const int32_t taken = valid ? s.take[row + block] : 0;
  const bool by_score = p.token_scores != nullptr && valid && s.cut_block[group] == block;
  const uint32_t cut_score = by_score ? s.cut_score[group] : 0;
  const int32_t cut_ties = by_score ? s.cut_ties[group] : 0;
  int32_t* const out = p.kept + group * stride + offset;
  int32_t num_written = 0;
  int32_t num_seen = 0;  // unprotected tokens, or tokens of the cut score
  ForEachToken(begin, end, lane, s.lanes, [&](int32_t t, bool in_block) {
    const bool is_protected = in_block && p.protected_tokens[t] != 0;
    const bool is_free = in_block && !is_protected;
    const uint32_t score =
        by_score && is_free ? OrderedScore(p.token_scores[group * p.num_tokens + t]) : 0;
    const bool counts = is_free && (!by_score || score == cut_score);
    const unsigned counted = GroupBallot(counts, lane, s.lanes);
    const int32_t order = num_seen + CountBelow(counted, lane);
    const bool chosen = (counts && order < (by_score ? cut_ties : taken)) ||
                        (by_score && is_free && score > cut_score);
    const unsigned kept = GroupBallot(is_protected || chosen, lane, s.lanes);
    if (is_protected || chosen) out[num_written + CountBelow(kept, lane)] = t;
    num_seen += __popc(counted);
    num_written += __popc(kept);
  });
  if (valid && lane == 0 && block == p.num_blocks - 1) {
    p.kept_counts[group] = static_cast<int32_t>(offset + num_written);
  }
}

// Scratch carved from one allocation.
class Arena {
 public:
  int64_t Add(int64_t size_bytes) {
    const int64_t offset = size_bytes_;
    size_bytes_ += CeilDiv(std::max<int64_t>(size_bytes, 1), kAlignment) * kAlignment;
    return offset;
  }
  int64_t size_bytes() const { return size_bytes_; }

 private:
  static constexpr int64_t kAlignment = 256;
  int64_t size_bytes_ = 0;
};

struct SortBuffers {
  uint64_t* keys = nullptr;
  uint64_t* sorted_keys = nullptr;
  int32_t* blocks = nullptr;
  int32_t* sorted_blocks = nullptr;
};

cudaError_t SortBlocks(void* scratch, size_t& scratch_bytes, const SortBuffers& sort, int64_t count,
                       int end_bit, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(scratch, scratch_bytes, sort.keys, sort.sorted_keys,
                                         sort.blocks, sort.sorted_blocks, count, 0, end_bit,
                                         stream);
}

cudaError_t PrefixSum(void* scratch, size_t& scratch_bytes, const int64_t* in, int64_t* out,
                      int64_t count, cudaStream_t stream) {
  return cub::DeviceScan::ExclusiveSum(scratch, scratch_bytes, in, out, count, stream);
}

int LanesPerBlock(const SelectTokensParams& params) {
  const int64_t mean_length = CeilDiv(params.num_tokens, params.num_blocks);
  return static_cast<int>(
      std::bit_ceil(static_cast<uint64_t>(std::clamp<int64_t>(mean_length, 1, kWarp))));
}

// Bits of a sort key that can differ.
int KeyBits(const SelectTokensParams& params) {
  const int whole = params.num_whole_blocks > 0 ? 1 : 0;
  return kScoreBits + whole + std::bit_width(static_cast<uint32_t>(params.groups - 1));
}

unsigned GridOf(int64_t threads) { return static_cast<unsigned>(CeilDiv(threads, kThreads)); }

absl::Status Rank(Selection& s, const SortBuffers& sort, void* scratch, size_t scratch_bytes,
                  cudaStream_t stream) {
  const SelectTokensParams& p = s.params;
  const int64_t count = p.groups * p.num_blocks;
  CountUnprotectedKernel<<<GridOf(p.num_blocks * s.lanes), kThreads, 0, stream>>>(s);
  if (absl::Status status = LaunchStatus("CountUnprotectedKernel"); !status.ok()) return status;
  const dim3 grid(GridOf(p.num_blocks), static_cast<unsigned>(p.groups));
  MakeKeysKernel<<<grid, kThreads, 0, stream>>>(s, sort.keys, sort.blocks);
  if (absl::Status status = LaunchStatus("MakeKeysKernel"); !status.ok()) return status;
  absl::Status status =
      CudaStatus(SortBlocks(scratch, scratch_bytes, sort, count, KeyBits(p), stream), "SortPairs");
  if (!status.ok()) return status;
  RankCountsKernel<<<GridOf(count), kThreads, 0, stream>>>(s, count);
  if (status = LaunchStatus("RankCountsKernel"); !status.ok()) return status;
  return CudaStatus(PrefixSum(scratch, scratch_bytes, s.rank_counts, s.rank_starts, count, stream),
                    "ExclusiveSum");
}

absl::Status TakeAndEmit(const Selection& s, void* scratch, size_t scratch_bytes,
                         cudaStream_t stream) {
  const SelectTokensParams& p = s.params;
  const auto groups = static_cast<unsigned>(p.groups);
  absl::Status status = CudaStatus(
      cudaMemsetAsync(s.cut_block, 0xFF, groups * sizeof(int32_t), stream), "cudaMemsetAsync");
  if (!status.ok()) return status;
  TakeKernel<<<dim3(GridOf(p.num_blocks), groups), kThreads, 0, stream>>>(s);
  if (status = LaunchStatus("TakeKernel"); !status.ok()) return status;
  if (p.num_whole_blocks == 0 && p.token_scores != nullptr) {
    CutKernel<<<groups, kThreads, 0, stream>>>(s);
    if (status = LaunchStatus("CutKernel"); !status.ok()) return status;
  }
  status.Update(CudaStatus(PrefixSum(scratch, scratch_bytes, s.block_counts, s.block_offsets,
                                     p.groups * p.num_blocks, stream),
                           "ExclusiveSum"));
  if (!status.ok()) return status;
  EmitKernel<<<dim3(GridOf(p.num_blocks * s.lanes), groups), kThreads, 0, stream>>>(s);
  return LaunchStatus("EmitKernel");
}

}  // namespace

absl::Status SelectTokens(const SelectTokensParams& params, const Launch& launch) {
  const int64_t count = params.groups * params.num_blocks;
  if (count == 0) return absl::OkStatus();
  size_t sort_bytes = 0;
  size_t scan_bytes = 0;
  absl::Status status = CudaStatus(
      SortBlocks(nullptr, sort_bytes, {}, count, KeyBits(params), launch.stream), "SortPairs");
  if (!status.ok()) return status;
  status.Update(CudaStatus(PrefixSum(nullptr, scan_bytes, nullptr, nullptr, count, launch.stream),
                           "ExclusiveSum"));
  if (!status.ok()) return status;
  const size_t scratch_bytes = std::max(sort_bytes, scan_bytes);

  Arena arena;
  constexpr auto kInt32 = static_cast<int64_t>(sizeof(int32_t));
  constexpr auto kInt64 = static_cast<int64_t>(sizeof(int64_t));
  const int64_t scratch_at = arena.Add(static_cast<int64_t>(scratch_bytes));
  const int64_t keys_at = arena.Add(count * kInt64);
  const int64_t sorted_keys_at = arena.Add(count * kInt64);
  const int64_t blocks_at = arena.Add(count * kInt32);
  const int64_t sorted_blocks_at = arena.Add(count * kInt32);
  const int64_t counts_at = arena.Add(count * kInt64);
  const int64_t unprotected_at = arena.Add(params.num_blocks * kInt32);
  const int64_t cuts_at = arena.Add(3 * params.groups * kInt32);
  absl::StatusOr<Buffer> memory = launch.Scratch(arena.size_bytes());
  if (!memory.ok()) return memory.status();
  std::byte* const base = memory->data();
  const auto int32_at = [base](int64_t at) { return reinterpret_cast<int32_t*>(base + at); };
  const auto int64_at = [base](int64_t at) { return reinterpret_cast<int64_t*>(base + at); };

  const SortBuffers sort = {.keys = reinterpret_cast<uint64_t*>(base + keys_at),
                            .sorted_keys = reinterpret_cast<uint64_t*>(base + sorted_keys_at),
                            .blocks = int32_at(blocks_at),
                            .sorted_blocks = int32_at(sorted_blocks_at)};
  // Keys are done with once sorted; their memory holds counts and prefix sums. Sums over ranks are
  // done with once every block knows what it gives; sums over blocks take their place.
  Selection selection = {
      .params = params,
      .lanes = LanesPerBlock(params),
      .unprotected = int32_at(unprotected_at),
      .rank_counts = int64_at(keys_at),
      .rank_starts = int64_at(sorted_keys_at),
      .by_rank = sort.sorted_blocks,
      .take = sort.blocks,
      .block_counts = int64_at(counts_at),
      .block_offsets = int64_at(sorted_keys_at),
      .cut_block = int32_at(cuts_at),
      .cut_score = reinterpret_cast<uint32_t*>(int32_at(cuts_at) + params.groups),
      .cut_ties = int32_at(cuts_at) + 2 * params.groups,
  };
  status.Update(Rank(selection, sort, base + scratch_at, scratch_bytes, launch.stream));
  if (!status.ok()) return status;
  return TakeAndEmit(selection, base + scratch_at, scratch_bytes, launch.stream);
}

}  // namespace dynsplit::kernels

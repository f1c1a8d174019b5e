// SPDX-License-Identifier: Apache-2.0
//
// One pass of MeasureAttention by warpgroups (group_mma.cuh), for aligned 16-bit keys and values of
// 64 or 128 channels. A warpgroup holds 64 query rows' outputs in registers; the rows themselves
// stay in shared memory, through which tiles of keys and values pass, a few ahead:
//
//   logits  = queries keys^T           both from shared memory
//   weights = 2^(logits - maximum)     in registers
//   outputs += weights values          weights from registers, values by columns
//
// Bound by the tensor cores: weights are split into a high and a low half of the 16-bit type, so
// that the error of the products stays near that of fp32 (attend_mma.cu). The four warpgroups of a
// thread block take turns at the last product, which is the longest step, and so fall behind each
// other: while one adds values the others take products of keys, or exponentials.
//
// A warpgroup never has products under way across a branch or the end of the loop: ptxas would
// serialise them.
#include <algorithm>

#include "cuda/async_copy.cuh"
#include "cuda/attend.cuh"
#include "cuda/cuda_status.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/group_mma.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kGroups = 4;  // as many as the registers serve
constexpr int kThreads = kGroups * kGroupThreads;
constexpr int kBlockRows = kGroups * kGroupRows;
constexpr int kTileItems = kMarkedItems;

// Shared memory of a thread block: the rows (their low halves behind them), then the stages, each
// a tile of keys and one of values.
template <int kSteps, bool kTurned>
struct SharedLayout {
  static constexpr int kRowBytes = kSteps * 32;
  static constexpr int kRowsBytes = kGroupRows * kRowBytes;  // of a warpgroup
  static constexpr int kTileBytes = kTileItems * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kQueryBytes = kGroups * kRowsBytes * (kTurned ? 2 : 1);
  static constexpr int kStages = kTurned ? 3 : 4;  // what a multiprocessor has room for
  static constexpr int kBytes = kSharedAlignment + kQueryBytes + kStages * kStageBytes;
  static_assert(kTileBytes % kSharedAlignment == 0 && kRowsBytes % kSharedAlignment == 0);
};

#ifdef DYNSPLIT_HAS_GROUP_MMA

// Where all warps of a thread block must have been before any goes on; unlike __syncthreads, what
// a warp has to do until it needs the others lies between. What a thread did before Arrive is seen
// by every thread behind Wait.
class Meeting {
 public:
  __device__ explicit Meeting(uint64_t* barrier) : address_(SharedAddress(barrier)) {}
  // By one thread, before a __syncthreads.
  __device__ void Open() const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_), "n"(kThreads / kWarp)
                 : "memory");
  }
  __device__ void Arrive() const {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
      asm volatile(
          "{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}\n" ::"r"(address_)
          : "memory");
    }
  }
  // For the next meeting that this thread has not waited for.
  __device__ void Wait() {
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n}\n"
          : "=r"(done)
          : "r"(address_), "r"(parity_)
          : "memory");
    }
    __syncwarp();
    parity_ ^= 1;
  }

 private:
  const uint32_t address_;
  uint32_t parity_ = 0;
};

// The tiles of a thread block: every gridDim.x-th. All threads copy a part of each, and call:
// the constructor, then for each tile its uses, AnnounceNext, its last uses, Advance.
template <int kSteps, bool kTurned>
class Tiles {
 public:
  using Shared = SharedLayout<kSteps, kTurned>;
  static constexpr int kStages = Shared::kStages;

  // `stages` is what the thread block has for them.
  __device__ Tiles(const Pass& pass, int h, std::byte* stages, Meeting meeting)
      : pass_(pass), stages_(stages), meeting_(meeting), h_(h) {
    tile_ = static_cast<int>(blockIdx.x);
#pragma unroll
    for (int ahead = 0; ahead < kStages - 1; ++ahead) Fetch(ahead, ahead);
    WaitForCopies<kStages - 2>();
    ShowToGroupMma();
    if (threadIdx.x == 0) meeting_.Open();
    __syncthreads();  // the first tile is here
  }
  // First item of the tile; the pass's end if there is none.
  __device__ bool done() const { return first() >= pass_.num_items; }
  __device__ int64_t first() const { return static_cast<int64_t>(tile_) * kTileItems; }
  __device__ int index() const { return tile_; }
  __device__ uint32_t keys() const {
    return SharedAddress(stages_) + static_cast<uint32_t>(stage_ * Shared::kStageBytes);
  }
  __device__ uint32_t values() const { return keys() + Shared::kTileBytes; }

  // This thread's part of the next tile is here. Says too that it is done with the tile before.
  __device__ void AnnounceNext() const {
    WaitForCopies<kStages - 3>();
    ShowToGroupMma();
    meeting_.Arrive();
  }
  // On to the next tile; a later one takes the place of the tile before.
  __device__ void Advance() {
    meeting_.Wait();
    Fetch(kStages - 1, stage_ == 0 ? kStages - 1 : stage_ - 1);
    stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
    tile_ += static_cast<int>(gridDim.x);
  }

 private:
  __device__ void Fetch(int ahead, int stage) {
    const int64_t first = (static_cast<int64_t>(ahead) * gridDim.x + tile_) * kTileItems;
    if (first < pass_.num_items) {
      std::byte* const keys = stages_ + stage * Shared::kStageBytes;
      CopySwizzledRows<kSteps, kTileItems, kThreads>(pass_.keys, pass_.num_items, h_, first, keys);
      CopySwizzledRows<kSteps, kTileItems, kThreads>(pass_.values, pass_.num_items, h_, first,
                                                     keys + Shared::kTileBytes);
    }
    CommitCopies();  // even of nothing: AnnounceNext counts them
  }

  const Pass& pass_;
  std::byte* const stages_;
  Meeting meeting_;
  const int h_;
  int tile_;
  int stage_ = 0;
};

// The block's rows [first, first + kBlockRows) of `packed`, an array of kGroupRows a warpgroup;
// zeros beyond the rows. Committed with the first tile.
template <int kSteps>
__device__ void CopyQueries(const Queries& queries, const void* packed, int h, int first,
                            std::byte* shared) {
  constexpr int kRowChunks = kSteps * 2;
  const auto* const rows = static_cast<const std::byte*>(packed) +
                           static_cast<int64_t>(h) * queries.rows * (kRowChunks * kChunkBytes);
  for (int unit = static_cast<int>(threadIdx.x); unit < kBlockRows * kRowChunks; unit += kThreads) {
    const int row = unit / kRowChunks;
    const int chunk = unit % kRowChunks;
    const bool valid = first + row < queries.rows;
    std::byte* const array = shared + row / kGroupRows * (kGroupRows * kSteps * 32);
    CopyAsync<kChunkBytes>(
        array + SwizzledByte<kGroupRows>(row % kGroupRows, chunk),
        rows + (static_cast<int64_t>(valid ? first + row : 0) * kRowChunks + chunk) * kChunkBytes,
        valid);
  }
}

// What a thread holds of its warpgroup's rows: two of them (halves), as group_mma.cuh says.
template <int kSteps>
struct RowState {
  float maximum[2] = {kNoLogit, kNoLogit};
  float sum[2] = {};     // of this thread's columns
  float marked[2] = {};  // of those among them that are marked
  float output[kSteps * 8] = {};
};

using Logits = float[kTileItems / 2];

// logits = rows' products with the tile's keys. `low`: address of the rows' low halves.
template <typename T, int kSteps, bool kTurned>
__device__ void MultiplyKeys(uint32_t rows, uint32_t low, uint32_t keys, Logits& logits) {
  BeginGroupMma();
  if constexpr (kTurned) {  // the small products first
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      GroupMma<T>(logits, SwizzledRows<kGroupRows>(low, 0, step),
                  SwizzledRows<kTileItems>(keys, 0, step), step);
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    GroupMma<T>(logits, SwizzledRows<kGroupRows>(rows, 0, step),
                SwizzledRows<kTileItems>(keys, 0, step), kTurned ? 1 : step);
  }
  CommitGroupMma();
  WaitForGroupMma<0>();
  Own(logits);
}

// Hides items beyond the last, and those that a row does not see. `first_row`: of the warpgroup.
__device__ void MaskItems(const Pass& pass, int h, int64_t first, int first_row, Logits& logits) {
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int upper = first_row + thread / kWarp * 16 + thread % kWarp / 4;
  const int window = pass.queries.window;
  const auto num_tokens = static_cast<int>(pass.num_tokens);
  const int last_visible[2] = {num_tokens - window + upper % window,
                               num_tokens - window + (upper + 8) % window};
  const auto column = static_cast<int>(first) + thread % 4 * 2;
  const int num_here = static_cast<int>(pass.num_items) - column;
  const int32_t* positions = pass.positions;
  if (positions != nullptr)
    positions += (pass.positions_per_head ? h * pass.num_items : 0) + column;
#pragma unroll
  for (int i = 0; i < kTileItems / 4; ++i) {
    const int place = i / 2 * 8 + i % 2;
    int position = num_tokens;  // visible to none
    if (place < num_here) position = positions == nullptr ? column + place : positions[place];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (position > last_visible[half]) logits[i / 2 * 4 + 2 * half + i % 2] = -INFINITY;
    }
  }
}

// Brings the maxima up to date where the weights might otherwise exceed 2^kMostGrowth.
template <int kSteps>
__device__ void RaiseMaxima(const Logits& logits, float scale_log2, RowState<kSteps>& state) {
  constexpr float kMostGrowth = 8;  // fp16 weights reach to 2^16
  float largest[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = fmaxf(logits[2 * half], logits[2 * half + 1]);
#pragma unroll
    for (int j = 1; j < kTileItems / 8; ++j) {
      most = fmaxf(most, fmaxf(logits[4 * j + 2 * half], logits[4 * j + 2 * half + 1]));
    }
    largest[half] = GroupMax(most, 4) * scale_log2;
  }
  const bool grown =
      largest[0] > state.maximum[0] + kMostGrowth || largest[1] > state.maximum[1] + kMostGrowth;
  if (!__any_sync(kFullWarp, grown)) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float maximum = fmaxf(state.maximum[half], largest[half]);
    const float shrink = Exp2(state.maximum[half] - maximum);
    state.maximum[half] = maximum;
    state.sum[half] *= shrink;
    state.marked[half] *= shrink;
#pragma unroll
    for (int j = 0; j < kSteps * 2; ++j) {
      state.output[4 * j + 2 * half] *= shrink;
      state.output[4 * j + 2 * half + 1] *= shrink;
    }
  }
}

// Two values as high + low, each a pair of T.
template <typename T>
__device__ void SplitPair(float first, float second, uint32_t& high, uint32_t& low) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 rounded = __floats2half2_rn(first, second);
    const float2 back = __half22float2(rounded);
    const __half2 rest = __floats2half2_rn(first - back.x, second - back.y);
    high = *reinterpret_cast<const uint32_t*>(&rounded);
    low = *reinterpret_cast<const uint32_t*>(&rest);
  } else {
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(first, second);
    high = *reinterpret_cast<const uint32_t*>(&rounded);
    const __nv_bfloat162 rest = __floats2bfloat162_rn(first - __uint_as_float(high << 16),
                                                      second - __uint_as_float(high & 0xFFFF0000U));
    low = *reinterpret_cast<const uint32_t*>(&rest);
  }
}

using Factors = uint32_t[kTileItems / 16][4];  // left factors, a step of items each

// Weights of the logits, as left factors; adds them to the sums. Bit n of `marks`: item n counts.
template <typename T, int kSteps, bool kMarked>
__device__ void Weigh(const Logits& logits, float scale_log2, uint2 marks, RowState<kSteps>& state,
                      Factors& high, Factors& low) {
  const unsigned quad_lane = threadIdx.x % 4;
  const uint32_t bits[2] = {marks.x >> (2 * quad_lane), marks.y >> (2 * quad_lane)};
#pragma unroll
  for (int pair = 0; pair < kTileItems / 4; ++pair) {  // of adjacent columns of a row
    const int half = pair % 2;
    const int column = pair / 2 * 8;
    float weights[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weights[i] = Exp2(fmaf(logits[2 * pair + i], scale_log2, -state.maximum[half]));
      state.sum[half] += weights[i];
      if (kMarked && (bits[column / 32] >> (column % 32 + i) & 1) != 0) {
        state.marked[half] += weights[i];
      }
    }
    SplitPair<T>(weights[0], weights[1], high[pair / 4][pair % 4], low[pair / 4][pair % 4]);
  }
}

// output += weights * values.
template <typename T, int kSteps>
__device__ void AddValues(Factors& high, Factors& low, uint32_t values, const Turns& turns,
                          RowState<kSteps>& state) {
  turns.Wait();
  BeginGroupMma();
#pragma unroll
  for (int step = 0; step < kTileItems / 16; ++step) {
    const uint64_t columns = SwizzledColumns<kTileItems>(values, step);
    GroupMmaColumns<T>(state.output, high[step], columns);
    GroupMmaColumns<T>(state.output, low[step], columns);
  }
  CommitGroupMma();
  turns.Pass();
  WaitForGroupMma<0>();
  Own(state.output);
#pragma unroll
  for (int step = 0; step < kTileItems / 16; ++step) {
    Own(high[step]);
    Own(low[step]);
  }
}

template <int kSteps, bool kMarked>
__device__ void WriteRows(const Pass& pass, int h, int first_row, const RowState<kSteps>& state) {
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int64_t all_rows = static_cast<int64_t>(pass.num_kv_heads) * pass.queries.rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = GroupSum(state.sum[half], 4);
    const float marked = kMarked ? GroupSum(state.marked[half], 4) : 0;
    const int r = first_row + thread / kWarp * 16 + thread % kWarp / 4 + half * 8;
    if (r >= pass.queries.rows) continue;
    const int64_t row = blockIdx.x * all_rows + static_cast<int64_t>(h) * pass.queries.rows + r;
    if (thread % 4 == 0) {
      pass.out.sums[row] = make_float2(state.maximum[half], sum);
      if constexpr (kMarked) pass.marked_sums[row] = make_float2(state.maximum[half], marked);
    }
    float* const to = pass.out.outputs + row * (kSteps * 16) + thread % 4 * 2;
#pragma unroll
    for (int j = 0; j < kSteps * 2; ++j) {
      *reinterpret_cast<float2*>(to + 8 * j) =
          make_float2(state.output[4 * j + 2 * half], state.output[4 * j + 2 * half + 1]);
    }
  }
}

// grid (splits, row blocks, KV heads)
template <typename T, int kSteps, bool kTurned, bool kMarked>
__global__ void __launch_bounds__(kThreads, 1)
    AttendGroupKernel(const __grid_constant__ Pass pass) {
  using Shared = SharedLayout<kSteps, kTurned>;
  extern __shared__ std::byte shared[];
  __shared__ uint64_t meeting;
  std::byte* const queries = AlignShared(shared);
  WaitForEarlierGrids();
  AllowDependents();
  const int h = static_cast<int>(blockIdx.z);
  const int group = GroupIndex();
  const int block_row = static_cast<int>(blockIdx.y) * kBlockRows;
  const int first_row = block_row + group * kGroupRows;
  const int num_groups =
      min((pass.queries.rows - block_row + kGroupRows - 1) / kGroupRows, kGroups);
  CopyQueries<kSteps>(pass.queries, pass.queries.high, h, block_row, queries);
  if constexpr (kTurned) {
    CopyQueries<kSteps>(pass.queries, pass.queries.low, h, block_row,
                        queries + kGroups * Shared::kRowsBytes);
  }
  Tiles<kSteps, kTurned> tiles(pass, h, queries + Shared::kQueryBytes, Meeting(&meeting));
  if (group >= num_groups) {  // no rows, but a part in the copies
    for (; !tiles.done(); tiles.Advance()) tiles.AnnounceNext();
    return;
  }

  const uint32_t rows = SharedAddress(queries) + static_cast<uint32_t>(group * Shared::kRowsBytes);
  const uint32_t low_rows = rows + kGroups * Shared::kRowsBytes;
  const int64_t first_masked = pass.num_items - pass.queries.window + 1;  // positions ascend
  const int first_mark = pass.positions_per_head ? h * static_cast<int>(pass.mark_stride()) : 0;
  const Turns turns(group, num_groups);
  RowState<kSteps> state;
  for (; !tiles.done(); tiles.Advance()) {
    const uint2 marks = kMarked ? pass.marks[first_mark + tiles.index()] : make_uint2(0, 0);
    Logits logits;
    MultiplyKeys<T, kSteps, kTurned>(rows, low_rows, tiles.keys(), logits);
    if (tiles.first() + kTileItems > first_masked) {
      MaskItems(pass, h, tiles.first(), first_row, logits);
    }
    RaiseMaxima<kSteps>(logits, pass.scale_log2, state);
    Factors high;
    Factors low;
    Weigh<T, kSteps, kMarked>(logits, pass.scale_log2, marks, state, high, low);
    tiles.AnnounceNext();
    AddValues<T, kSteps>(high, low, tiles.values(), turns, state);
  }
  WriteRows<kSteps, kMarked>(pass, h, first_row, state);
}

#else

template <typename T, int kSteps, bool kTurned, bool kMarked>
__global__ void AttendGroupKernel(const __grid_constant__ Pass) {}

#endif  // DYNSPLIT_HAS_GROUP_MMA

int64_t RowBlocks(const Pass& pass) {
  return CeilDiv(pass.queries.rows, kBlockRows) * pass.num_kv_heads;
}

template <typename T, int kSteps, bool kTurned, bool kMarked>
absl::Status LaunchPass(const Pass& pass, cudaStream_t stream) {
  constexpr int kBytes = SharedLayout<kSteps, kTurned>::kBytes;
  const auto kernel = AttendGroupKernel<T, kSteps, kTurned, kMarked>;
  absl::Status status =
      CudaStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
                 "cudaFuncSetAttribute");
  if (!status.ok()) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(pass.out.splits),
                        static_cast<unsigned>(CeilDiv(pass.queries.rows, kBlockRows)),
                        static_cast<unsigned>(pass.num_kv_heads));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  return CudaStatus(LaunchDependent<Pass>(config, kernel, pass), "AttendGroupKernel");
}

// Marked items are original ones, whose queries are never turned.
template <typename T, int kSteps>
absl::Status LaunchDepth(const Pass& pass, cudaStream_t stream) {
  if (pass.marks != nullptr) return LaunchPass<T, kSteps, false, true>(pass, stream);
  if (pass.queries.low != nullptr) return LaunchPass<T, kSteps, true, false>(pass, stream);
  return LaunchPass<T, kSteps, false, false>(pass, stream);
}

template <typename T>
absl::Status LaunchType(const Pass& pass, cudaStream_t stream) {
  return pass.keys.head_dim == 64 ? LaunchDepth<T, 4>(pass, stream)
                                  : LaunchDepth<T, 8>(pass, stream);
}

}  // namespace

bool UsesGroupMma(const Pass& pass, DType queries_dtype) {
#ifndef DYNSPLIT_GROUP_MMA
  return false;  // not compiled for a device that has it
#endif
  return UsesTensorCores(pass, queries_dtype) && pass.values.data != nullptr &&
         !pass.keys_by_position && (pass.keys.head_dim == 64 || pass.keys.head_dim == 128) &&
         pass.keys_aligned && pass.values_aligned && pass.scale_log2 > 0 && DeviceHasGroupMma();
}

int GroupSplits(const Pass& pass, int num_sms) {
  return static_cast<int>(std::clamp<int64_t>(
      num_sms / RowBlocks(pass), 1, std::max<int64_t>(CeilDiv(pass.num_items, kTileItems), 1)));
}

absl::Status AttendGroup(const Pass& pass, cudaStream_t stream) {
  return pass.keys.dtype == DType::kFloat16 ? LaunchType<__half>(pass, stream)
                                            : LaunchType<__nv_bfloat16>(pass, stream);
}

}  // namespace dynsplit::kernels

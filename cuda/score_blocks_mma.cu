// SPDX-License-Identifier: Apache-2.0
//
// ScoreTiles of score_blocks.h, bound by reading the rows once: summaries of blocks, or keys of
// tokens, which are blocks of one token that need not lie in order. The bound is a product of twice
// the channels: where max >= min, max(q * max, q * min) = q+ * max + q- * min with q+ = max(q, 0)
// and q- = min(q, 0). Tensor cores do it with 16 blocks a warp against 8 query rows at a time:
//
//   tiles    all of a warp's summaries are requested at once, into shared memory or registers;
//            queries are laid out meanwhile. Logits, and maximum and sum a tile, go to scratch
//   combine  log-sum-exp of the rows from those of the tiles, weights, sum over the rows
//
// Channel order. A product does not depend on it, so both factors follow the 16-byte loads: quad
// lane q of a row reads vectors 4v + q, and the queries' channels lie in shared memory as the lanes
// want them (mma.cuh does the same for 16-bit tiles).
//
// One-byte codes become fp16 exactly and meet fp16 queries, scaled by a power of two a row, so that
// the largest magnitude is in [2^14, 2^15). That is exact for all bf16 channels within 2^-31 of the
// largest (fp16: 2^-28); what is smaller is off by at most 2^-39 of it, far below fp32 rounding of
// the sum. Products of codes accumulate in fp32 (at most 2^33); the block's scale comes last.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "cuda/async_copy.cuh"
#include "cuda/cuda_status.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/exponent.cuh"
#include "cuda/mma.cuh"
#include "cuda/operations.h"
#include "cuda/score_blocks.h"

namespace dynsplit::kernels {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTargetExponent = 14;
static_assert(kWarps * kTileRows == kScoreTileBlocks);

// What differs between items; bounds are minima, then maxima (or means, then null).
struct Item {
  const std::byte* queries;
  const std::byte* bounds[2];
  const int32_t* places;  // [num_blocks] a head, or for all; null = in order, as bounds always are
  const float* scales;
  const int32_t* block_starts;  // null: blocks of one token
  float* scores;
  float* scratch;  // ScoreScratch
  int64_t head_stride;
  int64_t num_blocks;
};

struct Batch {
  Item items[kScoreBatchItems];
  int64_t query_token_stride;
  int64_t query_head_stride;
  int64_t block_stride;
  int64_t scale_block_stride;
  int64_t scale_head_stride;
  int32_t num_kv_heads;
  int32_t group;   // query heads a KV head
  int32_t window;  // queries
  int32_t rows;    // group x window: head r / window, query r % window
  int32_t head_dim;
  bool places_per_head;
  float scale_log2;  // softmax_scale * log2(e)
};
static_assert(sizeof(Batch) <= 8192);

// Of one item and KV head, in scratch.
struct Rows {
  float* logits;  // base 2
  float2* partials;
  int64_t stride;
  int64_t tiles;

  __device__ Rows(const Batch& batch, const Item& item, int h)
      : stride((item.num_blocks + kScoreStride - 1) / kScoreStride * kScoreStride),
        tiles((item.num_blocks + kScoreTileBlocks - 1) / kScoreTileBlocks) {
    const int64_t first = static_cast<int64_t>(h) * batch.rows;
    logits = item.scratch + first * stride;
    partials = reinterpret_cast<float2*>(item.scratch + static_cast<int64_t>(batch.num_kv_heads) *
                                                            batch.rows * stride) +
               first * tiles;
  }
};

// Where a warp is.
struct Place {
  const Batch& batch;
  const Item& item;
  int h;
  int warp;
  int lane;
  int64_t first_block;  // of the warp's 16

  // Where the block's row lies. Requires: block < item.num_blocks.
  __device__ int64_t RowOf(int64_t block) const {
    if (item.places == nullptr) return block;
    return item.places[(batch.places_per_head ? h * item.num_blocks : 0) + block];
  }
};

// Volatile, so that requests stay ahead of the barrier; summaries are read once a step.
__device__ uint4 LoadOnce(const std::byte* address) {
  uint4 value;
  asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// The two low codes as fp16.
template <typename Code>
__device__ uint32_t Widen(uint32_t codes) {
  if constexpr (std::is_same_v<Code, E4M3>) {
    const __half2_raw pair =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
    return static_cast<uint32_t>(pair.y) << 16 | pair.x;
  } else {
    // 1024 + n has n, which is the code + 128, in its lowest bits; the difference is exact.
    const uint32_t biased = __byte_perm(codes ^ 0x8080U, 0x64646464U, 0x4140);
    const __half2 sum = *reinterpret_cast<const __half2*>(&biased);
    const __half2 code = __hsub2(sum, __float2half2_rn(1024 + 128));
    return *reinterpret_cast<const uint32_t*>(&code);
  }
}

// kChannels >= head_dim; kBounds = 2, or 1 for means; kStageTiles tiles of 8 query rows are in
// shared memory at a time: 1 if there are no more, else 4.
template <typename Summary, typename Query, int kChannels, int kBounds, int kStageTiles>
struct Tiles {
  static constexpr int kStage = kStageTiles;
  static constexpr bool kCodes = sizeof(Summary) == 1;
  using Factor = std::conditional_t<kCodes, __half, Summary>;
  static constexpr int kVectors = kChannels * static_cast<int>(sizeof(Summary)) / 64;  // of a lane
  static constexpr int kChunks = kChannels / kChunk;
  static constexpr int kColumns = kStage * kTileCols;
  static constexpr int kLaneVectors = 2 * kBounds * kVectors;
  // Where one tile of queries takes them all, summaries wait in shared memory: registers would
  // bound what is under way. Residency: thread blocks an SM, so that 128 to 192 KiB of summaries
  // are.
  static constexpr int kSummaryBytes = kThreads * kLaneVectors * kChunkBytes;
  static constexpr bool kShared = kStage == 1 && kSummaryBytes <= (64 << 10);
  static constexpr int kSharedBytes = kShared ? kSummaryBytes : 0;
  // Registers of summaries; codes that meet more than one tile are kept as fp16.
  static constexpr int kRegisters = kLaneVectors * 4 * (kCodes && kStage > 1 ? 2 : 1);
  static constexpr int kResidency = kShared            ? (kRegisters <= 32 ? 5 : 3)
                                    : kRegisters <= 32 ? 3
                                    : kRegisters <= 64 ? 2
                                                       : 1;
  static constexpr int kParts = kChannels / 32;  // 16 bytes of query a lane, two steps of the mma

  // Element [.., part, lane]: the 8 channels that lane % 4 multiplies in this part, of column
  // lane / 4.
  struct Shared {
    uint4 queries[kStage][kBounds][kParts][kWarp];
    float units[kColumns];             // logit, base 2, of a product of 1
    float lengths[kWarps][kTileRows];  // of the blocks, 0 beyond the last
    float scales[kWarps][kTileRows];
    float2 sums[kWarps][kColumns];
  };

  uint4 vectors[2][kBounds][kVectors];  // of blocks lane / 4 and lane / 4 + 8 of the warp's 16

  // `own` is where the lane's copies go in shared memory, kThreads apart.
  __device__ void Request(const Place& at, uint4* own) {
    const auto& [batch, item, h, warp, lane, first_block] = at;
    const int row_bytes = batch.head_dim * static_cast<int>(sizeof(Summary));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t block = first_block + half * 8 + lane / 4;
      const bool exists = block < item.num_blocks;
      const int64_t row = kBounds == 1 && exists ? at.RowOf(block) : block;
      const int64_t offset = row * batch.block_stride + h * item.head_stride + lane % 4 * 16;
#pragma unroll
      for (int bound = 0; bound < kBounds; ++bound) {
        const std::byte* const address = item.bounds[bound] + offset;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const bool inside = exists && v * 64 + lane % 4 * 16 < row_bytes;
          if constexpr (kShared) {
            CopyAsync<kChunkBytes>(own, address + v * 64, inside);
            own += kThreads;
          } else {
            vectors[half][bound][v] = inside ? LoadOnce(address + v * 64) : make_uint4(0, 0, 0, 0);
          }
        }
      }
    }
    if constexpr (kShared) CommitCopies();
  }

  // What the lane requested, which no other lane reads.
  __device__ void Take(const uint4* own) {
    if constexpr (!kShared) return;
    WaitForCopies<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int bound = 0; bound < kBounds; ++bound) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v, own += kThreads) vectors[half][bound][v] = *own;
      }
    }
  }

  // Of the warp's blocks. Not in registers, which the requests need.
  __device__ static void StageBlocks(const Place& at, Shared& shared) {
    const auto& [batch, item, h, warp, lane, first_block] = at;
    if (lane >= kTileRows) return;
    const int64_t block = first_block + lane;
    const bool inside = block < item.num_blocks;
    const int32_t* const starts = item.block_starts;
    const bool of_one = kBounds == 1 && starts == nullptr;
    const int32_t length = !inside ? 0 : of_one ? 1 : starts[block + 1] - starts[block];
    shared.lengths[warp][lane] = static_cast<float>(length);
    const int64_t row = kBounds == 1 && inside ? at.RowOf(block) : block;
    shared.scales[warp][lane] =
        inside && kCodes ? item.scales[h * batch.scale_head_stride + row * batch.scale_block_stride]
                         : 1;
  }

  // Column `column` of the stage, which is query row `r`; zeros beyond the last row. One warp.
  __device__ static void StageColumn(const Place& at, int r, int column, Shared& shared) {
    const auto& [batch, item, h, warp, lane, first_block] = at;
    float values[kChunk] = {};
    if (r < batch.rows && lane * kChunk < batch.head_dim) {
      const int head = h * batch.group + r / batch.window;
      const std::byte* const row = item.queries + head * batch.query_head_stride +
                                   r % batch.window * batch.query_token_stride;
      LoadValues<Query>(row, lane, true, 1.0F, values);
    }
    float unit = batch.scale_log2;
    if constexpr (kCodes) {
      float largest = 0;
#pragma unroll
      for (int c = 0; c < kChunk; ++c) largest = fmaxf(largest, fabsf(values[c]));
      const uint32_t bits = __float_as_uint(GroupMax(largest, kWarp));
      const int shift = min(kTargetExponent + 127 - static_cast<int>(bits >> 23), 126);
      const float factor = __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
      unit *= __uint_as_float(static_cast<uint32_t>(127 - shift) << 23);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) values[c] *= factor;
    }
    if (lane == 0) shared.units[column] = unit;
    if (lane >= kChunks) return;
    const int part = kCodes ? lane / 8 * 2 + lane % 2 : lane / 4;
    const int quad = kCodes ? lane / 2 % 4 : lane % 4;
#pragma unroll
    for (int bound = 0; bound < kBounds; ++bound) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float pair[2] = {values[2 * w], values[2 * w + 1]};
#pragma unroll
        for (float& value : pair) {
          if (kBounds == 2) value = bound == 0 ? fminf(value, 0.0F) : fmaxf(value, 0.0F);
        }
        words[w] = PackPair<Factor>(pair[0], pair[1]);
      }
      shared.queries[column / kTileCols][bound][part][column % kTileCols * 4 + quad] =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  // Products of the 16 blocks with 8 columns.
  __device__ void Multiply(const Shared& shared, int tile, int lane, float (&sums)[4]) const {
    float bound_sums[kBounds][4] = {};  // chains that do not wait for each other
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int bound = 0; bound < kBounds; ++bound) {
        const uint4 upper = vectors[0][bound][v];
        const uint4 lower = vectors[1][bound][v];
        if constexpr (kCodes) {
          const uint32_t upper_words[4] = {upper.x, upper.y, upper.z, upper.w};
          const uint32_t lower_words[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint4 q = shared.queries[tile][bound][2 * v + half][lane];
            Step(upper_words[2 * half], lower_words[2 * half], q.x, q.y, bound_sums[bound]);
            Step(upper_words[2 * half + 1], lower_words[2 * half + 1], q.z, q.w, bound_sums[bound]);
          }
        } else {
          const uint4 q = shared.queries[tile][bound][v][lane];
          const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
          Mma<Factor>(bound_sums[bound], a, q.x, q.y);
          const uint32_t b[4] = {upper.z, lower.z, upper.w, lower.w};
          Mma<Factor>(bound_sums[bound], b, q.z, q.w);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i] = bound_sums[0][i];
      if (kBounds == 2) sums[i] += bound_sums[kBounds - 1][i];
    }
  }

  // Four codes of each of the two rows.
  __device__ static void Step(uint32_t upper, uint32_t lower, uint32_t b0, uint32_t b1,
                              float (&sums)[4]) {
    const uint32_t a[4] = {Widen<Summary>(upper), Widen<Summary>(lower),
                           Widen<Summary>(upper >> 16), Widen<Summary>(lower >> 16)};
    Mma<Factor>(sums, a, b0, b1);
  }

  // Logits of a tile's columns to scratch; their maximum and weighted sum over the warp's blocks to
  // shared memory. Element i is block lane / 4 + 8 (i / 2) and column 2 (lane % 4) + i % 2.
  __device__ void Finish(const Place& at, const Rows& rows, int first_row, int tile,
                         const float (&sums)[4], Shared& shared) const {
    const int lane = at.lane;
    float lengths[2];
    float scales[2];
    bool inside[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int block = half * 8 + lane / 4;
      lengths[half] = shared.lengths[at.warp][block];
      scales[half] = shared.scales[at.warp][block];
      inside[half] = at.first_block + block < at.item.num_blocks;
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int column = tile * kTileCols + lane % 4 * 2 + side;
      float* const row = rows.logits + (first_row + column) * rows.stride;
      float logits[2];
      float maximum = kNoLogit;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float logit = sums[2 * half + side] * shared.units[column] * scales[half];
        logits[half] = inside[half] ? fmaxf(logit, kNoLogit) : kNoLogit;  // not NaN
        maximum = fmaxf(maximum, logits[half]);
        if (inside[half] && first_row + column < at.batch.rows) {
          row[at.first_block + half * 8 + lane / 4] = logits[half];
        }
      }
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2) {
        maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, offset));
      }
      float sum = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) sum += lengths[half] * Exp2(logits[half] - maximum);
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, offset);
      }
      if (lane < 4) shared.sums[at.warp][column] = make_float2(maximum, sum);
    }
  }
};

// grid (tiles of the longest item, KV heads, items)
template <typename TilesOf>
__global__ void __launch_bounds__(kThreads, TilesOf::kResidency)
    ScoreTilesKernel(const __grid_constant__ Batch batch) {
  extern __shared__ uint4 summaries[];  // [kLaneVectors, kThreads]
  __shared__ typename TilesOf::Shared shared;
  AllowDependents();
  const Item& item = batch.items[blockIdx.z];
  const int h = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t tile_begin = static_cast<int64_t>(blockIdx.x) * kScoreTileBlocks;
  if (tile_begin >= item.num_blocks) return;
  const Place at = {batch, item, h, warp, lane, tile_begin + warp * kTileRows};

  uint4* const own = summaries + threadIdx.x;
  TilesOf tiles;
  tiles.Request(at, own);
  TilesOf::StageBlocks(at, shared);
  const Rows rows(batch, item, h);
  const int last_row = TilesOf::kStage == 1 ? 1 : batch.rows;  // one stage holds all
  for (int first_row = 0; first_row < last_row; first_row += TilesOf::kColumns) {
    const int num_tiles =
        TilesOf::kStage == 1
            ? 1
            : min((batch.rows - first_row + kTileCols - 1) / kTileCols, TilesOf::kStage);
    for (int column = warp; column < num_tiles * kTileCols; column += kWarps) {
      TilesOf::StageColumn(at, first_row + column, column, shared);
    }
    __syncthreads();
    if (first_row == 0) tiles.Take(own);
    for (int tile = 0; tile < num_tiles; ++tile) {
      float sums[4];
      tiles.Multiply(shared, tile, lane, sums);
      tiles.Finish(at, rows, first_row, tile, sums, shared);
    }
    __syncthreads();  // the queries have been read, the sums are there
    const auto column = static_cast<int>(threadIdx.x);
    if (column < TilesOf::kColumns && first_row + column < batch.rows) {
      SoftmaxSum total;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) {
        total.Merge({shared.sums[other][column].x, shared.sums[other][column].y});
      }
      rows.partials[(first_row + column) * rows.tiles + blockIdx.x] =
          make_float2(total.maximum, total.sum);
    }
  }
}

// grid (blocks of the longest item / kThreads, KV heads, items)
__global__ void __launch_bounds__(kThreads) CombineKernel(const __grid_constant__ Batch batch) {
  constexpr int kAhead = 4;  // rows whose logits are requested before the log-sum-exps are there
  __shared__ float lse[kScoreMaxRows];
  AllowDependents();
  WaitForEarlierGrids();
  const Item& item = batch.items[blockIdx.z];
  const int h = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads;
  if (first >= item.num_blocks) return;
  const Rows rows(batch, item, h);
  const int64_t block = first + threadIdx.x;
  const bool inside = block < item.num_blocks;
  float ahead[kAhead];
#pragma unroll
  for (int r = 0; r < kAhead; ++r) {
    ahead[r] = inside && r < batch.rows ? rows.logits[r * rows.stride + block] : kNoLogit;
  }
  for (int r = static_cast<int>(threadIdx.x) / kWarp; r < batch.rows; r += kWarps) {
    SoftmaxSum total;
#pragma unroll 4
    for (int64_t tile = lane; tile < rows.tiles; tile += kWarp) {
      const float2 partial = rows.partials[r * rows.tiles + tile];
      total.Merge({partial.x, partial.y});
    }
    total.MergeLanes(kWarp);
    if (lane == 0) lse[r] = total.maximum + log2f(total.sum);
  }
  __syncthreads();
  if (!inside) return;
  float sum = 0;
#pragma unroll
  for (int r = 0; r < kAhead; ++r) {
    if (r < batch.rows) sum += Exp2(ahead[r] - lse[r]);
  }
#pragma unroll 4
  for (int r = kAhead; r < batch.rows; ++r) {
    sum += Exp2(rows.logits[r * rows.stride + block] - lse[r]);
  }
  item.scores[h * item.num_blocks + block] = sum / static_cast<float>(batch.window);
}

template <typename TilesOf>
cudaError_t LaunchKernel(const Batch& batch, dim3 grid, cudaStream_t stream) {
  const auto kernel = ScoreTilesKernel<TilesOf>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, TilesOf::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, kThreads, TilesOf::kSharedBytes, stream>>>(batch);
  return cudaGetLastError();
}

template <typename Summary, typename Query, int kChannels, int kBounds>
cudaError_t LaunchStage(const Batch& batch, dim3 grid, cudaStream_t stream) {
  return batch.rows <= kTileCols
             ? LaunchKernel<Tiles<Summary, Query, kChannels, kBounds, 1>>(batch, grid, stream)
             : LaunchKernel<Tiles<Summary, Query, kChannels, kBounds, 4>>(batch, grid, stream);
}

template <typename Summary, typename Query, int kBounds>
cudaError_t LaunchChannels(const Batch& batch, dim3 grid, cudaStream_t stream) {
  switch (ScoreTileChannels(batch.head_dim)) {
    case 64:
      return LaunchStage<Summary, Query, 64, kBounds>(batch, grid, stream);
    case 128:
      return LaunchStage<Summary, Query, 128, kBounds>(batch, grid, stream);
    default:
      return LaunchStage<Summary, Query, 256, kBounds>(batch, grid, stream);
  }
}

template <typename Summary, typename Query>
cudaError_t LaunchTiles(const Batch& batch, bool bound, dim3 grid, cudaStream_t stream) {
  if constexpr (std::is_same_v<Summary, int8_t>) {  // of keys only
    return LaunchChannels<Summary, Query, 1>(batch, grid, stream);
  } else {
    return bound ? LaunchChannels<Summary, Query, 2>(batch, grid, stream)
                 : LaunchChannels<Summary, Query, 1>(batch, grid, stream);
  }
}

template <typename Summary>
cudaError_t LaunchCodes(const Batch& batch, const ScoreShape& shape, bool bound, dim3 grid,
                        cudaStream_t stream) {
  return shape.query_dtype == DType::kFloat16
             ? LaunchTiles<Summary, __half>(batch, bound, grid, stream)
             : LaunchTiles<Summary, __nv_bfloat16>(batch, bound, grid, stream);
}

cudaError_t LaunchTypes(const Batch& batch, const ScoreShape& shape, bool bound, dim3 grid,
                        cudaStream_t stream) {
  switch (shape.summary_dtype) {
    case DType::kFloat8E4M3:
      return LaunchCodes<E4M3>(batch, shape, bound, grid, stream);
    case DType::kInt8:
      return LaunchCodes<int8_t>(batch, shape, bound, grid, stream);
    case DType::kFloat16:
      return LaunchTiles<__half, __half>(batch, bound, grid, stream);
    default:
      return LaunchTiles<__nv_bfloat16, __nv_bfloat16>(batch, bound, grid, stream);
  }
}

Batch MakeBatch(std::span<const ScoreTileItem> items, const ScoreShape& shape, float softmax_scale,
                float* scratch) {
  const ScoreTileItem& like = items[0];
  Batch batch = {.items = {},
                 .query_token_stride = like.queries.token_stride_bytes,
                 .query_head_stride = like.queries.head_stride_bytes,
                 .block_stride = like.row_stride_bytes,
                 .scale_block_stride = like.scale_row_stride,
                 .scale_head_stride = like.scale_head_stride,
                 .num_kv_heads = shape.num_kv_heads,
                 .group = like.queries.num_heads / shape.num_kv_heads,
                 .window = static_cast<int32_t>(like.queries.num_tokens),
                 .rows = shape.rows,
                 .head_dim = shape.head_dim,
                 .places_per_head = like.places_per_head,
                 .scale_log2 = softmax_scale * kLog2E};
  for (size_t i = 0; i < items.size(); ++i) {
    const ScoreTileItem& item = items[i];
    batch.items[i] = {.queries = item.queries.data,
                      .bounds = {item.rows, item.high},
                      .places = item.places,
                      .scales = item.scales,
                      .block_starts = item.block_starts,
                      .scores = item.scores,
                      .scratch = scratch,
                      .head_stride = item.head_stride_bytes,
                      .num_blocks = item.num_rows};
    scratch += ScoreScratchOf(shape, item.num_rows).num_floats;
  }
  return batch;
}

absl::Status ScoreBatch(std::span<const ScoreTileItem> items, const ScoreShape& shape,
                        float softmax_scale, const Launch& launch) {
  int64_t scratch_floats = 0;
  int64_t most_blocks = 0;
  for (const ScoreTileItem& item : items) {
    scratch_floats += ScoreScratchOf(shape, item.num_rows).num_floats;
    most_blocks = std::max(most_blocks, item.num_rows);
  }
  if (most_blocks == 0) return absl::OkStatus();
  absl::StatusOr<Buffer> scratch =
      launch.Scratch(scratch_floats * static_cast<int64_t>(sizeof(float)));
  if (!scratch.ok()) return scratch.status();
  const Batch batch = MakeBatch(items, shape, softmax_scale, scratch->as<float>());
  const auto grid = [&](int64_t blocks) {
    return dim3(static_cast<unsigned>(CeilDiv(most_blocks, blocks)),
                static_cast<unsigned>(shape.num_kv_heads), static_cast<unsigned>(items.size()));
  };
  const bool bound = items[0].high != nullptr;
  absl::Status status = CudaStatus(
      LaunchTypes(batch, shape, bound, grid(kScoreTileBlocks), launch.stream), "ScoreTilesKernel");
  if (!status.ok()) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid(kThreads);
  config.blockDim = dim3(kThreads);
  config.stream = launch.stream;
  return CudaStatus(LaunchDependent(config, CombineKernel, batch), "CombineKernel");
}

}  // namespace

bool HasAlignedRows(const ScoreTileItem& item) {
  constexpr int64_t kVectorBytes = 16;
  const int64_t bits = reinterpret_cast<intptr_t>(item.rows) |
                       reinterpret_cast<intptr_t>(item.high) | item.row_stride_bytes |
                       item.head_stride_bytes;
  return bits % kVectorBytes == 0 && item.queries.block_table == nullptr &&
         HasAlignedChunks(item.queries);
}

absl::Status ScoreTiles(std::span<const ScoreTileItem> items, const ScoreShape& shape,
                        float softmax_scale, const Launch& launch) {
  std::vector<int64_t> num_rows;
  for (const ScoreTileItem& item : items) num_rows.push_back(item.num_rows);
  for (size_t first = 0; first < items.size();) {
    const auto size =
        static_cast<size_t>(ScoreBatchSize(shape, std::span(num_rows).subspan(first)));
    absl::Status status = ScoreBatch(items.subspan(first, size), shape, softmax_scale, launch);
    if (!status.ok()) return status;
    first += size;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::kernels

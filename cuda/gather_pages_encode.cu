// SPDX-License-Identifier: Apache-2.0
//
// Rows that are turned or encoded: a group of lanes takes a few rows at a time, all of whose chunks
// are in flight before the first is used.
//
// Scales per head need the head's largest magnitude first, which reads every kept row twice. One
// launch does both, in chunks of whole heads that stay in the L2 cache meanwhile: blocks take tasks
// by ticket, in the order
//   amax 0, amax 1, encode 0, amax 2, encode 1, ..., encode n-1        (chunks of all items)
// and an encoding block waits for the amax tasks of its chunk. These have earlier tickets, so they
// are running or done, and wait for nothing: there is always progress.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/cuda_status.h"
#include "cuda/fast_divisor.cuh"
#include "cuda/gather_pages.cuh"
#include "cuda/quotient.cuh"
#include "cuda/rotation.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kHeadChunkBytes = int64_t{8}
                                    << 20;  // of kept rows: two chunks are in use at once
constexpr int kMaxHeads = 1024;
constexpr float kE4M3Max = 448.0F;
constexpr float kInt8Max = 127.0F;

using Format = EncodingPolicy::Format;

enum class Scales : uint8_t { kNone, kPerToken, kPerHead };

struct EncodeItem {
  Pages pages;
  RotationTable rotation;
  bool aligned;       // HasAlignedChunks(source)
  bool out_aligned;   // every output chunk may be written with one access
  bool whole_angles;  // partners are whole chunks, and their angles may be read with 16-byte loads
  int32_t chunk_heads;  // divides the heads
  int32_t num_chunks;
  uint32_t amax_tiles;  // of a chunk
  uint32_t encode_tiles;
  uint32_t done;  // index of the first chunk's counter, and of the first head's amax
  uint32_t amax;
};

struct EncodeBatch {
  EncodeItem items[kGatherBatchItems];
  uint32_t first_ticket[kGatherBatchItems + 1];
  // For scales per head, zeros at first: next ticket, done amax tiles of chunks, amax bits of
  // heads.
  uint32_t* shared;
  int num_items;
  int lanes;  // of a row
  Scales scales;
};
static_assert(sizeof(EncodeBatch) <= 4096 + 256);

struct Task {
  int item;
  int chunk;
  uint32_t tile;
  bool amax;
};

__device__ Task TaskOf(const EncodeBatch& batch, uint32_t ticket) {
  int i = 0;
  while (i < batch.num_items && ticket >= batch.first_ticket[i + 1]) ++i;
  uint32_t rest = ticket - batch.first_ticket[i];
  const uint32_t amax_tiles = i < batch.num_items ? batch.items[i].amax_tiles : 0;
  if (rest < amax_tiles) return {i, 0, rest, true};
  rest -= amax_tiles;
  if (i > 0) {  // the last chunk of the item before
    const EncodeItem& before = batch.items[i - 1];
    if (rest < before.encode_tiles) return {i - 1, before.num_chunks - 1, rest, false};
    rest -= before.encode_tiles;
  }
  const uint32_t step_tiles = amax_tiles + batch.items[i].encode_tiles;
  const uint32_t step = rest / step_tiles;
  rest -= step * step_tiles;
  const auto chunk = static_cast<int>(step);
  return rest < amax_tiles ? Task{i, chunk + 1, rest, true}
                           : Task{i, chunk, rest - amax_tiles, false};
}

// ---- rows --------------------------------------------------------------------------------------

// Rows that a lane group has in flight: 64 bytes a lane.
template <typename T, int kParts>
inline constexpr int kRowsOf = (sizeof(T) == sizeof(float) ? 2 : 4) / kParts;

// Rows of `width` heads from `first_head` on, slot by slot.
struct Cursor {
  int64_t slot;
  int h;
  int first_head;
  int width;

  __device__ void Next() {
    if (++h == first_head + width) {
      h = first_head;
      ++slot;
    }
  }
};

// A chunk that is not wanted in the L1 cache.
template <typename T>
__device__ Chunk<T> StreamChunk(const std::byte* address, bool aligned) {
  if (!aligned) return LoadChunk<T>(address, false);
  using Word = std::conditional_t<sizeof(T) == 1, uint2, uint4>;
  Chunk<T> chunk;
#pragma unroll
  for (size_t i = 0; i < sizeof(chunk) / sizeof(Word); ++i) {
    reinterpret_cast<Word*>(&chunk)[i] = __ldcg(reinterpret_cast<const Word*>(address) + i);
  }
  return chunk;
}

template <typename T>
__device__ void DecodeChunk(const Chunk<T>& chunk, float scale, float (&values)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    values[i] = Decode(chunk.values[i]);
    if constexpr (sizeof(T) == 1) values[i] = __fmul_rn(values[i], scale);
  }
}

template <typename T>
__device__ float LoadElement(const std::byte* row, int channel, float scale) {
  const float value = Decode(reinterpret_cast<const T*>(row)[channel]);
  return sizeof(T) == 1 ? __fmul_rn(value, scale) : value;
}

// Turns a chunk of a row by -delta positions. Partners of other chunks are read from the row.
template <typename T>
__device__ void TurnChunk(const EncodeItem& item, const std::byte* row, float scale, int delta,
                          int chunk, float (&values)[kChunk]) {
  const RotationTable& rotation = item.rotation;
  const int first = chunk * kChunk;
  if (first >= rotation.rotary_dim) return;
  if (rotation.interleaved) {
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) {
      if (first + i < rotation.rotary_dim) {
        const float2 angle = AngleOf(rotation, delta, (first + i) / 2);
        const float x = values[i];
        const float y = values[i + 1];
        values[i] = TurnX(x, y, angle);
        values[i + 1] = TurnY(x, y, angle);
      }
    }
    return;
  }
  const int half = rotation.rotary_dim / 2;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int channel = first + i;
    if (channel >= rotation.rotary_dim) continue;
    const bool is_x = channel < half;
    const float partner = LoadElement<T>(row, is_x ? channel + half : channel - half, scale);
    const float2 angle = AngleOf(rotation, delta, is_x ? channel : channel - half);
    values[i] = is_x ? TurnX(values[i], partner, angle) : TurnY(partner, values[i], angle);
  }
}

// The angles of a lane's chunk; rows of one token share them.
struct ChunkAngles {
  float2 values[kChunk];
  int delta = -1;

  // Requires: EncodeItem::whole_angles.
  __device__ void Update(const RotationTable& rotation, int new_delta, int first_pair) {
    if (delta == new_delta) return;
    delta = new_delta;
    const int64_t pairs = rotation.rotary_dim / 2;
    const auto* const coarse = reinterpret_cast<const float4*>(
        rotation.coarse + (delta / kCoarseStep * pairs + first_pair) * 2);
    const auto* const fine = reinterpret_cast<const float4*>(
        rotation.fine + (delta % kCoarseStep * pairs + first_pair) * 2);
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const float4 c = __ldg(coarse + i);
      const float4 f = __ldg(fine + i);
      values[2 * i] = AngleProduct({c.x, c.y}, {f.x, f.y});
      values[2 * i + 1] = AngleProduct({c.z, c.w}, {f.z, f.w});
    }
  }
};

// The lane's chunks of consecutive rows, all loaded at once, decoded and turned one by one.
template <typename T, int kParts, bool kTurned>
class RowReader {
 public:
  static constexpr int kRows = kRowsOf<T, kParts>;

  __device__ RowReader(const EncodeItem& item, Cursor at, int lane, int lanes)
      : item_(item), lane_(lane), lanes_(lanes) {
    const Pages& p = item.pages;
    Cursor token_at = at;
#pragma unroll
    for (int i = 0; i < kRows; ++i, token_at.Next()) {
      tokens_[i] = -1;
      if (token_at.slot < p.num_kept) {
        tokens_[i] = static_cast<int>(TokenAt(p, token_at.slot, token_at.h));
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i, at.Next()) {
      const std::byte* const row =
          tokens_[i] >= 0 ? RowAddress(p.source, tokens_[i], at.h) : nullptr;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int chunk = lane + part * lanes;
        chunks_[i][part] = Chunk<T>{};
        if (tokens_[i] >= 0 && chunk * kChunk < p.source.head_dim) {
          chunks_[i][part] =
              StreamChunk<T>(row + chunk * static_cast<int>(kChunk * sizeof(T)), item.aligned);
        }
      }
    }
  }

  // Row i of this lane, at (slot, h); zeros in slots without a token. All lanes of the warp take
  // part.
  __device__ void Read(int i, int64_t slot, int h, float (&values)[kParts][kChunk]) {
    const Pages& p = item_.pages;
    const bool present = tokens_[i] >= 0;
    const float scale = sizeof(T) == 1 && present ? RowScale(p.source, tokens_[i], h) : 1.0F;
#pragma unroll
    for (int part = 0; part < kParts; ++part) DecodeChunk(chunks_[i][part], scale, values[part]);
    if constexpr (kTurned) {
      const int delta = present ? tokens_[i] - static_cast<int>(slot) : 0;
      if (kParts == 1 && item_.whole_angles) {
        TurnWhole(chunks_[i][0], present, scale, delta, values[0]);
      } else if (present) {
        const std::byte* const row = RowAddress(p.source, tokens_[i], h);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          TurnChunk<T>(item_, row, scale, delta, lane_ + part * lanes_, values[part]);
        }
      }
    }
  }

 private:
  // The partners are another lane's chunk.
  __device__ void TurnWhole(const Chunk<T>& own, bool present, float scale, int delta,
                            float (&values)[kChunk]) {
    const int half_chunks = item_.rotation.rotary_dim / 2 / kChunk;
    const bool is_x = lane_ < half_chunks;
    const bool turns = lane_ < 2 * half_chunks;
    const int partner = turns ? (is_x ? half_chunks : -half_chunks) : 0;
    const int from = static_cast<int>(threadIdx.x) % kWarp + partner;
    Chunk<T> other;
#pragma unroll
    for (size_t i = 0; i < sizeof(other) / sizeof(uint32_t); ++i) {
      reinterpret_cast<uint32_t*>(&other)[i] =
          __shfl_sync(kFullWarp, reinterpret_cast<const uint32_t*>(&own)[i], from);
    }
    if (!turns || !present) return;
    angles_.Update(item_.rotation, delta, (is_x ? lane_ : lane_ - half_chunks) * kChunk);
    float partners[kChunk];
    DecodeChunk(other, scale, partners);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      values[i] = is_x ? TurnX(values[i], partners[i], angles_.values[i])
                       : TurnY(partners[i], values[i], angles_.values[i]);
    }
  }

  const EncodeItem& item_;
  const int lane_;
  const int lanes_;
  Chunk<T> chunks_[kRows][kParts];
  int tokens_[kRows];
  ChunkAngles angles_;
};

template <int kParts>
__device__ float Amax(const float (&values)[kParts][kChunk]) {
  float amax = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) amax = fmaxf(amax, fabsf(values[part][i]));
  }
  return amax;
}

// ---- codes -------------------------------------------------------------------------------------

// An amax so small that the quotient is zero counts as zero.
template <typename Out>
__device__ float ScaleOf(float amax) {
  constexpr float kMax = std::is_same_v<Out, int8_t> ? kInt8Max : kE4M3Max;
  if (amax >= kSmallestDividend && amax < kLargestDivisor) return Quotient(amax, kMax, 1.0F / kMax);
  const float scale = __fdiv_rn(amax, kMax);
  return scale == 0 ? 1.0F : scale;
}

__device__ void Encode(const float (&q)[kChunk], Chunk<E4M3>& out) {
#pragma unroll
  for (int i = 0; i < kChunk; i += 2) {
    const __nv_fp8x2_storage_t codes =
        __nv_cvt_float2_to_fp8x2(make_float2(q[i], q[i + 1]), __NV_SATFINITE, __NV_E4M3);
    out.values[i].code = static_cast<uint8_t>(codes & 0xFF);
    out.values[i + 1].code = static_cast<uint8_t>(codes >> 8);
  }
}
__device__ void Encode(const float (&q)[kChunk], Chunk<int8_t>& out) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    out.values[i] = static_cast<int8_t>(__float2int_rn(fminf(fmaxf(q[i], -kInt8Max), kInt8Max)));
  }
}
__device__ void Encode(const float (&q)[kChunk], Chunk<float>& out) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) out.values[i] = q[i];
}
__device__ void Encode(const float (&q)[kChunk], Chunk<__half>& out) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) out.values[i] = __float2half_rn(q[i]);
}
__device__ void Encode(const float (&q)[kChunk], Chunk<__nv_bfloat16>& out) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) out.values[i] = __float2bfloat16_rn(q[i]);
}

// values / scale. Where a quotient is too small for Quotient to be exact, its code is 0
// either way: codes begin at 2^-10.
template <int kParts>
__device__ void Divide(float scale, float (&values)[kParts][kChunk]) {
  if (scale >= kSmallestDivisor && scale < kLargestDivisor) {
    const float reciprocal = __frcp_rn(scale);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        values[part][i] = Quotient(values[part][i], scale, reciprocal);
      }
    }
    return;
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[part][i] = __fdiv_rn(values[part][i], scale);
  }
}

template <typename Out>
__device__ void StoreChunk(std::byte* address, const Chunk<Out>& chunk, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Chunk<Out>*>(address) = chunk;
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) reinterpret_cast<Out*>(address)[i] = chunk.values[i];
}

// ---- tasks -------------------------------------------------------------------------------------

// Largest magnitude of a piece of one head's rows, as the bits of a float: those of non-negative
// floats order as integers, and a maximum does not depend on the order of atomics.
template <typename T, int kParts, bool kTurned>
__device__ void FindAmax(const EncodeBatch& batch, const EncodeItem& item, const Task& task) {
  using Reader = RowReader<T, kParts, kTurned>;
  __shared__ float warp_amax[kThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t head_tiles = item.amax_tiles / static_cast<uint32_t>(item.chunk_heads);
  const uint32_t local_head = task.tile / head_tiles;
  const int64_t tile = task.tile - local_head * head_tiles;
  const int h = task.chunk * item.chunk_heads + static_cast<int>(local_head);
  const int group = thread / batch.lanes;
  const int64_t first = (tile * (kThreads / batch.lanes) + group) * Reader::kRows;
  Reader rows(item, {first, h, h, 1}, thread % batch.lanes, batch.lanes);
  float amax = 0;
#pragma unroll
  for (int i = 0; i < Reader::kRows; ++i) {
    float values[kParts][kChunk];
    rows.Read(i, first + i, h, values);
    amax = fmaxf(amax, Amax(values));
  }
  amax = GroupMax(amax, kWarp);
  if (thread % kWarp == 0) warp_amax[thread / kWarp] = amax;
  __syncthreads();
  if (thread != 0) return;
  for (const float other : warp_amax) amax = fmaxf(amax, other);
  atomicMax(&batch.shared[item.amax + static_cast<uint32_t>(h)], __float_as_uint(amax));
  __threadfence();  // the amax is there before the count says so
  atomicAdd(&batch.shared[item.done + static_cast<uint32_t>(task.chunk)], 1U);
}

// Waits for the chunk's amax tasks; then scales[] are those of its heads.
template <typename Out>
__device__ void AwaitHeadScales(const EncodeBatch& batch, const EncodeItem& item, const Task& task,
                                float* scales) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    const uint32_t* const done = &batch.shared[item.done + static_cast<uint32_t>(task.chunk)];
    for (;;) {
      uint32_t count;
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(done) : "memory");
      if (count == item.amax_tiles) break;
      __nanosleep(100);
    }
  }
  __syncthreads();
  const int first = task.chunk * item.chunk_heads;
  for (int i = thread; i < item.chunk_heads; i += kThreads) {
    const int h = first + i;
    const unsigned int bits = __ldcg(&batch.shared[item.amax + static_cast<uint32_t>(h)]);
    scales[i] = ScaleOf<Out>(__uint_as_float(bits));
    if (task.tile == 0) item.pages.scales[h] = scales[i];
  }
  __syncthreads();
}

template <typename T, typename Out, int kParts, bool kTurned>
__device__ void EncodeRows(const EncodeBatch& batch, const EncodeItem& item, const Task& task) {
  using Reader = RowReader<T, kParts, kTurned>;
  constexpr bool kScaled = sizeof(Out) == 1;
  __shared__ float head_scales[kScaled ? kMaxHeads : 1];
  const Pages& p = item.pages;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % batch.lanes;
  const int64_t first =
      (static_cast<int64_t>(task.tile) * (kThreads / batch.lanes) + thread / batch.lanes) *
      Reader::kRows;
  const int first_head = task.chunk * item.chunk_heads;
  const int64_t slot = first / item.chunk_heads;
  Cursor at = {slot, first_head + static_cast<int>(first - slot * item.chunk_heads), first_head,
               item.chunk_heads};
  Reader rows(item, at, lane, batch.lanes);
  if constexpr (kScaled) {
    if (batch.scales == Scales::kPerHead) AwaitHeadScales<Out>(batch, item, task, head_scales);
  }
#pragma unroll
  for (int i = 0; i < Reader::kRows; ++i, at.Next()) {
    float values[kParts][kChunk];
    rows.Read(i, at.slot, at.h, values);
    const bool inside = at.slot < p.num_slots;
    if constexpr (kScaled) {
      float scale = 1;
      if (batch.scales == Scales::kPerToken) {
        scale = ScaleOf<Out>(GroupMax(Amax(values), batch.lanes));
        if (lane == 0 && inside) *TokenScale(p, at.slot, at.h) = scale;
      } else {
        scale = head_scales[at.h - first_head];
      }
      Divide(scale, values);
    }
    if (inside) {  // lanes of a warp stay together for the next row
      std::byte* const out = OutputRow(p, at.slot, at.h);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int chunk = lane + part * batch.lanes;
        if (chunk * kChunk < p.source.head_dim) {
          Chunk<Out> codes;
          Encode(values[part], codes);
          StoreChunk(out + chunk * static_cast<int>(sizeof(codes.values)), codes, item.out_aligned);
        }
      }
    }
  }
}

template <typename T, typename Out, int kParts, bool kTurned>
__global__ void __launch_bounds__(kThreads, kTurned ? 2 : 3)
    EncodePagesKernel(const __grid_constant__ EncodeBatch batch) {
  if constexpr (sizeof(Out) == 1) {
    if (batch.scales == Scales::kPerHead) {
      __shared__ uint32_t ticket;
      if (threadIdx.x == 0) ticket = atomicAdd(batch.shared, 1U);
      __syncthreads();
      const Task task = TaskOf(batch, ticket);
      const EncodeItem& item = batch.items[task.item];
      if (task.amax) {
        FindAmax<T, kParts, kTurned>(batch, item, task);
      } else {
        EncodeRows<T, Out, kParts, kTurned>(batch, item, task);
      }
      return;
    }
  }
  const Task task = TaskOf(batch, blockIdx.x);
  EncodeRows<T, Out, kParts, kTurned>(batch, batch.items[task.item], task);
}

// ---- launch ------------------------------------------------------------------------------------

Scales ScalesOf(const GatherPagesItem& item) {
  if (item.format == Format::kAsIs) return Scales::kNone;
  return item.scale_granularity == ScaleGranularity::kTokenHead ? Scales::kPerToken
                                                                : Scales::kPerHead;
}

// Heads whose rows are read twice while they are in the L2 cache.
int32_t ChunkHeads(const GatherPagesItem& item) {
  const int32_t heads = item.source.num_heads;
  if (ScalesOf(item) != Scales::kPerHead) return heads;
  const int64_t head_bytes = item.num_kept * item.source.head_dim * DTypeBytes(item.source.dtype);
  int32_t chunk_heads = heads;
  while (chunk_heads > 1 &&
         (heads % chunk_heads != 0 || chunk_heads * head_bytes > kHeadChunkBytes)) {
    --chunk_heads;
  }
  return chunk_heads;
}

EncodeItem PlanItem(const GatherPagesItem& item, int64_t tile_rows) {
  EncodeItem plan = {};
  plan.pages = PlanPages(item);
  plan.rotation = item.rotation;
  plan.aligned = HasAlignedChunks(item.source);
  const int64_t out_bits = reinterpret_cast<intptr_t>(plan.pages.pages) |
                           plan.pages.slot_stride_bytes | plan.pages.head_stride_bytes;
  plan.out_aligned = out_bits % std::min<int64_t>(kChunk * DTypeBytes(item.out_dtype), 16) == 0;
  const intptr_t table_bits = reinterpret_cast<intptr_t>(item.rotation.coarse) |
                              reinterpret_cast<intptr_t>(item.rotation.fine);
  plan.whole_angles = !item.rotation.interleaved && item.rotation.rotary_dim % (2 * kChunk) == 0 &&
                      table_bits % static_cast<int64_t>(sizeof(float4)) == 0;
  plan.chunk_heads = ChunkHeads(item);
  plan.num_chunks = item.source.num_heads / plan.chunk_heads;
  int64_t encode_tiles = CeilDiv(plan.pages.num_slots * plan.chunk_heads, tile_rows);
  if (ScalesOf(item) == Scales::kPerHead) {  // heads have scales even where no slot is
    encode_tiles = std::max<int64_t>(encode_tiles, 1);
    plan.amax_tiles = static_cast<uint32_t>(
        plan.chunk_heads * std::max<int64_t>(CeilDiv(item.num_kept, tile_rows), 1));
  }
  plan.encode_tiles = static_cast<uint32_t>(encode_tiles);
  return plan;
}

// Fills in where tickets begin; returns the words of shared memory needed.
int64_t PlanTickets(EncodeBatch& batch) {
  uint32_t words = 1;
  uint32_t ticket = 0;
  uint32_t encode_before = 0;
  for (int i = 0; i < batch.num_items; ++i) {
    EncodeItem& item = batch.items[i];
    item.done = words;
    item.amax = words + static_cast<uint32_t>(item.num_chunks);
    words = item.amax + static_cast<uint32_t>(item.pages.source.num_heads);
    batch.first_ticket[i] = ticket;
    ticket += item.amax_tiles + encode_before +
              static_cast<uint32_t>(item.num_chunks - 1) * (item.amax_tiles + item.encode_tiles);
    encode_before = item.encode_tiles;
  }
  batch.first_ticket[batch.num_items] = ticket;
  return words;
}

template <typename T, typename Out, int kParts, bool kTurned>
absl::Status LaunchEncode(std::span<const GatherPagesItem> items, const Launch& launch) {
  EncodeBatch batch = {};
  batch.lanes = LanesPerRow(items[0].source.head_dim);
  batch.scales = ScalesOf(items[0]);
  const int64_t tile_rows = int64_t{kThreads / batch.lanes} * kRowsOf<T, kParts>;
  for (const GatherPagesItem& item : items) {
    batch.items[batch.num_items++] = PlanItem(item, tile_rows);
  }
  const int64_t words = PlanTickets(batch);
  const uint32_t grid =
      batch.first_ticket[batch.num_items] + batch.items[batch.num_items - 1].encode_tiles;
  if (grid == 0) return absl::OkStatus();
  Buffer shared;
  if (batch.scales == Scales::kPerHead) {
    absl::StatusOr<Buffer> memory = launch.Scratch(words * static_cast<int64_t>(sizeof(uint32_t)));
    if (!memory.ok()) return memory.status();
    shared = *std::move(memory);
    batch.shared = shared.as<uint32_t>();
    absl::Status status = CudaStatus(
        cudaMemsetAsync(shared.data(), 0, static_cast<size_t>(shared.size_bytes()), launch.stream),
        "cudaMemsetAsync");
    if (!status.ok()) return status;
  }
  EncodePagesKernel<T, Out, kParts, kTurned><<<grid, kThreads, 0, launch.stream>>>(batch);
  return LaunchStatus("EncodePagesKernel");
}

template <typename T, typename Out>
absl::Status LaunchTypes(std::span<const GatherPagesItem> items, const Launch& launch) {
  if (items[0].source.head_dim > kWarp * kChunk) {
    return LaunchEncode<T, Out, kMaxChunksPerLane, true>(items, launch);
  }
  if constexpr (sizeof(Out) == 1) {
    if (items[0].rotation.rotary_dim == 0) return LaunchEncode<T, Out, 1, false>(items, launch);
  }
  return LaunchEncode<T, Out, 1, true>(items, launch);
}

}  // namespace

bool CanEncodeTogether(const GatherPagesItem& a, const GatherPagesItem& b) {
  return a.source.dtype == b.source.dtype && a.source.head_dim == b.source.head_dim &&
         a.format == b.format && ScalesOf(a) == ScalesOf(b) &&
         (a.rotation.rotary_dim > 0) == (b.rotation.rotary_dim > 0);
}

absl::Status EncodePages(std::span<const GatherPagesItem> items, const Launch& launch) {
  return DispatchDType(items[0].source.dtype, [&]<typename T>() {
    switch (items[0].format) {
      case Format::kFloat8E4M3:
        return LaunchTypes<T, E4M3>(items, launch);
      case Format::kInt8:
        return LaunchTypes<T, int8_t>(items, launch);
      case Format::kAsIs:
        break;
    }
    // Turned: the type of the input, but bfloat16 for quantised input.
    using Out = std::conditional_t<sizeof(T) == 1, __nv_bfloat16, T>;
    return LaunchTypes<T, Out>(items, launch);
  });
}

}  // namespace dynsplit::kernels

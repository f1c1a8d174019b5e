// SPDX-License-Identifier: Apache-2.0
//
// Slots from the rows of one decode step to those of the next, without the host.
//
//   diff   one thread block a KV head: a bitmap of wanted tokens; a slot whose token is in it stays
//          and takes its bit; free slots and tokens that are left are ranked, both in ascending
//          order, and paired by rank. Integer arithmetic only: equal on every run.
//   copy   rows of the pairs, by thread blocks that share out each head's list. Neighbouring lanes
//          take neighbouring vectors, and tokens of a list ascend, so that rows that lie side by
//          side are read in one piece, also over PCIe.
#include <algorithm>
#include <span>

#include "cuda/cuda_status.h"
#include "cuda/operations.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kDiffThreads = 1024;
constexpr int kDiffWarps = kDiffThreads / kWarp;
constexpr int kCopyThreads = 256;
constexpr int kVectorsPerThread = 4;  // all loads are in flight before the first store
constexpr int kCopyBlocksPerSm = 8;
constexpr size_t kMaxItems = 64;  // that one launch takes by value
constexpr int kBitsPerWord = 32;

// Pairs of all heads, rank by rank: [items, Hkv, num_rows] each.
struct MoveLists {
  int32_t* slots = nullptr;
  int32_t* tokens = nullptr;
};

// ---- diff --------------------------------------------------------------------------------------

struct DiffItem {
  const int32_t* wanted;
  int32_t* held;
  int32_t* moved_slots;
  int32_t* num_moved;
  int32_t token_words;  // of the bitmap
};

struct DiffBatch {
  DiffItem items[kMaxItems];
  MoveLists moves;
  uint32_t* bitmaps;     // [items, Hkv, bitmap_words]; null = in shared memory
  int64_t bitmap_words;  // of the longest item's tokens, then of slots
  int32_t num_rows;
  bool wanted_per_head;
};

// Exclusive prefix sums over the block's threads of two flags, counted from `bases`, which become
// the sums over all threads.
__device__ int2 RankFlags(bool first, bool second, int2 (&warp_counts)[kDiffWarps], int2& bases) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned below = (1U << lane) - 1;
  const unsigned first_votes = __ballot_sync(kFullWarp, first);
  const unsigned second_votes = __ballot_sync(kFullWarp, second);
  if (lane == 0) warp_counts[warp] = make_int2(__popc(first_votes), __popc(second_votes));
  __syncthreads();
  int2 total = warp_counts[lane];
  int2 before = lane < warp ? total : make_int2(0, 0);
  static_assert(kDiffWarps == kWarp);
  total = make_int2(__reduce_add_sync(kFullWarp, total.x), __reduce_add_sync(kFullWarp, total.y));
  before =
      make_int2(__reduce_add_sync(kFullWarp, before.x), __reduce_add_sync(kFullWarp, before.y));
  const int2 ranks = make_int2(bases.x + before.x + __popc(first_votes & below),
                               bases.y + before.y + __popc(second_votes & below));
  bases.x += total.x;
  bases.y += total.y;
  __syncthreads();  // the counts are read
  return ranks;
}

// Marks wanted tokens, then lets slots take theirs: afterwards `tokens` holds the tokens that no
// slot holds, `staying` the slots that keep theirs.
__device__ void MarkStaying(const DiffItem& item, const int32_t* wanted, const int32_t* held,
                            int num_rows, uint32_t* tokens, uint32_t* staying) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < item.token_words; i += kDiffThreads) tokens[i] = 0;
  __syncthreads();
  for (int i = thread; i < num_rows; i += kDiffThreads) {
    const auto token = static_cast<uint32_t>(wanted[i]);
    atomicOr(&tokens[token / kBitsPerWord], 1U << token % kBitsPerWord);
  }
  __syncthreads();
  int32_t next_token = thread < num_rows ? held[thread] : -1;
  for (int first = 0; first < num_rows; first += kDiffThreads) {
    const int slot = first + thread;
    const int32_t token = next_token;
    next_token = slot + kDiffThreads < num_rows ? held[slot + kDiffThreads] : -1;
    bool stays = false;
    if (token >= 0) {
      const uint32_t bit = 1U << static_cast<uint32_t>(token) % kBitsPerWord;
      stays = (atomicAnd(&tokens[token / kBitsPerWord], ~bit) & bit) != 0;
    }
    const unsigned votes = __ballot_sync(kFullWarp, stays);
    if (thread % kWarp == 0 && slot < num_rows) staying[slot / kBitsPerWord] = votes;
  }
  __syncthreads();
}

// grid (Hkv, items)
template <bool kShared>
__global__ void __launch_bounds__(kDiffThreads)
    DiffRowsKernel(const __grid_constant__ DiffBatch batch) {
  extern __shared__ uint32_t shared_bitmaps[];
  __shared__ int2 warp_counts[kDiffWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int num_rows = batch.num_rows;
  const int64_t h = blockIdx.x;
  const DiffItem& item = batch.items[blockIdx.y];
  const int64_t list = static_cast<int64_t>(blockIdx.y) * gridDim.x + h;
  uint32_t* const tokens = kShared ? shared_bitmaps : batch.bitmaps + list * batch.bitmap_words;
  uint32_t* const staying = tokens + item.token_words;
  const int32_t* const wanted = item.wanted + (batch.wanted_per_head ? h * num_rows : 0);
  int32_t* const held = item.held + h * num_rows;
  int32_t* const move_slots = batch.moves.slots + list * num_rows;
  int32_t* const move_tokens = batch.moves.tokens + list * num_rows;
  MarkStaying(item, wanted, held, num_rows, tokens, staying);

  int2 counts = make_int2(0, 0);  // free slots, tokens to come
  int32_t next_token = thread < num_rows ? wanted[thread] : 0;
  for (int first = 0; first < num_rows; first += kDiffThreads) {
    const int i = first + thread;
    bool is_free = false;
    bool comes = false;
    const int32_t token = next_token;
    next_token = i + kDiffThreads < num_rows ? wanted[i + kDiffThreads] : 0;
    if (i < num_rows) {
      is_free = (staying[i / kBitsPerWord] >> i % kBitsPerWord & 1U) == 0;
      const auto bit = static_cast<uint32_t>(token);
      comes = (tokens[bit / kBitsPerWord] >> bit % kBitsPerWord & 1U) != 0;
    }
    const int2 ranks = RankFlags(is_free, comes, warp_counts, counts);
    if (is_free) move_slots[ranks.x] = i;
    if (comes) move_tokens[ranks.y] = token;
  }
  __syncthreads();                                // the lists are written
  const int num_moved = min(counts.x, counts.y);  // equal, as wanted tokens are distinct
  for (int i = thread; i < num_moved; i += kDiffThreads) {
    const int32_t slot = move_slots[i];
    held[slot] = move_tokens[i];
    if (item.moved_slots != nullptr) item.moved_slots[h * num_rows + i] = slot;
  }
  if (thread == 0) item.num_moved[h] = num_moved;
}

// ---- copy --------------------------------------------------------------------------------------

// Keys or values of an item and where they go.
struct CopySide {
  TensorView source;
  std::byte* rows;  // null = not wanted
  float* scales;
  uint32_t row_bytes;
};

struct CopyItem {
  CopySide sides[2];
  const int32_t* num_moved;
};

struct CopyBatch {
  CopyItem items[kMaxItems];
  MoveLists moves;
  int32_t num_rows;
  int32_t num_heads;
};
static_assert(sizeof(CopyBatch) < 32000, "parameters of a kernel are at most 32764 bytes");

// grid (items * Hkv, blocks of a list, keys and values)
template <typename Vector>
__global__ void __launch_bounds__(kCopyThreads)
    CopyMovedRowsKernel(const __grid_constant__ CopyBatch batch) {
  const auto list = static_cast<int>(blockIdx.x);
  const int i = list / batch.num_heads;
  const int h = list - i * batch.num_heads;
  const CopyItem& item = batch.items[i];
  const CopySide& side = item.sides[blockIdx.z];
  const TensorView& source = side.source;
  const int64_t num_moved = item.num_moved[h];
  const auto row_vectors = side.row_bytes / static_cast<uint32_t>(sizeof(Vector));
  const int32_t* const slots = batch.moves.slots + static_cast<int64_t>(list) * batch.num_rows;
  const int32_t* const tokens = batch.moves.tokens + static_cast<int64_t>(list) * batch.num_rows;
  const int64_t first_row = static_cast<int64_t>(h) * batch.num_rows;
  const int64_t units = side.rows == nullptr ? 0 : num_moved * row_vectors;
  constexpr int64_t kBlockUnits = int64_t{kCopyThreads} * kVectorsPerThread;
  for (int64_t base = blockIdx.y * kBlockUnits; base < units; base += gridDim.y * kBlockUnits) {
    Vector values[kVectorsPerThread] = {};
    int64_t to[kVectorsPerThread];
#pragma unroll
    for (int part = 0; part < kVectorsPerThread; ++part) {
      const int64_t unit = base + part * kCopyThreads + threadIdx.x;
      to[part] = -1;
      if (unit >= units) continue;
      const int64_t rank = unit / row_vectors;
      const auto vector = static_cast<uint32_t>(unit - rank * row_vectors);
      const int32_t token = tokens[rank];
      to[part] = (first_row + slots[rank]) * row_vectors + vector;
      values[part] = reinterpret_cast<const Vector*>(RowAddress(source, token, h))[vector];
    }
#pragma unroll
    for (int part = 0; part < kVectorsPerThread; ++part) {
      if (to[part] >= 0) reinterpret_cast<Vector*>(side.rows)[to[part]] = values[part];
    }
  }
  if (side.scales == nullptr) return;
  for (int64_t rank = blockIdx.y * kCopyThreads + threadIdx.x; rank < num_moved;
       rank += static_cast<int64_t>(gridDim.y) * kCopyThreads) {
    side.scales[first_row + slots[rank]] = RowScale(source, tokens[rank], h);
  }
}

// ---- launch ------------------------------------------------------------------------------------

// What a launch needs beside its items.
struct RefreshPlan {
  int32_t num_heads = 0;
  int64_t num_lists = 0;     // of the fullest launch
  int64_t bitmap_words = 0;  // of a list
  bool shared_bitmaps = false;
};

int64_t BitmapWords(int64_t bits) { return CeilDiv(bits, kBitsPerWord); }

RefreshPlan PlanRefresh(const RefreshRowsParams& params, const Launch& launch) {
  RefreshPlan plan = {.num_heads = params.items[0].keys.num_heads};
  plan.num_lists = static_cast<int64_t>(std::min(params.items.size(), kMaxItems)) * plan.num_heads;
  int64_t num_tokens = 0;
  for (const RefreshRowsItem& item : params.items) {
    num_tokens = std::max(num_tokens, item.keys.num_tokens);
  }
  plan.bitmap_words = BitmapWords(num_tokens) + BitmapWords(params.num_rows);
  const auto bytes = plan.bitmap_words * static_cast<int64_t>(sizeof(uint32_t));
  const auto static_bytes = static_cast<int64_t>(kDiffWarps * sizeof(int2));
  plan.shared_bitmaps = bytes + static_bytes <= launch.max_shared_bytes;
  return plan;
}

template <bool kShared>
absl::Status LaunchDiff(const DiffBatch& batch, dim3 grid, cudaStream_t stream) {
  const auto bytes =
      kShared ? static_cast<int>(batch.bitmap_words * static_cast<int64_t>(sizeof(uint32_t))) : 0;
  absl::Status status =
      CudaStatus(cudaFuncSetAttribute(DiffRowsKernel<kShared>,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                 "cudaFuncSetAttribute");
  if (!status.ok()) return status;
  DiffRowsKernel<kShared><<<grid, kDiffThreads, static_cast<size_t>(bytes), stream>>>(batch);
  return LaunchStatus("DiffRowsKernel");
}

absl::Status Diff(std::span<const RefreshRowsItem> items, const RefreshRowsParams& params,
                  const RefreshPlan& plan, const MoveLists& moves, uint32_t* bitmaps,
                  cudaStream_t stream) {
  DiffBatch batch = {};
  batch.moves = moves;
  batch.bitmaps = bitmaps;
  batch.bitmap_words = plan.bitmap_words;
  batch.num_rows = static_cast<int32_t>(params.num_rows);
  batch.wanted_per_head = params.groups > 1;
  for (size_t i = 0; i < items.size(); ++i) {
    batch.items[i] = {.wanted = items[i].wanted,
                      .held = items[i].held,
                      .moved_slots = items[i].moved_slots,
                      .num_moved = items[i].num_moved,
                      .token_words = static_cast<int32_t>(BitmapWords(items[i].keys.num_tokens))};
  }
  const dim3 grid(static_cast<unsigned>(plan.num_heads), static_cast<unsigned>(items.size()));
  return plan.shared_bitmaps ? LaunchDiff<true>(batch, grid, stream)
                             : LaunchDiff<false>(batch, grid, stream);
}

CopySide SideOf(const TensorView& source, std::byte* rows, float* scales) {
  return {.source = source,
          .rows = rows,
          .scales = scales,
          .row_bytes = static_cast<uint32_t>(source.head_dim * DTypeBytes(source.dtype))};
}

// Bits that are set in any address or size of the side's rows.
int64_t AddressBits(const CopySide& side) {
  if (side.rows == nullptr) return 0;
  const TensorView& source = side.source;
  int64_t bits = reinterpret_cast<intptr_t>(source.data) | source.token_stride_bytes |
                 source.head_stride_bytes | side.row_bytes | reinterpret_cast<intptr_t>(side.rows);
  if (source.block_table != nullptr) bits |= source.page_stride_bytes;
  return bits;
}

template <typename Vector>
void LaunchCopy(const CopyBatch& batch, int64_t num_lists, int num_sms, cudaStream_t stream) {
  const uint32_t longest =
      std::max(batch.items[0].sides[0].row_bytes, batch.items[0].sides[1].row_bytes);
  const int64_t useful =
      CeilDiv(int64_t{batch.num_rows} * longest,
              int64_t{kCopyThreads} * kVectorsPerThread * static_cast<int64_t>(sizeof(Vector)));
  const int64_t resident = CeilDiv(int64_t{kCopyBlocksPerSm} * num_sms, 2 * num_lists);
  const dim3 grid(static_cast<unsigned>(num_lists),
                  static_cast<unsigned>(std::clamp<int64_t>(resident, 1, useful)), 2);
  CopyMovedRowsKernel<Vector><<<grid, kCopyThreads, 0, stream>>>(batch);
}

absl::Status CopyRows(std::span<const RefreshRowsItem> items, const RefreshRowsParams& params,
                      const RefreshPlan& plan, const MoveLists& moves, const Launch& launch) {
  CopyBatch batch = {};
  batch.moves = moves;
  batch.num_rows = static_cast<int32_t>(params.num_rows);
  batch.num_heads = plan.num_heads;
  int64_t bits = 0;
  bool wanted = false;
  for (size_t i = 0; i < items.size(); ++i) {
    const RefreshRowsItem& item = items[i];
    batch.items[i] = {.sides = {SideOf(item.keys, item.key_rows, item.key_scales),
                                SideOf(item.values, item.value_rows, item.value_scales)},
                      .num_moved = item.num_moved};
    for (const CopySide& side : batch.items[i].sides) {
      wanted = wanted || side.rows != nullptr || side.scales != nullptr;
      bits |= AddressBits(side);
    }
  }
  if (!wanted || params.num_rows == 0) return absl::OkStatus();
  const int64_t num_lists = static_cast<int64_t>(items.size()) * plan.num_heads;
  const auto launch_as = [&]<typename Vector>() {
    LaunchCopy<Vector>(batch, num_lists, launch.num_sms, launch.stream);
  };
  if (bits % 16 == 0) {
    launch_as.template operator()<uint4>();
  } else if (bits % 8 == 0) {
    launch_as.template operator()<uint2>();
  } else if (bits % 4 == 0) {
    launch_as.template operator()<uint32_t>();
  } else if (bits % 2 == 0) {
    launch_as.template operator()<uint16_t>();
  } else {
    launch_as.template operator()<uint8_t>();
  }
  return LaunchStatus("CopyMovedRowsKernel");
}

}  // namespace

absl::Status RefreshRows(const RefreshRowsParams& params, const Launch& launch) {
  if (params.items.empty()) return absl::OkStatus();
  const RefreshPlan plan = PlanRefresh(params, launch);
  const int64_t list_entries = plan.num_lists * params.num_rows;
  const int64_t bitmap_entries = plan.shared_bitmaps ? 0 : plan.num_lists * plan.bitmap_words;
  absl::StatusOr<Buffer> scratch =
      launch.Scratch((2 * list_entries + bitmap_entries) * static_cast<int64_t>(sizeof(int32_t)));
  if (!scratch.ok()) return scratch.status();
  auto* const entries = scratch->as<int32_t>();
  const MoveLists moves = {.slots = entries, .tokens = entries + list_entries};
  auto* const bitmaps = reinterpret_cast<uint32_t*>(entries + 2 * list_entries);
  for (size_t at = 0; at < params.items.size(); at += kMaxItems) {
    const std::span<const RefreshRowsItem> items =
        params.items.subspan(at, std::min(kMaxItems, params.items.size() - at));
    absl::Status status = Diff(items, params, plan, moves, bitmaps, launch.stream);
    if (!status.ok()) return status;
    if (status = CopyRows(items, params, plan, moves, launch); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::kernels

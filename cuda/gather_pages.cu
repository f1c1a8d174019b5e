// SPDX-License-Identifier: Apache-2.0
//
// Two ways: rows that keep their bits are copied here, in the widest vectors that their addresses
// allow; rows that are turned or encoded pass through registers (gather_pages_encode.cu). Items
// that go the same way share a launch, which spares the ramps of all but one.
#include "cuda/gather_pages.cuh"

#include <algorithm>

#include "cuda/cuda_status.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/fast_divisor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 4;

struct CopyItem {
  Pages pages;
  FastDivisor row_vectors;
  FastDivisor heads;
  int32_t slots_per_block;
  uint32_t first_block;
};

struct CopyBatch {
  CopyItem items[kGatherBatchItems];
  int num_items;
};
static_assert(sizeof(CopyBatch) <= 4096);

__device__ const CopyItem& ItemOf(const CopyBatch& batch) {
  int i = 0;
  while (i + 1 < batch.num_items && blockIdx.x >= batch.items[i + 1].first_block) ++i;
  return batch.items[i];
}

__device__ void CopyScale(const Pages& p, int64_t slot, int h) {
  *TokenScale(p, slot, h) = slot < p.num_kept ? RowScale(p.source, TokenAt(p, slot, h), h) : 1.0F;
}

// Each block copies `slots_per_block` slots of all heads, in the order of a dense output, with
// their scales. Rows are read once: they need not stay in the caches.
template <typename Vector>
__global__ void __launch_bounds__(kThreads)
    CopyPagesKernel(const __grid_constant__ CopyBatch batch) {
  WaitForEarlierGrids();
  AllowDependents();
  const CopyItem& item = ItemOf(batch);
  const Pages& p = item.pages;
  const int64_t first_slot =
      static_cast<int64_t>(blockIdx.x - item.first_block) * item.slots_per_block;
  const bool scaled = p.source.scales != nullptr && p.scales != nullptr;
  const bool token_scales = scaled && p.source.scale_granularity == ScaleGranularity::kTokenHead;
  if (scaled && !token_scales && first_slot == 0) {
    for (auto h = static_cast<int>(threadIdx.x); h < p.source.num_heads; h += kThreads) {
      p.scales[h] = p.source.scales[h];
    }
  }
  const uint32_t heads = item.heads.divisor();
  const uint32_t row_vectors = item.row_vectors.divisor();
  const int64_t slots = min(static_cast<int64_t>(item.slots_per_block), p.num_slots - first_slot);
  const uint32_t units = static_cast<uint32_t>(slots) * heads * row_vectors;
  for (uint32_t base = threadIdx.x; base < units; base += kThreads * kUnitsPerThread) {
    Vector values[kUnitsPerThread] = {};  // all loads are in flight before the first store
    Vector* to[kUnitsPerThread];
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      const uint32_t unit = base + i * kThreads;
      const uint32_t row = item.row_vectors.Divide(unit);
      const uint32_t local_slot = item.heads.Divide(row);
      const auto h = static_cast<int>(row - local_slot * heads);
      const int64_t slot = first_slot + local_slot;
      const uint32_t vector = unit - row * row_vectors;
      if (unit < units && slot < p.num_kept) {
        const std::byte* const from = RowAddress(p.source, TokenAt(p, slot, h), h);
        values[i] = __ldcs(reinterpret_cast<const Vector*>(from) + vector);
      }
      if (token_scales && vector == 0 && unit < units) CopyScale(p, slot, h);
      to[i] = reinterpret_cast<Vector*>(OutputRow(p, slot, h)) + vector;
    }
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      if (base + i * kThreads < units) *to[i] = values[i];
    }
  }
}

// Widest vector that divides every address and the row.
int64_t VectorBytes(const GatherPagesItem& item) {
  const Pages p = PlanPages(item);
  const TensorView& source = p.source;
  int64_t bits = reinterpret_cast<intptr_t>(source.data) | source.token_stride_bytes |
                 source.head_stride_bytes | source.head_dim * DTypeBytes(source.dtype) |
                 reinterpret_cast<intptr_t>(p.pages) | p.slot_stride_bytes | p.head_stride_bytes;
  if (source.block_table != nullptr) bits |= source.page_stride_bytes;
  int64_t bytes = 16;
  while (bits % bytes != 0) bytes /= 2;
  return bytes;
}

template <typename Vector>
absl::Status LaunchCopy(std::span<const GatherPagesItem> items, const Launch& launch) {
  CopyBatch batch = {};
  int64_t blocks = 0;
  for (const GatherPagesItem& item : items) {
    CopyItem& copy = batch.items[batch.num_items++];
    copy.pages = PlanPages(item);
    const TensorView& source = item.source;
    const int64_t row_vectors =
        source.head_dim * DTypeBytes(source.dtype) / static_cast<int64_t>(sizeof(Vector));
    const int64_t slots_per_block =
        std::max<int64_t>(1, kThreads * kUnitsPerThread / (row_vectors * source.num_heads));
    copy.row_vectors = FastDivisor(row_vectors);
    copy.heads = FastDivisor(source.num_heads);
    copy.slots_per_block = static_cast<int32_t>(slots_per_block);
    copy.first_block = static_cast<uint32_t>(blocks);
    // Scales of heads are copied even where no slot is.
    blocks += std::max<int64_t>(CeilDiv(copy.pages.num_slots, slots_per_block), 1);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = launch.stream;
  return CudaStatus(LaunchDependent(config, CopyPagesKernel<Vector>, batch), "CopyPagesKernel");
}

bool KeepsBits(const GatherPagesItem& item) {
  return item.format == EncodingPolicy::Format::kAsIs && item.rotation.rotary_dim == 0;
}

bool CanShareLaunch(const GatherPagesItem& a, const GatherPagesItem& b) {
  if (KeepsBits(a) != KeepsBits(b)) return false;
  return KeepsBits(a) ? CanCopyTogether(a, b) : CanEncodeTogether(a, b);
}

}  // namespace

Pages PlanPages(const GatherPagesItem& item) {
  const int64_t heads = item.source.num_heads;
  const int64_t row_bytes = item.source.head_dim * DTypeBytes(item.out_dtype);
  const auto or_dense = [](int64_t stride, int64_t dense) { return stride != 0 ? stride : dense; };
  return {
      .source = item.source,
      .kept = item.kept,
      .num_kept = item.num_kept,
      .num_slots = CeilDiv(item.num_kept, item.page_size) * item.page_size,
      .pages = static_cast<std::byte*>(item.pages),
      .slot_stride_bytes = or_dense(item.slot_stride_bytes, heads * row_bytes),
      .head_stride_bytes = or_dense(item.head_stride_bytes, row_bytes),
      .scales = item.scales,
      .scale_slot_stride = item.scale_head_stride != 0 ? 1 : heads,
      .scale_head_stride = or_dense(item.scale_head_stride, 1),
      .kept_per_head = item.groups > 1,
  };
}

bool CanCopyTogether(const GatherPagesItem& a, const GatherPagesItem& b) {
  return VectorBytes(a) == VectorBytes(b);
}

absl::Status CopyPages(std::span<const GatherPagesItem> items, const Launch& launch) {
  switch (VectorBytes(items[0])) {
    case 16:
      return LaunchCopy<uint4>(items, launch);
    case 8:
      return LaunchCopy<uint2>(items, launch);
    case 4:
      return LaunchCopy<unsigned int>(items, launch);
    case 2:
      return LaunchCopy<unsigned short>(items, launch);
    default:
      return LaunchCopy<unsigned char>(items, launch);
  }
}

absl::Status GatherPages(const GatherPagesParams& params, const Launch& launch) {
  std::span<const GatherPagesItem> rest = params.items;
  while (!rest.empty()) {
    size_t count = 1;
    while (count < std::min<size_t>(rest.size(), kGatherBatchItems) &&
           CanShareLaunch(rest[0], rest[count])) {
      ++count;
    }
    const std::span<const GatherPagesItem> batch = rest.first(count);
    absl::Status status =
        KeepsBits(batch[0]) ? CopyPages(batch, launch) : EncodePages(batch, launch);
    if (!status.ok()) return status;
    rest = rest.subspan(count);
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::kernels

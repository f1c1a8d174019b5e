// SPDX-License-Identifier: Apache-2.0
//
// Bits are tested in the words they come in: an element is a NaN or an infinity where all bits of
// its exponent are set (e4m3: all bits but the sign), so adding one to their lowest carries into
// the sign's place and no further. Only quantised rows with enormous scales are decoded.
#include <algorithm>
#include <climits>
#include <span>

#include "cuda/cuda_status.h"
#include "cuda/fast_divisor.cuh"
#include "cuda/operations.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 8;
constexpr int kBatchItems = 24;
// A code times a scale below this is finite for every finite code (at most 57344).
constexpr float kSafeScale = 1e33F;

// The bits that are all set in what is not finite, and the lowest of them, of every element of a
// word. None are in integers.
struct Exponent {
  uint32_t mask;
  uint32_t lowest;
  uint32_t carry;  // signs

  __device__ uint32_t Test(uint32_t word) const { return ((word & mask) + lowest) & carry; }
};

Exponent ExponentOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {0x7C007C00U, 0x04000400U, 0x80008000U};
    case DType::kBFloat16:
      return {0x7F807F80U, 0x00800080U, 0x80008000U};
    case DType::kFloat8E4M3:
      return {0x7F7F7F7FU, 0x01010101U, 0x80808080U};
    case DType::kFloat8E5M2:
      return {0x7C7C7C7CU, 0x04040404U, 0x80808080U};
    case DType::kInt8:
    case DType::kInt32:
      break;
    case DType::kFloat32:
      return {0x7F800000U, 0x00800000U, 0x80000000U};
  }
  return {0, 0, 0};
}

struct FiniteItem {
  TensorView view;  // with one head of whole tokens, where heads are consecutive
  Exponent exponent;
  FastDivisor row_vectors;
  FastDivisor heads;
  int32_t tokens_per_block;
  uint32_t first_block;
  int32_t* first_bad;
};

struct FiniteBatch {
  FiniteItem items[kBatchItems];
  int num_items;
};
static_assert(sizeof(FiniteBatch) <= 4096);

__device__ uint32_t Test(const Exponent& e, uint4 v) {
  return e.Test(v.x) | e.Test(v.y) | e.Test(v.z) | e.Test(v.w);
}
__device__ uint32_t Test(const Exponent& e, uint2 v) { return e.Test(v.x) | e.Test(v.y); }
__device__ uint32_t Test(const Exponent& e, uint32_t v) { return e.Test(v); }
__device__ uint32_t Test(const Exponent& e, unsigned short v) { return e.Test(v) & 0xFFFFU; }
__device__ uint32_t Test(const Exponent& e, unsigned char v) { return e.Test(v) & 0xFFU; }

__device__ bool CodeOverflows(DType dtype, uint8_t code, float scale) {
  float value = 0;
  if (dtype == DType::kFloat8E4M3) {
    value = Decode(E4M3{code});
  } else if (dtype == DType::kFloat8E5M2) {
    value = Decode(E5M2{code});
  } else {
    value = Decode(static_cast<int8_t>(code));
  }
  return !isfinite(__fmul_rn(value, scale));
}

// Whether codes of row (t, h) overflow in their scale.
template <typename Vector>
__device__ bool ScaleOverflows(const TensorView& view, int64_t t, int h, const Vector& codes) {
  const float scale = RowScale(view, t, h);
  if (fabsf(scale) < kSafeScale) return false;  // not of a NaN
  const auto* const bytes = reinterpret_cast<const uint8_t*>(&codes);
  for (size_t i = 0; i < sizeof(Vector); ++i) {
    if (CodeOverflows(view.dtype, bytes[i], scale)) return true;
  }
  return false;
}

__global__ void PrepareKernel(const __grid_constant__ FiniteBatch batch) {
  const auto i = static_cast<int>(threadIdx.x);
  if (i < batch.num_items) {
    *batch.items[i].first_bad = static_cast<int32_t>(batch.items[i].view.num_tokens);
  }
}

// Each block checks `tokens_per_block` tokens of all heads; all loads of a thread are in flight
// before the first is tested.
template <typename Vector>
__global__ void __launch_bounds__(kThreads)
    CheckFiniteKernel(const __grid_constant__ FiniteBatch batch) {
  int index = 0;
  while (index + 1 < batch.num_items && blockIdx.x >= batch.items[index + 1].first_block) ++index;
  const FiniteItem& item = batch.items[index];
  const TensorView& view = item.view;
  const uint32_t heads = item.heads.divisor();
  const uint32_t row_vectors = item.row_vectors.divisor();
  const int64_t begin = static_cast<int64_t>(blockIdx.x - item.first_block) * item.tokens_per_block;
  const int64_t tokens = min(static_cast<int64_t>(item.tokens_per_block), view.num_tokens - begin);
  const uint32_t units = static_cast<uint32_t>(tokens) * heads * row_vectors;
  int bad = INT_MAX;
  for (uint32_t base = threadIdx.x; base < units; base += kThreads * kUnitsPerThread) {
    Vector values[kUnitsPerThread] = {};
    bool overflows = false;
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      const uint32_t unit = base + i * kThreads;
      if (unit >= units) continue;
      const uint32_t row = item.row_vectors.Divide(unit);
      const uint32_t local_token = item.heads.Divide(row);
      const std::byte* const address =
          RowAddress(view, begin + local_token, static_cast<int>(row - local_token * heads));
      values[i] = __ldcs(reinterpret_cast<const Vector*>(address) + (unit - row * row_vectors));
    }
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) found |= Test(item.exponent, values[i]);
    if (view.scales == nullptr && found == 0) continue;
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      const uint32_t unit = base + i * kThreads;
      if (unit >= units) continue;
      const uint32_t row = item.row_vectors.Divide(unit);
      const uint32_t local_token = item.heads.Divide(row);
      const int64_t t = begin + local_token;
      overflows = view.scales != nullptr &&
                  ScaleOverflows(view, t, static_cast<int>(row - local_token * heads), values[i]);
      if (overflows || Test(item.exponent, values[i]) != 0) bad = min(bad, static_cast<int>(t));
    }
  }
  if (bad != INT_MAX) atomicMin(item.first_bad, bad);
}

// Heads that lie one behind the other are one row, unless each has scales of its own.
TensorView WithWholeRows(TensorView view) {
  const int64_t row_bytes = view.head_dim * DTypeBytes(view.dtype);
  if (view.scales != nullptr || view.head_stride_bytes != row_bytes) return view;
  view.head_dim *= view.num_heads;
  view.head_stride_bytes *= view.num_heads;
  view.num_heads = 1;
  return view;
}

// Widest vector that divides every address and the row.
int64_t VectorBytes(const TensorView& tensor) {
  const TensorView view = WithWholeRows(tensor);
  int64_t bits = reinterpret_cast<intptr_t>(view.data) | view.token_stride_bytes |
                 view.head_dim * DTypeBytes(view.dtype);
  if (view.num_heads > 1) bits |= view.head_stride_bytes;
  if (view.block_table != nullptr) bits |= view.page_stride_bytes;
  int64_t bytes = 16;
  while (bits % bytes != 0) bytes /= 2;
  return bytes;
}

template <typename Vector>
absl::Status LaunchCheck(std::span<const CheckFiniteItem> items, cudaStream_t stream) {
  FiniteBatch batch = {};
  int64_t blocks = 0;
  for (const CheckFiniteItem& item : items) {
    FiniteItem& check = batch.items[batch.num_items++];
    check.view = WithWholeRows(item.tensor);
    check.exponent = ExponentOf(item.tensor.dtype);
    const int64_t row_vectors =
        check.view.head_dim * DTypeBytes(check.view.dtype) / static_cast<int64_t>(sizeof(Vector));
    const int64_t tokens_per_block =
        std::max<int64_t>(1, kThreads * kUnitsPerThread / (row_vectors * check.view.num_heads));
    check.row_vectors = FastDivisor(row_vectors);
    check.heads = FastDivisor(check.view.num_heads);
    check.tokens_per_block = static_cast<int32_t>(tokens_per_block);
    check.first_block = static_cast<uint32_t>(blocks);
    check.first_bad = item.first_bad_token;
    blocks += CeilDiv(check.view.num_tokens, tokens_per_block);
  }
  PrepareKernel<<<1, kWarp, 0, stream>>>(batch);
  if (absl::Status status = LaunchStatus("PrepareKernel"); !status.ok()) return status;
  if (blocks == 0) return absl::OkStatus();
  CheckFiniteKernel<Vector><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(batch);
  return LaunchStatus("CheckFiniteKernel");
}

absl::Status CheckBatch(std::span<const CheckFiniteItem> items, cudaStream_t stream) {
  switch (VectorBytes(items[0].tensor)) {
    case 16:
      return LaunchCheck<uint4>(items, stream);
    case 8:
      return LaunchCheck<uint2>(items, stream);
    case 4:
      return LaunchCheck<uint32_t>(items, stream);
    case 2:
      return LaunchCheck<unsigned short>(items, stream);
    default:
      return LaunchCheck<unsigned char>(items, stream);
  }
}

}  // namespace

absl::Status CheckFinite(const CheckFiniteParams& params, const Launch& launch) {
  std::span<const CheckFiniteItem> rest = params.items;
  while (!rest.empty()) {
    size_t count = 1;
    while (count < std::min<size_t>(rest.size(), kBatchItems) &&
           VectorBytes(rest[count].tensor) == VectorBytes(rest[0].tensor)) {
      ++count;
    }
    absl::Status status = CheckBatch(rest.first(count), launch.stream);
    if (!status.ok()) return status;
    rest = rest.subspan(count);
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::kernels

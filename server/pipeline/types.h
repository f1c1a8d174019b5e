// SPDX-License-Identifier: Apache-2.0
//
// Shapes and views that every stage speaks in. Plain data; no ownership, no virtual functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

namespace dynsplit {

// Element types. Codes of the two fp8 types are OCP e4m3fn and e5m2.
enum class DType : uint8_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat8E4M3,
  kFloat8E5M2,
  kInt8,
  kInt32,
};

constexpr int64_t DTypeBytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2:
    case DType::kInt8:
      return 1;
  }
  return 0;
}

// True for types whose values mean something only with a scale.
constexpr bool IsQuantized(DType dtype) { return DTypeBytes(dtype) == 1; }

std::string_view DTypeName(DType dtype);  // "bf16", "fp8_e4m3", ...

// Geometry of a sequence. Invariants (ValidateShape): all > 0, num_query_heads % num_kv_heads == 0,
// head_dim a multiple of 8 in [8, 512], num_layers and num_query_heads <= 1024, num_tokens < 2^31.
struct SequenceShape {
  int32_t num_layers = 0;
  int32_t num_query_heads = 0;
  int32_t num_kv_heads = 0;
  int64_t num_tokens = 0;
  int32_t head_dim = 0;

  int32_t group_size() const { return num_query_heads / num_kv_heads; }
  bool operator==(const SequenceShape&) const = default;
};

enum class ScaleGranularity : uint8_t {
  kHead,       // scales [heads]
  kTokenHead,  // scales [tokens, heads]
};

// Read-only view of a [tokens, heads, head_dim] tensor; head_dim is contiguous. Points to device or
// host memory, whichever the backend that receives it computes on.
//   address(t, h) = data + row(t) + h * head_stride_bytes, where
//   row(t) = t * token_stride_bytes                                             (block_table null)
//          = block_table[t / page_size] * page_stride_bytes
//            + (t % page_size) * token_stride_bytes                             (paged)
// Every address(t, h) is a multiple of the element size; nothing more may be assumed.
struct TensorView {
  const std::byte* data = nullptr;
  DType dtype = DType::kBFloat16;
  int64_t num_tokens = 0;
  int32_t num_heads = 0;
  int32_t head_dim = 0;
  int64_t token_stride_bytes = 0;
  int64_t head_stride_bytes = 0;
  // Paged pool; block_table has ceil(num_tokens / page_size) entries in the same memory as data.
  const int32_t* block_table = nullptr;
  int32_t page_size = 0;
  int64_t page_stride_bytes = 0;
  // Quantised types: value = code * scale. Null otherwise.
  const float* scales = nullptr;
  ScaleGranularity scale_granularity = ScaleGranularity::kHead;
};

// Dense row-major [tokens, heads, head_dim] view.
TensorView DenseView(const void* data, DType dtype, int64_t num_tokens, int32_t num_heads,
                     int32_t head_dim);

// Half-open token range.
struct TokenSpan {
  int32_t begin = 0;
  int32_t end = 0;
  bool operator==(const TokenSpan&) const = default;
};

// Rotary embedding the keys carry. Channel pairs are (2i, 2i+1) when interleaved, else
// (i, i + rotary_dim/2); pair i turns by position * inverse_frequencies[i] radians.
struct Rope {
  int32_t rotary_dim = 0;
  bool interleaved = false;
  std::vector<double> inverse_frequencies;  // rotary_dim / 2 entries, finite
};

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/types.h"

namespace dynsplit {

std::string_view DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "fp32";
    case DType::kFloat16:
      return "fp16";
    case DType::kBFloat16:
      return "bf16";
    case DType::kFloat8E4M3:
      return "fp8_e4m3";
    case DType::kFloat8E5M2:
      return "fp8_e5m2";
    case DType::kInt8:
      return "int8";
    case DType::kInt32:
      return "int32";
  }
  return "unknown";
}

TensorView DenseView(const void* data, DType dtype, int64_t num_tokens, int32_t num_heads,
                     int32_t head_dim) {
  TensorView view;
  view.data = static_cast<const std::byte*>(data);
  view.dtype = dtype;
  view.num_tokens = num_tokens;
  view.num_heads = num_heads;
  view.head_dim = head_dim;
  view.head_stride_bytes = head_dim * DTypeBytes(dtype);
  view.token_stride_bytes = num_heads * view.head_stride_bytes;
  return view;
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/host_finite.h"

#include <cstring>
#include <type_traits>

namespace dynsplit {
namespace {

// Codes that are not finite have all of `special` set. Without a branch in the loop, so that it is
// vectorised.
template <typename Word>
bool NoneSpecial(const std::byte* data, int64_t count, std::type_identity_t<Word> special) {
  unsigned found = 0;
  for (int64_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, data + i * static_cast<int64_t>(sizeof(Word)), sizeof(Word));
    found |= static_cast<unsigned>((word & special) == special);
  }
  return found == 0;
}

}  // namespace

bool AllFinite(const std::byte* data, DType dtype, int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      return NoneSpecial<uint32_t>(data, count, 0x7F800000);
    case DType::kFloat16:
      return NoneSpecial<uint16_t>(data, count, 0x7C00);
    case DType::kBFloat16:
      return NoneSpecial<uint16_t>(data, count, 0x7F80);
    case DType::kFloat8E4M3:
      return NoneSpecial<uint8_t>(data, count, 0x7F);
    case DType::kFloat8E5M2:
      return NoneSpecial<uint8_t>(data, count, 0x7C);
    case DType::kInt8:
    case DType::kInt32:
      return true;
  }
  return true;
}

int64_t FirstNotFinite(const TensorView& view) {
  for (int64_t token = 0; token < view.num_tokens; ++token) {
    for (int32_t head = 0; head < view.num_heads; ++head) {
      const std::byte* row =
          view.data + token * view.token_stride_bytes + head * view.head_stride_bytes;
      if (!AllFinite(row, view.dtype, view.head_dim)) return token;
    }
  }
  return view.num_tokens;
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cmath>

#include "server/cpu/decode.h"
#include "server/cpu/operations.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {

constexpr int64_t kChunkBytes = int64_t{256} << 10;
// A code times a scale below this is finite for every finite code (at most 57344).
constexpr float kSafeScale = 1e33F;

// Elements of a token that lie one after the other.
bool HeadsAreContiguous(const TensorView& view) {
  return view.head_stride_bytes == view.head_dim * DTypeBytes(view.dtype);
}

bool ScaledRowIsFinite(const TensorView& view, int64_t token, int32_t head) {
  const float scale = RowScale(view, token, head);
  if (std::fabs(scale) < kSafeScale) return true;  // false for NaN
  for (int32_t c = 0; c < view.head_dim; ++c) {
    float value = 0;
    DecodeRow(view.dtype, RowAddress(view, token, head) + c * DTypeBytes(view.dtype), scale, 1,
              &value);
    if (!std::isfinite(value)) return false;
  }
  return true;
}

bool TokenIsFinite(const TensorView& view, int64_t token) {
  if (HeadsAreContiguous(view)) {
    if (HasNonFinite(view.dtype, RowAddress(view, token, 0), view.num_heads * view.head_dim)) {
      return false;
    }
  } else {
    for (int32_t h = 0; h < view.num_heads; ++h) {
      if (HasNonFinite(view.dtype, RowAddress(view, token, h), view.head_dim)) return false;
    }
  }
  if (view.scales != nullptr) {
    for (int32_t h = 0; h < view.num_heads; ++h) {
      if (!ScaledRowIsFinite(view, token, h)) return false;
    }
  }
  return true;
}

void CheckTensor(const CheckFiniteItem& item, const Workspace& workspace) {
  const TensorView& view = item.tensor;
  const int64_t token_bytes = view.num_heads * view.head_dim * DTypeBytes(view.dtype);
  const int64_t tokens = std::max<int64_t>(1, kChunkBytes / token_bytes);
  std::atomic<int64_t> first_bad{view.num_tokens};
  workspace.threads.ParallelFor(CeilDiv(view.num_tokens, tokens), [&](int64_t chunk, int) {
    const int64_t begin = chunk * tokens;
    const int64_t end = std::min(begin + tokens, view.num_tokens);
    if (begin >= first_bad.load(std::memory_order_relaxed)) return;
    // A dense piece in one go; token by token only to find the place.
    if (view.scales == nullptr && view.block_table == nullptr && HeadsAreContiguous(view) &&
        view.token_stride_bytes == token_bytes &&
        !HasNonFinite(view.dtype, RowAddress(view, begin, 0),
                      (end - begin) * view.num_heads * view.head_dim)) {
      return;
    }
    for (int64_t t = begin; t < end; ++t) {
      if (TokenIsFinite(view, t)) continue;
      int64_t known = first_bad.load(std::memory_order_relaxed);
      while (t < known && !first_bad.compare_exchange_weak(known, t, std::memory_order_relaxed)) {
      }
      return;
    }
  });
  *item.first_bad_token = static_cast<int32_t>(first_bad.load(std::memory_order_relaxed));
}

}  // namespace

absl::Status CheckFinite(const CheckFiniteParams& params, const Workspace& workspace) {
  for (const CheckFiniteItem& item : params.items) CheckTensor(item, workspace);
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <vector>

#include "server/cpu/operations.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {

// One bit a token.
class TokenSet {
 public:
  explicit TokenSet(int64_t num_tokens) : words_(static_cast<size_t>(CeilDiv(num_tokens, 64)), 0) {}
  void Insert(int32_t token) { Word(token) |= Bit(token); }
  // True if it was there.
  bool Remove(int32_t token) {
    const bool found = (Word(token) & Bit(token)) != 0;
    Word(token) &= ~Bit(token);
    return found;
  }

 private:
  static uint64_t Bit(int32_t token) { return uint64_t{1} << (token % 64); }
  uint64_t& Word(int32_t token) { return words_[static_cast<size_t>(token / 64)]; }
  std::vector<uint64_t> words_;
};

// Rows of keys or values and where they go.
struct Destination {
  const TensorView& source;
  std::byte* rows;
  float* scales;
};

void MoveRow(const Destination& to, int32_t token, int32_t head, int64_t row) {
  const int64_t row_bytes = to.source.head_dim * DTypeBytes(to.source.dtype);
  if (to.rows != nullptr) {
    std::memcpy(to.rows + row * row_bytes, RowAddress(to.source, token, head),
                static_cast<size_t>(row_bytes));
  }
  if (to.scales != nullptr) to.scales[row] = RowScale(to.source, token, head);
}

void RefreshHead(const RefreshRowsItem& item, const RefreshRowsParams& params, int32_t head) {
  const int64_t num_rows = params.num_rows;
  const int32_t* wanted = item.wanted + (params.groups == 1 ? 0 : head) * num_rows;
  int32_t* held = item.held + head * num_rows;
  TokenSet missing(item.keys.num_tokens);
  for (int64_t s = 0; s < num_rows; ++s) missing.Insert(wanted[s]);
  std::vector<int32_t> open_slots;
  for (int64_t s = 0; s < num_rows; ++s) {
    if (held[s] < 0 || !missing.Remove(held[s])) open_slots.push_back(static_cast<int32_t>(s));
  }

  // As many tokens are missing as slots are open: both sides are sets of num_rows.
  auto slot = open_slots.begin();
  for (int64_t i = 0; i < num_rows && slot != open_slots.end(); ++i) {
    if (!missing.Remove(wanted[i])) continue;
    const int64_t row = head * num_rows + *slot;
    held[*slot++] = wanted[i];
    MoveRow({item.keys, item.key_rows, item.key_scales}, wanted[i], head, row);
    MoveRow({item.values, item.value_rows, item.value_scales}, wanted[i], head, row);
  }
  item.num_moved[head] = static_cast<int32_t>(open_slots.size());
  if (item.moved_slots != nullptr) {
    std::copy(open_slots.begin(), open_slots.end(), item.moved_slots + head * num_rows);
  }
}

}  // namespace

absl::Status RefreshRows(const RefreshRowsParams& params, const Workspace& workspace) {
  if (params.items.empty()) return absl::OkStatus();
  const int32_t heads = params.items.front().keys.num_heads;
  const auto num_items = static_cast<int64_t>(params.items.size());
  workspace.threads.ParallelFor(num_items * heads, [&](int64_t chunk, int /*slot*/) {
    RefreshHead(params.items[static_cast<size_t>(chunk / heads)], params,
                static_cast<int32_t>(chunk % heads));
  });
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

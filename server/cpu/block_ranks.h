// SPDX-License-Identifier: Apache-2.0
//
// Blocks in the order (score descending, index ascending), and how far a budget of tokens reaches.
#pragma once

#include <cstdint>
#include <span>

namespace dynsplit::cpu {

// Ascending keys = (score descending, index ascending). NaN counts as -infinity, -0 as 0.
uint64_t RankKey(float score, int64_t index);
inline int64_t IndexOf(uint64_t key) { return static_cast<int64_t>(key & 0xFFFFFFFF); }

// Blocks whose key is below `key` are taken whole, and then `tokens` of the block at `key`.
struct RankCut {
  uint64_t key = 0;
  int64_t tokens = 0;  // less than that block has
};
// Takes blocks in order while what they have, free_tokens[block], fits into `room`. Reorders
// `keys`; linear in their number.
RankCut CutRanks(std::span<uint64_t> keys, std::span<const int32_t> free_tokens, int64_t room);

}  // namespace dynsplit::cpu

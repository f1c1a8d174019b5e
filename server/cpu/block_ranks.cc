// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/block_ranks.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace dynsplit::cpu {

uint64_t RankKey(float score, int64_t index) {
  constexpr uint32_t kMinusInfinity = 0xFF800000;
  uint32_t bits = std::isnan(score) ? kMinusInfinity : std::bit_cast<uint32_t>(score + 0.0F);
  bits = (bits >> 31) != 0 ? bits : ~bits & 0x7FFFFFFF;  // larger float = smaller unsigned
  return uint64_t{bits} << 32 | static_cast<uint32_t>(index);
}

// Halves the stretch in which the cut lies: each half is partitioned once, then settled or left.
RankCut CutRanks(std::span<uint64_t> keys, std::span<const int32_t> free_tokens, int64_t room) {
  auto begin = keys.begin();
  auto end = keys.end();
  while (begin != end) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end);
    int64_t wanted = 0;
    for (auto key = begin; key <= middle; ++key) {
      wanted += free_tokens[static_cast<size_t>(IndexOf(*key))];
    }
    if (wanted <= room) {
      room -= wanted;
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  if (begin == keys.end()) return {.key = std::numeric_limits<uint64_t>::max(), .tokens = 0};
  return {.key = *begin, .tokens = room};
}

}  // namespace dynsplit::cpu

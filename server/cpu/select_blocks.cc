// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <numeric>
#include <vector>

#include "server/cpu/block_ranks.h"
#include "server/cpu/operations.h"

namespace dynsplit::cpu {
namespace {

// Tokens of a block that are neither in the head nor in the tail.
struct FreeTokens {
  int32_t begin;
  int32_t end;
  int32_t count() const { return end - begin; }
};

FreeTokens FreeTokensOf(const SelectBlocksItem& item, int64_t block) {
  const auto low = static_cast<int32_t>(item.prefix_end);
  const auto high = static_cast<int32_t>(item.suffix_begin);
  const bool of_one = item.block_starts == nullptr;
  const auto first = of_one ? static_cast<int32_t>(block) : item.block_starts[block];
  const int32_t begin = std::clamp(first, low, high);
  return {begin, std::clamp(of_one ? first + 1 : item.block_starts[block + 1], begin, high)};
}

// `names` null: tokens go by their numbers.
int32_t* Append(const int32_t* names, int64_t begin, int64_t end, int32_t* out) {
  if (names != nullptr) return std::copy(names + begin, names + end, out);
  std::iota(out, out + (end - begin), static_cast<int32_t>(begin));
  return out + (end - begin);
}

void SelectGroup(const SelectBlocksItem& item, int32_t group) {
  const float* scores = item.block_scores + group * item.num_blocks;
  std::vector<uint64_t> keys;
  std::vector<int32_t> free(static_cast<size_t>(item.num_blocks));
  keys.reserve(free.size());
  for (int64_t j = 0; j < item.num_blocks; ++j) {
    free[static_cast<size_t>(j)] = FreeTokensOf(item, j).count();
    if (free[static_cast<size_t>(j)] > 0) keys.push_back(RankKey(scores[j], j));
  }
  const int64_t room = item.num_selected - item.prefix_end - (item.num_tokens - item.suffix_begin);
  const RankCut cut = CutRanks(keys, free, room);

  const int32_t* const names =
      item.names == nullptr ? nullptr : item.names + group * item.num_tokens;
  int32_t* out = Append(names, 0, item.prefix_end, item.tokens + group * item.num_selected);
  for (int64_t j = 0; j < item.num_blocks; ++j) {
    const uint64_t key = RankKey(scores[j], j);
    if (key > cut.key || free[static_cast<size_t>(j)] == 0) continue;
    const FreeTokens tokens = FreeTokensOf(item, j);
    out = Append(names, tokens.begin, key == cut.key ? tokens.begin + cut.tokens : tokens.end, out);
  }
  Append(names, item.suffix_begin, item.num_tokens, out);
}

}  // namespace

absl::Status SelectBlocks(const SelectBlocksParams& params, const Workspace& workspace) {
  const auto num_items = static_cast<int64_t>(params.items.size());
  workspace.threads.ParallelFor(num_items * params.groups, [&](int64_t chunk, int /*slot*/) {
    SelectGroup(params.items[static_cast<size_t>(chunk / params.groups)],
                static_cast<int32_t>(chunk % params.groups));
  });
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

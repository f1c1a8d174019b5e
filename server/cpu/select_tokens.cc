// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "server/cpu/block_ranks.h"
#include "server/cpu/operations.h"

namespace dynsplit::cpu {
namespace {

class Selector {
 public:
  explicit Selector(const SelectTokensParams& params)
      : p_(params), num_protected_(static_cast<size_t>(params.num_blocks), 0) {
    for (int64_t j = 0; j < p_.num_blocks; ++j) {
      int32_t count = 0;
      for (int32_t t = p_.block_starts[j]; t < p_.block_starts[j + 1]; ++t) {
        count += p_.protected_tokens[t] != 0 ? 1 : 0;
      }
      num_protected_[static_cast<size_t>(j)] = count;
      total_protected_ += count;
    }
  }

  void SelectExact(int32_t group) const;
  void SelectWholeBlocks(int32_t group) const;

 private:
  int64_t Length(int64_t block) const {
    return p_.block_starts[block + 1] - p_.block_starts[block];
  }
  int64_t Protected(int64_t block) const { return num_protected_[static_cast<size_t>(block)]; }
  std::vector<uint64_t> Keys(int32_t group) const;
  // The best unprotected tokens of a block, ascending.
  std::vector<int32_t> BestTokens(int32_t group, int64_t block, int64_t count) const;

  const SelectTokensParams& p_;
  std::vector<int32_t> num_protected_;  // of each block
  int64_t total_protected_ = 0;
};

std::vector<uint64_t> Selector::Keys(int32_t group) const {
  std::vector<uint64_t> keys(static_cast<size_t>(p_.num_blocks));
  const float* scores = p_.block_scores + group * p_.num_blocks;
  for (int64_t j = 0; j < p_.num_blocks; ++j) keys[static_cast<size_t>(j)] = RankKey(scores[j], j);
  return keys;
}

std::vector<int32_t> Selector::BestTokens(int32_t group, int64_t block, int64_t count) const {
  std::vector<uint64_t> keys;
  for (int32_t t = p_.block_starts[block]; t < p_.block_starts[block + 1]; ++t) {
    if (p_.protected_tokens[t] != 0) continue;
    const float score =
        p_.token_scores == nullptr ? 0.0F : p_.token_scores[group * p_.num_tokens + t];
    keys.push_back(RankKey(score, t));
  }
  std::nth_element(keys.begin(), keys.begin() + count, keys.end());
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<int32_t>(IndexOf(keys[static_cast<size_t>(i)])));
  }
  std::sort(tokens.begin(), tokens.end());
  return tokens;
}

void Selector::SelectExact(int32_t group) const {
  std::vector<uint64_t> keys = Keys(group);
  std::vector<int32_t> free(keys.size());
  for (int64_t j = 0; j < p_.num_blocks; ++j) {
    free[static_cast<size_t>(j)] = static_cast<int32_t>(Length(j) - Protected(j));
  }
  const RankCut cut = CutRanks(keys, free, p_.num_kept - total_protected_);
  const float* scores = p_.block_scores + group * p_.num_blocks;
  std::vector<int32_t> cut_tokens;
  if (cut.tokens > 0) cut_tokens = BestTokens(group, IndexOf(cut.key), cut.tokens);

  int32_t* out = p_.kept + group * p_.num_kept;
  for (int64_t j = 0; j < p_.num_blocks; ++j) {
    const uint64_t key = RankKey(scores[j], j);
    const bool is_whole = key < cut.key;
    if (key > cut.key && Protected(j) == 0) continue;
    auto best = key == cut.key ? cut_tokens.begin() : cut_tokens.end();
    for (int32_t t = p_.block_starts[j]; t < p_.block_starts[j + 1]; ++t) {
      const bool is_cut = best != cut_tokens.end() && *best == t;
      if (is_cut) ++best;
      if (is_whole || is_cut || p_.protected_tokens[t] != 0) *out++ = t;
    }
  }
  p_.kept_counts[group] = static_cast<int32_t>(out - (p_.kept + group * p_.num_kept));
}

void Selector::SelectWholeBlocks(int32_t group) const {
  std::vector<uint8_t> chosen(static_cast<size_t>(p_.num_blocks), 0);
  int64_t count = 0;
  for (int64_t j = 0; j < p_.num_blocks; ++j) {
    chosen[static_cast<size_t>(j)] = Protected(j) > 0;
    count += chosen[static_cast<size_t>(j)];
  }
  if (count < p_.num_whole_blocks) {
    std::vector<uint64_t> ranked = Keys(group);
    std::sort(ranked.begin(), ranked.end());
    for (uint64_t key : ranked) {
      uint8_t& mark = chosen[static_cast<size_t>(IndexOf(key))];
      if (mark != 0) continue;
      mark = 1;
      if (++count == p_.num_whole_blocks) break;
    }
  }
  int32_t* out = p_.kept + group * p_.num_tokens;
  for (int64_t j = 0; j < p_.num_blocks; ++j) {
    if (chosen[static_cast<size_t>(j)] == 0) continue;
    for (int32_t t = p_.block_starts[j]; t < p_.block_starts[j + 1]; ++t) *out++ = t;
  }
  p_.kept_counts[group] = static_cast<int32_t>(out - (p_.kept + group * p_.num_tokens));
}

}  // namespace

absl::Status SelectTokens(const SelectTokensParams& params, const Workspace& workspace) {
  const Selector selector(params);
  workspace.threads.ParallelFor(params.groups, [&](int64_t group, int /*slot*/) {
    if (params.num_whole_blocks > 0) {
      selector.SelectWholeBlocks(static_cast<int32_t>(group));
    } else {
      selector.SelectExact(static_cast<int32_t>(group));
    }
  });
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

// SPDX-License-Identifier: Apache-2.0
//
// Parity of SelectTokens and SelectBlocks, of blocks and of candidates: selections are equal, not
// close.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <span>
#include <string>

#include "tests/oracle/device_session.h"
#include "tests/oracle/parity_suite.h"
#include "tests/oracle/reference.h"
#include "tests/oracle/tolerance.h"

namespace dynsplit::oracle {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct SelectionCase {
  std::string name;
  int32_t groups = 1;
  std::vector<int32_t> starts;
  std::vector<float> block_scores;
  std::vector<float> token_scores;  // may be empty
  std::vector<uint8_t> protected_tokens;
  int64_t num_kept = 0;
  int64_t num_whole_blocks = 0;

  SelectTokensParams Params() const {
    return {.block_scores = block_scores.data(),
            .token_scores = token_scores.empty() ? nullptr : token_scores.data(),
            .groups = groups,
            .num_tokens = static_cast<int64_t>(protected_tokens.size()),
            .block_starts = starts.data(),
            .num_blocks = static_cast<int64_t>(starts.size()) - 1,
            .protected_tokens = protected_tokens.data(),
            .num_kept = num_kept,
            .num_whole_blocks = num_whole_blocks};
  }
  int64_t num_protected() const {
    return std::accumulate(protected_tokens.begin(), protected_tokens.end(), int64_t{0});
  }
};

void CheckCase(Backend& backend, const SelectionCase& test) {
  SCOPED_TRACE(test.name + ", kept " + std::to_string(test.num_kept) + ", whole blocks " +
               std::to_string(test.num_whole_blocks));
  SelectTokensParams params = test.Params();
  const Selection expected = SelectTokens(params);
  DeviceSession session(backend);
  params.block_scores = session.Upload(test.block_scores);
  params.token_scores = session.Upload(test.token_scores);
  params.block_starts = session.Upload(test.starts);
  params.protected_tokens = session.Upload(test.protected_tokens);
  const int64_t stride = params.num_whole_blocks > 0 ? params.num_tokens : params.num_kept;
  Output<int32_t> kept = session.Poisoned<int32_t>(params.groups * stride);
  Output<int32_t> counts = session.Poisoned<int32_t>(params.groups);
  params.kept = kept.data();
  params.kept_counts = counts.data();
  ASSERT_TRUE(backend.SelectTokens(params, session.stream()).ok());
  const std::vector<int32_t> kept_values = session.Read(std::move(kept));
  const std::vector<int32_t> count_values = session.Read(std::move(counts));
  for (int32_t g = 0; g < params.groups; ++g) {
    const auto& want = expected.kept[static_cast<size_t>(g)];
    ASSERT_EQ(count_values[static_cast<size_t>(g)], static_cast<int32_t>(want.size()));
    const auto begin = kept_values.begin() + g * stride;
    const auto end = begin + static_cast<int64_t>(want.size());
    const auto difference = std::mismatch(begin, end, want.begin());
    ASSERT_TRUE(difference.first == end)
        << "group " << g << " slot " << (difference.first - begin) << ": " << *difference.first
        << ", expected " << *difference.second;
  }
}

// Random scores on a coarse grid, so that ties occur; first tokens, the window and one stray token
// are protected.
SelectionCase RandomCase(const ParityShape& shape) {
  Random random(21);
  SelectionCase test;
  test.groups = shape.num_kept_sets();
  test.starts = RandomBlockStarts(shape, 22);
  for (size_t i = 0; i < (test.starts.size() - 1) * static_cast<size_t>(test.groups); ++i) {
    test.block_scores.push_back(static_cast<float>(random.Between(-20, 200)) / 64);
  }
  for (int64_t i = 0; i < shape.num_tokens * test.groups; ++i) {
    test.token_scores.push_back(static_cast<float>(random.Between(0, 9)));
  }
  test.protected_tokens.resize(static_cast<size_t>(shape.num_tokens));
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    test.protected_tokens[static_cast<size_t>(t)] =
        t < 4 || t >= shape.num_tokens - shape.num_queries || t == shape.num_tokens / 2;
  }
  return test;
}

std::vector<int64_t> Budgets(const SelectionCase& test) {
  const auto num_tokens = static_cast<int64_t>(test.protected_tokens.size());
  const int64_t least = test.num_protected();
  std::vector<int64_t> budgets = {
      least,          least + 1, least + 2, (least + num_tokens) / 5, (least + num_tokens) / 2,
      num_tokens - 1, num_tokens};
  for (int64_t& budget : budgets) {
    budget = std::clamp(budget, std::max<int64_t>(least, 1), num_tokens);
  }
  return budgets;
}

void CheckAllBudgets(Backend& backend, SelectionCase test) {
  const std::vector<float> token_scores = test.token_scores;
  for (int64_t budget : Budgets(test)) {
    test.num_whole_blocks = 0;
    test.num_kept = budget;
    CheckCase(backend, test);
    test.token_scores.clear();
    CheckCase(backend, test);
    test.token_scores = token_scores;
    if (testing::Test::HasFatalFailure()) return;
  }
  const auto num_blocks = static_cast<int64_t>(test.starts.size()) - 1;
  for (int64_t whole : {int64_t{1}, num_blocks / 3 + 1, num_blocks}) {
    test.num_whole_blocks = std::min(whole, num_blocks);
    test.num_kept = 0;
    CheckCase(backend, test);
    if (testing::Test::HasFatalFailure()) return;
  }
}

struct BlockSelectionCase {
  std::string name;
  std::vector<float> block_scores;
  SelectBlocksItem item;  // pointers null
};

// Heads and tails that end within blocks, at their ends, and that leave nothing; all budgets.
std::vector<BlockSelectionCase> BlockSelectionCases(const std::vector<int32_t>& all_starts,
                                                    int32_t groups) {
  std::vector<BlockSelectionCase> cases;
  Random random(23);
  const auto score = [&](int kind) -> float {
    const int64_t draw = random.Between(0, 39);
    switch (kind) {
      case 0:
        return random.Normal();
      case 1:  // ties
        return static_cast<float>(draw % 4) - 1.5F;
      case 2:
        return draw % 3 == 0 ? -0.0F : draw % 3 == 1 ? 0.0F : -1.0F;
      default:
        return draw % 4 == 0   ? kNan
               : draw % 4 == 1 ? -kNan
               : draw % 4 == 2 ? -kInfinity
               : draw == 3     ? kInfinity
                               : random.Normal();
    }
  };
  const auto most_blocks = static_cast<int64_t>(all_starts.size()) - 1;
  for (int kind = 0; kind < 4; ++kind) {
    for (int64_t num_blocks : {most_blocks, std::max<int64_t>(1, most_blocks / 2)}) {
      const int64_t num_tokens = all_starts[static_cast<size_t>(num_blocks)];
      const std::pair<int64_t, int64_t> spans[] = {
          {0, num_tokens},
          {4, num_tokens - 3},
          {all_starts[1], all_starts[static_cast<size_t>(num_blocks) - 1]},
          {num_tokens / 3 + 1, num_tokens / 2},
          {num_tokens / 2, num_tokens / 2}};
      for (auto [low, high] : spans) {
        const int64_t prefix_end = std::clamp<int64_t>(low, 0, num_tokens);
        const int64_t suffix_begin = std::clamp(high, prefix_end, num_tokens);
        const int64_t least = prefix_end + num_tokens - suffix_begin;
        for (int64_t budget : {least, least + 1, least + 17, (9 * least + num_tokens) / 10,
                               (least + num_tokens) / 2, num_tokens - 1, num_tokens}) {
          BlockSelectionCase test;
          test.item.num_blocks = num_blocks;
          test.item.num_tokens = num_tokens;
          test.item.prefix_end = prefix_end;
          test.item.suffix_begin = suffix_begin;
          test.item.num_selected = std::clamp(budget, least, num_tokens);
          test.name = "scores " + std::to_string(kind) + ", T " + std::to_string(num_tokens) +
                      ", free [" + std::to_string(prefix_end) + ", " +
                      std::to_string(suffix_begin) + "), n " +
                      std::to_string(test.item.num_selected);
          for (int64_t i = 0; i < groups * num_blocks; ++i)
            test.block_scores.push_back(score(kind));
          cases.push_back(std::move(test));
        }
      }
    }
  }
  return cases;
}

// What SelectTokens keeps where the head and the tail are protected.
std::vector<int32_t> AsSelectTokens(const BlockSelectionCase& test,
                                    const std::vector<int32_t>& starts, int32_t groups) {
  std::vector<uint8_t> is_protected(static_cast<size_t>(test.item.num_tokens), 0);
  for (int64_t t = 0; t < test.item.num_tokens; ++t) {
    is_protected[static_cast<size_t>(t)] = t < test.item.prefix_end || t >= test.item.suffix_begin;
  }
  const Selection selection = SelectTokens({.block_scores = test.block_scores.data(),
                                            .groups = groups,
                                            .num_tokens = test.item.num_tokens,
                                            .block_starts = starts.data(),
                                            .num_blocks = test.item.num_blocks,
                                            .protected_tokens = is_protected.data(),
                                            .num_kept = test.item.num_selected});
  std::vector<int32_t> tokens;
  for (const auto& group : selection.kept) tokens.insert(tokens.end(), group.begin(), group.end());
  return tokens;
}

void CheckBatch(Backend& backend, std::span<const BlockSelectionCase> cases,
                const std::vector<int32_t>& starts, int32_t groups) {
  DeviceSession session(backend);
  const int32_t* device_starts = session.Upload(starts);
  std::vector<SelectBlocksItem> items;
  std::vector<Output<int32_t>> tokens;
  for (const BlockSelectionCase& test : cases) {
    tokens.push_back(session.Poisoned<int32_t>(groups * test.item.num_selected));
    items.push_back(test.item);
    items.back().block_scores = session.Upload(test.block_scores);
    items.back().block_starts = device_starts;
    items.back().tokens = tokens.back().data();
  }
  const absl::Status status =
      backend.SelectBlocks({.items = items, .groups = groups}, session.stream());
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < cases.size(); ++i) {
    SelectBlocksItem host = cases[i].item;
    host.block_scores = cases[i].block_scores.data();
    host.block_starts = starts.data();
    const std::vector<int32_t> expected = SelectBlocks(host, groups);
    ASSERT_EQ(AsSelectTokens(cases[i], starts, groups), expected) << cases[i].name;
    ExpectEqual(session.Read(std::move(tokens[i])), expected, cases[i].name);
    if (testing::Test::HasFatalFailure()) return;
  }
}

// Blocks so short that a group has more of them than the registers of a thread block hold.
void CheckManyBlocks(Backend& backend, ParityShape shape) {
  constexpr size_t kStep = 17;  // of the cases; shares no factor with the loops they come from
  shape.min_block = 1;
  shape.max_block = 3;
  const std::vector<int32_t> starts = RandomBlockStarts(shape, 25);
  const std::vector<BlockSelectionCase> all = BlockSelectionCases(starts, 1);
  std::vector<BlockSelectionCase> cases;
  for (size_t i = 0; i < all.size(); i += kStep) cases.push_back(all[i]);
  CheckBatch(backend, cases, starts, 1);
}

// Tokens as blocks of their own, under the names of candidates or their own numbers.
void CheckCandidates(Backend& backend, int64_t num_candidates, int32_t groups, uint64_t seed) {
  std::vector<int32_t> starts(static_cast<size_t>(num_candidates) + 1);
  std::iota(starts.begin(), starts.end(), 0);
  // Of the cases; shares no factor with the loops they come from.
  const size_t step = num_candidates > 4096 ? 17 : 3;
  const std::vector<BlockSelectionCase> all = BlockSelectionCases(starts, groups);
  Random random(seed);
  DeviceSession session(backend);
  std::vector<BlockSelectionCase> cases;
  std::vector<std::vector<int32_t>> names;
  std::vector<SelectBlocksItem> items;
  std::vector<Output<int32_t>> tokens;
  for (size_t i = 0; i < all.size(); i += step) {
    cases.push_back(all[i]);
    SelectBlocksItem item = all[i].item;
    names.emplace_back();
    for (int64_t j = 0; cases.size() % 4 != 0 && j < groups * item.num_tokens; ++j) {
      const int32_t before = j % item.num_tokens == 0 ? -1 : names.back().back();
      names.back().push_back(before + static_cast<int32_t>(random.Between(1, 9)));
    }
    tokens.push_back(session.Poisoned<int32_t>(groups * item.num_selected));
    item.block_scores = session.Upload(cases.back().block_scores);
    item.names = session.Upload(names.back());
    item.tokens = tokens.back().data();
    items.push_back(item);
  }
  const absl::Status status =
      backend.SelectBlocks({.items = items, .groups = groups}, session.stream());
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < cases.size(); ++i) {
    SelectBlocksItem host = cases[i].item;
    host.block_scores = cases[i].block_scores.data();
    host.names = names[i].empty() ? nullptr : names[i].data();
    const std::vector<int32_t> expected = SelectBlocks(host, groups);
    for (size_t r = 1; r < expected.size(); ++r) {
      const bool same_group = r % static_cast<size_t>(host.num_selected) != 0;
      ASSERT_TRUE(!same_group || expected[r - 1] < expected[r]) << cases[i].name;
    }
    ExpectEqual(session.Read(std::move(tokens[i])), expected, cases[i].name);
    if (testing::Test::HasFatalFailure()) return;
  }
}

// The budget ends among very many light blocks of nearly equal scores, beside few heavy ones.
void CheckSelectSkewed(Backend& backend) {
  constexpr int32_t kHeavy = 20;
  constexpr int32_t kHeavyTokens = 5000;
  constexpr int32_t kLight = 3000;
  SelectionCase test;
  test.name = "skewed";
  test.starts = {0};
  for (int32_t i = 0; i < kHeavy + kLight; ++i) {
    const bool is_heavy = i < kHeavy;
    test.starts.push_back(test.starts.back() + (is_heavy ? kHeavyTokens : 1));
    const float light = 1 + static_cast<float>(i % 5) / (1 << 22);
    test.block_scores.push_back(!is_heavy ? light : i % 2 == 0 ? 4.0F : -1.0F);
  }
  test.protected_tokens.resize(static_cast<size_t>(test.starts.back()));
  test.protected_tokens[kHeavy * kHeavyTokens + 7] = 1;
  for (const int32_t light : {1, 700, kLight / 2, kLight}) {
    test.num_kept = kHeavy / 2 * kHeavyTokens + light;
    CheckCase(backend, test);
    if (testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace

void CheckSelectBlocks(Backend& backend, const ParityShape& shape) {
  if (shape.num_tokens > (1 << 16)) CheckManyBlocks(backend, shape);
  const std::vector<int32_t> starts = RandomBlockStarts(shape, 24);
  for (int32_t groups : {1, shape.num_kv_heads}) {
    const std::vector<BlockSelectionCase> cases = BlockSelectionCases(starts, groups);
    CheckBatch(backend, cases, starts, groups);
    CheckBatch(backend, std::span(cases).subspan(3, 1), starts, groups);
    if (testing::Test::HasFatalFailure() || shape.num_kv_heads == 1) return;
  }
}

void CheckSelectCandidates(Backend& backend, const ParityShape& shape) {
  for (int32_t groups : {1, shape.num_kv_heads}) {
    CheckCandidates(backend, shape.num_tokens, groups, 27);
    if (testing::Test::HasFatalFailure() || shape.num_kv_heads == 1) return;
  }
}

void CheckSelectTokens(Backend& backend, const ParityShape& shape) {
  CheckAllBudgets(backend, RandomCase(shape));
}

// As many blocks, groups and tokens of a block as change how a device goes about it.
void CheckSelectLarge(Backend& backend) {
  CheckSelectSkewed(backend);
  if (testing::Test::HasFatalFailure()) return;
  struct LargeCase {
    int64_t num_tokens;
    int32_t min_block, max_block, groups;
  };
  constexpr LargeCase kCases[] = {{131072, 8, 20, 8},
                                  {131072, 1, 1, 1},
                                  {150001, 1, 1, 1},
                                  {140003, 1, 3, 1},
                                  {3000, 1, 1, 64},
                                  {33000, 1, 1, 2},
                                  {150000, 1 << 18, 1 << 18, 2},
                                  {5000, 1, 9, 130},
                                  {131073, 65536, 65536, 2},
                                  {1000003, 400, 600, 2}};
  for (const LargeCase& large : kCases) {
    SelectionCase test = RandomCase({.name = "large",
                                     .num_tokens = large.num_tokens,
                                     .num_query_heads = large.groups,
                                     .num_kv_heads = large.groups,
                                     .num_queries = 67,
                                     .min_block = large.min_block,
                                     .max_block = large.max_block,
                                     .kept_per_head = true});
    Random random(26);
    for (int64_t t = 0; t < large.num_tokens; t += random.Between(1, 4000)) {
      test.protected_tokens[static_cast<size_t>(t)] = 1;
    }
    const auto num_blocks = static_cast<int64_t>(test.starts.size()) - 1;
    const std::vector<float> ties = test.block_scores;
    for (const char* scores : {"ties", "distinct", "equal", "extreme"}) {
      test.name = std::to_string(num_blocks) + " blocks, " + scores;
      for (size_t i = 0; i < ties.size(); ++i) {
        const auto normal = static_cast<float>(random.Uniform()) - 0.5F;
        const bool is_ties = std::string(scores) == "ties";
        const bool is_distinct = std::string(scores) == "distinct";
        const bool is_equal = std::string(scores) == "equal";
        test.block_scores[i] = is_ties       ? ties[i]
                               : is_distinct ? normal
                               : is_equal    ? -0.0F
                               : i % 3 == 0  ? kNan
                               : i % 3 == 1  ? std::numeric_limits<float>::max()
                                             : normal;
      }
      const int64_t least = test.num_protected();
      test.num_whole_blocks = 0;
      for (int64_t kept : {(4 * least + large.num_tokens) / 5, large.num_tokens - 1}) {
        test.num_kept = std::clamp(kept, least, large.num_tokens);
        CheckCase(backend, test);
      }
      test.num_kept = 0;
      test.num_whole_blocks = (num_blocks + 4) / 5;
      CheckCase(backend, test);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

void CheckSelectAdversarial(Backend& backend, const ParityShape& shape) {
  if (shape.num_tokens > 4096) GTEST_SKIP() << "small shapes only";
  const SelectionCase base = RandomCase(shape);
  const auto with_scores = [&](const char* name, auto block_score, auto token_score) {
    SelectionCase test = base;
    test.name = name;
    for (size_t j = 0; j < test.block_scores.size(); ++j) test.block_scores[j] = block_score(j);
    for (size_t t = 0; t < test.token_scores.size(); ++t) test.token_scores[t] = token_score(t);
    CheckAllBudgets(backend, test);
  };
  const auto grid = [](size_t i) { return static_cast<float>((i * 7919) % 5); };
  with_scores(
      "all equal", [](size_t) { return 0.25F; }, [](size_t) { return 1.0F; });
  with_scores(
      "many ties", [](size_t j) { return static_cast<float>(j % 3); },
      [](size_t t) { return static_cast<float>(t % 2); });
  with_scores(
      "negative zeros", [](size_t j) { return j % 2 == 0 ? -0.0F : 0.0F; },
      [](size_t t) { return t % 3 == 0 ? 0.0F : -0.0F; });
  with_scores(
      "all negative", [&](size_t j) { return -1 - grid(j); },
      [&](size_t t) { return -2 - grid(t); });
  with_scores(
      "NaN and infinities",
      [&](size_t j) {
        return j % 4 == 0 ? kNan : j % 4 == 1 ? -kInfinity : j % 4 == 2 ? kInfinity : -kNan;
      },
      [&](size_t t) { return t % 3 == 0   ? -kNan
                             : t % 3 == 1 ? kNan
                                          : -kInfinity; });
  with_scores(
      "all NaN", [](size_t) { return kNan; }, [](size_t) { return kNan; });
  with_scores(
      "subnormal steps", [](size_t j) { return static_cast<float>(j % 7) * 1e-45F; },
      [](size_t t) { return -static_cast<float>(t % 7) * 1e-45F; });
  with_scores(
      "rising", [](size_t j) { return static_cast<float>(j); },
      [](size_t t) { return static_cast<float>(t); });

  SelectionCase test = base;
  test.name = "single block";
  test.starts = {0, static_cast<int32_t>(shape.num_tokens)};
  test.block_scores.assign(static_cast<size_t>(test.groups), 0.5F);
  CheckAllBudgets(backend, test);

  test = base;
  test.name = "every block protected";
  for (size_t j = 0; j + 1 < test.starts.size(); ++j) {
    test.protected_tokens[static_cast<size_t>(test.starts[j + 1] - 1)] = 1;
  }
  CheckAllBudgets(backend, test);

  test = base;
  test.name = "every token protected";
  std::fill(test.protected_tokens.begin(), test.protected_tokens.end(), uint8_t{1});
  CheckAllBudgets(backend, test);

  test = base;
  test.name = "nothing protected";
  std::fill(test.protected_tokens.begin(), test.protected_tokens.end(), uint8_t{0});
  CheckAllBudgets(backend, test);
}

}  // namespace dynsplit::oracle

// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/segmentation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <random>

namespace dynsplit {
namespace {

using Method = SegmentationPolicy::Method;

DelimiterProfile MakeProfile(std::vector<DelimiterWeight> weights) {
  return DelimiterProfile::Create("test", "", std::move(weights)).value();
}

DelimiterWeight Weight(int32_t id, float weight, bool sentence_end = false) {
  DelimiterWeight entry;
  entry.token_id = id;
  entry.weight = weight;
  entry.sentence_end = sentence_end;
  return entry;
}

// Ids 1..5 are delimiters (1 and 2 end sentences), 0 and 6.. are words.
DelimiterProfile FiveDelimiters() {
  return MakeProfile({Weight(1, 1.0f, true), Weight(2, 0.9f, true), Weight(3, 0.6f),
                      Weight(4, 0.5f), Weight(5, 0.0f)});
}

SegmentationPolicy Dynamic(int32_t block_size, int32_t max_deviation, double balance) {
  return {.method = Method::kDynamic,
          .block_size = block_size,
          .max_deviation = max_deviation,
          .balance = balance,
          .profile = ""};
}

std::vector<int32_t> RandomTokens(std::mt19937_64& random, size_t count, double delimiter_share) {
  std::bernoulli_distribution is_delimiter(delimiter_share);
  std::uniform_int_distribution<int32_t> delimiter(1, 5);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = is_delimiter(random) ? delimiter(random) : 100;
  return tokens;
}

// Section 1.3 read literally: lists all candidates of a window, orders them by the stated rules and
// takes the first. Slow, and of another shape than the code under test.
Segmentation LiteralDynamic(const std::vector<int32_t>& tokens, const SegmentationPolicy& policy,
                            const DelimiterProfile& profile) {
  std::map<int32_t, double> weight_of;
  for (const DelimiterWeight& weight : profile.weights()) {
    weight_of[weight.token_id] = static_cast<double>(weight.weight);
  }
  const auto num_tokens = static_cast<int32_t>(tokens.size());
  Segmentation result;
  result.starts = {0};
  int32_t s = 0;
  while (num_tokens >= s + policy.block_size + policy.max_deviation) {
    const int32_t ideal = s + policy.block_size;
    const int32_t first = ideal - policy.max_deviation;
    const int32_t last = ideal + policy.max_deviation;
    const auto is_delimiter = [&](int32_t cut) {
      return cut >= first && cut <= last &&
             weight_of.contains(tokens[static_cast<size_t>(cut - 1)]);
    };
    struct Candidate {
      double value;
      int32_t distance, cut;
    };
    std::vector<Candidate> candidates;
    for (int32_t cut = first; cut <= last; ++cut) {
      if (!is_delimiter(cut) || is_delimiter(cut + 1)) continue;  // inside a run
      double weight = 0;
      for (int32_t of_run = cut; is_delimiter(of_run); --of_run) {
        weight = std::max(weight, weight_of[tokens[static_cast<size_t>(of_run - 1)]]);
      }
      const int32_t distance = std::abs(cut - ideal);
      const double closeness =
          1.0 - static_cast<double>(distance) / static_cast<double>(policy.max_deviation + 1);
      candidates.push_back(
          {policy.balance * weight + (1.0 - policy.balance) * closeness, distance, cut});
    }
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
      if (a.value != b.value) return a.value > b.value;
      if (a.distance != b.distance) return a.distance < b.distance;
      return a.cut < b.cut;
    });
    s = candidates.empty() ? ideal : candidates.front().cut;
    result.starts.push_back(s);
  }
  result.open_begin = s;
  if (s < num_tokens) result.starts.push_back(num_tokens);
  return result;
}

void ExpectPartition(const Segmentation& segmentation, int64_t num_tokens) {
  ASSERT_GE(segmentation.starts.size(), 2u);
  EXPECT_EQ(segmentation.starts.front(), 0);
  EXPECT_EQ(segmentation.starts.back(), num_tokens);
  EXPECT_TRUE(std::is_sorted(segmentation.starts.begin(), segmentation.starts.end()));
  EXPECT_EQ(std::adjacent_find(segmentation.starts.begin(), segmentation.starts.end()),
            segmentation.starts.end());
  EXPECT_TRUE(std::binary_search(segmentation.starts.begin(), segmentation.starts.end(),
                                 segmentation.open_begin));
}

TEST(SegmentTest, DynamicEqualsTheLiteralRuleOnRandomText) {
  const DelimiterProfile profile = FiveDelimiters();
  std::mt19937_64 random(11);
  for (int i = 0; i < 3000; ++i) {
    const auto block_size = std::uniform_int_distribution<int32_t>(1, 24)(random);
    const auto max_deviation = std::uniform_int_distribution<int32_t>(0, block_size - 1)(random);
    const double balance = std::uniform_int_distribution<int>(0, 10)(random) / 10.0;
    const double share = std::uniform_int_distribution<int>(0, 10)(random) / 10.0;
    const auto count = std::uniform_int_distribution<size_t>(1, 200)(random);
    const std::vector<int32_t> tokens = RandomTokens(random, count, share);
    const SegmentationPolicy policy = Dynamic(block_size, max_deviation, balance);
    const Segmentation got = Segment(tokens, policy, &profile);
    ASSERT_EQ(got, LiteralDynamic(tokens, policy, profile))
        << "C=" << block_size << " Delta=" << max_deviation << " balance=" << balance;
    ExpectPartition(got, static_cast<int64_t>(count));
    for (size_t j = 0; j + 1 < got.starts.size(); ++j) {
      const int32_t length = got.starts[j + 1] - got.starts[j];
      if (got.starts[j] < got.open_begin) {
        EXPECT_GE(length, block_size - max_deviation);
        EXPECT_LE(length, block_size + max_deviation);
      } else {
        EXPECT_LT(length, block_size + max_deviation);
      }
    }
  }
}

// Text of words with the given delimiters at the given positions.
std::vector<int32_t> Text(size_t length, const std::map<size_t, int32_t>& delimiters) {
  std::vector<int32_t> tokens(length, 100);
  for (const auto& [position, id] : delimiters) tokens[position] = id;
  return tokens;
}

int32_t FirstCut(const std::vector<int32_t>& tokens, const SegmentationPolicy& policy) {
  const DelimiterProfile profile = FiveDelimiters();
  return Segment(tokens, policy, &profile).starts[1];
}

TEST(SegmentTest, TheDelimiterClosesItsOwnBlock) {
  EXPECT_EQ(FirstCut(Text(40, {{12, 1}}), Dynamic(14, 6, 0.6)), 13);
}

TEST(SegmentTest, WithoutCandidatesTheIdealEndIsTheCut) {
  EXPECT_EQ(FirstCut(Text(40, {}), Dynamic(14, 6, 0.6)), 14);
  // Just outside of the window on both sides: cuts 7 and 21.
  EXPECT_EQ(FirstCut(Text(40, {{6, 1}, {20, 1}}), Dynamic(14, 6, 0.6)), 14);
  // Just inside.
  EXPECT_EQ(FirstCut(Text(40, {{7, 1}}), Dynamic(14, 6, 0.6)), 8);
  EXPECT_EQ(FirstCut(Text(40, {{19, 1}}), Dynamic(14, 6, 0.6)), 20);
}

TEST(SegmentTest, BalanceWeighsImportanceAgainstCloseness) {
  const std::vector<int32_t> tokens = Text(40, {{8, 1}, {13, 4}});  // full stop at 9, bracket at 14
  EXPECT_EQ(FirstCut(tokens, Dynamic(14, 6, 0.0)), 14);
  EXPECT_EQ(FirstCut(tokens, Dynamic(14, 6, 1.0)), 9);
}

TEST(SegmentTest, TiesGoToTheCloserThenToTheEarlierCut) {
  // Pure importance: equal weights at cuts 11 and 15 (closer), then 12 and 16 (equally close).
  EXPECT_EQ(FirstCut(Text(40, {{10, 1}, {14, 1}}), Dynamic(14, 6, 1.0)), 15);
  EXPECT_EQ(FirstCut(Text(40, {{11, 1}, {15, 1}}), Dynamic(14, 6, 1.0)), 12);
}

TEST(SegmentTest, ARunIsCutBehindItsLastTokenInTheWindow) {
  const SegmentationPolicy policy = Dynamic(14, 6, 0.6);
  EXPECT_EQ(FirstCut(Text(40, {{11, 1}, {12, 3}, {13, 4}}), policy), 14);
  // A run that began before the window counts with what lies in it.
  EXPECT_EQ(FirstCut(Text(40, {{5, 1}, {6, 1}, {7, 4}, {8, 4}}), policy), 9);
  // One that goes on behind it is cut at the window's end.
  EXPECT_EQ(FirstCut(Text(40, {{18, 1}, {19, 1}, {20, 1}, {21, 1}}), policy), 20);
  // The strong head of a run carries its weak tail over a lone delimiter.
  EXPECT_EQ(FirstCut(Text(40, {{10, 4}, {15, 1}, {16, 4}}), Dynamic(14, 6, 1.0)), 17);
}

TEST(SegmentTest, AWeightOfZeroIsStillABoundary) {
  EXPECT_EQ(FirstCut(Text(40, {{12, 5}}), Dynamic(14, 6, 0.6)), 13);
}

TEST(SegmentTest, TheTailStaysOpenUntilTheWholeWindowIsKnown) {
  const DelimiterProfile profile = FiveDelimiters();
  const SegmentationPolicy policy = Dynamic(14, 6, 0.6);
  const Segmentation open = Segment(Text(19, {{12, 1}}), policy, &profile);
  EXPECT_EQ(open.starts, (std::vector<int32_t>{0, 19}));
  EXPECT_EQ(open.open_begin, 0);
  const Segmentation closed = Segment(Text(20, {{12, 1}}), policy, &profile);
  EXPECT_EQ(closed.starts, (std::vector<int32_t>{0, 13, 20}));
  EXPECT_EQ(closed.open_begin, 13);
  const Segmentation exact = Segment(Text(20, {{19, 1}}), policy, &profile);
  EXPECT_EQ(exact.starts, (std::vector<int32_t>{0, 20}));
  EXPECT_EQ(exact.open_begin, 20);  // nothing is open
}

TEST(SegmentTest, DynamicWithoutDeviationIsFixed) {
  const DelimiterProfile profile = FiveDelimiters();
  std::mt19937_64 random(12);
  for (const size_t count : {1u, 13u, 14u, 15u, 28u, 1000u}) {
    const std::vector<int32_t> tokens = RandomTokens(random, count, 0.3);
    SegmentationPolicy fixed;
    fixed.method = Method::kFixed;
    fixed.block_size = 14;
    EXPECT_EQ(Segment(tokens, Dynamic(14, 0, 0.6), &profile), Segment(tokens, fixed, nullptr));
  }
}

TEST(SegmentTest, ATableOfWeightsCutsAsTheProfileDoes) {
  const DelimiterProfile profile = FiveDelimiters();
  ASSERT_EQ(profile.weight_table().size(), 6u);
  EXPECT_EQ(profile.weight_table()[0], DelimiterProfile::kNoDelimiter);
  EXPECT_EQ(profile.weight_table()[3], 0.6f);
  std::mt19937_64 random(14);
  for (const double share : {0.0, 0.1, 0.7, 1.0}) {
    std::vector<int32_t> tokens = RandomTokens(random, 2000, share);
    tokens[7] = -5;  // in no table
    const SegmentationPolicy policy = Dynamic(14, 6, 0.6);
    EXPECT_EQ(SegmentByWeights(tokens, policy, profile.weight_table()),
              LiteralDynamic(tokens, policy, profile));
  }
}

TEST(SegmentTest, IdsTooLargeForATableAreDelimitersAllTheSame) {
  constexpr int32_t kLargeId = std::numeric_limits<int32_t>::max();
  const DelimiterProfile profile = MakeProfile({Weight(1, 0.2f), Weight(kLargeId, 1.0f)});
  EXPECT_TRUE(profile.weight_table().empty());
  std::vector<int32_t> tokens(200, 100);
  for (size_t t = 3; t < tokens.size(); t += 5) tokens[t] = t % 2 == 0 ? kLargeId : 1;
  const SegmentationPolicy policy = Dynamic(14, 6, 0.6);
  EXPECT_EQ(Segment(tokens, policy, &profile), LiteralDynamic(tokens, policy, profile));
}

TEST(SegmentTest, FixedAndNone) {
  SegmentationPolicy policy;
  policy.method = Method::kFixed;
  policy.block_size = 4;
  EXPECT_EQ(SegmentPositions(10, policy), (Segmentation{.starts = {0, 4, 8, 10}, .open_begin = 8}));
  EXPECT_EQ(SegmentPositions(8, policy), (Segmentation{.starts = {0, 4, 8}, .open_begin = 8}));
  EXPECT_EQ(SegmentPositions(3, policy), (Segmentation{.starts = {0, 3}, .open_begin = 0}));
  policy.method = Method::kNone;
  EXPECT_EQ(SegmentPositions(3, policy), (Segmentation{.starts = {0, 1, 2, 3}, .open_begin = 3}));
}

TEST(SegmentTest, DelimiterSetCutsBehindRunsOfSentenceEnds) {
  const DelimiterProfile profile = FiveDelimiters();
  SegmentationPolicy policy;
  policy.method = Method::kDelimiterSet;
  // Ids 1 and 2 end sentences, 3 does not.
  const std::vector<int32_t> tokens = {9, 1, 9, 3, 9, 2, 1, 9};
  EXPECT_EQ(Segment(tokens, policy, &profile),
            (Segmentation{.starts = {0, 2, 7, 8}, .open_begin = 7}));
  // A run at the very end may go on, so that it is not cut yet.
  const std::vector<int32_t> ends = {9, 1, 9, 2};
  EXPECT_EQ(Segment(ends, policy, &profile), (Segmentation{.starts = {0, 2, 4}, .open_begin = 2}));
}

TEST(IncrementalSegmenterTest, AnySplitEqualsTheBatchAndClosedBlocksStay) {
  const auto profile = std::make_shared<const DelimiterProfile>(FiveDelimiters());
  std::mt19937_64 random(13);
  for (int i = 0; i < 400; ++i) {
    SegmentationPolicy policy = Dynamic(8, 5, 0.6);
    policy.method = static_cast<Method>(i % 4);
    const std::vector<int32_t> tokens = RandomTokens(random, 150, 0.25);
    IncrementalSegmenter segmenter(policy, profile);
    std::vector<int32_t> closed_before;
    for (size_t at = 0; at < tokens.size();) {
      const size_t piece =
          std::min(std::uniform_int_distribution<size_t>(0, 30)(random), tokens.size() - at);
      segmenter.Append(std::span(tokens).subspan(at, piece));
      at += piece;
      if (at == 0) continue;
      const Segmentation now = segmenter.Current();
      ASSERT_EQ(now, Segment(std::span(tokens).first(at), policy, profile.get()))
          << "method " << i % 4 << " at " << at;
      const auto open = std::find(now.starts.begin(), now.starts.end(), now.open_begin);
      const std::vector<int32_t> closed(now.starts.begin(), open + 1);
      ASSERT_GE(closed.size(), closed_before.size());
      ASSERT_TRUE(std::equal(closed_before.begin(), closed_before.end(), closed.begin()));
      closed_before = closed;
    }
  }
}

}  // namespace
}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// Whether and how to compress, on curves made up so that the answers are known.
#include "server/runtime/advice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace dynsplit {
namespace {

using testing::HasSubstr;
using testing::Not;

// 8B shape: 131,072 B a token, 2^34 B in all.
constexpr SequenceShape kShape = {.num_layers = 32,
                                  .num_query_heads = 32,
                                  .num_kv_heads = 8,
                                  .num_tokens = 131072,
                                  .head_dim = 128};
constexpr double kBytes = 17179869184.0;

// At a mass of 0.9 dynsplit needs 0.5 of the tokens and dynsplit_keys 0.7. streamingllm gets there
// with 0.1, of the wrong tokens.
const QualityTable& Table() {
  static const auto* const table =
      new QualityTable(*QualityTable::Parse("# model: Toy\n"
                                            "preset,kept_ratio,mass,error,divergence\n"
                                            "dynsplit,0.1,0.5,0.5,2\n"
                                            "dynsplit,0.5,0.9,0.1,0.2\n"
                                            "dynsplit,1,1,0,0\n"
                                            "dynsplit_keys,0.1,0.3,0.7,3\n"
                                            "dynsplit_keys,0.7,0.9,0.1,0.5\n"
                                            "dynsplit_keys,1,1,0,0\n"
                                            "streamingllm,0.1,0.95,0.05,4\n"
                                            "streamingllm,0.9,0.96,0.04,0.5\n"
                                            "streamingllm,1,1,0,0\n",
                                            "figure,value,divergence\n"
                                            "error,1,1\n"
                                            "lost_mass,1,1\n"));
  return *table;
}

class AdviceTest : public testing::Test {
 protected:
  AdviceTest() {
    request_.shape = kShape;
    request_.link_bytes_per_second = 10e9;
    request_.evidence = {Evidence::kWindowQueries};
  }
  Advice Ask() const { return Advise(request_, Table(), experience_, "cuda"); }

  AdviceRequest request_;
  Experience experience_{Table()};
};

TEST(PipelinedSecondsTest, EqualsTheStationsPlayedOut) {
  for (const int32_t layers : {1, 2, 7, 32}) {
    for (const double link : {0.1, 0.5, 1.0, 3.0}) {
      const double service = 1;
      double served = 0;
      double sent = 0;
      for (int32_t layer = 0; layer < layers; ++layer) {
        served += service / layers;
        sent = std::max(sent, served) + link / layers;
      }
      EXPECT_NEAR(PipelinedSeconds(service, link, layers), sent, 1e-9) << layers << " " << link;
    }
  }
}

TEST(BreakEvenTest, BothTakeAsLongThere) {
  for (const int32_t layers : {1, 4, 32}) {
    for (const double out : {0.05, 0.3, 0.5, 0.8, 0.97}) {
      for (const double service : {0.1, 2.0}) {
        const double rate = BreakEven(1, out, service, layers);
        EXPECT_NEAR(PipelinedSeconds(service, out / rate, layers) * rate, 1, 1e-9);
        EXPECT_LT(PipelinedSeconds(service, out / (rate / 2), layers), 1 / (rate / 2));
        EXPECT_GT(PipelinedSeconds(service, out / (rate * 2), layers), 1 / (rate * 2));
      }
    }
  }
  EXPECT_EQ(BreakEven(1, 1, 1, 4), 0);
  EXPECT_EQ(BreakEven(1, 2, 1, 4), 0);
}

TEST_F(AdviceTest, FewestTokensThatKeepTheMass) {
  const Advice advice = Ask();
  EXPECT_TRUE(advice.compress);
  EXPECT_EQ(advice.policy.preset, "dynsplit");
  EXPECT_DOUBLE_EQ(advice.policy.budget.kept_ratio, 0.5);
  EXPECT_NEAR(advice.expected.mass, 0.9, 1e-9);
  EXPECT_NEAR(advice.expected.error, 0.1, 1e-9);
  EXPECT_NEAR(advice.expected.divergence, 0.2, 1e-9);
  EXPECT_NEAR(advice.plain_seconds, kBytes / 10e9, 1e-12);
  const double service = kBytes * DefaultSecondsPerByte("cuda");
  EXPECT_NEAR(advice.compressed_seconds, PipelinedSeconds(service, kBytes / 2 / 10e9, 32), 1e-9);
  EXPECT_EQ(advice.num_receipts, 0);
  EXPECT_EQ(advice.num_timed, 0);
  EXPECT_THAT(advice.reason, HasSubstr("dynsplit keeping 50.0 %"));
  EXPECT_THAT(advice.reason, HasSubstr("built-in curves of Toy"));
  EXPECT_THAT(advice.reason, HasSubstr("built-in default"));
}

TEST_F(AdviceTest, MoreMassOrLessDivergenceNeedsMoreTokens) {
  double before = 0;
  for (const double mass : {0.1, 0.5, 0.7, 0.9, 0.95, 0.99}) {
    request_.min_mass = mass;
    const double ratio = Ask().policy.budget.kept_ratio;
    EXPECT_GE(ratio, before) << mass;
    EXPECT_GE(Ask().expected.mass, mass - 1e-9);
    before = ratio;
  }
  EXPECT_GT(before, 0.9);
  request_.min_mass = 0.1;
  before = 0;
  for (const double divergence : {5.0, 1.1, 0.2, 0.1, 0.01}) {
    request_.max_divergence = divergence;
    const Advice advice = Ask();
    EXPECT_GT(advice.policy.budget.kept_ratio, before) << divergence;
    EXPECT_LE(advice.expected.divergence, divergence + 1e-9);
    before = advice.policy.budget.kept_ratio;
  }
}

TEST_F(AdviceTest, AFasterLinkIsLessReasonToCompress) {
  const double break_even = Ask().break_even_bytes_per_second;
  EXPECT_GT(break_even, 10e9);
  double gain = 1e300;
  for (const double link : {1e8, 1e9, 1e10, break_even * 0.99}) {
    request_.link_bytes_per_second = link;
    const Advice advice = Ask();
    EXPECT_TRUE(advice.compress) << link;
    EXPECT_LT(advice.plain_seconds - advice.compressed_seconds, gain) << link;
    gain = advice.plain_seconds - advice.compressed_seconds;
    EXPECT_NEAR(advice.break_even_bytes_per_second, break_even, 1e-3);
  }
  request_.link_bytes_per_second = break_even * 1.01;
  const Advice advice = Ask();
  EXPECT_FALSE(advice.compress);
  EXPECT_GT(advice.compressed_seconds, advice.plain_seconds);
  EXPECT_THAT(advice.reason, HasSubstr("K and V as they are take"));
}

TEST_F(AdviceTest, EvidenceDecidesThePreset) {
  struct Case {
    std::vector<Evidence> evidence;
    const char* preset;
    double ratio;
  };
  for (const Case& each :
       {Case{{Evidence::kWindowQueriesWithLse}, "dynsplit", 0.5},
        Case{{Evidence::kKeys, Evidence::kWindowQueries}, "dynsplit", 0.5},
        Case{{Evidence::kKeys}, "dynsplit_keys", 0.7}, Case{{Evidence::kNone}, "streamingllm", 0.1},
        Case{{}, "streamingllm", 0.1}}) {
    request_.evidence = each.evidence;
    const Advice advice = Ask();
    EXPECT_EQ(advice.policy.preset, each.preset);
    EXPECT_NEAR(advice.policy.budget.kept_ratio, each.ratio, 1e-9);
  }
}

TEST_F(AdviceTest, NothingLessThanAllTokensKeepsAllMass) {
  request_.min_mass = 1;
  const Advice advice = Ask();
  EXPECT_FALSE(advice.compress);
  EXPECT_TRUE(std::isnan(advice.compressed_seconds));
  EXPECT_TRUE(std::isnan(advice.expected.mass));
  EXPECT_EQ(advice.break_even_bytes_per_second, 0);
  EXPECT_GT(advice.plain_seconds, 0);
  EXPECT_THAT(advice.reason, HasSubstr("with fewer than all tokens"));
}

TEST_F(AdviceTest, AGoalThatPlainMeetsNeedsNoLoss) {
  request_.goal_seconds = kBytes / 10e9 + 0.001;
  const Advice advice = Ask();
  EXPECT_FALSE(advice.compress);
  EXPECT_LT(advice.compressed_seconds, advice.plain_seconds) << "though it would be faster";
  EXPECT_THAT(advice.reason, HasSubstr("within the goal"));
}

TEST_F(AdviceTest, TimeThatIsThereIsSpentOnTokens) {
  const Advice fastest = Ask();
  double before = fastest.policy.budget.kept_ratio;
  for (const double share : {0.1, 0.5, 0.9}) {
    request_.goal_seconds =
        fastest.compressed_seconds + share * (fastest.plain_seconds - fastest.compressed_seconds);
    const Advice advice = Ask();
    EXPECT_TRUE(advice.compress);
    EXPECT_LE(advice.compressed_seconds, request_.goal_seconds);
    EXPECT_GT(advice.policy.budget.kept_ratio, before);
    before = advice.policy.budget.kept_ratio;
    // One thousandth more would be late.
    const double more = kBytes / 10e9 * (before + 0.002);
    EXPECT_GT(PipelinedSeconds(kBytes * DefaultSecondsPerByte("cuda"), more, 32),
              request_.goal_seconds);
  }
}

TEST_F(AdviceTest, AGoalOutOfReachIsSaidToBe) {
  request_.goal_seconds = 0.01;
  const Advice advice = Ask();
  EXPECT_FALSE(advice.compress);
  EXPECT_THAT(advice.reason, HasSubstr("out of reach at acceptable quality"));
}

TEST_F(AdviceTest, ExperienceChangesTheAnswer) {
  const Advice before = Ask();
  // Receipts at half of the tokens lose twice the curve's mass and error, and requests take ten
  // times the default.
  for (int64_t i = 0; i < Experience::kEnough; ++i) {
    experience_.Record({.shape = kShape,
                        .preset = "dynsplit",
                        .kept_ratio = 0.5,
                        .mass = 0.8,
                        .error = 0.2,
                        .bytes_in = 1 << 30,
                        .seconds = 10 * DefaultSecondsPerByte("cuda") * (1 << 30)});
  }
  const Advice after = Ask();
  EXPECT_NEAR(after.policy.budget.kept_ratio, 0.75, 1e-3);
  EXPECT_NEAR(after.expected.mass, 0.9, 1e-3);
  EXPECT_EQ(after.num_receipts, Experience::kEnough);
  EXPECT_EQ(after.num_timed, Experience::kEnough);
  EXPECT_FALSE(after.compress) << "it takes 3.2 s now";
  EXPECT_LT(after.break_even_bytes_per_second, before.break_even_bytes_per_second / 9);
  EXPECT_THAT(after.reason, HasSubstr("8 receipts of this server"));
  EXPECT_THAT(after.reason, HasSubstr("time by 8 requests of this server"));
  // Of another model nothing is known.
  request_.shape.num_layers = 16;
  EXPECT_THAT(Ask().reason, Not(HasSubstr("of this server")));
}

TEST_F(AdviceTest, ProtectedTokensAndWholePagesAreCounted) {
  request_.shape.num_tokens = 48;  // 4 sinks and 32 recent ones are kept: 36, in 3 pages of 16
  const Advice advice = Ask();
  EXPECT_FALSE(advice.compress);
  EXPECT_EQ(advice.break_even_bytes_per_second, 0) << "as many bytes as came";
}

}  // namespace
}  // namespace dynsplit

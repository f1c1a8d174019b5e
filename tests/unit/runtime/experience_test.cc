// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/experience.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <thread>
#include <vector>

namespace dynsplit {
namespace {

constexpr SequenceShape kShape = {
    .num_layers = 2, .num_query_heads = 4, .num_kv_heads = 2, .num_tokens = 96, .head_dim = 16};

// Of "p", at every share s: mass s, error and divergence 1 - s.
const QualityTable& Table() {
  static const auto* const table = new QualityTable(*QualityTable::Parse(
      "preset,kept_ratio,mass,error,divergence\np,0.1,0.1,0.9,0.9\np,1,1,0,0\n",
      "figure,value,divergence\nerror,1,1\nlost_mass,1,1\n"));
  return *table;
}

Compression Half(double mass, double error) {
  return {.shape = kShape,
          .preset = "p",
          .kept_ratio = 0.5,
          .mass = mass,
          .error = error,
          .bytes_in = 1000,
          .seconds = 0.01};
}

Experience::Outlook Of(const Experience& experience, const SequenceShape& shape = kShape,
                       DType dtype = DType::kBFloat16) {
  return experience.Of(shape, dtype, "p");
}

TEST(ExperienceTest, CountsOnceThereIsEnough) {
  Experience experience(Table());
  for (int64_t i = 0; i < Experience::kEnough; ++i) {
    EXPECT_TRUE(Of(experience).corrections.empty()) << i;
    EXPECT_EQ(Of(experience).num_timed, 0);
    EXPECT_EQ(Of(experience).seconds_per_byte, 0);
    experience.Record(Half(0.75, 0.25));
  }
  const Experience::Outlook outlook = Of(experience);
  ASSERT_EQ(outlook.corrections.size(), 1);
  EXPECT_DOUBLE_EQ(outlook.corrections[0].kept_ratio, 0.5);
  EXPECT_NEAR(outlook.corrections[0].lost_mass_factor, 0.5, 1e-12);
  EXPECT_NEAR(outlook.corrections[0].error_factor, 0.5, 1e-12);
  EXPECT_EQ(outlook.num_receipts, Experience::kEnough);
  EXPECT_EQ(outlook.num_timed, Experience::kEnough);
  EXPECT_NEAR(outlook.seconds_per_byte, 1e-5, 1e-15);
}

TEST(ExperienceTest, TwiceAndHalfCancelOut) {
  Experience experience(Table());
  for (int64_t i = 0; i < Experience::kEnough; ++i) {
    experience.Record(i % 2 == 0 ? Half(0.75, 0.25) : Half(0, 1));
  }
  ASSERT_EQ(Of(experience).corrections.size(), 1);
  EXPECT_NEAR(Of(experience).corrections[0].lost_mass_factor, 1, 1e-12);
  EXPECT_NEAR(Of(experience).corrections[0].error_factor, 1, 1e-12);
}

TEST(ExperienceTest, SharesModelsTypesAndPresetsAreApart) {
  Experience experience(Table());
  SequenceShape other = kShape;
  other.num_layers = 3;
  SequenceShape longer = kShape;
  longer.num_tokens = 1000;
  for (int64_t i = 0; i < Experience::kEnough; ++i) {
    experience.Record(Half(0.75, 0.25));
    Compression few = Half(0.1, 0.9);
    few.kept_ratio = 0.2;
    experience.Record(few);
    Compression unknown = Half(0, 1);
    unknown.preset = "unknown";
    experience.Record(unknown);
  }
  const std::vector<QualityCorrection> found = Of(experience, longer).corrections;
  ASSERT_EQ(found.size(), 2);
  EXPECT_LT(found[0].kept_ratio, found[1].kept_ratio);
  EXPECT_NEAR(found[0].lost_mass_factor, 1.125, 1e-12);
  EXPECT_NEAR(found[1].lost_mass_factor, 0.5, 1e-12);
  EXPECT_TRUE(Of(experience, other).corrections.empty());
  EXPECT_TRUE(Of(experience, kShape, DType::kFloat16).corrections.empty());
  EXPECT_TRUE(experience.Of(kShape, DType::kBFloat16, "unknown").corrections.empty());
}

TEST(ExperienceTest, WhatSaysNothingIsLeftOut) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Experience experience(Table());
  for (int64_t i = 0; i < 2 * Experience::kEnough; ++i) {
    experience.Record(Half(nan, nan));
    experience.Record(Half(0.5, nan));
    Compression all = Half(1, 0);
    all.kept_ratio = 1;
    experience.Record(all);
    Compression untimed = Half(nan, nan);
    untimed.seconds = 0;
    experience.Record(untimed);
  }
  EXPECT_TRUE(Of(experience).corrections.empty());
  EXPECT_EQ(Of(experience).num_timed, 6 * Experience::kEnough);
}

TEST(ExperienceTest, OneAbsurdReceiptIsBounded) {
  Experience experience(Table());
  for (int64_t i = 0; i < Experience::kEnough; ++i) {
    experience.Record(Half(1, std::numeric_limits<double>::infinity()));
  }
  ASSERT_EQ(Of(experience).corrections.size(), 1);
  EXPECT_NEAR(Of(experience).corrections[0].lost_mass_factor, 0.125, 1e-12);
  EXPECT_NEAR(Of(experience).corrections[0].error_factor, 8, 1e-12);
}

TEST(ExperienceTest, OldRequestsFade) {
  Experience experience(Table());
  for (int i = 0; i < 1000; ++i) experience.Record(Half(0.75, 0.25));
  for (int64_t i = 0; i < 6 * Experience::kHorizon; ++i) experience.Record(Half(0.25, 0.75));
  EXPECT_NEAR(Of(experience).corrections[0].lost_mass_factor, 1.5, 0.01);
  EXPECT_NEAR(Of(experience).corrections[0].error_factor, 1.5, 0.01);
}

TEST(ExperienceTest, LargeRequestsTellMoreOfTime) {
  Experience experience(Table());
  for (int64_t i = 0; i < Experience::kEnough; ++i) {
    Compression small = Half(0.5, 0.5);  // 1 ms is spent on the request itself
    small.bytes_in = 1;
    small.seconds = 0.001;
    experience.Record(small);
    Compression large = small;
    large.bytes_in = 1'000'000;
    large.seconds = 1;
    experience.Record(large);
  }
  EXPECT_NEAR(Of(experience).seconds_per_byte, 1e-6, 2e-9);
}

TEST(ExperienceTest, TheModelUnusedForLongestIsForgotten) {
  Experience experience(Table());
  const auto record = [&](int32_t num_layers) {
    for (int64_t i = 0; i < Experience::kEnough; ++i) {
      Compression compression = Half(0.75, 0.25);
      compression.shape.num_layers = num_layers;
      experience.Record(compression);
    }
  };
  const auto knows = [&](int32_t num_layers) {
    SequenceShape shape = kShape;
    shape.num_layers = num_layers;
    return !Of(experience, shape).corrections.empty();
  };
  const auto max = static_cast<int32_t>(Experience::kMaxModels);
  for (int32_t layers = 1; layers <= max; ++layers) record(layers);
  record(1);
  record(max + 1);
  EXPECT_TRUE(knows(1));
  EXPECT_FALSE(knows(2));
  EXPECT_TRUE(knows(3));
  EXPECT_TRUE(knows(max + 1));
}

TEST(ExperienceTest, ManyThreads) {
  Experience experience(Table());
  constexpr int kThreads = 4;
  constexpr int kEach = 500;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (int j = 0; j < kEach; ++j) {
        experience.Record(Half(0.75, 0.25));
        Of(experience);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(Of(experience).num_receipts, kThreads * kEach);
}

TEST(IsPresetItselfTest, BudgetProfileAndPagesMayDiffer) {
  for (const Preset& preset : Presets()) EXPECT_TRUE(IsPresetItself(preset.policy));
  Policy policy = (*FindPreset("dynsplit"))->policy;
  policy.budget.kept_ratio = 0.37;
  policy.segmentation.profile = "mine";
  policy.page_size = 64;
  policy.allow_fallback = true;
  EXPECT_TRUE(IsPresetItself(policy));
  policy.budget.target = BudgetPolicy::Target::kBytes;
  policy.budget.bytes = 1 << 20;
  EXPECT_TRUE(IsPresetItself(policy));

  const auto differs = [](auto change) {
    Policy changed = (*FindPreset("dynsplit"))->policy;
    change(changed);
    return !IsPresetItself(changed);
  };
  EXPECT_TRUE(differs([](Policy& p) { p.segmentation.block_size = 14; }));
  EXPECT_TRUE(differs([](Policy& p) { p.scoring.pooling_kernel = 9; }));
  EXPECT_TRUE(differs([](Policy& p) { p.budget.whole_blocks = true; }));
  EXPECT_TRUE(differs([](Policy& p) { p.encoding.key = EncodingPolicy::Format::kInt8; }));
  EXPECT_TRUE(differs([](Policy& p) { p.protection.dense_layers = {0}; }));
  EXPECT_TRUE(differs([](Policy& p) { p.positions = Positions::kContiguous; }));
  EXPECT_TRUE(differs([](Policy& p) { p.quality_floor.min_retained_attention_mass = 0.9; }));
  EXPECT_TRUE(differs([](Policy& p) { p.preset = "no such"; }));
}

}  // namespace
}  // namespace dynsplit

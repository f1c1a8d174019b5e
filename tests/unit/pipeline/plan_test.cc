// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/plan.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <numeric>
#include <set>

#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

// 20 tokens in blocks of up to 8; layer 0 keeps 4 tokens, layer 2 is dense.
Plan SmallPlan() {
  Plan plan;
  plan.shape = {
      .num_layers = 4, .num_query_heads = 4, .num_kv_heads = 2, .num_tokens = 20, .head_dim = 64};
  plan.segmentation = {.starts = {0, 8, 13, 20}, .open_begin = 13};
  LayerPlan sparse;
  sparse.layer = 0;
  sparse.num_kept = 4;
  sparse.kept = {0, 7, 12, 19};
  LayerPlan dense;
  dense.layer = 2;
  dense.num_kept = 20;
  dense.dense = true;
  dense.kept.resize(20);
  std::iota(dense.kept.begin(), dense.kept.end(), 0);
  plan.layers = {sparse, dense};
  return plan;
}

TEST(PlanHashTest, IsStableAcrossBuilds) {
  // Hashes travel between machines and releases: another value is another format, and calls for a
  // new kPolicyVersion.
  const Plan plan = SmallPlan();
  EXPECT_EQ(ToHex(plan.layers[0].Hash()), "ea3238e4b6c08b1f3cec47af76753b82");
  EXPECT_EQ(ToHex(HashPlan(plan)), "54d75daa0b851d1611e356c61424ff34");
}

TEST(PlanHashTest, CanBeMadeWhileLayersFlow) {
  const Plan plan = SmallPlan();
  PlanHasher hasher(plan.shape, plan.policy, plan.segmentation);
  const Hash128 empty = hasher.Finish();
  for (const LayerPlan& layer : plan.layers) hasher.Add(layer);
  EXPECT_EQ(hasher.Finish(), HashPlan(plan));
  EXPECT_EQ(hasher.Finish(), HashPlan(plan));  // finishing changes nothing
  EXPECT_NE(empty, HashPlan(plan));
}

struct PlanChange {
  const char* what;
  std::function<void(Plan&)> change;
};

TEST(PlanHashTest, ReactsToEveryPartOfTheDecision) {
  const PlanChange changes[] = {
      {"layers", [](Plan& p) { p.shape.num_layers = 5; }},
      {"query heads", [](Plan& p) { p.shape.num_query_heads = 8; }},
      {"kv heads", [](Plan& p) { p.shape.num_kv_heads = 4; }},
      {"tokens", [](Plan& p) { p.shape.num_tokens = 21; }},
      {"head dim", [](Plan& p) { p.shape.head_dim = 128; }},
      {"starts", [](Plan& p) { p.segmentation.starts[1] = 9; }},
      {"fewer starts", [](Plan& p) { p.segmentation.starts.pop_back(); }},
      {"policy", [](Plan& p) { p.policy.page_size = 32; }},
      {"layer", [](Plan& p) { p.layers[1].layer = 3; }},
      {"groups", [](Plan& p) { p.layers[0].groups = 2; }},
      {"num kept", [](Plan& p) { p.layers[0].num_kept = 3; }},
      {"dense", [](Plan& p) { p.layers[0].dense = true; }},
      {"kept", [](Plan& p) { p.layers[0].kept[1] = 6; }},
      {"no layer", [](Plan& p) { p.layers.pop_back(); }},
      {"order", [](Plan& p) { std::swap(p.layers[0], p.layers[1]); }},
  };
  std::set<std::string> hashes = {ToHex(HashPlan(SmallPlan()))};
  for (const PlanChange& c : changes) {
    Plan plan = SmallPlan();
    c.change(plan);
    EXPECT_TRUE(hashes.insert(ToHex(HashPlan(plan))).second) << c.what;
  }
  Plan flags = SmallPlan();  // how a budget came about is no part of the decision
  flags.layers[0].raised_by_protection = true;
  EXPECT_EQ(HashPlan(flags), HashPlan(SmallPlan()));
}

TEST(CanonicalPolicyTest, TellsAllFieldsApart) {
  const std::function<void(Policy&)> changes[] = {
      [](Policy& p) { p.preset = "snapkv"; },
      [](Policy& p) { p.preset = "a\" b"; },
      [](Policy& p) { p.segmentation.method = SegmentationPolicy::Method::kFixed; },
      [](Policy& p) { p.segmentation.block_size = 15; },
      [](Policy& p) { p.segmentation.max_deviation = 5; },
      [](Policy& p) { p.segmentation.balance = 0.6000000000000001; },
      [](Policy& p) { p.segmentation.profile = "x"; },
      [](Policy& p) { p.scoring.method = ScoringPolicy::Method::kKeyNorm; },
      [](Policy& p) { p.scoring.num_window_queries = 1; },
      [](Policy& p) { p.scoring.pooling_kernel = 7; },
      [](Policy& p) { p.scoring.pooling = ScoringPolicy::Pooling::kMax; },
      [](Policy& p) { p.scoring.block_reduction = ScoringPolicy::BlockReduction::kSum; },
      [](Policy& p) { p.scoring.query_reduction = ScoringPolicy::QueryReduction::kRootMeanSquare; },
      [](Policy& p) { p.scoring.lse_base_2 = true; },
      [](Policy& p) { p.scoring.softmax_scale = 0.125; },
      [](Policy& p) { p.scoring.refinement_factor = 4; },
      [](Policy& p) { p.budget.target = BudgetPolicy::Target::kTokens; },
      [](Policy& p) { p.budget.kept_ratio = 0.3; },
      [](Policy& p) { p.budget.tokens_per_head = 1; },
      [](Policy& p) { p.budget.bytes = 1; },
      [](Policy& p) { p.budget.whole_blocks = true; },
      [](Policy& p) { p.transform = Transform::kIndex; },
      [](Policy& p) { p.encoding.key = EncodingPolicy::Format::kInt8; },
      [](Policy& p) { p.encoding.value = EncodingPolicy::Format::kInt8; },
      [](Policy& p) { p.encoding.scale_granularity = ScaleGranularity::kHead; },
      [](Policy& p) { p.encoding.scale_granularity = ScaleGranularity::kTokenHead; },
      [](Policy& p) { p.protection.num_sink_tokens = 5; },
      [](Policy& p) { p.protection.num_recent_tokens = 5; },
      [](Policy& p) {
        p.protection.pinned = {{1, 2}};
      },
      [](Policy& p) {
        p.protection.pinned = {{1, 2}, {3, 4}};
      },
      [](Policy& p) { p.protection.dense_layers = {1}; },
      [](Policy& p) {
        p.protection.dense_layers = {1, 2};
      },
      [](Policy& p) { p.scope = Scope::kGlobal; },
      [](Policy& p) { p.positions = Positions::kContiguous; },
      [](Policy& p) { p.quality_floor.min_retained_attention_mass = 0.5; },
      [](Policy& p) { p.quality_floor.max_output_relative_error = 0.5; },
      [](Policy& p) { p.quality_floor.max_kept_ratio = 0.5; },
      [](Policy& p) { p.allow_fallback = true; },
      [](Policy& p) { p.page_size = 32; },
  };
  std::set<std::string> texts = {CanonicalPolicy(Policy())};
  for (size_t i = 0; i < std::size(changes); ++i) {
    Policy policy;
    changes[i](policy);
    const std::string text = CanonicalPolicy(policy);
    EXPECT_TRUE(texts.insert(text).second) << "change " << i;
    EXPECT_EQ(text.find('\n'), std::string::npos);
  }
  Policy negative_zero;
  negative_zero.quality_floor.max_output_relative_error = -0.0;
  EXPECT_EQ(CanonicalPolicy(negative_zero), CanonicalPolicy(Policy()));
}

TEST(RepresentationSaltTest, IsEmptyForExactBytesAndElseUnlikeAnyOther) {
  const Hash128 a = HashPlan(SmallPlan());
  Hash128 b = a;
  b[15] ^= 1;
  Policy fp8;
  fp8.encoding.key = EncodingPolicy::Format::kFloat8E4M3;
  EXPECT_EQ(RepresentationSalt(Policy(), a, true), "");
  EXPECT_NE(RepresentationSalt(Policy(), a, false), "");
  EXPECT_NE(RepresentationSalt(Policy(), a, false), RepresentationSalt(Policy(), b, false));
  EXPECT_NE(RepresentationSalt(Policy(), a, false), RepresentationSalt(fp8, a, false));
}

struct Attack {
  const char* field;
  std::function<void(Plan&)> spoil;
};

TEST(ValidatePlanTest, RefusesEveryLie) {
  constexpr int32_t kLargest = std::numeric_limits<int32_t>::max();
  constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();
  const Attack attacks[] = {
      {"plan.shape.num_tokens", [](Plan& p) { p.shape.num_tokens = -1; }},
      {"plan.shape.num_query_heads", [](Plan& p) { p.shape.num_query_heads = 3; }},
      {"plan.policy.page_size", [](Plan& p) { p.policy.page_size = 7; }},
      {"plan.policy.budget.kept_ratio", [](Plan& p) { p.policy.budget.kept_ratio = 2; }},
      {"plan.policy_version", [](Plan& p) { p.policy_version = 0; }},
      {"plan.policy_version", [](Plan& p) { p.policy_version = kPolicyVersion + 1; }},
      {"plan.block_starts", [](Plan& p) { p.segmentation.starts.clear(); }},
      {"plan.block_starts", [](Plan& p) { p.segmentation.starts = {0}; }},
      {"plan.block_starts", [](Plan& p) { p.segmentation.starts.front() = 1; }},
      {"plan.block_starts", [](Plan& p) { p.segmentation.starts.back() = 21; }},
      {"plan.block_starts", [](Plan& p) { p.segmentation.starts.back() = 19; }},
      {"plan.block_starts[2]", [](Plan& p) { p.segmentation.starts[2] = 8; }},
      {"plan.block_starts[2]", [](Plan& p) { p.segmentation.starts[2] = kLeast; }},
      {"plan.block_starts[3]", [](Plan& p) { p.segmentation.starts[2] = kLargest; }},
      {"plan.open_block_begin", [](Plan& p) { p.segmentation.open_begin = 14; }},
      {"plan.open_block_begin", [](Plan& p) { p.segmentation.open_begin = -8; }},
      {"plan.layers[0].layer", [](Plan& p) { p.layers[0].layer = -1; }},
      {"plan.layers[1].layer", [](Plan& p) { p.layers[1].layer = 4; }},
      {"plan.layers[1].layer", [](Plan& p) { p.layers[1].layer = 0; }},
      {"plan.layers[0].num_kept_tokens", [](Plan& p) { p.layers[0].num_kept = 0; }},
      {"plan.layers[0].num_kept_tokens", [](Plan& p) { p.layers[0].num_kept = -4; }},
      {"plan.layers[0].num_kept_tokens", [](Plan& p) { p.layers[0].num_kept = 21; }},
      {"plan.layers[0].num_kept_tokens",
       [](Plan& p) { p.layers[0].num_kept = std::numeric_limits<int64_t>::max(); }},
      {"plan.layers[0].num_kept_tokens", [](Plan& p) { p.layers[0].dense = true; }},
      {"plan.layers[0].num_kept_tokens", [](Plan& p) { p.policy.transform = Transform::kIndex; }},
      {"plan.layers[0].num_groups", [](Plan& p) { p.layers[0].groups = 0; }},
      {"plan.layers[0].num_groups", [](Plan& p) { p.layers[0].groups = -1; }},
      {"plan.layers[0].num_groups", [](Plan& p) { p.layers[0].groups = 2; }},
      {"plan.layers[0].num_groups", [](Plan& p) { p.policy.scope = Scope::kLayerHead; }},
      {"plan.layers[1].num_groups", [](Plan& p) { p.layers[1].groups = 3; }},
      {"plan.layers[1].kept_tokens", [](Plan& p) { p.layers[1].groups = 2; }},
      {"plan.layers[0].kept_tokens", [](Plan& p) { p.layers[0].kept.pop_back(); }},
      {"plan.layers[0].kept_tokens", [](Plan& p) { p.layers[0].kept.push_back(19); }},
      {"plan.layers[0].kept_tokens", [](Plan& p) { p.layers[0].kept.clear(); }},
      {"plan.layers[0].kept_tokens[0]", [](Plan& p) { p.layers[0].kept[0] = -1; }},
      {"plan.layers[0].kept_tokens[1]", [](Plan& p) { p.layers[0].kept[1] = 0; }},
      {"plan.layers[0].kept_tokens[3]", [](Plan& p) { p.layers[0].kept[3] = 20; }},
      {"plan.layers[0].kept_tokens[2]", [](Plan& p) { p.layers[0].kept[2] = kLargest; }},
      {"plan.layers[0].kept_tokens[2]", [](Plan& p) { p.layers[0].kept[2] = kLeast; }},
  };
  ASSERT_TRUE(ValidatePlan(SmallPlan()).ok()) << ValidatePlan(SmallPlan());
  for (const Attack& attack : attacks) {
    Plan plan = SmallPlan();
    attack.spoil(plan);
    const absl::Status status = ValidatePlan(plan);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << attack.field;
    EXPECT_EQ(GetErrorDetails(status).subject, attack.field) << status;
  }
}

TEST(ValidatePlanTest, TakesSetsPerHeadAndPlansOfSomeLayers) {
  Plan plan = SmallPlan();
  plan.policy.scope = Scope::kLayerHead;
  plan.layers[0].groups = 2;
  plan.layers[0].kept = {0, 7, 12, 19, 0, 1, 2, 3};
  EXPECT_TRUE(ValidatePlan(plan).ok()) << ValidatePlan(plan);
  plan.layers[0].kept = {0, 7, 12, 19, 3, 2, 1, 0};
  EXPECT_EQ(GetErrorDetails(ValidatePlan(plan)).subject, "plan.layers[0].kept_tokens[5]");
  plan.layers.clear();
  EXPECT_TRUE(ValidatePlan(plan).ok());
}

TEST(ValidatePlanTest, JudgesContiguousPlansWithoutTheirFrequencies) {
  Plan plan = SmallPlan();
  plan.policy.positions = Positions::kContiguous;
  EXPECT_TRUE(ValidatePlan(plan).ok()) << ValidatePlan(plan);
}

}  // namespace
}  // namespace dynsplit

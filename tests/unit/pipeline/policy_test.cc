// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/policy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <set>

#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

SequenceShape SmallShape() {
  return {
      .num_layers = 4, .num_query_heads = 8, .num_kv_heads = 2, .num_tokens = 100, .head_dim = 64};
}

Rope SmallRope() {
  return {.rotary_dim = 4, .interleaved = false, .inverse_frequencies = {1.0, 0.01}};
}

struct ShapeCase {
  const char* field;
  std::function<void(SequenceShape&)> spoil;
};

TEST(ValidateShapeTest, RefusesEachBrokenFieldByName) {
  const ShapeCase cases[] = {
      {"shape.num_layers", [](auto& s) { s.num_layers = 0; }},
      {"shape.num_layers", [](auto& s) { s.num_layers = 1025; }},
      {"shape.num_query_heads", [](auto& s) { s.num_query_heads = 0; }},
      {"shape.num_query_heads", [](auto& s) { s.num_query_heads = 1026; }},
      {"shape.num_query_heads", [](auto& s) { s.num_query_heads = 7; }},
      {"shape.num_kv_heads", [](auto& s) { s.num_kv_heads = 0; }},
      {"shape.num_kv_heads", [](auto& s) { s.num_kv_heads = -2; }},
      {"shape.num_kv_heads", [](auto& s) { s.num_kv_heads = 16; }},
      {"shape.num_tokens", [](auto& s) { s.num_tokens = 0; }},
      {"shape.num_tokens", [](auto& s) { s.num_tokens = int64_t{1} << 31; }},
      {"shape.head_dim", [](auto& s) { s.head_dim = 0; }},
      {"shape.head_dim", [](auto& s) { s.head_dim = 12; }},
      {"shape.head_dim", [](auto& s) { s.head_dim = 520; }},
      {"shape",
       [](auto& s) {
         s = {.num_layers = 1024,
              .num_query_heads = 1024,
              .num_kv_heads = 1024,
              .num_tokens = (int64_t{1} << 31) - 1,
              .head_dim = 512};
       }},
  };
  EXPECT_TRUE(ValidateShape(SmallShape()).ok());
  for (const ShapeCase& c : cases) {
    SequenceShape shape = SmallShape();
    c.spoil(shape);
    const absl::Status status = ValidateShape(shape);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.field;
    EXPECT_EQ(GetErrorDetails(status).subject, c.field) << status;
  }
}

TEST(ValidateShapeTest, TakesLargeModels) {
  EXPECT_TRUE(ValidateShape({.num_layers = 126,
                             .num_query_heads = 128,
                             .num_kv_heads = 8,
                             .num_tokens = 2'000'000,
                             .head_dim = 128})
                  .ok());
}

struct PolicyCase {
  const char* field;
  std::function<void(Policy&)> spoil;
};

TEST(ValidatePolicyTest, RefusesEachBrokenFieldByName) {
  const PolicyCase cases[] = {
      {"policy.segmentation.block_size", [](auto& p) { p.segmentation.block_size = 0; }},
      {"policy.segmentation.block_size", [](auto& p) { p.segmentation.block_size = 4097; }},
      {"policy.segmentation.block_size",
       [](auto& p) {
         p.segmentation.method = SegmentationPolicy::Method::kFixed;
         p.segmentation.block_size = 65537;
       }},
      {"policy.segmentation.max_deviation", [](auto& p) { p.segmentation.max_deviation = -1; }},
      {"policy.segmentation.max_deviation", [](auto& p) { p.segmentation.max_deviation = 20; }},
      {"policy.segmentation.balance", [](auto& p) { p.segmentation.balance = -0.1; }},
      {"policy.segmentation.balance", [](auto& p) { p.segmentation.balance = 1.1; }},
      {"policy.segmentation.balance", [](auto& p) { p.segmentation.balance = kNan; }},
      {"policy.segmentation.profile", [](auto& p) { p.segmentation.profile = "Upper"; }},
      {"policy.segmentation.profile", [](auto& p) { p.segmentation.profile = "a/b"; }},
      {"policy.segmentation.profile",
       [](auto& p) { p.segmentation.profile = std::string(65, 'a'); }},
      {"policy.scoring.num_window_queries", [](auto& p) { p.scoring.num_window_queries = -1; }},
      {"policy.scoring.num_window_queries", [](auto& p) { p.scoring.num_window_queries = 1025; }},
      {"policy.scoring.query_reduction",
       [](auto& p) {
         p.scoring.method = ScoringPolicy::Method::kKeyNorm;
         p.scoring.query_reduction = ScoringPolicy::QueryReduction::kRootMeanSquare;
       }},
      {"policy.scoring.pooling_kernel", [](auto& p) { p.scoring.pooling_kernel = 0; }},
      {"policy.scoring.pooling_kernel", [](auto& p) { p.scoring.pooling_kernel = 4; }},
      {"policy.scoring.pooling_kernel", [](auto& p) { p.scoring.pooling_kernel = 65; }},
      {"policy.scoring.refinement_factor", [](auto& p) { p.scoring.refinement_factor = -1; }},
      {"policy.scoring.refinement_factor",
       [](auto& p) {
         p = FindPreset("dynsplit_index").value()->policy;
         p.scoring.refinement_factor = 17;
       }},
      {"policy.scoring.refinement_factor", [](auto& p) { p.scoring.refinement_factor = 2; }},
      {"policy.scoring.refinement_factor",
       [](auto& p) {
         p = FindPreset("dynsplit_index").value()->policy;
         p.transform = Transform::kEvict;
       }},
      {"policy.scoring.softmax_scale", [](auto& p) { p.scoring.softmax_scale = -1; }},
      {"policy.scoring.softmax_scale", [](auto& p) { p.scoring.softmax_scale = kNan; }},
      {"policy.scoring.softmax_scale", [](auto& p) { p.scoring.softmax_scale = kInfinity; }},
      {"policy.scoring.softmax_scale", [](auto& p) { p.scoring.softmax_scale = 1e300; }},
      {"policy.scoring.softmax_scale", [](auto& p) { p.scoring.softmax_scale = 1e-300; }},
      {"policy.budget.kept_ratio", [](auto& p) { p.budget.kept_ratio = 0; }},
      {"policy.budget.kept_ratio", [](auto& p) { p.budget.kept_ratio = 1.0000001; }},
      {"policy.budget.kept_ratio", [](auto& p) { p.budget.kept_ratio = kNan; }},
      {"policy.budget.tokens_per_head",
       [](auto& p) { p.budget = {.target = BudgetPolicy::Target::kTokens, .tokens_per_head = 0}; }},
      {"policy.budget.tokens_per_head",
       [](auto& p) {
         p.budget = {.target = BudgetPolicy::Target::kTokens, .tokens_per_head = 101};
       }},
      {"policy.budget.bytes",
       [](auto& p) { p.budget = {.target = BudgetPolicy::Target::kBytes, .bytes = 0}; }},
      {"policy.budget.whole_blocks",
       [](auto& p) {
         p.budget = {
             .target = BudgetPolicy::Target::kTokens, .tokens_per_head = 9, .whole_blocks = true};
       }},
      {"policy.budget.whole_blocks",
       [](auto& p) {
         p.budget.whole_blocks = true;
         p.scope = Scope::kLayerHead;
       }},
      {"policy.protection.num_sink_tokens", [](auto& p) { p.protection.num_sink_tokens = -1; }},
      {"policy.protection.num_sink_tokens", [](auto& p) { p.protection.num_sink_tokens = 101; }},
      {"policy.protection.num_recent_tokens",
       [](auto& p) { p.protection.num_recent_tokens = 101; }},
      {"policy.protection.pinned[0]",
       [](auto& p) {
         p.protection.pinned = {{5, 5}};
       }},
      {"policy.protection.pinned[0]",
       [](auto& p) {
         p.protection.pinned = {{-1, 5}};
       }},
      {"policy.protection.pinned[0]",
       [](auto& p) {
         p.protection.pinned = {{5, 101}};
       }},
      {"policy.protection.pinned[1]",
       [](auto& p) {
         p.protection.pinned = {{5, 9}, {8, 10}};
       }},
      {"policy.protection.dense_layers[0]", [](auto& p) { p.protection.dense_layers = {-1}; }},
      {"policy.protection.dense_layers[0]", [](auto& p) { p.protection.dense_layers = {4}; }},
      {"policy.protection.dense_layers[1]",
       [](auto& p) {
         p.protection.dense_layers = {2, 2};
       }},
      {"policy.positions",
       [](auto& p) {
         p.positions = Positions::kContiguous;
         p.transform = Transform::kIndex;
       }},
      {"policy.quality_floor.min_retained_attention_mass",
       [](auto& p) { p.quality_floor.min_retained_attention_mass = 1.5; }},
      {"policy.quality_floor.max_output_relative_error",
       [](auto& p) { p.quality_floor.max_output_relative_error = -1; }},
      {"policy.quality_floor.max_output_relative_error",
       [](auto& p) { p.quality_floor.max_output_relative_error = kInfinity; }},
      {"policy.quality_floor.max_kept_ratio", [](auto& p) { p.quality_floor.max_kept_ratio = 0; }},
      {"policy.quality_floor.max_kept_ratio",
       [](auto& p) {
         p.quality_floor.min_retained_attention_mass = 0.5;
         p.quality_floor.max_kept_ratio = 0.1;
       }},
      {"policy.page_size", [](auto& p) { p.page_size = 0; }},
      {"policy.page_size", [](auto& p) { p.page_size = 48; }},
      {"policy.page_size", [](auto& p) { p.page_size = 256; }},
  };
  const Rope rope = SmallRope();
  EXPECT_TRUE(ValidatePolicy(Policy(), SmallShape(), &rope).ok());
  for (const PolicyCase& c : cases) {
    Policy policy;
    c.spoil(policy);
    const absl::Status status = ValidatePolicy(policy, SmallShape(), &rope);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.field;
    EXPECT_EQ(GetErrorDetails(status).subject, c.field) << status;
  }
}

TEST(ValidatePolicyTest, ContiguousPositionsNeedAWholeRope) {
  Policy policy;
  policy.positions = Positions::kContiguous;
  const SequenceShape shape = SmallShape();
  EXPECT_EQ(GetErrorDetails(ValidatePolicy(policy, shape, nullptr)).subject, "rope");
  Rope rope = SmallRope();
  EXPECT_TRUE(ValidatePolicy(policy, shape, &rope).ok());
  rope.inverse_frequencies.push_back(1);
  EXPECT_EQ(GetErrorDetails(ValidatePolicy(policy, shape, &rope)).subject,
            "rope.inverse_frequencies");
  rope.inverse_frequencies = {1, kInfinity};
  EXPECT_EQ(GetErrorDetails(ValidatePolicy(policy, shape, &rope)).subject,
            "rope.inverse_frequencies[1]");
  for (const int32_t rotary_dim : {0, 3, 66}) {
    rope.rotary_dim = rotary_dim;
    EXPECT_EQ(GetErrorDetails(ValidatePolicy(policy, shape, &rope)).subject, "rope.rotary_dim");
  }
}

TEST(ValidatePolicyTest, QualityFloorOverTheWholeSequenceIsUnimplemented) {
  Policy policy;
  policy.scope = Scope::kGlobal;
  EXPECT_TRUE(ValidatePolicy(policy, SmallShape(), nullptr).ok());
  policy.quality_floor.min_retained_attention_mass = 0.9;
  const absl::Status status = ValidatePolicy(policy, SmallShape(), nullptr);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(GetErrorDetails(status).type, "QUALITY_FLOOR_SCOPE");
}

TEST(ValidatePolicyTest, DefaultProtectionFitsShortSequences) {
  SequenceShape shape = SmallShape();
  shape.num_tokens = 3;  // fewer than the default 4 sinks and 32 recent tokens
  Policy policy;
  EXPECT_TRUE(ValidatePolicy(policy, shape, nullptr).ok());
  policy.protection.num_recent_tokens = 33;  // asked for by someone
  EXPECT_FALSE(ValidatePolicy(policy, shape, nullptr).ok());
}

TEST(PresetsTest, EveryRowIsValidNamedOnceAndDocumented) {
  std::set<std::string> names;
  for (const Preset& preset : Presets()) {
    EXPECT_TRUE(names.insert(preset.policy.preset).second) << preset.policy.preset;
    EXPECT_TRUE(ValidatePolicy(preset.policy, SmallShape(), nullptr).ok()) << preset.policy.preset;
    EXPECT_FALSE(preset.summary.empty()) << preset.policy.preset;
    EXPECT_FALSE(preset.source.empty()) << preset.policy.preset;
    EXPECT_EQ(preset.policy.budget.kept_ratio, 0.2) << preset.policy.preset;
  }
  for (const char* name :
       {"dynsplit", "dynsplit_index", "dynsplit_keys", "chunkkv", "snapkv", "streamingllm", "h2o",
        "tova", "knorm", "keydiff", "quest", "sentencekv"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
}

TEST(PresetsTest, FallbacksEndAtARowThatNeedsNothing) {
  for (const Preset& preset : Presets()) {
    const Preset* row = &preset;
    size_t hops = 0;
    while (!row->fallback.empty()) {
      const absl::StatusOr<const Preset*> next = FindPreset(row->fallback);
      ASSERT_TRUE(next.ok()) << row->policy.preset;
      EXPECT_LT(RequiredEvidence((*next)->policy), RequiredEvidence(row->policy))
          << row->policy.preset;
      row = *next;
      ASSERT_LT(++hops, Presets().size()) << "cycle from " << preset.policy.preset;
    }
    EXPECT_TRUE(RequiredEvidence(row->policy) == Evidence::kNone ||
                row->policy.transform == Transform::kIndex)
        << preset.policy.preset;
  }
}

TEST(PresetsTest, TheDefaultPolicyIsTheFirstRow) {
  EXPECT_EQ(Presets().front().policy.preset, Policy().preset);
  EXPECT_EQ(FindPreset("snapkw").status().code(), absl::StatusCode::kNotFound);
}

TEST(PresetsTest, TheIndexIsWhatItsAccuracyWasMeasuredWith) {
  const Policy index = (*FindPreset("dynsplit_index"))->policy;
  EXPECT_EQ(index.segmentation.block_size, 14);
  EXPECT_EQ(index.segmentation.max_deviation, 13);
  EXPECT_EQ(index.segmentation.balance, 0.9);
  EXPECT_EQ(index.scoring.method, ScoringPolicy::Method::kBlockMeanKey);
  EXPECT_EQ(index.scoring.refinement_factor, 4);
  EXPECT_EQ(index.protection.num_sink_tokens, 4);
  EXPECT_EQ(index.protection.num_recent_tokens, 8);
  EXPECT_EQ(index.scope, Scope::kLayerHead);
}

TEST(PresetsTest, RowsThatOthersJudgeAreWhatTheyClaim) {
  const Policy chunkkv = (*FindPreset("chunkkv"))->policy;
  EXPECT_EQ(chunkkv.segmentation.method, SegmentationPolicy::Method::kFixed);
  EXPECT_EQ(chunkkv.segmentation.block_size, 20);
  EXPECT_EQ(chunkkv.scoring.num_window_queries, 64);
  EXPECT_EQ(chunkkv.scoring.pooling_kernel, 5);
  EXPECT_TRUE(chunkkv.budget.whole_blocks);
  EXPECT_EQ(chunkkv.scope, Scope::kLayer);
  EXPECT_EQ(chunkkv.protection.num_sink_tokens, 0);
  EXPECT_EQ(chunkkv.protection.num_recent_tokens, 64);
  const Policy dynsplit = (*FindPreset("dynsplit"))->policy;
  EXPECT_EQ(dynsplit.segmentation.block_size, 20);
  EXPECT_EQ(dynsplit.segmentation.max_deviation, 19);
  EXPECT_EQ(dynsplit.segmentation.balance, 0.9);
  EXPECT_EQ(dynsplit.scoring.num_window_queries, 16);
  EXPECT_EQ(dynsplit.scoring.pooling_kernel, 1);
  EXPECT_EQ(dynsplit.scoring.query_reduction, ScoringPolicy::QueryReduction::kRootMeanSquare);
  EXPECT_EQ(dynsplit.scope, Scope::kLayerHead);
  EXPECT_EQ(dynsplit.protection.num_sink_tokens, 4);
  EXPECT_EQ(dynsplit.protection.num_recent_tokens, 32);
  EXPECT_EQ(RequiredEvidence((*FindPreset("quest"))->policy), Evidence::kKeys);
  EXPECT_EQ(RequiredEvidence((*FindPreset("h2o"))->policy), Evidence::kAccumulatedScores);
  EXPECT_EQ(RequiredEvidence((*FindPreset("tova"))->policy), Evidence::kWindowQueries);
}

}  // namespace
}  // namespace dynsplit

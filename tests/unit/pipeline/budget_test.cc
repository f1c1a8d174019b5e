// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/budget.h"

#include <gtest/gtest.h>

#include <numeric>

#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

constexpr OutputCost kCost = {.bytes_per_layer = 8, .bytes_per_page = 1000};

SequenceShape Shape(int64_t num_tokens) {
  return {.num_layers = 4,
          .num_query_heads = 8,
          .num_kv_heads = 2,
          .num_tokens = num_tokens,
          .head_dim = 64};
}

int64_t RatioBudget(int64_t num_tokens, double kept_ratio) {
  Policy policy;
  policy.budget.kept_ratio = kept_ratio;
  return BudgetForLayer(policy, Shape(num_tokens), 0, 1, 0, kCost)->num_kept;
}

TEST(BudgetTest, RatioIsTheTruncatedProductOfDoubles) {
  // int(T * (1 - r)) of the reference for r = 0.5, 0.8, 0.9, with 1 - r as a caller computes it.
  EXPECT_EQ(RatioBudget(1283, 1 - 0.5), 641);
  EXPECT_EQ(RatioBudget(1283, 1 - 0.8), 256);
  EXPECT_EQ(RatioBudget(1283, 1 - 0.9), 128);
  // 1 - 0.8 and 1 - 0.9 lie just below 0.2 and 0.1: multiples of 10 lose a token, as there.
  EXPECT_EQ(RatioBudget(1000, 1 - 0.8), 199);
  EXPECT_EQ(RatioBudget(1000, 1 - 0.9), 99);
  EXPECT_EQ(RatioBudget(1000, 0.2), 200);
  EXPECT_EQ(RatioBudget(1000, 1.0), 1000);
  EXPECT_EQ(RatioBudget(3, 0.1), 1);
}

TEST(BudgetTest, ProtectionWinsAndSaysSo) {
  Policy policy;
  policy.budget = {.target = BudgetPolicy::Target::kTokens, .tokens_per_head = 10};
  auto budget = BudgetForLayer(policy, Shape(100), 0, 7, 10, kCost);
  EXPECT_EQ(*budget, (LayerBudget{.num_kept = 10}));
  budget = BudgetForLayer(policy, Shape(100), 0, 7, 11, kCost);
  EXPECT_EQ(*budget, (LayerBudget{.num_kept = 11, .raised_by_protection = true}));
}

TEST(BudgetTest, DenseLayersAndTheIndexKeepAll) {
  Policy policy;
  policy.protection.dense_layers = {1, 3};
  EXPECT_FALSE(BudgetForLayer(policy, Shape(100), 0, 7, 0, kCost)->dense);
  EXPECT_EQ(*BudgetForLayer(policy, Shape(100), 3, 7, 0, kCost),
            (LayerBudget{.num_kept = 100, .dense = true}));
  policy.protection.dense_layers = {};
  policy.transform = Transform::kIndex;
  EXPECT_EQ(*BudgetForLayer(policy, Shape(100), 0, 7, 0, kCost),
            (LayerBudget{.num_kept = 100, .dense = true}));
}

TEST(BudgetTest, WholeBlocksCountThePartialOne) {
  Policy policy;
  policy.budget.whole_blocks = true;
  policy.budget.kept_ratio = 0.5;
  EXPECT_EQ(*BudgetForLayer(policy, Shape(100), 0, 7, 50, kCost),
            (LayerBudget{.num_whole_blocks = 3}));
  policy.budget.kept_ratio = 0.01;
  EXPECT_EQ(BudgetForLayer(policy, Shape(100), 0, 7, 0, kCost)->num_whole_blocks, 1);
}

TEST(BudgetTest, BytesBuyWholePagesAfterTheDenseLayers) {
  Policy policy;
  policy.protection.dense_layers = {0};
  policy.budget.target = BudgetPolicy::Target::kBytes;
  // 100 tokens are 7 pages: the dense layer costs 7008, three others at least 1008 each.
  policy.budget.bytes = 7008 + 3 * 1008;
  EXPECT_EQ(BudgetForLayer(policy, Shape(100), 1, 7, 0, kCost)->num_kept, 16);
  policy.budget.bytes = 7008 + 3 * 2008 - 1;
  EXPECT_EQ(BudgetForLayer(policy, Shape(100), 1, 7, 0, kCost)->num_kept, 16);
  policy.budget.bytes = 7008 + 3 * 2008;
  EXPECT_EQ(BudgetForLayer(policy, Shape(100), 1, 7, 0, kCost)->num_kept, 32);
  policy.budget.bytes = 4 * 7008;  // the last page is partial: all 100 tokens, not 112
  EXPECT_EQ(BudgetForLayer(policy, Shape(100), 1, 7, 0, kCost)->num_kept, 100);
  policy.budget.bytes = int64_t{1} << 60;
  EXPECT_EQ(BudgetForLayer(policy, Shape(100), 1, 7, 0, kCost)->num_kept, 100);

  policy.budget.bytes = 7008 + 3 * 1008 - 1;
  const absl::Status status = BudgetForLayer(policy, Shape(100), 1, 7, 0, kCost).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GetErrorDetails(status).subject, "policy.budget.bytes");
  EXPECT_NE(GetErrorDetails(status).problem.find("at least 10032"), std::string::npos) << status;
}

std::vector<int32_t> Protected(const Policy& policy, int64_t num_tokens, int32_t open_begin,
                               int64_t window) {
  Segmentation segmentation;
  segmentation.open_begin = open_begin;
  const std::vector<uint8_t> flags =
      ProtectedTokens(policy, Shape(num_tokens), segmentation, window);
  EXPECT_EQ(static_cast<int64_t>(flags.size()), num_tokens);
  std::vector<int32_t> tokens;
  for (size_t t = 0; t < flags.size(); ++t) {
    if (flags[t] != 0) tokens.push_back(static_cast<int32_t>(t));
  }
  return tokens;
}

TEST(ProtectedTokensTest, SinksRecentPinnedAndTheOpenBlock) {
  Policy policy;
  policy.protection = {
      .num_sink_tokens = 2, .num_recent_tokens = 3, .pinned = {{5, 7}}, .dense_layers = {}};
  EXPECT_EQ(Protected(policy, 20, 20, 0), (std::vector<int32_t>{0, 1, 5, 6, 17, 18, 19}));
  EXPECT_EQ(Protected(policy, 20, 16, 0), (std::vector<int32_t>{0, 1, 5, 6, 16, 17, 18, 19}));
  // The window's own columns are not scored, so that it is protected in whole.
  EXPECT_EQ(Protected(policy, 20, 20, 5), (std::vector<int32_t>{0, 1, 5, 6, 15, 16, 17, 18, 19}));
  policy.transform = Transform::kIndex;
  EXPECT_EQ(Protected(policy, 20, 16, 0), (std::vector<int32_t>{0, 1, 5, 6, 17, 18, 19}));
  policy.transform = Transform::kEvict;
  policy.segmentation.method = SegmentationPolicy::Method::kFixed;
  EXPECT_EQ(Protected(policy, 20, 16, 0), (std::vector<int32_t>{0, 1, 5, 6, 17, 18, 19}));
}

TEST(ProtectedTokensTest, ShortSequencesAreProtectedInWhole) {
  std::vector<int32_t> all(10);
  std::iota(all.begin(), all.end(), 0);
  EXPECT_EQ(Protected(Policy(), 10, 10, 0), all);
  EXPECT_EQ(Protected(Policy(), 10, 10, 1000), all);
}

}  // namespace
}  // namespace dynsplit

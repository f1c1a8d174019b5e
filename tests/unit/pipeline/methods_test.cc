// SPDX-License-Identifier: Apache-2.0
//
// Presets against plain re-statements of their methods, and the evidence they run on.
#include <algorithm>
#include <numeric>

#include "tests/unit/pipeline/layer_fixture.h"

namespace dynsplit {
namespace {

// The `count` largest scores, ascending by index.
std::vector<int32_t> TopTokens(const std::vector<double>& scores, size_t count) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&scores](int32_t a, int32_t b) {
    return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
  });
  order.resize(count);
  std::sort(order.begin(), order.end());
  return order;
}

class MethodsTest : public LayerFixture {
 protected:
  // Row `group` of a plan.
  static std::vector<int32_t> Row(const LayerPlan& plan, int32_t group) {
    const auto begin = plan.kept.begin() + group * plan.num_kept;
    return {begin, begin + plan.num_kept};
  }

  // A method's window and protection, shrunk to the 16 queries of the fixture.
  static Policy Shrunk(std::string_view preset) {
    Policy policy = PresetPolicy(preset);
    policy.scoring.num_window_queries = static_cast<int32_t>(kWindow);
    policy.protection.num_recent_tokens = kWindow;
    policy.budget.kept_ratio = 0.3;
    return policy;
  }

  // kvpress pads the window with more than any score.
  static std::vector<double> Padded(std::vector<double> scores, double most, size_t num_tokens) {
    scores.resize(num_tokens, most + 1);
    return scores;
  }
};

TEST_F(MethodsTest, SnapKvTakesTheTopTokensOfEachHead) {
  const LayerResult result = Compress(Shrunk("snapkv"));
  const LayerPlan& plan = result.decision.plan;
  ASSERT_EQ(plan.groups, shape_.num_kv_heads);
  ASSERT_EQ(plan.num_kept, 92);  // floor(307 * 0.3)
  const auto scores = WindowScores(layers_[0], kWindow, 5);
  for (int32_t h = 0; h < plan.groups; ++h) {
    const auto& head = scores[static_cast<size_t>(h)];
    const double most = *std::max_element(head.begin(), head.end());
    EXPECT_EQ(Row(plan, h), TopTokens(Padded(head, most, 307), 92)) << h;
  }
  EXPECT_NE(Row(plan, 0), Row(plan, 1));
}

TEST_F(MethodsTest, ChunkKvTakesTheTopChunksByMeanOfSummedHeads) {
  const LayerResult result = Compress(Shrunk("chunkkv"));
  const auto scores = WindowScores(layers_[0], kWindow, 5);
  double most = 0;
  for (const auto& head : scores)
    most = std::max(most, *std::max_element(head.begin(), head.end()));
  std::vector<double> chunks;
  for (size_t begin = 0; begin < 307; begin += 20) {
    const size_t end = std::min<size_t>(begin + 20, 307);
    double sum = 0;
    for (const auto& head : scores) {
      const std::vector<double> padded = Padded(head, most, 307);
      for (size_t t = begin; t < end; ++t) sum += padded[t];
    }
    chunks.push_back(sum / static_cast<double>(end - begin));
  }
  ASSERT_EQ(chunks.size(), 16u);
  std::vector<int32_t> expected;
  for (const int32_t chunk : TopTokens(chunks, 4)) {  // floor(16 * 0.3)
    for (int32_t t = chunk * 20; t < std::min(chunk * 20 + 20, 307); ++t) expected.push_back(t);
  }
  EXPECT_EQ(result.decision.plan.kept, expected);
  EXPECT_EQ(result.decision.plan.groups, 1);
}

TEST_F(MethodsTest, StreamingLlmKeepsSinksAndTheMostRecent) {
  const LayerResult result = Compress(PresetPolicy("streamingllm"));
  std::vector<int32_t> expected = {0, 1, 2, 3};
  for (int32_t t = 307 - 57; t < 307; ++t) expected.push_back(t);  // floor(307 * 0.2) = 61
  EXPECT_EQ(result.decision.plan.kept, expected);
}

TEST_F(MethodsTest, RecencyTellsNeighboursApartBeyondTheIntegersOfAFloat) {
  Policy policy = PresetPolicy("streamingllm");
  policy.budget = {.target = BudgetPolicy::Target::kTokens, .tokens_per_head = 9};
  SequenceSpec spec = Spec(policy);
  spec.shape.num_tokens = (int64_t{1} << 24) + 100;
  const auto context = PrepareSequence(spec, {}, nullptr, *backend_, *stream_).value();
  LayerTensors tensors;
  const LayerScores scores = ScoreLayer(*context, tensors, *backend_, *stream_).value();
  const LayerDecision decision = PlanLayer(*context, scores, 0, 0, *backend_, *stream_).value();
  const auto end = static_cast<int32_t>(spec.shape.num_tokens);
  // An odd number of them, so that tied neighbours would show.
  EXPECT_EQ(decision.plan.kept,
            (std::vector<int32_t>{0, 1, 2, 3, end - 5, end - 4, end - 3, end - 2, end - 1}));
}

TEST_F(MethodsTest, KeyNormAndKeyDifferenceNeedNoQueries) {
  for (const char* preset : {"knorm", "keydiff"}) {
    const LayerPlan plan = Compress(PresetPolicy(preset)).decision.plan;
    ASSERT_EQ(plan.num_kept, 61);
    const HostTensor& keys = layers_[0].keys;
    for (int32_t h = 0; h < shape_.num_kv_heads; ++h) {
      std::vector<double> norms(307, 0);
      std::vector<double> mean(static_cast<size_t>(shape_.head_dim), 0);
      for (int64_t t = 0; t < 307; ++t) {
        double& norm = norms[static_cast<size_t>(t)];
        for (int32_t c = 0; c < shape_.head_dim; ++c) norm += std::pow(keys.At(t, h, c), 2);
        norm = std::sqrt(norm);
        for (int32_t c = 0; c < shape_.head_dim; ++c) {
          mean[static_cast<size_t>(c)] += keys.At(t, h, c) / norm;
        }
      }
      std::vector<double> scores(307, 0);
      for (int64_t t = 0; t < 307; ++t) {
        double& score = scores[static_cast<size_t>(t)];
        if (std::string_view(preset) == "knorm") {
          score = -norms[static_cast<size_t>(t)];
          continue;
        }
        for (int32_t c = 0; c < shape_.head_dim; ++c) {
          score -= keys.At(t, h, c) * mean[static_cast<size_t>(c)] / norms[static_cast<size_t>(t)];
        }
      }
      EXPECT_EQ(Row(plan, h), TopTokens(scores, 61)) << preset << " head " << h;
    }
  }
}

TEST_F(MethodsTest, AccumulatedScoresCountPerKvHead) {
  std::uniform_real_distribution<float> uniform;
  for (const int32_t rows : {shape_.num_query_heads, shape_.num_kv_heads}) {
    std::vector<float> accumulated(static_cast<size_t>(rows) * 307);
    for (float& value : accumulated) value = uniform(random_);
    Policy policy = PresetPolicy("h2o");
    policy.protection.num_recent_tokens = 0;
    SequenceSpec spec = Spec(policy);
    spec.supply.accumulated_rows = rows;
    const auto context = Prepare(spec);
    LayerTensors tensors = Tensors(0);
    tensors.accumulated = accumulated.data();
    const LayerResult result = CompressLayer(*context, tensors, true, *backend_, *stream_).value();
    const int32_t group = rows / shape_.num_kv_heads;
    for (int32_t h = 0; h < shape_.num_kv_heads; ++h) {
      std::vector<double> scores(307, 0);
      for (int32_t row = h * group; row < (h + 1) * group; ++row) {
        for (size_t t = 0; t < 307; ++t) {
          scores[t] += static_cast<double>(accumulated[static_cast<size_t>(row) * 307 + t]);
        }
      }
      EXPECT_EQ(Row(result.decision.plan, h), TopTokens(scores, 61)) << rows << " rows, head " << h;
    }
  }
}

TEST_F(MethodsTest, BlockScoresFindTheBlockTheQueriesPointAt) {
  for (const auto method :
       {ScoringPolicy::Method::kBlockBound, ScoringPolicy::Method::kBlockMeanKey}) {
    Policy policy = PresetPolicy("dynsplit");
    policy.segmentation.block_size = 14;
    policy.segmentation.max_deviation = 6;
    policy.scoring = {.method = method};
    policy.scope = Scope::kLayer;
    policy.protection.num_sink_tokens = policy.protection.num_recent_tokens = 0;
    policy.budget = {.target = BudgetPolicy::Target::kTokens, .tokens_per_head = 40};
    const auto context = Prepare(Spec(policy));
    const int32_t begin = context->segmentation.starts[5];
    const int32_t end = context->segmentation.starts[6];
    for (HostTensor* tensor : {&layers_[0].keys, &layers_[0].queries}) {
      const int64_t first = tensor == &layers_[0].keys ? begin : 0;
      const int64_t last = tensor == &layers_[0].keys ? end : kWindow;
      for (int64_t t = first; t < last; ++t) {
        for (int32_t h = 0; h < tensor->num_heads; ++h) tensor->Set(t, h, 0, 20);
      }
    }
    const LayerResult result = Compress(*context, 0).value();
    const std::vector<int32_t>& kept = result.decision.plan.kept;
    for (int32_t t = begin; t < end; ++t) {
      EXPECT_TRUE(std::binary_search(kept.begin(), kept.end(), t)) << t;
    }
  }
}

TEST_F(MethodsTest, FewerWindowQueriesAreTheLastOnes) {
  Policy policy = PresetPolicy("tova");
  const auto context = Prepare(Spec(policy));
  const std::vector<int32_t> kept = Compress(*context, 0)->decision.plan.kept;
  const auto scores = WindowScores(layers_[0], 1, 1);
  std::vector<double> sum(306, 0);
  for (const auto& head : scores) {
    for (size_t t = 0; t < sum.size(); ++t) sum[t] += head[t];
  }
  EXPECT_EQ(kept, TopTokens(Padded(sum, 2, 307), 61));
}

TEST_F(MethodsTest, LogSumExpOfEitherBaseChangesNoDecision) {
  std::vector<float> natural(static_cast<size_t>(kWindow * shape_.num_query_heads));
  std::vector<float> base_2(natural.size());
  for (int64_t i = 0; i < kWindow; ++i) {
    for (int32_t a = 0; a < shape_.num_query_heads; ++a) {
      // From one weight: p = exp(logit - lse).
      double dot = 0;
      for (int32_t c = 0; c < shape_.head_dim; ++c) {
        dot += layers_[0].queries.At(i, a, c) * layers_[0].keys.At(0, a / shape_.group_size(), c);
      }
      const double lse =
          dot / std::sqrt(shape_.head_dim) - std::log(Attention(layers_[0], i, a)[0]);
      const auto at = static_cast<size_t>(i * shape_.num_query_heads + a);
      natural[at] = static_cast<float>(lse);
      base_2[at] = static_cast<float>(lse / std::log(2.0));
    }
  }
  for (const int32_t wanted : {0, 5}) {
    Policy policy = Shrunk("snapkv");
    policy.scoring.num_window_queries = wanted;
    const LayerPlan computed = Compress(policy).decision.plan;
    for (const bool is_base_2 : {false, true}) {
      policy.scoring.lse_base_2 = is_base_2;
      SequenceSpec spec = Spec(policy);
      spec.supply.lse = true;
      EXPECT_EQ(UsedEvidence(spec), Evidence::kWindowQueriesWithLse);
      const auto context = Prepare(spec);
      LayerTensors tensors = Tensors(0);
      tensors.lse = (is_base_2 ? base_2 : natural).data();
      const LayerPlan plan =
          CompressLayer(*context, tensors, true, *backend_, *stream_)->decision.plan;
      EXPECT_EQ(plan.kept, computed.kept) << is_base_2;
    }
  }
}

TEST_F(MethodsTest, AWindowOverTheWholeSequenceKeepsItAll) {
  SequenceSpec spec = Spec(PresetPolicy("dynsplit"));
  spec.shape.num_tokens = kWindow;
  const auto context =
      PrepareSequence(spec, std::span(token_ids_).first(kWindow), &profile_, *backend_, *stream_)
          .value();
  LayerTensors tensors = Tensors(0);
  tensors.keys.num_tokens = tensors.values.num_tokens = kWindow;
  const LayerResult result = CompressLayer(*context, tensors, true, *backend_, *stream_).value();
  EXPECT_EQ(result.decision.plan.num_kept, kWindow);
  EXPECT_TRUE(result.decision.plan.raised_by_protection);
  EXPECT_NEAR(result.receipt.error_max, 0, 1e-5);
}

TEST_F(MethodsTest, TheGlobalScopeAddsUpLayersAndSharesOneSet) {
  Policy policy = Shrunk("snapkv");
  policy.scope = Scope::kGlobal;
  const auto context = Prepare(Spec(policy));
  LayerScores total;
  std::vector<double> sum(307 - kWindow, 0);
  for (int32_t layer = 0; layer < shape_.num_layers; ++layer) {
    LayerScores scores = ScoreLayer(*context, Tensors(layer), *backend_, *stream_).value();
    ASSERT_TRUE(AccumulateScores(*context, std::move(scores), total, *backend_, *stream_).ok());
    for (const auto& head : WindowScores(layers_[static_cast<size_t>(layer)], kWindow, 5)) {
      for (size_t t = 0; t < sum.size(); ++t) sum[t] += head[t];
    }
  }
  const std::vector<int32_t> expected = TopTokens(Padded(sum, 100, 307), 92);
  for (int32_t layer = 0; layer < shape_.num_layers; ++layer) {
    const LayerDecision decision =
        PlanLayer(*context, total, layer, 0, *backend_, *stream_).value();
    EXPECT_EQ(decision.plan.kept, expected);
    EXPECT_EQ(decision.plan.layer, layer);
  }
}

TEST_F(MethodsTest, TheGlobalScopeOfBlocksCutsTheLastByTokens) {
  Policy policy = Shrunk("dynsplit");
  policy.scope = Scope::kGlobal;
  const auto context = Prepare(Spec(policy));
  LayerScores total;
  for (int32_t layer = 0; layer < shape_.num_layers; ++layer) {
    LayerScores scores = ScoreLayer(*context, Tensors(layer), *backend_, *stream_).value();
    ASSERT_TRUE(AccumulateScores(*context, std::move(scores), total, *backend_, *stream_).ok());
  }
  const LayerDecision decision = PlanLayer(*context, total, 0, 0, *backend_, *stream_).value();
  EXPECT_EQ(decision.plan.num_kept, 92);
  // Layers that are dense take no part.
  policy.protection.dense_layers = {1};
  const auto dense = Prepare(Spec(policy));
  EXPECT_EQ(ScoreLayer(*dense, Tensors(1), *backend_, *stream_)->groups, 0);
  EXPECT_TRUE(PlanLayer(*dense, total, 1, 0, *backend_, *stream_)->plan.dense);
}

TEST_F(MethodsTest, MissingEvidenceIsRefusedOrReplacedByName) {
  Policy policy = PresetPolicy("snapkv");
  policy.budget.kept_ratio = 0.37;
  policy.encoding.value = EncodingPolicy::Format::kInt8;
  SequenceSpec spec = Spec(policy);
  spec.supply.num_window_queries = 0;
  const absl::Status refused = ResolveEvidence(spec);
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(GetErrorDetails(refused).type, "EVIDENCE_MISSING");
  EXPECT_EQ(spec.policy.preset, "snapkv");

  spec.policy.allow_fallback = true;
  ASSERT_TRUE(ResolveEvidence(spec).ok());
  EXPECT_EQ(spec.fallback_preset, "keydiff");
  EXPECT_EQ(spec.policy.preset, "keydiff");
  EXPECT_EQ(spec.policy.scoring.method, ScoringPolicy::Method::kKeyDifference);
  EXPECT_EQ(spec.policy.budget.kept_ratio, 0.37);
  EXPECT_EQ(spec.policy.encoding.value, EncodingPolicy::Format::kInt8);
  EXPECT_EQ(spec.policy.protection.num_recent_tokens, 64);
  EXPECT_TRUE(ValidatePolicy(spec.policy, spec.shape, nullptr).ok());
  EXPECT_EQ(UsedEvidence(spec), Evidence::kKeys);

  spec = Spec(PresetPolicy("dynsplit"));
  spec.policy.segmentation.profile = "theirs";
  spec.policy.allow_fallback = true;
  spec.supply.num_window_queries = 0;
  ASSERT_TRUE(ResolveEvidence(spec).ok());
  EXPECT_EQ(spec.fallback_preset, "dynsplit_keys");
  EXPECT_EQ(spec.policy.segmentation.profile, "theirs");  // the same cuts

  spec = Spec(PresetPolicy("chunkkv"));
  spec.policy.allow_fallback = true;
  spec.supply = {.keys = false, .values = false};
  ASSERT_TRUE(ResolveEvidence(spec).ok());
  EXPECT_EQ(spec.fallback_preset, "streamingllm");  // dynsplit_keys lacks keys as well
  EXPECT_FALSE(spec.policy.budget.whole_blocks);
}

TEST_F(MethodsTest, SuppliedEvidenceChangesNothing) {
  SequenceSpec spec = Spec(PresetPolicy("dynsplit"));
  spec.policy.allow_fallback = true;
  ASSERT_TRUE(ResolveEvidence(spec).ok());
  EXPECT_EQ(spec.fallback_preset, "");
  EXPECT_EQ(CanonicalPolicy(spec.policy).find("dynsplit_keys"), std::string::npos);
  EXPECT_EQ(UsedEvidence(spec), Evidence::kWindowQueries);
}

TEST_F(MethodsTest, AFloorNeedsWhatItIsMeasuredOn) {
  SequenceSpec spec = Spec(PresetPolicy("dynsplit_keys"));
  spec.policy.quality_floor.min_retained_attention_mass = 0.9;
  EXPECT_TRUE(ResolveEvidence(spec).ok());
  spec.supply.values = false;
  EXPECT_TRUE(ResolveEvidence(spec).ok());
  spec.policy.quality_floor.max_output_relative_error = 0.1;
  EXPECT_EQ(GetErrorDetails(ResolveEvidence(spec)).type, "EVIDENCE_MISSING");
  spec.supply.values = true;
  spec.supply.num_window_queries = 0;
  EXPECT_EQ(GetErrorDetails(ResolveEvidence(spec)).subject, "policy.quality_floor");
}

}  // namespace
}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// The way of a layer from tensors to pages and receipt.
#include "server/pipeline/compress.h"

#include <algorithm>
#include <numeric>

#include "tests/unit/pipeline/layer_fixture.h"

namespace dynsplit {
namespace {

class CompressTest : public LayerFixture {
 protected:
  std::vector<int32_t> AllTokens() const {
    std::vector<int32_t> tokens(static_cast<size_t>(shape_.num_tokens));
    std::iota(tokens.begin(), tokens.end(), 0);
    return tokens;
  }

  // Bytes of row `slot` of as-is pages equal those of `tensor`'s token.
  void ExpectRow(const Buffer& pages, int64_t slot, const HostTensor& tensor, int64_t token) const {
    const size_t row_bytes = tensor.Index(1, 0, 0) * sizeof(uint16_t);
    EXPECT_EQ(std::memcmp(pages.data() + static_cast<size_t>(slot) * row_bytes,
                          tensor.bits.data() + tensor.Index(token, 0, 0), row_bytes),
              0)
        << "slot " << slot << " token " << token;
  }
};

TEST_F(CompressTest, AFullBudgetKeepsEverythingExactly) {
  for (const char* preset : {"dynsplit", "dynsplit_keys", "snapkv", "streamingllm"}) {
    Policy policy = PresetPolicy(preset);
    policy.budget.kept_ratio = 1;
    const LayerResult result = Compress(policy);
    EXPECT_EQ(result.decision.plan.kept, AllTokens()) << preset;
    EXPECT_EQ(result.decision.plan.groups, 1) << preset;
    EXPECT_FALSE(result.decision.plan.dense) << preset;
    EXPECT_NEAR(result.receipt.mass_min, 1, 1e-5) << preset;
    EXPECT_NEAR(result.receipt.mass_mean, 1, 1e-5) << preset;
    EXPECT_NEAR(result.receipt.error_max, 0, 1e-5) << preset;
    for (int64_t t = 0; t < shape_.num_tokens; ++t) {
      ExpectRow(result.pages.key_pages, t, layers_[0].keys, t);
      ExpectRow(result.pages.value_pages, t, layers_[0].values, t);
    }
  }
}

TEST_F(CompressTest, KeepsTheBudgetTheProtectedAndWholeBlocksButOne) {
  Policy policy = PresetPolicy("dynsplit");
  policy.scope = Scope::kLayer;
  policy.budget.kept_ratio = 0.4;
  const LayerResult result = Compress(policy);
  const SequenceContext& context = *contexts_.back();
  const LayerPlan& plan = result.decision.plan;
  EXPECT_EQ(plan.num_kept, 122);  // floor(307 * 0.4)
  EXPECT_FALSE(plan.raised_by_protection);

  Plan whole;
  whole.shape = shape_;
  whole.policy = policy;
  whole.segmentation = context.segmentation;
  whole.layers = {plan};
  EXPECT_TRUE(ValidatePlan(whole).ok()) << ValidatePlan(whole);

  std::vector<bool> kept(static_cast<size_t>(shape_.num_tokens), false);
  for (const int32_t t : plan.kept) kept[static_cast<size_t>(t)] = true;
  for (size_t t = 0; t < kept.size(); ++t) {
    EXPECT_TRUE(kept[t] || context.protected_tokens[t] == 0) << t;
  }
  int num_cut_blocks = 0;
  for (size_t j = 0; j + 1 < context.segmentation.starts.size(); ++j) {
    int num_free = 0;
    int num_free_kept = 0;
    for (auto t = static_cast<size_t>(context.segmentation.starts[j]);
         t < static_cast<size_t>(context.segmentation.starts[j + 1]); ++t) {
      if (context.protected_tokens[t] != 0) continue;
      ++num_free;
      num_free_kept += kept[t] ? 1 : 0;
    }
    if (num_free_kept > 0 && num_free_kept < num_free) ++num_cut_blocks;
  }
  EXPECT_LE(num_cut_blocks, 1);
}

TEST_F(CompressTest, PagesHoldTheKeptRowsThenZeros) {
  Policy policy = PresetPolicy("dynsplit");
  policy.scope = Scope::kLayer;
  policy.budget = {.target = BudgetPolicy::Target::kTokens, .tokens_per_head = 90};
  const LayerResult result = Compress(policy);
  EXPECT_EQ(result.pages.num_kept, 90);
  EXPECT_EQ(result.pages.num_pages, 6);
  for (int64_t s = 0; s < 90; ++s) {
    const int32_t token = result.decision.plan.kept[static_cast<size_t>(s)];
    ExpectRow(result.pages.key_pages, s, layers_[0].keys, token);
    ExpectRow(result.pages.value_pages, s, layers_[0].values, token);
  }
  const int64_t row_bytes = int64_t{2} * shape_.num_kv_heads * shape_.head_dim;
  for (int64_t i = 90 * row_bytes; i < 96 * row_bytes; ++i) {
    ASSERT_EQ(result.pages.key_pages.data()[i], std::byte{0}) << i;
    ASSERT_EQ(result.pages.value_pages.data()[i], std::byte{0}) << i;
  }
}

TEST_F(CompressTest, ProtectionBeyondTheBudgetWinsAndIsReported) {
  Policy policy = PresetPolicy("dynsplit");
  policy.budget = {.target = BudgetPolicy::Target::kTokens, .tokens_per_head = 3};
  const LayerResult result = Compress(policy);
  EXPECT_TRUE(result.decision.plan.raised_by_protection);
  EXPECT_EQ(result.decision.plan.num_kept, contexts_.back()->num_protected);
}

TEST_F(CompressTest, OutputBytesAreWhatLayerOutputBytesSaysAndWithinABytesTarget) {
  using Format = EncodingPolicy::Format;
  const std::optional<ScaleGranularity> granularities[] = {std::nullopt, ScaleGranularity::kHead,
                                                           ScaleGranularity::kTokenHead};
  for (const Format key : {Format::kAsIs, Format::kFloat8E4M3, Format::kInt8}) {
    for (const Format value : {Format::kAsIs, Format::kFloat8E4M3, Format::kInt8}) {
      for (const auto& granularity : granularities) {
        Policy policy = PresetPolicy("dynsplit");
        policy.encoding = {.key = key, .value = value, .scale_granularity = granularity};
        policy.protection.num_recent_tokens = 0;
        policy.budget = {.target = BudgetPolicy::Target::kBytes, .bytes = 60000};
        const LayerResult result = Compress(policy);
        const SequenceSpec spec = Spec(policy);
        const LayerPages& pages = result.pages;
        const int64_t bytes = pages.key_pages.size_bytes() + pages.value_pages.size_bytes() +
                              pages.key_scales.size_bytes() + pages.value_scales.size_bytes();
        EXPECT_EQ(bytes, LayerOutputBytes(spec, pages.num_kept, 0));
        EXPECT_LE(shape_.num_layers * bytes, policy.budget.bytes);
        EXPECT_GT(shape_.num_layers * LayerOutputBytes(spec, pages.num_kept + 1, 0),
                  policy.budget.bytes);
        EXPECT_EQ(pages.num_kept % policy.page_size, 0);
      }
    }
  }
}

TEST_F(CompressTest, ReceiptMassIsTheShareOfAttentionOnKeptTokens) {
  Policy policy = PresetPolicy("dynsplit");
  policy.scope = Scope::kLayer;
  policy.budget.kept_ratio = 0.3;
  const LayerResult result = Compress(policy);
  double sum = 0;
  double least = 1;
  for (int32_t a = 0; a < shape_.num_query_heads; ++a) {
    double mass = 0;
    for (int64_t i = 0; i < kWindow; ++i) {
      const std::vector<double> weights = Attention(layers_[0], i, a);
      for (const int32_t t : result.decision.plan.kept) {
        if (static_cast<size_t>(t) < weights.size()) mass += weights[static_cast<size_t>(t)];
      }
    }
    mass /= kWindow;
    sum += mass;
    least = std::min(least, mass);
  }
  EXPECT_NEAR(result.receipt.mass_mean, sum / shape_.num_query_heads, 1e-4);
  EXPECT_NEAR(result.receipt.mass_min, least, 1e-4);
  EXPECT_LT(result.receipt.mass_mean, 0.99);
  EXPECT_GT(result.receipt.error_mean, 0.01);
  EXPECT_GE(result.receipt.error_max, result.receipt.error_mean);
}

TEST_F(CompressTest, ReceiptFiguresWithoutEvidenceAreNotMeasured) {
  Policy policy = PresetPolicy("dynsplit_keys");
  SequenceSpec spec = Spec(policy);
  spec.supply.num_window_queries = 0;
  const auto context = Prepare(spec);
  LayerTensors tensors = Tensors(0);
  tensors.queries = {};
  const LayerResult blind = CompressLayer(*context, tensors, true, *backend_, *stream_).value();
  EXPECT_TRUE(std::isnan(blind.receipt.mass_mean) && std::isnan(blind.receipt.error_mean));

  // A plan without values still knows the mass; one with values knows the error, but has no pages.
  spec = Spec(policy);
  const auto planning = Prepare(spec);
  const LayerResult full = Compress(*planning, 0, false).value();
  EXPECT_FALSE(std::isnan(full.receipt.error_mean));
  EXPECT_TRUE(full.pages.key_pages.empty());
  tensors = Tensors(0);
  tensors.values = {};
  const LayerResult no_values =
      CompressLayer(*planning, tensors, false, *backend_, *stream_).value();
  EXPECT_EQ(no_values.receipt.mass_mean, full.receipt.mass_mean);
  EXPECT_TRUE(std::isnan(no_values.receipt.error_mean));
  EXPECT_EQ(no_values.decision.plan, full.decision.plan);

  spec.with_receipt = false;
  const auto silent = Prepare(spec);
  EXPECT_TRUE(std::isnan(Compress(*silent, 0).value().receipt.mass_mean));
}

TEST_F(CompressTest, TheQualityFloorRaisesTheBudgetNoFurtherThanNeeded) {
  Policy policy = PresetPolicy("dynsplit");
  policy.quality_floor.min_retained_attention_mass = 0.8;
  const auto context = Prepare(Spec(policy));
  const LayerResult result = Compress(*context, 0).value();
  EXPECT_GE(result.receipt.mass_mean, 0.8);
  EXPECT_TRUE(result.decision.plan.raised_by_quality_floor);
  EXPECT_GT(result.decision.plan.num_kept, 61);  // the ratio's
  EXPECT_EQ(result.pages.num_kept, result.decision.plan.num_kept);
  EXPECT_FALSE(std::isnan(result.receipt.error_mean));

  // 307 tokens are searched to the last: one fewer must miss the floor.
  const LayerScores scores = ScoreLayer(*context, Tensors(0), *backend_, *stream_).value();
  const LayerDecision fewer =
      PlanLayer(*context, scores, 0, result.decision.plan.num_kept - 1, *backend_, *stream_)
          .value();
  EXPECT_LT(MeasureLayer(*context, fewer, LayerPages(), Tensors(0), *backend_, *stream_)->mass_mean,
            0.8);
}

TEST_F(CompressTest, AFloorThatHoldsAlreadyChangesNothing) {
  Policy policy = PresetPolicy("dynsplit");
  const LayerResult plain = Compress(policy);
  policy.quality_floor.min_retained_attention_mass = 0.05;
  const LayerResult floored = Compress(policy);
  EXPECT_EQ(floored.decision.plan, plain.decision.plan);
  EXPECT_EQ(floored.receipt.error_mean, plain.receipt.error_mean);
}

TEST_F(CompressTest, TheErrorFloorIsMeasuredOnWhatTheConsumerHolds) {
  Policy policy = PresetPolicy("dynsplit");
  policy.encoding.key = policy.encoding.value = EncodingPolicy::Format::kInt8;
  policy.quality_floor.max_output_relative_error = 0.3;
  const LayerResult result = Compress(policy);
  EXPECT_LE(result.receipt.error_mean, 0.3);
  EXPECT_TRUE(result.decision.plan.raised_by_quality_floor);
  // Keeping everything cannot undo the rounding of int8.
  policy.quality_floor.max_output_relative_error = 1e-6;
  const auto context = Prepare(Spec(policy));
  const absl::Status status = Compress(*context, 0).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(std::string(status.message()).find("307 of 307 tokens"), std::string::npos) << status;
}

TEST_F(CompressTest, AnUnreachableFloorIsRefusedWithTheBestValue) {
  Policy policy = PresetPolicy("dynsplit");
  policy.quality_floor.min_retained_attention_mass = 0.99;
  policy.quality_floor.max_kept_ratio = 0.25;
  const auto context = Prepare(Spec(policy));
  const absl::Status status = Compress(*context, 0).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(GetErrorDetails(status).type, "QUALITY_FLOOR");
  EXPECT_NE(GetErrorDetails(status).problem.find("with 76 of 307 tokens"), std::string::npos)
      << status;
}

TEST_F(CompressTest, AFloorOfOneIsReachedByKeepingAll) {
  Policy policy = PresetPolicy("snapkv");
  policy.quality_floor.min_retained_attention_mass = 1;
  EXPECT_EQ(Compress(policy).decision.plan.kept, AllTokens());
}

TEST_F(CompressTest, WholeBlocksAreRaisedByBlocks) {
  Policy policy = PresetPolicy("chunkkv");
  policy.protection.num_recent_tokens = 0;
  policy.quality_floor.min_retained_attention_mass = 0.8;
  const LayerResult result = Compress(policy);
  EXPECT_GE(result.receipt.mass_mean, 0.8);
  EXPECT_TRUE(result.decision.plan.raised_by_quality_floor);
  std::vector<int> kept_in_block(16, 0);
  for (const int32_t t : result.decision.plan.kept) ++kept_in_block[static_cast<size_t>(t / 20)];
  for (size_t j = 0; j < kept_in_block.size(); ++j) {
    const int size = j == 15 ? 7 : 20;
    EXPECT_TRUE(kept_in_block[j] == 0 || kept_in_block[j] == size) << j;
  }
}

TEST_F(CompressTest, DenseLayersStayWhole) {
  Policy policy = PresetPolicy("dynsplit");
  policy.protection.dense_layers = {1};
  const auto context = Prepare(Spec(policy));
  EXPECT_FALSE(Compress(*context, 0)->decision.plan.dense);
  const LayerResult dense = Compress(*context, 1).value();
  EXPECT_TRUE(dense.decision.plan.dense);
  EXPECT_EQ(dense.decision.plan.kept, AllTokens());
}

TEST_F(CompressTest, ApplyingAPlanGivesTheBytesOfCompressing) {
  Policy policy = PresetPolicy("snapkv");
  policy.encoding.key = EncodingPolicy::Format::kFloat8E4M3;
  const LayerResult result = Compress(policy);
  const auto context =
      PrepareSequence(Spec(policy), contexts_.back()->segmentation, *backend_, *stream_).value();
  const LayerDecision decision = FromPlan(result.decision.plan, *backend_, *stream_).value();
  const LayerPages pages = ApplyLayer(*context, decision, Tensors(0), *backend_, *stream_).value();
  ASSERT_TRUE(stream_->Synchronize().ok());
  const std::pair<const Buffer*, const Buffer*> buffers[] = {
      {&pages.key_pages, &result.pages.key_pages},
      {&pages.value_pages, &result.pages.value_pages},
      {&pages.key_scales, &result.pages.key_scales}};
  for (const auto& [applied, compressed] : buffers) {
    ASSERT_EQ(applied->size_bytes(), compressed->size_bytes());
    ASSERT_GT(applied->size_bytes(), 0);
    EXPECT_EQ(std::memcmp(applied->data(), compressed->data(),
                          static_cast<size_t>(applied->size_bytes())),
              0);
  }
  EXPECT_TRUE(pages.value_scales.empty());
}

TEST_F(CompressTest, IndexKeepsAllAndBoundsEveryBlock) {
  SequenceSpec spec = Spec(PresetPolicy("dynsplit_index"));
  spec.policy.scoring.method = ScoringPolicy::Method::kBlockBound;
  spec.supply.num_window_queries = 0;  // an index needs no evidence
  ASSERT_TRUE(ResolveEvidence(spec).ok());
  const auto context = Prepare(spec);
  LayerTensors tensors = Tensors(0);
  tensors.queries = {};
  const LayerResult result = CompressLayer(*context, tensors, true, *backend_, *stream_).value();
  EXPECT_TRUE(result.decision.plan.dense);
  EXPECT_EQ(result.decision.plan.kept, AllTokens());
  EXPECT_TRUE(result.pages.block_mean.empty());
  const std::vector<int32_t>& starts = context->segmentation.starts;
  const HostTensor& keys = layers_[0].keys;
  for (size_t j = 0; j + 1 < starts.size(); ++j) {
    for (int32_t h = 0; h < shape_.num_kv_heads; ++h) {
      for (int32_t c = 0; c < shape_.head_dim; ++c) {
        double least = keys.At(starts[j], h, c);
        double most = least;
        for (int32_t t = starts[j]; t < starts[j + 1]; ++t) {
          least = std::min(least, keys.At(t, h, c));
          most = std::max(most, keys.At(t, h, c));
        }
        const size_t at = keys.Index(static_cast<int64_t>(j), h, c);
        ASSERT_EQ(BFloat16ToFloat(result.pages.block_min.as<uint16_t>()[at]), least);
        ASSERT_EQ(BFloat16ToFloat(result.pages.block_max.as<uint16_t>()[at]), most);
      }
    }
  }
  const LayerPages& pages = result.pages;
  EXPECT_EQ(pages.key_pages.size_bytes() + pages.value_pages.size_bytes() +
                pages.block_min.size_bytes() + pages.block_max.size_bytes(),
            LayerOutputBytes(spec, shape_.num_tokens, context->segmentation.num_blocks()));
}

TEST_F(CompressTest, ContiguousPositionsTurnKeysToTheirSlots) {
  Policy policy = PresetPolicy("snapkv");
  policy.budget.kept_ratio = 0.3;
  policy.positions = Positions::kContiguous;
  const LayerResult result = Compress(policy);
  const Rope rope = *contexts_.back()->spec.rope;
  const LayerPlan& plan = result.decision.plan;
  const int32_t half = shape_.head_dim / 2;
  for (int32_t h = 0; h < shape_.num_kv_heads; ++h) {
    for (int64_t s = 0; s < plan.num_kept; ++s) {
      const int32_t p = plan.kept[static_cast<size_t>(h * plan.num_kept + s)];
      for (int32_t c = 0; c < half; ++c) {
        const double angle =
            static_cast<double>(s - p) * rope.inverse_frequencies[static_cast<size_t>(c)];
        const double x = layers_[0].keys.At(p, h, c);
        const double y = layers_[0].keys.At(p, h, c + half);
        const double turned = x * std::cos(angle) - y * std::sin(angle);
        const size_t at = layers_[0].keys.Index(s, h, c);
        // Half a unit in the last place of bf16, and fp32 rounding of table and products.
        EXPECT_NEAR(BFloat16ToFloat(result.pages.key_pages.as<uint16_t>()[at]), turned,
                    std::abs(turned) / 256 + 1e-5 * (std::abs(x) + std::abs(y)));
      }
    }
  }
}

TEST_F(CompressTest, ContiguousPositionsKeepTheDistancesOfASuffix) {
  // The most recent tokens move as one, and the consumer's queries with them: attention sees the
  // same distances as at the original positions, up to the rounding of turned keys.
  Policy policy = PresetPolicy("streamingllm");
  policy.protection.num_sink_tokens = 0;
  policy.budget.kept_ratio = 0.9;
  const LayerReceipt original = Compress(policy).receipt;
  policy.positions = Positions::kContiguous;
  const LayerReceipt contiguous = Compress(policy).receipt;
  EXPECT_EQ(contiguous.mass_mean, original.mass_mean);
  EXPECT_NEAR(contiguous.error_mean, original.error_mean, 0.01);
  EXPECT_LT(contiguous.error_mean, 0.5);
}

TEST_F(CompressTest, NonFiniteInputIsNamed) {
  EXPECT_TRUE(CheckLayerFinite(Tensors(1), *backend_, *stream_).ok());
  layers_[1].values.Set(17, 1, 3, std::numeric_limits<float>::infinity());
  const absl::Status status = CheckLayerFinite(Tensors(1), *backend_, *stream_);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GetErrorDetails(status).subject, "tensors.values");
  EXPECT_NE(GetErrorDetails(status).problem.find("layer 1"), std::string::npos);
  EXPECT_NE(GetErrorDetails(status).problem.find("row 17"), std::string::npos);
  LayerTensors keys_only = Tensors(1);
  keys_only.values = keys_only.queries = {};
  EXPECT_TRUE(CheckLayerFinite(keys_only, *backend_, *stream_).ok());
}

TEST_F(CompressTest, PreparationRefusesWhatDoesNotFit) {
  const SequenceSpec spec = Spec(PresetPolicy("dynsplit"));
  const auto field = [&](const SequenceSpec& s, const std::vector<int32_t>& ids) {
    const auto context = PrepareSequence(s, ids, &profile_, *backend_, *stream_);
    return GetErrorDetails(context.status()).subject;
  };
  std::vector<int32_t> ids = token_ids_;
  ids.pop_back();
  EXPECT_EQ(field(spec, ids), "tensors.token_ids");
  ids.push_back(-5);
  EXPECT_EQ(field(spec, ids), "tensors.token_ids[306]");
  EXPECT_EQ(PrepareSequence(spec, token_ids_, nullptr, *backend_, *stream_).status().code(),
            absl::StatusCode::kNotFound);
  SequenceSpec wrong = spec;
  wrong.supply.num_window_queries = shape_.num_tokens + 1;
  EXPECT_EQ(field(wrong, token_ids_), "tensors.queries");
  wrong = spec;
  wrong.supply.accumulated_rows = 3;
  EXPECT_EQ(field(wrong, token_ids_), "tensors.accumulated_scores");
  // Fixed blocks read no ids.
  EXPECT_TRUE(
      PrepareSequence(Spec(PresetPolicy("chunkkv")), {}, nullptr, *backend_, *stream_).ok());
}

}  // namespace
}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/session_adapter.h"

#include <gtest/gtest.h>

#include "server/pipeline/errors.h"
#include "server/rpc/select_adapter.h"

namespace dynsplit::rpc {
namespace {

constexpr SequenceShape kShape = {
    .num_layers = 2, .num_query_heads = 4, .num_kv_heads = 2, .num_tokens = 100, .head_dim = 16};

absl::StatusOr<SessionOpening> Opening(const v1::SessionOptions& options, const v1::Policy& policy,
                                       const std::string& field = "policy") {
  return OpeningFromProto(options, policy, field, kShape, std::nullopt, "tenant");
}

std::string FieldOf(const absl::Status& status) { return GetErrorDetails(status).subject; }

TEST(SessionAdapterTest, DefaultsAreTheIndexPresetInFp8Summaries) {
  auto opening = Opening({}, {});
  ASSERT_TRUE(opening.ok()) << opening.status();
  EXPECT_EQ(opening->resident.policy.preset, "dynsplit_index");
  EXPECT_EQ(opening->resident.capacity_tokens, 100);
  EXPECT_EQ(opening->settings.lease, absl::Seconds(300));
  EXPECT_EQ(opening->settings.placement, SessionSettings::Placement::kAny);
  EXPECT_EQ(opening->settings.tenant, "tenant");
  SetTypes({}, DType::kFloat16, DType::kFloat16, opening->resident);
  EXPECT_EQ(opening->resident.summary_dtype, DType::kFloat8E4M3);
  v1::SessionOptions options;
  options.set_summaries(v1::SessionOptions::SUMMARIES_AS_KEYS);
  SetTypes(options, DType::kFloat16, DType::kFloat16, opening->resident);
  EXPECT_EQ(opening->resident.summary_dtype, DType::kFloat16);
}

TEST(SessionAdapterTest, OptionsHaveRanges) {
  v1::SessionOptions options;
  options.set_lease_seconds(86401);
  EXPECT_EQ(FieldOf(Opening(options, {}).status()), "session.lease_seconds");
  options.set_lease_seconds(1);
  options.set_reserve_tokens(int64_t{1} << 31);
  EXPECT_EQ(FieldOf(Opening(options, {}).status()), "session.reserve_tokens");
  options.set_reserve_tokens(-1);
  EXPECT_EQ(FieldOf(Opening(options, {}).status()), "session.reserve_tokens");
  options.set_reserve_tokens(28);
  const auto opening = Opening(options, {});
  ASSERT_TRUE(opening.ok()) << opening.status();
  EXPECT_EQ(opening->resident.capacity_tokens, 128);
}

TEST(SessionAdapterTest, PoliciesThatCannotRestAreRefusedUnderTheirName) {
  v1::Policy policy;
  policy.set_transform(v1::TRANSFORM_EVICT);
  EXPECT_EQ(FieldOf(Opening({}, policy, "session_policy").status()), "session_policy.transform");
  policy.Clear();
  policy.mutable_scoring()->set_num_window_queries(4);
  EXPECT_EQ(FieldOf(Opening({}, policy).status()), "policy.scoring.num_window_queries");
  policy.Clear();
  policy.mutable_encoding()->set_scale_granularity(v1::SCALE_GRANULARITY_HEAD);
  EXPECT_EQ(FieldOf(Opening({}, policy).status()), "policy.encoding.scale_granularity");
  policy.Clear();
  policy.mutable_quality_floor()->set_min_retained_attention_mass(0.5);
  EXPECT_EQ(Opening({}, policy).status().code(), absl::StatusCode::kUnimplemented);
}

TEST(SessionAdapterTest, FieldsBelongToTheirMethods) {
  v1::Begin begin;
  EXPECT_EQ(FieldOf(CheckSessionFields(begin, Method::kAppend)), "target.session_id");
  begin.mutable_target()->set_session_id("s");
  EXPECT_TRUE(CheckSessionFields(begin, Method::kAppend).ok());
  EXPECT_TRUE(CheckSessionFields(begin, Method::kFetch).ok());
  EXPECT_EQ(FieldOf(CheckSessionFields(begin, Method::kOpen)), "target");
  begin.mutable_target()->add_layers(0);
  EXPECT_EQ(FieldOf(CheckSessionFields(begin, Method::kAppend)), "target.layers");
  begin.Clear();
  begin.mutable_session();
  EXPECT_TRUE(CheckSessionFields(begin, Method::kCompress).ok());
  EXPECT_EQ(FieldOf(CheckSessionFields(begin, Method::kPlan)), "session");
  begin.mutable_session_policy();
  EXPECT_EQ(FieldOf(CheckSessionFields(begin, Method::kOpen)), "session_policy");
}

RequestSpec FetchSpec() {
  RequestSpec spec;
  spec.method = Method::kFetch;
  spec.sequence.shape = kShape;
  spec.sequence.policy = (*FindPreset("dynsplit_index"))->policy;
  return spec;
}

TEST(SessionAdapterTest, FetchTakesBitsPositionsAndPagesFromBegin) {
  v1::Begin begin;
  begin.mutable_policy()->mutable_encoding()->set_value(v1::Encoding::FORMAT_INT8);
  begin.mutable_policy()->set_page_size(64);
  begin.mutable_target()->add_layers(1);
  begin.mutable_target()->mutable_resume()->set_layer(1);
  RequestSpec spec = FetchSpec();
  ASSERT_TRUE(DecodeFetch(begin, spec).ok());
  EXPECT_EQ(spec.sequence.policy.encoding.value, EncodingPolicy::Format::kInt8);
  EXPECT_EQ(spec.sequence.policy.page_size, 64);
  EXPECT_EQ(spec.sequence.policy.transform, Transform::kEvict);
  EXPECT_EQ(spec.fetch_layers, std::vector<int32_t>{1});
  EXPECT_EQ(spec.fetch_resume->num_skipped_layers, 0);
  begin.mutable_target()->mutable_resume()->set_layer(0);
  spec = FetchSpec();
  EXPECT_EQ(FieldOf(DecodeFetch(begin, spec)), "target.resume.layer");
  begin.mutable_target()->add_layers(1);
  spec = FetchSpec();
  EXPECT_EQ(FieldOf(DecodeFetch(begin, spec)), "target.layers[1]");
}

v1::SelectRequest GoodSelect() {
  v1::SelectRequest request;
  v1::SequenceStep& step = *request.add_sequences();
  step.set_session_id("s");
  step.set_dtype(v1::DTYPE_BFLOAT16);
  step.set_query_data("q");
  return request;
}

TEST(SelectAdapterTest, RefusesWhatNeedsNoSession) {
  EXPECT_TRUE(StepsFromProto(GoodSelect()).ok());
  EXPECT_EQ(FieldOf(StepsFromProto({}).status()), "sequences");
  const auto field_of = [](auto&& change) {
    v1::SelectRequest request = GoodSelect();
    change(*request.mutable_sequences(0));
    return FieldOf(StepsFromProto(request).status());
  };
  using Step = v1::SequenceStep;
  EXPECT_EQ(field_of([](Step& step) { step.clear_session_id(); }), "sequences[0].session_id");
  EXPECT_EQ(field_of([](Step& step) { step.set_num_queries(65); }), "sequences[0].num_queries");
  EXPECT_EQ(field_of([](Step& step) { step.set_dtype(v1::DTYPE_INT8); }), "sequences[0].dtype");
  EXPECT_EQ(field_of([](Step& step) { step.clear_query_data(); }), "sequences[0].query_data");
  EXPECT_EQ(field_of([](Step& step) { step.set_first_layer(-1); }), "sequences[0].first_layer");
  EXPECT_EQ(field_of([](Step& step) { step.mutable_gather()->mutable_key_region(); }),
            "sequences[0].gather.value_region");
  v1::SelectRequest twice = GoodSelect();
  *twice.add_sequences() = twice.sequences(0);
  EXPECT_EQ(FieldOf(StepsFromProto(twice).status()), "sequences[1].session_id");
}

}  // namespace
}  // namespace dynsplit::rpc

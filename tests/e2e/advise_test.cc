// SPDX-License-Identifier: Apache-2.0
//
// Info.Advise for one-shot compression, asked of a running server: answers, wrong questions, what
// the server learns from its own requests, and the expected divergence of receipts and floors.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "dynsplit/v1/info.grpc.pb.h"
#include "server/pipeline/quality.h"
#include "tests/e2e/harness.h"

namespace dynsplit::e2e {
namespace {

using testing::HasSubstr;

v1::SequenceShape ShapeOf(const ScriptOptions& options) {
  v1::SequenceShape shape;
  shape.set_num_layers(options.num_layers);
  shape.set_num_query_heads(options.num_query_heads);
  shape.set_num_kv_heads(options.num_kv_heads);
  shape.set_num_tokens(options.num_tokens);
  shape.set_head_dim(options.head_dim);
  return shape;
}

// An 8B model's 128K tokens over 1 GB/s.
v1::AdviseRequest Question() {
  v1::AdviseRequest request;
  *request.mutable_shape() = ShapeOf({.num_layers = 32,
                                      .num_query_heads = 32,
                                      .num_kv_heads = 8,
                                      .head_dim = 128,
                                      .num_tokens = 131072});
  request.set_link_bytes_per_second(1e8);
  request.add_evidence(v1::EVIDENCE_WINDOW_QUERIES);
  return request;
}

class AdviseTest : public testing::Test {
 protected:
  grpc::Status Ask(const v1::AdviseRequest& request, v1::AdviseResponse& response) {
    const std::unique_ptr<v1::Info::Stub> stub = v1::Info::NewStub(server_.tcp_channel());
    grpc::ClientContext context;
    return stub->Advise(&context, request, &response);
  }
  v1::AdviseResponse Advice(const v1::AdviseRequest& request) {
    v1::AdviseResponse response;
    const grpc::Status status = Ask(request, response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }
  Reply Compress(const Script& script) {
    const std::unique_ptr<Stub> stub = v1::Compression::NewStub(server_.tcp_channel());
    return Exchange(*stub, Call::kCompress, script);
  }

  TestServer server_;
};

TEST_F(AdviseTest, AnswersWithAPolicyThatTheServerTakes) {
  const v1::AdviseResponse advice = Advice(Question());
  ASSERT_TRUE(advice.compress()) << advice.reason();
  EXPECT_EQ(advice.policy().preset(), "dynsplit");
  EXPECT_EQ(advice.policy().segmentation().profile(), TestConfig().default_profile);
  EXPECT_GT(advice.policy().budget().kept_ratio(), 0);
  EXPECT_LT(advice.policy().budget().kept_ratio(), 1);
  EXPECT_NEAR(advice.plain_seconds(), 17179869184.0 / 1e8, 1e-6);
  EXPECT_LT(advice.compressed_seconds(), advice.plain_seconds());
  EXPECT_GT(advice.break_even_bytes_per_second(), 1e8);
  EXPECT_GE(advice.expected_retained_attention_mass(), 0.9 - 1e-9);
  EXPECT_GT(advice.expected_output_relative_error(), 0);
  EXPECT_GT(advice.expected_divergence(), 0);
  EXPECT_EQ(advice.num_receipts(), 0);
  EXPECT_EQ(advice.num_timed_requests(), 0);
  EXPECT_THAT(advice.reason(), HasSubstr(QualityTable::Builtin().model()));

  Script script = MakeScript({.num_tokens = 512});
  *script.begin.mutable_policy() = advice.policy();
  const Reply reply = Compress(script);
  EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
}

TEST_F(AdviseTest, SaysNoWhereTheLinkIsFast) {
  v1::AdviseRequest request = Question();
  request.set_link_bytes_per_second(Advice(request).break_even_bytes_per_second() * 1.01);
  const v1::AdviseResponse advice = Advice(request);
  EXPECT_FALSE(advice.compress());
  EXPECT_FALSE(advice.has_policy());
  EXPECT_GT(advice.compressed_seconds(), advice.plain_seconds());
}

TEST_F(AdviseTest, EvidenceDecides) {
  v1::AdviseRequest request = Question();
  request.set_min_retained_attention_mass(0.6);
  request.clear_evidence();
  EXPECT_EQ(Advice(request).policy().preset(), "streamingllm") << "which reads nothing";
  request.add_evidence(v1::EVIDENCE_KEYS);
  const v1::AdviseResponse advice = Advice(request);
  ASSERT_TRUE(advice.compress()) << advice.reason();
  EXPECT_EQ(advice.policy().preset(), "dynsplit_keys");
}

// -- wrong questions ------------------------------------------------------------------------------

struct Wrong {
  const char* name;
  std::function<void(v1::AdviseRequest&)> make;
  grpc::StatusCode code;
  const char* field;  // named by the error
  const char* limit;  // in the message
};

class AdviseBadInputTest : public AdviseTest, public testing::WithParamInterface<Wrong> {};

TEST_P(AdviseBadInputTest, IsToldFieldAndLimit) {
  v1::AdviseRequest request = Question();
  GetParam().make(request);
  v1::AdviseResponse response;
  const grpc::Status status = Ask(request, response);
  EXPECT_EQ(status.error_code(), GetParam().code) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr(GetParam().field));
  EXPECT_THAT(status.error_message(), HasSubstr(GetParam().limit));
  if (GetParam().code == grpc::INVALID_ARGUMENT) {
    const wire::RichError error = wire::ReadError(status);
    ASSERT_EQ(error.fields.size(), 1);
    EXPECT_EQ(error.fields[0].field, GetParam().field);
  }
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

INSTANTIATE_TEST_SUITE_P(
    Rows, AdviseBadInputTest,
    testing::Values(
        Wrong{"no_shape", [](auto& r) { r.clear_shape(); }, grpc::INVALID_ARGUMENT,
              "shape.num_layers", "[1, "},
        Wrong{"no_tokens", [](auto& r) { r.mutable_shape()->set_num_tokens(0); },
              grpc::INVALID_ARGUMENT, "shape.num_tokens", "[1, "},
        Wrong{"odd_heads", [](auto& r) { r.mutable_shape()->set_num_kv_heads(5); },
              grpc::INVALID_ARGUMENT, "shape.num_query_heads", "multiple of num_kv_heads"},
        Wrong{"integers", [](auto& r) { r.set_dtype(v1::DTYPE_INT32); }, grpc::INVALID_ARGUMENT,
              "dtype", "int32"},
        Wrong{"unknown_dtype", [](auto& r) { r.set_dtype(static_cast<v1::DType>(99)); },
              grpc::INVALID_ARGUMENT, "dtype", "99"},
        Wrong{"no_link", [](auto& r) { r.clear_link_bytes_per_second(); }, grpc::INVALID_ARGUMENT,
              "link_bytes_per_second", "> 0"},
        Wrong{"negative_link", [](auto& r) { r.set_link_bytes_per_second(-1); },
              grpc::INVALID_ARGUMENT, "link_bytes_per_second", "is -1"},
        Wrong{"endless_link", [](auto& r) { r.set_link_bytes_per_second(kInf); },
              grpc::INVALID_ARGUMENT, "link_bytes_per_second", "finite"},
        Wrong{"nan_link", [](auto& r) { r.set_link_bytes_per_second(kNan); },
              grpc::INVALID_ARGUMENT, "link_bytes_per_second", "nan"},
        Wrong{"negative_goal", [](auto& r) { r.set_time_to_first_token_seconds(-0.5); },
              grpc::INVALID_ARGUMENT, "time_to_first_token_seconds", "-0.5"},
        Wrong{"nan_goal", [](auto& r) { r.set_time_to_first_token_seconds(kNan); },
              grpc::INVALID_ARGUMENT, "time_to_first_token_seconds", "finite"},
        Wrong{"much_mass", [](auto& r) { r.set_min_retained_attention_mass(1.5); },
              grpc::INVALID_ARGUMENT, "min_retained_attention_mass", "[0, 1]"},
        Wrong{"nan_mass", [](auto& r) { r.set_min_retained_attention_mass(kNan); },
              grpc::INVALID_ARGUMENT, "min_retained_attention_mass", "[0, 1]"},
        Wrong{"negative_divergence", [](auto& r) { r.set_max_expected_divergence(-1); },
              grpc::INVALID_ARGUMENT, "max_expected_divergence", "not negative"},
        Wrong{"nan_divergence", [](auto& r) { r.set_max_expected_divergence(kNan); },
              grpc::INVALID_ARGUMENT, "max_expected_divergence", "finite"},
        Wrong{"unknown_evidence", [](auto& r) { r.add_evidence(static_cast<v1::Evidence>(77)); },
              grpc::INVALID_ARGUMENT, "evidence[1]", "77"},
        Wrong{"unread_evidence", [](auto& r) { r.add_evidence(v1::EVIDENCE_BLOCK_SCORES); },
              grpc::UNIMPLEMENTED, "evidence[1]", "does not have"}),
    [](const auto& row) { return std::string(row.param.name); });

// -- what the server learns -----------------------------------------------------------------------

TEST_F(AdviseTest, OwnRequestsChangeTheAnswer) {
  const ScriptOptions options = {.num_tokens = 512};
  v1::AdviseRequest request = Question();
  *request.mutable_shape() = ShapeOf(options);
  request.set_link_bytes_per_second(1e3);
  request.set_min_retained_attention_mass(0.5);
  const v1::AdviseResponse before = Advice(request);
  EXPECT_EQ(before.num_receipts(), 0);

  // Random keys and queries spread attention evenly, unlike any text: receipts are worse.
  Script script = MakeScript(options);
  script.begin.mutable_policy()->clear_protection();  // the preset's own
  script.begin.mutable_policy()->mutable_budget()->set_kept_ratio(0.2);
  Reply reply;
  for (int i = 0; i < 8; ++i) {
    reply = Compress(script);
    ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  }
  // Other policies under the preset's name, plans and shadows do not count as its requests.
  Script changed = script;
  changed.begin.mutable_policy()->mutable_segmentation()->set_block_size(14);
  EXPECT_TRUE(Compress(changed).status.ok());

  v1::AdviseResponse after;
  ASSERT_TRUE(Eventually([&] {
    after = Advice(request);
    return after.num_receipts() > 0;
  }));
  EXPECT_EQ(after.num_receipts(), 8);
  EXPECT_EQ(after.num_timed_requests(), 8);
  EXPECT_NE(after.compressed_seconds(), before.compressed_seconds());
  EXPECT_THAT(after.reason(), HasSubstr("8 receipts of this server"));

  // Asked for what those requests reached, it advises about their share.
  const double mass = reply.end.receipt().retained_attention_mass_mean();
  ASSERT_LT(mass, 0.9);
  request.set_min_retained_attention_mass(mass);
  const v1::AdviseResponse same = Advice(request);
  ASSERT_TRUE(same.compress()) << same.reason();
  EXPECT_NEAR(same.policy().budget().kept_ratio(), 0.2, 0.01);
  EXPECT_NEAR(same.expected_retained_attention_mass(), mass, 0.01);
}

TEST_F(AdviseTest, ShadowsTellOfQualityAlone) {
  const ScriptOptions options = {.num_tokens = 512};
  Script script = MakeScript(options);
  script.begin.mutable_policy()->clear_protection();
  script.begin.set_shadow(true);
  for (int i = 0; i < 8; ++i) ASSERT_TRUE(Compress(script).status.ok());
  v1::AdviseRequest request = Question();
  *request.mutable_shape() = ShapeOf(options);
  request.set_min_retained_attention_mass(0.1);
  v1::AdviseResponse advice;
  ASSERT_TRUE(Eventually([&] {
    advice = Advice(request);
    return advice.num_receipts() == 8;
  }));
  EXPECT_EQ(advice.num_timed_requests(), 0);
}

// -- expected divergence --------------------------------------------------------------------------

TEST_F(AdviseTest, ReceiptsTellTheExpectedDivergence) {
  const Script script = MakeScript({.num_tokens = 512});
  const Reply reply = Compress(script);
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  const v1::Receipt& receipt = reply.end.receipt();
  const Loss& loss = QualityTable::Builtin().LossOf("dynsplit");
  EXPECT_GT(receipt.expected_divergence(), 0);
  EXPECT_DOUBLE_EQ(receipt.expected_divergence(),
                   loss.of_error.Divergence(receipt.output_relative_error_mean()));
}

TEST_F(AdviseTest, AFloorOfDivergenceBoundsTheError) {
  Script script = MakeScript({.num_tokens = 512});
  script.begin.mutable_policy()->mutable_budget()->set_kept_ratio(0.1);
  const Loss& loss = QualityTable::Builtin().LossOf("dynsplit");
  const Reply loose = Compress(script);
  ASSERT_TRUE(loose.status.ok());
  const double wanted = loose.end.receipt().expected_divergence() / 4;
  v1::QualityFloor& floor = *script.begin.mutable_policy()->mutable_quality_floor();
  floor.set_max_expected_divergence(wanted);
  const Reply held = Compress(script);
  ASSERT_TRUE(held.status.ok()) << held.status.error_message();
  const double bound = loss.of_error.ValueFor(wanted);
  EXPECT_DOUBLE_EQ(held.accepted.policy().quality_floor().max_output_relative_error(), bound);
  EXPECT_LE(held.end.receipt().expected_divergence(), wanted);
  for (const v1::LayerResult& layer : held.layers) {
    EXPECT_LE(layer.receipt().output_relative_error_mean(), bound);
    EXPECT_TRUE(layer.plan().budget_raised_by_quality_floor());
  }

  floor.set_max_output_relative_error(bound / 2);  // the smaller bound stands
  EXPECT_DOUBLE_EQ(Compress(script).accepted.policy().quality_floor().max_output_relative_error(),
                   bound / 2);

  floor.set_max_expected_divergence(-1);
  const Reply refused = Compress(script);
  EXPECT_EQ(refused.status.error_code(), grpc::INVALID_ARGUMENT);
  ASSERT_EQ(refused.error.fields.size(), 1);
  EXPECT_EQ(refused.error.fields[0].field, "policy.quality_floor.max_expected_divergence");
}

}  // namespace
}  // namespace dynsplit::e2e

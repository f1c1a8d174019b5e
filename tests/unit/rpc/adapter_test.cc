// SPDX-License-Identifier: Apache-2.0
//
// Adapters by themselves; what they refuse is attacked end to end in tests/e2e/bad_input_test.cc.
#include <gtest/gtest.h>

#include <string>

#include "proto/wire/status.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/plan.h"
#include "server/rpc/policy_adapter.h"
#include "server/rpc/result_adapter.h"
#include "server/rpc/tensor_adapter.h"

namespace dynsplit::rpc {
namespace {

TEST(PolicyAdapterTest, ResolvedPoliciesMakeTheRoundTrip) {
  for (const Preset& preset : Presets()) {
    Policy policy = preset.policy;
    policy.protection.pinned = {{.begin = 3, .end = 9}};
    policy.protection.dense_layers = {0, 2};
    policy.encoding.key = EncodingPolicy::Format::kInt8;
    policy.encoding.scale_granularity = ScaleGranularity::kTokenHead;
    policy.quality_floor.max_output_relative_error = 0.25;
    const auto back = PolicyFromProto(PolicyToProto(policy), "policy");
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(CanonicalPolicy(*back), CanonicalPolicy(policy));
  }
}

TEST(PolicyAdapterTest, AbsentChoicesAreThePresets) {
  v1::Policy wire;
  auto policy = PolicyFromProto(wire, "policy");
  ASSERT_TRUE(policy.ok());
  EXPECT_EQ(CanonicalPolicy(*policy), CanonicalPolicy((*FindPreset("dynsplit"))->policy));
  wire.mutable_segmentation()->set_block_size(4);  // deviation follows where it would not fit
  policy = PolicyFromProto(wire, "policy");
  ASSERT_TRUE(policy.ok());
  EXPECT_EQ(policy->segmentation.max_deviation, 3);
  wire.mutable_segmentation()->set_method(v1::Segmentation::METHOD_FIXED);
  wire.mutable_segmentation()->set_block_size(0);
  policy = PolicyFromProto(wire, "policy");
  ASSERT_TRUE(policy.ok());
  EXPECT_EQ(policy->segmentation.block_size, 16);
}

TEST(PolicyAdapterTest, RopeFrequencies) {
  v1::Rope wire;
  wire.set_theta(100);
  wire.set_scaling(v1::Rope::SCALING_LINEAR);
  wire.set_scaling_factor(4);
  const auto rope = RopeFromProto(wire, 8);
  ASSERT_TRUE(rope.ok());
  EXPECT_EQ(rope->rotary_dim, 8);
  ASSERT_EQ(rope->inverse_frequencies.size(), 4U);
  EXPECT_DOUBLE_EQ(rope->inverse_frequencies[0], 0.25);
  EXPECT_DOUBLE_EQ(rope->inverse_frequencies[2], 0.025);
}

constexpr SequenceShape kShape = {
    .num_layers = 2, .num_query_heads = 4, .num_kv_heads = 2, .num_tokens = 10, .head_dim = 16};

v1::TensorDescriptor KeyDescriptor() {
  v1::TensorDescriptor descriptor;
  descriptor.set_id(1);
  descriptor.set_kind(v1::TENSOR_KIND_KEY);
  descriptor.set_layer(0);
  descriptor.set_dtype(v1::DTYPE_FLOAT16);
  return descriptor;
}

void AddDim(v1::TensorDescriptor& descriptor, v1::Axis axis, int64_t size, int64_t stride) {
  v1::Dim& dim = *descriptor.add_dims();
  dim.set_axis(axis);
  dim.set_size(size);
  dim.set_stride_bytes(stride);
}

TEST(TensorAdapterTest, EmptyDimsAreTheDenseShape) {
  v1::TensorDescriptor descriptor = KeyDescriptor();
  descriptor.set_byte_size(10 * 2 * 16 * 2);
  const auto decoded = TensorFromProto(descriptor, kShape, "tensors[0]");
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(decoded->tensor.view.token_stride_bytes, 64);
  EXPECT_EQ(decoded->tensor.view.head_stride_bytes, 32);
}

TEST(TensorAdapterTest, ExtentEndsWithTheLastElement) {
  v1::TensorDescriptor descriptor = KeyDescriptor();
  AddDim(descriptor, v1::AXIS_CHANNEL, 16, 2);
  AddDim(descriptor, v1::AXIS_TOKEN, 10, 100);  // padded rows
  AddDim(descriptor, v1::AXIS_HEAD, 2, 4000);
  descriptor.set_byte_size(4000 + 9 * 100 + 32);
  const auto decoded = TensorFromProto(descriptor, kShape, "tensors[0]");
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(decoded->tensor.view.head_stride_bytes, 4000);
  descriptor.set_byte_size(8000);  // what a caller who pads the end would say
  EXPECT_EQ(GetErrorDetails(TensorFromProto(descriptor, kShape, "tensors[0]").status()).subject,
            "tensors[0].byte_size");
}

TEST(TensorAdapterTest, PagesAndPackedKeyValues) {
  v1::TensorDescriptor descriptor = KeyDescriptor();
  descriptor.set_kind(v1::TENSOR_KIND_KEY_VALUE);
  AddDim(descriptor, v1::AXIS_PAGE, 5, 1024);  // [page, slot, head, 2 x channel]
  AddDim(descriptor, v1::AXIS_TOKEN, 4, 128);
  AddDim(descriptor, v1::AXIS_HEAD, 2, 64);
  AddDim(descriptor, v1::AXIS_KV, 2, 32);
  AddDim(descriptor, v1::AXIS_CHANNEL, 16, 2);
  descriptor.set_byte_size(4 * 1024 + 512);
  const auto decoded = TensorFromProto(descriptor, kShape, "tensors[0]");
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(decoded->tensor.value_offset_bytes, 32);
  EXPECT_EQ(decoded->tensor.view.page_size, 4);
  EXPECT_EQ(decoded->tensor.view.page_stride_bytes, 1024);
  EXPECT_EQ(decoded->tensor.num_pool_pages, 5);
  // Too few pages for ten tokens.
  descriptor.mutable_dims(0)->set_size(2);
  descriptor.set_byte_size(1024 + 512);
  EXPECT_FALSE(TensorFromProto(descriptor, kShape, "tensors[0]").ok());
}

TEST(TensorAdapterTest, EveryKindHasAName) {
  EXPECT_EQ(TensorKindName(TensorKind::kKey), "KEY");
  EXPECT_EQ(TensorKindName(TensorKind::kBlockKeyMean), "BLOCK_KEY_MEAN");
}

TEST(ResultAdapterTest, ErrorsKeepTheirDetails) {
  const auto read = [](const absl::Status& status) { return wire::ReadError(ErrorToGrpc(status)); };
  wire::RichError error = read(InvalidField("shape.num_tokens", "is 0; must be > 0"));
  EXPECT_EQ(error.code, absl::StatusCode::kInvalidArgument);
  ASSERT_EQ(error.fields.size(), 1U);
  EXPECT_EQ(error.fields[0].field, "shape.num_tokens");
  error = read(PreconditionFailed("QUALITY_FLOOR", "policy.quality_floor", "is not reached"));
  ASSERT_EQ(error.preconditions.size(), 1U);
  EXPECT_EQ(error.preconditions[0].type, "QUALITY_FLOOR");
  error = read(NotFound("preset", "snapkw"));
  EXPECT_EQ(error.resource_type, "preset");
  EXPECT_EQ(error.resource_name, "snapkw");
  error = read(RetryLater(absl::StatusCode::kUnavailable, "draining", 250));
  EXPECT_EQ(error.retry_after_ms, 250);
  error = read(WithReason(absl::StatusCode::kInternal, "DEVICE_FAULT", "lost"));
  EXPECT_EQ(error.reason, "DEVICE_FAULT");
}

}  // namespace
}  // namespace dynsplit::rpc

// SPDX-License-Identifier: Apache-2.0
//
// What compression returns, on made-up and on real key-value caches.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "client/cpp/safetensors.h"
#include "server/pipeline/policy.h"
#include "server/rpc/policy_adapter.h"
#include "tests/e2e/harness.h"

namespace dynsplit::e2e {
namespace {

class CompressTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { server_ = new TestServer; }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }

  void TearDown() override { EXPECT_TRUE(server_->ReturnsToBaseline()); }

  static TestServer* server_;
  std::unique_ptr<Stub> tcp_ = v1::Compression::NewStub(server_->tcp_channel());
  std::unique_ptr<Stub> unix_ = v1::Compression::NewStub(server_->unix_channel());
};
TestServer* CompressTest::server_ = nullptr;

// A capture of tests/data/sample: three layers of a real model.
Script SampleScript(const std::string& name) {
  const auto file =
      Safetensors::Load(std::string(DYNSPLIT_TEST_DATA) + "/sample/" + name + ".safetensors");
  if (!file.ok()) {
    ADD_FAILURE() << file.status();
    std::abort();
  }
  Script script;
  const auto add = [&](const std::string& tensor_name, v1::TensorKind kind, int32_t layer,
                       v1::DType dtype) {
    const SafetensorsTensor& source = *file->Find(tensor_name);
    Tensor& tensor = script.tensors.emplace_back();
    tensor.descriptor.set_id(static_cast<uint32_t>(script.tensors.size()));
    tensor.descriptor.set_kind(kind);
    if (layer >= 0) tensor.descriptor.set_layer(layer);
    tensor.descriptor.set_dtype(dtype);
    tensor.bytes.assign(reinterpret_cast<const char*>(source.bytes.data()), source.bytes.size());
    tensor.descriptor.set_byte_size(static_cast<int64_t>(tensor.bytes.size()));
  };
  add("token_ids", v1::TENSOR_KIND_TOKEN_IDS, -1, v1::DTYPE_INT32);
  constexpr int32_t kLayers = 3;
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    add(prefix + "key", v1::TENSOR_KIND_KEY, layer, v1::DTYPE_BFLOAT16);
    add(prefix + "value", v1::TENSOR_KIND_VALUE, layer, v1::DTYPE_BFLOAT16);
    add(prefix + "query", v1::TENSOR_KIND_QUERIES, layer, v1::DTYPE_BFLOAT16);
  }
  v1::SequenceShape& shape = *script.begin.mutable_shape();
  shape.set_num_layers(kLayers);
  shape.set_num_query_heads(9);
  shape.set_num_kv_heads(3);
  shape.set_num_tokens(static_cast<int64_t>(script.tensors.front().bytes.size()) / 4);
  shape.set_head_dim(64);
  script.begin.mutable_rope()->set_theta(100000);
  return script;
}

// Supplies what H2O reads: every KV head likes its own tokens.
void AddAccumulatedScores(Script& script) {
  const v1::SequenceShape& shape = script.begin.shape();
  for (int32_t layer = 0; layer < shape.num_layers(); ++layer) {
    Tensor tensor;
    tensor.bytes.resize(static_cast<size_t>(shape.num_kv_heads() * shape.num_tokens()) * 4);
    for (size_t i = 0; i < tensor.bytes.size() / 4; ++i) {
      const auto score = static_cast<float>((i * 2654435761U + static_cast<size_t>(layer)) % 1000);
      std::memcpy(&tensor.bytes[i * 4], &score, 4);
    }
    tensor.descriptor.set_id(static_cast<uint32_t>(script.tensors.size() + 1));
    tensor.descriptor.set_kind(v1::TENSOR_KIND_ACCUMULATED_SCORES);
    tensor.descriptor.set_layer(layer);
    tensor.descriptor.set_dtype(v1::DTYPE_FLOAT32);
    tensor.descriptor.set_byte_size(static_cast<int64_t>(tensor.bytes.size()));
    const auto place = std::find_if(script.tensors.begin(), script.tensors.end(), [&](Tensor& t) {
      return t.descriptor.has_layer() && t.descriptor.layer() > layer;
    });
    script.tensors.insert(place, std::move(tensor));
  }
}

// Every slot of every page is, bit by bit, the input row of the token it stands for; slots behind
// the last are zero; tokens ascend.
void ExpectRowsOfKeptTokens(Script& script, const Reply& reply, v1::TensorKind input,
                            v1::TensorKind pages_kind) {
  const v1::SequenceShape& shape = script.begin.shape();
  const int64_t heads = shape.num_kv_heads();
  const int64_t page_size = reply.accepted.policy().page_size();
  for (const v1::LayerResult& layer : reply.layers) {
    const std::string& source = Find(script, input, layer.plan().layer()).bytes;
    const std::string& pages = reply.Bytes(layer, pages_kind);
    const std::vector<int32_t> kept = reply.Ints(layer, v1::TENSOR_KIND_KEPT_TOKENS);
    const int64_t n = layer.plan().num_kept_tokens();
    const int64_t groups = layer.plan().num_groups();
    ASSERT_EQ(static_cast<int64_t>(kept.size()), n * groups);
    ASSERT_EQ(layer.num_pages(), (n + page_size - 1) / page_size);
    const auto row = source.size() / static_cast<size_t>(shape.num_tokens() * heads);
    ASSERT_EQ(pages.size(), static_cast<size_t>(layer.num_pages() * page_size * heads) * row);
    const std::string zeros(row, '\0');
    for (int64_t slot = 0; slot < layer.num_pages() * page_size; ++slot) {
      for (int64_t head = 0; head < heads; ++head) {
        const std::string actual =
            pages.substr(static_cast<size_t>(slot * heads + head) * row, row);
        if (slot >= n) {
          ASSERT_EQ(actual, zeros);
          continue;
        }
        const int64_t first = (groups == 1 ? 0 : head) * n;
        const int32_t token = kept[static_cast<size_t>(first + slot)];
        ASSERT_TRUE(slot == 0 || kept[static_cast<size_t>(first + slot - 1)] < token);
        ASSERT_EQ(actual, source.substr(static_cast<size_t>(token * heads + head) * row, row))
            << "layer " << layer.plan().layer() << " slot " << slot << " head " << head;
      }
    }
  }
}

void ExpectGood(const Reply& reply, const v1::SequenceShape& shape) {
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.wire_problem, "");
  ASSERT_EQ(static_cast<int>(reply.layers.size()), shape.num_layers());
  EXPECT_EQ(reply.end.plan().layers_size(), shape.num_layers());
  EXPECT_EQ(reply.end.plan().hash().size(), 32U);
  EXPECT_EQ(reply.accepted.backend(), "cpu");
  for (int32_t i = 0; i < shape.num_layers(); ++i) {
    const v1::LayerResult& layer = reply.layers[static_cast<size_t>(i)];
    EXPECT_EQ(layer.plan().layer(), i);
    EXPECT_EQ(layer.plan().hash(), reply.end.plan().layers(i).hash());
  }
}

TEST_F(CompressTest, EveryPresetScopeAndPositionKeepsExactRows) {
  Script script = SampleScript("prose");
  AddAccumulatedScores(script);
  int num_runs = 0;
  for (const Preset& preset : Presets()) {
    for (const v1::Scope scope : {v1::SCOPE_GLOBAL, v1::SCOPE_LAYER, v1::SCOPE_LAYER_HEAD}) {
      for (const v1::Positions positions : {v1::POSITIONS_ORIGINAL, v1::POSITIONS_CONTIGUOUS}) {
        v1::Policy& policy = *script.begin.mutable_policy();
        policy.Clear();
        policy.set_preset(preset.policy.preset);
        policy.set_scope(scope);
        policy.set_positions(positions);
        script.begin.set_no_receipt(num_runs % 4 != 0);  // the receipt costs most of the time
        const Rope rope{.rotary_dim = 64,
                        .interleaved = false,
                        .inverse_frequencies = std::vector<double>(32, 1.0)};
        const auto domain = rpc::PolicyFromProto(policy, "policy");
        ASSERT_TRUE(domain.ok());
        const absl::Status valid =
            ValidatePolicy(*domain, rpc::ShapeFromProto(script.begin.shape()), &rope);
        SCOPED_TRACE(policy.ShortDebugString());
        const Reply reply = Exchange(num_runs++ % 2 == 0 ? *tcp_ : *unix_, Call::kCompress, script);
        if (!valid.ok()) {  // a combination that the policy itself rules out
          EXPECT_EQ(static_cast<int>(reply.status.error_code()), static_cast<int>(valid.code()));
          continue;
        }
        ASSERT_NO_FATAL_FAILURE(ExpectGood(reply, script.begin.shape()));
        ASSERT_NO_FATAL_FAILURE(ExpectRowsOfKeptTokens(script, reply, v1::TENSOR_KIND_VALUE,
                                                       v1::TENSOR_KIND_VALUE_PAGES));
        if (positions == v1::POSITIONS_ORIGINAL) {
          ASSERT_NO_FATAL_FAILURE(ExpectRowsOfKeptTokens(script, reply, v1::TENSOR_KIND_KEY,
                                                         v1::TENSOR_KIND_KEY_PAGES));
        }
        const bool index = domain->transform == Transform::kIndex;
        EXPECT_EQ(reply.end.representation_salt().empty(), index);
        if (scope == v1::SCOPE_GLOBAL) {
          EXPECT_EQ(reply.Ints(reply.layers[0], v1::TENSOR_KIND_KEPT_TOKENS),
                    reply.Ints(reply.layers[2], v1::TENSOR_KIND_KEPT_TOKENS));
        }
      }
    }
  }
  EXPECT_GE(num_runs, 60);
}

TEST_F(CompressTest, EncodingsCarryScalesAndStayClose) {
  Script script = SampleScript("code");
  script.begin.mutable_policy()->set_preset("snapkv");
  const Reply exact = Exchange(*tcp_, Call::kCompress, script);
  ASSERT_NO_FATAL_FAILURE(ExpectGood(exact, script.begin.shape()));
  for (const auto format : {v1::Encoding::FORMAT_FLOAT8_E4M3, v1::Encoding::FORMAT_INT8}) {
    for (const auto granularity : {v1::SCALE_GRANULARITY_HEAD, v1::SCALE_GRANULARITY_TOKEN_HEAD}) {
      v1::Encoding& encoding = *script.begin.mutable_policy()->mutable_encoding();
      encoding.set_key(format);
      encoding.set_value(format);
      encoding.set_scale_granularity(granularity);
      const Reply reply = Exchange(*unix_, Call::kCompress, script);
      ASSERT_NO_FATAL_FAILURE(ExpectGood(reply, script.begin.shape()));
      for (size_t l = 0; l < reply.layers.size(); ++l) {
        const v1::LayerResult& layer = reply.layers[l];
        EXPECT_EQ(reply.Bytes(layer, v1::TENSOR_KIND_KEPT_TOKENS),
                  exact.Bytes(exact.layers[l], v1::TENSOR_KIND_KEPT_TOKENS));
        EXPECT_EQ(2 * reply.Bytes(layer, v1::TENSOR_KIND_VALUE_PAGES).size(),
                  exact.Bytes(exact.layers[l], v1::TENSOR_KIND_VALUE_PAGES).size());
        const size_t slots = static_cast<size_t>(layer.num_pages()) * 16;
        EXPECT_EQ(reply.Bytes(layer, v1::TENSOR_KIND_KEY_PAGE_SCALES).size(),
                  granularity == v1::SCALE_GRANULARITY_HEAD ? 12 : slots * 12);
      }
      EXPECT_LT(reply.end.bytes_out(), exact.end.bytes_out());
      EXPECT_FALSE(reply.end.representation_salt().empty());
      // Eight bits cost little on top of what dropping tokens costs.
      EXPECT_LT(reply.end.receipt().output_relative_error_mean(),
                exact.end.receipt().output_relative_error_mean() + 0.05);
    }
  }
}

TEST_F(CompressTest, ReceiptsAreMeasuredAndGrowWithTheBudget) {
  Script script = SampleScript("dialogue");
  double last_mass = 0;
  double last_error = 10;
  for (const double ratio : {0.1, 0.3, 0.6, 1.0}) {
    script.begin.mutable_policy()->mutable_budget()->set_kept_ratio(ratio);
    const Reply reply = Exchange(*unix_, Call::kCompress, script);
    ASSERT_NO_FATAL_FAILURE(ExpectGood(reply, script.begin.shape()));
    const v1::Receipt& receipt = reply.end.receipt();
    EXPECT_EQ(receipt.num_queries(), 64);
    EXPECT_EQ(receipt.layers_size(), 3);
    EXPECT_GT(receipt.retained_attention_mass_mean(), last_mass);
    EXPECT_LT(receipt.output_relative_error_mean(), last_error);
    EXPECT_LE(receipt.retained_attention_mass_min(), receipt.retained_attention_mass_mean());
    last_mass = receipt.retained_attention_mass_mean();
    last_error = receipt.output_relative_error_mean();
  }
  EXPECT_NEAR(last_mass, 1, 1e-4);
  EXPECT_NEAR(last_error, 0, 1e-3);
}

// Plan, then Apply of what it returned.
Reply PlanThenApply(Stub& stub, const Script& script, Reply& plan) {
  plan = Exchange(stub, Call::kPlan, script);
  EXPECT_TRUE(plan.status.ok()) << plan.status.error_message();
  Script apply = script;
  apply.begin.clear_policy();
  *apply.begin.mutable_plan() = plan.end.plan();
  std::vector<Tensor> tensors;
  uint32_t id = 1000;
  const auto add = [&](const v1::TensorDescriptor& source) {
    Tensor tensor{.descriptor = source, .bytes = plan.bytes.at(source.id())};
    tensor.descriptor.set_id(id++);
    tensors.push_back(std::move(tensor));
  };
  add(plan.sequence.tensors(0));
  for (const Tensor& tensor : script.tensors) {
    if (tensor.descriptor.kind() == v1::TENSOR_KIND_KEY) {
      add(plan.layers[static_cast<size_t>(tensor.descriptor.layer())].tensors(0));
    }
    if (tensor.descriptor.kind() != v1::TENSOR_KIND_ACCUMULATED_SCORES) tensors.push_back(tensor);
  }
  apply.tensors = std::move(tensors);
  return Exchange(stub, Call::kApply, apply);
}

TEST_F(CompressTest, PlanThenApplyIsCompressByteForByte) {
  for (const char* preset : {"dynsplit", "snapkv", "chunkkv", "streamingllm", "dynsplit_index"}) {
    for (const v1::Scope scope : {v1::SCOPE_GLOBAL, v1::SCOPE_LAYER}) {
      SCOPED_TRACE(preset);
      Script script = SampleScript("prose");
      v1::Policy& policy = *script.begin.mutable_policy();
      policy.set_preset(preset);
      policy.set_scope(scope);
      policy.mutable_protection()->add_dense_layers(1);
      if (scope == v1::SCOPE_LAYER && std::string(preset) == "dynsplit") {
        policy.set_positions(v1::POSITIONS_CONTIGUOUS);
        policy.mutable_encoding()->set_key(v1::Encoding::FORMAT_INT8);
      }
      const Reply compressed = Exchange(*tcp_, Call::kCompress, script);
      ASSERT_NO_FATAL_FAILURE(ExpectGood(compressed, script.begin.shape()));
      Reply plan;
      const Reply applied = PlanThenApply(*tcp_, script, plan);
      ASSERT_NO_FATAL_FAILURE(ExpectGood(applied, script.begin.shape()));
      EXPECT_EQ(plan.end.plan().hash(), compressed.end.plan().hash());
      EXPECT_EQ(applied.end.plan().hash(), compressed.end.plan().hash());
      EXPECT_EQ(applied.end.representation_salt(), compressed.end.representation_salt());
      for (size_t l = 0; l < compressed.layers.size(); ++l) {
        for (const v1::TensorDescriptor& descriptor : compressed.layers[l].tensors()) {
          EXPECT_EQ(applied.Bytes(applied.layers[l], descriptor.kind()),
                    compressed.bytes.at(descriptor.id()))
              << v1::TensorKind_Name(descriptor.kind());
        }
      }
      EXPECT_TRUE(compressed.layers[1].plan().dense());
    }
  }
}

TEST_F(CompressTest, PlanNeedsNoValuesAndWithRecencyNoKeys) {
  Script script = MakeScript();
  std::erase_if(script.tensors, [](const Tensor& tensor) { return tensor.descriptor.has_layer(); });
  script.begin.mutable_policy()->set_preset("streamingllm");
  script.begin.set_no_receipt(true);
  const Reply reply = Exchange(*tcp_, Call::kPlan, script);
  ASSERT_NO_FATAL_FAILURE(ExpectGood(reply, script.begin.shape()));
  const std::vector<int32_t> kept = reply.Ints(reply.layers[0], v1::TENSOR_KIND_KEPT_TOKENS);
  ASSERT_EQ(kept.size(), 48U);
  EXPECT_EQ(kept[3], 3);
  EXPECT_EQ(kept[4], 96 - 44);
}

TEST_F(CompressTest, ShadowReturnsTheOriginalsAndTheWouldBeReceipt) {
  for (const v1::Scope scope : {v1::SCOPE_LAYER, v1::SCOPE_GLOBAL}) {
    Script script = SampleScript("code");
    script.begin.mutable_policy()->set_scope(scope);
    const Reply real = Exchange(*tcp_, Call::kCompress, script);
    script.begin.set_shadow(true);
    const Reply shadow = Exchange(*tcp_, Call::kCompress, script);
    ASSERT_NO_FATAL_FAILURE(ExpectGood(shadow, script.begin.shape()));
    EXPECT_EQ(shadow.layers[0].plan().num_kept_tokens(), script.begin.shape().num_tokens());
    ASSERT_NO_FATAL_FAILURE(
        ExpectRowsOfKeptTokens(script, shadow, v1::TENSOR_KIND_KEY, v1::TENSOR_KIND_KEY_PAGES));
    ASSERT_NO_FATAL_FAILURE(
        ExpectRowsOfKeptTokens(script, shadow, v1::TENSOR_KIND_VALUE, v1::TENSOR_KIND_VALUE_PAGES));
    EXPECT_EQ(shadow.end.shadow_bytes_out(), real.end.bytes_out());
    EXPECT_EQ(shadow.end.receipt().SerializeAsString(), real.end.receipt().SerializeAsString());
    EXPECT_EQ(shadow.end.representation_salt(), "");
  }
}

TEST_F(CompressTest, LayoutsDoNotChangeTheResult) {
  Script dense = MakeScript();
  const Reply expected = Exchange(*tcp_, Call::kCompress, dense);
  ASSERT_NO_FATAL_FAILURE(ExpectGood(expected, dense.begin.shape()));
  constexpr size_t kRow = 32;  // 16 channels of bf16
  constexpr size_t kTokens = 96;
  constexpr size_t kHeads = 2;
  constexpr size_t kSlots = 10;  // a partial last page
  constexpr size_t kPages = 12;

  Script paged = dense;
  Script packed = dense;
  std::vector<int32_t> table((kTokens + kSlots - 1) / kSlots);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>((i * 7 + 3) % kPages);
  const auto dim = [](Tensor& tensor, v1::Axis axis, int64_t size, size_t stride) {
    v1::Dim& added = *tensor.descriptor.add_dims();
    added.set_axis(axis);
    added.set_size(size);
    added.set_stride_bytes(static_cast<int64_t>(stride));
  };
  for (int32_t layer = 0; layer < 2; ++layer) {
    // Pages of [head, slot, channel].
    for (const v1::TensorKind kind : {v1::TENSOR_KIND_KEY, v1::TENSOR_KIND_VALUE}) {
      Tensor& tensor = Find(paged, kind, layer);
      const std::string rows = tensor.bytes;
      tensor.bytes.assign(kPages * kHeads * kSlots * kRow, '\x11');
      for (size_t t = 0; t < kTokens; ++t) {
        for (size_t h = 0; h < kHeads; ++h) {
          const auto page = static_cast<size_t>(table[t / kSlots]);
          tensor.bytes.replace(((page * kHeads + h) * kSlots + t % kSlots) * kRow, kRow,
                               rows.substr((t * kHeads + h) * kRow, kRow));
        }
      }
      tensor.descriptor.set_byte_size(static_cast<int64_t>(tensor.bytes.size()));
      dim(tensor, v1::AXIS_PAGE, kPages, kHeads * kSlots * kRow);
      dim(tensor, v1::AXIS_HEAD, kHeads, kSlots * kRow);
      dim(tensor, v1::AXIS_TOKEN, kSlots, kRow);
      dim(tensor, v1::AXIS_CHANNEL, 16, 2);
    }
    // [head, token, kv, channel]: K and V packed in the last dimension.
    Tensor& both = Find(packed, v1::TENSOR_KIND_KEY, layer);
    const std::string keys = both.bytes;
    const std::string values = Find(packed, v1::TENSOR_KIND_VALUE, layer).bytes;
    both.bytes.assign(keys.size() * 2, '\0');
    for (size_t t = 0; t < kTokens; ++t) {
      for (size_t h = 0; h < kHeads; ++h) {
        const size_t from = (t * kHeads + h) * kRow;
        const size_t to = (h * kTokens + t) * 2 * kRow;
        both.bytes.replace(to, kRow, keys.substr(from, kRow));
        both.bytes.replace(to + kRow, kRow, values.substr(from, kRow));
      }
    }
    both.descriptor.set_kind(v1::TENSOR_KIND_KEY_VALUE);
    both.descriptor.set_byte_size(static_cast<int64_t>(both.bytes.size()));
    dim(both, v1::AXIS_HEAD, kHeads, kTokens * 2 * kRow);
    dim(both, v1::AXIS_TOKEN, kTokens, 2 * kRow);
    dim(both, v1::AXIS_KV, 2, kRow);
    dim(both, v1::AXIS_CHANNEL, 16, 2);
    std::erase_if(packed.tensors, [&](const Tensor& tensor) {
      return tensor.descriptor.kind() == v1::TENSOR_KIND_VALUE &&
             tensor.descriptor.layer() == layer;
    });
  }
  Tensor block_table;
  block_table.descriptor.set_id(500);
  block_table.descriptor.set_kind(v1::TENSOR_KIND_BLOCK_TABLE);
  block_table.descriptor.set_dtype(v1::DTYPE_INT32);
  block_table.bytes.assign(reinterpret_cast<const char*>(table.data()), table.size() * 4);
  block_table.descriptor.set_byte_size(static_cast<int64_t>(block_table.bytes.size()));
  paged.tensors.insert(paged.tensors.begin(), block_table);
  for (Script* script : {&paged, &packed}) {
    script->chunk_bytes = 777;  // chunks that cut rows
    const Reply reply = Exchange(*unix_, Call::kCompress, *script);
    ASSERT_NO_FATAL_FAILURE(ExpectGood(reply, script->begin.shape()));
    EXPECT_EQ(reply.end.plan().hash(), expected.end.plan().hash());
    for (size_t l = 0; l < 2; ++l) {
      for (const auto kind : {v1::TENSOR_KIND_KEY_PAGES, v1::TENSOR_KIND_VALUE_PAGES}) {
        EXPECT_EQ(reply.Bytes(reply.layers[l], kind), expected.Bytes(expected.layers[l], kind));
      }
    }
  }
}

TEST_F(CompressTest, QuantizedInputPassesThroughWithItsScales) {
  Script script = MakeScript();
  script.begin.mutable_policy()->set_scope(v1::SCOPE_LAYER);
  for (int32_t layer = 0; layer < 2; ++layer) {
    for (const bool key : {true, false}) {
      Tensor& data = Find(script, key ? v1::TENSOR_KIND_KEY : v1::TENSOR_KIND_VALUE, layer);
      data.descriptor.set_dtype(v1::DTYPE_INT8);
      data.bytes.resize(data.bytes.size() / 2);
      for (size_t i = 0; i < data.bytes.size(); ++i)
        data.bytes[i] = static_cast<char>(i * 37 % 251);
      data.descriptor.set_byte_size(static_cast<int64_t>(data.bytes.size()));
      Tensor scales;
      scales.descriptor.set_id(static_cast<uint32_t>(700 + layer * 2 + (key ? 0 : 1)));
      scales.descriptor.set_kind(key ? v1::TENSOR_KIND_KEY_SCALES : v1::TENSOR_KIND_VALUE_SCALES);
      scales.descriptor.set_layer(layer);
      scales.descriptor.set_dtype(v1::DTYPE_FLOAT32);
      for (int i = 0; i < 96 * 2; ++i) {
        const float scale = 0.01F * static_cast<float>(1 + i % 5);
        scales.bytes.append(reinterpret_cast<const char*>(&scale), 4);
      }
      scales.descriptor.set_byte_size(static_cast<int64_t>(scales.bytes.size()));
      const auto place =
          std::find_if(script.tensors.begin(), script.tensors.end(), [&](const Tensor& t) {
            return t.descriptor.has_layer() && t.descriptor.layer() > layer;
          });
      script.tensors.insert(place, std::move(scales));
    }
  }
  const Reply reply = Exchange(*tcp_, Call::kCompress, script);
  ASSERT_NO_FATAL_FAILURE(ExpectGood(reply, script.begin.shape()));
  ASSERT_NO_FATAL_FAILURE(
      ExpectRowsOfKeptTokens(script, reply, v1::TENSOR_KIND_KEY, v1::TENSOR_KIND_KEY_PAGES));
  const v1::LayerResult& layer = reply.layers[1];
  const std::vector<int32_t> kept = reply.Ints(layer, v1::TENSOR_KIND_KEPT_TOKENS);
  const std::string& scales = reply.Bytes(layer, v1::TENSOR_KIND_VALUE_PAGE_SCALES);
  const std::string& source = Find(script, v1::TENSOR_KIND_VALUE_SCALES, 1).bytes;
  for (size_t slot = 0; slot < kept.size(); ++slot) {
    EXPECT_EQ(scales.substr(slot * 8, 8), source.substr(static_cast<size_t>(kept[slot]) * 8, 8));
  }
}

TEST_F(CompressTest, CalibrateReturnsAProfile) {
  Script script = MakeScript({.num_tokens = 512, .num_queries = 512});
  Tensor positions;
  positions.descriptor.set_id(900);
  positions.descriptor.set_kind(v1::TENSOR_KIND_QUERY_POSITIONS);
  positions.descriptor.set_dtype(v1::DTYPE_INT32);
  for (int32_t i = 0; i < 512; ++i) positions.bytes.append(reinterpret_cast<const char*>(&i), 4);
  positions.descriptor.set_byte_size(static_cast<int64_t>(positions.bytes.size()));
  script.tensors.insert(script.tensors.begin(), positions);
  std::string& ids = Find(script, v1::TENSOR_KIND_TOKEN_IDS).bytes;
  for (size_t i = 0; i < 512; i += 16) {
    const int32_t id = 7;
    std::memcpy(&ids[i * 4], &id, 4);
  }
  script.begin.mutable_calibration()->add_candidate_token_ids(7);
  std::erase_if(script.tensors, [](const Tensor& tensor) {
    return tensor.descriptor.kind() == v1::TENSOR_KIND_VALUE;
  });
  const Reply reply = Exchange(*tcp_, Call::kCalibrate, script);
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  ASSERT_GE(reply.end.profile().weights_size(), 1);
  const auto& weights = reply.end.profile().weights();
  const auto seven = std::find_if(weights.begin(), weights.end(),
                                  [](const auto& weight) { return weight.token_id() == 7; });
  ASSERT_NE(seven, weights.end());
  EXPECT_GT(seven->num_occurrences(), 4);
}

TEST_F(CompressTest, FallbackIsNamed) {
  Script script = MakeScript({.num_queries = 0});
  script.begin.mutable_policy()->set_allow_fallback(true);
  const Reply reply = Exchange(*tcp_, Call::kCompress, script);
  ASSERT_NO_FATAL_FAILURE(ExpectGood(reply, script.begin.shape()));
  EXPECT_EQ(reply.end.plan().fallback_preset(), "dynsplit_keys");
  EXPECT_EQ(reply.end.plan().evidence(), v1::EVIDENCE_KEYS);
  EXPECT_TRUE(std::isnan(reply.end.receipt().retained_attention_mass_mean()));
}

TEST_F(CompressTest, QualityFloorRaisesTheBudget) {
  Script script = SampleScript("prose");
  script.begin.mutable_policy()->mutable_budget()->set_kept_ratio(0.05);
  const Reply low = Exchange(*tcp_, Call::kCompress, script);
  script.begin.mutable_policy()->mutable_quality_floor()->set_min_retained_attention_mass(0.9);
  const Reply floor = Exchange(*tcp_, Call::kCompress, script);
  ASSERT_NO_FATAL_FAILURE(ExpectGood(floor, script.begin.shape()));
  EXPECT_LT(low.end.receipt().layers(0).retained_attention_mass_mean(), 0.9);
  for (const v1::LayerReceipt& receipt : floor.end.receipt().layers()) {
    EXPECT_GE(receipt.retained_attention_mass_mean(), 0.9);
  }
}

}  // namespace
}  // namespace dynsplit::e2e

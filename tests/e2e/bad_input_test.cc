// SPDX-License-Identifier: Apache-2.0
//
// What a caller can do wrong, one row each: how, the code, and what the error must name. After
// every row the same server serves a good request and holds no memory.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "server/pipeline/policy.h"
#include "tests/e2e/harness.h"

namespace dynsplit::e2e {
namespace {

using Code = absl::StatusCode;
using MessageList = std::vector<v1::CompressRequest>;

struct BadCase {
  const char* name;
  Code code;
  // Part of the violated field's path, the precondition's type, the resource or the reason.
  const char* names;
  std::function<void(Script&)> edit_script = [](Script&) {};
  std::function<void(MessageList&)> edit_messages = [](MessageList&) {};
  Call call = Call::kCompress;
};

void PrintTo(const BadCase& bad, std::ostream* stream) { *stream << bad.name; }

v1::TensorDescriptor& Key(Script& script, int32_t layer = 0) {
  return Find(script, v1::TENSOR_KIND_KEY, layer).descriptor;
}

void Put(Tensor& tensor, size_t index, uint16_t bits) {
  std::memcpy(&tensor.bytes[index * 2], &bits, 2);
}

void PutInt(Tensor& tensor, size_t index, int32_t value) {
  std::memcpy(&tensor.bytes[index * 4], &value, 4);
}

constexpr uint16_t kNaN = 0x7fc0;
constexpr uint16_t kInfinity = 0x7f80;

void AddDim(v1::TensorDescriptor& descriptor, v1::Axis axis, int64_t size, int64_t stride) {
  v1::Dim& dim = *descriptor.add_dims();
  dim.set_axis(axis);
  dim.set_size(size);
  dim.set_stride_bytes(stride);
}

// Dense dims of a key of the base script: [96, 2, 16] bf16.
v1::TensorDescriptor& WithDims(Script& script) {
  v1::TensorDescriptor& key = Key(script);
  AddDim(key, v1::AXIS_TOKEN, 96, 64);
  AddDim(key, v1::AXIS_HEAD, 2, 32);
  AddDim(key, v1::AXIS_CHANNEL, 16, 2);
  return key;
}

Tensor MakeTensor(v1::TensorKind kind, int32_t layer, v1::DType dtype, size_t bytes) {
  Tensor tensor;
  tensor.descriptor.set_id(600 + static_cast<uint32_t>(kind));
  tensor.descriptor.set_kind(kind);
  if (layer >= 0) tensor.descriptor.set_layer(layer);
  tensor.descriptor.set_dtype(dtype);
  tensor.descriptor.set_byte_size(static_cast<int64_t>(bytes));
  tensor.bytes.assign(bytes, '\0');
  return tensor;
}

// Pages of 16 slots behind a block table.
void MakePaged(Script& script, int32_t entry) {
  for (const v1::TensorKind kind : {v1::TENSOR_KIND_KEY, v1::TENSOR_KIND_VALUE}) {
    for (int32_t layer = 0; layer < 2; ++layer) {
      v1::TensorDescriptor& descriptor = Find(script, kind, layer).descriptor;
      AddDim(descriptor, v1::AXIS_PAGE, 6, 16 * 64);
      AddDim(descriptor, v1::AXIS_TOKEN, 16, 64);
      AddDim(descriptor, v1::AXIS_HEAD, 2, 32);
      AddDim(descriptor, v1::AXIS_CHANNEL, 16, 2);
    }
  }
  Tensor table = MakeTensor(v1::TENSOR_KIND_BLOCK_TABLE, -1, v1::DTYPE_INT32, 24);
  for (int32_t i = 0; i < 6; ++i) PutInt(table, static_cast<size_t>(i), i);
  PutInt(table, 3, entry);
  script.tensors.insert(script.tensors.begin(), table);
}

// int8 keys whose scales are all `scale`.
void MakeQuantized(Script& script, float scale) {
  for (int32_t layer = 0; layer < 2; ++layer) {
    Tensor& key = Find(script, v1::TENSOR_KIND_KEY, layer);
    key.descriptor.set_dtype(v1::DTYPE_INT8);
    key.bytes.resize(key.bytes.size() / 2);
    key.descriptor.set_byte_size(static_cast<int64_t>(key.bytes.size()));
    Tensor scales = MakeTensor(v1::TENSOR_KIND_KEY_SCALES, layer, v1::DTYPE_FLOAT32, 8);
    scales.descriptor.set_scale_granularity(v1::SCALE_GRANULARITY_HEAD);
    scales.descriptor.set_id(800 + static_cast<uint32_t>(layer));
    // Only layer 0 goes wrong: layers are worked on side by side, and either could be first to say
    // so.
    const float value = layer == 0 ? scale : 1;
    std::memcpy(&scales.bytes[0], &value, 4);
    std::memcpy(&scales.bytes[4], &value, 4);
    const auto place = layer == 1 ? script.tensors.end() : script.tensors.begin() + 4;
    script.tensors.insert(place, scales);
  }
}

void Erase(Script& script, v1::TensorKind kind) {
  std::erase_if(script.tensors,
                [&](const Tensor& tensor) { return tensor.descriptor.kind() == kind; });
}

// An Apply of all 96 tokens in every layer; tokens of layer 0 as given.
void MakeApply(Script& script, const std::vector<int32_t>& kept) {
  v1::Plan& plan = *script.begin.mutable_plan();
  *plan.mutable_shape() = script.begin.shape();
  *plan.mutable_policy() = script.begin.policy();
  plan.mutable_policy()->set_preset("streamingllm");
  script.begin.clear_policy();
  plan.set_policy_version(kPolicyVersion);
  plan.set_evidence(v1::EVIDENCE_NONE);
  plan.set_num_blocks(1);
  plan.set_hash(std::string(32, '0'));
  Erase(script, v1::TENSOR_KIND_QUERIES);
  Erase(script, v1::TENSOR_KIND_TOKEN_IDS);
  for (int32_t layer = 0; layer < 2; ++layer) {
    v1::LayerPlan& added = *plan.add_layers();
    added.set_layer(layer);
    added.set_num_groups(1);
    added.set_num_kept_tokens(static_cast<int64_t>(kept.size()));
    added.set_hash(std::string(32, '0'));
    Tensor tokens =
        MakeTensor(v1::TENSOR_KIND_KEPT_TOKENS, layer, v1::DTYPE_INT32, kept.size() * 4);
    tokens.descriptor.set_id(900 + static_cast<uint32_t>(layer));
    std::memcpy(tokens.bytes.data(), kept.data(), kept.size() * 4);
    script.tensors.insert(script.tensors.begin() + 3 * layer, tokens);
  }
  Tensor starts = MakeTensor(v1::TENSOR_KIND_BLOCK_STARTS, -1, v1::DTYPE_INT32, 8);
  PutInt(starts, 1, 96);
  script.tensors.insert(script.tensors.begin(), starts);
}

constexpr auto kInvalid = Code::kInvalidArgument;
constexpr auto kMissing = Code::kFailedPrecondition;
constexpr auto kLacking = Code::kUnimplemented;

std::vector<BadCase> StreamCases() {
  return {
      {"EmptyStream", kInvalid, "end", {}, [](MessageList& m) { m.clear(); }},
      {"BeginOnly", kInvalid, "end", {}, [](MessageList& m) { m.resize(1); }},
      {"TruncatedStream", kInvalid, "end", {}, [](MessageList& m) { m.resize(3); }},
      {"NoBegin", kInvalid, "begin", {}, [](MessageList& m) { m.erase(m.begin()); }},
      {"EndFirst", kInvalid, "begin", {}, [](MessageList& m) { std::swap(m.front(), m.back()); }},
      {"BeginTwice", kInvalid, "begin", {}, [](MessageList& m) { m.insert(m.begin(), m.front()); }},
      {"EmptyMessage", kInvalid, "begin", {}, [](MessageList& m) { m.emplace(m.begin()); }},
      {"BeginAndEndTogether",
       kInvalid,
       "begin",
       {},
       [](MessageList& m) { m.front().mutable_end()->set_num_tensors(7); }},
      {"BeginWithData", kInvalid, "", {}, [](MessageList& m) { m.front().set_data("x"); }},
      {"MissingChunk", kInvalid, "offset", [](Script& s) { s.chunk_bytes = 100; },
       [](MessageList& m) { m.erase(m.begin() + 2); }},
      {"RepeatedChunk", kInvalid, "offset", [](Script& s) { s.chunk_bytes = 100; },
       [](MessageList& m) { m.insert(m.begin() + 1, m[1]); }},
      {"OverlappingChunk", kInvalid, "offset", [](Script& s) { s.chunk_bytes = 100; },
       [](MessageList& m) { m[2].set_offset(50); }},
      {"HugeOffset",
       kInvalid,
       "offset",
       {},
       [](MessageList& m) { m[1].set_offset(std::numeric_limits<uint64_t>::max() - 3); }},
      {"ChunkPastTheEnd",
       kInvalid,
       "data",
       {},
       [](MessageList& m) { m[1].set_data(m[1].data() + "more"); }},
      {"LastTooEarly", kInvalid, "last", [](Script& s) { s.chunk_bytes = 100; },
       [](MessageList& m) { m[1].set_last(true); }},
      {"LastMissing", kInvalid, "last", {}, [](MessageList& m) { m[1].set_last(false); }},
      {"ChunkOfCompleteTensor",
       kInvalid,
       "tensor",
       {},
       [](MessageList& m) { m.insert(m.begin() + 2, m[1]); }},
      {"UnknownTensor", kInvalid, "tensor", {}, [](MessageList& m) { m[1].set_tensor(4711); }},
      {"OversizedChunk",
       kInvalid,
       "",
       {},
       [](MessageList& m) { m[1].set_data(std::string((3 << 20) + 1, 'x')); }},
      {"MessageOverTheLimit",
       Code::kResourceExhausted,
       "",
       {},
       [](MessageList& m) { m[1].set_data(std::string(9 << 20, 'x')); }},
      {"WrongChunkChecksum",
       Code::kDataLoss,
       "CHECKSUM",
       {},
       [](MessageList& m) { m[1].set_crc32c(m[1].crc32c() ^ 1); }},
      {"WrongTensorChecksum",
       Code::kDataLoss,
       "CHECKSUM",
       {},
       [](MessageList& m) { m[2].set_tensor_crc32c(m[2].tensor_crc32c() ^ 1); }},
      {"FlippedBit",
       Code::kDataLoss,
       "CHECKSUM",
       {},
       [](MessageList& m) { (*m[3].mutable_data())[7] ^= 4; }},
      {"TooManyOpenLayers", kInvalid, "max_open_layers",
       [](Script& s) { s.begin.set_max_open_layers(1); },
       [](MessageList& m) { std::swap(m[2], m[5]); }},
      {"LayersBeforeTokenIds", kInvalid, "max_open_layers",
       [](Script& s) { s.begin.set_max_open_layers(1); },
       [](MessageList& m) { std::rotate(m.begin() + 1, m.begin() + 2, m.end() - 1); }},
      {"EndCountsWrong",
       kInvalid,
       "end.num_tensors",
       {},
       [](MessageList& m) { m.back().mutable_end()->set_num_tensors(3); }},
      {"EndBeforeTheLastTensor",
       kInvalid,
       "tensors[6]",
       {},
       [](MessageList& m) { m.erase(m.end() - 2); }},
      {"ChunkAfterEnd", kInvalid, "end",
       [](Script& s) { s = MakeScript({.num_tokens = 8192, .num_queries = 64}); },
       [](MessageList& m) { m.push_back(m[1]); }},
  };
}

std::vector<BadCase> ShapeCases() {
  const auto shape = [](auto set) { return [set](Script& s) { set(*s.begin.mutable_shape()); }; };
  using Shape = v1::SequenceShape;
  return {
      {"NoShape", kInvalid, "shape", [](Script& s) { s.begin.clear_shape(); }},
      {"ZeroLayers", kInvalid, "shape.num_layers", shape([](Shape& s) { s.set_num_layers(0); })},
      {"TooManyLayers", kInvalid, "shape.num_layers",
       shape([](Shape& s) { s.set_num_layers(1025); })},
      {"ZeroTokens", kInvalid, "shape.num_tokens", shape([](Shape& s) { s.set_num_tokens(0); })},
      {"NegativeTokens", kInvalid, "shape.num_tokens",
       shape([](Shape& s) { s.set_num_tokens(-5); })},
      {"TokensPast31Bits", kInvalid, "shape.num_tokens",
       shape([](Shape& s) { s.set_num_tokens(int64_t{1} << 31); })},
      {"ZeroHeads", kInvalid, "shape.num_kv_heads", shape([](Shape& s) { s.set_num_kv_heads(0); })},
      {"MismatchedGroups", kInvalid, "shape.num_query_heads",
       shape([](Shape& s) { s.set_num_query_heads(5); })},
      {"HeadDimNotOfEight", kInvalid, "shape.head_dim",
       shape([](Shape& s) { s.set_head_dim(12); })},
      {"HeadDimTooLarge", kInvalid, "shape.head_dim", shape([](Shape& s) { s.set_head_dim(520); })},
      {"ShapeLargerThanTensors", kInvalid, "byte_size",
       shape([](Shape& s) { s.set_num_tokens(97); })},
      {"OverflowingShape", kInvalid, "byte_size",
       [](Script& s) {
         s.begin.mutable_shape()->set_num_tokens((int64_t{1} << 31) - 1);
         s.begin.mutable_shape()->set_num_kv_heads(1024);
         s.begin.mutable_shape()->set_num_query_heads(1024);
         s.begin.mutable_shape()->set_head_dim(512);
       }},
      {"LongRequestId", kInvalid, "request_id",
       [](Script& s) { s.begin.set_request_id(std::string(129, 'a')); }},
      {"RequestIdWithNewline", kInvalid, "request_id",
       [](Script& s) { s.begin.set_request_id("a\nb"); }},
      {"LongTenant", kInvalid, "tenant",
       [](Script& s) { s.begin.set_tenant(std::string(65, 't')); }},
      {"NegativeOpenLayers", kInvalid, "max_open_layers",
       [](Script& s) { s.begin.set_max_open_layers(-1); }},
      {"MoreOpenLayersThanLayers", kInvalid, "max_open_layers",
       [](Script& s) { s.begin.set_max_open_layers(3); }},
      {"TinyChunks", kInvalid, "max_chunk_bytes",
       [](Script& s) { s.begin.set_max_chunk_bytes(100); }},
      {"HugeChunks", kInvalid, "max_chunk_bytes",
       [](Script& s) { s.begin.set_max_chunk_bytes(4 << 20); }},
      {"ShardsWithoutRequestId", kInvalid, "request_id",
       [](Script& s) { s.begin.set_num_shards(2); }},
      {"TooManyShards", kInvalid, "num_shards", [](Script& s) { s.begin.set_num_shards(17); }},
      {"NegativeShard", kInvalid, "shard_index", [](Script& s) { s.begin.set_shard_index(-1); }},
      {"LaterShardWithAShape", kInvalid, "shard_index",
       [](Script& s) {
         s.begin.set_request_id("later");
         s.begin.set_num_shards(2);
         s.begin.set_shard_index(1);
       }},
      {"ShardOutOfRange", kInvalid, "shard_index", [](Script& s) { s.begin.set_shard_index(1); }},
      {"RequestTooLarge", Code::kResourceExhausted, "REQUEST_TOO_LARGE",
       [](Script& s) {
         s.begin.mutable_shape()->set_num_tokens(int64_t{1} << 24);
         for (Tensor& tensor : s.tensors) {
           const bool ids = tensor.descriptor.kind() == v1::TENSOR_KIND_TOKEN_IDS;
           if (tensor.descriptor.kind() == v1::TENSOR_KIND_QUERIES) continue;
           tensor.descriptor.set_byte_size((int64_t{1} << 24) * (ids ? 4 : 64));
         }
       }},
  };
}

std::vector<BadCase> TensorCases() {
  return {
      {"NoTensors", kInvalid, "tensors", [](Script& s) { s.tensors.clear(); }},
      {"NoKeys", kInvalid, "tensors", [](Script& s) { Erase(s, v1::TENSOR_KIND_KEY); }},
      {"NoValues", kInvalid, "tensors", [](Script& s) { Erase(s, v1::TENSOR_KIND_VALUE); }},
      {"NoTokenIds", kInvalid, "tensors", [](Script& s) { Erase(s, v1::TENSOR_KIND_TOKEN_IDS); }},
      {"LayerWithoutKey", kInvalid, "tensors",
       [](Script& s) { s.tensors.erase(s.tensors.begin() + 4); }},
      {"DuplicateLayer", kInvalid, "tensors[4].kind", [](Script& s) { Key(s, 1).set_layer(0); }},
      {"DuplicateId", kInvalid, "tensors[4].id", [](Script& s) { Key(s, 1).set_id(1); }},
      {"LayerOutOfRange", kInvalid, "tensors[4].layer", [](Script& s) { Key(s, 1).set_layer(2); }},
      {"NegativeLayer", kInvalid, "tensors[4].layer", [](Script& s) { Key(s, 1).set_layer(-1); }},
      {"KeyWithoutLayer", kInvalid, "tensors[1].layer", [](Script& s) { Key(s).clear_layer(); }},
      {"TokenIdsWithLayer", kInvalid, "tensors[0].layer",
       [](Script& s) { s.tensors[0].descriptor.set_layer(0); }},
      {"KindMissing", kInvalid, "tensors[1].kind",
       [](Script& s) { Key(s).set_kind(v1::TENSOR_KIND_UNSPECIFIED); }},
      {"UnknownKind", kInvalid, "tensors[1].kind",
       [](Script& s) { Key(s).set_kind(static_cast<v1::TensorKind>(99)); }},
      {"OutputKind", kInvalid, "tensors[1].kind",
       [](Script& s) { Key(s).set_kind(v1::TENSOR_KIND_KEY_PAGES); }},
      {"AttentionRows", kLacking, "UNSUPPORTED",
       [](Script& s) { Key(s).set_kind(v1::TENSOR_KIND_ATTENTION_ROWS); }},
      {"DTypeMissing", kInvalid, "tensors[1].dtype",
       [](Script& s) { Key(s).set_dtype(v1::DTYPE_UNSPECIFIED); }},
      {"UnknownDType", kInvalid, "tensors[1].dtype",
       [](Script& s) { Key(s).set_dtype(static_cast<v1::DType>(42)); }},
      {"Int4", kLacking, "UNSUPPORTED", [](Script& s) { Key(s).set_dtype(v1::DTYPE_INT4); }},
      {"Int32Keys", kInvalid, "tensors[1].dtype",
       [](Script& s) { Key(s).set_dtype(v1::DTYPE_INT32); }},
      {"FloatTokenIds", kInvalid, "tensors[0].dtype",
       [](Script& s) { s.tensors[0].descriptor.set_dtype(v1::DTYPE_FLOAT32); }},
      {"WrongByteSize", kInvalid, "tensors[1].byte_size",
       [](Script& s) { Key(s).set_byte_size(96 * 64 - 2); }},
      {"ZeroByteSize", kInvalid, "tensors[1].byte_size",
       [](Script& s) { Key(s).set_byte_size(0); }},
      {"NegativeByteSize", kInvalid, "tensors[1].byte_size",
       [](Script& s) { Key(s).set_byte_size(-1); }},
      {"HugeByteSize", kInvalid, "tensors[1].byte_size",
       [](Script& s) { Key(s).set_byte_size((int64_t{1} << 40) + 1); }},
      {"LayersOfOtherType", kInvalid, "tensors[4].dtype",
       [](Script& s) { Key(s, 1).set_dtype(v1::DTYPE_FLOAT16); }},
      {"RegionLocation", kLacking, "REGIONS_OFF",
       [](Script& s) { Key(s).mutable_location()->mutable_region()->set_name("r"); }},
      {"SessionLocation", kLacking, "LOCATION",
       [](Script& s) { Key(s).mutable_location()->set_session_id("x"); }},
      {"AxisTwice", kInvalid, "dims[3].axis",
       [](Script& s) { AddDim(WithDims(s), v1::AXIS_HEAD, 2, 32); }},
      {"AxisUnknown", kInvalid, "dims[3].axis",
       [](Script& s) { AddDim(WithDims(s), static_cast<v1::Axis>(9), 2, 32); }},
      {"AxisMissing", kInvalid, "tensors[1].dims",
       [](Script& s) { WithDims(s).mutable_dims()->RemoveLast(); }},
      {"DimOfZero", kInvalid, "dims[1].size",
       [](Script& s) { WithDims(s).mutable_dims(1)->set_size(0); }},
      {"DimOfOtherSize", kInvalid, "tensors[1].dims",
       [](Script& s) { WithDims(s).mutable_dims(1)->set_size(3); }},
      {"StrideZero", kInvalid, "dims[0].stride_bytes",
       [](Script& s) { WithDims(s).mutable_dims(0)->set_stride_bytes(0); }},
      {"StrideNegative", kInvalid, "dims[0].stride_bytes",
       [](Script& s) { WithDims(s).mutable_dims(0)->set_stride_bytes(-64); }},
      {"StrideUnaligned", kInvalid, "dims[0].stride_bytes",
       [](Script& s) { WithDims(s).mutable_dims(0)->set_stride_bytes(65); }},
      {"StrideOverlap", kInvalid, "tensors[1].dims",
       [](Script& s) { WithDims(s).mutable_dims(0)->set_stride_bytes(62); }},
      {"StrideOverflow", kInvalid, "tensors[1].dims",
       [](Script& s) {
         WithDims(s).mutable_dims(0)->set_stride_bytes(std::numeric_limits<int64_t>::max() - 1);
       }},
      {"ChannelStride", kInvalid, "tensors[1].dims",
       [](Script& s) { WithDims(s).mutable_dims(2)->set_stride_bytes(4); }},
      {"KvAxisOfKey", kInvalid, "tensors[1].dims",
       [](Script& s) { AddDim(WithDims(s), v1::AXIS_KV, 2, 6144); }},
      {"KeyValueWithoutDims", kInvalid, "tensors[1].dims",
       [](Script& s) { Key(s).set_kind(v1::TENSOR_KIND_KEY_VALUE); }},
      {"PagedWithoutTable", kInvalid, "tensors",
       [](Script& s) {
         MakePaged(s, 0);
         s.tensors.erase(s.tensors.begin());
       }},
      {"TableWithoutPages", kInvalid, "tensors[7].kind",
       [](Script& s) {
         s.tensors.push_back(MakeTensor(v1::TENSOR_KIND_BLOCK_TABLE, -1, v1::DTYPE_INT32, 24));
       }},
      {"TableTooShort", kInvalid, "tensors[0].byte_size",
       [](Script& s) {
         MakePaged(s, 0);
         s.tensors[0].bytes.resize(20);
         s.tensors[0].descriptor.set_byte_size(20);
       }},
      {"PageOutOfRange", kInvalid, "tensors[0]", [](Script& s) { MakePaged(s, 6); }},
      {"PageNegative", kInvalid, "tensors[0]", [](Script& s) { MakePaged(s, -1); }},
      {"ScalesMissing", kInvalid, "tensors[1]",
       [](Script& s) {
         MakeQuantized(s, 1);
         Erase(s, v1::TENSOR_KIND_KEY_SCALES);
       }},
      {"ScalesWithoutNeed", kInvalid, ".kind",
       [](Script& s) {
         Tensor scales = MakeTensor(v1::TENSOR_KIND_KEY_SCALES, 0, v1::DTYPE_FLOAT32, 8);
         s.tensors.insert(s.tensors.begin() + 4, scales);
         scales.descriptor.set_layer(1);
         scales.descriptor.set_id(999);
         s.tensors.push_back(scales);
       }},
      {"ScaleZero", kInvalid, "tensors[4]", [](Script& s) { MakeQuantized(s, 0); }},
      {"ScaleNegative", kInvalid, "tensors[4]", [](Script& s) { MakeQuantized(s, -1); }},
      {"ScaleNaN", kInvalid, "tensors[4]",
       [](Script& s) { MakeQuantized(s, std::numeric_limits<float>::quiet_NaN()); }},
      {"ScaleInfinite", kInvalid, "tensors[4]",
       [](Script& s) { MakeQuantized(s, std::numeric_limits<float>::infinity()); }},
      {"TooManyQueries", kInvalid, "tensors[3]",
       [](Script& s) { s = MakeScript({.num_queries = 96}); }},
      {"LseOfOtherSize", kInvalid, ".byte_size",
       [](Script& s) {
         for (int32_t layer = 0; layer < 2; ++layer) {
           Tensor lse = MakeTensor(v1::TENSOR_KIND_LOG_SUM_EXP, layer, v1::DTYPE_FLOAT32, 64);
           lse.descriptor.set_id(500 + static_cast<uint32_t>(layer));
           s.tensors.push_back(lse);
         }
       }},
      {"KeptTokensInCompress", kInvalid, ".kind",
       [](Script& s) {
         for (int32_t layer = 0; layer < 2; ++layer) {
           Tensor kept = MakeTensor(v1::TENSOR_KIND_KEPT_TOKENS, layer, v1::DTYPE_INT32, 64);
           kept.descriptor.set_id(500 + static_cast<uint32_t>(layer));
           s.tensors.push_back(kept);
         }
       }},
  };
}

std::vector<BadCase> DataCases() {
  return {
      {"NaNInKeys", kInvalid, "key", [](Script& s) { Put(s.tensors[1], 100, kNaN); }},
      {"InfinityInKeys", kInvalid, "key", [](Script& s) { Put(s.tensors[4], 3000, kInfinity); }},
      {"NaNInValues", kInvalid, "value", [](Script& s) { Put(s.tensors[2], 0, kNaN); }},
      {"InfinityInQueries", kInvalid, "quer", [](Script& s) { Put(s.tensors[6], 1, kInfinity); }},
      {"NegativeTokenId", kInvalid, "tensors[0]", [](Script& s) { PutInt(s.tensors[0], 9, -1); }},
      {"SmallestTokenId", kInvalid, "tensors[0]",
       [](Script& s) { PutInt(s.tensors[0], 95, std::numeric_limits<int32_t>::min()); }},
      {"NaNInKeysGlobally", kInvalid, "key",
       [](Script& s) {
         s.begin.mutable_policy()->set_scope(v1::SCOPE_GLOBAL);
         Put(s.tensors[4], 100, kNaN);
       }},
  };
}

std::vector<BadCase> PolicyCases() {
  const auto policy = [](auto set) { return [set](Script& s) { set(*s.begin.mutable_policy()); }; };
  using P = v1::Policy;
  return {
      {"PresetUnknown", Code::kNotFound, "preset", policy([](P& p) { p.set_preset("snapkw"); })},
      {"ProfileUnknown", Code::kNotFound, "profile",
       policy([](P& p) { p.mutable_segmentation()->set_profile("nobody"); })},
      {"UnknownScope", kInvalid, "policy.scope",
       policy([](P& p) { p.set_scope(static_cast<v1::Scope>(77)); })},
      {"UnknownScoring", kInvalid, "policy.scoring.method",
       policy([](P& p) { p.mutable_scoring()->set_method(static_cast<v1::Scoring::Method>(50)); })},
      {"PqCodes", kLacking, "UNSUPPORTED",
       policy([](P& p) { p.mutable_scoring()->set_method(v1::Scoring::METHOD_PQ_CODES); })},
      {"Merge", kLacking, "UNSUPPORTED",
       policy([](P& p) { p.set_transform(v1::TRANSFORM_MERGE); })},
      {"Pyramid", kLacking, "UNSUPPORTED",
       policy([](P& p) { p.mutable_budget()->set_method(v1::Budget::METHOD_PYRAMID); })},
      {"Int4Encoding", kLacking, "UNSUPPORTED",
       policy([](P& p) { p.mutable_encoding()->set_key(v1::Encoding::FORMAT_INT4); })},
      {"RatioZero", kInvalid, "policy.budget.kept_ratio",
       policy([](P& p) { p.mutable_budget()->set_kept_ratio(0); })},
      {"RatioAboveOne", kInvalid, "policy.budget.kept_ratio",
       policy([](P& p) { p.mutable_budget()->set_kept_ratio(1.01); })},
      {"RatioNaN", kInvalid, "policy.budget.kept_ratio", policy([](P& p) {
         p.mutable_budget()->set_kept_ratio(std::numeric_limits<double>::quiet_NaN());
       })},
      {"TokensZero", kInvalid, "policy.budget.tokens_per_head",
       policy([](P& p) { p.mutable_budget()->set_tokens_per_head(0); })},
      {"TokensAboveT", kInvalid, "policy.budget.tokens_per_head",
       policy([](P& p) { p.mutable_budget()->set_tokens_per_head(97); })},
      {"BytesTooFew", kInvalid, "policy.budget.bytes",
       policy([](P& p) { p.mutable_budget()->set_bytes(10); })},
      {"BlockSizeNegative", kInvalid, "policy.segmentation.block_size",
       policy([](P& p) { p.mutable_segmentation()->set_block_size(-1); })},
      {"BlockSizeTooLarge", kInvalid, "policy.segmentation.block_size",
       policy([](P& p) { p.mutable_segmentation()->set_block_size(4097); })},
      {"DeviationTooLarge", kInvalid, "policy.segmentation.max_deviation",
       policy([](P& p) { p.mutable_segmentation()->set_max_deviation(20); })},
      {"BalanceOutside", kInvalid, "policy.segmentation.balance",
       policy([](P& p) { p.mutable_segmentation()->set_balance(1.5); })},
      {"UnknownQueryReduction", kInvalid, "policy.scoring.query_reduction", policy([](P& p) {
         p.mutable_scoring()->set_query_reduction(static_cast<v1::Scoring::QueryReduction>(9));
       })},
      {"SquaresOfKeyNorms", kInvalid, "policy.scoring.query_reduction", policy([](P& p) {
         p.mutable_scoring()->set_method(v1::Scoring::METHOD_KEY_NORM);
         p.mutable_scoring()->set_query_reduction(v1::Scoring::QUERY_REDUCTION_ROOT_MEAN_SQUARE);
       })},
      {"PoolingEven", kInvalid, "policy.scoring.pooling_kernel",
       policy([](P& p) { p.mutable_scoring()->set_pooling_kernel(4); })},
      {"PoolingTooWide", kInvalid, "policy.scoring.pooling_kernel",
       policy([](P& p) { p.mutable_scoring()->set_pooling_kernel(65); })},
      {"RefinementWithoutIndex", kInvalid, "policy.scoring.refinement_factor",
       policy([](P& p) { p.mutable_scoring()->set_refinement_factor(2); })},
      {"ScaleNotFinite", kInvalid, "policy.scoring.softmax_scale", policy([](P& p) {
         p.mutable_scoring()->set_softmax_scale(std::numeric_limits<double>::infinity());
       })},
      {"SinksNegative", kInvalid, "policy.protection.num_sink_tokens",
       policy([](P& p) { p.mutable_protection()->set_num_sink_tokens(-1); })},
      {"RecentAboveT", kInvalid, "policy.protection.num_recent_tokens",
       policy([](P& p) { p.mutable_protection()->set_num_recent_tokens(97); })},
      {"PinnedOutside", kInvalid, "policy.protection.pinned", policy([](P& p) {
         v1::TokenSpan& span = *p.mutable_protection()->add_pinned();
         span.set_begin(90);
         span.set_end(97);
       })},
      {"PinnedReversed", kInvalid, "policy.protection.pinned", policy([](P& p) {
         v1::TokenSpan& span = *p.mutable_protection()->add_pinned();
         span.set_begin(9);
         span.set_end(5);
       })},
      {"DenseLayerOutside", kInvalid, "policy.protection.dense_layers",
       policy([](P& p) { p.mutable_protection()->add_dense_layers(2); })},
      {"PageSizeOdd", kInvalid, "policy.page_size", policy([](P& p) { p.set_page_size(24); })},
      {"FloorAboveOne", kInvalid, "policy.quality_floor.min_retained_attention_mass",
       policy([](P& p) { p.mutable_quality_floor()->set_min_retained_attention_mass(1.5); })},
      {"FloorUnreachable", kMissing, "QUALITY_FLOOR", policy([](P& p) {
         p.mutable_quality_floor()->set_min_retained_attention_mass(0.9999);
         p.mutable_quality_floor()->set_max_kept_ratio(0.5);
       })},
      {"WholeBlocksPerHead", kInvalid, "policy.budget.whole_blocks", policy([](P& p) {
         p.set_scope(v1::SCOPE_LAYER_HEAD);
         p.mutable_budget()->set_whole_blocks(true);
       })},
      {"EvidenceMissing", kMissing, "EVIDENCE_MISSING",
       [](Script& s) { Erase(s, v1::TENSOR_KIND_QUERIES); }},
      {"AccumulatedMissing", kMissing, "EVIDENCE_MISSING",
       policy([](P& p) { p.set_preset("h2o"); })},
      {"ContiguousWithoutRope", kInvalid, "rope",
       policy([](P& p) { p.set_positions(v1::POSITIONS_CONTIGUOUS); })},
      {"RopeThetaTooSmall", kInvalid, "rope.theta",
       [](Script& s) { s.begin.mutable_rope()->set_theta(0.5); }},
      {"RopeOddDim", kInvalid, "rope.rotary_dim",
       [](Script& s) { s.begin.mutable_rope()->set_rotary_dim(7); }},
      {"RopeDimTooLarge", kInvalid, "rope.rotary_dim",
       [](Script& s) { s.begin.mutable_rope()->set_rotary_dim(32); }},
      {"RopeLinearFactor", kInvalid, "rope.scaling_factor",
       [](Script& s) {
         s.begin.mutable_rope()->set_scaling(v1::Rope::SCALING_LINEAR);
         s.begin.mutable_rope()->set_scaling_factor(0.5);
       }},
      {"RopeTableLength", kInvalid, "rope.inverse_frequencies",
       [](Script& s) {
         s.begin.mutable_rope()->set_scaling(v1::Rope::SCALING_TABLE);
         s.begin.mutable_rope()->add_inverse_frequencies(1);
       }},
      {"RopeUnknownScaling", kInvalid, "rope.scaling",
       [](Script& s) { s.begin.mutable_rope()->set_scaling(static_cast<v1::Rope::Scaling>(17)); }},
  };
}

std::vector<BadCase> MethodCases() {
  const auto apply = [](std::vector<int32_t> kept, auto edit) {
    return [kept = std::move(kept), edit](Script& s) {
      MakeApply(s, kept);
      edit(s);
    };
  };
  const auto nothing = [](Script&) {};
  const auto none = [](MessageList&) {};
  return {
      {"PlanInCompress", kInvalid, "plan", [](Script& s) { s.begin.mutable_plan(); }},
      {"ApplyWithoutPlan", kInvalid, "plan", nothing, none, Call::kApply},
      {"ShadowPlan", kInvalid, "shadow", [](Script& s) { s.begin.set_shadow(true); }, none,
       Call::kPlan},
      {"ApplyUnsorted", kInvalid, "kept", apply({5, 3, 9}, nothing), none, Call::kApply},
      {"ApplyRepeated", kInvalid, "kept", apply({5, 5, 9}, nothing), none, Call::kApply},
      {"ApplyOutOfRange", kInvalid, "kept", apply({5, 9, 96}, nothing), none, Call::kApply},
      {"ApplyNegative", kInvalid, "kept", apply({-1, 9, 95}, nothing), none, Call::kApply},
      {"ApplyHashMismatch", kMissing, "PLAN_MISMATCH", apply({5, 9, 95}, nothing), none,
       Call::kApply},
      {"ApplyHashMalformed", kInvalid, "plan.hash",
       apply({5}, [](Script& s) { s.begin.mutable_plan()->set_hash("xyz"); }), none, Call::kApply},
      {"ApplyOtherShape", kInvalid, "plan.shape",
       apply({5}, [](Script& s) { s.begin.mutable_plan()->mutable_shape()->set_num_tokens(95); }),
       none, Call::kApply},
      {"ApplyOtherVersion", kMissing, "PLAN_MISMATCH",
       apply({5}, [](Script& s) { s.begin.mutable_plan()->set_policy_version(99); }), none,
       Call::kApply},
      {"ApplyLayersMissing", kInvalid, "plan.layers",
       apply({5}, [](Script& s) { s.begin.mutable_plan()->mutable_layers()->RemoveLast(); }), none,
       Call::kApply},
      {"ApplyGroups", kInvalid, "num_groups",
       apply({5}, [](Script& s) { s.begin.mutable_plan()->mutable_layers(0)->set_num_groups(3); }),
       none, Call::kApply},
      {"ApplyKeptZero", kInvalid, "num_kept_tokens",
       apply({5},
             [](Script& s) { s.begin.mutable_plan()->mutable_layers(0)->set_num_kept_tokens(0); }),
       none, Call::kApply},
      {"ApplyKeptSize", kInvalid, "byte_size",
       apply({5},
             [](Script& s) { s.begin.mutable_plan()->mutable_layers(0)->set_num_kept_tokens(2); }),
       none, Call::kApply},
      {"ApplyBlockStarts", kInvalid, "", apply({5}, [](Script& s) { PutInt(s.tensors[0], 1, 7); }),
       none, Call::kApply},
      {"CalibrateWithoutPositions", kInvalid, "tensors",
       [](Script& s) { Erase(s, v1::TENSOR_KIND_VALUE); }, none, Call::kCalibrate},
      {"CalibratePositionsUnsorted", kInvalid, "tensors[0]",
       [](Script& s) {
         s.tensors.insert(s.tensors.begin(),
                          MakeTensor(v1::TENSOR_KIND_QUERY_POSITIONS, -1, v1::DTYPE_INT32, 32));
       },
       none, Call::kCalibrate},
      {"CalibrateAlpha", kInvalid, "calibration.alpha",
       [](Script& s) {
         s.begin.mutable_calibration()->set_alpha(17);
         s.tensors.insert(s.tensors.begin(),
                          MakeTensor(v1::TENSOR_KIND_QUERY_POSITIONS, -1, v1::DTYPE_INT32, 32));
       },
       none, Call::kCalibrate},
  };
}

class BadInputTest : public testing::TestWithParam<BadCase> {
 protected:
  static void SetUpTestSuite() { server_ = new TestServer; }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }
  static TestServer* server_;
};
TestServer* BadInputTest::server_ = nullptr;

// Everything an error names, in one line.
std::string NamesOf(const wire::RichError& error) {
  std::string names;
  for (const auto& field : error.fields) names += field.field + " ";
  for (const auto& violation : error.preconditions) names += violation.type + " ";
  return names + error.resource_type + " " + error.reason;
}

TEST_P(BadInputTest, IsRefusedAndTheServerGoesOn) {
  const BadCase& bad = GetParam();
  const std::unique_ptr<Stub> stub = v1::Compression::NewStub(server_->unix_channel());
  Script script = MakeScript();
  if (bad.edit_script) bad.edit_script(script);
  MessageList messages = Messages(script);
  if (bad.edit_messages) bad.edit_messages(messages);
  const Reply reply = Exchange(*stub, bad.call, messages);
  EXPECT_EQ(static_cast<int>(reply.status.error_code()), static_cast<int>(bad.code))
      << reply.status.error_message();
  EXPECT_TRUE(absl::StrContains(NamesOf(reply.error), bad.names))
      << "names '" << NamesOf(reply.error) << "': " << reply.status.error_message();
  EXPECT_FALSE(reply.status.error_message().empty());
  EXPECT_TRUE(server_->ReturnsToBaseline());

  const Reply good = Exchange(*stub, Call::kCompress, MakeScript({.seed = 7}));
  EXPECT_TRUE(good.status.ok()) << good.status.error_message();
  EXPECT_TRUE(server_->ReturnsToBaseline());
}

std::string CaseName(const testing::TestParamInfo<BadCase>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(Stream, BadInputTest, testing::ValuesIn(StreamCases()), CaseName);
INSTANTIATE_TEST_SUITE_P(Shape, BadInputTest, testing::ValuesIn(ShapeCases()), CaseName);
INSTANTIATE_TEST_SUITE_P(Tensor, BadInputTest, testing::ValuesIn(TensorCases()), CaseName);
INSTANTIATE_TEST_SUITE_P(Data, BadInputTest, testing::ValuesIn(DataCases()), CaseName);
INSTANTIATE_TEST_SUITE_P(Policy, BadInputTest, testing::ValuesIn(PolicyCases()), CaseName);
INSTANTIATE_TEST_SUITE_P(Method, BadInputTest, testing::ValuesIn(MethodCases()), CaseName);

}  // namespace
}  // namespace dynsplit::e2e

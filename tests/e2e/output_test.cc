// SPDX-License-Identifier: Apache-2.0
//
// Results in regions: bit for bit what the stream would have carried, where the descriptors say,
// and nothing anywhere else.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "client/cpp/shared_memory.h"
#include "server/pipeline/policy.h"
#include "server/rpc/policy_adapter.h"
#include "tests/e2e/harness.h"
#include "tests/e2e/sequences.h"

namespace dynsplit::e2e {
namespace {

constexpr size_t kRegionBytes = size_t{1} << 20;
constexpr int64_t kBegin = 4096;  // of the room within the region
constexpr std::byte kUntouched{0xEE};

class OutputTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { server_ = new SessionServer; }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }
  void SetUp() override {
    memory_ = *SharedMemory::Create(kRegionBytes);
    writable_ = Register("out", true);
  }
  void TearDown() override {
    for (const char* name : {"out", "readable"}) {
      v1::UnregisterRegionRequest request;
      request.set_name(name);
      (void)server_->client().UnregisterRegion(request);
    }
    EXPECT_TRUE(server_->server().ReturnsToBaseline());
  }

  uint64_t Register(const std::string& name, bool writable) {
    const auto region = server_->client().RegisterRegion(memory_->Registration(name, writable));
    EXPECT_TRUE(region.ok()) << region.status();
    return region.ok() ? region->generation() : 0;
  }
  void Offer(v1::Begin& begin, int64_t byte_size = 0) {
    *begin.mutable_output()->mutable_region() = SliceOf("out", writable_, kBegin);
    begin.mutable_output()->set_byte_size(byte_size);
    std::fill(memory_->bytes().begin(), memory_->bytes().end(), kUntouched);
  }

  // The reply as if the stream had carried everything. Checks the places.
  void Inline(Reply& reply) {
    std::vector<std::pair<int64_t, int64_t>> places;
    for (v1::LayerResult& layer : reply.layers) {
      for (v1::TensorDescriptor& tensor : *layer.mutable_tensors()) {
        ASSERT_EQ(tensor.location().region().name(), "out");
        ASSERT_EQ(tensor.location().region().generation(), writable_);
        ASSERT_FALSE(reply.bytes.contains(tensor.id())) << "sent, too";
        const absl::Span<const std::byte> bytes = PlacedBytes(tensor, memory_->bytes());
        ASSERT_EQ(static_cast<int64_t>(bytes.size()), tensor.byte_size());
        const int64_t begin = tensor.location().region().offset_bytes();
        EXPECT_EQ(begin % 256, 0);
        places.emplace_back(begin, begin + tensor.byte_size());
        reply.bytes[tensor.id()].assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
        tensor.clear_location();
      }
    }
    std::sort(places.begin(), places.end());
    ASSERT_FALSE(places.empty());
    EXPECT_EQ(places.front().first, kBegin);
    for (size_t i = 1; i < places.size(); ++i) {
      EXPECT_EQ(places[i].first, (places[i - 1].second + 255) / 256 * 256)
          << "a gap, or an overlap";
    }
    const auto outside = [&](size_t begin, size_t end) {
      const auto bytes = memory_->bytes();
      return std::all_of(bytes.begin() + static_cast<int64_t>(begin),
                         bytes.begin() + static_cast<int64_t>(end),
                         [](std::byte b) { return b == kUntouched; });
    };
    EXPECT_TRUE(outside(0, kBegin));
    EXPECT_TRUE(outside(static_cast<size_t>(places.back().second), kRegionBytes));
    used_bytes_ = places.back().second - kBegin;
  }

  static void ExpectSame(const Reply& placed, const Reply& sent) {
    ASSERT_EQ(placed.layers.size(), sent.layers.size());
    for (size_t i = 0; i < sent.layers.size(); ++i) {
      // Receipts may be NaN, which equals nothing: as text.
      EXPECT_EQ(placed.layers[i].ShortDebugString(), sent.layers[i].ShortDebugString());
    }
    EXPECT_TRUE(placed.bytes == sent.bytes);
    EXPECT_EQ(placed.end.plan().hash(), sent.end.plan().hash());
    EXPECT_EQ(placed.end.bytes_out(), sent.end.bytes_out());
    EXPECT_EQ(placed.end.representation_salt(), sent.end.representation_salt());
  }

  // Sent as `script` says, then with its results in the region.
  void ExpectSameInRegion(const Script& script, Call call) {
    const Reply sent = Exchange(*stub_, call, script);
    Script offered = script;
    Offer(offered.begin);
    Reply placed = Exchange(*stub_, call, offered);
    ASSERT_EQ(placed.status.error_code(), sent.status.error_code())
        << placed.status.error_message() << " against " << sent.status.error_message();
    if (!sent.status.ok()) return;
    ++num_compared_;
    ASSERT_NO_FATAL_FAILURE(Inline(placed));
    EXPECT_EQ(placed.wire_problem, "");
    ExpectSame(placed, sent);
  }

  static SessionServer* server_;
  std::unique_ptr<Stub> stub_ = v1::Compression::NewStub(server_->server().unix_channel());
  std::unique_ptr<SharedMemory> memory_;
  uint64_t writable_ = 0;
  int64_t used_bytes_ = 0;
  int num_compared_ = 0;
};
SessionServer* OutputTest::server_ = nullptr;

Script SmallScript() {
  Script script = MakeScript({.num_layers = 3, .num_tokens = 200});
  script.begin.mutable_rope()->set_theta(10000);
  script.begin.mutable_policy()->Clear();
  return script;
}

TEST_F(OutputTest, EveryPresetScopeAndPosition) {
  Script script = SmallScript();
  for (const Preset& preset : Presets()) {
    for (const v1::Scope scope : {v1::SCOPE_GLOBAL, v1::SCOPE_LAYER, v1::SCOPE_LAYER_HEAD}) {
      for (const v1::Positions positions : {v1::POSITIONS_ORIGINAL, v1::POSITIONS_CONTIGUOUS}) {
        v1::Policy& policy = *script.begin.mutable_policy();
        policy.Clear();
        policy.set_preset(preset.policy.preset);
        policy.set_scope(scope);
        policy.set_positions(positions);
        policy.set_allow_fallback(true);
        SCOPED_TRACE(policy.ShortDebugString());
        ASSERT_NO_FATAL_FAILURE(ExpectSameInRegion(script, Call::kCompress));
      }
    }
  }
  EXPECT_GE(num_compared_, 40);
}

TEST_F(OutputTest, EveryEncoding) {
  Script script = SmallScript();
  for (const char* preset : {"snapkv", "dynsplit_index"}) {
    for (const auto format : {v1::Encoding::FORMAT_AS_IS, v1::Encoding::FORMAT_FLOAT8_E4M3,
                              v1::Encoding::FORMAT_INT8}) {
      for (const auto granularity :
           {v1::SCALE_GRANULARITY_HEAD, v1::SCALE_GRANULARITY_TOKEN_HEAD}) {
        script.begin.mutable_policy()->set_preset(preset);
        v1::Encoding& encoding = *script.begin.mutable_policy()->mutable_encoding();
        encoding.set_key(format);
        encoding.set_value(format);
        encoding.set_scale_granularity(granularity);
        SCOPED_TRACE(script.begin.policy().ShortDebugString());
        ASSERT_NO_FATAL_FAILURE(ExpectSameInRegion(script, Call::kCompress));
      }
    }
  }
  EXPECT_EQ(num_compared_, 12);
}

// Those whose pages are made more than once.
TEST_F(OutputTest, ShadowAndQualityFloors) {
  Script script = SmallScript();
  script.begin.set_shadow(true);
  ASSERT_NO_FATAL_FAILURE(ExpectSameInRegion(script, Call::kCompress));
  script.begin.set_shadow(false);
  v1::Policy& policy = *script.begin.mutable_policy();
  policy.mutable_quality_floor()->set_max_kept_ratio(1);
  policy.mutable_quality_floor()->set_min_retained_attention_mass(0.9);
  ASSERT_NO_FATAL_FAILURE(ExpectSameInRegion(script, Call::kCompress));
  policy.mutable_quality_floor()->set_max_output_relative_error(0.5);
  ASSERT_NO_FATAL_FAILURE(ExpectSameInRegion(script, Call::kCompress));
  EXPECT_EQ(num_compared_, 3);
}

TEST_F(OutputTest, ApplyOfAPlan) {
  const Script script = SmallScript();
  const Reply plan = Exchange(*stub_, Call::kPlan, script);
  ASSERT_TRUE(plan.status.ok()) << plan.status.error_message();
  Script apply = script;
  apply.begin.clear_policy();
  *apply.begin.mutable_plan() = plan.end.plan();
  apply.tensors.clear();
  uint32_t id = 1000;
  const auto add = [&](const v1::TensorDescriptor& source) {
    Tensor& tensor = apply.tensors.emplace_back(
        Tensor{.descriptor = source, .bytes = plan.bytes.at(source.id())});
    tensor.descriptor.set_id(id++);
  };
  add(plan.sequence.tensors(0));
  for (const Tensor& tensor : script.tensors) {
    if (tensor.descriptor.kind() == v1::TENSOR_KIND_KEY) {
      add(plan.layers[static_cast<size_t>(tensor.descriptor.layer())].tensors(0));
    }
    apply.tensors.push_back(tensor);
  }
  ASSERT_NO_FATAL_FAILURE(ExpectSameInRegion(apply, Call::kApply));
  EXPECT_EQ(num_compared_, 1);
  // What it needs is known before the first tensor: that is enough, and less is refused at once.
  Offer(apply.begin, (used_bytes_ + 255) / 256 * 256);
  Reply exact = Exchange(*stub_, Call::kApply, apply);
  EXPECT_TRUE(exact.status.ok()) << exact.status.error_message();
  Offer(apply.begin, (used_bytes_ - 1) / 256 * 256);
  const Reply less = Exchange(*stub_, Call::kApply, apply);
  EXPECT_EQ(less.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  ASSERT_EQ(less.error.fields.size(), 1U) << less.status.error_message();
  EXPECT_EQ(less.error.fields[0].field, "output.byte_size");
  EXPECT_TRUE(absl::StrContains(less.status.error_message(),
                                std::to_string((used_bytes_ + 255) / 256 * 256)))
      << less.status.error_message();
  EXPECT_FALSE(less.accepted.reserved_bytes() > 0) << "accepted before it was refused";
}

TEST_F(OutputTest, FetchOfASession) {
  const Sequence sequence = RandomSequence();
  const std::string id = server_->OpenAll(sequence);
  CompressJob job;
  job.begin.mutable_target()->set_session_id(id);
  const auto sent = server_->client().FetchSession(job);
  ASSERT_TRUE(sent.ok()) << sent.status();
  Offer(job.begin);
  const auto placed = server_->client().FetchSession(job);
  ASSERT_TRUE(placed.ok()) << placed.status();
  ASSERT_EQ(placed->layers.size(), sent->layers.size());
  EXPECT_EQ(placed->received_bytes, 0);
  for (size_t i = 0; i < sent->layers.size(); ++i) {
    EXPECT_TRUE(placed->layers[i].tensors.empty());
    for (size_t t = 0; t < sent->layers[i].tensors.size(); ++t) {
      const auto bytes =
          PlacedBytes(placed->layers[i].result.tensors(static_cast<int>(t)), memory_->bytes());
      EXPECT_TRUE(bytes == sent->layers[i].tensors[t].data.bytes()) << i << " " << t;
    }
  }
  job.begin.mutable_target()->mutable_resume()->set_layer(1);
  EXPECT_TRUE(absl::IsInvalidArgument(server_->client().FetchSession(job).status()));
  PartialFetch partial;
  job.partial = &partial;
  EXPECT_TRUE(absl::IsInvalidArgument(server_->client().FetchSession(job).status()));
  server_->Release(id);
}

TEST_F(OutputTest, InputsInTheSameRegion) {
  Script script = SmallScript();
  Tensor& key = Find(script, v1::TENSOR_KIND_KEY, 0);
  const Reply sent = Exchange(*stub_, Call::kCompress, script);
  Offer(script.begin, static_cast<int64_t>(kRegionBytes / 2));
  const auto at = static_cast<int64_t>(kRegionBytes / 2) + kBegin;
  std::memcpy(memory_->bytes().data() + at, key.bytes.data(), key.bytes.size());
  *key.descriptor.mutable_location()->mutable_region() = SliceOf("out", writable_, at);
  const auto messages = [&] {
    std::vector<v1::CompressRequest> all = Messages(script);
    const uint32_t id = key.descriptor.id();
    std::erase_if(all, [&](const auto& m) { return !m.data().empty() && m.tensor() == id; });
    all.back().mutable_end()->set_num_tensors(static_cast<int>(script.tensors.size()) - 1);
    return all;
  };
  const Reply placed = Exchange(*stub_, Call::kCompress, messages());
  ASSERT_TRUE(placed.status.ok()) << placed.status.error_message();
  EXPECT_EQ(placed.end.plan().hash(), sent.end.plan().hash());
  // The last byte of the room is the key's first.
  script.begin.mutable_output()->set_byte_size(at - kBegin + 1);
  const Reply overlapping = Exchange(*stub_, Call::kCompress, messages());
  ASSERT_EQ(overlapping.error.fields.size(), 1U) << overlapping.status.error_message();
  EXPECT_EQ(overlapping.error.fields[0].field, "output.region");
}

// A policy does not tell beforehand how much whole blocks hold: the layer that has no room says so.
TEST_F(OutputTest, RoomThatEndsWithinALayer) {
  Script script = SmallScript();
  script.begin.mutable_policy()->set_preset("chunkkv");
  script.begin.mutable_policy()->mutable_budget()->set_whole_blocks(true);
  Reply whole = Exchange(*stub_, Call::kCompress, script);
  ASSERT_TRUE(whole.status.ok()) << whole.status.error_message();
  ASSERT_NO_FATAL_FAILURE(ExpectSameInRegion(script, Call::kCompress));
  const int64_t needed = used_bytes_;
  for (const int64_t bytes : {int64_t{8192}, needed / 2, needed - 1}) {
    Offer(script.begin, bytes);
    const Reply reply = Exchange(*stub_, Call::kCompress, script);
    EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << bytes;
    ASSERT_EQ(reply.error.fields.size(), 1U) << reply.status.error_message();
    EXPECT_EQ(reply.error.fields[0].field, "output.byte_size");
    const auto all = memory_->bytes();
    EXPECT_TRUE(std::all_of(all.begin() + kBegin + bytes, all.end(), [](std::byte b) {
      return b == kUntouched;
    })) << "written behind the room";
  }
  Offer(script.begin, needed);
  EXPECT_TRUE(Exchange(*stub_, Call::kCompress, script).status.ok());
}

struct OfferCase {
  const char* name;
  absl::StatusCode code;
  const char* names;
  std::function<void(v1::OutputRegion&)> edit;
};

TEST_F(OutputTest, BadOffers) {
  const uint64_t readable = Register("readable", false);
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  constexpr auto kMissing = absl::StatusCode::kNotFound;
  using O = v1::OutputRegion;
  const OfferCase cases[] = {
      {"Unknown", kMissing, "", [](O& o) { o.mutable_region()->set_name("nowhere"); }},
      {"Unnamed", kMissing, "", [](O& o) { o.clear_region(); }},
      {"OtherGeneration", kMissing, "",
       [&](O& o) { o.mutable_region()->set_generation(writable_ ^ 1); }},
      {"NoGeneration", kMissing, "", [](O& o) { o.mutable_region()->set_generation(0); }},
      {"NotWritable", kInvalid, "output.region.name",
       [&](O& o) { *o.mutable_region() = SliceOf("readable", readable, 0); }},
      {"OffsetUneven", kInvalid, "output.region.offset_bytes",
       [](O& o) { o.mutable_region()->set_offset_bytes(128); }},
      {"OffsetNegative", kInvalid, "output.region.offset_bytes",
       [](O& o) { o.mutable_region()->set_offset_bytes(-256); }},
      {"OffsetBehindTheEnd", kInvalid, "output.region.offset_bytes",
       [](O& o) { o.mutable_region()->set_offset_bytes(kRegionBytes + 256); }},
      {"NoneLeft", kInvalid, "output.byte_size",
       [](O& o) { o.mutable_region()->set_offset_bytes(kRegionBytes); }},
      {"SizeNegative", kInvalid, "output.region", [](O& o) { o.set_byte_size(-1); }},
      {"SizeBeyond", kInvalid, "output.region",
       [](O& o) { o.set_byte_size(kRegionBytes - kBegin + 1); }},
      {"SizeOverflow", kInvalid, "output.region",
       [](O& o) { o.set_byte_size(std::numeric_limits<int64_t>::max()); }},
      {"TooSmall", kInvalid, "output.byte_size", [](O& o) { o.set_byte_size(1); }},
  };
  Script script = SmallScript();
  for (const OfferCase& bad : cases) {
    SCOPED_TRACE(bad.name);
    Offer(script.begin);
    bad.edit(*script.begin.mutable_output());
    const Reply reply = Exchange(*stub_, Call::kCompress, script);
    EXPECT_EQ(static_cast<int>(reply.status.error_code()), static_cast<int>(bad.code))
        << reply.status.error_message();
    const std::string field = reply.error.fields.empty() ? "" : reply.error.fields[0].field;
    EXPECT_TRUE(absl::StartsWith(field, bad.names)) << field;
    const auto bytes = memory_->bytes();
    EXPECT_TRUE(
        std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == kUntouched; }));
  }
  for (const Call call : {Call::kPlan, Call::kCalibrate}) {
    Offer(script.begin);
    const Reply reply = Exchange(*stub_, call, script);
    EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
}

}  // namespace
}  // namespace dynsplit::e2e

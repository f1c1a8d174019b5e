// SPDX-License-Identifier: Apache-2.0
//
// What callers of sessions and regions can do wrong, one row each: how, the code, and what the
// error must name. After every row a good step is answered as before and the server holds no more
// memory.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "client/cpp/shared_memory.h"
#include "proto/wire/status.h"
#include "tests/e2e/sequences.h"

namespace dynsplit::e2e {
namespace {

using Code = absl::StatusCode;
constexpr auto kInvalid = Code::kInvalidArgument;
constexpr auto kMissing = Code::kNotFound;

// Everything an error names, in one line.
std::string NamesOf(const absl::Status& status) {
  const wire::RichError error = wire::ReadError(status);
  std::string names;
  for (const auto& field : error.fields) names += field.field + " ";
  for (const auto& violation : error.preconditions) names += violation.type + " ";
  return names + error.resource_type + " " + error.resource_name + " " + error.reason;
}

// One server with sessions and regions that the rows go wrong with.
struct World {
  World() {
    id = server.OpenAll(sequence);
    second_id = server.OpenAll(sequence);
    CompressJob job = OpenJob(sequence, sequence.tokens());
    job.begin.mutable_policy()->mutable_encoding()->set_key(v1::Encoding::FORMAT_INT8);
    job.begin.mutable_policy()->mutable_encoding()->set_value(v1::Encoding::FORMAT_INT8);
    int8_id = server.Open(job).session_id();
    memory = *SharedMemory::Create(kRegionBytes);
    writable = Register("writable", true);
    readable = Register("readable", false);
    expected = AnswerOf(server.Select(StepOf(sequence, id)));
    held_bytes = server.server().settled_bytes();
  }
  ~World() {
    for (const char* name : {"writable", "readable"}) {
      v1::UnregisterRegionRequest request;
      request.set_name(name);
      EXPECT_TRUE(server.client().UnregisterRegion(request).ok());
    }
    for (const std::string& each : {id, second_id, int8_id}) server.Release(each);
    EXPECT_TRUE(server.server().ReturnsToBaseline());
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  uint64_t Register(const std::string& name, bool may_write) {
    const auto region = server.client().RegisterRegion(memory->Registration(name, may_write));
    EXPECT_TRUE(region.ok()) << region.status();
    return region.ok() ? region->generation() : 0;
  }
  v1::RegionSlice Writable(int64_t offset = 0) const {
    return SliceOf("writable", writable, offset);
  }
  v1::RegionSlice Readable(int64_t offset = 0) const {
    return SliceOf("readable", readable, offset);
  }

  // A good step: 2 layers of [1, 4, 16] bf16 queries, 40 of 96 tokens.
  v1::SelectRequest Step() const {
    v1::SequenceStep step = StepOf(sequence, id);
    step.set_tokens_per_head(40);
    return Request({step});
  }
  void ExpectUnharmed() {
    EXPECT_TRUE(AnswerOf(server.Select(StepOf(sequence, id))) == expected);
    EXPECT_TRUE(server.server().ReturnsToBaseline(held_bytes));
  }

  static constexpr size_t kRegionBytes = 64 << 10;
  const Sequence sequence = RandomSequence();
  SessionServer server;
  std::string id, second_id, int8_id, expected;
  std::unique_ptr<SharedMemory> memory;
  uint64_t writable = 0, readable = 0;
  int64_t held_bytes = 0;
};

class SessionBadInputTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { world_ = new World; }
  static void TearDownTestSuite() {
    delete world_;
    world_ = nullptr;
  }
  static void ExpectRefused(const absl::Status& status, Code code, const std::string& names) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_TRUE(absl::StrContains(NamesOf(status), names))
        << "names '" << NamesOf(status) << "': " << status;
    EXPECT_FALSE(status.message().empty());
    world_->ExpectUnharmed();
  }
  static World* world_;
};
World* SessionBadInputTest::world_ = nullptr;

// ---- Select ----

struct SelectCase {
  const char* name;
  Code code;
  // Part of the violated field's path, the resource or the reason.
  const char* names;
  std::function<void(v1::SelectRequest&, World&)> edit;
};
void PrintTo(const SelectCase& bad, std::ostream* stream) { *stream << bad.name; }

// A row that changes the step only.
SelectCase StepCase(const char* name, Code code, const char* names,
                    const std::function<void(v1::SequenceStep&, World&)>& edit) {
  return {name, code, names, [edit](v1::SelectRequest& request, World& world) {
            edit(*request.mutable_sequences(0), world);
          }};
}

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

void Put(std::string& bytes, size_t index, uint16_t bits) {
  std::memcpy(&bytes[index * 2], &bits, 2);
}

std::vector<SelectCase> SequenceCases() {
  using Step = v1::SequenceStep;
  return {
      {"NoSequences", kInvalid, "sequences",
       [](v1::SelectRequest& r, World&) { r.clear_sequences(); }},
      {"TooManySequences", kInvalid, "sequences",
       [](v1::SelectRequest& r, World&) {
         for (int i = 0; i < 1024; ++i) *r.add_sequences() = r.sequences(0);
       }},
      {"SessionTwice", kInvalid, "sequences[1].session_id",
       [](v1::SelectRequest& r, World&) { *r.add_sequences() = r.sequences(0); }},
      {"TenantTooLong", kInvalid, "tenant",
       [](v1::SelectRequest& r, World&) { r.set_tenant(std::string(65, 't')); }},
      {"OtherTenant", Code::kPermissionDenied, "SESSION_OWNER",
       [](v1::SelectRequest& r, World&) { r.set_tenant("somebody"); }},
      {"SecondSequenceWrong", kInvalid, "sequences[1].num_queries",
       [](v1::SelectRequest& r, World& world) {
         Step& second = *r.add_sequences() = r.sequences(0);
         second.set_session_id(world.second_id);
         second.set_num_queries(65);
       }},
      {"SecondSequenceUnknown", kMissing, "SESSION_UNKNOWN",
       [](v1::SelectRequest& r, World&) {
         Step& second = *r.add_sequences() = r.sequences(0);
         second.set_session_id("nobody");
       }},
      StepCase("SessionUnknown", kMissing, "SESSION_UNKNOWN",
               [](Step& s, World&) { s.set_session_id("0123456789abcdef"); }),
      StepCase("SessionOfOddBytes", kMissing, "SESSION_UNKNOWN",
               [](Step& s, World&) { s.set_session_id("../\x01\n"); }),
      StepCase("FirstLayerNegative", kInvalid, "sequences[0].first_layer",
               [](Step& s, World&) { s.set_first_layer(-1); }),
      StepCase("FirstLayerBeyond", kInvalid, "sequences[0].first_layer",
               [](Step& s, World&) { s.set_first_layer(2); }),
      StepCase("LayersNegative", kInvalid, "sequences[0].num_layers",
               [](Step& s, World&) { s.set_num_layers(-1); }),
      StepCase("LayersBeyond", kInvalid, "sequences[0].num_layers",
               [](Step& s, World&) { s.set_num_layers(3); }),
      StepCase("LayersBeyondBehindTheFirst", kInvalid, "sequences[0].num_layers",
               [](Step& s, World&) {
                 s.set_first_layer(1);
                 s.set_num_layers(2);
               }),
      StepCase("LayersOverflow", kInvalid, "sequences[0].num_layers",
               [](Step& s, World&) {
                 s.set_first_layer(1);
                 s.set_num_layers(std::numeric_limits<int32_t>::max());
               }),
      StepCase("QueriesNegative", kInvalid, "sequences[0].num_queries",
               [](Step& s, World&) { s.set_num_queries(-1); }),
      StepCase("QueriesTooMany", kInvalid, "sequences[0].num_queries",
               [](Step& s, World&) { s.set_num_queries(65); }),
      StepCase("DTypeMissing", kInvalid, "sequences[0].dtype",
               [](Step& s, World&) { s.clear_dtype(); }),
      StepCase("DTypeInt8", kInvalid, "sequences[0].dtype",
               [](Step& s, World&) { s.set_dtype(v1::DTYPE_INT8); }),
      StepCase("DTypeFloat8", kInvalid, "sequences[0].dtype",
               [](Step& s, World&) { s.set_dtype(v1::DTYPE_FLOAT8_E4M3); }),
      StepCase("DTypeUnknown", kInvalid, "sequences[0].dtype",
               [](Step& s, World&) { s.set_dtype(static_cast<v1::DType>(77)); }),
      StepCase("NoQueries", kInvalid, "sequences[0].quer",
               [](Step& s, World&) { s.clear_queries(); }),
      StepCase("QueriesEmpty", kInvalid, "sequences[0].query_data",
               [](Step& s, World&) { s.set_query_data(""); }),
      StepCase("QueriesTooShort", kInvalid, "sequences[0].query_data",
               [](Step& s, World&) { s.mutable_query_data()->pop_back(); }),
      StepCase("QueriesTooLong", kInvalid, "sequences[0].query_data",
               [](Step& s, World&) { s.mutable_query_data()->append("x"); }),
      StepCase("QueriesOfOtherSize", kInvalid, "sequences[0].query_data",
               [](Step& s, World&) { s.set_dtype(v1::DTYPE_FLOAT32); }),
      StepCase("QueriesOfFewerLayers", kInvalid, "sequences[0].query_data",
               [](Step& s, World&) { s.set_num_layers(1); }),
      StepCase("QueryNaN", kInvalid, "sequences[0].query_data",
               [](Step& s, World&) { Put(*s.mutable_query_data(), 5, 0x7fc0); }),
      StepCase("QueryInfinite", kInvalid, "sequences[0].query_data",
               [](Step& s, World&) { Put(*s.mutable_query_data(), 127, 0xff80); }),
      StepCase("TokensNegative", kInvalid, "sequences[0].tokens_per_head",
               [](Step& s, World&) { s.set_tokens_per_head(-1); }),
      StepCase("TokensBeyond", kInvalid, "sequences[0].tokens_per_head",
               [](Step& s, World&) { s.set_tokens_per_head(97); }),
      StepCase("TokensHuge", kInvalid, "sequences[0].tokens_per_head",
               [](Step& s, World&) { s.set_tokens_per_head(kMost); }),
  };
}

std::vector<SelectCase> PlaceCases() {
  using Step = v1::SequenceStep;
  constexpr int64_t kEnd = World::kRegionBytes;
  return {
      StepCase("QueryRegionUnknown", kMissing, "nowhere",
               [](Step& s, World&) { s.mutable_query_region()->set_name("nowhere"); }),
      StepCase("QueryRegionUnnamed", kMissing, "",
               [](Step& s, World&) { s.mutable_query_region(); }),
      StepCase("QueryRegionOfOtherGeneration", kMissing, "readable",
               [](Step& s, World& w) {
                 *s.mutable_query_region() = SliceOf("readable", w.readable + 1, 0);
               }),
      StepCase("QueryRegionWithoutGeneration", kMissing, "readable",
               [](Step& s, World&) { *s.mutable_query_region() = SliceOf("readable", 0, 0); }),
      StepCase("QueryRegionNegative", kInvalid, "sequences[0].query_region",
               [](Step& s, World& w) { *s.mutable_query_region() = w.Readable(-64); }),
      StepCase("QueryRegionBehindTheEnd", kInvalid, "sequences[0].query_region",
               [](Step& s, World& w) { *s.mutable_query_region() = w.Readable(kEnd); }),
      StepCase("QueryRegionCutByTheEnd", kInvalid, "sequences[0].query_region",
               [](Step& s, World& w) { *s.mutable_query_region() = w.Readable(kEnd - 192); }),
      StepCase("QueryRegionOverflow", kInvalid, "sequences[0].query_region",
               [](Step& s, World& w) { *s.mutable_query_region() = w.Readable(kMost - 63); }),
      StepCase("TokenRegionUnknown", kMissing, "nowhere",
               [](Step& s, World&) { s.mutable_token_region()->set_name("nowhere"); }),
      StepCase("TokenRegionNotWritable", kInvalid, "sequences[0].token_region",
               [](Step& s, World& w) { *s.mutable_token_region() = w.Readable(); }),
      StepCase("TokenRegionCutByTheEnd", kInvalid, "sequences[0].token_region",
               [](Step& s, World& w) { *s.mutable_token_region() = w.Writable(kEnd - 4); }),
      StepCase("TokenRegionOfOtherGeneration", kMissing, "writable",
               [](Step& s, World& w) {
                 *s.mutable_token_region() = SliceOf("writable", w.readable, 0);
               }),
      StepCase("KeysWithoutValues", kInvalid, "sequences[0].gather",
               [](Step& s, World& w) { *s.mutable_gather()->mutable_key_region() = w.Writable(); }),
      StepCase(
          "ValuesWithoutKeys", kInvalid, "sequences[0].gather",
          [](Step& s, World& w) { *s.mutable_gather()->mutable_value_region() = w.Writable(); }),
      StepCase("KeysNotWritable", kInvalid, "sequences[0].gather.key_region",
               [](Step& s, World& w) {
                 *s.mutable_gather()->mutable_key_region() = w.Readable();
                 *s.mutable_gather()->mutable_value_region() = w.Writable();
               }),
      StepCase("ValuesCutByTheEnd", kInvalid, "sequences[0].gather.value_region",
               [](Step& s, World& w) {
                 *s.mutable_gather()->mutable_key_region() = w.Writable();
                 *s.mutable_gather()->mutable_value_region() = w.Writable(kEnd - 64);
               }),
      StepCase("KeysUnknown", kMissing, "nowhere",
               [](Step& s, World& w) {
                 s.mutable_gather()->mutable_key_region()->set_name("nowhere");
                 *s.mutable_gather()->mutable_value_region() = w.Writable();
               }),
      StepCase(
          "HeldNotWritable", kInvalid, "sequences[0].gather.held_region",
          [](Step& s, World& w) { *s.mutable_gather()->mutable_held_region() = w.Readable(); }),
      StepCase("HeldBehindTheEnd", kInvalid, "sequences[0].gather.held_region",
               [](Step& s, World& w) {
                 *s.mutable_gather()->mutable_held_region() = w.Writable(kEnd + 256);
               }),
      StepCase("ScalesMissing", kInvalid, "sequences[0].gather",
               [](Step& s, World& w) {
                 s.set_session_id(w.int8_id);
                 *s.mutable_gather()->mutable_key_region() = w.Writable();
                 *s.mutable_gather()->mutable_value_region() = w.Writable(16 << 10);
               }),
      StepCase("ScalesCutByTheEnd", kInvalid, "sequences[0].gather.value_scale_region",
               [](Step& s, World& w) {
                 s.set_session_id(w.int8_id);
                 *s.mutable_gather()->mutable_key_region() = w.Writable();
                 *s.mutable_gather()->mutable_value_region() = w.Writable(16 << 10);
                 *s.mutable_gather()->mutable_key_scale_region() = w.Writable(32 << 10);
                 *s.mutable_gather()->mutable_value_scale_region() = w.Writable(kEnd - 4);
               }),
  };
}

class BadSelectTest : public SessionBadInputTest, public testing::WithParamInterface<SelectCase> {};

TEST_P(BadSelectTest, IsRefusedAndTheServerGoesOn) {
  v1::SelectRequest request = world_->Step();
  GetParam().edit(request, *world_);
  ExpectRefused(world_->server.client().Select(request).status(), GetParam().code,
                GetParam().names);
}

std::string SelectName(const testing::TestParamInfo<SelectCase>& info) { return info.param.name; }
INSTANTIATE_TEST_SUITE_P(Sequences, BadSelectTest, testing::ValuesIn(SequenceCases()), SelectName);
INSTANTIATE_TEST_SUITE_P(Places, BadSelectTest, testing::ValuesIn(PlaceCases()), SelectName);

TEST_F(SessionBadInputTest, TheGoodStepIsGood) {
  const auto response = world_->server.client().Select(world_->Step());
  ASSERT_TRUE(response.ok()) << response.status();
  EXPECT_EQ(response->sequences(0).tokens_per_head(), 40);
  world_->ExpectUnharmed();
}

// ---- Open, Append, Fetch ----

struct StreamCase {
  const char* name;
  Code code;
  const char* names;
  SessionCall call;
  std::function<void(CompressJob&, World&)> edit;
};
void PrintTo(const StreamCase& bad, std::ostream* stream) { *stream << bad.name; }

InputTensor& Input(CompressJob& job, v1::TensorKind kind) {
  for (InputTensor& tensor : job.tensors) {
    if (tensor.kind == kind) return tensor;
  }
  return job.tensors.front();
}
void Drop(CompressJob& job, v1::TensorKind kind) {
  std::erase_if(job.tensors, [kind](const InputTensor& tensor) { return tensor.kind == kind; });
}
template <size_t N>
void AddKept(CompressJob& job, const int32_t (&tokens)[N]) {
  InputTensor& tensor = job.tensors.emplace_back();
  tensor.kind = v1::TENSOR_KIND_KEPT_TOKENS;
  tensor.layer = 0;
  tensor.dtype = v1::DTYPE_INT32;
  tensor.bytes = {reinterpret_cast<const std::byte*>(tokens), N * 4};
}
constexpr int32_t kUnsorted[] = {1, 2, 3, 5, 3, 9};  // two heads
constexpr int32_t kBeyond[] = {1, 2, 3, 5, 9, 96};

std::vector<StreamCase> OpenCases() {
  const auto open = [](const char* name, Code code, const char* names,
                       const std::function<void(CompressJob&, v1::Policy&)>& edit) {
    return StreamCase{name, code, names, SessionCall::kOpen,
                      [edit](CompressJob& job, World&) { edit(job, *job.begin.mutable_policy()); }};
  };
  using Job = CompressJob;
  using P = v1::Policy;
  return {
      open("Evict", kInvalid, "policy.transform",
           [](Job&, P& p) { p.set_transform(v1::TRANSFORM_EVICT); }),
      open("WindowQueries", kInvalid, "policy.scoring.method",
           [](Job&, P& p) { p.mutable_scoring()->set_method(v1::Scoring::METHOD_WINDOW_QUERIES); }),
      open("RefinementNegative", kInvalid, "policy.scoring.refinement_factor",
           [](Job&, P& p) { p.mutable_scoring()->set_refinement_factor(-1); }),
      open("RefinementTooLarge", kInvalid, "policy.scoring.refinement_factor",
           [](Job&, P& p) { p.mutable_scoring()->set_refinement_factor(17); }),
      open("ScopeGlobal", Code::kUnimplemented, "",
           [](Job&, P& p) { p.set_scope(v1::SCOPE_GLOBAL); }),
      open("Pinned", Code::kUnimplemented, "",
           [](Job&, P& p) { p.mutable_protection()->add_pinned()->set_end(5); }),
      open("ScalesByHead", kInvalid, "policy.encoding.scale_granularity",
           [](Job&, P& p) {
             p.mutable_encoding()->set_key(v1::Encoding::FORMAT_INT8);
             p.mutable_encoding()->set_scale_granularity(v1::SCALE_GRANULARITY_HEAD);
           }),
      open("RatioAboveOne", kInvalid, "policy.budget.kept_ratio",
           [](Job&, P& p) { p.mutable_budget()->set_kept_ratio(1.5); }),
      open("ProfileUnknown", kMissing, "profile",
           [](Job&, P& p) { p.mutable_segmentation()->set_profile("nobody"); }),
      open("LeaseNegative", kInvalid, "session.lease_seconds",
           [](Job& j, P&) { j.begin.mutable_session()->set_lease_seconds(-1); }),
      open("LeaseTooLong", kInvalid, "session.lease_seconds",
           [](Job& j, P&) { j.begin.mutable_session()->set_lease_seconds(86401); }),
      open("ReserveNegative", kInvalid, "session.reserve_tokens",
           [](Job& j, P&) { j.begin.mutable_session()->set_reserve_tokens(-1); }),
      open("ReserveTooLarge", kInvalid, "session.reserve_tokens",
           [](Job& j, P&) { j.begin.mutable_session()->set_reserve_tokens(int64_t{1} << 31); }),
      open("ResidenceUnknown", kInvalid, "session.residence",
           [](Job& j, P&) {
             j.begin.mutable_session()->set_residence(
                 static_cast<v1::SessionOptions::Residence>(9));
           }),
      open("SummariesUnknown", kInvalid, "session.summaries",
           [](Job& j, P&) {
             j.begin.mutable_session()->set_summaries(
                 static_cast<v1::SessionOptions::Summaries>(9));
           }),
      open("TargetInOpen", kInvalid, "target",
           [](Job& j, P&) { j.begin.mutable_target()->set_session_id("x"); }),
      open("NoTokenIds", kInvalid, "tensors",
           [](Job& j, P&) { Drop(j, v1::TENSOR_KIND_TOKEN_IDS); }),
      open("NoValues", kInvalid, "tensors", [](Job& j, P&) { Drop(j, v1::TENSOR_KIND_VALUE); }),
      open("NoShape", kInvalid, "shape", [](Job& j, P&) { j.begin.clear_shape(); }),
      StreamCase{"KeysInUnknownRegion", kMissing, "nowhere", SessionCall::kOpen,
                 [](CompressJob& job, World&) {
                   Input(job, v1::TENSOR_KIND_KEY).region.emplace().set_name("nowhere");
                 }},
      StreamCase{"KeysCutByTheRegionsEnd", kInvalid, "location", SessionCall::kOpen,
                 [](CompressJob& job, World& world) {
                   Input(job, v1::TENSOR_KIND_KEY).region =
                       world.Readable(World::kRegionBytes - 64);
                 }},
      StreamCase{"KeysOfOtherGeneration", kMissing, "readable", SessionCall::kOpen,
                 [](CompressJob& job, World& world) {
                   Input(job, v1::TENSOR_KIND_KEY).region =
                       SliceOf("readable", world.readable ^ 1, 0);
                 }},
  };
}

std::vector<StreamCase> TargetCases() {
  return {
      {"AppendWithoutTarget", kInvalid, "target", SessionCall::kAppend,
       [](CompressJob& job, World&) { job.begin.clear_target(); }},
      {"AppendNegative", kInvalid, "target.position", SessionCall::kAppend,
       [](CompressJob& job, World&) { job.begin.mutable_target()->set_position(-1); }},
      {"AppendOfOtherHeads", kInvalid, "shape", SessionCall::kAppend,
       [](CompressJob& job, World&) { job.begin.mutable_shape()->set_num_kv_heads(4); }},
      {"AppendOfOtherType", kInvalid, "tensors", SessionCall::kAppend,
       [](CompressJob& job, World&) {
         for (InputTensor& tensor : job.tensors) {
           if (tensor.layer.has_value()) tensor.dtype = v1::DTYPE_FLOAT16;
         }
       }},
      {"AppendWithoutALayer", kInvalid, "tensors", SessionCall::kAppend,
       [](CompressJob& job, World&) { job.tensors.resize(3); }},
      {"AppendBeyondTheRoom", Code::kResourceExhausted, "SESSION_FULL", SessionCall::kAppend,
       [](CompressJob&, World&) {}},
      {"FetchWithoutTarget", kInvalid, "target", SessionCall::kFetch,
       [](CompressJob& job, World&) { job.begin.clear_target(); }},
      {"FetchLayersUnsorted", kInvalid, "target.layers", SessionCall::kFetch,
       [](CompressJob& job, World&) {
         job.begin.mutable_target()->add_layers(1);
         job.begin.mutable_target()->add_layers(0);
       }},
      {"FetchLayerBeyond", kInvalid, "target.layers", SessionCall::kFetch,
       [](CompressJob& job, World&) { job.begin.mutable_target()->add_layers(2); }},
      {"FetchResumeElsewhere", kInvalid, "target.resume.layer", SessionCall::kFetch,
       [](CompressJob& job, World&) {
         job.begin.mutable_target()->mutable_resume()->set_layer(5);
       }},
      {"FetchResumeNegative", kInvalid, "target.resume.offset", SessionCall::kFetch,
       [](CompressJob& job, World&) {
         job.begin.mutable_target()->mutable_resume()->set_offset(-1);
       }},
      {"FetchResumeBehindTheEnd", kInvalid, "target.resume", SessionCall::kFetch,
       [](CompressJob& job, World&) {
         job.begin.mutable_target()->mutable_resume()->set_offset(int64_t{1} << 40);
       }},
      {"FetchKeptUnsorted", kInvalid, "tensors[0]", SessionCall::kFetch,
       [](CompressJob& job, World&) { AddKept(job, kUnsorted); }},
      {"FetchKeptBeyond", kInvalid, "tensors[0]", SessionCall::kFetch,
       [](CompressJob& job, World&) { AddKept(job, kBeyond); }},
      {"FetchContiguousWithoutRope", kInvalid, "rope", SessionCall::kFetch,
       [](CompressJob& job, World&) {
         job.begin.mutable_policy()->set_positions(v1::POSITIONS_CONTIGUOUS);
       }},
      {"FetchPageSize", kInvalid, "page_size", SessionCall::kFetch,
       [](CompressJob& job, World&) { job.begin.mutable_policy()->set_page_size(17); }},
  };
}

class BadSessionStreamTest : public SessionBadInputTest,
                             public testing::WithParamInterface<StreamCase> {};

TEST_P(BadSessionStreamTest, IsRefusedAndTheServerGoesOn) {
  const StreamCase& bad = GetParam();
  Client& client = world_->server.client();
  CompressJob job;
  switch (bad.call) {
    case SessionCall::kOpen:
      job = OpenJob(world_->sequence, world_->sequence.tokens());
      bad.edit(job, *world_);
      ExpectRefused(client.OpenSession(job).status(), bad.code, bad.names);
      break;
    case SessionCall::kAppend:
      job = TokensJob(world_->sequence, 0, 8);
      job.begin.mutable_target()->set_session_id(world_->id);
      job.begin.mutable_target()->set_position(world_->sequence.tokens());
      bad.edit(job, *world_);
      ExpectRefused(client.AppendSession(job).status(), bad.code, bad.names);
      break;
    case SessionCall::kFetch:
      job.begin.mutable_target()->set_session_id(world_->id);
      bad.edit(job, *world_);
      ExpectRefused(client.FetchSession(job).status(), bad.code, bad.names);
      break;
  }
}

std::string StreamName(const testing::TestParamInfo<StreamCase>& info) { return info.param.name; }
INSTANTIATE_TEST_SUITE_P(Open, BadSessionStreamTest, testing::ValuesIn(OpenCases()), StreamName);
INSTANTIATE_TEST_SUITE_P(Target, BadSessionStreamTest, testing::ValuesIn(TargetCases()),
                         StreamName);

TEST_F(SessionBadInputTest, BadNumbersInDataAreFoundBeforeAnythingChanges) {
  Sequence sequence = RandomSequence({.num_tokens = 120, .seed = 3});
  SessionServer& server = world_->server;
  const std::string id = server.Open(OpenJob(sequence, 100, 20)).session_id();
  const std::string before = AnswerOf(server.Select(StepOf(sequence, id)));
  Sequence spoilt = sequence;
  Put(spoilt.keys[1], 110 * 2 * 16 + 3, 0x7fc0);
  const absl::Status append =
      server.client().AppendSession(AppendJob(spoilt, id, 100, 120)).status();
  EXPECT_TRUE(absl::IsInvalidArgument(append)) << append;
  EXPECT_EQ(server.Get(id).shape().num_tokens(), 100);
  EXPECT_TRUE(AnswerOf(server.Select(StepOf(sequence, id))) == before);
  spoilt = sequence;
  spoilt.token_ids[105] = -1;
  EXPECT_TRUE(absl::IsInvalidArgument(
      server.client().AppendSession(AppendJob(spoilt, id, 100, 120)).status()));
  spoilt = sequence;
  Put(spoilt.values[0], 7, 0x7f80);
  const absl::Status open = server.client().OpenSession(OpenJob(spoilt, 120)).status();
  EXPECT_TRUE(absl::IsInvalidArgument(open)) << open;
  EXPECT_EQ(server.Append(sequence, id, 100, 120).shape().num_tokens(), 120);
  server.Release(id);
  world_->ExpectUnharmed();
}

// ---- regions ----

struct RegionCase {
  const char* name;
  Code code;
  const char* names;
  std::function<void(v1::RegisterRegionRequest&)> edit;
};
void PrintTo(const RegionCase& bad, std::ostream* stream) { *stream << bad.name; }

std::vector<RegionCase> RegionCases() {
  using R = v1::RegisterRegionRequest;
  constexpr int64_t kBytes = World::kRegionBytes;
  return {
      {"NameEmpty", kInvalid, "name", [](R& r) { r.set_name(""); }},
      {"NameTooLong", kInvalid, "name", [](R& r) { r.set_name(std::string(65, 'n')); }},
      {"NameOdd", kInvalid, "name", [](R& r) { r.set_name("a/b"); }},
      {"SizeZero", kInvalid, "byte_size", [](R& r) { r.set_byte_size(0); }},
      {"SizeNegative", kInvalid, "byte_size", [](R& r) { r.set_byte_size(-4096); }},
      {"SizeHuge", kInvalid, "byte_size", [](R& r) { r.set_byte_size((int64_t{1} << 40) + 1); }},
      {"ObjectSmaller", kInvalid, "byte_size", [](R& r) { r.set_byte_size(kBytes + 1); }},
      {"ObjectSmallerBehindTheOffset", kInvalid, "byte_size",
       [](R& r) { r.mutable_posix_shm()->set_offset_bytes(4096); }},
      {"OffsetUnaligned", kInvalid, "offset_bytes",
       [](R& r) {
         r.set_byte_size(1024);
         r.mutable_posix_shm()->set_offset_bytes(100);
       }},
      {"OffsetNegative", kInvalid, "offset_bytes",
       [](R& r) { r.mutable_posix_shm()->set_offset_bytes(-4096); }},
      {"OffsetOverflow", kInvalid, "",
       [](R& r) { r.mutable_posix_shm()->set_offset_bytes(kMost - 4095); }},
      {"KeyEmpty", kInvalid, "key", [](R& r) { r.mutable_posix_shm()->set_key(""); }},
      {"KeyWithSlash", kInvalid, "key", [](R& r) { r.mutable_posix_shm()->set_key("../x"); }},
      {"KeyTooLong", kInvalid, "key",
       [](R& r) { r.mutable_posix_shm()->set_key(std::string(201, 'k')); }},
      {"NoSuchObject", kMissing, "dynsplit-nobody",
       [](R& r) { r.mutable_posix_shm()->set_key("dynsplit-nobody"); }},
      {"NoKind", kInvalid, "posix_shm", [](R& r) { r.clear_kind(); }},
      {"MemFdWithoutToken", kInvalid, "memfd.token", [](R& r) { r.mutable_memfd(); }},
      {"MemFd", Code::kUnimplemented, "",
       [](R& r) { r.mutable_memfd()->set_token(std::string(16, 't')); }},
      {"CudaIpc", Code::kUnimplemented, "",
       [](R& r) {
         r.mutable_cuda_ipc()->set_handle(std::string(64, 'h'));
         r.mutable_cuda_ipc()->set_device_uuid(std::string(16, 'u'));
       }},
      {"LeaseTooLong", kInvalid, "lease_seconds", [](R& r) { r.set_lease_seconds(86401); }},
      {"LeaseNegative", kInvalid, "lease_seconds", [](R& r) { r.set_lease_seconds(-1); }},
      {"NameInUse", Code::kAlreadyExists, "readable",
       [](R& r) {
         r.set_name("readable");
         r.set_byte_size(4096);
       }},
  };
}

class BadRegionTest : public SessionBadInputTest, public testing::WithParamInterface<RegionCase> {};

TEST_P(BadRegionTest, IsRefusedAndTheServerGoesOn) {
  v1::RegisterRegionRequest request = world_->memory->Registration("new", false);
  GetParam().edit(request);
  ExpectRefused(world_->server.client().RegisterRegion(request).status(), GetParam().code,
                GetParam().names);
  const auto regions = world_->server.client().ListRegions();
  ASSERT_TRUE(regions.ok()) << regions.status();
  EXPECT_EQ(regions->regions_size(), 2);
}

std::string RegionName(const testing::TestParamInfo<RegionCase>& info) { return info.param.name; }
INSTANTIATE_TEST_SUITE_P(Register, BadRegionTest, testing::ValuesIn(RegionCases()), RegionName);

TEST(RegionTest, LiveAsLongAsTheyAreRegisteredAndLeased) {
  ServerConfig config = SessionConfig();
  config.max_regions = 2;
  SessionServer server(config);
  Client& client = server.client();
  const auto memory = *SharedMemory::Create(8192);
  const auto first = client.RegisterRegion(memory->Registration("a", true));
  const auto again = client.RegisterRegion(memory->Registration("a", true));
  ASSERT_TRUE(first.ok() && again.ok()) << first.status() << again.status();
  EXPECT_EQ(first->generation(), again->generation());
  EXPECT_NE(first->generation(), 0U);
  EXPECT_NEAR(first->lease_seconds_left(), 600, 5);
  v1::RegisterRegionRequest brief = memory->Registration("b", false);
  brief.set_lease_seconds(1);
  ASSERT_TRUE(client.RegisterRegion(brief).ok());
  const absl::Status full = client.RegisterRegion(memory->Registration("c", false)).status();
  EXPECT_TRUE(absl::IsResourceExhausted(full)) << full;
  EXPECT_TRUE(wire::ReadError(full).retry_after_ms.has_value());
  auto regions = client.ListRegions();
  ASSERT_TRUE(regions.ok());
  ASSERT_EQ(regions->regions_size(), 2);
  EXPECT_EQ(regions->regions(0).name(), "a");
  EXPECT_TRUE(regions->regions(0).writable());
  EXPECT_EQ(regions->regions(0).byte_size(), 8192);
  EXPECT_EQ(regions->regions(1).name(), "b");
  EXPECT_FALSE(regions->regions(1).writable());
  EXPECT_TRUE(Eventually([&] { return client.ListRegions()->regions_size() == 1; }));

  v1::UnregisterRegionRequest request;
  request.set_name("a");
  request.set_generation(first->generation() + 1);
  EXPECT_TRUE(absl::IsNotFound(client.UnregisterRegion(request)));
  request.set_generation(first->generation());
  EXPECT_TRUE(client.UnregisterRegion(request).ok());
  EXPECT_TRUE(absl::IsNotFound(client.UnregisterRegion(request)));
  const auto replaced = client.RegisterRegion(memory->Registration("a", true));
  ASSERT_TRUE(replaced.ok());
  EXPECT_NE(replaced->generation(), first->generation());
  request.clear_generation();
  EXPECT_TRUE(client.UnregisterRegion(request).ok());
  EXPECT_TRUE(server.server().ReturnsToBaseline());
}

TEST(RegionTest, UnregisteredWhileInUseStaysUntilTheRequestEnds) {
  SessionServer server;
  const Sequence sequence = RandomSequence();
  CompressJob job = OpenJob(sequence, sequence.tokens());
  auto memory = *SharedMemory::Create(64 << 10);
  const auto region = server.client().RegisterRegion(memory->Registration("kv", false));
  ASSERT_TRUE(region.ok()) << region.status();
  InputTensor& key = Input(job, v1::TENSOR_KIND_KEY);
  std::memcpy(memory->bytes().data(), key.bytes.data(), key.bytes.size());
  key.region = SliceOf("kv", region->generation(), 0);
  bool unregistered = false;
  job.on_progress = [&](const Progress&) {
    if (std::exchange(unregistered, true)) return;  // accepted: the request has the region
    v1::UnregisterRegionRequest request;
    request.set_name("kv");
    EXPECT_TRUE(server.AnotherClient()->UnregisterRegion(request).ok());
    memory.reset();  // the name and this mapping go, too
  };
  const absl::StatusOr<CompressResult> opened = server.client().OpenSession(job);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_TRUE(unregistered);
  const std::string id = opened->end.session().session_id();
  EXPECT_TRUE(server.Fetch(id).layers[0].keys == sequence.keys[0]);
  job.on_progress = nullptr;
  EXPECT_TRUE(absl::IsNotFound(server.client().OpenSession(job).status()));
  server.Release(id);
  EXPECT_TRUE(server.server().ReturnsToBaseline());
}

TEST(RegionTest, AreOffUnlessSwitchedOn) {
  SessionServer server(TestConfig());
  const auto memory = *SharedMemory::Create(4096);
  const absl::Status status =
      server.client().RegisterRegion(memory->Registration("r", false)).status();
  EXPECT_TRUE(absl::IsUnimplemented(status)) << status;
  EXPECT_FALSE(wire::ReadError(status).reason.empty());
  EXPECT_TRUE(absl::IsUnimplemented(server.client().ListRegions().status()));
}

}  // namespace
}  // namespace dynsplit::e2e

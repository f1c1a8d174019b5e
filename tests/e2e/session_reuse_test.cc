// SPDX-License-Identifier: Apache-2.0
//
// The reuse pipeline as an engine lives it: it keeps rows in slots, and after every step each slot
// must hold, bit for bit, the session's row of the token it stands for.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cpp/shared_memory.h"
#include "tests/e2e/sequences.h"

namespace dynsplit::e2e {
namespace {

class SessionReuseTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { server_ = new SessionServer; }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }
  void TearDown() override { EXPECT_TRUE(server_->server().ReturnsToBaseline()); }

  static SessionServer* server_;
};
SessionServer* SessionReuseTest::server_ = nullptr;

constexpr size_t kLayers = 3, kHeads = 3, kDim = 64;

// The rows that an engine keeps: [layers, Hkv, n] slots.
struct Engine {
  std::string keys, values, key_scales, value_scales;
  std::vector<int32_t> held;
  int64_t num_rows = 0;

  void Resize(int64_t n, size_t row_bytes, bool scaled) {
    num_rows = n;
    const size_t slots = kLayers * kHeads * static_cast<size_t>(n);
    keys.assign(slots * row_bytes, '\x5a');
    values.assign(slots * row_bytes, '\x5a');
    key_scales.assign(scaled ? slots * 4 : 0, '\x5a');
    value_scales.assign(scaled ? slots * 4 : 0, '\x5a');
    held.assign(slots, -7);
  }

  // Puts the rows of an inline answer where it says.
  void Take(const v1::SequenceSelection& selection) {
    ASSERT_EQ(selection.moved_size(), static_cast<int>(kLayers));
    held = Int32s(selection.held_tokens());
    for (size_t l = 0; l < kLayers; ++l) {
      const v1::MovedRows& moved = selection.moved(static_cast<int>(l));
      const std::vector<int32_t> slots = Int32s(moved.slots());
      const auto m = static_cast<size_t>(moved.num_rows());
      ASSERT_EQ(slots.size(), kHeads * m);
      for (size_t h = 0; h < kHeads; ++h) {
        const auto begin = slots.begin() + static_cast<std::ptrdiff_t>(h * m);
        EXPECT_EQ(std::set<int32_t>(begin, begin + static_cast<std::ptrdiff_t>(m)).size(), m)
            << "a head's slots are not all different";
        for (size_t i = 0; i < m; ++i) {
          const size_t slot = (l * kHeads + h) * static_cast<size_t>(num_rows) +
                              static_cast<size_t>(slots[h * m + i]);
          Put(moved.keys(), h * m + i, kHeads * m, slot, keys);
          Put(moved.values(), h * m + i, kHeads * m, slot, values);
          if (key_scales.empty()) continue;
          Put(moved.key_scales(), h * m + i, kHeads * m, slot, key_scales);
          Put(moved.value_scales(), h * m + i, kHeads * m, slot, value_scales);
        }
      }
    }
  }

 private:
  static void Put(const std::string& from, size_t row, size_t num_rows, size_t slot,
                  std::string& to) {
    const size_t bytes = from.size() / num_rows;
    ASSERT_LE((slot + 1) * bytes, to.size());
    std::memcpy(&to[slot * bytes], &from[row * bytes], bytes);
  }
};

// Every head's slots hold exactly the chosen tokens, and their rows.
void ExpectRows(const Engine& engine, const std::vector<int32_t>& chosen,
                const RestingRows& truth) {
  const auto n = static_cast<size_t>(engine.num_rows);
  ASSERT_EQ(chosen.size(), kLayers * kHeads * n);
  ASSERT_EQ(engine.held.size(), chosen.size());
  const size_t row = engine.keys.size() / chosen.size();
  for (size_t l = 0; l < kLayers; ++l) {
    const RestingRows::Layer& layer = truth.layers[l];
    for (size_t h = 0; h < kHeads; ++h) {
      const size_t first = (l * kHeads + h) * n;
      std::vector<int32_t> held(engine.held.begin() + static_cast<std::ptrdiff_t>(first),
                                engine.held.begin() + static_cast<std::ptrdiff_t>(first + n));
      for (size_t i = 0; i < n; ++i) {
        const auto at = static_cast<size_t>(held[i]) * kHeads + h;
        ASSERT_LT(at * row, layer.keys.size());
        ASSERT_EQ(std::memcmp(&engine.keys[(first + i) * row], &layer.keys[at * row], row), 0)
            << "layer " << l << " head " << h << " slot " << i << " token " << held[i];
        ASSERT_EQ(std::memcmp(&engine.values[(first + i) * row], &layer.values[at * row], row), 0);
        if (engine.key_scales.empty()) continue;
        ASSERT_EQ(std::memcmp(&engine.key_scales[(first + i) * 4], &layer.key_scales[at * 4], 4),
                  0);
        ASSERT_EQ(
            std::memcmp(&engine.value_scales[(first + i) * 4], &layer.value_scales[at * 4], 4), 0);
      }
      std::sort(held.begin(), held.end());
      ASSERT_TRUE(
          std::equal(held.begin(), held.end(), chosen.begin() + static_cast<std::ptrdiff_t>(first)))
          << "layer " << l << " head " << h << " holds other tokens than were chosen";
    }
  }
}

// Rows that any head of the new set lacks, most of them, times heads: what regular tensors move.
int64_t RowsToMove(const std::vector<int32_t>& before, const std::vector<int32_t>& now, size_t n) {
  int64_t moved = 0;
  for (size_t set = 0; set < kLayers * kHeads; ++set) {
    const auto at = static_cast<std::ptrdiff_t>(set * n);
    const auto end = at + static_cast<std::ptrdiff_t>(n);
    std::vector<int32_t> fresh;
    std::set_difference(now.begin() + at, now.begin() + end, before.begin() + at,
                        before.begin() + end, std::back_inserter(fresh));
    moved += static_cast<int64_t>(fresh.size());
  }
  return moved;
}

CompressJob OpenWith(const Sequence& sequence, int64_t end, v1::Encoding::Format format) {
  CompressJob job = OpenJob(sequence, end, sequence.tokens() - end);
  job.begin.mutable_policy()->mutable_encoding()->set_key(format);
  job.begin.mutable_policy()->mutable_encoding()->set_value(format);
  return job;
}

size_t RowBytes(v1::Encoding::Format format) {
  return format == v1::Encoding::FORMAT_AS_IS ? kDim * 2 : kDim;
}

TEST_F(SessionReuseTest, InlineRowsFollowEveryStep) {
  const Sequence sequence = SampleSequence("prose");
  for (const v1::Encoding::Format format :
       {v1::Encoding::FORMAT_AS_IS, v1::Encoding::FORMAT_FLOAT8_E4M3, v1::Encoding::FORMAT_INT8}) {
    SCOPED_TRACE(v1::Encoding::Format_Name(format));
    const bool scaled = format != v1::Encoding::FORMAT_AS_IS;
    const std::string id =
        server_->Open(OpenWith(sequence, sequence.tokens(), format)).session_id();
    const RestingRows truth = server_->Fetch(id);
    Engine engine;
    engine.Resize(128, RowBytes(format), scaled);
    std::vector<int32_t> before;
    uint64_t generation = 0;
    for (int64_t behind = 24; behind >= 0; --behind) {
      v1::SequenceStep step = StepOf(sequence, id, behind);
      step.set_tokens_per_head(128);
      step.mutable_gather()->set_generation(generation);
      const v1::SequenceSelection selection = server_->Select(step);
      const std::vector<int32_t> chosen = Int32s(selection.tokens());
      EXPECT_NE(selection.generation(), 0U);
      EXPECT_NE(selection.generation(), generation);
      EXPECT_EQ(selection.chosen_rows(), static_cast<int64_t>(kLayers * kHeads) * 128);
      const int64_t expected =
          before.empty() ? selection.chosen_rows() : RowsToMove(before, chosen, 128);
      EXPECT_EQ(selection.moved_rows(), expected);
      generation = selection.generation();
      ASSERT_NO_FATAL_FAILURE(engine.Take(selection));
      ASSERT_NO_FATAL_FAILURE(ExpectRows(engine, chosen, truth)) << behind;
      before = chosen;
    }
    EXPECT_GT(server_->Get(id).bytes().reuse(), 0);
    server_->Release(id);
  }
}

TEST_F(SessionReuseTest, RowsSurviveAppends) {
  const Sequence sequence = SampleSequence("code");
  const std::string id =
      server_->Open(OpenWith(sequence, 600, v1::Encoding::FORMAT_AS_IS)).session_id();
  Engine engine;
  engine.Resize(96, RowBytes(v1::Encoding::FORMAT_AS_IS), false);
  uint64_t generation = 0;
  int64_t later = 0;
  for (int64_t tokens = 600; tokens < 640; ++tokens) {
    v1::SequenceStep step = StepOf(sequence, id, tokens % 16);
    step.set_tokens_per_head(96);
    step.mutable_gather()->set_generation(generation);
    const v1::SequenceSelection selection = server_->Select(step);
    EXPECT_EQ(selection.num_tokens(), tokens);
    if (generation != 0) later += selection.moved_rows();
    generation = selection.generation();
    ASSERT_NO_FATAL_FAILURE(engine.Take(selection));
    ASSERT_NO_FATAL_FAILURE(ExpectRows(engine, Int32s(selection.tokens()), server_->Fetch(id)));
    server_->Append(sequence, id, tokens, tokens + 1);
  }
  EXPECT_LT(later, 39 * 9 * 96 / 2) << "hardly anything was reused";
  server_->Release(id);
}

TEST_F(SessionReuseTest, LostAnswersAndOtherShapesMoveAll) {
  const Sequence sequence = SampleSequence("dialogue");
  const std::string id = server_->OpenAll(sequence);
  const RestingRows truth = server_->Fetch(id);
  const auto gather = [&](int64_t n, uint64_t generation) {
    v1::SequenceStep step = StepOf(sequence, id, 3);
    step.set_tokens_per_head(n);
    step.mutable_gather()->set_generation(generation);
    return server_->Select(step);
  };
  Engine engine;
  engine.Resize(100, RowBytes(v1::Encoding::FORMAT_AS_IS), false);
  const v1::SequenceSelection first = gather(100, 0);
  EXPECT_EQ(first.moved_rows(), 900);
  // The same step again moves nothing; its answer is lost.
  const v1::SequenceSelection lost = gather(100, first.generation());
  EXPECT_EQ(lost.moved_rows(), 0);
  // The engine still names the generation before: all rows come, and they are right.
  const v1::SequenceSelection resent = gather(100, first.generation());
  EXPECT_EQ(resent.moved_rows(), 900);
  ASSERT_NO_FATAL_FAILURE(engine.Take(resent));
  ASSERT_NO_FATAL_FAILURE(ExpectRows(engine, Int32s(resent.tokens()), truth));
  // Another n, and the right generation.
  engine.Resize(101, RowBytes(v1::Encoding::FORMAT_AS_IS), false);
  const v1::SequenceSelection wider = gather(101, resent.generation());
  EXPECT_EQ(wider.moved_rows(), 909);
  ASSERT_NO_FATAL_FAILURE(engine.Take(wider));
  ASSERT_NO_FATAL_FAILURE(ExpectRows(engine, Int32s(wider.tokens()), truth));
  // Other layers.
  v1::SequenceStep step = StepOf(sequence, id, 3);
  step.set_first_layer(1);
  step.set_tokens_per_head(101);
  step.mutable_query_data()->erase(0, step.query_data().size() / 3);
  step.mutable_gather()->set_generation(wider.generation());
  EXPECT_EQ(server_->Select(step).moved_rows(), 606);
  // Zero never matches, and a plain Select in between changes nothing.
  const v1::SequenceSelection again = gather(100, 0);
  EXPECT_EQ(again.moved_rows(), 900);
  server_->Select(StepOf(sequence, id));
  EXPECT_EQ(gather(100, again.generation()).moved_rows(), 0);
  server_->Release(id);
}

// All that a step reads and writes, in one region.
class StepMemory {
 public:
  StepMemory(SessionServer& server, int64_t n, size_t row_bytes, bool scaled) : server_(server) {
    const size_t slots = kLayers * kHeads * static_cast<size_t>(n);
    size_t end = 0;
    const auto part = [&end](size_t size) {
      const size_t begin = end;
      end = (end + size + 255) / 256 * 256;
      return begin;
    };
    queries = part(kLayers * 9 * kDim * 2);
    tokens = part(slots * 4);
    keys = part(slots * row_bytes);
    values = part(slots * row_bytes);
    key_scales = part(scaled ? slots * 4 : 0);
    value_scales = part(scaled ? slots * 4 : 0);
    held = part(slots * 4);
    memory_ = *SharedMemory::Create(end);
    const auto region = server_.client().RegisterRegion(memory_->Registration(kName, true));
    EXPECT_TRUE(region.ok()) << region.status();
    if (region.ok()) generation_ = region->generation();
  }
  ~StepMemory() {
    v1::UnregisterRegionRequest request;
    request.set_name(kName);
    EXPECT_TRUE(server_.client().UnregisterRegion(request).ok());
  }
  StepMemory(const StepMemory&) = delete;
  StepMemory& operator=(const StepMemory&) = delete;

  v1::RegionSlice Slice(size_t offset) const {
    return SliceOf(kName, generation_, static_cast<int64_t>(offset));
  }
  char* At(size_t offset) { return reinterpret_cast<char*>(memory_->bytes().data()) + offset; }
  std::string Text(size_t offset, size_t size) { return {At(offset), size}; }

  size_t queries = 0, tokens = 0, keys = 0, values = 0, key_scales = 0, value_scales = 0, held = 0;

 private:
  static constexpr char kName[] = "step";
  SessionServer& server_;
  std::unique_ptr<SharedMemory> memory_;
  uint64_t generation_ = 0;
};

TEST_F(SessionReuseTest, RowsInSharedMemoryFollowEveryStep) {
  const Sequence sequence = SampleSequence("code");
  constexpr int64_t kRows = 140;
  constexpr size_t kSlots = kLayers * kHeads * kRows;
  for (const v1::Encoding::Format format :
       {v1::Encoding::FORMAT_AS_IS, v1::Encoding::FORMAT_FLOAT8_E4M3}) {
    SCOPED_TRACE(v1::Encoding::Format_Name(format));
    const bool scaled = format != v1::Encoding::FORMAT_AS_IS;
    const std::string id =
        server_->Open(OpenWith(sequence, sequence.tokens(), format)).session_id();
    const RestingRows truth = server_->Fetch(id);
    StepMemory memory(*server_, kRows, RowBytes(format), scaled);
    uint64_t generation = 0;
    for (int64_t behind = 20; behind >= 0; --behind) {
      v1::SequenceStep inline_step = StepOf(sequence, id, behind);
      inline_step.set_tokens_per_head(kRows);
      v1::SequenceStep step = inline_step;
      step.clear_query_data();
      *step.mutable_query_region() = memory.Slice(memory.queries);
      std::memcpy(memory.At(memory.queries), inline_step.query_data().data(),
                  inline_step.query_data().size());
      *step.mutable_token_region() = memory.Slice(memory.tokens);
      v1::GatherRows& gather = *step.mutable_gather();
      gather.set_generation(generation);
      *gather.mutable_key_region() = memory.Slice(memory.keys);
      *gather.mutable_value_region() = memory.Slice(memory.values);
      *gather.mutable_held_region() = memory.Slice(memory.held);
      if (scaled) {
        *gather.mutable_key_scale_region() = memory.Slice(memory.key_scales);
        *gather.mutable_value_scale_region() = memory.Slice(memory.value_scales);
      }
      const v1::SequenceSelection selection = server_->Select(step);
      EXPECT_TRUE(selection.tokens().empty());
      EXPECT_TRUE(selection.held_tokens().empty());
      EXPECT_EQ(selection.moved_size(), 0);
      EXPECT_LE(selection.moved_rows(), generation == 0 ? int64_t{kSlots} : int64_t{kSlots} / 2);
      generation = selection.generation();
      const std::vector<int32_t> chosen = Int32s(memory.Text(memory.tokens, kSlots * 4));
      EXPECT_EQ(chosen, Int32s(server_->Select(inline_step).tokens()));
      Engine engine;
      engine.num_rows = kRows;
      engine.keys = memory.Text(memory.keys, kSlots * RowBytes(format));
      engine.values = memory.Text(memory.values, kSlots * RowBytes(format));
      if (scaled) {
        engine.key_scales = memory.Text(memory.key_scales, kSlots * 4);
        engine.value_scales = memory.Text(memory.value_scales, kSlots * 4);
      }
      engine.held = Int32s(memory.Text(memory.held, kSlots * 4));
      ASSERT_NO_FATAL_FAILURE(ExpectRows(engine, chosen, truth)) << behind;
    }
    server_->Release(id);
  }
}

TEST_F(SessionReuseTest, TensorsInSharedMemoryOpenAndAppend) {
  const Sequence sequence = SampleSequence("prose");
  constexpr int64_t kFirst = 700;
  CompressJob open = OpenJob(sequence, kFirst, sequence.tokens() - kFirst);
  CompressJob append = AppendJob(sequence, "", kFirst, sequence.tokens());
  size_t total = 0;
  for (const CompressJob* job : {&open, &append}) {
    for (const InputTensor& tensor : job->tensors) total += (tensor.bytes.size() + 63) / 64 * 64;
  }
  const auto memory = *SharedMemory::Create(total);
  const auto region = server_->client().RegisterRegion(memory->Registration("kv", false));
  ASSERT_TRUE(region.ok()) << region.status();
  size_t at = 0;
  for (CompressJob* job : {&open, &append}) {
    for (InputTensor& tensor : job->tensors) {
      std::memcpy(memory->bytes().data() + at, tensor.bytes.data(), tensor.bytes.size());
      tensor.region = SliceOf("kv", region->generation(), static_cast<int64_t>(at));
      at += (tensor.bytes.size() + 63) / 64 * 64;
    }
  }
  const absl::StatusOr<CompressResult> opened = server_->client().OpenSession(open);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->sent_bytes, 0);
  const std::string id = opened->end.session().session_id();
  append.begin.mutable_target()->set_session_id(id);
  const absl::StatusOr<CompressResult> appended = server_->client().AppendSession(append);
  ASSERT_TRUE(appended.ok()) << appended.status();
  const RestingRows rows = server_->Fetch(id);
  for (size_t l = 0; l < kLayers; ++l) {
    EXPECT_TRUE(rows.layers[l].keys == sequence.keys[l]);
    EXPECT_TRUE(rows.layers[l].values == sequence.values[l]);
  }
  const std::string streamed = server_->OpenAll(sequence);
  EXPECT_EQ(server_->Select(StepOf(sequence, id)).tokens(),
            server_->Select(StepOf(sequence, streamed)).tokens());
  server_->Release(streamed);
  server_->Release(id);
  v1::UnregisterRegionRequest request;
  request.set_name("kv");
  EXPECT_TRUE(server_->client().UnregisterRegion(request).ok());
}

TEST_F(SessionReuseTest, ResponsesTooLargeForAMessageAreRefusedAndNothingMoves) {
  // 3 layers of 3 heads of 64 bf16: 8 MiB need more rows than the sample has; a wide sequence does.
  const Sequence sequence = RandomSequence({.num_layers = 4,
                                            .num_query_heads = 8,
                                            .num_kv_heads = 8,
                                            .head_dim = 128,
                                            .num_tokens = 1000,
                                            .num_queries = 1});
  const std::string id = server_->OpenAll(sequence);
  v1::SequenceStep step = StepOf(sequence, id);
  step.set_tokens_per_head(1000);
  step.mutable_gather();
  const auto response = server_->client().Select(Request({step}));
  EXPECT_TRUE(absl::IsResourceExhausted(response.status()) ||
              absl::IsInvalidArgument(response.status()))
      << response.status();
  step.set_tokens_per_head(64);
  const v1::SequenceSelection after = server_->Select(step);
  EXPECT_EQ(after.moved_rows(), after.chosen_rows());
  server_->Release(id);
}

}  // namespace
}  // namespace dynsplit::e2e

// SPDX-License-Identifier: Apache-2.0
//
// Many engines at once: whatever shares a launch, each is answered as if it were alone.
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/e2e/sequences.h"

namespace dynsplit::e2e {
namespace {

constexpr int kEngines = 12;
constexpr int kSteps = 12;

// What one engine asks in its decode steps. Some reuse rows, some ask for scores or pages.
v1::SequenceStep EngineStep(const Sequence& sequence, const std::string& id, int engine, int step,
                            uint64_t generation) {
  v1::SequenceStep wire = StepOf(sequence, id, step % sequence.num_queries);
  wire.set_tokens_per_head(24 + engine % 3);
  wire.set_with_scores(engine % 2 == 0);
  wire.set_with_pages(engine % 3 == 0);
  if (engine % 4 < 2) wire.mutable_gather()->set_generation(generation);
  return wire;
}

// Every answer of an engine's steps, without what is random in it.
std::vector<std::string> Decode(Client& client, const Sequence& sequence, const std::string& id,
                                int engine) {
  std::vector<std::string> answers;
  uint64_t generation = 0;
  for (int step = 0; step < kSteps; ++step) {
    const absl::StatusOr<v1::SelectResponse> response =
        client.Select(Request({EngineStep(sequence, id, engine, step, generation)}));
    if (!response.ok()) {
      ADD_FAILURE() << response.status();
      return answers;
    }
    v1::SequenceSelection selection = response->sequences(0);
    generation = selection.generation();
    selection.clear_generation();
    answers.push_back(selection.SerializeAsString());
  }
  return answers;
}

TEST(SelectBatchingTest, ConcurrentSelectsEqualLoneOnes) {
  SessionServer server;
  std::vector<Sequence> sequences;
  std::vector<std::string> ids;
  std::vector<std::vector<std::string>> alone(kEngines);
  for (int engine = 0; engine < kEngines; ++engine) {
    sequences.push_back(RandomSequence({.num_layers = 2 + engine % 2,
                                        .num_tokens = 90 + 7 * engine,
                                        .num_queries = 8,
                                        .seed = static_cast<uint64_t>(engine + 1)}));
    const std::string id = server.OpenAll(sequences.back());
    alone[static_cast<size_t>(engine)] = Decode(server.client(), sequences.back(), id, engine);
    server.Release(id);
    ids.push_back(server.OpenAll(sequences.back()));
  }
  std::vector<std::vector<std::string>> together(kEngines);
  std::vector<std::thread> engines;
  for (int engine = 0; engine < kEngines; ++engine) {
    engines.emplace_back([&, engine] {
      const auto i = static_cast<size_t>(engine);
      const auto client = server.AnotherClient();
      together[i] = Decode(*client, sequences[i], ids[i], engine);
    });
  }
  for (std::thread& engine : engines) engine.join();
  for (size_t i = 0; i < kEngines; ++i) {
    ASSERT_EQ(together[i].size(), alone[i].size());
    for (size_t step = 0; step < alone[i].size(); ++step) {
      EXPECT_TRUE(together[i][step] == alone[i][step]) << "engine " << i << " step " << step;
    }
    server.Release(ids[i]);
  }
  EXPECT_TRUE(
      absl::StrContains(server.server().Http("/metrics"),
                        absl::StrCat("dynsplit_select_batch_calls_sum ", 2 * kEngines * kSteps)));
  EXPECT_TRUE(server.server().ReturnsToBaseline());
}

TEST(SelectBatchingTest, EnginesThatReadOneSessionShareIt) {
  SessionServer server;
  const Sequence sequence = SampleSequence("prose");
  const std::string id = server.OpenAll(sequence);
  std::vector<std::string> alone;
  for (int64_t behind = 0; behind < 8; ++behind) {
    alone.push_back(AnswerOf(server.Select(StepOf(sequence, id, behind))));
  }
  std::vector<std::thread> engines;
  for (int64_t engine = 0; engine < 8; ++engine) {
    engines.emplace_back([&, engine] {
      const auto client = server.AnotherClient();
      for (int64_t step = 0; step < 10; ++step) {
        const int64_t behind = (engine + step) % 8;
        const auto response = client->Select(Request({StepOf(sequence, id, behind)}));
        ASSERT_TRUE(response.ok()) << response.status();
        EXPECT_TRUE(AnswerOf(response->sequences(0)) == alone[static_cast<size_t>(behind)]);
      }
    });
  }
  for (std::thread& engine : engines) engine.join();
  server.Release(id);
  EXPECT_TRUE(server.server().ReturnsToBaseline());
}

}  // namespace
}  // namespace dynsplit::e2e

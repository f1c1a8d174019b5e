// SPDX-License-Identifier: Apache-2.0
//
// Parity of SegmentTokens: cuts are equal, not close.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "tests/oracle/device_session.h"
#include "tests/oracle/parity_suite.h"
#include "tests/oracle/reference.h"
#include "tests/oracle/tolerance.h"

namespace dynsplit::oracle {
namespace {

constexpr int32_t kNumWeights = 64;
constexpr int32_t kWord = 63;     // weighs nothing
constexpr int32_t kUnknown = 90;  // beyond the table
constexpr int64_t kChunk = 1024;  // of the device's kernels, at least

struct SegmentRule {
  int32_t block_size;
  int32_t max_deviation;
  double balance;
};

// Few different weights, so that values tie.
std::vector<float> Weights() {
  Random random(31);
  std::vector<float> weights;
  for (int32_t id = 0; id < kNumWeights; ++id) {
    const int64_t draw = random.Between(0, 5);
    weights.push_back(draw == 0   ? -1.0F
                      : draw == 1 ? static_cast<float>(random.Uniform())
                                  : static_cast<float>(draw - 2) / 3);
  }
  weights[kWord] = -1;
  weights[1] = 0;
  weights[2] = 1;
  return weights;
}

std::vector<int32_t> RandomText(int64_t num_tokens, double delimiter_share, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> ids;
  ids.reserve(static_cast<size_t>(num_tokens));
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (random.Uniform() < delimiter_share) {
      ids.push_back(static_cast<int32_t>(random.Between(0, kNumWeights - 2)));
    } else {
      ids.push_back(t % 7 == 0 ? kUnknown : t % 11 == 0 ? -1 : kWord);
    }
  }
  return ids;
}

// Runs of delimiters that begin, end and lie at multiples of the chunk.
std::vector<int32_t> RunsAcrossBorders(int64_t num_tokens) {
  std::vector<int32_t> ids = RandomText(num_tokens, 0.02, 33);
  Random random(34);
  for (int64_t border = kChunk; border < num_tokens + 40; border += kChunk) {
    const int64_t first = border - random.Between(0, 30);
    const int64_t last = std::min(first + random.Between(0, 45), num_tokens);
    for (int64_t t = first; t < last; ++t) {
      ids[static_cast<size_t>(t)] = static_cast<int32_t>(random.Between(1, 2));
    }
  }
  return ids;
}

void CheckText(Backend& backend, const std::string& name, const std::vector<int32_t>& ids,
               const SegmentRule& rule) {
  SCOPED_TRACE(name + ", T " + std::to_string(ids.size()) + ", C " +
               std::to_string(rule.block_size) + ", Delta " + std::to_string(rule.max_deviation) +
               ", balance " + std::to_string(rule.balance));
  const std::vector<float> weights = Weights();
  const SegmentTokensParams host = {.token_ids = ids.data(),
                                    .num_tokens = std::ssize(ids),
                                    .weights = weights.data(),
                                    .num_weights = std::ssize(weights),
                                    .block_size = rule.block_size,
                                    .max_deviation = rule.max_deviation,
                                    .balance = rule.balance};
  const Segmentation expected = SegmentTokens(host);
  DeviceSession session(backend);
  SegmentTokensParams device = host;
  device.token_ids = session.Upload(ids);
  device.weights = session.Upload(weights);
  const int64_t most = MaxSegmentStarts(host.num_tokens, rule.block_size, rule.max_deviation);
  ASSERT_LE(std::ssize(expected.starts), most);
  Output<int32_t> starts = session.Poisoned<int32_t>(most);
  Output<int32_t> counts = session.Poisoned<int32_t>(2);
  device.block_starts = starts.data();
  device.counts = counts.data();
  const absl::Status status = backend.SegmentTokens(device, session.stream());
  ASSERT_TRUE(status.ok()) << status;
  const std::vector<int32_t> count_values = session.Read(std::move(counts));
  std::vector<int32_t> start_values = session.Read(std::move(starts));
  ASSERT_EQ(count_values[0], expected.num_blocks());
  ASSERT_EQ(count_values[1], expected.open_begin);
  start_values.resize(expected.starts.size());
  ExpectEqual(start_values, expected.starts, "starts");
}

void CheckTexts(Backend& backend, int64_t num_tokens, const SegmentRule& rule) {
  CheckText(backend, "sparse", RandomText(num_tokens, 0.03, 35), rule);
  CheckText(backend, "dense", RandomText(num_tokens, 0.4, 36), rule);
  CheckText(backend, "runs across borders", RunsAcrossBorders(num_tokens), rule);
  const auto count = static_cast<size_t>(num_tokens);
  CheckText(backend, "no delimiters", std::vector<int32_t>(count, kWord), rule);
  CheckText(backend, "only delimiters", std::vector<int32_t>(count, 2), rule);
}

constexpr SegmentRule kRules[] = {{14, 6, 0.6}, {14, 6, 0},    {14, 6, 1},       {1, 0, 0.5},
                                  {2, 1, 0.9},  {33, 32, 0.3}, {100, 7, 1 / 3.0}};
// Windows as long as a chunk, longer ones, the longest.
constexpr SegmentRule kLongRules[] = {
    {1000, 24, 0.6}, {1024, 1, 0.6}, {1024, 1000, 0.7}, {4096, 4000, 0.5}, {4096, 4095, 0.6}};

}  // namespace

void CheckSegmentTokens(Backend& backend, const ParityShape& shape) {
  for (const SegmentRule& rule : kRules) {
    CheckTexts(backend, shape.num_tokens, rule);
    if (testing::Test::HasFatalFailure()) return;
  }
  if (shape.num_tokens < 2 * kChunk || shape.num_tokens > 16 * kChunk) return;
  for (const SegmentRule& rule : kLongRules) {
    CheckTexts(backend, shape.num_tokens, rule);
    if (testing::Test::HasFatalFailure()) return;
  }
}

void CheckSegmentLengths(Backend& backend) {
  constexpr SegmentRule kRule = {14, 6, 0.6};
  for (int64_t around : {int64_t{20}, kChunk, 32 * kChunk}) {  // window, chunk, span of chunks
    for (int64_t num_tokens = around - 2; num_tokens <= around + 2; ++num_tokens) {
      CheckTexts(backend, num_tokens, kRule);
    }
    CheckTexts(backend, around + 19, kRule);
  }
  for (int64_t num_tokens = 1; num_tokens < 19; ++num_tokens)
    CheckTexts(backend, num_tokens, kRule);
  CheckText(backend, "a million", RandomText(1'000'000, 0.1, 37), kRule);
  CheckText(backend, "a million", RandomText(1'000'000, 0.2, 38), {64, 40, 0.3});
}

}  // namespace dynsplit::oracle

// SPDX-License-Identifier: Apache-2.0
//
// Times of what decides and does not move rows: segmentation, block scores, selection. Inputs come
// from memory (ColdTimer). A floor counts each input byte read once and each output byte written
// once at the measured copy (or read) rate.
#include <algorithm>
#include <string>
#include <vector>

#include "cuda/operations.h"
#include "tests/bench/device_bench.h"
#include "tests/bench/report.h"
#include "tests/oracle/random_tensors.h"

namespace dynsplit::bench {
namespace {

constexpr double kKeptRatio = 0.2;
constexpr int64_t kWindow = 64;
constexpr int32_t kHeads = 8;

class SelectionBench {
 public:
  explicit SelectionBench(const Device& device)
      : device_(device), ceilings_(MeasureCeilings(device)), timer_(device) {}

  void Run() const {
    for (const int64_t num_tokens : {32768, 131072, 524288}) {
      for (const int32_t groups : {8, 1}) {
        const bool is_target = num_tokens == 131072;
        SelectTokens(num_tokens, groups, false,
                     !is_target    ? ""
                     : groups == 8 ? "value <= 20"
                                   : "value <= 15");
        SelectTokens(num_tokens, groups, true, is_target ? "value <= 40" : "");
      }
    }
    SelectBlocks(1, "value <= 10");
    SelectBlocks(16, "");
    for (const int64_t num_tokens : {32768, 131072, 524288}) ReduceBlocks(num_tokens);
    SegmentTokens(1'000'000, "value <= 100");
  }

 private:
  // Microseconds.
  double Time(const std::function<void(int)>& run) const { return 1e3 * timer_.Time(run); }
  // At a rate in GB/s.
  static double FloorUs(int64_t bytes, double gbps) {
    return static_cast<double>(bytes) / gbps / 1e3;
  }
  // As attention has them: positive, over several orders of magnitude.
  static std::vector<float> Scores(int64_t count) {
    oracle::Random random(51);
    std::vector<float> scores(static_cast<size_t>(count));
    for (float& score : scores) {
      const auto x = static_cast<float>(random.Uniform());
      score = 1e-6F + 0.01F * x * x * x * x;
    }
    return scores;
  }
  static std::vector<int32_t> Starts(int64_t num_tokens, bool one_token) {
    oracle::ParityShape shape = {.name = "bench", .num_tokens = num_tokens};
    if (one_token) shape.min_block = shape.max_block = 1;
    return oracle::RandomBlockStarts(shape, 1);
  }

  void SelectTokens(int64_t num_tokens, int32_t groups, bool one_token,
                    const std::string& target) const {
    const std::vector<int32_t> host_starts = Starts(num_tokens, one_token);
    const auto num_blocks = static_cast<int64_t>(host_starts.size()) - 1;
    const auto num_kept = static_cast<int64_t>(kKeptRatio * static_cast<double>(num_tokens));
    std::vector<uint8_t> host_protected(static_cast<size_t>(num_tokens), 0);
    for (int64_t t = 0; t < num_tokens; ++t) {
      host_protected[static_cast<size_t>(t)] = t < 4 || t >= num_tokens - kWindow;
    }
    const Buffer starts = Upload(device_, host_starts);
    const Buffer is_protected = Upload(device_, host_protected);
    const Buffer block_scores = Upload(device_, Scores(groups * num_blocks));
    const Buffer token_scores = Upload(device_, Scores(groups * num_tokens));
    const Buffer kept = device_.Allocate(groups * num_kept * 4);
    const Buffer counts = device_.Allocate(groups * int64_t{4});
    const double us = Time([&](int) {
      Check(kernels::SelectTokens({.block_scores = block_scores.as<float>(),
                                   .token_scores = one_token ? nullptr : token_scores.as<float>(),
                                   .groups = groups,
                                   .num_tokens = num_tokens,
                                   .block_starts = starts.as<int32_t>(),
                                   .num_blocks = num_blocks,
                                   .protected_tokens = is_protected.as<uint8_t>(),
                                   .num_kept = num_kept,
                                   .kept = kept.as<int32_t>(),
                                   .kept_counts = counts.as<int32_t>()},
                                  device_.launch));
    });
    const int64_t bytes = 4 * num_blocks * (groups + 1) + num_tokens + 4 * groups * num_kept;
    Report(Cost("cuda/select_tokens/blocks=" + std::string(one_token ? "1" : "14") +
                    "/groups=" + std::to_string(groups) + "/T=" + std::to_string(num_tokens),
                us, "us", FloorUs(bytes, ceilings_.copy_gbps), target));
  }

  // One item of kHeads groups each.
  void SelectBlocks(int num_items, const std::string& target) const {
    constexpr int64_t kTokens = 131072;
    const std::vector<int32_t> host_starts = Starts(kTokens, false);
    const auto num_blocks = static_cast<int64_t>(host_starts.size()) - 1;
    const auto num_selected = static_cast<int64_t>(kKeptRatio * kTokens);
    const Buffer starts = Upload(device_, host_starts);
    const Buffer scores = Upload(device_, Scores(num_items * kHeads * num_blocks));
    const Buffer tokens = device_.Allocate(num_items * kHeads * num_selected * 4);
    std::vector<SelectBlocksItem> items(static_cast<size_t>(num_items));
    for (size_t i = 0; i < items.size(); ++i) {
      const auto first_group = static_cast<int64_t>(i) * kHeads;
      items[i] = {.block_scores = scores.as<float>() + first_group * num_blocks,
                  .block_starts = starts.as<int32_t>(),
                  .num_blocks = num_blocks,
                  .num_tokens = kTokens,
                  .prefix_end = 4,
                  .suffix_begin = kTokens - kWindow,
                  .num_selected = num_selected,
                  .tokens = tokens.as<int32_t>() + first_group * num_selected};
    }
    const double us = Time([&](int) {
      Check(kernels::SelectBlocks({.items = items, .groups = kHeads}, device_.launch));
    });
    const int64_t groups = int64_t{num_items} * kHeads;
    const int64_t bytes = 4 * num_blocks * (groups + 1) + 4 * groups * num_selected;
    Report(Cost("cuda/select_blocks/groups=" + std::to_string(groups), us, "us",
                FloorUs(bytes, ceilings_.copy_gbps), target));
  }

  void ReduceBlocks(int64_t num_tokens) const {
    const std::vector<int32_t> host_starts = Starts(num_tokens, false);
    const auto num_blocks = static_cast<int64_t>(host_starts.size()) - 1;
    const Buffer starts = Upload(device_, host_starts);
    const Buffer scores = Upload(device_, Scores(kHeads * num_tokens));
    const Buffer block_scores = device_.Allocate(kHeads * num_blocks * 4);
    const double us = Time([&](int) {
      Check(kernels::ReduceBlocks({.token_scores = scores.as<float>(),
                                   .rows = kHeads,
                                   .num_tokens = num_tokens,
                                   .block_starts = starts.as<int32_t>(),
                                   .num_blocks = num_blocks,
                                   .block_scores = block_scores.as<float>()},
                                  device_.launch));
    });
    Report(Cost("cuda/reduce_blocks/T=" + std::to_string(num_tokens), us, "us",
                FloorUs(4 * kHeads * num_tokens, ceilings_.read_gbps)));
  }

  // A delimiter every ten tokens, ids of a large vocabulary.
  void SegmentTokens(int64_t num_tokens, const std::string& target) const {
    constexpr int64_t kVocabulary = 128256;
    constexpr int32_t kBlock = 14;
    constexpr int32_t kDeviation = 6;
    oracle::Random random(52);
    std::vector<float> host_weights(kVocabulary, -1.0F);
    for (int64_t id = 0; id < kVocabulary; id += 10) {
      host_weights[static_cast<size_t>(id)] = static_cast<float>(random.Uniform());
    }
    std::vector<int32_t> host_ids(static_cast<size_t>(num_tokens));
    for (int32_t& id : host_ids) id = static_cast<int32_t>(random.Between(0, kVocabulary - 1));
    const Buffer weights = Upload(device_, host_weights);
    const Buffer ids = Upload(device_, host_ids);
    const Buffer starts = device_.Allocate(MaxSegmentStarts(num_tokens, kBlock, kDeviation) * 4);
    const Buffer counts = device_.Allocate(2 * 4);
    const double us = Time([&](int) {
      Check(kernels::SegmentTokens({.token_ids = ids.as<int32_t>(),
                                    .num_tokens = num_tokens,
                                    .weights = weights.as<float>(),
                                    .num_weights = kVocabulary,
                                    .block_size = kBlock,
                                    .max_deviation = kDeviation,
                                    .balance = 0.6,
                                    .block_starts = starts.as<int32_t>(),
                                    .counts = counts.as<int32_t>()},
                                   device_.launch));
    });
    const int64_t bytes = 4 * (num_tokens + kVocabulary + num_tokens / kBlock);
    Report(Cost("cuda/segment_tokens/T=" + std::to_string(num_tokens), us, "us",
                FloorUs(bytes, ceilings_.copy_gbps), target));
  }

  const Device& device_;
  const Ceilings ceilings_;
  const ColdTimer timer_;
};

void Main() {
  const Device device = OpenDevice();
  SelectionBench(device).Run();
}

}  // namespace
}  // namespace dynsplit::bench

int main() { dynsplit::bench::Main(); }

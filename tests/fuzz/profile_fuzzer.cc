// SPDX-License-Identifier: Apache-2.0
//
// First byte: odd = a configuration file, even = the CSV of a delimiter profile. With a profile
// that is taken, pseudo-random tokens are cut: the blocks must partition them, and the incremental
// form must agree.
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string_view>
#include <vector>

#include "server/pipeline/segmentation.h"
#include "server/runtime/config.h"

namespace {

using dynsplit::DelimiterProfile;
using dynsplit::Segmentation;
using dynsplit::SegmentationPolicy;

void Check(bool condition) {
  if (!condition) std::abort();
}

void ReadConfig(std::string_view text) {
  dynsplit::ServerConfig config;
  if (!dynsplit::ApplyConfigText(text, config).ok()) return;
  (void)dynsplit::ValidateConfig(config);
  // What was taken can be printed and taken again.
  for (const dynsplit::ConfigOption& option : dynsplit::ConfigOptions()) {
    Check(option.set(option.get(config), config).ok());
  }
}

void CheckProfile(const DelimiterProfile& profile) {
  int64_t previous = -1;
  for (const dynsplit::DelimiterWeight& weight : profile.weights()) {
    Check(weight.token_id > previous);
    Check(weight.weight >= 0 && weight.weight <= 1);
    Check(profile.Find(weight.token_id) == &weight);
    previous = weight.token_id;
  }
}

void CheckPartition(const Segmentation& segmentation, int64_t num_tokens,
                    const SegmentationPolicy& policy) {
  const std::vector<int32_t>& starts = segmentation.starts;
  Check(starts.size() >= 2 && starts.front() == 0 && starts.back() == num_tokens);
  bool open_begins_block = false;
  for (size_t i = 1; i < starts.size(); ++i) {
    const int32_t length = starts[i] - starts[i - 1];
    Check(length >= 1);
    open_begins_block = open_begins_block || starts[i] == segmentation.open_begin;
    if (policy.method != SegmentationPolicy::Method::kDynamic) continue;
    Check(length <= policy.block_size + policy.max_deviation);
    const bool closed = starts[i - 1] < segmentation.open_begin;
    Check(!closed || length >= policy.block_size - policy.max_deviation);
  }
  Check(open_begins_block || segmentation.open_begin == 0);
}

void Cut(const DelimiterProfile& profile, std::mt19937& random) {
  const auto below = [&random](uint32_t end) { return static_cast<int32_t>(random() % end); };
  std::vector<int32_t> tokens(static_cast<size_t>(1 + below(200)));
  for (int32_t& token : tokens) {
    token = below(3) == 0 && !profile.weights().empty()
                ? profile.weights()[random() % profile.weights().size()].token_id
                : below(1U << 31);
  }
  SegmentationPolicy policy;
  policy.block_size = 1 + below(24);
  policy.max_deviation = below(static_cast<uint32_t>(policy.block_size));
  policy.balance = below(11) / 10.0;
  // Not owned: the segmenter does not outlive this call.
  const std::shared_ptr<const DelimiterProfile> shared(std::shared_ptr<void>(), &profile);
  for (const auto method :
       {SegmentationPolicy::Method::kDynamic, SegmentationPolicy::Method::kDelimiterSet}) {
    policy.method = method;
    const Segmentation whole = Segment(tokens, policy, &profile);
    CheckPartition(whole, static_cast<int64_t>(tokens.size()), policy);
    dynsplit::IncrementalSegmenter segmenter(policy, shared);
    const std::span<const int32_t> all(tokens);
    const size_t middle = random() % tokens.size();
    segmenter.Append(all.first(middle));
    segmenter.Append(all.subspan(middle));
    Check(segmenter.Current() == whole);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] % 2 == 1) {
    ReadConfig(text);
    return 0;
  }
  const auto profile = DelimiterProfile::FromCsv("fuzzed", text);
  if (!profile.ok()) return 0;
  CheckProfile(*profile);
  std::mt19937 random(static_cast<uint32_t>(std::hash<std::string_view>()(text)));
  Cut(*profile, random);
  return 0;
}

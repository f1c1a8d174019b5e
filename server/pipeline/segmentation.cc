// SPDX-License-Identifier: Apache-2.0
//
// DD-Select of arXiv 2602.03184 section 4.1. From a block start s the ideal end is s + C;
// candidates are the delimiters in [s + C - Delta, s + C + Delta]; the cut e maximises balance *
// w_e + (1 - balance) * p_e. What the paper leaves open, and our completions:
//   * e is the position after its delimiter, which so closes its own block                  (ours)
//   * p_e = 1 - |e - (s + C)| / (Delta + 1)                                                 (ours)
//   * a run of delimiters ("...\n\n") is one candidate: the part of it that lies in the window
//     counts with its largest weight, and e is the end of that part                         (ours)
//   * ties: smaller |e - (s + C)|, then smaller e; no candidate: e = s + C                  (ours)
//   * no cut before all of the window is known, so that a cut never changes                 (ours)
#include "server/pipeline/segmentation.h"

#include <algorithm>
#include <cstdlib>

namespace dynsplit {
namespace {

using Method = SegmentationPolicy::Method;

// What a token id weighs, negative if it is no delimiter: by table, or as a profile has it.
struct WeightTable {
  std::span<const float> weights;
  float operator()(int32_t token_id) const {
    const auto id = static_cast<uint32_t>(token_id);  // negative ids lie beyond any
    return id < weights.size() ? weights[id] : DelimiterProfile::kNoDelimiter;
  }
};
struct ProfileWeights {
  const DelimiterProfile& profile;
  float operator()(int32_t token_id) const {
    const DelimiterWeight* delimiter = profile.Find(token_id);
    return delimiter == nullptr ? DelimiterProfile::kNoDelimiter : delimiter->weight;
  }
};

// Finds the cuts of a token run that starts at a block start. Positions are relative to it.
// cuda/segment_tokens.cu computes the same with the same roundings.
template <typename Weights>
class DynamicCutter {
 public:
  DynamicCutter(const SegmentationPolicy& policy, Weights weights)
      : block_size_(policy.block_size),
        max_deviation_(policy.max_deviation),
        balance_(policy.balance),
        weights_(weights) {}

  // Tokens from a block's start that decide its end.
  size_t lookahead() const {
    return static_cast<size_t>(block_size_) + static_cast<size_t>(max_deviation_);
  }

  // Length of the block that `tokens` begin with. Requires: tokens.size() == lookahead().
  int32_t BlockLength(std::span<const int32_t> tokens) const {
    Candidate best{block_size_, -1};
    const int32_t last = block_size_ + max_deviation_;
    double run_weight = -1;  // negative outside of a run
    for (int32_t end = block_size_ - max_deviation_; end <= last; ++end) {
      const float weight = weights_(tokens[static_cast<size_t>(end - 1)]);
      if (weight >= 0) {
        run_weight = std::max(run_weight, static_cast<double>(weight));
        if (end < last) continue;
        Consider({end, Value(run_weight, end)}, best);
      } else if (run_weight >= 0) {
        Consider({end - 1, Value(run_weight, end - 1)}, best);
        run_weight = -1;
      }
    }
    return best.end;
  }

 private:
  struct Candidate {
    int32_t end;
    double value;
  };

  double Value(double weight, int32_t end) const {
    const double closeness = 1.0 - static_cast<double>(std::abs(end - block_size_)) /
                                       static_cast<double>(max_deviation_ + 1);
    return balance_ * weight + (1.0 - balance_) * closeness;
  }

  // Candidates come in ascending order of their ends, so that a full tie keeps the smaller.
  void Consider(Candidate candidate, Candidate& best) const {
    const bool better = candidate.value > best.value ||
                        (candidate.value == best.value &&
                         std::abs(candidate.end - block_size_) < std::abs(best.end - block_size_));
    if (better) best = candidate;
  }

  int32_t block_size_;
  int32_t max_deviation_;
  double balance_;
  Weights weights_;
};

bool EndsSentence(const DelimiterProfile& profile, int32_t token_id) {
  const DelimiterWeight* delimiter = profile.Find(token_id);
  return delimiter != nullptr && delimiter->sentence_end;
}

// Appends the starts that closed blocks of `tokens`, which begin at starts.back(), give rise to.
template <typename Weights>
void CutDynamic(std::span<const int32_t> tokens, const SegmentationPolicy& policy, Weights weights,
                std::vector<int32_t>& starts) {
  const DynamicCutter<Weights> cutter(policy, weights);
  size_t begin = 0;
  while (tokens.size() - begin >= cutter.lookahead()) {
    const int32_t length = cutter.BlockLength(tokens.subspan(begin, cutter.lookahead()));
    starts.push_back(starts.back() + length);
    begin += static_cast<size_t>(length);
  }
}

void CutDynamic(std::span<const int32_t> tokens, const SegmentationPolicy& policy,
                const DelimiterProfile& profile, std::vector<int32_t>& starts) {
  if (!profile.weight_table().empty()) {
    CutDynamic(tokens, policy, WeightTable{profile.weight_table()}, starts);
  } else {
    CutDynamic(tokens, policy, ProfileWeights{profile}, starts);
  }
}

// As above; `num_seen` leading tokens are known to hold no cut but perhaps behind the last of them.
void CutSentences(std::span<const int32_t> tokens, size_t num_seen, const DelimiterProfile& profile,
                  std::vector<int32_t>& starts) {
  const int32_t offset = starts.back();
  bool previous_ends = num_seen > 0 && EndsSentence(profile, tokens[num_seen - 1]);
  for (size_t i = num_seen; i < tokens.size(); ++i) {
    const bool ends = EndsSentence(profile, tokens[i]);
    // The token after a run of sentence ends opens a block; a run at the very end may still grow.
    if (previous_ends && !ends) starts.push_back(offset + static_cast<int32_t>(i));
    previous_ends = ends;
  }
}

void CutFixed(int64_t num_tokens, int32_t block_size, std::vector<int32_t>& starts) {
  while (num_tokens - starts.back() >= block_size) starts.push_back(starts.back() + block_size);
}

// The tail after the last cut is the open block.
Segmentation WithOpenTail(std::vector<int32_t> starts, int64_t num_tokens) {
  Segmentation segmentation;
  segmentation.open_begin = starts.back();
  if (starts.back() < num_tokens) starts.push_back(static_cast<int32_t>(num_tokens));
  segmentation.starts = std::move(starts);
  return segmentation;
}

}  // namespace

bool ReadsTokenIds(const SegmentationPolicy& policy) {
  return policy.method == Method::kDelimiterSet || policy.method == Method::kDynamic;
}

Segmentation SegmentPositions(int64_t num_tokens, const SegmentationPolicy& policy) {
  const int32_t block_size = policy.method == Method::kNone ? 1 : policy.block_size;
  std::vector<int32_t> starts{0};
  starts.reserve(static_cast<size_t>(num_tokens / block_size + 2));
  CutFixed(num_tokens, block_size, starts);
  return WithOpenTail(std::move(starts), num_tokens);
}

Segmentation Segment(std::span<const int32_t> token_ids, const SegmentationPolicy& policy,
                     const DelimiterProfile* profile) {
  const auto num_tokens = static_cast<int64_t>(token_ids.size());
  if (!ReadsTokenIds(policy)) return SegmentPositions(num_tokens, policy);
  std::vector<int32_t> starts{0};
  if (policy.method == Method::kDynamic) {
    starts.reserve(token_ids.size() / static_cast<size_t>(policy.block_size) + 2);
    CutDynamic(token_ids, policy, *profile, starts);
  } else {
    CutSentences(token_ids, 0, *profile, starts);
  }
  return WithOpenTail(std::move(starts), num_tokens);
}

Segmentation SegmentByWeights(std::span<const int32_t> token_ids, const SegmentationPolicy& policy,
                              std::span<const float> weights) {
  std::vector<int32_t> starts{0};
  starts.reserve(token_ids.size() / static_cast<size_t>(policy.block_size) + 2);
  CutDynamic(token_ids, policy, WeightTable{weights}, starts);
  return WithOpenTail(std::move(starts), static_cast<int64_t>(token_ids.size()));
}

IncrementalSegmenter::IncrementalSegmenter(const SegmentationPolicy& policy,
                                           std::shared_ptr<const DelimiterProfile> profile)
    : policy_(policy), profile_(std::move(profile)) {}

void IncrementalSegmenter::Append(std::span<const int32_t> token_ids) {
  num_tokens_ += static_cast<int64_t>(token_ids.size());
  if (!ReadsTokenIds(policy_)) {
    CutFixed(num_tokens_, policy_.method == Method::kNone ? 1 : policy_.block_size, starts_);
    return;
  }
  const size_t num_seen = open_tokens_.size();
  const int32_t open_begin = starts_.back();
  open_tokens_.insert(open_tokens_.end(), token_ids.begin(), token_ids.end());
  if (policy_.method == Method::kDynamic) {
    CutDynamic(open_tokens_, policy_, *profile_, starts_);
  } else {
    CutSentences(open_tokens_, num_seen, *profile_, starts_);
  }
  open_tokens_.erase(open_tokens_.begin(), open_tokens_.begin() + (starts_.back() - open_begin));
}

Segmentation IncrementalSegmenter::Current() const { return WithOpenTail(starts_, num_tokens_); }

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// Stage 1, where to cut: token ids -> semantic blocks. Depends on token ids only, so all layers and
// heads share one segmentation. DD-Select follows arXiv 2602.03184 section 4.1; completions of what
// the paper leaves open are marked "ours" in the .cc.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/pipeline/policy.h"

namespace dynsplit {

struct DelimiterWeight {
  int32_t token_id = 0;
  float weight = 0;  // in [0, 1]
  bool sentence_end = false;
  std::string text;
  int32_t num_occurrences = 0;
  double score = 0;  // mean s of arXiv 2602.03184 section 3.1 where measured, unclamped
};

// Importance of delimiter token types of one tokenizer. Immutable after construction; thread-safe.
class DelimiterProfile {
 public:
  static constexpr size_t kMaxDelimiters = 65535;

  // INVALID_ARGUMENT on weights outside [0, 1], negative or duplicate ids, more than
  // kMaxDelimiters, or a name that is not 1 to 64 characters of [a-z0-9_.-].
  static absl::StatusOr<DelimiterProfile> Create(std::string name, std::string description,
                                                 std::vector<DelimiterWeight> weights);
  // Parses the CSV form used by server/pipeline/profiles/*.csv: '#' comments (they become the
  // description), a header that names the columns, rows. Columns token_id and weight are required;
  // text_escaped, occurrences and sentence_end may be absent or empty. Text knows \n \r \t \\ and
  // \xHH, the latter for commas too. INVALID_ARGUMENT names the line.
  static absl::StatusOr<DelimiterProfile> FromCsv(std::string name, std::string_view csv);

  const std::string& name() const { return name_; }
  const std::string& description() const { return description_; }
  std::span<const DelimiterWeight> weights() const { return weights_; }  // ascending ids
  // Null if no delimiter. One array access for ids below 2^20.
  const DelimiterWeight* Find(int32_t token_id) const {
    const auto id = static_cast<uint32_t>(token_id);  // negative ids lie beyond any
    if (id < dense_.size()) {
      const uint16_t row = dense_[id];
      return row == 0 ? nullptr : &weights_[row - 1u];
    }
    return FindSparse(token_id);
  }
  // Weights by token id, kNoDelimiter elsewhere, for devices and tight loops; made once. Empty
  // where an id is too large for a table (2^20 or more).
  std::span<const float> weight_table() const { return weight_table_; }
  static constexpr float kNoDelimiter = -1;

 private:
  DelimiterProfile() = default;
  const DelimiterWeight* FindSparse(int32_t token_id) const;

  std::string name_;
  std::string description_;
  std::vector<DelimiterWeight> weights_;
  std::vector<uint16_t> dense_;  // id -> 1 + row of weights_, 0 = no delimiter
  std::vector<float> weight_table_;
};

// Profiles compiled in from server/pipeline/profiles/*.csv, by file name.
std::span<const DelimiterProfile> BuiltinProfiles();

// starts[j] is the first token of block j; starts.back() == T. Blocks partition [0, T).
struct Segmentation {
  std::vector<int32_t> starts;
  // First token of the open block, whose cut further tokens could still change; T if none.
  int32_t open_begin = 0;

  int64_t num_blocks() const { return static_cast<int64_t>(starts.size()) - 1; }
  bool operator==(const Segmentation&) const = default;
};

// Requires: 0 < token_ids.size() < 2^31, policy validated. `profile` may be null for kNone and
// kFixed. kNone and kFixed ignore the token ids' values; pass any span of the right length.
Segmentation Segment(std::span<const int32_t> token_ids, const SegmentationPolicy& policy,
                     const DelimiterProfile* profile);

// The same for kDynamic by a table of weights as DelimiterProfile::weight_table() is.
Segmentation SegmentByWeights(std::span<const int32_t> token_ids, const SegmentationPolicy& policy,
                              std::span<const float> weights);
// The same for methods that read no ids (kNone, kFixed), 0 < num_tokens < 2^31.
Segmentation SegmentPositions(int64_t num_tokens, const SegmentationPolicy& policy);
// True for methods that cut by token ids, and so need a profile.
bool ReadsTokenIds(const SegmentationPolicy& policy);

// Incremental form: tokens arrive in pieces; closed blocks never change.
// After any sequence of Append calls, Current() equals Segment() over all tokens so far.
class IncrementalSegmenter {
 public:
  IncrementalSegmenter(const SegmentationPolicy& policy,
                       std::shared_ptr<const DelimiterProfile> profile);
  void Append(std::span<const int32_t> token_ids);
  Segmentation Current() const;

 private:
  SegmentationPolicy policy_;
  std::shared_ptr<const DelimiterProfile> profile_;
  std::vector<int32_t> starts_{0};    // starts of closed blocks, then of the open one
  std::vector<int32_t> open_tokens_;  // ids from starts_.back() on; empty where none are read
  int64_t num_tokens_ = 0;
};

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// A policy is five orthogonal choices (segmentation, scoring, budget, transform, encoding) and who
// shares them (scope, protection, positions). A method of the literature is a row of Presets().
// Field meanings, ranges and defaults are those of proto/dynsplit/v1/types.proto.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/pipeline/types.h"

namespace dynsplit {

// Bump whenever equal input could yield another plan.
inline constexpr int32_t kPolicyVersion = 2;

struct SegmentationPolicy {
  enum class Method : uint8_t { kNone, kFixed, kDelimiterSet, kDynamic };
  Method method = Method::kDynamic;
  int32_t block_size = 20;     // tokens: fixed length, or C of DD-Select
  int32_t max_deviation = 19;  // tokens: Delta of DD-Select, in [0, block_size)
  double balance = 0.9;        // importance against closeness, in [0, 1]
  std::string profile;         // delimiter profile; empty = the server's default
};

struct ScoringPolicy {
  enum class Method : uint8_t {
    kRecency,
    kKeyNorm,
    kKeyDifference,
    kWindowQueries,
    kAccumulated,
    kBlockBound,
    kBlockMeanKey,
  };
  enum class Pooling : uint8_t { kAverage, kMax };
  enum class BlockReduction : uint8_t { kMean, kSum, kMax };
  enum class QueryReduction : uint8_t { kMean, kRootMeanSquare };
  Method method = Method::kWindowQueries;
  int32_t num_window_queries = 0;  // 0 = all supplied
  int32_t pooling_kernel = 5;      // odd; 1 = none
  Pooling pooling = Pooling::kAverage;
  BlockReduction block_reduction = BlockReduction::kMean;
  QueryReduction query_reduction = QueryReduction::kMean;
  bool lse_base_2 = false;
  double softmax_scale = 0;  // 0 = 1/sqrt(head_dim)
  // Candidates that blocks propose for every token of a step; the tokens' own keys decide among
  // them. 0 or 1 = none: blocks decide.
  int32_t refinement_factor = 0;
  bool refines() const { return refinement_factor > 1; }
};

struct BudgetPolicy {
  enum class Target : uint8_t { kRatio, kTokens, kBytes };
  Target target = Target::kRatio;
  double kept_ratio = 0.2;
  int64_t tokens_per_head = 0;
  int64_t bytes = 0;
  bool whole_blocks = false;
};

enum class Transform : uint8_t { kIndex, kEvict };

struct EncodingPolicy {
  enum class Format : uint8_t { kAsIs, kFloat8E4M3, kInt8 };
  Format key = Format::kAsIs;
  Format value = Format::kAsIs;
  // Absent: per head for fp8, per token and head for int8.
  std::optional<ScaleGranularity> scale_granularity;
};

struct ProtectionPolicy {
  int64_t num_sink_tokens = 4;
  int64_t num_recent_tokens = 32;
  std::vector<TokenSpan> pinned;
  std::vector<int32_t> dense_layers;
};

enum class Scope : uint8_t { kGlobal, kLayer, kLayerHead };
enum class Positions : uint8_t { kOriginal, kContiguous };

struct QualityFloor {
  double min_retained_attention_mass = 0;  // 0 = none
  double max_output_relative_error = 0;    // 0 = none
  double max_kept_ratio = 1;
  bool empty() const { return min_retained_attention_mass == 0 && max_output_relative_error == 0; }
};

struct Policy {
  std::string preset = "dynsplit";
  SegmentationPolicy segmentation;
  ScoringPolicy scoring;
  BudgetPolicy budget;
  Transform transform = Transform::kEvict;
  EncodingPolicy encoding;
  ProtectionPolicy protection;
  Scope scope = Scope::kLayer;
  Positions positions = Positions::kOriginal;
  QualityFloor quality_floor;
  bool allow_fallback = false;
  int32_t page_size = 16;  // slots; 16, 32, 64 or 128
};

// What a scoring method reads.
enum class Evidence : uint8_t {
  kNone,
  kKeys,
  kWindowQueries,
  kWindowQueriesWithLse,
  kAccumulatedScores,
};
// Least evidence `policy` works with.
Evidence RequiredEvidence(const Policy& policy);
std::string_view EvidenceName(Evidence evidence);

// One method of the literature as a row. `fallback` names the preset that takes over under
// allow_fallback when the evidence is missing; empty if none is needed.
struct Preset {
  Policy policy;  // policy.preset is the name
  std::string_view summary;
  std::string_view source;
  std::string_view fallback;
};
std::span<const Preset> Presets();
absl::StatusOr<const Preset*> FindPreset(std::string_view name);  // NOT_FOUND

// Checks every range, and combinations (whole_blocks with kLayerHead, kContiguous with kIndex,
// ...), against the shape. Field paths in errors are relative to the request:
// "policy.budget.kept_ratio".
absl::Status ValidateShape(const SequenceShape& shape);
absl::Status ValidatePolicy(const Policy& policy, const SequenceShape& shape, const Rope* rope);

}  // namespace dynsplit

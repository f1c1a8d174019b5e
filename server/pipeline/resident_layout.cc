// SPDX-License-Identifier: Apache-2.0
//
// What rests where, and which policies can rest.
#include <algorithm>
#include <bit>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/resident.h"

namespace dynsplit {
namespace {

constexpr int64_t kPartAlignmentBytes = 256;
constexpr int64_t kScaleBytes = 4;

int64_t AlignUp(int64_t bytes) {
  return (bytes + kPartAlignmentBytes - 1) / kPartAlignmentBytes * kPartAlignmentBytes;
}

// Offset of a part appended to `end`, which moves behind it.
int64_t Place(int64_t size_bytes, int64_t& end) {
  const int64_t offset = end;
  end = AlignUp(end + size_bytes);
  return offset;
}

absl::Status Unsupported(std::string_view problem) {
  return WithReason(absl::StatusCode::kUnimplemented, "UNSUPPORTED_POLICY", problem);
}

}  // namespace

absl::Status ValidateResidentPolicy(const Policy& policy) {
  if (policy.transform != Transform::kIndex) {
    return InvalidField("policy.transform",
                        "is not TRANSFORM_INDEX; sessions drop nothing (preset dynsplit_index)");
  }
  if (policy.scoring.method != ScoringPolicy::Method::kBlockBound &&
      policy.scoring.method != ScoringPolicy::Method::kBlockMeanKey) {
    return InvalidField("policy.scoring.method",
                        "ranks by other evidence than a session has; must be METHOD_BLOCK_BOUND or "
                        "METHOD_BLOCK_MEAN_KEY");
  }
  if (policy.scope == Scope::kGlobal) {
    return Unsupported(
        "policy.scope is SCOPE_GLOBAL; sessions choose by layer, or by layer and head");
  }
  if (policy.budget.target == BudgetPolicy::Target::kBytes || policy.budget.whole_blocks) {
    return Unsupported(
        "policy.budget counts bytes or whole blocks; sessions take kept_ratio or tokens_per_head");
  }
  if (!policy.protection.pinned.empty()) {
    return Unsupported("policy.protection.pinned is set; sessions protect sinks and recent tokens");
  }
  if (!policy.quality_floor.empty()) {
    return Unsupported("policy.quality_floor is set; sessions read by budget");
  }
  return absl::OkStatus();
}

DType SummaryDTypeOf(const ResidentSpec& spec) {
  const DType keys = OutputDType(spec.key_dtype, spec.policy.encoding.key, /*rotated=*/false);
  return IsQuantized(keys) ? DType::kBFloat16 : keys;
}

ResidentLayout PlanResident(const ResidentSpec& spec, int64_t block_capacity) {
  const SequenceShape& shape = spec.shape;
  const int64_t num_rows = shape.num_kv_heads * spec.capacity_tokens;
  ResidentLayout layout;
  layout.key_dtype = OutputDType(spec.key_dtype, spec.policy.encoding.key, /*rotated=*/false);
  layout.value_dtype = OutputDType(spec.value_dtype, spec.policy.encoding.value, /*rotated=*/false);
  layout.capacity_tokens = spec.capacity_tokens;
  int64_t end = 0;
  Place(num_rows * shape.head_dim * DTypeBytes(layout.key_dtype), end);
  layout.value_offset_bytes =
      Place(num_rows * shape.head_dim * DTypeBytes(layout.value_dtype), end);
  if (IsQuantized(layout.key_dtype)) {
    layout.key_scale_offset_bytes = Place(num_rows * kScaleBytes, end);
  }
  if (IsQuantized(layout.value_dtype)) {
    layout.value_scale_offset_bytes = Place(num_rows * kScaleBytes, end);
  }
  layout.layer_bytes = end;
  layout.key_value_bytes = shape.num_layers * layout.layer_bytes;

  const int64_t num_summaries = shape.num_kv_heads * block_capacity;
  const int64_t rows_each =
      spec.policy.scoring.method == ScoringPolicy::Method::kBlockMeanKey ? 1 : 2;
  layout.block_capacity = block_capacity;
  end = 0;
  Place(num_summaries * rows_each * shape.head_dim * DTypeBytes(spec.summary_dtype), end);
  if (IsQuantized(spec.summary_dtype)) {
    layout.index_scale_offset_bytes = Place(num_summaries * kScaleBytes, end);
  }
  layout.index_layer_bytes = end;
  layout.index_layer_offset_bytes =
      AlignUp((block_capacity + 1) * static_cast<int64_t>(sizeof(int32_t)));
  layout.index_bytes =
      layout.index_layer_offset_bytes + shape.num_layers * layout.index_layer_bytes;
  return layout;
}

int64_t ExpectedBlocks(const SegmentationPolicy& policy, int64_t num_tokens) {
  // A sentence of ordinary prose; texts differ.
  constexpr int64_t kTokensPerSentence = 24;
  int64_t mean_length = policy.block_size;
  if (policy.method == SegmentationPolicy::Method::kNone) mean_length = 1;
  if (policy.method == SegmentationPolicy::Method::kDelimiterSet) mean_length = kTokensPerSentence;
  return (num_tokens + mean_length - 1) / mean_length;
}

int64_t BlockCapacity(const ResidentSpec& spec, int64_t num_tokens, int64_t num_blocks) {
  const int64_t room = std::max<int64_t>(spec.capacity_tokens - num_tokens, 0);
  const int64_t capacity = num_blocks + ExpectedBlocks(spec.policy.segmentation, room);
  // Rounded up a little, so that sessions of about equal length share launches.
  const auto step = static_cast<int64_t>(
      std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(capacity / 16, 1))));
  return (capacity + step - 1) / step * step;
}

ResidentLayout ExpectedLayout(const ResidentSpec& spec) {
  const int64_t num_tokens = spec.shape.num_tokens;
  const int64_t num_blocks = ExpectedBlocks(spec.policy.segmentation, num_tokens);
  return PlanResident(spec, BlockCapacity(spec, num_tokens, num_blocks));
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/stage_inputs.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace dynsplit {
namespace {

// Bytes that scales of K or V take, per page and per layer.
OutputCost ScaleCost(const SequenceSpec& spec, EncodingPolicy::Format format, DType output_dtype) {
  if (!IsQuantized(output_dtype)) return {};
  constexpr int64_t kScaleBytes = 4;
  const int64_t row_bytes = kScaleBytes * spec.shape.num_kv_heads;
  OutputCost cost;
  if (OutputScaleGranularity(spec, format) == ScaleGranularity::kHead) {
    cost.bytes_per_layer = row_bytes;
  } else {
    cost.bytes_per_page = spec.policy.page_size * row_bytes;
  }
  return cost;
}

}  // namespace

int64_t NumScoringQueries(const SequenceSpec& spec) {
  const int64_t wanted = spec.policy.scoring.num_window_queries;
  const int64_t supplied = spec.supply.num_window_queries;
  return wanted == 0 ? supplied : std::min(wanted, supplied);
}

float SoftmaxScale(const SequenceSpec& spec) {
  const double scale = spec.policy.scoring.softmax_scale;
  return static_cast<float>(scale > 0 ? scale
                                      : 1.0 / std::sqrt(static_cast<double>(spec.shape.head_dim)));
}

ScaleGranularity OutputScaleGranularity(const SequenceSpec& spec, EncodingPolicy::Format format) {
  const std::optional<ScaleGranularity>& wanted = spec.policy.encoding.scale_granularity;
  switch (format) {
    case EncodingPolicy::Format::kAsIs:
      return spec.input_scale_granularity;
    case EncodingPolicy::Format::kFloat8E4M3:
      return wanted.value_or(ScaleGranularity::kHead);
    case EncodingPolicy::Format::kInt8:
      return wanted.value_or(ScaleGranularity::kTokenHead);
  }
  return ScaleGranularity::kHead;
}

OutputCost OutputCostOf(const SequenceSpec& spec) {
  const EncodingPolicy& encoding = spec.policy.encoding;
  const bool rotated = spec.policy.positions == Positions::kContiguous;
  const DType key_dtype = OutputDType(spec.key_dtype, encoding.key, rotated);
  const DType value_dtype = OutputDType(spec.value_dtype, encoding.value, false);
  const OutputCost key_scales = ScaleCost(spec, encoding.key, key_dtype);
  const OutputCost value_scales = ScaleCost(spec, encoding.value, value_dtype);
  const int64_t page_elements =
      int64_t{spec.policy.page_size} * spec.shape.num_kv_heads * spec.shape.head_dim;
  return {.bytes_per_layer = key_scales.bytes_per_layer + value_scales.bytes_per_layer,
          .bytes_per_page = page_elements * (DTypeBytes(key_dtype) + DTypeBytes(value_dtype)) +
                            key_scales.bytes_per_page + value_scales.bytes_per_page};
}

absl::StatusOr<LayerBudget> BudgetOf(const SequenceContext& context, int32_t layer) {
  return BudgetForLayer(context.spec.policy, context.spec.shape, layer,
                        context.segmentation.num_blocks(), context.num_protected,
                        OutputCostOf(context.spec));
}

bool KeepsEverything(const SequenceContext& context, const LayerBudget& budget) {
  const int64_t num_tokens = context.spec.shape.num_tokens;
  return budget.dense || context.num_protected == num_tokens || budget.num_kept >= num_tokens ||
         budget.num_whole_blocks >= context.segmentation.num_blocks();
}

absl::Status Abandon(absl::Status status, Stream& stream) {
  status.Update(stream.Synchronize());
  return status;
}

absl::StatusOr<Buffer> HostCopy(std::span<const std::byte> bytes, Backend& backend) {
  absl::StatusOr<Buffer> host = backend.AllocateHost(static_cast<int64_t>(bytes.size()));
  if (host.ok() && !bytes.empty()) std::memcpy(host->data(), bytes.data(), bytes.size());
  return host;
}

Buffer Alias(const Buffer& buffer) { return Buffer(buffer.data(), buffer.size_bytes(), nullptr); }

}  // namespace dynsplit

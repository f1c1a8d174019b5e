// SPDX-License-Identifier: Apache-2.0
//
// Stages 4 and 5, what happens and in which bits: kept rows -> uniform pages; block summaries.
#include <array>
#include <numeric>

#include "server/pipeline/compress.h"
#include "server/pipeline/stage_inputs.h"

namespace dynsplit {
namespace {

constexpr int64_t kScaleBytes = 4;

int64_t NumPages(const SequenceSpec& spec, int64_t num_kept) {
  return (num_kept + spec.policy.page_size - 1) / spec.policy.page_size;
}

DType SummaryDType(DType keys) { return IsQuantized(keys) ? DType::kFloat32 : keys; }

absl::StatusOr<Buffer> AllocatePages(int64_t size_bytes, const LayerTensors& tensors,
                                     Backend& backend, Stream& stream) {
  return tensors.page_memory != nullptr ? (*tensors.page_memory)(size_bytes)
                                        : backend.Allocate(size_bytes, stream);
}

// What is gathered, and how.
struct PageInput {
  const TensorView& source;
  EncodingPolicy::Format format = EncodingPolicy::Format::kAsIs;
  RotationTable rotation;
};

// Where the pages of K or V go.
struct PageOutput {
  DType dtype = DType::kBFloat16;
  ScaleGranularity scale_granularity = ScaleGranularity::kHead;
  Buffer pages;
  Buffer scales;
  GatherPagesItem item;  // how they are made
};

absl::StatusOr<PageOutput> PlanGather(const SequenceContext& context, const LayerDecision& decision,
                                      const LayerTensors& tensors, const PageInput& input,
                                      Backend& backend, Stream& stream) {
  const auto& [source, format, rotation] = input;
  const SequenceSpec& spec = context.spec;
  const int64_t num_slots = NumPages(spec, decision.plan.num_kept) * spec.policy.page_size;
  PageOutput out;
  out.dtype = OutputDType(source.dtype, format, rotation.rotary_dim > 0);
  out.scale_granularity = OutputScaleGranularity(spec, format);
  const int64_t row_elements = int64_t{spec.shape.num_kv_heads} * spec.shape.head_dim;
  absl::StatusOr<Buffer> pages =
      AllocatePages(num_slots * row_elements * DTypeBytes(out.dtype), tensors, backend, stream);
  if (!pages.ok()) return pages.status();
  out.pages = *std::move(pages);
  if (IsQuantized(out.dtype)) {
    const int64_t num_rows = out.scale_granularity == ScaleGranularity::kHead ? 1 : num_slots;
    absl::StatusOr<Buffer> scales =
        AllocatePages(num_rows * spec.shape.num_kv_heads * kScaleBytes, tensors, backend, stream);
    if (!scales.ok()) return scales.status();
    out.scales = *std::move(scales);
  }
  out.item = {.source = source,
              .kept = decision.kept.as<int32_t>(),
              .groups = decision.plan.groups,
              .num_kept = decision.plan.num_kept,
              .page_size = spec.policy.page_size,
              .format = format,
              .scale_granularity = out.scale_granularity,
              .out_dtype = out.dtype,
              .rotation = rotation,
              .pages = out.pages.data(),
              .scales = out.scales.as<float>()};
  return out;
}

// Bounds of each block for the consumer's own selection; means where it ranks by them.
absl::Status Summarize(const SequenceContext& context, const LayerTensors& tensors,
                       LayerPages& pages, Backend& backend, Stream& stream) {
  const TensorView& keys = tensors.keys;
  pages.summary_dtype = SummaryDType(keys.dtype);
  const SequenceShape& shape = context.spec.shape;
  const int64_t summary_bytes = context.segmentation.num_blocks() * shape.num_kv_heads *
                                shape.head_dim * DTypeBytes(pages.summary_dtype);
  const bool wants_mean =
      context.spec.policy.scoring.method == ScoringPolicy::Method::kBlockMeanKey;
  for (Buffer* summary : {&pages.block_min, &pages.block_max, &pages.block_mean}) {
    if (summary == &pages.block_mean && !wants_mean) continue;
    absl::StatusOr<Buffer> buffer = AllocatePages(summary_bytes, tensors, backend, stream);
    if (!buffer.ok()) return buffer.status();
    *summary = *std::move(buffer);
  }
  const SummarizeBlocksParams params = {
      .keys = keys,
      .block_starts = context.block_starts.as<int32_t>(),
      .first_block = 0,
      .num_blocks = context.segmentation.num_blocks(),
      .summaries =
          DenseSummaries(pages.summary_dtype, shape.num_kv_heads, shape.head_dim,
                         pages.block_min.data(), pages.block_max.data(), pages.block_mean.data())};
  return backend.SummarizeBlocks(params, stream);
}

}  // namespace

absl::StatusOr<LayerPages> ApplyLayer(const SequenceContext& context, const LayerDecision& decision,
                                      const LayerTensors& tensors, Backend& backend,
                                      Stream& stream) {
  const EncodingPolicy& encoding = context.spec.policy.encoding;
  absl::StatusOr<PageOutput> keys =
      PlanGather(context, decision, tensors,
                 {.source = tensors.keys, .format = encoding.key, .rotation = context.rotation},
                 backend, stream);
  if (!keys.ok()) return keys.status();
  absl::StatusOr<PageOutput> values = PlanGather(
      context, decision, tensors,
      {.source = tensors.values, .format = encoding.value, .rotation = {}}, backend, stream);
  if (!values.ok()) return values.status();
  const std::array<GatherPagesItem, 2> items = {keys->item, values->item};
  if (auto status = backend.GatherPages({.items = items}, stream); !status.ok()) return status;
  LayerPages pages;
  pages.num_kept = decision.plan.num_kept;
  pages.num_pages = NumPages(context.spec, pages.num_kept);
  pages.key_dtype = keys->dtype;
  pages.value_dtype = values->dtype;
  pages.key_scale_granularity = keys->scale_granularity;
  pages.value_scale_granularity = values->scale_granularity;
  pages.key_pages = std::move(keys->pages);
  pages.value_pages = std::move(values->pages);
  pages.key_scales = std::move(keys->scales);
  pages.value_scales = std::move(values->scales);
  if (context.spec.policy.transform == Transform::kIndex) {
    auto status = Summarize(context, tensors, pages, backend, stream);
    if (!status.ok()) return status;
  }
  return pages;
}

std::array<int64_t, 7> LayerPageBytes(const SequenceSpec& spec, int64_t num_kept,
                                      int64_t num_blocks) {
  const EncodingPolicy& encoding = spec.policy.encoding;
  const int64_t num_slots = NumPages(spec, num_kept) * spec.policy.page_size;
  const int64_t heads = spec.shape.num_kv_heads;
  const int64_t row_elements = heads * spec.shape.head_dim;
  const auto scale_bytes = [&](DType dtype, EncodingPolicy::Format format) -> int64_t {
    if (!IsQuantized(dtype)) return 0;
    const bool per_head = OutputScaleGranularity(spec, format) == ScaleGranularity::kHead;
    return (per_head ? 1 : num_slots) * heads * kScaleBytes;
  };
  const DType key =
      OutputDType(spec.key_dtype, encoding.key, spec.policy.positions == Positions::kContiguous);
  const DType value = OutputDType(spec.value_dtype, encoding.value, false);
  const bool indexed = spec.policy.transform == Transform::kIndex;
  const bool wants_mean = spec.policy.scoring.method == ScoringPolicy::Method::kBlockMeanKey;
  const int64_t summary_bytes =
      indexed ? num_blocks * row_elements * DTypeBytes(SummaryDType(spec.key_dtype)) : 0;
  return {num_slots * row_elements * DTypeBytes(key),
          num_slots * row_elements * DTypeBytes(value),
          scale_bytes(key, encoding.key),
          scale_bytes(value, encoding.value),
          summary_bytes,
          summary_bytes,
          wants_mean ? summary_bytes : 0};
}

int64_t LayerOutputBytes(const SequenceSpec& spec, int64_t num_kept, int64_t num_blocks) {
  const auto bytes = LayerPageBytes(spec, num_kept, num_blocks);
  return std::accumulate(bytes.begin(), bytes.end(), int64_t{0});
}

}  // namespace dynsplit

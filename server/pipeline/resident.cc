// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/resident.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/stage_inputs.h"

namespace dynsplit {
namespace {

// First block of `after` that is not one of `before`: new, or longer than it was.
int64_t FirstChanged(const Segmentation& before, const Segmentation& after) {
  if (before.starts.empty()) return 0;
  const auto [old_start, new_start] = std::mismatch(before.starts.begin(), before.starts.end(),
                                                    after.starts.begin(), after.starts.end());
  // Starts up to a block's own begin agree; its end is the next start.
  return std::max<int64_t>(0, new_start - after.starts.begin() - 1);
}

}  // namespace

ResidentSequence::ResidentSequence(ResidentSpec spec,
                                   std::shared_ptr<const DelimiterProfile> profile,
                                   Backend& backend)
    : spec_(std::move(spec)),
      backend_(backend),
      layout_(PlanResident(spec_, /*block_capacity=*/0)),
      segmenter_(spec_.policy.segmentation, std::move(profile)) {}

absl::StatusOr<std::unique_ptr<ResidentSequence>> ResidentSequence::Create(
    ResidentSpec spec, std::shared_ptr<const DelimiterProfile> profile, Residence residence,
    Backend& backend) {
  if (ReadsTokenIds(spec.policy.segmentation) && profile == nullptr) {
    return NotFound("delimiter profile", spec.policy.segmentation.profile);
  }
  std::unique_ptr<ResidentSequence> sequence(
      new ResidentSequence(std::move(spec), std::move(profile), backend));
  absl::StatusOr<Buffer> key_value =
      backend.AllocateResident(sequence->layout_.key_value_bytes, residence);
  if (!key_value.ok()) return key_value.status();
  sequence->key_value_ = *std::move(key_value);
  sequence->residence_ = residence;
  return sequence;
}

// -- growing --------------------------------------------------------------------------------------

absl::Status ResidentSequence::CheckTokenIds(std::span<const int32_t> token_ids,
                                             int64_t num_tokens) const {
  if (!ReadsTokenIds(spec_.policy.segmentation)) return absl::OkStatus();
  if (static_cast<int64_t>(token_ids.size()) != num_tokens) {
    return InvalidField("tensors.token_ids",
                        absl::StrCat("has ", token_ids.size(), " entries; must have ", num_tokens,
                                     " (policy.segmentation.method cuts by token ids)"));
  }
  const auto negative =
      std::find_if(token_ids.begin(), token_ids.end(), [](int32_t id) { return id < 0; });
  if (negative == token_ids.end()) return absl::OkStatus();
  return InvalidField(absl::StrCat("tensors.token_ids[", negative - token_ids.begin(), "]"),
                      absl::StrCat("is ", *negative, "; must not be negative"));
}

absl::Status ResidentSequence::Begin(std::span<const int32_t> token_ids, int64_t num_tokens,
                                     Stream& stream) {
  if (num_tokens > spec_.capacity_tokens - num_tokens_) {
    return WithReason(absl::StatusCode::kResourceExhausted, "SESSION_FULL",
                      absl::StrCat("the session has ", num_tokens_, " tokens and room for ",
                                   spec_.capacity_tokens, "; it cannot take ", num_tokens,
                                   " more (session.reserve_tokens at opening makes room)"));
  }
  if (absl::Status status = CheckTokenIds(token_ids, num_tokens); !status.ok()) return status;
  Pending pending = {.segmenter = segmenter_,
                     .segmentation = {},
                     .num_tokens = num_tokens_ + num_tokens,
                     .first_block = 0,
                     .starts_host = {}};
  if (ReadsTokenIds(spec_.policy.segmentation)) {
    pending.segmenter.Append(token_ids);
  } else {  // only their number is read
    pending.segmenter.Append(std::vector<int32_t>(static_cast<size_t>(num_tokens)));
  }
  pending.segmentation = pending.segmenter.Current();
  pending.first_block = FirstChanged(segmentation_, pending.segmentation);
  absl::StatusOr<Buffer> starts =
      HostCopy(std::as_bytes(std::span(pending.segmentation.starts)), backend_);
  if (!starts.ok()) return starts.status();
  pending.starts_host = *std::move(starts);
  if (num_tokens_ == 0) {  // nobody reads yet, and layers are summarised as they come
    absl::Status status = EnsureIndex(pending.segmentation.num_blocks(), stream);
    status.Update(UploadStarts(pending, stream));
    status.Update(stream.Synchronize());
    if (!status.ok()) return status;
  }
  pending_ = std::move(pending);
  return absl::OkStatus();
}

GatherPagesItem ResidentSequence::NewRows(const TensorView& from, const TensorView& to,
                                          EncodingPolicy::Format format) const {
  const bool quantized = IsQuantized(to.dtype);
  return {
      .source = from,
      .kept = nullptr,
      .groups = 1,
      .num_kept = from.num_tokens,
      .page_size = 1,
      .format = format,
      .scale_granularity = ScaleGranularity::kTokenHead,
      .out_dtype = to.dtype,
      .rotation = {},
      .pages = const_cast<std::byte*>(to.data) + num_tokens_ * to.token_stride_bytes,
      .scales = quantized ? const_cast<float*>(to.scales) + num_tokens_ * to.num_heads : nullptr,
      .slot_stride_bytes = to.token_stride_bytes,
      .head_stride_bytes = to.head_stride_bytes,
      .scale_head_stride = 0};
}

absl::Status ResidentSequence::StoreLayer(const LayerTensors& tensors, Stream& stream) {
  const Pending& pending = *pending_;
  const EncodingPolicy& encoding = spec_.policy.encoding;
  const std::array<GatherPagesItem, 2> items = {
      NewRows(tensors.keys, Keys(tensors.layer, pending.num_tokens), encoding.key),
      NewRows(tensors.values, Values(tensors.layer, pending.num_tokens), encoding.value)};
  absl::Status status = backend_.GatherPages({.items = items}, stream);
  if (status.ok() && num_tokens_ == 0) status = SummarizeLayer(tensors.layer, pending, stream);
  return status;
}

absl::Status ResidentSequence::SummarizeLayer(int32_t layer, const Pending& pending,
                                              Stream& stream) {
  const SummarizeBlocksParams params = {.keys = Keys(layer, pending.num_tokens),
                                        .block_starts = block_starts(),
                                        .first_block = pending.first_block,
                                        .num_blocks = pending.segmentation.num_blocks(),
                                        .summaries = Summaries(layer)};
  return backend_.SummarizeBlocks(params, stream);
}

absl::Status ResidentSequence::UploadStarts(const Pending& pending, Stream& stream) {
  constexpr auto kStartBytes = static_cast<int64_t>(sizeof(int32_t));
  const int64_t offset = pending.first_block * kStartBytes;
  return backend_.Copy(index_.data() + offset, pending.starts_host.data() + offset,
                       pending.starts_host.size_bytes() - offset, stream);
}

absl::Status ResidentSequence::Commit(Stream& stream) {
  const Pending& pending = *pending_;
  absl::Status status;
  if (num_tokens_ > 0) {
    status = EnsureIndex(pending.segmentation.num_blocks(), stream);
    if (status.ok()) status = UploadStarts(pending, stream);
    for (int32_t layer = 0; status.ok() && layer < spec_.shape.num_layers; ++layer) {
      status = SummarizeLayer(layer, pending, stream);
    }
  }
  status.Update(stream.Synchronize());
  if (status.ok()) {
    num_tokens_ = pending.num_tokens;
    segmenter_ = std::move(pending_->segmenter);
    segmentation_ = std::move(pending_->segmentation);
  }
  pending_.reset();
  return status;
}

void ResidentSequence::Abort() { pending_.reset(); }

absl::Status ResidentSequence::EnsureIndex(int64_t num_blocks, Stream& stream) {
  if (!index_.empty() && num_blocks <= layout_.block_capacity) return absl::OkStatus();
  // Room for what may be appended, at the lengths blocks have had so far.
  const int64_t num_tokens = num_tokens_ > 0 ? num_tokens_ : spec_.shape.num_tokens;
  const int64_t room = std::max<int64_t>(spec_.capacity_tokens - num_tokens, 0);
  const ResidentLayout layout =
      PlanResident(spec_, BlockCapacity(spec_.policy.segmentation, num_blocks, room));
  absl::StatusOr<Buffer> index = backend_.AllocateResident(layout.index_bytes, Residence::kDevice);
  if (!index.ok()) return index.status();
  if (!index_.empty()) {
    absl::Status status = CopyIndex(layout, *index, stream);
    status.Update(stream.Synchronize());
    if (!status.ok()) return status;
  }
  index_ = *std::move(index);
  layout_ = layout;
  return absl::OkStatus();
}

absl::Status ResidentSequence::CopyIndex(const ResidentLayout& layout, const Buffer& index,
                                         Stream& stream) {
  constexpr auto kStartBytes = static_cast<int64_t>(sizeof(int32_t));
  constexpr auto kScaleBytes = static_cast<int64_t>(sizeof(float));
  const int64_t num_blocks = segmentation_.num_blocks();
  const int64_t block_bytes = Summaries(0).block_stride_bytes;
  const bool scales = layout.index_scale_offset_bytes > 0;
  absl::Status status =
      backend_.Copy(index.data(), index_.data(), (num_blocks + 1) * kStartBytes, stream);
  for (int64_t layer = 0; layer < spec_.shape.num_layers; ++layer) {
    const std::byte* const from =
        index_.data() + layout_.index_layer_offset_bytes + layer * layout_.index_layer_bytes;
    std::byte* const to =
        index.data() + layout.index_layer_offset_bytes + layer * layout.index_layer_bytes;
    for (int64_t head = 0; head < spec_.shape.num_kv_heads && status.ok(); ++head) {
      const int64_t old_row = head * layout_.block_capacity;
      const int64_t new_row = head * layout.block_capacity;
      status.Update(backend_.Copy(to + new_row * block_bytes, from + old_row * block_bytes,
                                  num_blocks * block_bytes, stream));
      if (!scales) continue;
      status.Update(backend_.Copy(to + layout.index_scale_offset_bytes + new_row * kScaleBytes,
                                  from + layout_.index_scale_offset_bytes + old_row * kScaleBytes,
                                  num_blocks * kScaleBytes, stream));
    }
  }
  return status;
}

// -- reading --------------------------------------------------------------------------------------

int32_t ResidentSequence::groups() const {
  return spec_.policy.scope == Scope::kLayerHead ? spec_.shape.num_kv_heads : 1;
}

bool ResidentSequence::dense(int32_t layer) const {
  const std::vector<int32_t>& layers = spec_.policy.protection.dense_layers;
  return std::binary_search(layers.begin(), layers.end(), layer);
}

TensorView ResidentSequence::View(int32_t layer, DType dtype, int64_t offset_bytes,
                                  int64_t scale_offset_bytes, int64_t num_tokens) const {
  const std::byte* const base = key_value_.data() + layer * layout_.layer_bytes;
  TensorView view;
  view.data = base + offset_bytes;
  view.dtype = dtype;
  view.num_tokens = num_tokens;
  view.num_heads = spec_.shape.num_kv_heads;
  view.head_dim = spec_.shape.head_dim;
  view.token_stride_bytes = spec_.shape.head_dim * DTypeBytes(dtype);
  view.head_stride_bytes = layout_.capacity_tokens * view.token_stride_bytes;
  if (scale_offset_bytes > 0) {
    view.scales = reinterpret_cast<const float*>(base + scale_offset_bytes);
    view.scale_granularity = ScaleGranularity::kTokenHead;
  }
  return view;
}

TensorView ResidentSequence::Keys(int32_t layer, int64_t num_tokens) const {
  return View(layer, layout_.key_dtype, 0, layout_.key_scale_offset_bytes, num_tokens);
}

TensorView ResidentSequence::Values(int32_t layer, int64_t num_tokens) const {
  return View(layer, layout_.value_dtype, layout_.value_offset_bytes,
              layout_.value_scale_offset_bytes, num_tokens);
}

BlockSummaries ResidentSequence::Summaries(int32_t layer) const {
  std::byte* const base =
      index_.data() + layout_.index_layer_offset_bytes + layer * layout_.index_layer_bytes;
  const int64_t row_bytes = spec_.shape.head_dim * DTypeBytes(spec_.summary_dtype);
  const bool means = spec_.policy.scoring.method == ScoringPolicy::Method::kBlockMeanKey;
  float* const scales = layout_.index_scale_offset_bytes > 0
                            ? reinterpret_cast<float*>(base + layout_.index_scale_offset_bytes)
                            : nullptr;
  BlockSummaries summaries;
  summaries.dtype = spec_.summary_dtype;
  if (means) {
    summaries.mean = base;
    summaries.mean_scales = scales;
  } else {
    summaries.min = base;
    summaries.max = base + row_bytes;
    summaries.bound_scales = scales;
  }
  summaries.block_stride_bytes = (means ? 1 : 2) * row_bytes;
  summaries.head_stride_bytes = layout_.block_capacity * summaries.block_stride_bytes;
  summaries.scale_head_stride = layout_.block_capacity;
  return summaries;
}

const int32_t* ResidentSequence::block_starts() const { return index_.as<int32_t>(); }

int64_t ResidentSequence::device_bytes() const {
  return index_.size_bytes() + (residence_ == Residence::kDevice ? key_value_.size_bytes() : 0);
}

int64_t ResidentSequence::host_bytes() const {
  return residence_ == Residence::kHost ? key_value_.size_bytes() : 0;
}

// -- moving ---------------------------------------------------------------------------------------

absl::Status ResidentSequence::MoveTo(Residence residence, Stream& stream) {
  if (residence == residence_) return absl::OkStatus();
  absl::StatusOr<Buffer> moved = backend_.AllocateResident(key_value_.size_bytes(), residence);
  if (!moved.ok()) return moved.status();
  absl::Status status =
      backend_.Copy(moved->data(), key_value_.data(), key_value_.size_bytes(), stream);
  status.Update(stream.Synchronize());
  if (!status.ok()) return status;
  key_value_ = *std::move(moved);
  residence_ = residence;
  return absl::OkStatus();
}

}  // namespace dynsplit

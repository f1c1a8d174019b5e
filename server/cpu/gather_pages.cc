// SPDX-License-Identifier: Apache-2.0
#include <hwy/cache_control.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "server/cpu/copy_rows.h"
#include "server/cpu/decode.h"
#include "server/cpu/operations.h"
#include "server/cpu/row_math.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {

constexpr int64_t kChunkBytes = int64_t{128} << 10;  // of output
// Outputs beyond this leave the caches before anyone reads them: written around the caches, which
// spares reading the lines first.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Arithmetic between loads keeps the processor from running far enough ahead by itself.
constexpr int64_t kSlotsAhead = 2;

// An amax so small that the quotient is zero counts as zero.
float ScaleOf(float amax, DType dtype) {
  const float scale = amax / (dtype == DType::kInt8 ? 127.0F : 448.0F);
  return scale == 0 ? 1.0F : scale;
}

class PageGatherer {
 public:
  PageGatherer(const GatherPagesItem& item, const Workspace& workspace)
      : p_(item),
        workspace_(workspace),
        heads_(item.source.num_heads),
        row_bytes_(item.source.head_dim * DTypeBytes(item.out_dtype)),
        num_slots_(CeilDiv(item.num_kept, item.page_size) * item.page_size),
        slots_per_chunk_(std::max<int64_t>(1, kChunkBytes / (heads_ * row_bytes_))),
        slot_stride_(OrDense(item.slot_stride_bytes, heads_ * row_bytes_)),
        head_stride_(OrDense(item.head_stride_bytes, row_bytes_)) {}

  absl::Status Run() {
    const bool encoded = p_.format != EncodingPolicy::Format::kAsIs;
    if (!encoded && p_.rotation.rotary_dim == 0) {
      CopyScales();
      ForChunks([this](int64_t begin, int64_t end, int /*slot*/) { CopySlots(begin, end); });
      return absl::OkStatus();
    }
    auto scratch = workspace_.Scratch<float>(workspace_.threads.num_slots() * SlotFloats());
    if (!scratch.ok()) return scratch.status();
    scratch_ = *std::move(scratch);
    if (encoded && p_.scale_granularity == ScaleGranularity::kHead) FindHeadScales();
    const bool turns_only = !encoded && !p_.rotation.interleaved &&
                            p_.source.dtype == p_.out_dtype && p_.source.scales == nullptr;
    ForChunks([&](int64_t begin, int64_t end, int slot) {
      if (!turns_only || !TurnSlots(begin, end, slot)) EncodeSlots(begin, end, slot);
    });
    return absl::OkStatus();
  }

 private:
  template <typename F>
  void ForChunks(F f) {
    workspace_.threads.ParallelFor(NumChunks(), [&](int64_t chunk, int slot) {
      f(chunk * slots_per_chunk_, std::min((chunk + 1) * slots_per_chunk_, num_slots_), slot);
    });
  }
  int64_t NumChunks() const { return CeilDiv(num_slots_, slots_per_chunk_); }
  static int64_t OrDense(int64_t stride, int64_t dense) { return stride != 0 ? stride : dense; }
  int32_t TokenOf(int64_t slot, int32_t head) const {
    if (p_.kept == nullptr) return static_cast<int32_t>(slot);
    return p_.kept[(p_.groups == 1 ? 0 : head) * p_.num_kept + slot];
  }
  std::byte* RowOf(int64_t slot, int32_t head) const {
    return static_cast<std::byte*>(p_.pages) + slot * slot_stride_ + head * head_stride_;
  }
  // Of granularity kTokenHead.
  float& ScaleAt(int64_t slot, int32_t head) const {
    return p_.scales[p_.scale_head_stride != 0 ? slot + head * p_.scale_head_stride
                                               : slot * heads_ + head];
  }
  bool ScalesPerToken(ScaleGranularity granularity) const {
    return p_.scales != nullptr && granularity == ScaleGranularity::kTokenHead;
  }
  bool Streams() const { return num_slots_ * heads_ * row_bytes_ >= kStreamBytes; }
  // Scratch of a thread: a row, its cosines and sines.
  int64_t SlotFloats() const { return p_.source.head_dim + p_.rotation.rotary_dim + 16; }

  void CopyScales();
  // Of whole tokens: the slots from `begin` whose tokens lie one after the other on both sides.
  int64_t EndOfRun(int64_t begin, int64_t end) const;
  void CopySlots(int64_t begin, int64_t end) const;
  void FindHeadScales();
  void EncodeSlots(int64_t begin, int64_t end, int slot) const;
  // EncodeSlots where rows only turn; false where TurnRow is not written for them.
  bool TurnSlots(int64_t begin, int64_t end, int slot) const;
  // Decodes and turns the row of (slot, head) into this thread's scratch.
  const float* LoadRow(int64_t slot, int32_t head, float* scratch) const;
  void PadSlots(int64_t begin, int64_t end, bool scales_per_token) const;

  const GatherPagesItem& p_;
  const Workspace& workspace_;
  const int32_t heads_;
  const int64_t row_bytes_;
  const int64_t num_slots_;
  const int64_t slots_per_chunk_;
  const int64_t slot_stride_;
  const int64_t head_stride_;
  Buffer scratch_;
};

// Slots behind the last kept token: zero bytes, scale 1.
void PageGatherer::PadSlots(int64_t begin, int64_t end, bool scales_per_token) const {
  for (int64_t s = std::max(begin, p_.num_kept); s < end; ++s) {
    for (int32_t h = 0; h < heads_; ++h) {
      std::memset(RowOf(s, h), 0, static_cast<size_t>(row_bytes_));
      if (scales_per_token) ScaleAt(s, h) = 1.0F;
    }
  }
}

void PageGatherer::CopyScales() {
  if (p_.scales == nullptr || p_.source.scale_granularity != ScaleGranularity::kHead) return;
  std::copy(p_.source.scales, p_.source.scales + heads_, p_.scales);
}

int64_t PageGatherer::EndOfRun(int64_t begin, int64_t end) const {
  const std::byte* from = RowAddress(p_.source, TokenOf(begin, 0), 0);
  const std::byte* to = RowOf(begin, 0);
  int64_t s = begin + 1;
  for (; s < end; ++s) {
    from += heads_ * row_bytes_;
    to += heads_ * row_bytes_;
    if (RowAddress(p_.source, TokenOf(s, 0), 0) != from || RowOf(s, 0) != to) break;
  }
  return s;
}

void PageGatherer::CopySlots(int64_t begin, int64_t end) const {
  const bool scales_per_token = ScalesPerToken(p_.source.scale_granularity);
  const int64_t last = std::min(end, p_.num_kept);
  const bool whole_tokens =
      p_.groups == 1 && p_.source.head_stride_bytes == row_bytes_ && head_stride_ == row_bytes_;
  RowCopier copier(Streams());
  for (int64_t s = begin, next = begin; s < last; s = next) {
    next = whole_tokens ? EndOfRun(s, last) : s + 1;
    if (whole_tokens) {
      copier.Copy(RowAddress(p_.source, TokenOf(s, 0), 0), (next - s) * heads_ * row_bytes_,
                  RowOf(s, 0));
    }
    for (int32_t h = 0; !whole_tokens && h < heads_; ++h) {
      copier.Copy(RowAddress(p_.source, TokenOf(s, h), h), row_bytes_, RowOf(s, h));
    }
    for (int64_t u = s; scales_per_token && u < next; ++u) {
      for (int32_t h = 0; h < heads_; ++h) ScaleAt(u, h) = RowScale(p_.source, TokenOf(u, h), h);
    }
  }
  PadSlots(begin, end, scales_per_token);
}

const float* PageGatherer::LoadRow(int64_t slot, int32_t head, float* scratch) const {
  const int32_t token = TokenOf(slot, head);
  DecodeRow(p_.source.dtype, RowAddress(p_.source, token, head), RowScale(p_.source, token, head),
            p_.source.head_dim, scratch);
  if (p_.rotation.rotary_dim > 0) {
    float* cos = scratch + p_.source.head_dim;
    float* sin = cos + p_.rotation.rotary_dim / 2;
    // One kept set: all heads of a slot turn by the same angles.
    if (p_.groups > 1 || head == 0) RotationAngles(p_.rotation, token - slot, cos, sin);
    TurnBack(p_.rotation, cos, sin, scratch);
  }
  return scratch;
}

void PageGatherer::FindHeadScales() {
  std::vector<float> amax(static_cast<size_t>(NumChunks() * heads_), 0.0F);
  ForChunks([&](int64_t begin, int64_t end, int slot) {
    float* scratch = scratch_.as<float>() + slot * SlotFloats();
    float* chunk_amax = amax.data() + begin / slots_per_chunk_ * heads_;
    for (int64_t s = begin; s < std::min(end, p_.num_kept); ++s) {
      for (int32_t h = 0; h < heads_; ++h) {
        const float* row = LoadRow(s, h, scratch);
        chunk_amax[h] = std::max(chunk_amax[h], LargestMagnitude(row, p_.source.head_dim));
      }
    }
  });
  for (int32_t h = 0; h < heads_; ++h) {
    float largest = 0;
    for (int64_t chunk = 0; chunk < NumChunks(); ++chunk) {
      largest = std::max(largest, amax[static_cast<size_t>(chunk * heads_ + h)]);
    }
    p_.scales[h] = ScaleOf(largest, p_.out_dtype);
  }
}

bool PageGatherer::TurnSlots(int64_t begin, int64_t end, int slot) const {
  float* cos = scratch_.as<float>() + slot * SlotFloats();
  float* sin = cos + p_.rotation.rotary_dim / 2;
  for (int64_t s = begin; s < std::min(end, p_.num_kept); ++s) {
    for (int32_t h = 0; h < heads_; ++h) {
      const int32_t token = TokenOf(s, h);
      const std::byte* ahead =
          RowAddress(p_.source, TokenOf(std::min(s + kSlotsAhead, p_.num_kept - 1), h), h);
      for (int64_t i = 0; i < row_bytes_; i += 64) hwy::Prefetch(ahead + i);
      if (p_.groups > 1 || h == 0) RotationAngles(p_.rotation, token - s, cos, sin);
      if (!TurnRow({.dtype = p_.out_dtype,
                    .count = p_.source.head_dim,
                    .rotary_dim = p_.rotation.rotary_dim,
                    .row = RowAddress(p_.source, token, h),
                    .cos = cos,
                    .sin = sin,
                    .out = RowOf(s, h),
                    .stream = Streams()})) {
        return false;
      }
    }
  }
  hwy::FlushStream();
  PadSlots(begin, end, /*scales_per_token=*/false);
  return true;
}

void PageGatherer::EncodeSlots(int64_t begin, int64_t end, int slot) const {
  const bool encoded = p_.format != EncodingPolicy::Format::kAsIs;
  const bool scales_per_token = encoded && ScalesPerToken(p_.scale_granularity);
  float* scratch = scratch_.as<float>() + slot * SlotFloats();
  for (int64_t s = begin; s < std::min(end, p_.num_kept); ++s) {
    for (int32_t h = 0; h < heads_; ++h) {
      const float* row = LoadRow(s, h, scratch);
      float scale = 1;
      if (scales_per_token) {
        scale = ScaleOf(LargestMagnitude(row, p_.source.head_dim), p_.out_dtype);
        ScaleAt(s, h) = scale;
      } else if (encoded) {
        scale = p_.scales[h];
      }
      EncodeRow(p_.out_dtype, row, scale, p_.source.head_dim, RowOf(s, h));
    }
  }
  PadSlots(begin, end, scales_per_token);
}

}  // namespace

absl::Status GatherPages(const GatherPagesParams& params, const Workspace& workspace) {
  for (const GatherPagesItem& item : params.items) {
    if (absl::Status status = PageGatherer(item, workspace).Run(); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

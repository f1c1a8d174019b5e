// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/moved_rows.h"

#include <algorithm>
#include <utility>

#include "server/runtime/parts.h"

namespace dynsplit {
namespace {

constexpr auto kIndexBytes = static_cast<int64_t>(sizeof(int32_t));
constexpr auto kFloatBytes = static_cast<int64_t>(sizeof(float));

int64_t RowBytes(const ResidentSequence& sequence, DType dtype) {
  return sequence.spec().shape.head_dim * DTypeBytes(dtype);
}

MovedLayer RegularLayer(int32_t num_heads, int64_t num_rows, const int32_t* moved,
                        const int32_t* counts) {
  MovedLayer layer;
  layer.num_rows = *std::max_element(counts, counts + num_heads);
  layer.slots.reserve(static_cast<size_t>(num_heads * layer.num_rows));
  std::vector<uint8_t> taken(static_cast<size_t>(num_rows));
  for (int32_t head = 0; head < num_heads; ++head) {
    std::fill(taken.begin(), taken.end(), uint8_t{0});
    const int32_t* own = moved + head * num_rows;
    for (int32_t i = 0; i < counts[head]; ++i) {
      layer.slots.push_back(own[i]);
      taken[static_cast<size_t>(own[i])] = 1;
    }
    int64_t missing = layer.num_rows - counts[head];
    for (int32_t slot = 0; missing > 0; ++slot) {
      if (taken[static_cast<size_t>(slot)] != 0) continue;
      layer.slots.push_back(slot);
      --missing;
    }
  }
  return layer;
}

// The layers of one step, their places in the answer's memory and in that of the lists.
class StepRows {
 public:
  explicit StepRows(const RowsToRead& wanted)
      : wanted_(wanted),
        sequence_(*wanted.step->sequence),
        key_bytes_(RowBytes(sequence_, sequence_.layout().key_dtype)),
        value_bytes_(RowBytes(sequence_, sequence_.layout().value_dtype)),
        key_scales_(IsQuantized(sequence_.layout().key_dtype)),
        value_scales_(IsQuantized(sequence_.layout().value_dtype)),
        places_(wanted.layers->size()) {}

  void LayOut(Parts& lists, Parts& rows) {
    for (size_t i = 0; i < places_.size(); ++i) {
      const auto count = static_cast<int64_t>(layer(i).slots.size());
      if (count == 0) continue;
      places_[i].tokens = lists.Add(count * kIndexBytes);
      places_[i].keys = rows.Add(count * key_bytes_);
      places_[i].values = rows.Add(count * value_bytes_);
      if (key_scales_) places_[i].key_scales = rows.Add(count * kFloatBytes);
      if (value_scales_) places_[i].value_scales = rows.Add(count * kFloatBytes);
    }
  }

  // The token of each slot.
  void FillLists(std::byte* lists) const {
    const int64_t num_rows = wanted_.step->budget.num_selected;
    const int64_t layer_rows = sequence_.spec().shape.num_kv_heads * num_rows;
    for (size_t i = 0; i < places_.size(); ++i) {
      const MovedLayer& moved = layer(i);
      const int32_t* held = wanted_.changes.held + static_cast<int64_t>(i) * layer_rows;
      auto* tokens = reinterpret_cast<int32_t*>(lists + places_[i].tokens);
      for (size_t at = 0; at < moved.slots.size(); ++at) {
        const int64_t head = static_cast<int64_t>(at) / moved.num_rows;
        tokens[at] = held[head * num_rows + moved.slots[at]];
      }
    }
  }

  void AddItems(const std::byte* lists, std::byte* rows,
                std::vector<GatherPagesItem>& items) const {
    for (size_t i = 0; i < places_.size(); ++i) {
      if (layer(i).slots.empty()) continue;
      const int32_t number = wanted_.step->first_layer + static_cast<int32_t>(i);
      const int64_t num_tokens = sequence_.num_tokens();
      const Places& places = places_[i];
      items.push_back(ItemOf(i, sequence_.Keys(number, num_tokens), lists, rows, places.keys,
                             places.key_scales));
      items.push_back(ItemOf(i, sequence_.Values(number, num_tokens), lists, rows, places.values,
                             places.value_scales));
    }
  }

  void PointInto(const std::byte* rows) const {
    for (size_t i = 0; i < places_.size(); ++i) {
      MovedLayer& moved = layer(i);
      const auto bytes = [&](int64_t at, int64_t each) {
        return Bytes(rows + at, moved.slots.size() * static_cast<size_t>(each));
      };
      if (moved.slots.empty()) continue;
      moved.keys = bytes(places_[i].keys, key_bytes_);
      moved.values = bytes(places_[i].values, value_bytes_);
      if (key_scales_) moved.key_scales = bytes(places_[i].key_scales, kFloatBytes);
      if (value_scales_) moved.value_scales = bytes(places_[i].value_scales, kFloatBytes);
    }
  }

 private:
  struct Places {
    int64_t tokens = 0, keys = 0, values = 0, key_scales = 0, value_scales = 0;
  };

  MovedLayer& layer(size_t i) const { return (*wanted_.layers)[i]; }

  GatherPagesItem ItemOf(size_t i, const TensorView& view, const std::byte* lists, std::byte* rows,
                         int64_t at, int64_t scales_at) const {
    const int64_t num_rows = layer(i).num_rows;
    const int64_t row_bytes = view.head_dim * DTypeBytes(view.dtype);
    return {
        .source = view,
        .kept = reinterpret_cast<const int32_t*>(lists + places_[i].tokens),
        .groups = view.num_heads,
        .num_kept = num_rows,
        .page_size = 1,
        .format = EncodingPolicy::Format::kAsIs,
        .scale_granularity = ScaleGranularity::kTokenHead,
        .out_dtype = view.dtype,
        .rotation = {},
        .pages = rows + at,
        .scales = IsQuantized(view.dtype) ? reinterpret_cast<float*>(rows + scales_at) : nullptr,
        .slot_stride_bytes = row_bytes,
        .head_stride_bytes = num_rows * row_bytes,
        .scale_head_stride = num_rows};
  }

  const RowsToRead wanted_;
  const ResidentSequence& sequence_;
  const int64_t key_bytes_;
  const int64_t value_bytes_;
  const bool key_scales_;
  const bool value_scales_;
  std::vector<Places> places_;
};

}  // namespace

std::vector<MovedLayer> RegularLayers(const SelectionStep& step, const SlotChanges& changes) {
  const int32_t num_heads = step.sequence->spec().shape.num_kv_heads;
  const int64_t num_rows = step.budget.num_selected;
  std::vector<MovedLayer> layers(static_cast<size_t>(step.num_layers));
  for (int32_t place = 0; place < step.num_layers; ++place) {
    if (step.sequence->dense(step.first_layer + place)) continue;
    layers[static_cast<size_t>(place)] =
        RegularLayer(num_heads, num_rows, changes.moved + place * num_heads * num_rows,
                     changes.counts + place * num_heads);
  }
  return layers;
}

absl::StatusOr<Buffer> ReadRows(std::span<const RowsToRead> wanted, Backend& backend,
                                Stream& stream) {
  Parts lists;
  Parts rows;
  std::vector<StepRows> steps(wanted.begin(), wanted.end());
  for (StepRows& step : steps) step.LayOut(lists, rows);
  if (rows.size_bytes() == 0) return Buffer();
  absl::StatusOr<Buffer> lists_host = backend.AllocateHost(lists.size_bytes());
  if (!lists_host.ok()) return lists_host.status();
  for (const StepRows& step : steps) step.FillLists(lists_host->data());
  absl::StatusOr<Buffer> lists_device = backend.ToDevice(*lists_host, stream);
  if (!lists_device.ok()) return lists_device.status();
  absl::StatusOr<Buffer> device = backend.Allocate(rows.size_bytes(), stream);
  absl::Status status = device.status();
  if (status.ok()) {
    std::vector<GatherPagesItem> items;
    for (const StepRows& step : steps) step.AddItems(lists_device->data(), device->data(), items);
    status = backend.GatherPages({.items = items}, stream);
  }
  absl::StatusOr<Buffer> host = Buffer();
  if (status.ok()) {
    host = backend.ToHost(*std::move(device), stream);
    status = host.status();
  }
  status.Update(stream.Synchronize());
  if (!status.ok()) return status;
  for (const StepRows& step : steps) step.PointInto(host->data());
  return host;
}

}  // namespace dynsplit

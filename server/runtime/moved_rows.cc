// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/moved_rows.h"

#include <algorithm>
#include <utility>

#include "server/runtime/parts.h"

namespace dynsplit {
namespace {

constexpr auto kIndexBytes = static_cast<int64_t>(sizeof(int32_t));
constexpr auto kFloatBytes = static_cast<int64_t>(sizeof(float));

// Where the rows of one layer go in the answer's memory, and the list of their tokens in its own.
struct Places {
  int64_t tokens = 0, keys = 0, values = 0, key_scales = 0, value_scales = 0;
};

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

GatherPagesItem RowsOf(const TensorView& view, const int32_t* tokens, int64_t num_rows,
                       std::byte* rows, float* scales) {
  const int64_t row_bytes = view.head_dim * DTypeBytes(view.dtype);
  return {.source = view,
          .kept = tokens,
          .groups = view.num_heads,
          .num_kept = num_rows,
          .page_size = 1,
          .format = EncodingPolicy::Format::kAsIs,
          .scale_granularity = ScaleGranularity::kTokenHead,
          .out_dtype = view.dtype,
          .rotation = {},
          .pages = rows,
          .scales = IsQuantized(view.dtype) ? scales : nullptr,
          .slot_stride_bytes = row_bytes,
          .head_stride_bytes = num_rows * row_bytes,
          .scale_head_stride = num_rows};
}

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

absl::StatusOr<Buffer> ReadRows(const SelectionStep& step, const SlotChanges& changes,
                                std::vector<MovedLayer>& layers, Backend& backend, Stream& stream) {
  const ResidentSequence& sequence = *step.sequence;
  const ResidentLayout& layout = sequence.layout();
  const int64_t num_rows = step.budget.num_selected;
  const int64_t layer_rows = sequence.spec().shape.num_kv_heads * num_rows;
  const int64_t key_bytes = RowBytes(sequence, layout.key_dtype);
  const int64_t value_bytes = RowBytes(sequence, layout.value_dtype);
  const bool key_scales = IsQuantized(layout.key_dtype);
  const bool value_scales = IsQuantized(layout.value_dtype);
  Parts lists;
  Parts rows;
  std::vector<Places> places(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto count = static_cast<int64_t>(layers[i].slots.size());
    places[i].tokens = lists.Add(count * kIndexBytes);
    places[i].keys = rows.Add(count * key_bytes);
    places[i].values = rows.Add(count * value_bytes);
    if (key_scales) places[i].key_scales = rows.Add(count * kFloatBytes);
    if (value_scales) places[i].value_scales = rows.Add(count * kFloatBytes);
  }
  if (rows.size_bytes() == 0) return Buffer();
  absl::StatusOr<Buffer> tokens_host = backend.AllocateHost(lists.size_bytes());
  if (!tokens_host.ok()) return tokens_host.status();
  for (size_t i = 0; i < layers.size(); ++i) {
    const int32_t* held = changes.held + static_cast<int64_t>(i) * layer_rows;
    auto* tokens = reinterpret_cast<int32_t*>(tokens_host->data() + places[i].tokens);
    for (size_t at = 0; at < layers[i].slots.size(); ++at) {
      const int64_t head = static_cast<int64_t>(at) / layers[i].num_rows;
      tokens[at] = held[head * num_rows + layers[i].slots[at]];
    }
  }
  absl::StatusOr<Buffer> tokens_device = backend.ToDevice(*tokens_host, stream);
  if (!tokens_device.ok()) return tokens_device.status();
  absl::StatusOr<Buffer> device = backend.Allocate(rows.size_bytes(), stream);
  absl::Status status = device.status();
  std::vector<GatherPagesItem> items;
  for (size_t i = 0; i < layers.size() && status.ok(); ++i) {
    const int64_t count = layers[i].num_rows;
    if (count == 0) continue;
    const auto layer = step.first_layer + static_cast<int32_t>(i);
    const auto* tokens = reinterpret_cast<const int32_t*>(tokens_device->data() + places[i].tokens);
    const auto scales = [&](int64_t at) { return reinterpret_cast<float*>(device->data() + at); };
    items.push_back(RowsOf(sequence.Keys(layer, sequence.num_tokens()), tokens, count,
                           device->data() + places[i].keys, scales(places[i].key_scales)));
    items.push_back(RowsOf(sequence.Values(layer, sequence.num_tokens()), tokens, count,
                           device->data() + places[i].values, scales(places[i].value_scales)));
  }
  if (status.ok()) status = backend.GatherPages({.items = items}, stream);
  absl::StatusOr<Buffer> host = Buffer();
  if (status.ok()) {
    host = backend.ToHost(*std::move(device), stream);
    status = host.status();
  }
  status.Update(stream.Synchronize());
  if (!status.ok()) return status;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto bytes = [&](int64_t at, int64_t each) {
      return Bytes(host->data() + at, layers[i].slots.size() * static_cast<size_t>(each));
    };
    layers[i].keys = bytes(places[i].keys, key_bytes);
    layers[i].values = bytes(places[i].values, value_bytes);
    if (key_scales) layers[i].key_scales = bytes(places[i].key_scales, kFloatBytes);
    if (value_scales) layers[i].value_scales = bytes(places[i].value_scales, kFloatBytes);
  }
  return host;
}

}  // namespace dynsplit

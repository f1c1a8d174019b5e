// SPDX-License-Identifier: Apache-2.0
//
// Rows of the reuse pipeline that travel in the answer: what changed in the caller's slots, as
// regular tensors (arXiv 2602.03184 appendix B.2).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "server/pipeline/resident.h"
#include "server/runtime/select_spec.h"

namespace dynsplit {

// What RefreshSlots said of a step, on the host.
struct SlotChanges {
  const int32_t* moved = nullptr;   // [num_layers, Hkv, n], of each head the first `counts`
  const int32_t* counts = nullptr;  // [num_layers, Hkv]
  const int32_t* held = nullptr;    // [num_layers, Hkv, n]
};

// A layer's slots: those that changed, then others in order, until all heads have as many as the
// one with most. Dense layers have none. Rows are not read yet.
std::vector<MovedLayer> RegularLayers(const SelectionStep& step, const SlotChanges& changes);

// Of one step: where its rows are to be read.
struct RowsToRead {
  const SelectionStep* step = nullptr;
  SlotChanges changes;
  std::vector<MovedLayer>* layers = nullptr;  // of RegularLayers
};
// Reads those slots' rows; the layers point into the result. Complete when it returns.
absl::StatusOr<Buffer> ReadRows(std::span<const RowsToRead> wanted, Backend& backend,
                                Stream& stream);

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// CheckFinite of small things in host memory, where asking the device would take longer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "server/pipeline/types.h"

namespace dynsplit {

// Whether all of `count` dense elements are neither NaN nor infinite.
bool AllFinite(const std::byte* data, DType dtype, int64_t count);
// First token with a NaN or infinity, or num_tokens. Requires: not paged, data in host memory.
int64_t FirstNotFinite(const TensorView& view);

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// How a request fills the room that it offers for results. Pure functions.
#pragma once

#include <cstdint>

#include "server/runtime/request_spec.h"

namespace dynsplit {

// The sequence as it came: everything kept, as is. Its index is not wanted.
SequenceSpec OriginalsSpec(SequenceSpec spec);

// Operations write results to spec.output themselves: no layer's pages are made in vain, and the
// device reaches it without detour.
bool WritesInPlace(const RequestSpec& spec, bool device_has_own_memory);
// What spec.output needs at least, as far as it is known before the first tensor, and at most.
struct OutputNeed {
  int64_t least_bytes = 0;
  int64_t most_bytes = 0;
};
OutputNeed OutputNeedOf(const RequestSpec& spec);

}  // namespace dynsplit

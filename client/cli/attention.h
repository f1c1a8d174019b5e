// SPDX-License-Identifier: Apache-2.0
//
// How much of a query's attention chosen tokens hold, computed here from the capture itself: what a
// session's answer is measured against does not come from the server.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "client/cpp/capture.h"

namespace dynsplit::cli {

// Softmax mass of each query head, [Hq], on the tokens that its group's set names, for one query
// row [Hq, D] of a layer over the first `num_tokens` keys. `chosen` is [groups, n], groups 1 or
// Hkv; `softmax_scale` 0 = 1/sqrt(D). Requires tokens in [0, num_tokens).
std::vector<double> AttentionMass(const Capture& capture, const Capture::Layer& layer,
                                  absl::Span<const std::byte> query, int64_t num_tokens,
                                  absl::Span<const int32_t> chosen, int32_t groups,
                                  double softmax_scale);

}  // namespace dynsplit::cli

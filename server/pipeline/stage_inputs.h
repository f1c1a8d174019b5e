// SPDX-License-Identifier: Apache-2.0
//
// Quantities that several stages of compress.h derive from a spec in the same way. Internal.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/statusor.h"
#include "server/pipeline/compress.h"

namespace dynsplit {

// Window queries that scoring reads: the last ones supplied, at most as many as the policy wants.
int64_t NumScoringQueries(const SequenceSpec& spec);
float SoftmaxScale(const SequenceSpec& spec);

// Granularity of the scales of encoded K or V; of as-is output, that of the input.
ScaleGranularity OutputScaleGranularity(const SequenceSpec& spec, EncodingPolicy::Format format);
OutputCost OutputCostOf(const SequenceSpec& spec);

absl::StatusOr<LayerBudget> BudgetOf(const SequenceContext& context, int32_t layer);
// True if `budget` leaves nothing to choose.
bool KeepsEverything(const SequenceContext& context, const LayerBudget& budget);

// A receipt without figures: all NaN.
LayerReceipt NotMeasured(int32_t layer);

// Returns `status`, the failure of something that leaves work on the stream, when the device has
// done that work: the host memory it uses may go then.
absl::Status Abandon(absl::Status status, Stream& stream);

// Host memory holding a copy of `bytes`.
absl::StatusOr<Buffer> HostCopy(std::span<const std::byte> bytes, Backend& backend);
// The same memory, owned by someone else.
Buffer Alias(const Buffer& buffer);

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// For debugging: when each step of a request's layers began and ended, appended to a file as one
// JSON object a line:
//
//     {"request":"r1","layer":3,"what":"score","begin_us":81520.25,"end_us":81731.5}
//
// Microseconds of one steady clock, also for what ran on a device. Layer -1: the whole sequence.
// tests/bench/timeline.py draws the file. Thread-safe; costs one relaxed load where it is off.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "server/pipeline/backend.h"

namespace dynsplit {

struct TraceSpan {
  std::string_view what;
  Stream::Clock::time_point begin, end;
};

// Process-wide. An empty path turns tracing off. INVALID_ARGUMENT where the file cannot be opened.
absl::Status OpenTrace(const std::string& path);
bool Tracing();
void Trace(std::string_view request_id, int32_t layer, std::span<const TraceSpan> spans);

}  // namespace dynsplit

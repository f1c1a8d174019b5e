// SPDX-License-Identifier: Apache-2.0
//
// A Select: what a caller asks, and what it is told.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "server/pipeline/backend.h"
#include "server/runtime/regions.h"

namespace dynsplit {

// Where the rows of the reuse pipeline go; see GatherRows.
struct GatherSpec {
  uint64_t generation = 0;
  std::optional<RegionName> keys, values, key_scales, value_scales;  // absent = in the answer
  std::optional<RegionName> held;                                    // likewise
};

// The step of one session, as SequenceStep says.
struct StepSpec {
  std::string field;  // "sequences[3]"
  std::string session_id;
  int32_t first_layer = 0;
  int32_t num_layers = 0;  // 0 = to the last
  int32_t num_queries = 1;
  DType query_dtype = DType::kBFloat16;
  std::string_view query_data;  // host memory that outlives the run; or
  std::optional<RegionName> query_region;
  int64_t tokens_per_head = 0;  // 0 = the policy's
  std::optional<RegionName> token_region;
  bool with_pages = false;
  bool with_scores = false;
  std::optional<GatherSpec> gather;
};

using Bytes = std::span<const std::byte>;

// Inline rows of one layer.
struct MovedLayer {
  int64_t num_rows = 0;        // m
  std::vector<int32_t> slots;  // [Hkv, m]
  Bytes keys, values, key_scales, value_scales;
};

// Bytes lie in SelectResult::memory.
struct StepResult {
  int64_t num_tokens = 0;
  int32_t first_layer = 0;
  int32_t num_layers = 0;
  int32_t groups = 0;
  int64_t tokens_per_head = 0;
  bool raised_by_protection = false;
  std::vector<int32_t> dense_layers;
  Bytes tokens;                             // int32; empty with token_region
  std::vector<std::vector<int32_t>> pages;  // a layer
  std::vector<Bytes> scores;                // a layer; empty for dense ones
  uint64_t generation = 0;
  int64_t moved_rows = 0;
  int64_t chosen_rows = 0;
  std::vector<MovedLayer> moved;  // a layer; none where rows go to regions
  Bytes held;
};

struct SelectResult {
  std::vector<StepResult> steps;
  double device_seconds = 0;                          // from the first launch to the last result
  std::vector<std::shared_ptr<const Buffer>> memory;  // shared with other answers
};

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// What can be said of a Select before any work: budgets, places, sizes, and refusals.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "server/pipeline/resident.h"
#include "server/runtime/parts.h"
#include "server/runtime/regions.h"
#include "server/runtime/select_spec.h"
#include "server/runtime/sessions.h"

namespace dynsplit {

// Bytes that the parts of one answer may still take. Thread-safe.
class AnswerBudget {
 public:
  explicit AnswerBudget(int64_t bytes) : left_bytes_(bytes) {}
  // How many bytes are missing; <= 0: none.
  int64_t Take(int64_t bytes) { return bytes - left_bytes_.fetch_sub(bytes); }
  void GiveBack(int64_t bytes) { left_bytes_.fetch_add(bytes); }

 private:
  std::atomic<int64_t> left_bytes_;
};

// One step on its way. Offsets are those of parts of the batch's buffers.
struct PlannedStep {
  const StepSpec* spec = nullptr;
  Session* session = nullptr;
  const ResidentSequence* sequence = nullptr;
  SelectionStep selection;
  int64_t num_blocks = 0;
  int64_t query_bytes = 0;
  int64_t query_offset = 0;
  int64_t token_offset = 0;
  int64_t score_offset = 0;
  int64_t count_offset = 0;  // rows moved, [num_layers, Hkv]
  int64_t moved_offset = 0;
  int64_t held_offset = 0;
  RegionPart query_place, token_place, held_place;
  RegionPart key_place, value_place, key_scale_place, value_scale_place;
  bool all_rows_move = false;

  int32_t heads() const { return sequence->spec().shape.num_kv_heads; }
  int64_t num_rows() const { return selection.budget.num_selected; }
  int64_t layer_tokens() const { return sequence->groups() * num_rows(); }
  int64_t layer_rows() const { return heads() * num_rows(); }
  int32_t num_layers() const { return selection.num_layers; }
  int32_t layer(int32_t place) const { return selection.first_layer + place; }
  bool dense(int32_t place) const { return sequence->dense(layer(place)); }
  int64_t num_pages() const;
  bool gathers() const { return spec->gather.has_value(); }
  bool gathers_inline() const { return gathers() && !spec->gather->keys.has_value(); }
  bool returns_held() const { return gathers() && !spec->gather->held.has_value(); }
  bool reads_tokens() const { return !spec->token_region.has_value() || spec->with_pages; }
  int64_t key_row_bytes() const {
    return sequence->spec().shape.head_dim * DTypeBytes(sequence->layout().key_dtype);
  }
  int64_t value_row_bytes() const {
    return sequence->spec().shape.head_dim * DTypeBytes(sequence->layout().value_dtype);
  }
  bool key_scales() const { return IsQuantized(sequence->layout().key_dtype); }
  bool value_scales() const { return IsQuantized(sequence->layout().value_dtype); }
  // Of one moved row of one head, inline.
  int64_t row_bytes() const;
  // Of scores, and of candidates, while the step runs.
  int64_t score_bytes() const;
};

// The steps of one call.
struct SelectPlan {
  std::vector<PlannedStep> steps;
  int64_t num_layers = 0;
  int64_t taken_bytes = 0;  // of the answer's budget

  // RESOURCE_EXHAUSTED under the step's field; `instead` says what the caller can do.
  absl::Status TakeAnswer(const PlannedStep& step, int64_t bytes, const char* instead,
                          AnswerBudget& answer);
};
inline constexpr const char* kInsteadOfRows =
    "gather fewer layers a call or into regions, or read whole layers with Fetch";

// Where the parts of a batch lie.
struct SelectLayout {
  Parts queries;
  Parts out;
};

// What calls are planned against.
struct SelectContext {
  const RegionStore& regions;
  const Backend& backend;  // that of the sessions
};

// `sessions` are those of `specs`, all different; their locks are held (slots_mu where a step
// gathers). Adds to the layout only what succeeds; what a failed plan took of the budget is lost.
absl::StatusOr<SelectPlan> PlanSelect(std::span<const StepSpec> specs,
                                      std::span<const SessionUse> sessions,
                                      const SelectContext& context, AnswerBudget& answer,
                                      SelectLayout& layout);

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/select_plan.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

constexpr auto kIndexBytes = static_cast<int64_t>(sizeof(int32_t));
constexpr auto kFloatBytes = static_cast<int64_t>(sizeof(float));
// No operation needs more, so that no offset of a caller can fault the device.
constexpr uintptr_t kRegionAlignmentBytes = 16;
// Of the answer, beside the bulk: of each sequence, and of each of its layers.
constexpr int64_t kSequenceOverheadBytes = 256;
constexpr int64_t kLayerOverheadBytes = 64;

class Planner {
 public:
  Planner(const SelectContext& context, AnswerBudget& answer, SelectLayout& layout)
      : context_(context), answer_(answer), layout_(layout) {}

  absl::StatusOr<SelectPlan> Run(std::span<const StepSpec> specs,
                                 std::span<const SessionUse> sessions) {
    plan_.steps.resize(specs.size());
    for (size_t i = 0; i < specs.size(); ++i) {
      absl::Status status = Plan(specs[i], *sessions[i].get(), plan_.steps[i]);
      if (!status.ok()) return status;
      plan_.num_layers += plan_.steps[i].num_layers();
    }
    return std::move(plan_);
  }

 private:
  absl::Status Plan(const StepSpec& spec, Session& session, PlannedStep& step) {
    session.mu.AssertReaderHeld();
    step.spec = &spec;
    step.session = &session;
    step.sequence = session.sequence.get();
    const SequenceShape& shape = step.sequence->spec().shape;
    SelectionStep& selection = step.selection;
    selection.sequence = step.sequence;
    selection.first_layer = spec.first_layer;
    selection.num_layers =
        spec.num_layers == 0 ? shape.num_layers - spec.first_layer : spec.num_layers;
    if (spec.first_layer >= shape.num_layers) {
      return InvalidField(
          spec.field + ".first_layer",
          absl::StrCat("is ", spec.first_layer, "; must be in [0, ", shape.num_layers, ")"));
    }
    if (selection.num_layers > shape.num_layers - spec.first_layer) {
      return InvalidField(
          spec.field + ".num_layers",
          absl::StrCat("is ", selection.num_layers, "; from layer ", spec.first_layer,
                       " on the session has ", shape.num_layers - spec.first_layer));
    }
    absl::StatusOr<StepBudget> budget = BudgetOfStep(*step.sequence, spec.tokens_per_head);
    if (!budget.ok()) {
      const ErrorDetails details = GetErrorDetails(budget.status());
      return InvalidField(absl::StrCat(spec.field, ".", details.subject), details.problem);
    }
    selection.budget = *budget;
    selection.num_queries = spec.num_queries;
    selection.query_dtype = spec.query_dtype;
    step.num_blocks = step.sequence->segmentation().num_blocks();
    step.query_bytes = int64_t{selection.num_layers} * spec.num_queries * shape.num_query_heads *
                       shape.head_dim * DTypeBytes(spec.query_dtype);
    absl::Status status = FindQueries(step);
    if (status.ok()) status = FindPlaces(step);
    if (status.ok()) status = CheckAnswer(step);
    if (status.ok()) LayOut(step);
    return status;
  }

  absl::Status Find(const RegionName& name, int64_t size_bytes, bool writable,
                    const std::string& field, RegionPart& part) {
    absl::StatusOr<RegionPart> found = context_.regions.Find(
        name.name, name.generation, name.offset_bytes, size_bytes, writable, field);
    if (!found.ok()) return found.status();
    if (reinterpret_cast<uintptr_t>(found->data) % kRegionAlignmentBytes != 0) {
      return InvalidField(field + ".offset_bytes",
                          absl::StrCat("is ", name.offset_bytes, "; must lead to a multiple of ",
                                       kRegionAlignmentBytes, " bytes"));
    }
    const Backend* owner = found->region->backend();
    if (owner != nullptr && owner != &context_.backend) {
      return InvalidField(field + ".name", "is memory of another device than that of the session");
    }
    part = *std::move(found);
    return absl::OkStatus();
  }

  absl::Status FindQueries(PlannedStep& step) {
    const StepSpec& spec = *step.spec;
    if (spec.query_region.has_value()) {
      return Find(*spec.query_region, step.query_bytes, false, spec.field + ".query_region",
                  step.query_place);
    }
    const auto size = static_cast<int64_t>(spec.query_data.size());
    if (size == step.query_bytes) return absl::OkStatus();
    return InvalidField(spec.field + ".query_data",
                        absl::StrCat("has ", size, " bytes; ", step.num_layers(), " layers of ",
                                     spec.num_queries, " queries must have ", step.query_bytes));
  }

  absl::Status FindPlaces(PlannedStep& step) {
    const StepSpec& spec = *step.spec;
    const auto find = [&](const std::optional<RegionName>& name, int64_t size_bytes,
                          const char* field, RegionPart& part) -> absl::Status {
      if (!name.has_value()) return absl::OkStatus();
      return Find(*name, size_bytes, true, absl::StrCat(spec.field, ".", field), part);
    };
    absl::Status status =
        find(spec.token_region, step.num_layers() * step.layer_tokens() * kIndexBytes,
             "token_region", step.token_place);
    if (!spec.gather.has_value() || !status.ok()) return status;
    const GatherSpec& gather = *spec.gather;
    const auto needs = [&](bool scales, const std::optional<RegionName>& name,
                           const char* field) -> absl::Status {
      if (!gather.keys.has_value() || scales == name.has_value()) return absl::OkStatus();
      return InvalidField(absl::StrCat(spec.field, ".", field),
                          scales ? "is missing; the session's rows rest with scales"
                                 : "is set; the session's rows rest without scales");
    };
    const int64_t rows = step.num_layers() * step.layer_rows();
    status = find(gather.keys, rows * step.key_row_bytes(), "gather.key_region", step.key_place);
    const auto next = [&status](auto&& check) {
      if (status.ok()) status = check();
    };
    next([&] {
      return find(gather.values, rows * step.value_row_bytes(), "gather.value_region",
                  step.value_place);
    });
    next([&] { return needs(step.key_scales(), gather.key_scales, "gather.key_scale_region"); });
    next([&] {
      return needs(step.value_scales(), gather.value_scales, "gather.value_scale_region");
    });
    next([&] {
      return find(gather.key_scales, rows * kFloatBytes, "gather.key_scale_region",
                  step.key_scale_place);
    });
    next([&] {
      return find(gather.value_scales, rows * kFloatBytes, "gather.value_scale_region",
                  step.value_scale_place);
    });
    next([&] {
      return find(gather.held, rows * kIndexBytes, "gather.held_region", step.held_place);
    });
    return status;
  }

  // As far as it is known before the step.
  absl::Status CheckAnswer(PlannedStep& step) {
    const int64_t layers = step.num_layers();
    int64_t bytes = kSequenceOverheadBytes + layers * kLayerOverheadBytes;
    if (!step.spec->token_region.has_value()) bytes += layers * step.layer_tokens() * kIndexBytes;
    if (step.spec->with_scores) {
      bytes += layers * step.sequence->groups() * step.num_blocks * kFloatBytes;
    }
    if (step.spec->with_pages) {
      bytes += layers * std::min(step.layer_tokens(), step.num_pages()) * kIndexBytes;
    }
    if (step.returns_held()) bytes += layers * step.layer_rows() * kIndexBytes;
    absl::Status status = plan_.TakeAnswer(
        step, bytes, "use regions, fewer layers a call, or leave out scores and pages", answer_);
    if (!status.ok() || !step.gathers()) return status;
    Session& session = *step.session;
    session.slots_mu.AssertHeld();
    step.all_rows_move = !Fits(session.slots, step);
    if (!step.all_rows_move || !step.gathers_inline()) return status;
    int64_t rows = 0;
    for (int32_t place = 0; place < step.num_layers(); ++place) {
      if (!step.dense(place)) rows += step.layer_rows();
    }
    return plan_.TakeAnswer(step, rows * step.row_bytes(), kInsteadOfRows, answer_);
  }

  // Whether the caller's rows are those that the slots tell of.
  static bool Fits(const RowSlots& slots, const PlannedStep& step) {
    const uint64_t generation = step.spec->gather->generation;
    return generation != 0 && slots.generation == generation &&
           slots.first_layer == step.selection.first_layer &&
           slots.num_layers == step.num_layers() && slots.num_rows == step.num_rows();
  }

  void LayOut(PlannedStep& step) {
    const int64_t layers = step.num_layers();
    if (!step.spec->query_region.has_value())
      step.query_offset = layout_.queries.Add(step.query_bytes);
    if (step.reads_tokens()) {
      step.token_offset = layout_.out.Add(layers * step.layer_tokens() * kIndexBytes);
    }
    if (step.spec->with_scores) {
      step.score_offset =
          layout_.out.Add(layers * step.sequence->groups() * step.num_blocks * kFloatBytes);
    }
    if (!step.gathers()) return;
    step.count_offset = layout_.out.Add(layers * step.heads() * kIndexBytes);
    if (step.gathers_inline())
      step.moved_offset = layout_.out.Add(layers * step.layer_rows() * kIndexBytes);
    if (step.gathers_inline() || step.returns_held()) {
      step.held_offset = layout_.out.Add(layers * step.layer_rows() * kIndexBytes);
    }
  }

  const SelectContext& context_;
  AnswerBudget& answer_;
  SelectLayout& layout_;
  SelectPlan plan_;
};

}  // namespace

int64_t PlannedStep::num_pages() const {
  const int64_t page_size = sequence->spec().policy.page_size;
  return (sequence->num_tokens() + page_size - 1) / page_size;
}

int64_t PlannedStep::row_bytes() const {
  return key_row_bytes() + value_row_bytes() + kIndexBytes + (key_scales() ? kFloatBytes : 0) +
         (value_scales() ? kFloatBytes : 0);
}

int64_t PlannedStep::score_bytes() const {
  const int64_t of_layer = RefinementBytes(*sequence, selection.budget);
  return num_layers() * (heads() + 1) * num_blocks * kFloatBytes +
         std::min(num_layers() * of_layer, std::max(of_layer, kMaxRefinementBytes));
}

absl::Status SelectPlan::TakeAnswer(const PlannedStep& step, int64_t bytes, const char* instead,
                                    AnswerBudget& answer) {
  taken_bytes += bytes;
  const int64_t missing = answer.Take(bytes);
  if (missing <= 0) return absl::OkStatus();
  return InvalidField(step.spec->field,
                      absl::StrCat("makes the answer ", missing,
                                   " bytes larger than one message may be; ", instead));
}

absl::StatusOr<SelectPlan> PlanSelect(std::span<const StepSpec> specs,
                                      std::span<const SessionUse> sessions,
                                      const SelectContext& context, AnswerBudget& answer,
                                      SelectLayout& layout) {
  SelectLayout extended = layout;
  absl::StatusOr<SelectPlan> plan = Planner(context, answer, extended).Run(specs, sessions);
  if (plan.ok()) layout = extended;
  return plan;
}

}  // namespace dynsplit

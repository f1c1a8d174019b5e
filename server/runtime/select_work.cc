// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/select_work.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/pipeline/errors.h"
#include "server/runtime/generation.h"
#include "server/runtime/host_finite.h"
#include "server/runtime/moved_rows.h"
#include "server/runtime/parts.h"

namespace dynsplit {
namespace {

constexpr auto kIndexBytes = static_cast<int64_t>(sizeof(int32_t));
constexpr auto kFloatBytes = static_cast<int64_t>(sizeof(float));
// No operation needs more, so that no offset of a caller can fault the device.
constexpr uintptr_t kRegionAlignmentBytes = 16;
// Of the answer, beside the bulk: of each sequence, and of each of its layers.
constexpr int64_t kSequenceOverheadBytes = 256;
constexpr int64_t kLayerOverheadBytes = 64;

// The locks of all sessions of a step, in one order for everybody.
class SessionLocks {
 public:
  SessionLocks(std::span<const StepSpec> steps,
               std::span<const SessionUse> sessions) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    for (size_t i = 0; i < steps.size(); ++i) {
      sessions_.push_back(sessions[i].get());
      if (steps[i].gather.has_value()) slots_.push_back(sessions[i].get());
    }
    std::sort(sessions_.begin(), sessions_.end(), std::less<>());
    std::sort(slots_.begin(), slots_.end(), std::less<>());
    for (Session* session : slots_) session->slots_mu.Lock();
    for (Session* session : sessions_) session->mu.ReaderLock();
  }
  ~SessionLocks() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    for (Session* session : sessions_) session->mu.ReaderUnlock();
    for (Session* session : slots_) session->slots_mu.Unlock();
  }
  SessionLocks(const SessionLocks&) = delete;
  SessionLocks& operator=(const SessionLocks&) = delete;

 private:
  std::vector<Session*> sessions_;
  std::vector<Session*> slots_;
};

// One step on its way. Offsets are those of parts of the selection's buffers.
struct Step {
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
  int64_t row_bytes() const {
    return key_row_bytes() + value_row_bytes() + kIndexBytes + (key_scales() ? kFloatBytes : 0) +
           (value_scales() ? kFloatBytes : 0);
  }
};

class Selection {
 public:
  Selection(const RegionStore& regions, int64_t max_answer_bytes, Backend& backend, Stream& stream)
      : regions_(regions), left_bytes_(max_answer_bytes), backend_(backend), stream_(stream) {}

  absl::Status Run(std::span<const StepSpec> specs, std::span<const SessionUse> sessions) {
    steps_.resize(specs.size());
    for (size_t i = 0; i < specs.size(); ++i) {
      absl::Status status = Plan(specs[i], *sessions[i].get(), steps_[i]);
      if (!status.ok()) return status;
    }
    absl::Status status = StageQueries();
    if (status.ok()) status = PrepareSlots();
    if (!status.ok()) return status;
    const absl::Time start = absl::Now();
    status = Launch();
    // Also after a failure: nothing may be let go while the device still works on it.
    status.Update(stream_.Synchronize());
    device_time_ += absl::Now() - start;
    if (status.ok()) status = CollectAll();
    if (status.ok()) return status;
    (void)stream_.Synchronize();
    return status;
  }

  SelectResult Finish() {
    result_.device_seconds = absl::ToDoubleSeconds(device_time_);
    return std::move(result_);
  }

 private:
  // -- before any work ----------------------------------------------------------------------------

  absl::Status Plan(const StepSpec& spec, Session& session, Step& step) {
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
    absl::StatusOr<RegionPart> found =
        regions_.Find(name.name, name.generation, name.offset_bytes, size_bytes, writable, field);
    if (!found.ok()) return found.status();
    if (reinterpret_cast<uintptr_t>(found->data) % kRegionAlignmentBytes != 0) {
      return InvalidField(field + ".offset_bytes",
                          absl::StrCat("is ", name.offset_bytes, "; must lead to a multiple of ",
                                       kRegionAlignmentBytes, " bytes"));
    }
    part = *std::move(found);
    return absl::OkStatus();
  }

  absl::Status FindQueries(Step& step) {
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

  absl::Status FindPlaces(Step& step) {
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

  absl::Status TakeAnswer(const Step& step, int64_t size_bytes, const char* instead) {
    left_bytes_ -= size_bytes;
    if (left_bytes_ >= 0) return absl::OkStatus();
    return InvalidField(step.spec->field,
                        absl::StrCat("makes the answer ", -left_bytes_,
                                     " bytes larger than one message may be; ", instead));
  }

  // As far as it is known before the step.
  absl::Status CheckAnswer(Step& step) {
    const int64_t layers = step.num_layers();
    int64_t bytes = kSequenceOverheadBytes + layers * kLayerOverheadBytes;
    if (!step.spec->token_region.has_value()) bytes += layers * step.layer_tokens() * kIndexBytes;
    if (step.spec->with_scores) {
      bytes += layers * step.sequence->groups() * step.num_blocks * kFloatBytes;
    }
    if (step.spec->with_pages) {
      bytes += layers * std::min(step.layer_tokens(), NumPages(step)) * kIndexBytes;
    }
    if (step.returns_held()) bytes += layers * step.layer_rows() * kIndexBytes;
    absl::Status status =
        TakeAnswer(step, bytes, "use regions, fewer layers a call, or leave out scores and pages");
    if (!status.ok() || !step.gathers()) return status;
    Session& session = *step.session;
    session.slots_mu.AssertHeld();
    step.all_rows_move = !Fits(session.slots, step);
    if (!step.all_rows_move || !step.gathers_inline()) return status;
    int64_t rows = 0;
    for (int32_t place = 0; place < step.num_layers(); ++place) {
      if (!step.dense(place)) rows += step.layer_rows();
    }
    return TakeAnswer(step, rows * step.row_bytes(), kInsteadOfRows);
  }

  // Whether the caller's rows are those that the slots tell of.
  static bool Fits(const RowSlots& slots, const Step& step) {
    const uint64_t generation = step.spec->gather->generation;
    return generation != 0 && slots.generation == generation &&
           slots.first_layer == step.selection.first_layer &&
           slots.num_layers == step.num_layers() && slots.num_rows == step.num_rows();
  }

  static int64_t NumPages(const Step& step) {
    const int64_t page_size = step.sequence->spec().policy.page_size;
    return (step.sequence->num_tokens() + page_size - 1) / page_size;
  }

  void LayOut(Step& step) {
    const int64_t layers = step.num_layers();
    if (!step.spec->query_region.has_value()) step.query_offset = queries_.Add(step.query_bytes);
    if (step.reads_tokens()) {
      step.token_offset = out_.Add(layers * step.layer_tokens() * kIndexBytes);
    }
    if (step.spec->with_scores) {
      step.score_offset =
          out_.Add(layers * step.sequence->groups() * step.num_blocks * kFloatBytes);
    }
    if (!step.gathers()) return;
    step.count_offset = out_.Add(layers * step.heads() * kIndexBytes);
    if (step.gathers_inline())
      step.moved_offset = out_.Add(layers * step.layer_rows() * kIndexBytes);
    if (step.gathers_inline() || step.returns_held()) {
      step.held_offset = out_.Add(layers * step.layer_rows() * kIndexBytes);
    }
  }

  // -- work ---------------------------------------------------------------------------------------

  absl::Status StageQueries() {
    if (queries_.size_bytes() == 0) return absl::OkStatus();
    absl::StatusOr<Buffer> host = backend_.AllocateHost(queries_.size_bytes());
    if (!host.ok()) return host.status();
    for (const Step& step : steps_) {
      const StepSpec& spec = *step.spec;
      if (spec.query_region.has_value()) continue;
      std::byte* to = host->data() + step.query_offset;
      std::memcpy(to, spec.query_data.data(), spec.query_data.size());
      if (AllFinite(to, spec.query_dtype, step.query_bytes / DTypeBytes(spec.query_dtype))) {
        continue;
      }
      return InvalidField(spec.field + ".query_data", "has a value that is not finite");
    }
    queries_host_ = *std::move(host);
    return absl::OkStatus();
  }

  absl::Status PrepareSlots() {
    for (const Step& step : steps_) {
      if (!step.gathers()) continue;
      Session& session = *step.session;
      session.slots_mu.AssertHeld();
      if (step.all_rows_move) {
        absl::StatusOr<RowSlots> empty =
            EmptySlots(*step.sequence, step.selection.first_layer, step.num_layers(),
                       step.num_rows(), backend_, stream_);
        if (!empty.ok()) return empty.status();
        session.slots = *std::move(empty);
      }
      session.slots.generation = 0;  // until the step has come to its end
    }
    return absl::OkStatus();
  }

  absl::Status Launch() {
    if (!queries_host_.empty()) {
      absl::StatusOr<Buffer> device = backend_.ToDevice(queries_host_, stream_);
      if (!device.ok()) return device.status();
      queries_device_ = *std::move(device);
    }
    Buffer out;
    if (out_.size_bytes() > 0) {
      absl::StatusOr<Buffer> device = backend_.Allocate(out_.size_bytes(), stream_);
      if (!device.ok()) return device.status();
      out = *std::move(device);
    }
    std::vector<SelectionStep> selections;
    selections.reserve(steps_.size());
    for (Step& step : steps_) {
      SelectionStep& selection = step.selection;
      selection.queries = step.spec->query_region.has_value()
                              ? step.query_place.data
                              : queries_device_.data() + step.query_offset;
      selection.tokens = reinterpret_cast<int32_t*>(step.spec->token_region.has_value()
                                                        ? step.token_place.data
                                                        : out.data() + step.token_offset);
      if (step.spec->with_scores) {
        selection.block_scores = reinterpret_cast<float*>(out.data() + step.score_offset);
      }
      selections.push_back(selection);
    }
    absl::Status status = SelectSteps(selections, backend_, stream_);
    for (const Step& step : steps_) {
      if (status.ok() && step.gathers()) status = Refresh(step, out);
      if (status.ok() && step.spec->token_region.has_value() && step.spec->with_pages) {
        status = CopyTokens(step, out);
      }
    }
    if (!status.ok() || out.empty()) return status;
    absl::StatusOr<Buffer> host = backend_.ToHost(std::move(out), stream_);
    if (!host.ok()) return host.status();
    host_ = *std::move(host);
    return absl::OkStatus();
  }

  absl::Status Refresh(const Step& step, const Buffer& out) {
    Session& session = *step.session;
    session.slots_mu.AssertHeld();
    const RowDestination rows = {
        .keys = step.key_place.data,
        .values = step.value_place.data,
        .key_scales = reinterpret_cast<float*>(step.key_scale_place.data),
        .value_scales = reinterpret_cast<float*>(step.value_scale_place.data)};
    int32_t* const moved = step.gathers_inline()
                               ? reinterpret_cast<int32_t*>(out.data() + step.moved_offset)
                               : nullptr;
    absl::Status status =
        RefreshSlots(step.selection, session.slots, rows, moved,
                     reinterpret_cast<int32_t*>(out.data() + step.count_offset), backend_, stream_);
    const int64_t held_bytes = session.slots.held.size_bytes();
    if (status.ok() && (step.gathers_inline() || step.returns_held())) {
      status = backend_.Copy(out.data() + step.held_offset, session.slots.held.data(), held_bytes,
                             stream_);
    }
    if (status.ok() && !step.returns_held()) {
      status = backend_.Copy(step.held_place.data, session.slots.held.data(), held_bytes, stream_);
    }
    return status;
  }

  // Pages are made of tokens on the host; rows of dense layers hold none.
  absl::Status CopyTokens(const Step& step, const Buffer& out) {
    const int64_t layer_bytes = step.layer_tokens() * kIndexBytes;
    for (int32_t place = 0; place < step.num_layers(); ++place) {
      if (step.dense(place)) continue;
      absl::Status status =
          backend_.Copy(out.data() + step.token_offset + place * layer_bytes,
                        step.token_place.data + place * layer_bytes, layer_bytes, stream_);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  // -- answer -------------------------------------------------------------------------------------

  template <typename T>
  T* Host(int64_t offset_bytes) const {
    return reinterpret_cast<T*>(host_.data() + offset_bytes);
  }

  absl::Status CollectAll() {
    result_.steps.resize(steps_.size());
    for (size_t i = 0; i < steps_.size(); ++i) {
      Collect(steps_[i], result_.steps[i]);
      if (!steps_[i].gathers()) continue;
      absl::Status status = CollectRows(steps_[i], result_.steps[i]);
      if (!status.ok()) return status;
    }
    // All or none: a caller that gets no answer knows no generation.
    for (size_t i = 0; i < steps_.size(); ++i) {
      if (!steps_[i].gathers()) continue;
      Session& session = *steps_[i].session;
      session.slots_mu.AssertHeld();
      session.slots.generation = RandomGeneration();
      result_.steps[i].generation = session.slots.generation;
    }
    result_.memory.push_back(std::move(host_));
    return absl::OkStatus();
  }

  void Collect(const Step& step, StepResult& result) {
    result.num_tokens = step.sequence->num_tokens();
    result.first_layer = step.selection.first_layer;
    result.num_layers = step.num_layers();
    result.groups = step.sequence->groups();
    result.tokens_per_head = step.num_rows();
    result.raised_by_protection = step.selection.budget.raised_by_protection;
    for (int32_t place = 0; place < step.num_layers(); ++place) {
      if (step.dense(place)) result.dense_layers.push_back(step.layer(place));
    }
    const int64_t layer_tokens = step.layer_tokens();
    if (step.reads_tokens()) {
      auto* tokens = Host<int32_t>(step.token_offset);
      for (int32_t place = 0; place < step.num_layers(); ++place) {
        int32_t* layer = tokens + place * layer_tokens;
        if (step.dense(place)) std::fill(layer, layer + layer_tokens, -1);
        if (step.spec->with_pages) result.pages.push_back(PagesOf(step, layer));
      }
      if (!step.spec->token_region.has_value()) {
        result.tokens = {Host<std::byte>(step.token_offset),
                         static_cast<size_t>(step.num_layers() * layer_tokens * kIndexBytes)};
      }
    }
    if (!step.spec->with_scores) return;
    const int64_t layer_bytes = result.groups * step.num_blocks * kFloatBytes;
    for (int32_t place = 0; place < step.num_layers(); ++place) {
      const std::byte* scores = Host<std::byte>(step.score_offset) + place * layer_bytes;
      result.scores.push_back(step.dense(place) ? Bytes()
                                                : Bytes(scores, static_cast<size_t>(layer_bytes)));
    }
  }

  static std::vector<int32_t> PagesOf(const Step& step, const int32_t* tokens) {
    const int32_t page_size = step.sequence->spec().policy.page_size;
    std::vector<uint8_t> chosen(static_cast<size_t>(NumPages(step)));
    for (int64_t i = 0; i < step.layer_tokens(); ++i) {
      if (tokens[i] >= 0) chosen[static_cast<size_t>(tokens[i] / page_size)] = 1;
    }
    std::vector<int32_t> pages;
    for (size_t page = 0; page < chosen.size(); ++page) {
      if (chosen[page] != 0) pages.push_back(static_cast<int32_t>(page));
    }
    return pages;
  }

  absl::Status CollectRows(const Step& step, StepResult& result) {
    const auto* counts = Host<int32_t>(step.count_offset);
    for (int32_t place = 0; place < step.num_layers(); ++place) {
      if (step.dense(place)) continue;
      result.chosen_rows += step.layer_rows();
      for (int32_t head = 0; head < step.heads(); ++head) {
        result.moved_rows += counts[place * step.heads() + head];
      }
    }
    if (step.returns_held()) {
      result.held = {Host<std::byte>(step.held_offset),
                     static_cast<size_t>(step.num_layers() * step.layer_rows() * kIndexBytes)};
    }
    return step.gathers_inline() ? FetchRows(step, result) : absl::OkStatus();
  }

  absl::Status FetchRows(const Step& step, StepResult& result) {
    const SlotChanges changes = {.moved = Host<int32_t>(step.moved_offset),
                                 .counts = Host<int32_t>(step.count_offset),
                                 .held = Host<int32_t>(step.held_offset)};
    result.moved = RegularLayers(step.selection, changes);
    if (!step.all_rows_move) {  // else counted before the step
      int64_t rows = 0;
      for (const MovedLayer& layer : result.moved) rows += static_cast<int64_t>(layer.slots.size());
      absl::Status status = TakeAnswer(step, rows * step.row_bytes(), kInsteadOfRows);
      if (!status.ok()) return status;
    }
    const absl::Time start = absl::Now();
    absl::StatusOr<Buffer> memory =
        ReadRows(step.selection, changes, result.moved, backend_, stream_);
    device_time_ += absl::Now() - start;
    if (!memory.ok()) return memory.status();
    result_.memory.push_back(*std::move(memory));
    return absl::OkStatus();
  }

  static constexpr const char* kInsteadOfRows =
      "gather fewer layers a call or into regions, or read whole layers with Fetch";

  const RegionStore& regions_;
  int64_t left_bytes_;
  Backend& backend_;
  Stream& stream_;
  std::vector<Step> steps_;
  Parts queries_;
  Parts out_;
  Buffer queries_host_;
  Buffer queries_device_;
  Buffer host_;  // what came back
  absl::Duration device_time_;
  SelectResult result_;
};

}  // namespace

absl::StatusOr<SelectResult> RunSelect(std::span<const StepSpec> steps,
                                       std::span<const SessionUse> sessions,
                                       const RegionStore& regions, int64_t max_answer_bytes,
                                       Backend& backend, Stream& stream) {
  const SessionLocks locks(steps, sessions);
  Selection selection(regions, max_answer_bytes, backend, stream);
  absl::Status status = selection.Run(steps, sessions);
  if (!status.ok()) return status;
  return selection.Finish();
}

}  // namespace dynsplit

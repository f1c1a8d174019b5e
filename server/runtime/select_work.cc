// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/select_work.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/pipeline/errors.h"
#include "server/runtime/generation.h"
#include "server/runtime/host_finite.h"
#include "server/runtime/moved_rows.h"

namespace dynsplit {

// The locks of all sessions of a call: shared ones of the sequences, exclusive ones of the slots
// where rows are gathered. Whoever waits takes them in one order; whoever holds some only tries.
class SessionLocks {
 public:
  SessionLocks(std::span<const StepSpec> steps, std::span<const SessionUse> sessions) {
    for (size_t i = 0; i < steps.size(); ++i) {
      sessions_.push_back(sessions[i].get());
      if (steps[i].gather.has_value()) slots_.push_back(sessions[i].get());
    }
    std::sort(sessions_.begin(), sessions_.end(), std::less<>());
    std::sort(slots_.begin(), slots_.end(), std::less<>());
  }
  ~SessionLocks() { Unlock(); }
  SessionLocks(const SessionLocks&) = delete;
  SessionLocks& operator=(const SessionLocks&) = delete;

  void Lock() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    for (; num_slots_ < slots_.size(); ++num_slots_) slots_[num_slots_]->slots_mu.Lock();
    for (; num_sessions_ < sessions_.size(); ++num_sessions_) {
      sessions_[num_sessions_]->mu.ReaderLock();
    }
  }
  // All or none.
  bool TryLock() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    for (; num_slots_ < slots_.size(); ++num_slots_) {
      if (!slots_[num_slots_]->slots_mu.TryLock()) return Unlock();
    }
    for (; num_sessions_ < sessions_.size(); ++num_sessions_) {
      if (!sessions_[num_sessions_]->mu.ReaderTryLock()) return Unlock();
    }
    return true;
  }

 private:
  bool Unlock() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    for (; num_sessions_ > 0; --num_sessions_) sessions_[num_sessions_ - 1]->mu.ReaderUnlock();
    for (; num_slots_ > 0; --num_slots_) slots_[num_slots_ - 1]->slots_mu.Unlock();
    return false;
  }

  std::vector<Session*> sessions_;
  std::vector<Session*> slots_;
  size_t num_sessions_ = 0;  // locked
  size_t num_slots_ = 0;     // locked
};

struct SelectBatch::Call {
  SelectTask task;
  std::unique_ptr<SessionLocks> locks;
  SelectPlan plan;
  absl::Status status;
  std::vector<SelectionStep> selections;  // of the plan's steps, once they have places
  SelectResult result;
};

namespace {

constexpr auto kIndexBytes = static_cast<int64_t>(sizeof(int32_t));
constexpr auto kFloatBytes = static_cast<int64_t>(sizeof(float));

std::vector<int32_t> PagesOf(const PlannedStep& step, const int32_t* tokens) {
  const int32_t page_size = step.sequence->spec().policy.page_size;
  std::vector<uint8_t> chosen(static_cast<size_t>(step.num_pages()));
  for (int64_t i = 0; i < step.layer_tokens(); ++i) {
    if (tokens[i] >= 0) chosen[static_cast<size_t>(tokens[i] / page_size)] = 1;
  }
  std::vector<int32_t> pages;
  for (size_t page = 0; page < chosen.size(); ++page) {
    if (chosen[page] != 0) pages.push_back(static_cast<int32_t>(page));
  }
  return pages;
}

// Pages are made of tokens on the host; rows of dense layers hold none.
absl::Status CopyTokens(const PlannedStep& step, const Buffer& out, Backend& backend,
                        Stream& stream) {
  const int64_t layer_bytes = step.layer_tokens() * kIndexBytes;
  for (int32_t place = 0; place < step.num_layers(); ++place) {
    if (step.dense(place)) continue;
    absl::Status status =
        backend.Copy(out.data() + step.token_offset + place * layer_bytes,
                     step.token_place.data + place * layer_bytes, layer_bytes, stream);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

// Where the slots' changes lie in what came back.
SlotChanges ChangesOf(const PlannedStep& step, const std::byte* host) {
  const auto at = [&](int64_t offset) { return reinterpret_cast<const int32_t*>(host + offset); };
  return {.moved = at(step.moved_offset),
          .counts = at(step.count_offset),
          .held = at(step.held_offset)};
}

}  // namespace

SelectBatch::SelectBatch(Limits limits, const RegionStore& regions, Backend& backend,
                         Stream& stream)
    : limits_(limits),
      context_{.regions = regions, .backend = backend},
      backend_(backend),
      stream_(stream) {}

SelectBatch::~SelectBatch() = default;

// -- before any work ------------------------------------------------------------------------------

bool SelectBatch::Fits(const SelectPlan& plan, const SelectLayout& layout) const {
  if (calls_.empty()) return true;
  int64_t bytes = layout.queries.size_bytes() + layout.out.size_bytes() + score_bytes_;
  for (const PlannedStep& step : plan.steps) bytes += step.score_bytes();
  return num_layers_ + plan.num_layers <= limits_.max_layers && bytes <= limits_.max_bytes;
}

SelectBatch::Place SelectBatch::Add(SelectTask& task) {
  if (num_calls() >= limits_.max_calls) return Place::kFull;
  auto locks = std::make_unique<SessionLocks>(task.steps, task.sessions);
  if (!locks->TryLock()) return Place::kBusy;
  SelectLayout layout = layout_;
  absl::StatusOr<SelectPlan> plan =
      PlanSelect(task.steps, task.sessions, context_, *task.answer, layout);
  if (plan.ok() && !Fits(*plan, layout)) {
    task.answer->GiveBack(plan->taken_bytes);
    return Place::kFull;
  }
  layout_ = layout;
  Take(std::move(task), std::move(locks), std::move(plan));
  return Place::kTaken;
}

void SelectBatch::AddWaiting(SelectTask task) {
  auto locks = std::make_unique<SessionLocks>(task.steps, task.sessions);
  locks->Lock();
  absl::StatusOr<SelectPlan> plan =
      PlanSelect(task.steps, task.sessions, context_, *task.answer, layout_);
  Take(std::move(task), std::move(locks), std::move(plan));
}

void SelectBatch::Take(SelectTask task, std::unique_ptr<SessionLocks> locks,
                       absl::StatusOr<SelectPlan> plan) {
  auto call = std::make_unique<Call>();
  call->task = std::move(task);
  call->status = plan.status();
  if (plan.ok()) {
    call->plan = *std::move(plan);
    call->locks = std::move(locks);
    num_layers_ += call->plan.num_layers;
    for (const PlannedStep& step : call->plan.steps) score_bytes_ += step.score_bytes();
  }
  calls_.push_back(std::move(call));
}

std::vector<SelectBatch::Call*> SelectBatch::Alive() {
  std::vector<Call*> alive;
  for (const std::unique_ptr<Call>& call : calls_) {
    if (call->status.ok()) alive.push_back(call.get());
  }
  return alive;
}

void SelectBatch::FailAll(const absl::Status& status) {
  for (Call* call : Alive()) call->status = status;
}

// -- work -----------------------------------------------------------------------------------------

void SelectBatch::Run(absl::FunctionRef<void()> enqueued) {
  absl::Status status = StageQueries();
  if (status.ok()) {
    for (Call* call : Alive()) PrepareSlots(*call);
  }
  const absl::Time start = absl::Now();
  if (status.ok()) status = Launch();
  enqueued();
  // Also after a failure: nothing may be let go while the device still works on it.
  status.Update(stream_.Synchronize());
  absl::Duration device_time = absl::Now() - start;
  if (status.ok()) {
    CollectAll();
    const absl::Time rows_start = absl::Now();
    ReadRowsOfAll();
    device_time += absl::Now() - rows_start;
    for (Call* call : Alive()) Remember(*call);
  } else {
    FailAll(status);
  }
  for (const std::unique_ptr<Call>& call : calls_) {
    call->result.device_seconds = absl::ToDoubleSeconds(device_time);
    call->locks = nullptr;
  }
}

std::vector<SelectBatch::Answer> SelectBatch::TakeAnswers() {
  std::vector<Answer> answers;
  answers.reserve(calls_.size());
  for (const std::unique_ptr<Call>& call : calls_) {
    Answer& answer = answers.emplace_back(
        Answer{.task = std::move(call->task), .result = std::move(call->result)});
    if (!call->status.ok()) answer.result = call->status;
  }
  calls_.clear();
  return answers;
}

absl::Status SelectBatch::StageQueries() {
  if (layout_.queries.size_bytes() == 0) return absl::OkStatus();
  absl::StatusOr<Buffer> host = backend_.AllocateHost(layout_.queries.size_bytes());
  if (!host.ok()) return host.status();
  for (Call* call : Alive()) CheckQueries(*call, *host);
  queries_host_ = *std::move(host);
  return absl::OkStatus();
}

void SelectBatch::CheckQueries(Call& call, const Buffer& host) {
  for (const PlannedStep& step : call.plan.steps) {
    const StepSpec& spec = *step.spec;
    if (spec.query_region.has_value()) continue;
    std::byte* to = host.data() + step.query_offset;
    std::memcpy(to, spec.query_data.data(), spec.query_data.size());
    if (AllFinite(to, spec.query_dtype, step.query_bytes / DTypeBytes(spec.query_dtype))) continue;
    call.status = InvalidField(spec.field + ".query_data", "has a value that is not finite");
    return;
  }
}

void SelectBatch::PrepareSlots(Call& call) {
  for (const PlannedStep& step : call.plan.steps) {
    if (!step.gathers()) continue;
    Session& session = *step.session;
    session.slots_mu.AssertHeld();
    if (step.all_rows_move) {
      absl::StatusOr<RowSlots> empty =
          EmptySlots(*step.sequence, step.selection.first_layer, step.num_layers(), step.num_rows(),
                     backend_, stream_);
      if (!empty.ok()) {
        call.status = empty.status();
        return;
      }
      session.slots = *std::move(empty);
    }
    session.slots.generation = 0;  // until the step has come to its end
  }
}

absl::Status SelectBatch::Launch() {
  if (Alive().empty()) return absl::OkStatus();
  if (!queries_host_.empty()) {
    absl::StatusOr<Buffer> device = backend_.ToDevice(queries_host_, stream_);
    if (!device.ok()) return device.status();
    queries_device_ = *std::move(device);
  }
  if (layout_.out.size_bytes() > 0) {
    absl::StatusOr<Buffer> device = backend_.Allocate(layout_.out.size_bytes(), stream_);
    if (!device.ok()) return device.status();
    out_ = *std::move(device);
  }
  for (Call* call : Alive()) FillPlaces(*call);
  absl::Status status = SelectTokens();
  if (status.ok()) status = RefreshAll();
  if (status.ok()) status = ReadBack();
  return status;
}

void SelectBatch::FillPlaces(Call& call) {
  for (const PlannedStep& step : call.plan.steps) {
    SelectionStep& selection = call.selections.emplace_back(step.selection);
    selection.queries = step.spec->query_region.has_value()
                            ? step.query_place.data
                            : queries_device_.data() + step.query_offset;
    selection.tokens = reinterpret_cast<int32_t*>(step.spec->token_region.has_value()
                                                      ? step.token_place.data
                                                      : out_.data() + step.token_offset);
    if (step.spec->with_scores) {
      selection.block_scores = reinterpret_cast<float*>(out_.data() + step.score_offset);
    }
  }
}

absl::Status SelectBatch::SelectTokensOf(std::span<Call* const> calls) {
  std::vector<SelectionStep> selections;
  for (const Call* call : calls) {
    selections.insert(selections.end(), call->selections.begin(), call->selections.end());
  }
  return SelectSteps(selections, backend_, stream_);
}

absl::Status SelectBatch::SelectTokens() {
  const std::vector<Call*> calls = Alive();
  absl::Status status = SelectTokensOf(calls);
  if (status.ok() || calls.size() == 1 || !backend_.Healthy().ok()) return status;
  // What is too much for one, or not done for one, must not be the others' trouble.
  for (Call* call : calls) call->status = SelectTokensOf({&call, 1});
  return absl::OkStatus();
}

absl::Status SelectBatch::RefreshAll() {
  std::vector<SlotRefresh> refreshes;
  for (Call* call : Alive()) {
    for (size_t i = 0; i < call->plan.steps.size(); ++i) {
      const PlannedStep& step = call->plan.steps[i];
      if (!step.gathers()) continue;
      Session& session = *step.session;
      session.slots_mu.AssertHeld();
      refreshes.push_back(
          {.step = &call->selections[i],
           .slots = &session.slots,
           .rows = {.keys = step.key_place.data,
                    .values = step.value_place.data,
                    .key_scales = reinterpret_cast<float*>(step.key_scale_place.data),
                    .value_scales = reinterpret_cast<float*>(step.value_scale_place.data)},
           .moved_slots = step.gathers_inline()
                              ? reinterpret_cast<int32_t*>(out_.data() + step.moved_offset)
                              : nullptr,
           .num_moved = reinterpret_cast<int32_t*>(out_.data() + step.count_offset)});
    }
  }
  absl::Status status = RefreshSlots(refreshes, backend_, stream_);
  if (status.ok() || !backend_.Healthy().ok()) return status;
  // Nobody knows which slots have changed: those calls fail, and their rows are forgotten.
  for (Call* call : Alive()) {
    const auto gathers = [](const PlannedStep& step) { return step.gathers(); };
    if (std::any_of(call->plan.steps.begin(), call->plan.steps.end(), gathers)) {
      call->status = status;
    }
  }
  return absl::OkStatus();
}

absl::Status SelectBatch::CopyBack(const PlannedStep& step) {
  absl::Status status;
  if (step.gathers()) {
    Session& session = *step.session;
    session.slots_mu.AssertHeld();
    const Buffer& held = session.slots.held;
    if (step.gathers_inline() || step.returns_held()) {
      status =
          backend_.Copy(out_.data() + step.held_offset, held.data(), held.size_bytes(), stream_);
    }
    if (status.ok() && !step.returns_held()) {
      status = backend_.Copy(step.held_place.data, held.data(), held.size_bytes(), stream_);
    }
  }
  if (status.ok() && step.spec->token_region.has_value() && step.spec->with_pages) {
    status = CopyTokens(step, out_, backend_, stream_);
  }
  return status;
}

absl::Status SelectBatch::ReadBack() {
  for (Call* call : Alive()) {
    for (const PlannedStep& step : call->plan.steps) {
      if (absl::Status status = CopyBack(step); !status.ok()) return status;
    }
  }
  if (out_.empty()) return absl::OkStatus();
  absl::StatusOr<Buffer> host = backend_.ToHost(std::move(out_), stream_);
  if (!host.ok()) return host.status();
  host_ = std::make_shared<const Buffer>(*std::move(host));
  return absl::OkStatus();
}

// -- answer ---------------------------------------------------------------------------------------

void SelectBatch::CollectAll() {
  for (Call* call : Alive()) {
    call->result.steps.resize(call->plan.steps.size());
    for (size_t i = 0; i < call->plan.steps.size(); ++i) {
      const PlannedStep& step = call->plan.steps[i];
      Collect(step, call->result.steps[i]);
      if (step.gathers()) CollectChanges(*call, step, call->result.steps[i]);
    }
    if (host_ != nullptr) call->result.memory.push_back(host_);
  }
}

void SelectBatch::Collect(const PlannedStep& step, StepResult& result) const {
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

void SelectBatch::CollectChanges(Call& call, const PlannedStep& step, StepResult& result) {
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
  if (!step.gathers_inline()) return;
  result.moved = RegularLayers(step.selection, ChangesOf(step, host_->data()));
  if (step.all_rows_move || !call.status.ok()) return;  // counted before the step
  int64_t rows = 0;
  for (const MovedLayer& layer : result.moved) rows += static_cast<int64_t>(layer.slots.size());
  call.status =
      call.plan.TakeAnswer(step, rows * step.row_bytes(), kInsteadOfRows, *call.task.answer);
}

void SelectBatch::ReadRowsOfAll() {
  std::vector<Call*> calls;
  std::vector<RowsToRead> wanted;
  for (Call* call : Alive()) {
    const size_t before = wanted.size();
    for (size_t i = 0; i < call->plan.steps.size(); ++i) {
      const PlannedStep& step = call->plan.steps[i];
      if (!step.gathers_inline()) continue;
      wanted.push_back({.step = &step.selection,
                        .changes = ChangesOf(step, host_->data()),
                        .layers = &call->result.steps[i].moved});
    }
    if (wanted.size() > before) calls.push_back(call);
  }
  if (wanted.empty()) return;
  absl::StatusOr<Buffer> rows = ReadRows(wanted, backend_, stream_);
  if (!rows.ok()) {
    if (!backend_.Healthy().ok()) return FailAll(rows.status());
    for (Call* call : calls) call->status = rows.status();
    return;
  }
  const auto memory = std::make_shared<const Buffer>(*std::move(rows));
  for (Call* call : calls) call->result.memory.push_back(memory);
}

// All steps or none: a caller that gets no answer knows no generation.
void SelectBatch::Remember(Call& call) {
  for (size_t i = 0; i < call.plan.steps.size(); ++i) {
    const PlannedStep& step = call.plan.steps[i];
    if (!step.gathers()) continue;
    Session& session = *step.session;
    session.slots_mu.AssertHeld();
    session.slots.generation = RandomGeneration();
    call.result.steps[i].generation = session.slots.generation;
  }
}

}  // namespace dynsplit

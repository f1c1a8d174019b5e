// SPDX-License-Identifier: Apache-2.0
//
// The jobs of a request that keeps, extends or reads a session.
#include "server/runtime/session_work.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/pipeline/errors.h"
#include "server/runtime/request.h"

namespace dynsplit {
namespace {

absl::Status Abandoned() { return absl::CancelledError("the request has ended"); }

}  // namespace

SessionSnapshot Snapshot(Session& session, const SessionStore& store) {
  SessionSnapshot snapshot;
  snapshot.id = session.id();
  snapshot.settings = session.settings();
  snapshot.spec = session.spec();
  snapshot.state = store.StateOf(session);
  {
    absl::MutexLock lock(&session.slots_mu);
    snapshot.reuse_bytes = session.slots.held.size_bytes();
  }
  absl::ReaderMutexLock lock(&session.mu);
  const ResidentSequence& sequence = *session.sequence;
  snapshot.spec.shape.num_tokens = sequence.num_tokens();
  snapshot.num_blocks = sequence.segmentation().num_blocks();
  snapshot.open_block_begin = sequence.segmentation().open_begin;
  snapshot.residence = sequence.residence();
  snapshot.layout = sequence.layout();
  snapshot.device_bytes = sequence.device_bytes() + snapshot.reuse_bytes;
  snapshot.host_bytes = sequence.host_bytes();
  snapshot.num_demotions = session.num_demotions;
  snapshot.num_restorations = session.num_restorations;
  return snapshot;
}

Policy FetchPolicy(const Policy& resident, const Policy& output) {
  Policy policy = resident;
  policy.transform = Transform::kEvict;  // pages only: the index stays where it is, with what
  policy.scoring.refinement_factor = 0;  // refines its choices
  policy.budget = {.target = BudgetPolicy::Target::kRatio, .kept_ratio = 1};
  policy.encoding = output.encoding;
  policy.positions = output.positions;
  policy.page_size = output.page_size;
  return policy;
}

// -- growing --------------------------------------------------------------------------------------

absl::Status Request::PrepareStore(Backend& /*backend*/, Stream& stream) {
  if (spec_.opened != nullptr) {
    absl::Status status = spec_.store->Materialize(*stored_, stream);
    if (!status.ok()) return status;
  }
  Segmentation segmentation;
  {
    absl::MutexLock lock(&stored_->mu);
    absl::Status status = BeginStore(*stored_->sequence, stream);
    if (!status.ok()) return status;
    segmentation = stored_->sequence->pending_segmentation();
  }
  if (returns_layers()) return absl::OkStatus();
  absl::MutexLock lock(&mu_);
  AnnounceSequence(segmentation);
  return absl::OkStatus();
}

absl::Status Request::BeginStore(ResidentSequence& sequence, Stream& stream) {
  if (abandoned_) return Abandoned();
  const auto token_ids =
      HostValues<int32_t>(spec_.tensors, sequence_plan_, sequence_stage_, TensorKind::kTokenIds);
  return sequence.Begin(token_ids, spec_.sequence.shape.num_tokens, stream);
}

absl::Status Request::StoreLayer(const LayerTensors& tensors, LayerPass& pass) {
  {
    absl::ReaderMutexLock lock(&stored_->mu);
    if (abandoned_) return Abandoned();
    absl::Status status = stored_->sequence->StoreLayer(tensors, pass.stream());
    // While the rows cannot move, and before the layer counts as stored.
    status.Update(FinishPass(pass));
    if (!status.ok()) return status;
  }
  absl::MutexLock lock(&mu_);
  ++num_stored_;
  return absl::OkStatus();
}

absl::Status Request::CommitStore(Stream& stream) {
  {
    absl::MutexLock lock(&stored_->mu);
    if (abandoned_) return Abandoned();
    absl::Status status = stored_->sequence->Commit(stream);
    if (!status.ok()) return status;
  }
  EndStore();
  return absl::OkStatus();
}

absl::Status Request::StoreTogether(Backend& backend, Stream& stream) {
  const absl::Time start = absl::Now();
  absl::Status status = StageSequence(backend, stream);
  if (status.ok()) status = CheckTogetherFinite(backend, stream);
  if (status.ok() && spec_.opened != nullptr) {
    status = spec_.store->Materialize(*stored_, stream);
  }
  if (status.ok()) {
    Segmentation segmentation;
    {
      absl::MutexLock lock(&stored_->mu);
      ResidentSequence& sequence = *stored_->sequence;
      status = BeginStore(sequence, stream);
      for (const int32_t layer : wanted_) {
        if (!status.ok()) break;
        status = sequence.StoreLayer(
            LayerViews(spec_, layer, sequence_plan_, sequence_stage_, block_table_), stream);
      }
      if (status.ok()) status = sequence.Commit(stream);
      if (status.ok()) segmentation = sequence.segmentation();
    }
    if (status.ok()) {
      absl::MutexLock lock(&mu_);
      num_stored_ = wanted_.size();
      end_.seconds.split = absl::ToDoubleSeconds(absl::Now() - start);
      AnnounceSequence(segmentation);
    }
  }
  // The stage goes with the request: the device must be done with it, also after an error.
  if (!status.ok()) {
    status.Update(stream.Synchronize());
    return status;
  }
  EndStore();
  return absl::OkStatus();
}

absl::Status Request::CheckTogetherFinite(Backend& backend, Stream& stream) {
  absl::Status status = CheckStageFinite(spec_, sequence_plan_, sequence_stage_);
  if (!absl::IsUnimplemented(status)) return status;
  std::vector<LayerTensors> layers;
  for (const int32_t layer : wanted_) {
    layers.push_back(LayerViews(spec_, layer, sequence_plan_, sequence_stage_, block_table_));
  }
  return CheckLayersFinite(layers, backend, stream);
}

void Request::EndStore() {
  SessionUse appending;  // ends outside the lock, before anyone is told
  absl::MutexLock lock(&mu_);
  committed_ = true;
  appending = std::move(appending_);
}

void Request::AbandonStore() {
  if (stored_ == nullptr) return;
  SessionUse appending;
  {
    absl::MutexLock lock(&mu_);
    if (committed_) return;
    appending = std::move(appending_);
  }
  // What is being opened goes with its last pointer.
  if (!appending) return;
  absl::MutexLock lock(&stored_->mu);
  abandoned_ = true;
  if (stored_->sequence->growing()) stored_->sequence->Abort();
}

// -- reading --------------------------------------------------------------------------------------

absl::StatusOr<LayerDecision> Request::FetchDecision(int32_t layer, const Stage& stage,
                                                     Backend& backend, Stream& stream) {
  const StagePlan plan = PlanStage(spec_.tensors, layer);
  if (plan.tensors.empty()) return KeepAll(*context_, layer, backend, stream);
  absl::Status status = FillStage(spec_, plan, stage, backend, stream);
  if (!status.ok()) return status;
  const auto kept = HostValues<int32_t>(spec_.tensors, plan, stage, TensorKind::kKeptTokens);
  const RequestTensor& tensor = spec_.tensors[plan.tensors.front()];
  const int32_t groups =
      spec_.sequence.policy.scope == Scope::kLayerHead ? spec_.sequence.shape.num_kv_heads : 1;
  LayerPlan chosen = {.layer = layer,
                      .groups = groups,
                      .num_kept = static_cast<int64_t>(kept.size()) / groups,
                      .dense = false,
                      .raised_by_protection = false,
                      .raised_by_quality_floor = false,
                      .kept = {kept.begin(), kept.end()}};
  for (int32_t group = 0; group < groups; ++group) {
    int64_t previous = -1;
    for (int64_t slot = 0; slot < chosen.num_kept; ++slot) {
      const int64_t token = chosen.kept[static_cast<size_t>(group * chosen.num_kept + slot)];
      if (token > previous && token < spec_.sequence.shape.num_tokens) {
        previous = token;
        continue;
      }
      return InvalidField(
          tensor.field,
          absl::StrCat("KEPT_TOKENS value ", slot, " of group ", group, " is ", token,
                       "; must ascend within [0, ", spec_.sequence.shape.num_tokens, ")"));
    }
  }
  return FromPlan(std::move(chosen), backend, stream);
}

absl::StatusOr<ComputedLayer> Request::FetchOne(int32_t layer, const Stage& stage, LayerPass& pass,
                                                Backend& backend) {
  Stream& stream = pass.stream();
  absl::StatusOr<LayerDecision> decision = FetchDecision(layer, stage, backend, stream);
  if (!decision.ok()) return decision.status();
  if (spec_.fetch_resume.has_value() && layer < spec_.fetch_resume->layer) {
    if (absl::Status status = stream.Synchronize(); !status.ok()) return status;
    ComputedLayer output;
    output.skipped = true;
    output.plan = std::make_shared<const LayerPlan>(std::move(decision->plan));
    output.hash = output.plan->Hash();
    return output;
  }
  Session& session = *spec_.session.get();
  // Appends change nothing below the length this request began with; moving changes the place.
  absl::ReaderMutexLock lock(&session.mu);
  LayerTensors tensors;
  tensors.layer = layer;
  tensors.keys = session.sequence->Keys(layer, spec_.sequence.shape.num_tokens);
  tensors.values = session.sequence->Values(layer, spec_.sequence.shape.num_tokens);
  tensors.page_memory = page_memory();
  // Has waited for the device when it returns, also after a failure.
  return FinishLayer(*std::move(decision), tensors, pass, backend);
}

// Bits that were lost when the sequence was stored are not known to the policy of the pages.
void Request::AddRestingSalt(EndOutput& end) const {
  const Policy& resident = spec_.session.get()->spec().policy;
  if (resident.encoding.key == EncodingPolicy::Format::kAsIs &&
      resident.encoding.value == EncodingPolicy::Format::kAsIs) {
    return;
  }
  absl::StrAppend(&end.representation_salt, end.representation_salt.empty() ? "" : "-",
                  RepresentationSalt(resident, end.plan_hash, /*lossless=*/false));
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// The jobs of a request: what runs on the executor's threads.
#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/pipeline/errors.h"
#include "server/runtime/output_need.h"
#include "server/runtime/request.h"

namespace dynsplit {
namespace {

double SecondsSince(absl::Time start) { return absl::ToDoubleSeconds(absl::Now() - start); }

std::string HexOrNone(std::string_view hex) { return hex.empty() ? "none" : std::string(hex); }

}  // namespace

absl::Status Request::Prepare(Backend& backend, Stream& stream) {
  const absl::Time start = absl::Now();
  absl::Status status = StageSequence(backend, stream);
  if (status.ok() && stores()) status = PrepareStore(backend, stream);
  if (status.ok() && returns_layers()) status = PrepareContexts(backend, stream);
  if (status.ok() && spec_.method == Method::kCalibrate) status = PrepareCalibration();
  status.Update(stream.Synchronize());
  if (!status.ok()) return status;

  absl::MutexLock lock(&mu_);
  if (spec_.method == Method::kCompress || spec_.method == Method::kPlan) {
    AnnounceSequence(context_->segmentation);
  }
  end_.seconds.split = SecondsSince(start);
  phase_ = Phase::kReady;
  Launch();
  return absl::OkStatus();
}

absl::Status Request::StageSequence(Backend& backend, Stream& stream) {
  absl::Status status = FillStage(spec_, sequence_plan_, sequence_stage_, backend, stream);
  if (status.ok()) status = CheckStageValues(spec_, sequence_plan_, sequence_stage_);
  if (status.ok()) status = StageToDevice(spec_, sequence_plan_, sequence_stage_, backend, stream);
  if (!status.ok()) return status;
  for (size_t i = 0; i < sequence_plan_.tensors.size(); ++i) {
    if (spec_.tensors[sequence_plan_.tensors[i]].kind != TensorKind::kBlockTable) continue;
    block_table_ = reinterpret_cast<const int32_t*>(sequence_stage_.device.data() +
                                                    sequence_plan_.offset_bytes[i]);
  }
  return absl::OkStatus();
}

void Request::AnnounceSequence(const Segmentation& segmentation) {
  SequenceOutput output;
  output.num_blocks = segmentation.num_blocks();
  output.open_block_begin = segmentation.open_begin;
  output.tensors.push_back(
      Int32Output(TensorKind::kBlockStarts, {output.num_blocks + 1}, segmentation.starts));
  sequence_output_ = std::move(output);
}

absl::Status Request::PrepareCalibration() {
  const auto token_ids =
      HostValues<int32_t>(spec_.tensors, sequence_plan_, sequence_stage_, TensorKind::kTokenIds);
  const auto positions = HostValues<int32_t>(spec_.tensors, sequence_plan_, sequence_stage_,
                                             TensorKind::kQueryPositions);
  absl::StatusOr<Calibrator> calibrator =
      Calibrator::Create(spec_.calibration, *spec_.profile, token_ids, positions);
  if (!calibrator.ok()) return calibrator.status();
  calibrator_ = *std::move(calibrator);
  return absl::OkStatus();
}

absl::Status Request::PrepareContexts(Backend& backend, Stream& stream) {
  const auto token_ids =
      HostValues<int32_t>(spec_.tensors, sequence_plan_, sequence_stage_, TensorKind::kTokenIds);
  absl::StatusOr<std::unique_ptr<SequenceContext>> context;
  if (spec_.method == Method::kFetch) {
    context = PrepareSequence(spec_.sequence, spec_.segmentation, backend, stream);
  } else if (spec_.method == Method::kApply) {
    Plan plan = *spec_.plan;
    const auto starts = HostValues<int32_t>(spec_.tensors, sequence_plan_, sequence_stage_,
                                            TensorKind::kBlockStarts);
    plan.segmentation.starts.assign(starts.begin(), starts.end());
    plan.segmentation.open_begin = static_cast<int32_t>(plan.shape.num_tokens);
    plan.layers.clear();  // each is checked when its tokens are here
    if (absl::Status status = ValidatePlan(plan); !status.ok()) return status;
    context = PrepareSequence(spec_.sequence, std::move(plan.segmentation), backend, stream);
  } else {
    context = PrepareSequence(spec_.sequence, token_ids, spec_.profile.get(), backend, stream);
  }
  if (!context.ok()) return context.status();
  context_ = *std::move(context);
  plan_hasher_.emplace(context_->spec.shape, context_->spec.policy, context_->segmentation);
  if (spec_.shadow) {
    absl::StatusOr<std::unique_ptr<SequenceContext>> originals =
        PrepareSequence(OriginalsSpec(spec_.sequence), context_->segmentation, backend, stream);
    if (!originals.ok()) return originals.status();
    shadow_context_ = *std::move(originals);
  }
  return absl::OkStatus();
}

absl::Status Request::RunLayer(int32_t layer, Stage stage, Backend& backend, Stream& stream) {
  absl::Status status = ComputeLayer(layer, stage, backend, stream);
  // The stage goes when this returns: the device must be done with it, also after an error.
  status.Update(stream.Synchronize());
  if (status.ok() && !returns_layers() && stores()) {
    stage = {};
    Uncount();
  }
  if (!status.ok() || !ordered()) return status;
  {
    absl::MutexLock lock(&mu_);
    if (stopped()) return absl::OkStatus();
    ++num_scored_;
    ordered_job_runs_ = false;
    if (global()) layers_[static_cast<size_t>(layer)].stage = std::move(stage);
    Launch();
  }
  if (spec_.method == Method::kCalibrate) {
    stage = {};
    Uncount();
  }
  return absl::OkStatus();
}

absl::StatusOr<LayerTensors> Request::StageLayer(int32_t layer, Stage& stage, Backend& backend,
                                                 Stream& stream) {
  const absl::Time start = absl::Now();
  const StagePlan plan = PlanStage(spec_.tensors, layer);
  absl::Status status = FillStage(spec_, plan, stage, backend, stream);
  if (status.ok()) status = CheckStageValues(spec_, plan, stage);
  if (status.ok()) status = StageToDevice(spec_, plan, stage, backend, stream);
  if (status.ok()) status = stream.Synchronize();
  if (!status.ok()) return status;
  LayerTensors tensors = LayerViews(spec_, layer, plan, stage, block_table_);
  tensors.page_memory = page_memory();
  {
    absl::MutexLock lock(&mu_);
    end_.seconds.host_to_device += SecondsSince(start);
  }
  status = CheckLayerFinite(tensors, backend, stream);
  if (!status.ok()) return status;
  return tensors;
}

absl::Status Request::ComputeLayer(int32_t layer, Stage& stage, Backend& backend, Stream& stream) {
  if (spec_.method == Method::kFetch) {
    absl::StatusOr<ComputedLayer> output = FetchOne(layer, stage, backend, stream);
    if (!output.ok()) return output.status();
    absl::MutexLock lock(&mu_);
    if (!stopped()) outputs_.emplace(layer, *std::move(output));
    return absl::OkStatus();
  }
  absl::StatusOr<LayerTensors> tensors = StageLayer(layer, stage, backend, stream);
  if (!tensors.ok()) return tensors.status();
  if (stores()) {
    absl::Status status = StoreLayer(*tensors, stream);
    if (!status.ok() || !returns_layers()) return status;
  }
  if (spec_.method == Method::kCalibrate) {
    return calibrator_->AddLayer(tensors->keys, tensors->queries,
                                 1 / std::sqrt(static_cast<float>(spec_.sequence.shape.head_dim)),
                                 backend, stream);
  }
  if (global()) {
    {
      absl::MutexLock lock(&mu_);
      layers_[static_cast<size_t>(layer)].tensors = *tensors;
    }
    if (KeepsAll(layer)) return absl::OkStatus();
    const absl::Time score_start = absl::Now();
    absl::StatusOr<LayerScores> scores = ScoreLayer(*context_, *tensors, backend, stream);
    if (!scores.ok()) return scores.status();
    absl::Status status =
        AccumulateScores(*context_, *std::move(scores), global_scores_, backend, stream);
    absl::MutexLock lock(&mu_);
    end_.seconds.layers.score += SecondsSince(score_start);
    return status;
  }
  absl::StatusOr<ComputedLayer> output = spec_.method == Method::kApply
                                             ? ApplyOne(stage, *tensors, backend, stream)
                                             : CompressOne(*tensors, backend, stream);
  if (!output.ok()) return output.status();
  absl::MutexLock lock(&mu_);
  if (!stopped()) outputs_.emplace(layer, *std::move(output));
  return absl::OkStatus();
}

absl::StatusOr<ComputedLayer> Request::CompressOne(const LayerTensors& tensors, Backend& backend,
                                                   Stream& stream) {
  absl::StatusOr<LayerResult> result = CompressLayer(
      *context_, tensors, /*with_pages=*/spec_.method == Method::kCompress, backend, stream);
  if (!result.ok()) return result.status();
  return Collect(*std::move(result), tensors, backend, stream);
}

absl::StatusOr<ComputedLayer> Request::ApplyOne(const Stage& stage, const LayerTensors& tensors,
                                                Backend& backend, Stream& stream) {
  absl::StatusOr<LayerPlan> plan = ReceivedPlan(tensors.layer, stage);
  if (!plan.ok()) return plan.status();
  absl::StatusOr<LayerDecision> decision = FromPlan(*std::move(plan), backend, stream);
  if (!decision.ok()) return decision.status();
  return FinishLayer(*std::move(decision), tensors, backend, stream);
}

absl::StatusOr<LayerPlan> Request::ReceivedPlan(int32_t layer, const Stage& stage) const {
  const auto index = static_cast<size_t>(layer);
  LayerPlan layer_plan = spec_.plan->layers[index];
  const auto kept = HostValues<int32_t>(spec_.tensors, PlanStage(spec_.tensors, layer), stage,
                                        TensorKind::kKeptTokens);
  layer_plan.kept.assign(kept.begin(), kept.end());
  Plan plan = {.shape = context_->spec.shape,
               .policy = context_->spec.policy,
               .policy_version = spec_.plan->policy_version,
               .evidence = spec_.plan->evidence,
               .segmentation = context_->segmentation,
               .layers = {std::move(layer_plan)},
               .fallback_preset = spec_.plan->fallback_preset};
  if (absl::Status status = ValidatePlan(plan); !status.ok()) return status;
  const std::string hash = ToHex(plan.layers.front().Hash());
  if (hash != spec_.layer_hashes[index]) {
    return PreconditionFailed("PLAN_MISMATCH", absl::StrCat("plan.layers[", layer, "].hash"),
                              absl::StrCat("is ", HexOrNone(spec_.layer_hashes[index]),
                                           "; the tensors received make ", hash));
  }
  return std::move(plan.layers.front());
}

absl::StatusOr<ComputedLayer> Request::FinishLayer(LayerDecision decision,
                                                   const LayerTensors& tensors, Backend& backend,
                                                   Stream& stream) {
  LayerResult result;
  result.decision = std::move(decision);
  if (spec_.method != Method::kPlan) {
    const absl::Time start = absl::Now();
    absl::StatusOr<LayerPages> pages =
        ApplyLayer(*context_, result.decision, tensors, backend, stream);
    if (!pages.ok()) return pages.status();
    result.pages = *std::move(pages);
    if (absl::Status status = stream.Synchronize(); !status.ok()) return status;
    result.seconds.gather = SecondsSince(start);
  }
  if (spec_.sequence.with_receipt) {
    const absl::Time start = absl::Now();
    absl::StatusOr<LayerReceipt> receipt =
        MeasureLayer(*context_, result.decision, result.pages, tensors, backend, stream);
    if (!receipt.ok()) return receipt.status();
    result.receipt = *receipt;
    result.seconds.receipt = SecondsSince(start);
  }
  return Collect(std::move(result), tensors, backend, stream);
}

absl::StatusOr<ComputedLayer> Request::Collect(LayerResult result, const LayerTensors& tensors,
                                               Backend& backend, Stream& stream) {
  const int32_t layer = result.decision.plan.layer;
  const SequenceContext* context = context_.get();
  int64_t shadow_bytes = 0;
  if (spec_.shadow) {
    shadow_bytes = LayerOutputBytes(context_->spec, result.pages.num_kept,
                                    context_->segmentation.num_blocks());
    context = shadow_context_.get();
    absl::StatusOr<LayerDecision> everything = KeepAll(*context, layer, backend, stream);
    if (!everything.ok()) return everything.status();
    absl::StatusOr<LayerPages> originals =
        ApplyLayer(*context, *everything, tensors, backend, stream);
    if (!originals.ok()) return originals.status();
    result.decision = *std::move(everything);
    result.pages = *std::move(originals);
  }
  const LayerSeconds seconds = result.seconds;
  LayerReceipt receipt = result.receipt;
  const absl::Time start = absl::Now();
  absl::StatusOr<ComputedLayer> output =
      CollectLayer(*context, std::move(result), spec_.output.get(), backend, stream);
  if (!output.ok()) return output.status();
  output->device_to_host_seconds = SecondsSince(start);
  output->seconds = seconds;
  output->shadow_bytes = shadow_bytes;
  if (spec_.sequence.with_receipt) {
    receipt.layer = layer;
    output->receipt = receipt;
  }
  return output;
}

bool Request::KeepsAll(int32_t layer) const {
  const Policy& policy = context_->spec.policy;
  return policy.transform == Transform::kIndex ||
         std::binary_search(policy.protection.dense_layers.begin(),
                            policy.protection.dense_layers.end(), layer);
}

// A quality floor with Scope::kGlobal is refused by ValidatePolicy: one decision is all there is.
absl::Status Request::DecideGlobal(Backend& backend, Stream& stream) {
  const absl::Time start = absl::Now();
  int32_t first = 0;
  while (first < spec_.sequence.shape.num_layers && KeepsAll(first)) ++first;
  if (first < spec_.sequence.shape.num_layers) {
    absl::StatusOr<LayerDecision> decision =
        PlanLayer(*context_, global_scores_, first, /*min_num_kept=*/0, backend, stream);
    if (!decision.ok()) return decision.status();
    if (absl::Status status = stream.Synchronize(); !status.ok()) return status;
    global_plan_ = std::move(decision->plan);
    global_scores_ = {};
  }
  absl::MutexLock lock(&mu_);
  end_.seconds.layers.select += SecondsSince(start);
  if (stopped()) return absl::OkStatus();
  decided_ = true;
  for (int32_t layer = 0; layer < spec_.sequence.shape.num_layers; ++layer) {
    LayerState& state = layers_[static_cast<size_t>(layer)];
    Submit([layer, stage = std::exchange(state.stage, {}), tensors = state.tensors](
               Request& self, Backend& job_backend, Stream& job_stream) mutable {
      return self.ApplyGlobal(layer, std::move(stage), tensors, job_backend, job_stream);
    });
  }
  return absl::OkStatus();
}

absl::Status Request::ApplyGlobal(int32_t layer, Stage stage, const LayerTensors& tensors,
                                  Backend& backend, Stream& stream) {
  const auto apply = [&]() -> absl::StatusOr<ComputedLayer> {
    if (KeepsAll(layer)) {
      absl::StatusOr<LayerDecision> decision = KeepAll(*context_, layer, backend, stream);
      if (!decision.ok()) return decision.status();
      return FinishLayer(*std::move(decision), tensors, backend, stream);
    }
    LayerPlan plan = global_plan_;
    plan.layer = layer;
    absl::StatusOr<LayerDecision> decision = FromPlan(std::move(plan), backend, stream);
    if (!decision.ok()) return decision.status();
    return FinishLayer(*std::move(decision), tensors, backend, stream);
  };
  absl::StatusOr<ComputedLayer> output = apply();
  absl::Status status = output.status();
  status.Update(stream.Synchronize());
  stage = {};
  if (!status.ok()) return status;
  absl::MutexLock lock(&mu_);
  if (!stopped()) outputs_.emplace(layer, *std::move(output));
  return absl::OkStatus();
}

absl::StatusOr<EndOutput> Request::MakeEnd(EndOutput end) {
  if (spec_.method == Method::kCalibrate) {
    absl::StatusOr<DelimiterProfile> profile = calibrator_->Finish(spec_.profile->name());
    if (!profile.ok()) return profile.status();
    end.profile = *std::move(profile);
    return end;
  }
  end.opened = spec_.opened;
  if (spec_.session) end.session = Snapshot(*spec_.session.get(), *spec_.store);
  if (!returns_layers()) {
    end.stored_shape = spec_.sequence.shape;
    return end;
  }
  const SequenceSpec& sequence = context_->spec;
  end.plan.shape = sequence.shape;
  end.plan.policy = sequence.policy;
  end.plan.evidence = spec_.plan.has_value() ? spec_.plan->evidence : UsedEvidence(sequence);
  end.plan.segmentation = context_->segmentation;
  end.plan.fallback_preset = sequence.fallback_preset;
  end.plan_hash = plan_hasher_->Finish();
  end.num_queries = sequence.supply.num_window_queries;
  if (spec_.method == Method::kApply && ToHex(end.plan_hash) != spec_.plan_hash) {
    return PreconditionFailed(
        "PLAN_MISMATCH", "plan.hash",
        absl::StrCat("is ", HexOrNone(spec_.plan_hash), "; the plan and tensors received make ",
                     ToHex(end.plan_hash)));
  }
  const bool all_kept = std::all_of(
      end.plan.layers.begin(), end.plan.layers.end(),
      [&](const LayerPlan& layer) { return layer.num_kept == sequence.shape.num_tokens; });
  const bool bits_kept = sequence.policy.encoding.key == EncodingPolicy::Format::kAsIs &&
                         sequence.policy.encoding.value == EncodingPolicy::Format::kAsIs &&
                         sequence.policy.positions == Positions::kOriginal;
  const bool lossless = spec_.shadow || (all_kept && bits_kept);
  end.representation_salt = RepresentationSalt(sequence.policy, end.plan_hash, lossless);
  if (spec_.method == Method::kFetch) AddRestingSalt(end);
  return end;
}

}  // namespace dynsplit

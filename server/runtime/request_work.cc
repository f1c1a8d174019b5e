// SPDX-License-Identifier: Apache-2.0
//
// The jobs of a request: what runs on the executor's threads.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/pipeline/errors.h"
#include "server/runtime/output_need.h"
#include "server/runtime/request.h"
#include "server/runtime/trace.h"

namespace dynsplit {
namespace {

double SecondsSince(absl::Time start) { return absl::ToDoubleSeconds(absl::Now() - start); }

std::string HexOrNone(std::string_view hex) { return hex.empty() ? "none" : std::string(hex); }

}  // namespace

absl::Status Request::Prepare(Backend& backend, Stream& stream) {
  const absl::Time start = absl::Now();
  const auto traced_from = Stream::Clock::now();
  absl::Status status = StageSequence(backend, stream);
  if (status.ok() && stores()) status = PrepareStore(backend, stream);
  if (status.ok() && returns_layers()) status = PrepareContexts(backend, stream);
  if (status.ok() && spec_.method == Method::kCalibrate) status = PrepareCalibration();
  status.Update(stream.Synchronize());
  if (!status.ok()) return status;
  if (Tracing()) {
    const TraceSpan span = {"prepare", traced_from, Stream::Clock::now()};
    Trace(spec_.request_id, /*layer=*/-1, {&span, 1});
  }

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
  LayerPass pass(layer, stream);
  absl::Status status = ComputeLayer(layer, stage, pass, backend);
  // The stage goes when this returns: the device must be done with it, also after an error.
  if (!status.ok()) status = ReasonOf(std::move(status), pass);
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

absl::Status Request::ReasonOf(absl::Status status, LayerPass& pass) {
  const absl::Status done = pass.stream().Synchronize();
  // What came of values that are not finite is no error of its own.
  if (done.ok()) {
    if (absl::Status verdict = pass.finite.Verdict(); !verdict.ok()) return verdict;
  }
  status.Update(done);
  return status;
}

void Request::Account(LayerPass& pass) {
  const std::vector<StageSpan> spans = pass.timer.Take();
  if (Tracing()) {
    std::vector<TraceSpan> traced;
    traced.reserve(spans.size());
    for (const StageSpan& span : spans) {
      traced.push_back({StageName(span.stage), span.begin, span.end});
    }
    Trace(spec_.request_id, pass.layer, traced);
  }
  absl::MutexLock lock(&mu_);
  RequestSeconds& sums = end_.seconds;
  for (const StageSpan& span : spans) {
    const double seconds = std::chrono::duration<double>(span.end - span.begin).count();
    switch (span.stage) {
      case LayerStage::kHostToDevice:
        sums.host_to_device += seconds;
        break;
      case LayerStage::kCheck:
        break;  // has no field
      case LayerStage::kScore:
        sums.score += seconds;
        break;
      case LayerStage::kSelect:
        sums.select += seconds;
        break;
      case LayerStage::kGather:
        sums.gather += seconds;
        break;
      case LayerStage::kReceipt:
        sums.receipt += seconds;
        break;
      case LayerStage::kDeviceToHost:
        sums.device_to_host += seconds;
        break;
    }
  }
}

absl::Status Request::FinishPass(LayerPass& pass) {
  absl::Status status = pass.stream().Synchronize();
  if (status.ok()) status = pass.finite.Verdict();
  if (status.ok()) Account(pass);
  return status;
}

absl::StatusOr<LayerTensors> Request::StageLayer(int32_t layer, Stage& stage, LayerPass& pass,
                                                 Backend& backend) {
  Stream& stream = pass.stream();
  const StagePlan plan = PlanStage(spec_.tensors, layer);
  absl::Status status = FillStage(spec_, plan, stage, backend, stream);
  if (status.ok()) status = StageToDevice(spec_, plan, stage, backend, stream);
  if (!status.ok()) return status;
  pass.timer.End(LayerStage::kHostToDevice);
  // While the copies run, and before anything reads them.
  status = CheckStageValues(spec_, plan, stage);
  if (!status.ok()) return status;
  pass.timer.Skip();
  LayerTensors tensors = LayerViews(spec_, layer, plan, stage, block_table_);
  tensors.page_memory = page_memory();
  absl::StatusOr<FiniteCheck> finite = EnqueueFiniteCheck({&tensors, 1}, backend, stream);
  if (!finite.ok()) return finite.status();
  pass.finite = *std::move(finite);
  pass.timer.End(LayerStage::kCheck);
  return tensors;
}

absl::Status Request::ComputeLayer(int32_t layer, Stage& stage, LayerPass& pass, Backend& backend) {
  if (spec_.method == Method::kFetch) return Keep(layer, FetchOne(layer, stage, pass, backend));
  absl::StatusOr<LayerTensors> tensors = StageLayer(layer, stage, pass, backend);
  if (!tensors.ok()) return tensors.status();
  if (stores()) {
    absl::Status status = StoreLayer(*tensors, pass);
    if (!status.ok() || !returns_layers()) return status;
    pass.timer.Skip();
  }
  if (spec_.method == Method::kCalibrate) {
    absl::Status status = calibrator_->AddLayer(
        tensors->keys, tensors->queries,
        1 / std::sqrt(static_cast<float>(spec_.sequence.shape.head_dim)), backend, pass.stream());
    if (!status.ok()) return status;
    return FinishPass(pass);
  }
  if (global()) return ScoreGlobal(*tensors, pass, backend);
  return Keep(layer, spec_.method == Method::kApply ? ApplyOne(stage, *tensors, pass, backend)
                                                    : CompressOne(*tensors, pass, backend));
}

absl::Status Request::Keep(int32_t layer, absl::StatusOr<ComputedLayer> output) {
  if (!output.ok()) return output.status();
  absl::MutexLock lock(&mu_);
  if (!stopped()) outputs_.emplace(layer, *std::move(output));
  return absl::OkStatus();
}

absl::Status Request::ScoreGlobal(const LayerTensors& tensors, LayerPass& pass, Backend& backend) {
  {
    absl::MutexLock lock(&mu_);
    layers_[static_cast<size_t>(tensors.layer)].tensors = tensors;
  }
  if (!KeepsAll(tensors.layer)) {
    absl::StatusOr<LayerScores> scores = ScoreLayer(*context_, tensors, backend, pass.stream());
    if (!scores.ok()) return scores.status();
    absl::Status status =
        AccumulateScores(*context_, *std::move(scores), global_scores_, backend, pass.stream());
    if (!status.ok()) return status;
    pass.timer.End(LayerStage::kScore);
  }
  return FinishPass(pass);
}

absl::StatusOr<ComputedLayer> Request::CompressOne(const LayerTensors& tensors, LayerPass& pass,
                                                   Backend& backend) {
  absl::StatusOr<LayerResult> result = EnqueueLayer(
      *context_, tensors, /*with_pages=*/spec_.method == Method::kCompress, backend, pass.timer);
  if (!result.ok()) return result.status();
  return Collect(*std::move(result), tensors, pass, backend);
}

absl::StatusOr<ComputedLayer> Request::ApplyOne(const Stage& stage, const LayerTensors& tensors,
                                                LayerPass& pass, Backend& backend) {
  absl::StatusOr<LayerPlan> plan = ReceivedPlan(tensors.layer, stage);
  if (!plan.ok()) return plan.status();
  absl::StatusOr<LayerDecision> decision = FromPlan(*std::move(plan), backend, pass.stream());
  if (!decision.ok()) return decision.status();
  return FinishLayer(*std::move(decision), tensors, pass, backend);
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
                                                   const LayerTensors& tensors, LayerPass& pass,
                                                   Backend& backend) {
  LayerResult result;
  result.decision = std::move(decision);
  absl::Status status = EnqueueRest(result, tensors, pass, backend);
  // The device may still read what this frame owns.
  if (!status.ok()) return ReasonOf(std::move(status), pass);
  return Collect(std::move(result), tensors, pass, backend);
}

absl::Status Request::EnqueueRest(LayerResult& result, const LayerTensors& tensors, LayerPass& pass,
                                  Backend& backend) {
  pass.timer.Skip();
  if (spec_.method != Method::kPlan) {
    absl::StatusOr<LayerPages> pages =
        ApplyLayer(*context_, result.decision, tensors, backend, pass.stream());
    if (!pages.ok()) return pages.status();
    result.pages = *std::move(pages);
    pass.timer.End(LayerStage::kGather);
  }
  if (spec_.sequence.with_receipt) {
    absl::StatusOr<ReceiptFigures> figures =
        EnqueueReceipt(*context_, result.decision, result.pages, tensors, backend, pass.stream());
    if (!figures.ok()) return figures.status();
    result.figures = *std::move(figures);
    pass.timer.End(LayerStage::kReceipt);
  }
  return absl::OkStatus();
}

absl::StatusOr<ComputedLayer> Request::Collect(LayerResult result, const LayerTensors& tensors,
                                               LayerPass& pass, Backend& backend) {
  const int32_t layer = result.decision.plan.layer;
  const int64_t num_kept = result.pages.num_kept;
  absl::StatusOr<ComputedLayer> output =
      spec_.shadow ? CollectOriginals(tensors, pass, backend)
                   : CollectLayer(*context_, result, spec_.output.get(), backend, pass.timer);
  // The device may still write what `result` owns.
  if (!output.ok()) return ReasonOf(output.status(), pass);
  if (absl::Status verdict = pass.finite.Verdict(); !verdict.ok()) return verdict;
  Account(pass);
  if (spec_.shadow) {
    output->shadow_bytes =
        LayerOutputBytes(context_->spec, num_kept, context_->segmentation.num_blocks());
  }
  if (spec_.sequence.with_receipt) {
    output->receipt = result.figures.has_value() ? ReadReceipt(*result.figures) : result.receipt;
    output->receipt->layer = layer;
  }
  return output;
}

absl::StatusOr<ComputedLayer> Request::CollectOriginals(const LayerTensors& tensors,
                                                        LayerPass& pass, Backend& backend) {
  const SequenceContext& context = *shadow_context_;
  absl::StatusOr<LayerDecision> everything =
      KeepAll(context, tensors.layer, backend, pass.stream());
  if (!everything.ok()) return everything.status();
  LayerResult originals;
  originals.decision = *std::move(everything);
  pass.timer.Skip();
  absl::StatusOr<LayerPages> pages =
      ApplyLayer(context, originals.decision, tensors, backend, pass.stream());
  if (!pages.ok()) return ReasonOf(pages.status(), pass);
  originals.pages = *std::move(pages);
  pass.timer.End(LayerStage::kGather);
  return CollectLayer(context, originals, spec_.output.get(), backend, pass.timer);
}

bool Request::KeepsAll(int32_t layer) const {
  const Policy& policy = context_->spec.policy;
  return policy.transform == Transform::kIndex ||
         std::binary_search(policy.protection.dense_layers.begin(),
                            policy.protection.dense_layers.end(), layer);
}

// A quality floor with Scope::kGlobal is refused by ValidatePolicy: one decision is all there is.
absl::Status Request::DecideGlobal(Backend& backend, Stream& stream) {
  LayerPass pass(/*of=*/-1, stream);
  int32_t first = 0;
  while (first < spec_.sequence.shape.num_layers && KeepsAll(first)) ++first;
  if (first < spec_.sequence.shape.num_layers) {
    absl::StatusOr<LayerDecision> decision =
        PlanLayer(*context_, global_scores_, first, /*min_num_kept=*/0, backend, stream);
    if (!decision.ok()) return decision.status();
    global_plan_ = std::move(decision->plan);
    global_scores_ = {};
    pass.timer.End(LayerStage::kSelect);
  }
  if (absl::Status status = FinishPass(pass); !status.ok()) return status;
  absl::MutexLock lock(&mu_);
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
  LayerPass pass(layer, stream);
  const auto decide = [&] {
    if (KeepsAll(layer)) return KeepAll(*context_, layer, backend, stream);
    LayerPlan plan = global_plan_;
    plan.layer = layer;
    return FromPlan(std::move(plan), backend, stream);
  };
  absl::StatusOr<LayerDecision> decision = decide();
  if (!decision.ok()) return ReasonOf(decision.status(), pass);
  absl::StatusOr<ComputedLayer> output = FinishLayer(*std::move(decision), tensors, pass, backend);
  stage = {};
  return Keep(layer, std::move(output));
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

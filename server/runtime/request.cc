// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/request.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/time/clock.h"
#include "server/runtime/output_need.h"
#include "server/runtime/trace.h"

namespace dynsplit {
namespace {

// Up to here a job and a wait for the device cost more than moving the bytes.
constexpr int64_t kTogetherBytes = int64_t{4} << 20;

Session* StoredSession(const RequestSpec& spec) {
  return spec.method == Method::kAppend ? spec.session.get() : spec.opened.get();
}

std::vector<int32_t> WantedLayers(const RequestSpec& spec) {
  if (spec.method == Method::kFetch) return spec.fetch_layers;
  std::vector<int32_t> layers(static_cast<size_t>(spec.sequence.shape.num_layers));
  std::iota(layers.begin(), layers.end(), 0);
  return layers;
}

bool StoresTogether(const RequestSpec& spec) {
  if (spec.method != Method::kOpen && spec.method != Method::kAppend) return false;
  int64_t bytes = 0;
  for (const RequestTensor& tensor : spec.tensors) bytes += tensor.byte_size;
  return bytes <= kTogetherBytes;
}

}  // namespace

absl::StatusOr<std::shared_ptr<Request>> Request::Create(RequestSpec spec, Executor& executor,
                                                         Reservation reservation,
                                                         std::shared_ptr<ResultSink> sink) {
  SessionUse appending = std::move(spec.appending);
  std::shared_ptr<Request> request(
      new Request(std::move(spec), executor, std::move(reservation), std::move(sink)));
  if (request->sequence_plan_.byte_size > 0) {
    absl::StatusOr<Buffer> host =
        executor.backend().AllocateHost(request->sequence_plan_.byte_size);
    if (!host.ok()) return host.status();
    request->sequence_stage_.host = std::make_shared<Buffer>(*std::move(host));
  }
  absl::MutexLock lock(&request->mu_);
  request->appending_ = std::move(appending);
  return request;
}

void Request::Start() {
  absl::MutexLock lock(&mu_);
  Launch();
}

Request::~Request() { AbandonStore(); }

Request::Request(RequestSpec spec, Executor& executor, Reservation reservation,
                 std::shared_ptr<ResultSink> sink)
    : spec_(std::move(spec)),
      executor_(executor),
      sink_(std::move(sink)),
      reservation_(std::move(reservation)),
      stored_(StoredSession(spec_)),
      wanted_(WantedLayers(spec_)),
      together_(StoresTogether(spec_)),
      sequence_plan_(PlanStage(spec_.tensors,
                               together_ ? StagePlan::kEverything : RequestTensor::kWholeSequence)),
      inbox_(spec_.tensors, spec_.sequence.shape.num_layers, spec_.max_open_layers,
             spec_.num_shards),
      layers_(static_cast<size_t>(spec_.sequence.shape.num_layers)) {
  for (int32_t layer = 0; layer < spec_.sequence.shape.num_layers; ++layer) {
    layers_[static_cast<size_t>(layer)].plan = PlanStage(spec_.tensors, layer);
  }
  if (WritesInPlace(spec_, executor_.backend().info().name != "cpu")) {
    page_memory_ = [room = spec_.output.get()](int64_t size_bytes) {
      return room->Take(size_bytes);
    };
  }
  for (const RequestTensor& tensor : spec_.tensors) {
    switch (tensor.kind) {
      case TensorKind::kKey:
      case TensorKind::kValue:
      case TensorKind::kKeyValue:
      case TensorKind::kKeyScales:
      case TensorKind::kValueScales:
        end_.bytes_in += tensor.byte_size;
        break;
      default:
        break;
    }
  }
}

bool Request::global() const {
  return spec_.sequence.policy.scope == Scope::kGlobal &&
         (spec_.method == Method::kCompress || spec_.method == Method::kPlan);
}

bool Request::returns_layers() const {
  return spec_.method != Method::kCalibrate && spec_.method != Method::kOpen &&
         spec_.method != Method::kAppend;
}

bool Request::ordered() const { return global() || spec_.method == Method::kCalibrate; }

absl::StatusOr<Request::ChunkPlace> Request::Place(const Chunk& chunk) {
  absl::MutexLock lock(&mu_);
  if (stopped()) return absl::CancelledError("the request has ended");
  absl::StatusOr<size_t> index = inbox_.Check(chunk);
  if (!index.ok()) return index.status();
  if (inbox_.Early(*index)) {
    waiting_for_layer_ = true;
    return ChunkPlace{};
  }
  first_chunk_ = std::min(first_chunk_, absl::Now());
  const int32_t layer = spec_.tensors[*index].layer;
  const StagePlan* plan = &sequence_plan_;
  Stage* stage = &sequence_stage_;
  if (layer != RequestTensor::kWholeSequence && !together()) {
    LayerState& state = layers_[static_cast<size_t>(layer)];
    plan = &state.plan;
    stage = &state.stage;
    if (stage->host == nullptr) {
      if (!TryCount(state)) {
        waiting_for_room_ = true;
        return ChunkPlace{};
      }
      absl::StatusOr<Buffer> host = executor_.backend().AllocateHost(plan->byte_size);
      if (!host.ok()) return host.status();
      stage->host = std::make_shared<Buffer>(*std::move(host));
      state.receiving_since = Stream::Clock::now();
    }
  }
  inbox_.Claim(*index, chunk);
  const auto slot = static_cast<size_t>(
      std::find(plan->tensors.begin(), plan->tensors.end(), *index) - plan->tensors.begin());
  return ChunkPlace{.data = stage->host->data() + plan->offset_bytes[slot] + chunk.offset,
                    .owner = stage->host,
                    .tensor_index = *index};
}

void Request::Commit(const ChunkPlace& place, const Chunk& chunk) {
  bool layer_passed = false;
  {
    absl::MutexLock lock(&mu_);
    if (stopped()) return;
    inbox_.Add(place.tensor_index, chunk);
    if (inbox_.all_complete()) {
      end_.seconds.receive = absl::ToDoubleSeconds(absl::Now() - first_chunk_);
    }
    if (!chunk.last) return;
    TraceReceipt(spec_.tensors[place.tensor_index].layer);
    Launch();
    layer_passed = std::exchange(waiting_for_layer_, false);
  }
  if (layer_passed) sink_->OnRoom();
}

void Request::TraceReceipt(int32_t layer) {
  if (!Tracing() || layer == RequestTensor::kWholeSequence || together() ||
      !inbox_.layer_complete(layer)) {
    return;
  }
  const TraceSpan span = {"receive", layers_[static_cast<size_t>(layer)].receiving_since,
                          Stream::Clock::now()};
  Trace(spec_.request_id, layer, {&span, 1});
}

absl::Status Request::End(int32_t shard, int64_t num_tensors) {
  {
    absl::MutexLock lock(&mu_);
    if (absl::Status status = inbox_.End(shard, num_tensors); !status.ok()) return status;
    if (!inbox_.all_ended()) return absl::OkStatus();
    ended_ = true;
    Launch();
  }
  Deliver();
  return absl::OkStatus();
}

bool Request::TryCount(LayerState& layer) {
  if (layer.counted) return true;
  if (num_counted_ >= MaxLayersInFlight(spec_)) return false;
  layer.counted = true;
  ++num_counted_;
  return true;
}

void Request::Uncount() {
  bool room = false;
  {
    absl::MutexLock lock(&mu_);
    --num_counted_;
    Launch();
    room = std::exchange(waiting_for_room_, false);
  }
  if (room && !stopped()) sink_->OnRoom();
}

void Request::LayerSent() {
  if (Tracing()) {
    absl::MutexLock lock(&mu_);
    if (!sending_.empty()) {
      // Layers leave one after the other: one that waits for another is not being sent.
      const TraceSpan span = {"send", std::max(sending_.front().since, last_sent_),
                              Stream::Clock::now()};
      Trace(spec_.request_id, sending_.front().layer, {&span, 1});
      sending_.pop_front();
      last_sent_ = span.end;
    }
  }
  Uncount();
}

void Request::Cancel() { Stop(); }

void Request::Stop() {
  // Freed outside the lock.
  std::vector<Stage> stages;
  std::map<int32_t, ComputedLayer> outputs;
  {
    absl::MutexLock lock(&mu_);
    stopped_.store(true, std::memory_order_relaxed);
    finished_ = true;
    for (LayerState& layer : layers_) stages.push_back(std::exchange(layer.stage, {}));
    outputs.swap(outputs_);
  }
  AbandonStore();
}

void Request::Fail(absl::Status status) {
  {
    absl::MutexLock lock(&mu_);
    if (finished_) return;
    finished_ = true;
  }
  // Who hears of the failure may append anew.
  AbandonStore();
  // Told before stopped: else the reader could meet the end before anyone knows its reason.
  sink_->OnError(std::move(status));
  Stop();
}

void Request::Submit(Work work) {
  executor_.Submit([self = shared_from_this(), work = std::move(work)](Backend& backend,
                                                                       Stream& stream) mutable {
    if (self->stopped()) return;
    absl::Status status = std::move(work)(*self, backend, stream);
    if (!status.ok()) {
      self->Fail(std::move(status));
    } else {
      self->Deliver();
    }
  });
}

void Request::Launch() {
  if (stopped()) return;
  if (together()) {
    if (phase_ != Phase::kReceiving || !ended_) return;
    phase_ = Phase::kPreparing;
    Submit([](Request& self, Backend& backend, Stream& stream) {
      return self.StoreTogether(backend, stream);
    });
    return;
  }
  if (phase_ == Phase::kReceiving && inbox_.sequence_complete()) {
    phase_ = Phase::kPreparing;
    Submit([](Request& self, Backend& backend, Stream& stream) {
      return self.Prepare(backend, stream);
    });
  }
  if (phase_ == Phase::kReady) LaunchLayers();
}

void Request::LaunchLayers() {
  const int32_t num_layers = spec_.sequence.shape.num_layers;
  while (next_launch_ < wanted_.size() && inbox_.layer_complete(wanted_[next_launch_]) &&
         !(ordered() && ordered_job_runs_)) {
    const int32_t layer = wanted_[next_launch_];
    LayerState& state = layers_[static_cast<size_t>(layer)];
    if (!TryCount(state)) break;
    if (state.stage.host == nullptr && state.plan.byte_size > 0) {  // nothing of it is streamed
      absl::StatusOr<Buffer> host = executor_.backend().AllocateHost(state.plan.byte_size);
      if (!host.ok()) {
        Submit([status = host.status()](Request&, Backend&, Stream&) { return status; });
        return;
      }
      state.stage.host = std::make_shared<Buffer>(*std::move(host));
    }
    ++next_launch_;
    ordered_job_runs_ = true;
    Submit([layer, stage = std::exchange(state.stage, {})](Request& self, Backend& backend,
                                                           Stream& stream) mutable {
      return self.RunLayer(layer, std::move(stage), backend, stream);
    });
  }
  if (global() && num_scored_ == num_layers && !decided_ && !ordered_job_runs_) {
    ordered_job_runs_ = true;
    Submit([](Request& self, Backend& backend, Stream& stream) {
      return self.DecideGlobal(backend, stream);
    });
  }
}

bool Request::AllDone() const {
  if (spec_.method == Method::kCalibrate) {
    return num_scored_ == spec_.sequence.shape.num_layers;
  }
  if (!returns_layers()) return num_stored_ == wanted_.size();
  return next_output_ == wanted_.size() && (!stores() || num_stored_ == wanted_.size());
}

void Request::Deliver() {
  mu_.Lock();
  if (delivering_) {
    mu_.Unlock();
    return;
  }
  delivering_ = true;
  while (!finished_) {
    if (sequence_output_.has_value()) {
      SequenceOutput output = *std::exchange(sequence_output_, std::nullopt);
      mu_.Unlock();
      sink_->OnSequence(std::move(output));
      mu_.Lock();
      continue;
    }
    const auto next =
        next_output_ < wanted_.size() ? outputs_.find(wanted_[next_output_]) : outputs_.end();
    if (next != outputs_.end()) {
      ComputedLayer output = std::move(next->second);
      outputs_.erase(next);
      ++next_output_;
      Record(output);
      if (Tracing() && !output.skipped) {
        sending_.push_back({output.plan->layer, Stream::Clock::now()});
      }
      mu_.Unlock();
      if (output.skipped) {
        output = {};
        Uncount();
      } else {
        sink_->OnLayer(std::move(output));
      }
      mu_.Lock();
      continue;
    }
    if (!ended_ || !AllDone()) break;
    if (stores() && !committed_) {
      if (!std::exchange(commit_launched_, true)) {
        Submit([](Request& self, Backend&, Stream& stream) { return self.CommitStore(stream); });
      }
      break;
    }
    finished_ = true;
    EndOutput end = std::move(end_);
    mu_.Unlock();
    absl::StatusOr<EndOutput> result = MakeEnd(std::move(end));
    // Who hears of the end may release the session, and open another in its place.
    spec_.opened.reset();
    spec_.session = {};
    if (result.ok()) {
      sink_->OnEnd(*std::move(result));
    } else {
      sink_->OnError(result.status());
    }
    mu_.Lock();
  }
  delivering_ = false;
  mu_.Unlock();
}

void Request::Record(const ComputedLayer& output) {
  if (plan_hasher_.has_value()) plan_hasher_->Add(output.hash);
  LayerPlan plan = {.layer = output.plan->layer,
                    .groups = output.plan->groups,
                    .num_kept = output.plan->num_kept,
                    .dense = output.plan->dense,
                    .raised_by_protection = output.plan->raised_by_protection,
                    .raised_by_quality_floor = output.plan->raised_by_quality_floor,
                    .kept = {}};
  end_.plan.layers.push_back(std::move(plan));
  end_.layer_hashes.push_back(output.hash);
  if (output.receipt.has_value()) end_.receipts.push_back(*output.receipt);
  end_.bytes_out += PayloadBytes(output);
  end_.shadow_bytes_out += output.shadow_bytes;
}

}  // namespace dynsplit

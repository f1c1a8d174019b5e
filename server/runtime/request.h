// SPDX-License-Identifier: Apache-2.0
//
// The life of one request, apart from how its bytes travel.
//
//     tensors of the whole sequence complete ──► prepare (segmentation, tables)  ──► OnSequence
//     layer complete, and prepared           ──► one job a layer                 ──► OnLayer,
//     ascending all complete, and End()                                                    ──►
//     OnEnd
//
// With Scope::kGlobal the layer jobs score only, in order; once all have, one job decides and one
// job a layer applies. Calibration measures layers in order and yields a profile at the end.
//
// Sessions (session_work.cc). What is to stay is begun in prepare, stored by the layer jobs and
// committed by one job after the last; where all of it is small, one job does the three. Nothing
// stays of a request that does not come to its end.
//
// Threads. Place, Commit and End are called by one reader a shard at a time; LayerSent and Cancel
// by anyone. Jobs run on the executor and keep the request alive. The sink is called without locks
// held; results one call at a time, OnError and OnRoom at any time.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/runtime/admission.h"
#include "server/runtime/executor.h"
#include "server/runtime/inbox.h"
#include "server/runtime/layer_work.h"
#include "server/runtime/request_spec.h"
#include "server/runtime/session_work.h"

namespace dynsplit {

// Receives what a request yields. OnEnd or OnError comes last, and at most one of them; after
// Cancel neither may come.
class ResultSink {
 public:
  virtual ~ResultSink() = default;
  virtual void OnSequence(SequenceOutput output) = 0;
  virtual void OnLayer(ComputedLayer output) = 0;
  virtual void OnEnd(EndOutput output) = 0;
  virtual void OnError(absl::Status status) = 0;
  // Place() may be tried again.
  virtual void OnRoom() = 0;
};

class Request : public std::enable_shared_from_this<Request> {
 public:
  // Allocates the stage of the sequence's tensors. RESOURCE_EXHAUSTED when the backend has no
  // memory left in spite of the reservation. `executor` must outlive the request. Nothing happens
  // before Start.
  static absl::StatusOr<std::shared_ptr<Request>> Create(RequestSpec spec, Executor& executor,
                                                         Reservation reservation,
                                                         std::shared_ptr<ResultSink> sink);

  void Start();

  ~Request();

  // Where the bytes of a chunk go. `owner` keeps the place valid even if the request is cancelled
  // meanwhile. No room, or early: data is null, OnRoom will be called.
  struct ChunkPlace {
    std::byte* data = nullptr;
    std::shared_ptr<Buffer> owner;
    size_t tensor_index = 0;
  };
  absl::StatusOr<ChunkPlace> Place(const Chunk& chunk);
  // The chunk's bytes are in their place.
  void Commit(const ChunkPlace& place, const Chunk& chunk);
  // The client has sent what it had for the shard.
  absl::Status End(int32_t shard, int64_t num_tensors);

  // The results of one layer have left; their memory is free.
  void LayerSent();
  // Stops as soon as running jobs notice; memory that no job uses is returned at once.
  void Cancel();

  const RequestSpec& spec() const { return spec_; }
  int64_t reserved_bytes() const { return reservation_.bytes(); }

 private:
  // Where one layer is on its way.
  struct LayerState {
    StagePlan plan;
    Stage stage;           // allocated when its first chunk arrives
    LayerTensors tensors;  // kGlobal: views of the stage, kept between scoring and applying
    bool counted = false;  // occupies one of the places in flight
    Stream::Clock::time_point receiving_since;
  };
  // One layer's way through the device: its clock, and the verdict on its values.
  struct LayerPass {
    LayerPass(int32_t of, Stream& on) : layer(of), timer(on) {}
    Stream& stream() const { return timer.stream(); }

    const int32_t layer;  // -1: of all layers together
    StageTimer timer;
    FiniteCheck finite;
  };
  using Work = absl::AnyInvocable<absl::Status(Request&, Backend&, Stream&) &&>;

  Request(RequestSpec spec, Executor& executor, Reservation reservation,
          std::shared_ptr<ResultSink> sink);

  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
  bool ordered() const;  // layers are worked on one at a time, ascending
  bool global() const;
  bool stores() const { return stored_ != nullptr; }
  bool returns_layers() const;  // else only the sequence and the end come back
  // Of results that operations write to their place; null = the backend's.
  const PageMemory* page_memory() const { return page_memory_ ? &page_memory_ : nullptr; }
  // Everything is staged, checked and stored at once.
  bool together() const { return together_; }
  // Takes a place in flight for the layer if one is free.
  bool TryCount(LayerState& layer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Starts what can start: preparation, layers, the global decision.
  // Writes the span of a layer that is complete now.
  void TraceReceipt(int32_t layer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Launch() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void LaunchLayers() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Submit(Work work) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Gives the layer's place in flight to another.
  void Uncount() ABSL_LOCKS_EXCLUDED(mu_);
  // Hands finished results to the sink, in order.
  void Deliver() ABSL_LOCKS_EXCLUDED(mu_);
  bool AllDone() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Fail(absl::Status status) ABSL_LOCKS_EXCLUDED(mu_);
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);

  // Jobs; run on the executor. Layer jobs own their stage.
  absl::Status Prepare(Backend& backend, Stream& stream);
  absl::Status PrepareCalibration();
  absl::StatusOr<LayerTensors> StageLayer(int32_t layer, Stage& stage, LayerPass& pass,
                                          Backend& backend);
  void AddRestingSalt(EndOutput& end) const;
  absl::Status PrepareContexts(Backend& backend, Stream& stream);
  absl::Status StageSequence(Backend& backend, Stream& stream);
  void AnnounceSequence(const Segmentation& segmentation) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Sessions.
  absl::Status PrepareStore(Backend& backend, Stream& stream);
  absl::Status BeginStore(ResidentSequence& sequence, Stream& stream);
  absl::Status StoreLayer(const LayerTensors& tensors, LayerPass& pass);
  absl::Status CommitStore(Stream& stream);
  absl::Status StoreTogether(Backend& backend, Stream& stream);
  absl::Status CheckTogetherFinite(Backend& backend, Stream& stream);
  void EndStore();
  // No longer appends: the session is as before.
  void AbandonStore();
  absl::StatusOr<ComputedLayer> FetchOne(int32_t layer, const Stage& stage, LayerPass& pass,
                                         Backend& backend);
  absl::StatusOr<LayerDecision> FetchDecision(int32_t layer, const Stage& stage, Backend& backend,
                                              Stream& stream);

  absl::Status RunLayer(int32_t layer, Stage stage, Backend& backend, Stream& stream);
  // What follows enqueues, and waits at its end; where it succeeds, `pass` is over.
  absl::Status ComputeLayer(int32_t layer, Stage& stage, LayerPass& pass, Backend& backend);
  absl::StatusOr<ComputedLayer> CompressOne(const LayerTensors& tensors, LayerPass& pass,
                                            Backend& backend);
  absl::StatusOr<ComputedLayer> ApplyOne(const Stage& stage, const LayerTensors& tensors,
                                         LayerPass& pass, Backend& backend);
  absl::StatusOr<ComputedLayer> FinishLayer(LayerDecision decision, const LayerTensors& tensors,
                                            LayerPass& pass, Backend& backend);
  absl::StatusOr<ComputedLayer> Collect(LayerResult result, const LayerTensors& tensors,
                                        LayerPass& pass, Backend& backend);
  absl::StatusOr<ComputedLayer> CollectOriginals(const LayerTensors& tensors, LayerPass& pass,
                                                 Backend& backend);
  absl::Status ScoreGlobal(const LayerTensors& tensors, LayerPass& pass, Backend& backend);
  // What follows the decision, as far as it is enqueued.
  absl::Status EnqueueRest(LayerResult& result, const LayerTensors& tensors, LayerPass& pass,
                           Backend& backend);
  // Waits for the device after a failure. The failure's reason: values that are not finite, or
  // `status` itself.
  absl::Status ReasonOf(absl::Status status, LayerPass& pass);
  // Waits for the device; refuses values that are not finite.
  absl::Status FinishPass(LayerPass& pass);
  // Adds up, and traces, what the stages took. Requires: the device is done with the pass.
  void Account(LayerPass& pass) ABSL_LOCKS_EXCLUDED(mu_);
  // Hands the layer's result on, unless it failed or nobody wants it any more.
  absl::Status Keep(int32_t layer, absl::StatusOr<ComputedLayer> output) ABSL_LOCKS_EXCLUDED(mu_);
  absl::StatusOr<LayerPlan> ReceivedPlan(int32_t layer, const Stage& stage) const;
  bool KeepsAll(int32_t layer) const;
  absl::Status DecideGlobal(Backend& backend, Stream& stream);
  absl::Status ApplyGlobal(int32_t layer, Stage stage, const LayerTensors& tensors,
                           Backend& backend, Stream& stream);
  absl::StatusOr<EndOutput> MakeEnd(EndOutput end);
  void Record(const ComputedLayer& output) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Constant after construction.
  RequestSpec spec_;  // its sessions go before the end is told; the rest stays
  Executor& executor_;
  const std::shared_ptr<ResultSink> sink_;
  const Reservation reservation_;
  Session* const stored_;              // to be kept or appended to; null = nothing is
  const std::vector<int32_t> wanted_;  // layers to be worked on, ascending
  const bool together_;
  PageMemory page_memory_;
  StagePlan sequence_plan_;
  Stage sequence_stage_;

  // Written by Prepare before any layer job, then read-only.
  std::unique_ptr<SequenceContext> context_;
  std::unique_ptr<SequenceContext> shadow_context_;  // originals, uncompressed
  const int32_t* block_table_ = nullptr;             // on the device

  // Used by jobs that run one at a time.
  std::optional<Calibrator> calibrator_;
  LayerScores global_scores_;
  LayerPlan global_plan_;
  std::optional<PlanHasher> plan_hasher_;  // by whoever delivers

  // Guarded by the stored session's mu.
  bool abandoned_ = false;  // must not be begun, or go on

  std::atomic<bool> stopped_ = false;

  // Guarded by mu_.
  absl::Mutex mu_;
  Inbox inbox_ ABSL_GUARDED_BY(mu_);
  std::vector<LayerState> layers_ ABSL_GUARDED_BY(mu_);
  int32_t num_counted_ ABSL_GUARDED_BY(mu_) = 0;
  bool waiting_for_room_ ABSL_GUARDED_BY(mu_) = false;
  bool waiting_for_layer_ ABSL_GUARDED_BY(mu_) = false;  // another to be the lowest incomplete
  enum class Phase : uint8_t {
    kReceiving,
    kPreparing,
    kReady
  } phase_ ABSL_GUARDED_BY(mu_) = Phase::kReceiving;
  SessionUse appending_ ABSL_GUARDED_BY(mu_);    // kAppend, until its end
  size_t next_launch_ ABSL_GUARDED_BY(mu_) = 0;  // of wanted_: first that is not launched
  bool ordered_job_runs_ ABSL_GUARDED_BY(mu_) = false;
  int32_t num_scored_ ABSL_GUARDED_BY(mu_) = 0;  // kGlobal
  bool decided_ ABSL_GUARDED_BY(mu_) = false;    // kGlobal
  size_t num_stored_ ABSL_GUARDED_BY(mu_) = 0;   // layers
  bool commit_launched_ ABSL_GUARDED_BY(mu_) = false;
  bool committed_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;  // OnEnd or OnError has been, or is being, called
  bool delivering_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<SequenceOutput> sequence_output_ ABSL_GUARDED_BY(mu_);
  absl::Time first_chunk_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  std::map<int32_t, ComputedLayer> outputs_ ABSL_GUARDED_BY(mu_);  // finished, not yet delivered
  size_t next_output_ ABSL_GUARDED_BY(mu_) = 0;                    // of wanted_
  // While tracing: layers that the sink has, and since when; when the one before had left.
  struct Sending {
    int32_t layer;
    Stream::Clock::time_point since;
  };
  std::deque<Sending> sending_ ABSL_GUARDED_BY(mu_);
  Stream::Clock::time_point last_sent_ ABSL_GUARDED_BY(mu_);
  EndOutput end_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// The pipeline, top to bottom: one sequence, layer by layer, on any backend.
//
//     PrepareSequence   token ids            -> SequenceContext (segmentation, protection, tables)
//     ScoreLayer        K, queries, evidence -> LayerScores     (device)
//     PlanLayer         scores               -> LayerDecision   (kept tokens, host and device)
//     ApplyLayer        decision, K, V       -> LayerPages      (device)
//     MeasureLayer      decision, pages      -> LayerReceipt
//     CompressLayer     all of the above for scopes of one layer, with the quality floor's loop
//
// Deciding (ScoreLayer, PlanLayer) and moving (ApplyLayer) are apart: Plan stops after the first,
// Apply starts at the second. With Scope::kGlobal, callers add up ScoreLayer results of all layers
// with AccumulateScores, plan once, and apply to each layer.
//
// Each of PlanLayer, MeasureLayer, CompressLayer and the finite check is also there in two halves:
// Enqueue... gives the device its work, Read... (Verdict) looks at the result once the stream is
// synchronised. So a layer needs one wait, at its end. More of them: for the number of tokens of
// whole blocks, for a quality floor, and for log-sum-exps of base 2. Where an Enqueue fails, the
// device is done with the host memory it had from it.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/pipeline/backend.h"
#include "server/pipeline/budget.h"
#include "server/pipeline/plan.h"
#include "server/pipeline/policy.h"
#include "server/pipeline/segmentation.h"
#include "server/pipeline/stage_timer.h"
#include "server/pipeline/types.h"

namespace dynsplit {

// What a request promises to supply for every layer.
struct EvidenceSupply {
  bool keys = true;
  bool values = true;
  int64_t num_window_queries = 0;  // 0 = none
  bool lse = false;
  int32_t accumulated_rows = 0;  // 0 = none, else num_query_heads or num_kv_heads
};

// The request after resolution. Immutable while layers flow.
struct SequenceSpec {
  SequenceShape shape;
  std::optional<Rope> rope;
  Policy policy;  // validated; preset and fallback already resolved
  std::string fallback_preset;
  EvidenceSupply supply;
  DType key_dtype = DType::kBFloat16;
  DType value_dtype = DType::kBFloat16;
  ScaleGranularity input_scale_granularity = ScaleGranularity::kHead;
  bool with_receipt = true;
};

// Checks that `supply` carries the evidence the policy needs; with allow_fallback replaces the
// policy's choices by those of its preset's fallback and says so; what the caller asked for in
// budget, protection, encoding, positions and quality stays. FAILED_PRECONDITION EVIDENCE_MISSING
// otherwise, and where a quality floor lacks the tensors it is measured on.
absl::Status ResolveEvidence(SequenceSpec& spec);
// Evidence that `spec` will use (after ResolveEvidence).
Evidence UsedEvidence(const SequenceSpec& spec);

// Per-sequence state, made once, then read-only (safe to share between layers in flight).
struct SequenceContext {
  SequenceSpec spec;
  Segmentation segmentation;
  std::vector<uint8_t> protected_tokens;  // [T]
  int64_t num_protected = 0;
  // Host sources and device copies of what operations read.
  Buffer block_starts_host, block_starts;   // int32 [B + 1]
  Buffer protected_host, protected_device;  // uint8 [T]
  Buffer rotation_host, rotation_device;
  RotationTable rotation;  // rotary_dim 0 unless positions are contiguous
  // Recency only: float [rows, T] then [rows, B], strictly ascending along tokens and blocks.
  Buffer recency_host, recency_device;
};
// `token_ids` may be empty when the segmentation reads none (kNone, kFixed).
absl::StatusOr<std::unique_ptr<SequenceContext>> PrepareSequence(SequenceSpec spec,
                                                                 std::span<const int32_t> token_ids,
                                                                 const DelimiterProfile* profile,
                                                                 Backend& backend, Stream& stream);
// The same with a segmentation made elsewhere (Apply).
absl::StatusOr<std::unique_ptr<SequenceContext>> PrepareSequence(SequenceSpec spec,
                                                                 Segmentation segmentation,
                                                                 Backend& backend, Stream& stream);

// Gives memory that operations write a layer's pages to.
using PageMemory = std::function<absl::StatusOr<Buffer>(int64_t size_bytes)>;

// One layer's tensors on the device. data == nullptr / null = not supplied.
struct LayerTensors {
  int32_t layer = 0;
  TensorView keys;
  TensorView values;
  TensorView queries;                  // [W, Hq, D]
  const float* lse = nullptr;          // [W, Hq], in the declared base
  const float* accumulated = nullptr;  // [accumulated_rows, T]
  // Of the pages that ApplyLayer makes; null = the backend's. Each ApplyLayer takes its own.
  const PageMemory* page_memory = nullptr;
};

// The check for NaN and infinity in keys, values and queries, on its way.
class FiniteCheck {
 public:
  // INVALID_ARGUMENT naming layer, tensor and token of the first one. Requires: the stream was
  // synchronised. OK where nothing was asked.
  absl::Status Verdict() const;

 private:
  friend absl::StatusOr<FiniteCheck> EnqueueFiniteCheck(std::span<const LayerTensors> layers,
                                                        Backend& backend, Stream& stream);
  struct Asked {
    int32_t layer = 0;
    const char* name = nullptr;
    int64_t num_tokens = 0;  // the answer where all is well
    size_t slot = 0;         // of the answer
  };
  std::vector<Asked> asked_;
  Buffer first_bad_;  // host
};
absl::StatusOr<FiniteCheck> EnqueueFiniteCheck(std::span<const LayerTensors> layers,
                                               Backend& backend, Stream& stream);
// Both halves.
absl::Status CheckLayerFinite(const LayerTensors& tensors, Backend& backend, Stream& stream);
// The same of several layers, with one wait.
absl::Status CheckLayersFinite(std::span<const LayerTensors> layers, Backend& backend,
                               Stream& stream);

// Empty (groups == 0) for layers that keep everything: nothing is scored there.
struct LayerScores {
  int32_t groups = 0;
  Buffer token_scores;  // float [groups, T]; empty for block-scored methods and one-token blocks
  Buffer block_scores;  // float [groups, B]
};
// Scores may refer to memory of `context` and `tensors`, which must outlive them.
absl::StatusOr<LayerScores> ScoreLayer(const SequenceContext& context, const LayerTensors& tensors,
                                       Backend& backend, Stream& stream);
// total += scores (Scope::kGlobal); an empty total takes the scores, empty scores add nothing. Sums
// depend on the order: callers add ascending layers.
absl::Status AccumulateScores(const SequenceContext& context, LayerScores scores,
                              LayerScores& total, Backend& backend, Stream& stream);

struct LayerDecision {
  LayerPlan plan;    // host; without its kept tokens while those are on their way
  Buffer kept_host;  // int32 [groups, num_kept]: what `kept` was made from, kept alive with it
  Buffer kept;       // the same on the device
  bool kept_pending = false;  // kept_host is written by the device; see ReadDecision
};
// `min_num_kept` > 0 raises the budget (quality floor): tokens, or blocks in whole-block mode.
// A layer that keeps everything gets one group, whatever the scope.
absl::StatusOr<LayerDecision> PlanLayer(const SequenceContext& context, const LayerScores& scores,
                                        int32_t layer, int64_t min_num_kept, Backend& backend,
                                        Stream& stream);
// Waits in whole-block mode only, where the number of kept tokens is the device's to say.
absl::StatusOr<LayerDecision> EnqueuePlan(const SequenceContext& context, const LayerScores& scores,
                                          int32_t layer, int64_t min_num_kept, Backend& backend,
                                          Stream& stream);
void ReadDecision(LayerDecision& decision);
// A decision that keeps everything (dense layers, index transform).
absl::StatusOr<LayerDecision> KeepAll(const SequenceContext& context, int32_t layer,
                                      Backend& backend, Stream& stream);
// Tokens that a head of `layer` keeps at least, as far as the policy alone tells.
int64_t LeastKept(const SequenceSpec& spec, int32_t layer);
// A decision made elsewhere (Apply). `plan` must be valid.
absl::StatusOr<LayerDecision> FromPlan(LayerPlan plan, Backend& backend, Stream& stream);

struct LayerPages {
  int64_t num_kept = 0;
  int64_t num_pages = 0;
  DType key_dtype = DType::kBFloat16;
  DType value_dtype = DType::kBFloat16;
  ScaleGranularity key_scale_granularity = ScaleGranularity::kHead;
  ScaleGranularity value_scale_granularity = ScaleGranularity::kHead;
  Buffer key_pages, value_pages;    // [num_pages, page_size, Hkv, D]
  Buffer key_scales, value_scales;  // empty unless quantised
  DType summary_dtype = DType::kFloat32;
  Buffer block_min, block_max, block_mean;  // index transform: [B, Hkv, D]
};
absl::StatusOr<LayerPages> ApplyLayer(const SequenceContext& context, const LayerDecision& decision,
                                      const LayerTensors& tensors, Backend& backend,
                                      Stream& stream);
// Bytes of each buffer of LayerPages of a layer that keeps `num_kept` tokens, in their order there;
// 0 = empty.
std::array<int64_t, 7> LayerPageBytes(const SequenceSpec& spec, int64_t num_kept,
                                      int64_t num_blocks);
// The sum of those.
int64_t LayerOutputBytes(const SequenceSpec& spec, int64_t num_kept, int64_t num_blocks);

struct LayerReceipt {
  int32_t layer = 0;
  double mass_mean = 0, mass_min = 0;    // NaN when no queries were supplied
  double error_mean = 0, error_max = 0;  // NaN when queries or values are missing
};
absl::StatusOr<LayerReceipt> MeasureLayer(const SequenceContext& context,
                                          const LayerDecision& decision, const LayerPages& pages,
                                          const LayerTensors& tensors, Backend& backend,
                                          Stream& stream);

// Figures of a receipt on their way to the host.
struct ReceiptFigures {
  int32_t layer = 0;
  int32_t num_heads = 0;
  bool with_error = false;
  Buffer host;  // float [1 or 3, num_heads]: mass, squared error, squared norm; empty = no queries
};
absl::StatusOr<ReceiptFigures> EnqueueReceipt(const SequenceContext& context,
                                              const LayerDecision& decision,
                                              const LayerPages& pages, const LayerTensors& tensors,
                                              Backend& backend, Stream& stream);
LayerReceipt ReadReceipt(const ReceiptFigures& figures);

struct LayerResult {
  LayerDecision decision;
  LayerPages pages;  // empty for Plan
  LayerReceipt receipt;
  std::optional<ReceiptFigures> figures;  // of the receipt, while they are on their way
};
// Whole way of one layer for Scope::kLayer and kLayerHead. `with_pages` false stops after the
// decision (Plan). Raises the budget until the quality floor holds; FAILED_PRECONDITION
// QUALITY_FLOOR where max_kept_ratio forbids it.
absl::StatusOr<LayerResult> CompressLayer(const SequenceContext& context,
                                          const LayerTensors& tensors, bool with_pages,
                                          Backend& backend, Stream& stream);
// Waits in whole-block mode and for a quality floor only. `timer` is told of every stage.
absl::StatusOr<LayerResult> EnqueueLayer(const SequenceContext& context,
                                         const LayerTensors& tensors, bool with_pages,
                                         Backend& backend, StageTimer& timer);
void ReadLayer(LayerResult& result);

}  // namespace dynsplit

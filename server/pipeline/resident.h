// SPDX-License-Identifier: Apache-2.0
//
// A sequence that stays: K, V and the index of its blocks, and the choice of tokens at each decode
// step (arXiv 2602.03184 section 4.2, appendix B.2). On any backend.
//
//     token ids ──► Begin      segmentation of old and new tokens, room for the index
//     layer l   ──► StoreLayer rows behind the end, unseen by readers (and, in an empty sequence,
//                              the layer's summaries)
//               ──► Commit     summaries from the block that was open on; the new length
//     queries   ──► SelectSteps of any layers of any sequences: scores of blocks, tokens; where the
//                              policy refines, candidates first, of which their own keys decide
//
// Memory. Rows are head-major, so that a block of one head is one run of bytes:
//
//     key_value   layer 0: K [Hkv, capacity, D], V [Hkv, capacity, D],
//                          K scales [capacity, Hkv], V scales [capacity, Hkv] (fp8, int8 only)
//                 layer 1: ...                                     device or pinned host memory
//     index       block starts int32 [block capacity + 1], then by layer
//                 bounds [Hkv, block capacity, 2, D] (a block's minima, then its maxima) or
//                 means [Hkv, block capacity, D], scales [Hkv, block capacity] (e4m3 only)
//                                                                  always device memory
//
// Every part starts at a multiple of 256 bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/pipeline/backend.h"
#include "server/pipeline/compress.h"
#include "server/pipeline/policy.h"
#include "server/pipeline/segmentation.h"
#include "server/pipeline/types.h"

namespace dynsplit {

// How a sequence is to rest. Policy: transform kIndex, scoring kBlockBound or kBlockMeanKey, scope
// kLayer or kLayerHead, no pinned spans (ValidateResidentPolicy).
struct ResidentSpec {
  SequenceShape shape;  // num_tokens: at opening
  std::optional<Rope> rope;
  Policy policy;
  DType key_dtype = DType::kBFloat16;  // as supplied
  DType value_dtype = DType::kBFloat16;
  int64_t capacity_tokens = 0;
  DType summary_dtype = DType::kFloat8E4M3;  // or SummaryDTypeOf's
};
// Beside ValidatePolicy: what sequences that stay do not have. UNIMPLEMENTED or INVALID_ARGUMENT
// under "policy".
absl::Status ValidateResidentPolicy(const Policy& policy);
// Type of summaries "as the keys": that of keys at rest, bfloat16 for quantised ones.
DType SummaryDTypeOf(const ResidentSpec& spec);

// Where everything lies, and what it weighs.
struct ResidentLayout {
  DType key_dtype = DType::kBFloat16;  // at rest
  DType value_dtype = DType::kBFloat16;
  int64_t capacity_tokens = 0;
  int64_t layer_bytes = 0;               // of key_value
  int64_t value_offset_bytes = 0;        // behind the layer's begin
  int64_t key_scale_offset_bytes = 0;    // 0 = none
  int64_t value_scale_offset_bytes = 0;  // 0 = none
  int64_t key_value_bytes = 0;           // all layers
  int64_t block_capacity = 0;
  int64_t index_layer_offset_bytes = 0;  // of layer 0, behind the block starts
  int64_t index_layer_bytes = 0;
  int64_t index_scale_offset_bytes = 0;  // behind the layer's begin; 0 = none
  int64_t index_bytes = 0;
};
ResidentLayout PlanResident(const ResidentSpec& spec, int64_t block_capacity);
// Blocks to expect in so many tokens: of the policy's mean length.
int64_t ExpectedBlocks(const SegmentationPolicy& policy, int64_t num_tokens);
// Blocks that an index has room for: those there are, those to expect in `room_tokens` more tokens,
// and a little, so that sessions of about equal length share launches.
int64_t BlockCapacity(const SegmentationPolicy& policy, int64_t num_blocks, int64_t room_tokens);
// The layout to expect before the token ids are known.
ResidentLayout PredictResident(const ResidentSpec& spec);

// Thread-compatible: const methods, and StoreLayer of different layers, may run side by side;
// everything else excludes all others.
class ResidentSequence {
 public:
  // Allocates key_value. RESOURCE_EXHAUSTED. `backend` outlives the sequence; `profile` may be null
  // where the segmentation reads no token ids.
  static absl::StatusOr<std::unique_ptr<ResidentSequence>> Create(
      ResidentSpec spec, std::shared_ptr<const DelimiterProfile> profile, Residence residence,
      Backend& backend);

  // ---- growing. Readers see nothing of it before Commit ----
  // INVALID_ARGUMENT for token ids that are wrong in number (where they are read) or negative,
  // RESOURCE_EXHAUSTED SESSION_FULL beyond the capacity.
  absl::Status Begin(std::span<const int32_t> token_ids, int64_t num_tokens, Stream& stream);
  // `tensors` holds the new tokens' keys and values only, in the types of the spec; complete when
  // the stream is.
  absl::Status StoreLayer(const LayerTensors& tensors, Stream& stream);
  // Complete when it returns. After an error the sequence is as before Begin.
  absl::Status Commit(Stream& stream);
  void Abort();
  bool growing() const { return pending_.has_value(); }
  // Of old and new tokens, between Begin and Commit.
  const Segmentation& pending_segmentation() const { return pending_->segmentation; }

  // ---- reading ----
  const ResidentSpec& spec() const { return spec_; }
  const ResidentLayout& layout() const { return layout_; }
  Residence residence() const { return residence_; }
  int64_t num_tokens() const { return num_tokens_; }
  const Segmentation& segmentation() const { return segmentation_; }
  int32_t groups() const;  // sets of chosen tokens a layer: 1 or Hkv
  bool dense(int32_t layer) const;
  // First `num_tokens` tokens of a layer, [num_tokens, Hkv, D] at rest.
  TensorView Keys(int32_t layer, int64_t num_tokens) const;
  TensorView Values(int32_t layer, int64_t num_tokens) const;
  BlockSummaries Summaries(int32_t layer) const;
  const int32_t* block_starts() const;  // device
  const Buffer& key_value() const { return key_value_; }
  int64_t device_bytes() const;
  int64_t host_bytes() const;

  // ---- moving ----
  // K and V to the other kind of memory, bit for bit. After RESOURCE_EXHAUSTED nothing has changed.
  absl::Status MoveTo(Residence residence, Stream& stream);

 private:
  struct Pending {
    IncrementalSegmenter segmenter;
    Segmentation segmentation;
    int64_t num_tokens = 0;   // old and new
    int64_t first_block = 0;  // first block that is new or longer than before
    Buffer starts_host;       // int32: segmentation.starts
  };

  ResidentSequence(ResidentSpec spec, std::shared_ptr<const DelimiterProfile> profile,
                   Backend& backend);
  absl::Status CheckTokenIds(std::span<const int32_t> token_ids, int64_t num_tokens) const;
  TensorView View(int32_t layer, DType dtype, int64_t offset_bytes, int64_t scale_offset_bytes,
                  int64_t num_tokens) const;
  // Room for so many blocks; what is there stays.
  absl::Status EnsureIndex(int64_t num_blocks, Stream& stream);
  absl::Status CopyIndex(const ResidentLayout& layout, const Buffer& index, Stream& stream);
  // `from`, encoded, as the rows of `to` behind those that are there.
  GatherPagesItem NewRows(const TensorView& from, const TensorView& to,
                          EncodingPolicy::Format format) const;
  absl::Status UploadStarts(const Pending& pending, Stream& stream);
  absl::Status SummarizeLayer(int32_t layer, const Pending& pending, Stream& stream);

  const ResidentSpec spec_;
  Backend& backend_;
  ResidentLayout layout_;
  Residence residence_ = Residence::kDevice;
  Buffer key_value_;
  Buffer index_;
  int64_t num_tokens_ = 0;
  IncrementalSegmenter segmenter_;
  Segmentation segmentation_;
  std::optional<Pending> pending_;
};

// What a step may read. `tokens_per_head` 0 = the policy's budget.
struct StepBudget {
  int64_t num_selected = 0;    // n: tokens a KV head
  int64_t num_candidates = 0;  // of which they are chosen by their own keys: [n, T]; n = by blocks
  int64_t prefix_end = 0;  // [0, prefix_end) and [suffix_begin, T) are always chosen: sinks; recent
  int64_t suffix_begin = 0;  // tokens and the open block
  bool raised_by_protection = false;
  bool refined() const { return num_candidates > num_selected; }
};
// INVALID_ARGUMENT for tokens_per_head outside [0, T].
absl::StatusOr<StepBudget> BudgetOfStep(const ResidentSequence& sequence, int64_t tokens_per_head);

// One sequence's part of a step. Pointers are readable and writable by operations.
struct SelectionStep {
  const ResidentSequence* sequence = nullptr;
  StepBudget budget;
  int32_t first_layer = 0;
  int32_t num_layers = 0;
  int32_t num_queries = 1;  // W a layer
  DType query_dtype = DType::kBFloat16;
  const std::byte* queries = nullptr;  // [num_layers, W, Hq, D]
  int32_t* tokens = nullptr;           // out [num_layers, groups, n]; dense layers' are left alone
  float* block_scores = nullptr;       // out [num_layers, groups, B], or null; likewise
};
// Scratch of a refined step's layer while it runs: candidates and their scores.
int64_t RefinementBytes(const ResidentSequence& sequence, const StepBudget& budget);
// Layers are refined together up to so many of these bytes, at least one.
inline constexpr int64_t kMaxRefinementBytes = int64_t{256} << 20;
// Sequences of all kinds in as few launches as their kinds allow.
absl::Status SelectSteps(std::span<const SelectionStep> steps, Backend& backend, Stream& stream);

// Rows that a caller keeps between steps (the reuse pipeline): which token each slot holds.
struct RowSlots {
  uint64_t generation = 0;  // of the caller's rows; 0 = none
  int32_t first_layer = 0;
  int32_t num_layers = 0;
  int64_t num_rows = 0;  // n
  Buffer held;           // int32 [num_layers, Hkv, n], device
};
// Slots that hold nothing yet. Complete when it returns.
absl::StatusOr<RowSlots> EmptySlots(const ResidentSequence& sequence, int32_t first_layer,
                                    int32_t num_layers, int64_t num_rows, Backend& backend,
                                    Stream& stream);
struct RowDestination {
  std::byte* keys = nullptr;  // [num_layers, Hkv, n, D] each; null = only slots are kept up to date
  std::byte* values = nullptr;
  float* key_scales = nullptr;  // [num_layers, Hkv, n]
  float* value_scales = nullptr;
};
// Slots of the step's layers and n, from the tokens they hold to the step's chosen ones. Nothing of
// dense layers is read or written.
struct SlotRefresh {
  const SelectionStep* step = nullptr;
  const RowSlots* slots = nullptr;
  RowDestination rows;
  int32_t* moved_slots = nullptr;  // out [num_layers, Hkv, n], or null
  int32_t* num_moved = nullptr;    // out [num_layers, Hkv]
};
// All of them, each of other slots, in as few launches as their kinds allow.
absl::Status RefreshSlots(std::span<const SlotRefresh> refreshes, Backend& backend, Stream& stream);

}  // namespace dynsplit

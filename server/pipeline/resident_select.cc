// SPDX-License-Identifier: Apache-2.0
//
// A decode step over resident sequences: which tokens, and which rows move.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/resident.h"

namespace dynsplit {
namespace {

constexpr auto kFloatBytes = static_cast<int64_t>(sizeof(float));
constexpr auto kIndexBytes = static_cast<int64_t>(sizeof(int32_t));
constexpr size_t kMaxSummedLayers = 4096;  // of one launch

float SoftmaxScaleOf(const ResidentSpec& spec) {
  const double scale = spec.policy.scoring.softmax_scale;
  return static_cast<float>(scale > 0 ? scale : 1 / std::sqrt(double{1} * spec.shape.head_dim));
}

// What items must have in common to share a launch.
struct Kind {
  int32_t num_query_heads, num_kv_heads, head_dim, num_queries, groups;
  DType query_dtype, summary_dtype;
  bool means;
  int64_t head_stride_bytes;
  float softmax_scale;
  bool refined;
  DType key_dtype;  // where they are read
  bool operator==(const Kind&) const = default;
};

Kind KindOf(const SelectionStep& step) {
  const ResidentSequence& sequence = *step.sequence;
  const BlockSummaries summaries = sequence.Summaries(0);
  const SequenceShape& shape = sequence.spec().shape;
  return {.num_query_heads = shape.num_query_heads,
          .num_kv_heads = shape.num_kv_heads,
          .head_dim = shape.head_dim,
          .num_queries = step.num_queries,
          .groups = sequence.groups(),
          .query_dtype = step.query_dtype,
          .summary_dtype = summaries.dtype,
          .means = summaries.mean != nullptr,
          .head_stride_bytes = summaries.head_stride_bytes,
          .softmax_scale = SoftmaxScaleOf(sequence.spec()),
          .refined = step.budget.refined(),
          .key_dtype = step.budget.refined() ? sequence.layout().key_dtype : DType::kFloat32};
}

// Calls f(layer, place) for the layers of the step that are chosen from; place counts from 0.
template <typename F>
void ForEachLayer(const SelectionStep& step, F&& f) {
  for (int32_t place = 0; place < step.num_layers; ++place) {
    const int32_t layer = step.first_layer + place;
    if (!step.sequence->dense(layer)) f(layer, place);
  }
}

int64_t NumBlocks(const SelectionStep& step) { return step.sequence->segmentation().num_blocks(); }

TensorView QueriesOf(const SelectionStep& step, int32_t place) {
  const SequenceShape& shape = step.sequence->spec().shape;
  const int64_t layer_bytes = int64_t{step.num_queries} * shape.num_query_heads * shape.head_dim *
                              DTypeBytes(step.query_dtype);
  return DenseView(step.queries + place * layer_bytes, step.query_dtype, step.num_queries,
                   shape.num_query_heads, shape.head_dim);
}

// Scores by KV head -> one set for all heads of a layer, which ranks by the sum over them.
struct SummedScores {
  const float* by_head = nullptr;  // [Hkv, count]
  float* sums = nullptr;           // out [count]
  int64_t count = 0;
};

// Layers whose scores lie one behind the other share a launch.
absl::Status SumHeads(std::span<const SummedScores> scores, int32_t num_kv_heads, Backend& backend,
                      Stream& stream) {
  for (size_t first = 0; first < scores.size();) {
    const int64_t count = scores[first].count;
    size_t end = first + 1;
    while (end < std::min(scores.size(), first + kMaxSummedLayers) && scores[end].count == count &&
           scores[end].by_head == scores[end - 1].by_head + num_kv_heads * count &&
           scores[end].sums == scores[end - 1].sums + count) {
      ++end;
    }
    const auto layers = static_cast<int32_t>(end - first);
    const ReduceRowsParams params = {.in = scores[first].by_head,
                                     .rows_in = layers * num_kv_heads,
                                     .rows_out = layers,
                                     .columns = count,
                                     .mean = false,
                                     .accumulate = false,
                                     .out = scores[first].sums};
    if (absl::Status status = backend.ReduceRows(params, stream); !status.ok()) return status;
    first = end;
  }
  return absl::OkStatus();
}

// One layer of a step on its way.
struct LayerSelection {
  const SelectionStep* step = nullptr;
  int32_t layer = 0;
  int32_t place = 0;
  const float* block_scores = nullptr;  // [groups, B]; null: all tokens are candidates
};

// Steps of one kind.
class KindSelector {
 public:
  KindSelector(const Kind& kind, Backend& backend, Stream& stream)
      : kind_(kind), backend_(backend), stream_(stream) {}

  void Add(const SelectionStep& step) { steps_.push_back(&step); }

  absl::Status Run() {
    for (const SelectionStep* step : steps_) {
      ForEachLayer(*step, [&](int32_t layer, int32_t place) {
        layers_.push_back({.step = step, .layer = layer, .place = place});
      });
    }
    if (layers_.empty()) return absl::OkStatus();
    absl::Status status = ScoreBlocks();
    if (!status.ok()) return status;
    return kind_.refined ? RefineAll() : SelectByBlocks();
  }

 private:
  // Whether scores by head are what selection reads, so that a caller's memory can take them.
  bool ByHead() const { return kind_.groups == kind_.num_kv_heads; }

  // Where all tokens are candidates and nobody asks, blocks are not scored.
  static bool NeedsBlocks(const SelectionStep& step) {
    return step.block_scores != nullptr || !step.budget.refined() ||
           step.budget.num_candidates < step.sequence->num_tokens();
  }

  absl::Status ScoreBlocks() {
    int64_t num_by_head = 0;
    int64_t num_sums = 0;
    for (const LayerSelection& layer : layers_) {
      if (!NeedsBlocks(*layer.step)) continue;
      num_by_head += kind_.num_kv_heads * NumBlocks(*layer.step);
      num_sums += ByHead() ? 0 : NumBlocks(*layer.step);
    }
    if (num_by_head == 0) return absl::OkStatus();
    absl::StatusOr<Buffer> scores =
        backend_.Allocate((num_by_head + num_sums) * kFloatBytes, stream_);
    if (!scores.ok()) return scores.status();
    scores_ = *std::move(scores);
    float* next = scores_.as<float>();
    float* next_sum = next + num_by_head;
    std::vector<ScoreBlocksItem> items;
    std::vector<SummedScores> sums;
    for (LayerSelection& layer : layers_) {
      const SelectionStep& step = *layer.step;
      if (!NeedsBlocks(step)) continue;
      const int64_t num_blocks = NumBlocks(step);
      float* by_head = std::exchange(next, next + kind_.num_kv_heads * num_blocks);
      float* summed = ByHead() ? by_head : std::exchange(next_sum, next_sum + num_blocks);
      if (step.block_scores != nullptr) {
        summed = step.block_scores + layer.place * kind_.groups * num_blocks;
      }
      if (ByHead()) by_head = summed;
      layer.block_scores = summed;
      items.push_back({.queries = QueriesOf(step, layer.place),
                       .summaries = step.sequence->Summaries(layer.layer),
                       .block_starts = step.sequence->block_starts(),
                       .num_blocks = num_blocks,
                       .block_scores = by_head});
      if (!ByHead()) sums.push_back({.by_head = by_head, .sums = summed, .count = num_blocks});
    }
    absl::Status status = backend_.ScoreBlocks(
        {.items = items, .num_kv_heads = kind_.num_kv_heads, .softmax_scale = kind_.softmax_scale},
        stream_);
    if (!status.ok()) return status;
    return SumHeads(sums, kind_.num_kv_heads, backend_, stream_);
  }

  int32_t* TokensOf(const LayerSelection& layer) const {
    const SelectionStep& step = *layer.step;
    return step.tokens + layer.place * kind_.groups * step.budget.num_selected;
  }

  // The layer's best `num_selected` tokens by blocks.
  static SelectBlocksItem BlocksItem(const LayerSelection& layer, int64_t num_selected,
                                     int32_t* tokens) {
    const ResidentSequence& sequence = *layer.step->sequence;
    const StepBudget& budget = layer.step->budget;
    return {.block_scores = layer.block_scores,
            .block_starts = sequence.block_starts(),
            .num_blocks = NumBlocks(*layer.step),
            .num_tokens = sequence.num_tokens(),
            .prefix_end = budget.prefix_end,
            .suffix_begin = budget.suffix_begin,
            .num_selected = num_selected,
            .tokens = tokens};
  }

  absl::Status SelectByBlocks() {
    std::vector<SelectBlocksItem> items;
    for (const LayerSelection& layer : layers_) {
      items.push_back(BlocksItem(layer, layer.step->budget.num_selected, TokensOf(layer)));
    }
    return backend_.SelectBlocks({.items = items, .groups = kind_.groups}, stream_);
  }

  // Batch by batch in the same scratch, which the stream's order keeps apart.
  absl::Status RefineAll() {
    std::vector<std::span<const LayerSelection>> batches;
    int64_t most_bytes = 0;
    for (size_t first = 0; first < layers_.size();) {
      int64_t bytes = 0;
      size_t end = first;
      for (; end < layers_.size(); ++end) {
        const SelectionStep& step = *layers_[end].step;
        const int64_t more = RefinementBytes(*step.sequence, step.budget);
        if (end > first && bytes + more > kMaxRefinementBytes) break;
        bytes += more;
      }
      most_bytes = std::max(most_bytes, bytes);
      batches.push_back(std::span(layers_).subspan(first, end - first));
      first = end;
    }
    absl::StatusOr<Buffer> scratch = backend_.Allocate(most_bytes, stream_);
    if (!scratch.ok()) return scratch.status();
    for (const std::span<const LayerSelection> batch : batches) {
      if (absl::Status status = Refine(batch, *scratch); !status.ok()) return status;
    }
    return absl::OkStatus();
  }

  // Candidates by blocks, their scores by their own keys, and the best of them. What is protected
  // is the candidates' head and tail, since they are ascending and hold all of it.
  absl::Status Refine(std::span<const LayerSelection> layers, const Buffer& scratch) {
    std::vector<SelectBlocksItem> proposals, choices;
    std::vector<ScoreTokensItem> scores;
    std::vector<SummedScores> sums;
    int64_t num_by_head = 0;
    int64_t num_sums = 0;
    for (const LayerSelection& layer : layers) {
      num_by_head += kind_.num_kv_heads * layer.step->budget.num_candidates;
      num_sums += ByHead() ? 0 : layer.step->budget.num_candidates;
    }
    float* next = scratch.as<float>();
    float* next_sum = next + num_by_head;
    auto* next_candidate = reinterpret_cast<int32_t*>(next_sum + num_sums);
    for (const LayerSelection& layer : layers) {
      const ResidentSequence& sequence = *layer.step->sequence;
      const StepBudget& budget = layer.step->budget;
      const int64_t count = budget.num_candidates;
      int32_t* candidates = nullptr;  // all tokens
      if (count < sequence.num_tokens()) {
        candidates = std::exchange(next_candidate, next_candidate + kind_.groups * count);
        proposals.push_back(BlocksItem(layer, count, candidates));
      }
      float* const by_head = std::exchange(next, next + kind_.num_kv_heads * count);
      float* const summed = ByHead() ? by_head : std::exchange(next_sum, next_sum + count);
      scores.push_back({.queries = QueriesOf(*layer.step, layer.place),
                        .keys = sequence.Keys(layer.layer, sequence.num_tokens()),
                        .tokens = candidates,
                        .num_tokens = count,
                        .token_scores = by_head});
      if (!ByHead()) sums.push_back({.by_head = by_head, .sums = summed, .count = count});
      choices.push_back({.block_scores = summed,
                         .block_starts = nullptr,
                         .num_blocks = count,
                         .num_tokens = count,
                         .prefix_end = budget.prefix_end,
                         .suffix_begin = count - (sequence.num_tokens() - budget.suffix_begin),
                         .num_selected = budget.num_selected,
                         .tokens = TokensOf(layer),
                         .names = candidates});
    }
    absl::Status status =
        backend_.SelectBlocks({.items = proposals, .groups = kind_.groups}, stream_);
    if (!status.ok()) return status;
    status = backend_.ScoreTokens(
        {.items = scores, .groups = kind_.groups, .softmax_scale = kind_.softmax_scale}, stream_);
    if (status.ok()) status = SumHeads(sums, kind_.num_kv_heads, backend_, stream_);
    if (!status.ok()) return status;
    return backend_.SelectBlocks({.items = choices, .groups = kind_.groups}, stream_);
  }

  const Kind kind_;
  Backend& backend_;
  Stream& stream_;
  std::vector<const SelectionStep*> steps_;
  std::vector<LayerSelection> layers_;
  Buffer scores_;  // of blocks
};

// What refreshes must have in common to share launches.
struct RefreshKind {
  int32_t num_kv_heads, head_dim, groups;
  int64_t num_rows;
  DType key_dtype, value_dtype;
  bool operator==(const RefreshKind&) const = default;
};

RefreshKind KindOf(const SlotRefresh& refresh) {
  const ResidentSequence& sequence = *refresh.step->sequence;
  const SequenceShape& shape = sequence.spec().shape;
  return {.num_kv_heads = shape.num_kv_heads,
          .head_dim = shape.head_dim,
          .groups = sequence.groups(),
          .num_rows = refresh.slots->num_rows,
          .key_dtype = sequence.layout().key_dtype,
          .value_dtype = sequence.layout().value_dtype};
}

void AddItems(const SlotRefresh& refresh, std::vector<RefreshRowsItem>& items) {
  const SelectionStep& step = *refresh.step;
  const ResidentSequence& sequence = *step.sequence;
  const SequenceShape& shape = sequence.spec().shape;
  const RowDestination& rows = refresh.rows;
  const int64_t num_rows = refresh.slots->num_rows;
  const int64_t layer_rows = shape.num_kv_heads * num_rows;
  const auto bytes_of = [&](DType dtype) {
    return layer_rows * shape.head_dim * DTypeBytes(dtype);
  };
  const auto at = [](auto* base, int64_t offset) { return base == nullptr ? base : base + offset; };
  ForEachLayer(step, [&](int32_t layer, int32_t place) {
    items.push_back({.keys = sequence.Keys(layer, sequence.num_tokens()),
                     .values = sequence.Values(layer, sequence.num_tokens()),
                     .wanted = step.tokens + place * sequence.groups() * num_rows,
                     .held = refresh.slots->held.as<int32_t>() + place * layer_rows,
                     .moved_slots = at(refresh.moved_slots, place * layer_rows),
                     .num_moved = refresh.num_moved + place * shape.num_kv_heads,
                     .key_rows = at(rows.keys, place * bytes_of(sequence.layout().key_dtype)),
                     .value_rows = at(rows.values, place * bytes_of(sequence.layout().value_dtype)),
                     .key_scales = at(rows.key_scales, place * layer_rows),
                     .value_scales = at(rows.value_scales, place * layer_rows)});
  });
}

int64_t BudgetTokens(const BudgetPolicy& budget, int64_t num_tokens) {
  if (budget.target == BudgetPolicy::Target::kTokens) {
    return std::min(budget.tokens_per_head, num_tokens);
  }
  const auto share =
      static_cast<int64_t>(std::floor(budget.kept_ratio * static_cast<double>(num_tokens)));
  return std::clamp<int64_t>(share, 1, num_tokens);
}

}  // namespace

absl::StatusOr<StepBudget> BudgetOfStep(const ResidentSequence& sequence, int64_t tokens_per_head) {
  const int64_t num_tokens = sequence.num_tokens();
  if (tokens_per_head < 0 || tokens_per_head > num_tokens) {
    return InvalidField("tokens_per_head", absl::StrCat("is ", tokens_per_head, "; must be in [0, ",
                                                        num_tokens, "], the session's tokens"));
  }
  const Policy& policy = sequence.spec().policy;
  const ProtectionPolicy& protection = policy.protection;
  StepBudget budget;
  budget.suffix_begin = num_tokens - std::min(protection.num_recent_tokens, num_tokens);
  if (policy.segmentation.method == SegmentationPolicy::Method::kDynamic) {
    budget.suffix_begin =
        std::min(budget.suffix_begin, int64_t{sequence.segmentation().open_begin});
  }
  budget.prefix_end = std::min(protection.num_sink_tokens, budget.suffix_begin);
  budget.num_selected =
      tokens_per_head > 0 ? tokens_per_head : BudgetTokens(policy.budget, num_tokens);
  const int64_t num_protected = budget.prefix_end + num_tokens - budget.suffix_begin;
  if (budget.num_selected < num_protected) {
    budget.num_selected = num_protected;
    budget.raised_by_protection = true;
  }
  const int64_t factor = std::max(policy.scoring.refinement_factor, 1);
  budget.num_candidates = std::min(factor * budget.num_selected, num_tokens);
  return budget;
}

int64_t RefinementBytes(const ResidentSequence& sequence, const StepBudget& budget) {
  if (!budget.refined()) return 0;
  const int64_t heads = sequence.spec().shape.num_kv_heads;
  const int64_t groups = sequence.groups();
  const int64_t sums = groups == heads ? 0 : groups;
  return budget.num_candidates * ((heads + sums) * kFloatBytes + groups * kIndexBytes);
}

absl::Status SelectSteps(std::span<const SelectionStep> steps, Backend& backend, Stream& stream) {
  std::vector<std::pair<Kind, KindSelector>> selectors;
  for (const SelectionStep& step : steps) {
    const Kind kind = KindOf(step);
    auto found = std::find_if(selectors.begin(), selectors.end(),
                              [&](const auto& entry) { return entry.first == kind; });
    if (found == selectors.end()) {
      selectors.emplace_back(kind, KindSelector(kind, backend, stream));
      found = std::prev(selectors.end());
    }
    found->second.Add(step);
  }
  for (auto& [kind, selector] : selectors) {
    if (absl::Status status = selector.Run(); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::StatusOr<RowSlots> EmptySlots(const ResidentSequence& sequence, int32_t first_layer,
                                    int32_t num_layers, int64_t num_rows, Backend& backend,
                                    Stream& stream) {
  const int64_t bytes = num_layers * sequence.spec().shape.num_kv_heads * num_rows * kIndexBytes;
  RowSlots slots = {.generation = 0,
                    .first_layer = first_layer,
                    .num_layers = num_layers,
                    .num_rows = num_rows,
                    .held = {}};
  absl::StatusOr<Buffer> held = backend.Allocate(bytes, stream);
  if (!held.ok()) return held.status();
  absl::StatusOr<Buffer> none = backend.AllocateHost(bytes);
  if (!none.ok()) return none.status();
  std::memset(none->data(), 0xFF, static_cast<size_t>(bytes));  // -1 in every slot
  absl::Status status = backend.Copy(held->data(), none->data(), bytes, stream);
  status.Update(stream.Synchronize());
  if (!status.ok()) return status;
  slots.held = *std::move(held);
  return slots;
}

absl::Status RefreshSlots(std::span<const SlotRefresh> refreshes, Backend& backend,
                          Stream& stream) {
  std::vector<std::pair<RefreshKind, std::vector<RefreshRowsItem>>> launches;
  for (const SlotRefresh& refresh : refreshes) {
    const RefreshKind kind = KindOf(refresh);
    auto found = std::find_if(launches.begin(), launches.end(),
                              [&](const auto& entry) { return entry.first == kind; });
    if (found == launches.end()) {
      launches.emplace_back(kind, std::vector<RefreshRowsItem>());
      found = std::prev(launches.end());
    }
    AddItems(refresh, found->second);
  }
  for (const auto& [kind, items] : launches) {
    if (items.empty()) continue;
    absl::Status status = backend.RefreshRows(
        {.items = items, .groups = kind.groups, .num_rows = kind.num_rows}, stream);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "tests/oracle/resident_suite.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "server/pipeline/resident.h"
#include "tests/oracle/device_session.h"
#include "tests/oracle/random_tensors.h"
#include "tests/oracle/reference.h"
#include "tests/oracle/tolerance.h"

namespace dynsplit::oracle {
namespace {

constexpr int32_t kNumLayers = 3;
constexpr int32_t kDenseLayer = 1;
constexpr int32_t kNumQueryHeads = 6;
constexpr int32_t kNumKvHeads = 2;
constexpr int32_t kHeadDim = 64;
constexpr int64_t kNumTokens = 700;

// How a sequence rests.
struct Kind {
  const char* name;
  EncodingPolicy::Format format = EncodingPolicy::Format::kAsIs;
  bool summaries_as_keys = false;
  ScoringPolicy::Method scoring = ScoringPolicy::Method::kBlockBound;
  Scope scope = Scope::kLayerHead;
  SegmentationPolicy::Method segmentation = SegmentationPolicy::Method::kDynamic;
  DType dtype = DType::kBFloat16;
  int32_t refinement = 1;
};

const Kind kKinds[] = {
    {.name = "bf16_e4m3"},
    {.name = "bf16_as_keys", .summaries_as_keys = true},
    {.name = "fp16_mean",
     .scoring = ScoringPolicy::Method::kBlockMeanKey,
     .dtype = DType::kFloat16},
    {.name = "fp8", .format = EncodingPolicy::Format::kFloat8E4M3},
    {.name = "int8_as_keys", .format = EncodingPolicy::Format::kInt8, .summaries_as_keys = true},
    {.name = "one_set_a_layer", .scope = Scope::kLayer},
    {.name = "fixed", .segmentation = SegmentationPolicy::Method::kFixed},
    {.name = "every_token", .segmentation = SegmentationPolicy::Method::kNone},
    {.name = "fp32_sentences",
     .segmentation = SegmentationPolicy::Method::kDelimiterSet,
     .dtype = DType::kFloat32},
    {.name = "refined", .scoring = ScoringPolicy::Method::kBlockMeanKey, .refinement = 4},
    {.name = "refined_fp8_bounds",
     .format = EncodingPolicy::Format::kFloat8E4M3,
     .summaries_as_keys = true,
     .refinement = 3},
    {.name = "refined_int8_one_set_a_layer",
     .format = EncodingPolicy::Format::kInt8,
     .scoring = ScoringPolicy::Method::kBlockMeanKey,
     .scope = Scope::kLayer,
     .refinement = 2},
    {.name = "refined_fp32_fixed",
     .segmentation = SegmentationPolicy::Method::kFixed,
     .dtype = DType::kFloat32,
     .refinement = 5},
};

DelimiterWeight Delimiter(int32_t token_id, float weight, bool sentence_end) {
  DelimiterWeight delimiter;
  delimiter.token_id = token_id;
  delimiter.weight = weight;
  delimiter.sentence_end = sentence_end;
  return delimiter;
}

std::shared_ptr<const DelimiterProfile> TestProfile() {
  static const auto& profile =
      *new std::shared_ptr<const DelimiterProfile>(std::make_shared<const DelimiterProfile>(
          DelimiterProfile::Create("test", "",
                                   {Delimiter(1, 1.0F, true), Delimiter(2, 0.6F, false)})
              .value()));
  return profile;
}

// One text with its keys, values and queries, on the device.
class Text {
 public:
  Text(const Kind& kind, int64_t num_tokens, uint64_t seed, DeviceSession& device)
      : num_tokens_(num_tokens) {
    Random random(seed);
    for (int64_t t = 0; t < num_tokens; ++t) {
      ids_.push_back(static_cast<int32_t>(random.Between(0, 12)));
    }
    ParityShape shape;
    shape.num_tokens = num_tokens;
    shape.num_query_heads = kNumQueryHeads;
    shape.num_kv_heads = kNumKvHeads;
    shape.head_dim = kHeadDim;
    shape.dtype = kind.dtype;
    shape.query_dtype = DType::kBFloat16;
    for (int32_t layer = 0; layer < kNumLayers; ++layer) {
      const uint64_t s = seed * 100 + static_cast<uint64_t>(layer);
      const HostTensor keys =
          HostTensor::Make(shape, num_tokens, kNumKvHeads, kind.dtype, Layout::kDense, s);
      const HostTensor values =
          HostTensor::Make(shape, num_tokens, kNumKvHeads, kind.dtype, Layout::kDense, s + 50);
      keys_.push_back(device.Upload(keys));
      values_.push_back(device.Upload(values));
    }
    const HostTensor queries = HostTensor::Make(shape, kNumLayers, kNumQueryHeads, DType::kBFloat16,
                                                Layout::kDense, seed + 7);
    host_queries_.push_back(queries);
    queries_ = device.Upload(queries).data;
  }

  std::span<const int32_t> ids(int64_t begin, int64_t count) const {
    return std::span(ids_).subspan(static_cast<size_t>(begin), static_cast<size_t>(count));
  }
  LayerTensors Layer(int32_t layer, int64_t begin, int64_t count) const {
    LayerTensors tensors;
    tensors.layer = layer;
    tensors.keys = Rows(keys_[static_cast<size_t>(layer)], begin, count);
    tensors.values = Rows(values_[static_cast<size_t>(layer)], begin, count);
    return tensors;
  }
  const std::byte* queries() const { return queries_; }
  // Of one layer, in host memory.
  TensorView HostQueries(int32_t layer) const {
    return Rows(host_queries_.front().view(), layer, 1);
  }
  int64_t num_tokens() const { return num_tokens_; }

 private:
  static TensorView Rows(TensorView view, int64_t begin, int64_t count) {
    view.data += begin * view.token_stride_bytes;
    view.num_tokens = count;
    return view;
  }

  int64_t num_tokens_;
  std::vector<int32_t> ids_;
  std::vector<TensorView> keys_, values_;
  std::vector<HostTensor> host_queries_;  // one
  const std::byte* queries_ = nullptr;
};

ResidentSpec SpecOf(const Kind& kind, int64_t num_tokens, int64_t capacity) {
  ResidentSpec spec;
  spec.shape = {.num_layers = kNumLayers,
                .num_query_heads = kNumQueryHeads,
                .num_kv_heads = kNumKvHeads,
                .num_tokens = num_tokens,
                .head_dim = kHeadDim};
  spec.policy = FindPreset("dynsplit_index").value()->policy;
  spec.policy.segmentation.method = kind.segmentation;
  if (kind.segmentation == SegmentationPolicy::Method::kNone)
    spec.policy.segmentation.block_size = 1;
  spec.policy.scoring.method = kind.scoring;
  spec.policy.scoring.refinement_factor = kind.refinement;
  spec.policy.scope = kind.scope;
  spec.policy.encoding.key = kind.format;
  spec.policy.encoding.value = kind.format;
  spec.policy.protection.dense_layers = {kDenseLayer};
  spec.key_dtype = kind.dtype;
  spec.value_dtype = kind.dtype;
  spec.capacity_tokens = capacity;
  if (kind.summaries_as_keys) spec.summary_dtype = SummaryDTypeOf(spec);
  return spec;
}

void Grow(ResidentSequence& sequence, const Text& text, int64_t count, Stream& stream) {
  const int64_t begin = sequence.num_tokens();
  absl::Status status = sequence.Begin(text.ids(begin, count), count, stream);
  ASSERT_TRUE(status.ok()) << status;
  for (int32_t layer = kNumLayers - 1; layer >= 0; --layer) {
    status = sequence.StoreLayer(text.Layer(layer, begin, count), stream);
    ASSERT_TRUE(status.ok()) << status;
  }
  status = sequence.Commit(stream);
  ASSERT_TRUE(status.ok()) << status;
}

std::unique_ptr<ResidentSequence> Open(const Kind& kind, const Text& text,
                                       const std::vector<int64_t>& pieces, DeviceSession& device,
                                       Residence residence = Residence::kDevice) {
  std::unique_ptr<ResidentSequence> sequence =
      ResidentSequence::Create(SpecOf(kind, pieces.front(), text.num_tokens() + 5), TestProfile(),
                               residence, device.backend())
          .value();
  for (const int64_t count : pieces) Grow(*sequence, text, count, device.stream());
  return sequence;
}

struct Selection {
  StepBudget budget;
  std::vector<std::vector<int32_t>> tokens;  // by layer; dense ones stay poisoned
  std::vector<std::vector<float>> scores;
  bool operator==(const Selection& other) const {
    return budget.num_selected == other.budget.num_selected && tokens == other.tokens &&
           SameBits(scores, other.scores);
  }
  static bool SameBits(const std::vector<std::vector<float>>& a,
                       const std::vector<std::vector<float>>& b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i) {
      if (a[i].size() != b[i].size() ||
          (!a[i].empty() && std::memcmp(a[i].data(), b[i].data(), a[i].size() * 4) != 0)) {
        return false;
      }
    }
    return true;
  }
};

struct Pending {
  SelectionStep step;
  Output<int32_t> tokens;
  Output<float> scores;
};

Pending MakeStep(const ResidentSequence& sequence, const Text& text, int64_t tokens_per_head,
                 DeviceSession& device) {
  Pending pending;
  pending.step.sequence = &sequence;
  pending.step.budget = BudgetOfStep(sequence, tokens_per_head).value();
  pending.step.num_layers = kNumLayers;
  pending.step.queries = text.queries();
  const int64_t rows = int64_t{kNumLayers} * sequence.groups();
  pending.tokens = device.Poisoned<int32_t>(rows * pending.step.budget.num_selected);
  pending.scores = device.Poisoned<float>(rows * sequence.segmentation().num_blocks());
  pending.step.tokens = pending.tokens.data();
  pending.step.block_scores = pending.scores.data();
  return pending;
}

template <typename T>
std::vector<std::vector<T>> ByLayer(const std::vector<T>& all) {
  const size_t each = all.size() / kNumLayers;
  std::vector<std::vector<T>> layers;
  for (size_t layer = 0; layer < kNumLayers; ++layer) {
    layers.emplace_back(all.begin() + static_cast<ptrdiff_t>(layer * each),
                        all.begin() + static_cast<ptrdiff_t>((layer + 1) * each));
  }
  return layers;
}

Selection Finish(Pending pending, DeviceSession& device) {
  Selection selection;
  selection.budget = pending.step.budget;
  selection.tokens = ByLayer(device.Read(std::move(pending.tokens)));
  selection.scores = ByLayer(device.Read(std::move(pending.scores)));
  return selection;
}

Selection Select(const ResidentSequence& sequence, const Text& text, int64_t tokens_per_head,
                 DeviceSession& device) {
  Pending pending = MakeStep(sequence, text, tokens_per_head, device);
  const absl::Status status = SelectSteps({&pending.step, 1}, device.backend(), device.stream());
  EXPECT_TRUE(status.ok()) << status;
  return Finish(std::move(pending), device);
}

bool IsPoison(const std::vector<int32_t>& values) {
  return std::all_of(values.begin(), values.end(),
                     [](int32_t value) { return static_cast<uint32_t>(value) == 0xA5A5A5A5U; });
}

// Rows of K or V at rest, [Hkv, T, D], and their scales, as bytes.
std::vector<std::byte> RestingRows(const TensorView& view, DeviceSession& device) {
  const int64_t row_bytes = view.num_tokens * view.token_stride_bytes;
  const int64_t scale_bytes =
      view.scales == nullptr ? 0 : view.num_tokens * view.num_heads * int64_t{4};
  Output<std::byte> out = device.Poisoned<std::byte>(view.num_heads * row_bytes + scale_bytes);
  absl::Status status;
  for (int32_t head = 0; head < view.num_heads; ++head) {
    status.Update(device.backend().Copy(out.data() + head * row_bytes,
                                        view.data + head * view.head_stride_bytes, row_bytes,
                                        device.stream()));
  }
  if (scale_bytes > 0) {
    status.Update(device.backend().Copy(out.data() + view.num_heads * row_bytes,
                                        reinterpret_cast<const std::byte*>(view.scales),
                                        scale_bytes, device.stream()));
  }
  EXPECT_TRUE(status.ok()) << status;
  return device.Read(std::move(out));
}

// -- properties -----------------------------------------------------------------------------------

void AppendingEqualsOpening(Backend& backend, const Kind& kind) {
  DeviceSession device(backend);
  const Text text(kind, kNumTokens, 11, device);
  const auto whole = Open(kind, text, {kNumTokens}, device);
  std::vector<std::vector<int64_t>> splits = {{1, kNumTokens - 1},
                                              {kNumTokens - 1, 1},
                                              {300, 13, 7, 1, 1, 1, 64, 200, 2, kNumTokens - 589}};
  splits.push_back({kNumTokens - 40});
  splits.back().resize(41, 1);  // a token at a time
  for (const std::vector<int64_t>& pieces : splits) {
    const auto grown = Open(kind, text, pieces, device);
    ASSERT_EQ(grown->num_tokens(), whole->num_tokens());
    EXPECT_EQ(grown->segmentation(), whole->segmentation());
    for (int32_t layer = 0; layer < kNumLayers; ++layer) {
      EXPECT_EQ(RestingRows(grown->Keys(layer, kNumTokens), device),
                RestingRows(whole->Keys(layer, kNumTokens), device));
      EXPECT_EQ(RestingRows(grown->Values(layer, kNumTokens), device),
                RestingRows(whole->Values(layer, kNumTokens), device));
    }
    for (const int64_t budget : {int64_t{70}, int64_t{128}, kNumTokens}) {
      EXPECT_EQ(Select(*grown, text, budget, device), Select(*whole, text, budget, device))
          << pieces.size() << " pieces, budget " << budget;
    }
  }
}

void ChoosesWhatItMust(Backend& backend, const Kind& kind) {
  DeviceSession device(backend);
  const Text text(kind, kNumTokens, 12, device);
  const auto sequence = Open(kind, text, {kNumTokens}, device);
  std::vector<int32_t> everything(kNumTokens);
  std::iota(everything.begin(), everything.end(), 0);
  const Selection all = Select(*sequence, text, kNumTokens, device);
  const Selection some = Select(*sequence, text, 96, device);
  const int64_t open_begin = sequence->segmentation().open_begin;
  for (size_t layer = 0; layer < kNumLayers; ++layer) {
    if (layer == kDenseLayer) {
      EXPECT_TRUE(IsPoison(all.tokens[layer]));  // not chosen from, so left alone
      continue;
    }
    for (int32_t group = 0; group < sequence->groups(); ++group) {
      const auto row = [&](const Selection& s) {
        const auto n = static_cast<ptrdiff_t>(s.budget.num_selected);
        return std::vector<int32_t>(s.tokens[layer].begin() + group * n,
                                    s.tokens[layer].begin() + (group + 1) * n);
      };
      EXPECT_EQ(row(all), everything);
      const std::vector<int32_t> chosen = row(some);
      ASSERT_EQ(chosen.size(), static_cast<size_t>(some.budget.num_selected));
      EXPECT_TRUE(std::is_sorted(chosen.begin(), chosen.end(), std::less_equal<>()));
      for (int32_t t = 0; t < kNumTokens; ++t) {
        const ProtectionPolicy& protection = sequence->spec().policy.protection;
        const bool sink = t < protection.num_sink_tokens;
        const bool recent = t >= kNumTokens - protection.num_recent_tokens;
        const bool open =
            kind.segmentation == SegmentationPolicy::Method::kDynamic && t >= open_begin;
        if (sink || recent || open) {
          EXPECT_TRUE(std::binary_search(chosen.begin(), chosen.end(), t)) << "token " << t;
        }
      }
    }
  }
}

// Scores of a layer's candidates, [groups, m], by their own keys as they rest: [groups, m].
std::vector<double> CandidateScores(const ResidentSequence& sequence, const Text& text,
                                    int32_t layer, const std::vector<int32_t>& candidates,
                                    double& relative_error, DeviceSession& device) {
  TensorView keys = sequence.Keys(layer, sequence.num_tokens());
  const std::vector<std::byte> rows = RestingRows(keys, device);
  keys.data = rows.data();
  keys.head_stride_bytes = keys.num_tokens * keys.token_stride_bytes;
  if (keys.scales != nullptr) {
    keys.scales =
        reinterpret_cast<const float*>(rows.data() + keys.num_heads * keys.head_stride_bytes);
  }
  const int32_t groups = sequence.groups();
  const ScoreTokensItem item = {.queries = text.HostQueries(layer),
                                .keys = keys,
                                .tokens = candidates.data(),
                                .num_tokens = static_cast<int64_t>(candidates.size()) / groups,
                                .token_scores = nullptr};
  const auto scale = 1 / std::sqrt(static_cast<float>(kHeadDim));
  const double dot = LargestNorm(item.queries) * LargestNorm(keys) * 1.01;
  relative_error = SoftmaxError(scale, dot, kHeadDim, item.num_tokens) + kNumQueryHeads * kUnit;
  std::vector<double> scores = ScoreTokens(item, groups, scale);
  if (groups > 1) return scores;
  for (size_t i = candidates.size(); i < scores.size(); ++i) {
    scores[i % candidates.size()] += scores[i];
  }
  scores.resize(candidates.size());
  return scores;
}

// `chosen` are the best of `candidates`, but for what is always chosen, and rounding.
void ExpectBestOf(const std::vector<int32_t>& candidates, const std::vector<int32_t>& chosen,
                  const double* scores, double relative_error, const StepBudget& budget) {
  ASSERT_TRUE(std::is_sorted(chosen.begin(), chosen.end(), std::less_equal<>()));
  ASSERT_TRUE(std::includes(candidates.begin(), candidates.end(), chosen.begin(), chosen.end()));
  double worst_chosen = std::numeric_limits<double>::infinity();
  double best_other = 0;
  for (size_t j = 0; j < candidates.size(); ++j) {
    const int32_t t = candidates[j];
    const bool is_chosen = std::binary_search(chosen.begin(), chosen.end(), t);
    if (t < budget.prefix_end || t >= budget.suffix_begin) {
      EXPECT_TRUE(is_chosen) << "token " << t;
    } else if (is_chosen) {
      worst_chosen = std::min(worst_chosen, scores[j]);
    } else {
      best_other = std::max(best_other, scores[j]);
    }
  }
  EXPECT_GE(worst_chosen * (1 + 2 * relative_error), best_other);
}

// Blocks propose as they would choose that many; all tokens where the factor reaches so far.
void TokensDecideAmongCandidates(Backend& backend, const Kind& kind) {
  DeviceSession device(backend);
  const Text text(kind, kNumTokens, 19, device);
  Kind by_blocks = kind;
  by_blocks.refinement = 1;
  const auto proposing = Open(by_blocks, text, {kNumTokens}, device);
  for (const int32_t factor : {2, 5, 16}) {
    Kind refined = kind;
    refined.refinement = factor;
    const auto sequence = Open(refined, text, {kNumTokens - 21, 21}, device);
    for (const int64_t budget : {int64_t{60}, int64_t{90}}) {
      SCOPED_TRACE("factor " + std::to_string(factor) + ", budget " + std::to_string(budget));
      const Selection selection = Select(*sequence, text, budget, device);
      const int64_t num_candidates = std::min(factor * budget, kNumTokens);
      ASSERT_EQ(selection.budget.num_candidates, num_candidates);
      const Selection proposed = Select(*proposing, text, num_candidates, device);
      EXPECT_TRUE(Selection::SameBits(selection.scores, proposed.scores));
      for (const int64_t each : {budget, kNumTokens}) {  // whether scores are wanted or not
        Pending unasked = MakeStep(*sequence, text, each, device);
        unasked.step.block_scores = nullptr;
        ASSERT_TRUE(SelectSteps({&unasked.step, 1}, backend, device.stream()).ok());
        EXPECT_EQ(Finish(std::move(unasked), device).tokens,
                  Select(*sequence, text, each, device).tokens);
      }
      for (int32_t layer = 0; layer < kNumLayers; ++layer) {
        if (layer == kDenseLayer) continue;
        double error = 0;
        const std::vector<double> scores = CandidateScores(
            *sequence, text, layer, proposed.tokens[static_cast<size_t>(layer)], error, device);
        const auto group_of = [&](const Selection& from, int32_t group) {
          const std::vector<int32_t>& all = from.tokens[static_cast<size_t>(layer)];
          const auto n = static_cast<ptrdiff_t>(from.budget.num_selected);
          return std::vector<int32_t>(all.begin() + group * n, all.begin() + (group + 1) * n);
        };
        for (int32_t group = 0; group < sequence->groups(); ++group) {
          ExpectBestOf(group_of(proposed, group), group_of(selection, group),
                       scores.data() + group * num_candidates, error, selection.budget);
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

void MovingChangesNothing(Backend& backend, const Kind& kind) {
  DeviceSession device(backend);
  const Text text(kind, kNumTokens, 13, device);
  const auto sequence = Open(kind, text, {kNumTokens - 30}, device);
  const Selection before = Select(*sequence, text, 100, device);
  const std::vector<std::byte> rows = RestingRows(sequence->Keys(0, kNumTokens - 30), device);
  const int64_t device_bytes = sequence->device_bytes();
  ASSERT_TRUE(sequence->MoveTo(Residence::kHost, device.stream()).ok());
  EXPECT_EQ(sequence->host_bytes(), sequence->layout().key_value_bytes);
  EXPECT_EQ(sequence->device_bytes(), device_bytes - sequence->layout().key_value_bytes);
  EXPECT_EQ(Select(*sequence, text, 100, device), before);
  EXPECT_EQ(RestingRows(sequence->Keys(0, kNumTokens - 30), device), rows);
  Grow(*sequence, text, 30, device.stream());  // grows where it lies
  ASSERT_TRUE(sequence->MoveTo(Residence::kDevice, device.stream()).ok());
  EXPECT_EQ(sequence->device_bytes(), device_bytes);
  const auto stayed = Open(kind, text, {kNumTokens - 30, 30}, device);
  EXPECT_EQ(Select(*sequence, text, 100, device), Select(*stayed, text, 100, device));
  EXPECT_EQ(RestingRows(sequence->Values(2, kNumTokens), device),
            RestingRows(stayed->Values(2, kNumTokens), device));
}

void SequencesDoNotMix(Backend& backend, const Kind& kind) {
  DeviceSession device(backend);
  std::vector<std::unique_ptr<Text>> texts;
  std::vector<std::unique_ptr<ResidentSequence>> sequences;
  for (int64_t i = 0; i < 5; ++i) {
    texts.push_back(std::make_unique<Text>(kind, kNumTokens - 150 * i, 20 + i, device));
    // Another kind in between, so that the step falls into several launches.
    Kind own = kind;
    if (i == 2) own.scope = Scope::kLayer;
    if (i == 3) own.refinement = kind.refinement == 1 ? 16 : 1;
    sequences.push_back(Open(own, *texts.back(), {texts.back()->num_tokens()}, device));
  }
  std::vector<Pending> pending;
  std::vector<SelectionStep> steps;
  for (size_t i = 0; i < texts.size(); ++i) {
    pending.push_back(MakeStep(*sequences[i], *texts[i], 64 + static_cast<int64_t>(i), device));
    steps.push_back(pending.back().step);
  }
  const absl::Status status = SelectSteps(steps, backend, device.stream());
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < texts.size(); ++i) {
    const Selection together = Finish(std::move(pending[i]), device);
    EXPECT_EQ(together, Select(*sequences[i], *texts[i], 64 + static_cast<int64_t>(i), device))
        << "sequence " << i;
  }
}

// The index outgrows what was foreseen: all tokens are delimiters, so blocks are short.
void IndexGrows(Backend& backend, const Kind& kind) {
  DeviceSession device(backend);
  Kind own = kind;
  const Text text(own, kNumTokens, 14, device);
  ResidentSpec spec = SpecOf(own, 20, kNumTokens);
  spec.policy.segmentation.block_size = 14;
  std::vector<int32_t> ids(kNumTokens, 1);
  const auto make = [&] {
    return ResidentSequence::Create(spec, TestProfile(), Residence::kDevice, backend).value();
  };
  const auto add = [&](ResidentSequence& sequence, int64_t count) {
    const int64_t begin = sequence.num_tokens();
    const auto piece =
        std::span(ids).subspan(static_cast<size_t>(begin), static_cast<size_t>(count));
    ASSERT_TRUE(sequence.Begin(piece, count, device.stream()).ok());
    for (int32_t layer = 0; layer < kNumLayers; ++layer) {
      ASSERT_TRUE(sequence.StoreLayer(text.Layer(layer, begin, count), device.stream()).ok());
    }
    ASSERT_TRUE(sequence.Commit(device.stream()).ok());
  };
  spec.policy.segmentation.max_deviation = 13;
  const auto grown = make();
  add(*grown, 20);
  const int64_t first_capacity = grown->layout().block_capacity;
  for (int i = 0; i < 10; ++i) add(*grown, 60);
  if (kind.segmentation == SegmentationPolicy::Method::kDynamic) {
    EXPECT_GE(grown->layout().block_capacity, first_capacity);
  }
  const auto whole = make();
  add(*whole, 620);
  EXPECT_EQ(Select(*grown, text, 100, device), Select(*whole, text, 100, device));
}

void RowsFollowTheSelection(Backend& backend, const Kind& kind) {
  DeviceSession device(backend);
  const Text text(kind, kNumTokens, 15, device);
  const auto sequence = Open(kind, text, {kNumTokens - 60}, device);
  constexpr int64_t kRows = 80;
  RowSlots slots = EmptySlots(*sequence, 0, kNumLayers, kRows, backend, device.stream()).value();
  const int64_t num_slots = int64_t{kNumLayers} * kNumKvHeads * kRows;
  const int64_t row_bytes = kHeadDim * DTypeBytes(sequence->layout().key_dtype);
  const bool quantized = IsQuantized(sequence->layout().key_dtype);
  Output<std::byte> keys = device.Poisoned<std::byte>(num_slots * row_bytes);
  Output<std::byte> values = device.Poisoned<std::byte>(num_slots * row_bytes);
  Output<float> key_scales = device.Poisoned<float>(quantized ? num_slots : 0);
  Output<float> value_scales = device.Poisoned<float>(quantized ? num_slots : 0);
  const RowDestination rows = {.keys = keys.data(),
                               .values = values.data(),
                               .key_scales = quantized ? key_scales.data() : nullptr,
                               .value_scales = quantized ? value_scales.data() : nullptr};
  for (int i = 0; i < 6; ++i) {
    Pending pending = MakeStep(*sequence, text, kRows, device);
    Output<int32_t> moved = device.Poisoned<int32_t>(int64_t{kNumLayers} * kNumKvHeads);
    ASSERT_TRUE(SelectSteps({&pending.step, 1}, backend, device.stream()).ok());
    const SlotRefresh refresh[] = {{.step = &pending.step,
                                    .slots = &slots,
                                    .rows = rows,
                                    .moved_slots = nullptr,
                                    .num_moved = moved.data()}};
    const absl::Status status = RefreshSlots(refresh, backend, device.stream());
    ASSERT_TRUE(status.ok()) << status;
    const std::vector<int32_t> counts = device.Read(std::move(moved));
    const Selection selection = Finish(std::move(pending), device);
    Output<int32_t> held_copy = device.Poisoned<int32_t>(num_slots);
    ASSERT_TRUE(backend
                    .Copy(reinterpret_cast<std::byte*>(held_copy.data()), slots.held.data(),
                          num_slots * 4, device.stream())
                    .ok());
    const std::vector<int32_t> held = device.Read(std::move(held_copy));
    for (int32_t layer = 0; layer < kNumLayers; ++layer) {
      if (layer == kDenseLayer) continue;
      for (int32_t head = 0; head < kNumKvHeads; ++head) {
        const auto row = static_cast<ptrdiff_t>((layer * kNumKvHeads + head) * kRows);
        std::vector<int32_t> have(held.begin() + row, held.begin() + row + kRows);
        std::sort(have.begin(), have.end());
        const int32_t group = sequence->groups() == 1 ? 0 : head;
        const std::vector<int32_t>& tokens = selection.tokens[static_cast<size_t>(layer)];
        EXPECT_EQ(have, std::vector<int32_t>(tokens.begin() + group * kRows,
                                             tokens.begin() + (group + 1) * kRows));
        const int32_t count = counts[static_cast<size_t>(layer * kNumKvHeads + head)];
        EXPECT_LE(count, kRows);
        if (i == 0) {
          EXPECT_EQ(count, kRows);
        }
      }
    }
    Grow(*sequence, text, 10, device.stream());
    // Rows are checked at the last step, when each has been there for a while or is new.
    if (i < 5) continue;
    const std::vector<std::byte> key_rows = device.Read(std::move(keys));
    const std::vector<std::byte> value_rows = device.Read(std::move(values));
    for (int32_t layer = 0; layer < kNumLayers; ++layer) {
      if (layer == kDenseLayer) continue;
      const int64_t length = sequence->num_tokens();
      const std::vector<std::byte> all_keys = RestingRows(sequence->Keys(layer, length), device);
      const std::vector<std::byte> all_values =
          RestingRows(sequence->Values(layer, length), device);
      for (int64_t slot = 0; slot < kNumKvHeads * kRows; ++slot) {
        const int64_t at = layer * kNumKvHeads * kRows + slot;
        const int64_t token = held[static_cast<size_t>(at)];
        const int64_t from = (slot / kRows * length + token) * row_bytes;
        EXPECT_EQ(std::memcmp(key_rows.data() + at * row_bytes, all_keys.data() + from,
                              static_cast<size_t>(row_bytes)),
                  0);
        EXPECT_EQ(std::memcmp(value_rows.data() + at * row_bytes, all_values.data() + from,
                              static_cast<size_t>(row_bytes)),
                  0);
      }
    }
  }
}

// Attention over a selection of everything is attention over everything.
void FullBudgetIsFullAttention(Backend& backend, const Kind& kind) {
  DeviceSession device(backend);
  const Text text(kind, kNumTokens, 16, device);
  const auto sequence = Open(kind, text, {kNumTokens}, device);
  Pending pending = MakeStep(*sequence, text, kNumTokens, device);
  ASSERT_TRUE(SelectSteps({&pending.step, 1}, backend, device.stream()).ok());
  const int64_t num_outputs = int64_t{kNumQueryHeads} * kHeadDim;
  const auto attend = [&](const int32_t* tokens) {
    Output<uint16_t> output = device.Poisoned<uint16_t>(num_outputs);
    AttendTokensItem item = {
        .queries = DenseView(text.queries(), DType::kBFloat16, 1, kNumQueryHeads, kHeadDim),
        .keys = sequence->Keys(0, kNumTokens),
        .values = sequence->Values(0, kNumTokens),
        .tokens = tokens,
        .num_tokens = kNumTokens,
        .tail_keys = sequence->Keys(0, 0),
        .tail_values = sequence->Values(0, 0),
        .output = output.data(),
        .lse = nullptr};
    const absl::Status status = backend.AttendTokens(
        {.items = {&item, 1}, .groups = sequence->groups(), .softmax_scale = 0.125F},
        device.stream());
    EXPECT_TRUE(status.ok()) << status;
    return device.Read(std::move(output));
  };
  EXPECT_EQ(attend(pending.step.tokens), attend(nullptr));
}

void WeighsWhatWasPlanned(Backend& backend, const Kind& kind) {
  const int64_t device_before = backend.device_bytes_in_use();
  const int64_t host_before = backend.host_bytes_in_use();
  {
    DeviceSession device(backend);
    const Text text(kind, kNumTokens, 17, device);
    const int64_t device_inputs = backend.device_bytes_in_use();
    const int64_t host_inputs = backend.host_bytes_in_use();
    const auto sequence = Open(kind, text, {kNumTokens}, device, Residence::kHost);
    EXPECT_EQ(backend.device_bytes_in_use() - device_inputs, sequence->device_bytes());
    EXPECT_EQ(backend.host_bytes_in_use() - host_inputs, sequence->host_bytes());
    EXPECT_EQ(sequence->host_bytes(), sequence->layout().key_value_bytes);
    EXPECT_EQ(sequence->device_bytes(), sequence->layout().index_bytes);
  }
  EXPECT_EQ(backend.device_bytes_in_use(), device_before);
  EXPECT_EQ(backend.host_bytes_in_use(), host_before);
}

void RefusesWhatDoesNotFit(Backend& backend, const Kind& kind) {
  DeviceSession device(backend);
  const Text text(kind, kNumTokens, 18, device);
  const auto sequence = Open(kind, text, {kNumTokens}, device);  // room for five more
  const Selection before = Select(*sequence, text, 90, device);
  const std::vector<int32_t> ids(6, 0);
  EXPECT_EQ(sequence->Begin(ids, 6, device.stream()).code(), absl::StatusCode::kResourceExhausted);
  const std::vector<int32_t> negative = {0, -1};
  const bool reads_ids = ReadsTokenIds(sequence->spec().policy.segmentation);
  const absl::Status status = sequence->Begin(negative, 2, device.stream());
  EXPECT_EQ(status.code(), reads_ids ? absl::StatusCode::kInvalidArgument : absl::StatusCode::kOk);
  if (status.ok()) sequence->Abort();
  const std::vector<int32_t> fine = {0, 1};
  ASSERT_TRUE(sequence->Begin(fine, 2, device.stream()).ok());
  ASSERT_TRUE(sequence->StoreLayer(text.Layer(0, 0, 2), device.stream()).ok());
  sequence->Abort();  // half way
  EXPECT_EQ(Select(*sequence, text, 90, device), before);
  EXPECT_EQ(BudgetOfStep(*sequence, kNumTokens + 1).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(BudgetOfStep(*sequence, 1).value().raised_by_protection);
}

// -- registration ---------------------------------------------------------------------------------

using Property = void (*)(Backend&, const Kind&);

class ResidentTest : public testing::Test {
 public:
  ResidentTest(BackendFactory backend, Property property, const Kind& kind)
      : backend_(std::move(backend)), property_(property), kind_(kind) {}
  void TestBody() override {
    Backend* backend = backend_();
    if (backend == nullptr) GTEST_SKIP() << "no such device here";
    property_(*backend, kind_);
  }

 private:
  BackendFactory backend_;
  Property property_;
  const Kind& kind_;
};

struct NamedProperty {
  const char* name;
  Property property;
};

constexpr NamedProperty kProperties[] = {
    {"AppendingEqualsOpening", AppendingEqualsOpening},
    {"ChoosesWhatItMust", ChoosesWhatItMust},
    {"TokensDecideAmongCandidates", TokensDecideAmongCandidates},
    {"MovingChangesNothing", MovingChangesNothing},
    {"SequencesDoNotMix", SequencesDoNotMix},
    {"IndexGrows", IndexGrows},
    {"RowsFollowTheSelection", RowsFollowTheSelection},
    {"FullBudgetIsFullAttention", FullBudgetIsFullAttention},
    {"WeighsWhatWasPlanned", WeighsWhatWasPlanned},
    {"RefusesWhatDoesNotFit", RefusesWhatDoesNotFit},
};

}  // namespace

int RegisterResidentTests(const std::string& prefix, BackendFactory backend) {
  const std::string suite = prefix + "Resident";
  int count = 0;
  for (const NamedProperty& property : kProperties) {
    for (const Kind& kind : kKinds) {
      const std::string name = std::string(property.name) + "/" + kind.name;
      testing::RegisterTest(suite.c_str(), name.c_str(), nullptr, nullptr, __FILE__, __LINE__,
                            [backend, property, &kind]() -> ResidentTest* {
                              return new ResidentTest(backend, property.property, kind);
                            });
      ++count;
    }
  }
  return count;
}

}  // namespace dynsplit::oracle

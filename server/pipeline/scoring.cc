// SPDX-License-Identifier: Apache-2.0
//
// Stage 2, what matters: evidence of one layer -> token and block scores, on the device.
#include <array>
#include <numbers>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/pipeline/compress.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/stage_inputs.h"

namespace dynsplit {
namespace {

using Method = ScoringPolicy::Method;
constexpr int64_t kFloatBytes = 4;

absl::StatusOr<Buffer> AllocateFloats(int64_t count, Backend& backend, Stream& stream) {
  return backend.Allocate(count * kFloatBytes, stream);
}

// The last `num_rows` of `queries`, which are dense along tokens.
TensorView LastRows(TensorView queries, int64_t num_rows) {
  queries.data += (queries.num_tokens - num_rows) * queries.token_stride_bytes;
  queries.num_tokens = num_rows;
  return queries;
}

int32_t NumGroups(const SequenceContext& context) {
  return context.spec.policy.scope == Scope::kLayerHead ? context.spec.shape.num_kv_heads : 1;
}

// One layer's way through the stage.
class LayerScorer {
 public:
  LayerScorer(const SequenceContext& context, const LayerTensors& tensors, Backend& backend,
              Stream& stream)
      : context_(context),
        spec_(context.spec),
        policy_(context.spec.policy.scoring),
        tensors_(tensors),
        backend_(backend),
        stream_(stream) {}

  absl::StatusOr<LayerScores> Score() {
    switch (policy_.method) {
      case Method::kRecency:
        return RecencyScores();
      case Method::kBlockBound:
      case Method::kBlockMeanKey:
        return SummaryScores();
      case Method::kKeyNorm:
      case Method::kKeyDifference:
        return FromHeadTokens(KeyScores());
      case Method::kWindowQueries:
        return FromHeadTokens(WindowScores());
      case Method::kAccumulated:
        return FromHeadTokens(AccumulatedScores());
    }
    return absl::InternalError("unknown scoring method");
  }

 private:
  int64_t num_tokens() const { return spec_.shape.num_tokens; }
  int64_t num_blocks() const { return context_.segmentation.num_blocks(); }
  int32_t num_kv_heads() const { return spec_.shape.num_kv_heads; }

  absl::StatusOr<LayerScores> RecencyScores() const {
    LayerScores scores;
    scores.groups = NumGroups(context_);
    std::byte* ranks = context_.recency_device.data();
    const int64_t token_bytes = scores.groups * num_tokens() * kFloatBytes;
    scores.token_scores = Buffer(ranks, token_bytes, nullptr);
    scores.block_scores =
        Buffer(ranks + token_bytes, scores.groups * num_blocks() * kFloatBytes, nullptr);
    return scores;
  }

  absl::StatusOr<Buffer> KeyScores() {
    absl::StatusOr<Buffer> scores =
        AllocateFloats(num_kv_heads() * num_tokens(), backend_, stream_);
    if (!scores.ok()) return scores;
    const ScoreKeysParams params = {
        .keys = tensors_.keys, .method = policy_.method, .scores = scores->as<float>()};
    if (auto status = backend_.ScoreKeys(params, stream_); !status.ok()) return status;
    return scores;
  }

  absl::StatusOr<Buffer> WindowScores() {
    const int64_t window = NumScoringQueries(spec_);
    Buffer natural_lse_host;
    Buffer natural_lse;
    const float* lse = nullptr;
    if (tensors_.lse != nullptr) {
      lse = tensors_.lse + (spec_.supply.num_window_queries - window) * spec_.shape.num_query_heads;
      if (policy_.lse_base_2) {
        auto status = ToNaturalLse(lse, window, natural_lse_host, natural_lse);
        if (!status.ok()) return status;
        lse = natural_lse.as<float>();
      }
    }
    absl::StatusOr<Buffer> scores =
        AllocateFloats(num_kv_heads() * num_tokens(), backend_, stream_);
    if (!scores.ok()) return scores;
    const ScoreWindowParams params = {.queries = LastRows(tensors_.queries, window),
                                      .keys = tensors_.keys,
                                      .lse = lse,
                                      .softmax_scale = SoftmaxScale(spec_),
                                      .pooling_kernel = policy_.pooling_kernel,
                                      .pooling = policy_.pooling,
                                      .reduction = policy_.query_reduction,
                                      .scores = scores->as<float>()};
    absl::Status status = backend_.ScoreWindow(params, stream_);
    // The converted values must live until they were read.
    if (!natural_lse_host.empty()) status.Update(stream_.Synchronize());
    if (!status.ok()) return status;
    return scores;
  }

  // W * Hq numbers: converted on the host, so that no backend needs an operation for it.
  absl::Status ToNaturalLse(const float* base_2, int64_t window, Buffer& host, Buffer& device) {
    const int64_t count = window * spec_.shape.num_query_heads;
    auto* bytes = const_cast<std::byte*>(reinterpret_cast<const std::byte*>(base_2));
    const absl::StatusOr<Buffer> original =
        backend_.ToHost(Buffer(bytes, count * kFloatBytes, nullptr), stream_);
    if (!original.ok()) return original.status();
    if (auto status = stream_.Synchronize(); !status.ok()) return status;
    absl::StatusOr<Buffer> natural = backend_.AllocateHost(count * kFloatBytes);
    if (!natural.ok()) return natural.status();
    for (int64_t i = 0; i < count; ++i) {
      const double value = static_cast<double>(original->as<float>()[i]);
      natural->as<float>()[i] = static_cast<float>(value * std::numbers::ln2);
    }
    host = *std::move(natural);
    absl::StatusOr<Buffer> copy = backend_.ToDevice(host, stream_);
    if (!copy.ok()) return copy.status();
    device = *std::move(copy);
    return absl::OkStatus();
  }

  // Query heads of a group count alike: their mean, as window attention takes it.
  absl::StatusOr<Buffer> AccumulatedScores() {
    return Reduce(tensors_.accumulated, spec_.supply.accumulated_rows, num_kv_heads(), num_tokens(),
                  /*mean=*/true);
  }

  absl::StatusOr<Buffer> Reduce(const float* in, int32_t rows_in, int32_t rows_out, int64_t columns,
                                bool mean) {
    absl::StatusOr<Buffer> out = AllocateFloats(rows_out * columns, backend_, stream_);
    if (!out.ok()) return out;
    const ReduceRowsParams params = {.in = in,
                                     .rows_in = rows_in,
                                     .rows_out = rows_out,
                                     .columns = columns,
                                     .mean = mean,
                                     .accumulate = false,
                                     .out = out->as<float>()};
    if (auto status = backend_.ReduceRows(params, stream_); !status.ok()) return status;
    return out;
  }

  // A set shared by the heads ranks by the sum over heads, as ChunkKV's reference does.
  absl::StatusOr<Buffer> ToGroups(Buffer head_scores, int64_t columns) {
    if (NumGroups(context_) == num_kv_heads()) return head_scores;
    return Reduce(head_scores.as<float>(), num_kv_heads(), 1, columns, /*mean=*/false);
  }

  // [Hkv, T] -> scores of the scope's groups.
  absl::StatusOr<LayerScores> FromHeadTokens(absl::StatusOr<Buffer> head_scores) {
    if (!head_scores.ok()) return head_scores.status();
    absl::StatusOr<Buffer> token_scores = ToGroups(*std::move(head_scores), num_tokens());
    if (!token_scores.ok()) return token_scores.status();
    LayerScores scores;
    scores.groups = NumGroups(context_);
    if (num_blocks() == num_tokens()) {  // every token is its block, and its score the block's
      scores.block_scores = *std::move(token_scores);
      return scores;
    }
    absl::StatusOr<Buffer> block_scores =
        AllocateFloats(scores.groups * num_blocks(), backend_, stream_);
    if (!block_scores.ok()) return block_scores.status();
    const ReduceBlocksParams params = {.token_scores = token_scores->as<float>(),
                                       .rows = scores.groups,
                                       .num_tokens = num_tokens(),
                                       .block_starts = context_.block_starts.as<int32_t>(),
                                       .num_blocks = num_blocks(),
                                       .reduction = policy_.block_reduction,
                                       .block_scores = block_scores->as<float>()};
    if (auto status = backend_.ReduceBlocks(params, stream_); !status.ok()) return status;
    scores.token_scores = *std::move(token_scores);
    scores.block_scores = *std::move(block_scores);
    return scores;
  }

  // Fixed-size representation of the blocks.
  struct Summaries {
    DType dtype = DType::kFloat32;
    Buffer min, max, mean;  // the first two, or the last
  };

  BlockSummaries View(const Summaries& summaries) const {
    return DenseSummaries(summaries.dtype, num_kv_heads(), spec_.shape.head_dim,
                          summaries.min.data(), summaries.max.data(), summaries.mean.data());
  }

  // Bounds are exact in the keys' own type; a mean would be rounded there, so it is kept in float.
  absl::StatusOr<Summaries> Summarize() {
    const bool mean = policy_.method == Method::kBlockMeanKey;
    Summaries summaries;
    if (!mean && !IsQuantized(tensors_.keys.dtype)) summaries.dtype = tensors_.keys.dtype;
    const int64_t summary_bytes =
        num_blocks() * num_kv_heads() * spec_.shape.head_dim * DTypeBytes(summaries.dtype);
    const std::vector<Buffer*> wanted = mean ? std::vector<Buffer*>{&summaries.mean}
                                             : std::vector<Buffer*>{&summaries.min, &summaries.max};
    for (Buffer* summary : wanted) {
      absl::StatusOr<Buffer> buffer = backend_.Allocate(summary_bytes, stream_);
      if (!buffer.ok()) return buffer.status();
      *summary = *std::move(buffer);
    }
    const SummarizeBlocksParams params = {.keys = tensors_.keys,
                                          .block_starts = context_.block_starts.as<int32_t>(),
                                          .first_block = 0,
                                          .num_blocks = num_blocks(),
                                          .summaries = View(summaries)};
    if (auto status = backend_.SummarizeBlocks(params, stream_); !status.ok()) return status;
    return summaries;
  }

  // Queries against the summaries.
  absl::StatusOr<LayerScores> SummaryScores() {
    const absl::StatusOr<Summaries> summaries = Summarize();
    if (!summaries.ok()) return summaries.status();
    absl::StatusOr<Buffer> head_scores =
        AllocateFloats(num_kv_heads() * num_blocks(), backend_, stream_);
    if (!head_scores.ok()) return head_scores.status();
    const ScoreBlocksItem item = {.queries = LastRows(tensors_.queries, NumScoringQueries(spec_)),
                                  .summaries = View(*summaries),
                                  .block_starts = context_.block_starts.as<int32_t>(),
                                  .num_blocks = num_blocks(),
                                  .block_scores = head_scores->as<float>()};
    const ScoreBlocksParams params = {
        .items = {&item, 1}, .num_kv_heads = num_kv_heads(), .softmax_scale = SoftmaxScale(spec_)};
    if (auto status = backend_.ScoreBlocks(params, stream_); !status.ok()) return status;
    absl::StatusOr<Buffer> block_scores = ToGroups(*std::move(head_scores), num_blocks());
    if (!block_scores.ok()) return block_scores.status();
    LayerScores scores;
    scores.groups = NumGroups(context_);
    scores.block_scores = *std::move(block_scores);
    return scores;
  }

  const SequenceContext& context_;
  const SequenceSpec& spec_;
  const ScoringPolicy& policy_;
  const LayerTensors& tensors_;
  Backend& backend_;
  Stream& stream_;
};

absl::Status Accumulate(const Buffer& in, int64_t count, Buffer& total, Backend& backend,
                        Stream& stream) {
  if (in.empty()) return absl::OkStatus();
  const ReduceRowsParams params = {.in = in.as<float>(),
                                   .rows_in = 1,
                                   .rows_out = 1,
                                   .columns = count,
                                   .mean = false,
                                   .accumulate = true,
                                   .out = total.as<float>()};
  return backend.ReduceRows(params, stream);
}

}  // namespace

absl::StatusOr<FiniteCheck> EnqueueFiniteCheck(std::span<const LayerTensors> layers,
                                               Backend& backend, Stream& stream) {
  struct Check {
    const char* name;
    TensorView LayerTensors::*tensor;
  };
  constexpr std::array<Check, 3> kChecks = {{{"keys", &LayerTensors::keys},
                                             {"values", &LayerTensors::values},
                                             {"queries", &LayerTensors::queries}}};
  absl::StatusOr<Buffer> found = backend.Allocate(
      static_cast<int64_t>(layers.size() * kChecks.size() * sizeof(int32_t)), stream);
  if (!found.ok()) return found.status();
  FiniteCheck result;
  std::vector<CheckFiniteItem> items;
  items.reserve(layers.size() * kChecks.size());
  size_t slot = 0;
  for (const LayerTensors& layer : layers) {
    for (const Check& check : kChecks) {
      const TensorView& tensor = layer.*check.tensor;
      if (tensor.data != nullptr) {
        items.push_back({.tensor = tensor, .first_bad_token = found->as<int32_t>() + slot});
        result.asked_.push_back({.layer = layer.layer,
                                 .name = check.name,
                                 .num_tokens = tensor.num_tokens,
                                 .slot = slot});
      }
      ++slot;
    }
  }
  if (auto status = backend.CheckFinite({.items = items}, stream); !status.ok()) return status;
  absl::StatusOr<Buffer> host = backend.ToHost(*std::move(found), stream);
  if (!host.ok()) return host.status();
  result.first_bad_ = *std::move(host);
  return result;
}

absl::Status FiniteCheck::Verdict() const {
  for (const Asked& asked : asked_) {
    const int32_t token = first_bad_.as<int32_t>()[asked.slot];
    if (token == asked.num_tokens) continue;
    return InvalidField(
        absl::StrCat("tensors.", asked.name),
        absl::StrCat("of layer ", asked.layer, " holds a NaN or an infinity at row ", token,
                     "; all values must be finite"));
  }
  return absl::OkStatus();
}

absl::Status CheckLayersFinite(std::span<const LayerTensors> layers, Backend& backend,
                               Stream& stream) {
  const absl::StatusOr<FiniteCheck> check = EnqueueFiniteCheck(layers, backend, stream);
  if (!check.ok()) return check.status();
  if (auto status = stream.Synchronize(); !status.ok()) return status;
  return check->Verdict();
}

absl::Status CheckLayerFinite(const LayerTensors& tensors, Backend& backend, Stream& stream) {
  return CheckLayersFinite({&tensors, 1}, backend, stream);
}

absl::StatusOr<LayerScores> ScoreLayer(const SequenceContext& context, const LayerTensors& tensors,
                                       Backend& backend, Stream& stream) {
  const absl::StatusOr<LayerBudget> budget = BudgetOf(context, tensors.layer);
  if (!budget.ok()) return budget.status();
  if (KeepsEverything(context, *budget)) return LayerScores();
  return LayerScorer(context, tensors, backend, stream).Score();
}

absl::Status AccumulateScores(const SequenceContext& context, LayerScores scores,
                              LayerScores& total, Backend& backend, Stream& stream) {
  if (scores.groups == 0) return absl::OkStatus();
  if (total.groups == 0) {
    total = std::move(scores);
    return absl::OkStatus();
  }
  // Ranks by recency are the same in all layers; adding them up could only round them together.
  if (context.spec.policy.scoring.method == Method::kRecency) return absl::OkStatus();
  if (auto status = Accumulate(scores.token_scores, total.groups * context.spec.shape.num_tokens,
                               total.token_scores, backend, stream);
      !status.ok()) {
    return status;
  }
  return Accumulate(scores.block_scores, total.groups * context.segmentation.num_blocks(),
                    total.block_scores, backend, stream);
}

}  // namespace dynsplit

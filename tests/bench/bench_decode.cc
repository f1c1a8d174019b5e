// SPDX-License-Identifier: Apache-2.0
//
// One decode step on resident KV: one layer of Llama-3.1-8B's shape (32 query heads, 8 KV heads,
// D 128, bf16, head-major), blocks of 8 to 20 tokens, one query a head, tokens chosen per KV head.
// Inputs come from memory (ColdTimer). GB/s counts each input byte that the operation needs once;
// "share" is that rate against the ceiling named. "all KV" is the time that reading K and V of all
// tokens takes at the measured read rate: what no attention over everything can beat.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/operations.h"
#include "tests/bench/device_bench.h"
#include "tests/oracle/random_tensors.h"

namespace dynsplit::bench {
namespace {

constexpr int32_t kQueryHeads = 32;
constexpr int32_t kHeads = 8;
constexpr int32_t kDim = 128;
constexpr int64_t kRowBytes = kDim * 2;
constexpr float kScale = 0.08838835F;  // 1 / sqrt(128)
constexpr int64_t kSinkTokens = 4;
constexpr int64_t kRecentTokens = 32;
constexpr int32_t kModelLayers = 32;
constexpr int64_t kRefinementFactor = 4;  // of preset dynsplit_index

// Bounds of one layer's blocks, laid out as a resident sequence lays them out: a block's minima,
// then its maxima.
struct Bounds {
  Buffer rows;
  Buffer scales;
  BlockSummaries view;
};

// One layer of one sequence.
struct Layer {
  Buffer keys;
  Buffer values;
  Buffer queries;
  Bounds narrow;  // e4m3
  Bounds wide;    // bfloat16
  Buffer block_scores;
  Buffer tokens;
  Buffer candidates, token_scores;  // of a refined step
  Buffer output;
};

TensorView HeadMajor(const std::byte* data, int64_t num_tokens) {
  TensorView view = DenseView(data, DType::kBFloat16, num_tokens, kHeads, kDim);
  view.token_stride_bytes = kRowBytes;
  view.head_stride_bytes = num_tokens * kRowBytes;
  return view;
}

// A CUDA graph of what `enqueue` gives to the device's stream.
class Graph {
 public:
  Graph(const Device& device, const std::function<void()>& enqueue)
      : stream_(device.launch.stream) {
    cudaGraph_t graph = nullptr;
    Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    enqueue();
    Check(cudaStreamEndCapture(stream_, &graph));
    Check(cudaGraphInstantiate(&instance_, graph, 0));
    Check(cudaGraphDestroy(graph));
  }
  ~Graph() { (void)cudaGraphExecDestroy(instance_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void Launch() const { Check(cudaGraphLaunch(instance_, stream_)); }

 private:
  const cudaStream_t stream_;
  cudaGraphExec_t instance_ = nullptr;
};

// Layers of equal length, chosen from and attended to in one call each.
class DecodeBench {
 public:
  DecodeBench(const Device& device, const Ceilings& ceilings, const ColdTimer& timer,
              RandomSource& random, int64_t num_tokens, int batch)
      : device_(device), ceilings_(ceilings), timer_(timer), num_tokens_(num_tokens) {
    const oracle::ParityShape shape = {.name = "bench", .num_tokens = num_tokens};
    const std::vector<int32_t> starts = oracle::RandomBlockStarts(shape, 1);
    num_blocks_ = static_cast<int64_t>(starts.size()) - 1;
    starts_ = Upload(device, starts);
    layers_.resize(static_cast<size_t>(batch));
    for (Layer& layer : layers_) Fill(layer, random);
  }

  // Each operation by itself, at budgets of 10, 5 and 20 %.
  void RunOperations() {
    const double batch = static_cast<double>(layers_.size());
    Report("summarize e4m3", (KeyBytes() + BoundBytes(DType::kFloat8E4M3)) * batch, Copied(),
           [&] { Summarize(DType::kFloat8E4M3); });
    Report("score_blocks bf16", BoundBytes(DType::kBFloat16) * batch, Read(),
           [&] { ScoreBlocks(DType::kBFloat16); });
    Report("score_blocks e4m3", BoundBytes(DType::kFloat8E4M3) * batch, Read(),
           [&] { ScoreBlocks(DType::kFloat8E4M3); });
    for (int percent : {10, 5, 20}) {
      const int64_t num_selected = num_tokens_ * percent / 100;
      const std::string budget = " " + std::to_string(percent) + "%";
      Report("select_blocks" + budget, (ScoreBytes() + TokenBytes(num_selected)) * batch, Read(),
             [&] { SelectBlocks(num_selected); });
      Report("attend_tokens" + budget, (RowBytes(num_selected) + TokenBytes(num_selected)) * batch,
             Read(), [&] { Attend(num_selected); });
    }
    // What a refined step does in between, at 10 %.
    const int64_t num_selected = num_tokens_ / 10;
    const int64_t num_candidates = kRefinementFactor * num_selected;
    Propose(num_candidates);
    Report("score_tokens 40%", CandidateBytes(num_candidates) * batch, Read(),
           [&] { ScoreTokens(num_candidates); });
    Report("select_blocks 10% of 40%",
           (2 * TokenBytes(num_candidates) + TokenBytes(num_selected)) * batch, Read(),
           [&] { SelectCandidates(num_candidates, num_selected); });
    // What else can attend to everything: the same kernel, told to read all rows.
    Report(
        "attend_tokens all rows", 2 * KeyBytes() * batch, Read(), [&] { AttendAll(); },
        2 * KeyBytes() * batch);
  }

  // Score, select, attend as one graph.
  void RunSteps() {
    const double batch = static_cast<double>(layers_.size());
    for (int percent : {10, 5, 20}) {
      const int64_t num_selected = num_tokens_ * percent / 100;
      const Graph step(device_, [&] {
        ScoreBlocks(DType::kFloat8E4M3);
        SelectBlocks(num_selected);
        Attend(num_selected);
      });
      const double bytes = BoundBytes(DType::kFloat8E4M3) + ScoreBytes() +
                           TokenBytes(num_selected) + RowBytes(num_selected);
      Report(
          "step (graph) " + std::to_string(percent) + "%", bytes * batch, Read(),
          [&] { step.Launch(); }, 2 * KeyBytes() * batch);
    }
  }

  // The same with tokens that decide among candidates.
  void RunRefinedStep() {
    const double batch = static_cast<double>(layers_.size());
    const int64_t num_selected = num_tokens_ / 10;
    const int64_t num_candidates = kRefinementFactor * num_selected;
    const Graph step(device_, [&] {
      ScoreBlocks(DType::kFloat8E4M3);
      Propose(num_candidates);
      ScoreTokens(num_candidates);
      SelectCandidates(num_candidates, num_selected);
      Attend(num_selected);
    });
    const double bytes = BoundBytes(DType::kFloat8E4M3) + ScoreBytes() +
                         CandidateBytes(num_candidates) + 2 * TokenBytes(num_candidates) +
                         TokenBytes(num_selected) + RowBytes(num_selected);
    Report(
        "refined step (graph) 10%", bytes * batch, Read(), [&] { step.Launch(); },
        2 * KeyBytes() * batch);
  }

  // Choosing for all layers of a model in one call each.
  void RunAllLayers() {
    std::vector<Bounds> bounds;
    std::vector<ScoreBlocksItem> score_items;
    std::vector<SelectBlocksItem> select_items;
    std::vector<Buffer> outputs;
    const int64_t num_selected = num_tokens_ / 10;
    for (int i = 0; i < kModelLayers; ++i) {
      const Layer& layer = layers_[static_cast<size_t>(i) % layers_.size()];
      bounds.push_back(Summarized(layer, DType::kFloat8E4M3));
      outputs.push_back(device_.Allocate(kHeads * num_blocks_ * 4));
      ScoreBlocksItem score = ScoreItem(layer, bounds.back().view);
      score.block_scores = outputs.back().as<float>();
      score_items.push_back(score);
      outputs.push_back(device_.Allocate(kHeads * num_selected * 4));
      SelectBlocksItem select = SelectItem(layer, num_selected);
      select.block_scores = score.block_scores;
      select.tokens = outputs.back().as<int32_t>();
      select_items.push_back(select);
    }
    const double bytes = BoundBytes(DType::kFloat8E4M3) + ScoreBytes() + TokenBytes(num_selected);
    Report("score+select 32 layers 10%", bytes * kModelLayers, Read(), [&] {
      Check(kernels::ScoreBlocks(
          {.items = score_items, .num_kv_heads = kHeads, .softmax_scale = kScale}, device_.launch));
      Check(kernels::SelectBlocks({.items = select_items, .groups = kHeads}, device_.launch));
    });
  }

  // Rows as clients send them, [T, Hkv, D], to where they rest.
  void RunStore() {
    const Layer& layer = layers_.front();
    const Buffer rows = device_.Allocate(kHeads * num_tokens_ * kRowBytes);
    const Buffer scales = device_.Allocate(kHeads * num_tokens_ * 4);
    Report("store rows as is", 2 * KeyBytes(), Copied(),
           [&] { Store(layer, EncodingPolicy::Format::kAsIs, rows, scales); });
    Report("store rows fp8", 1.5 * KeyBytes(), Copied(),
           [&] { Store(layer, EncodingPolicy::Format::kFloat8E4M3, rows, scales); });
    Report("store rows int8", 1.5 * KeyBytes(), Copied(),
           [&] { Store(layer, EncodingPolicy::Format::kInt8, rows, scales); });
  }

  // A tenth of the chosen rows is new at each step.
  void RunRefresh() {
    const int64_t num_rows = num_tokens_ / 10;
    RefreshRows("refresh 10% new, device", num_rows, false, {ceilings_.copy_gbps, "copy"}, 2);
    RefreshRows("refresh 10% new, host", num_rows, true, {ceilings_.host_gbps, "host"}, 1);
  }

 private:
  struct Ceiling {
    double gbps;
    const char* name;
  };
  Ceiling Read() const { return {ceilings_.read_gbps, "read"}; }
  Ceiling Copied() const { return {ceilings_.copy_gbps, "copy"}; }

  double KeyBytes() const { return 1.0 * kHeads * kRowBytes * static_cast<double>(num_tokens_); }
  double BoundBytes(DType dtype) const {
    const double scale_bytes = IsQuantized(dtype) ? 4 : 0;
    return (2.0 * kDim * static_cast<double>(DTypeBytes(dtype)) + scale_bytes) * kHeads *
           static_cast<double>(num_blocks_);
  }
  double ScoreBytes() const { return 4.0 * kHeads * static_cast<double>(num_blocks_); }

  static double TokenBytes(int64_t num_selected) {
    return 4.0 * kHeads * static_cast<double>(num_selected);
  }
  // Keys, places and scores.
  static double CandidateBytes(int64_t num_candidates) {
    return RowBytes(num_candidates) / 2 + 2 * TokenBytes(num_candidates);
  }
  // Of K and V.
  static double RowBytes(int64_t num_selected) {
    return 2.0 * kHeads * kRowBytes * static_cast<double>(num_selected);
  }

  Bounds MakeBounds(DType dtype) const {
    const int64_t row_bytes = kDim * DTypeBytes(dtype);
    Bounds bounds;
    bounds.rows = device_.Allocate(kHeads * num_blocks_ * 2 * row_bytes);
    bounds.view.dtype = dtype;
    bounds.view.min = bounds.rows.data();
    bounds.view.max = bounds.rows.data() + row_bytes;
    bounds.view.block_stride_bytes = 2 * row_bytes;
    bounds.view.head_stride_bytes = num_blocks_ * 2 * row_bytes;
    if (IsQuantized(dtype)) {
      bounds.scales = device_.Allocate(kHeads * num_blocks_ * 4);
      bounds.view.bound_scales = bounds.scales.as<float>();
      bounds.view.scale_head_stride = num_blocks_;
    }
    return bounds;
  }
  void Summarize(const Layer& layer, const BlockSummaries& summaries) const {
    Check(kernels::SummarizeBlocks({.keys = HeadMajor(layer.keys.data(), num_tokens_),
                                    .block_starts = starts_.as<int32_t>(),
                                    .num_blocks = num_blocks_,
                                    .summaries = summaries},
                                   device_.launch));
  }
  Bounds Summarized(const Layer& layer, DType dtype) const {
    Bounds bounds = MakeBounds(dtype);
    Summarize(layer, bounds.view);
    return bounds;
  }
  void Fill(Layer& layer, RandomSource& random) const {
    layer.keys = random.Make(kHeads * num_tokens_ * kRowBytes);
    layer.values = random.Make(kHeads * num_tokens_ * kRowBytes);
    layer.queries = random.Make(kQueryHeads * kRowBytes);
    layer.narrow = Summarized(layer, DType::kFloat8E4M3);
    layer.wide = Summarized(layer, DType::kBFloat16);
    layer.block_scores = device_.Allocate(kHeads * num_blocks_ * 4);
    layer.tokens = device_.Allocate(kHeads * num_tokens_ * 4);
    layer.candidates = device_.Allocate(kHeads * num_tokens_ * 4);
    layer.token_scores = device_.Allocate(kHeads * num_tokens_ * 4);
    layer.output = device_.Allocate(kQueryHeads * kRowBytes);
  }

  static TensorView Queries(const Layer& layer) {
    return DenseView(layer.queries.data(), DType::kBFloat16, 1, kQueryHeads, kDim);
  }
  ScoreBlocksItem ScoreItem(const Layer& layer, const BlockSummaries& summaries) const {
    return {.queries = Queries(layer),
            .summaries = summaries,
            .block_starts = starts_.as<int32_t>(),
            .num_blocks = num_blocks_,
            .block_scores = layer.block_scores.as<float>()};
  }
  SelectBlocksItem SelectItem(const Layer& layer, int64_t num_selected) const {
    return {.block_scores = layer.block_scores.as<float>(),
            .block_starts = starts_.as<int32_t>(),
            .num_blocks = num_blocks_,
            .num_tokens = num_tokens_,
            .prefix_end = kSinkTokens,
            .suffix_begin = num_tokens_ - kRecentTokens,
            .num_selected = num_selected,
            .tokens = layer.tokens.as<int32_t>()};
  }
  AttendTokensItem AttendItem(const Layer& layer, const int32_t* tokens, int64_t num_rows) const {
    return {.queries = Queries(layer),
            .keys = HeadMajor(layer.keys.data(), num_tokens_),
            .values = HeadMajor(layer.values.data(), num_tokens_),
            .tokens = tokens,
            .num_tokens = num_rows,
            .tail_keys = DenseView(nullptr, DType::kBFloat16, 0, kHeads, kDim),
            .tail_values = DenseView(nullptr, DType::kBFloat16, 0, kHeads, kDim),
            .output = layer.output.data()};
  }

  void Summarize(DType dtype) const {
    for (const Layer& layer : layers_) Summarize(layer, BoundsOf(layer, dtype));
  }
  static const BlockSummaries& BoundsOf(const Layer& layer, DType dtype) {
    return dtype == DType::kFloat8E4M3 ? layer.narrow.view : layer.wide.view;
  }
  void ScoreBlocks(DType dtype) const {
    std::vector<ScoreBlocksItem> items;
    for (const Layer& layer : layers_) items.push_back(ScoreItem(layer, BoundsOf(layer, dtype)));
    Check(kernels::ScoreBlocks({.items = items, .num_kv_heads = kHeads, .softmax_scale = kScale},
                               device_.launch));
  }
  void SelectBlocks(int64_t num_selected) const {
    std::vector<SelectBlocksItem> items;
    for (const Layer& layer : layers_) items.push_back(SelectItem(layer, num_selected));
    Check(kernels::SelectBlocks({.items = items, .groups = kHeads}, device_.launch));
  }
  void Propose(int64_t num_candidates) const {
    std::vector<SelectBlocksItem> items;
    for (const Layer& layer : layers_) {
      items.push_back(SelectItem(layer, num_candidates));
      items.back().tokens = layer.candidates.as<int32_t>();
    }
    Check(kernels::SelectBlocks({.items = items, .groups = kHeads}, device_.launch));
  }
  void ScoreTokens(int64_t num_candidates) const {
    std::vector<ScoreTokensItem> items;
    for (const Layer& layer : layers_) {
      items.push_back({.queries = Queries(layer),
                       .keys = HeadMajor(layer.keys.data(), num_tokens_),
                       .tokens = layer.candidates.as<int32_t>(),
                       .num_tokens = num_candidates,
                       .token_scores = layer.token_scores.as<float>()});
    }
    Check(kernels::ScoreTokens({.items = items, .groups = kHeads, .softmax_scale = kScale},
                               device_.launch));
  }
  void SelectCandidates(int64_t num_candidates, int64_t num_selected) const {
    std::vector<SelectBlocksItem> items;
    for (const Layer& layer : layers_) {
      items.push_back({.block_scores = layer.token_scores.as<float>(),
                       .block_starts = nullptr,
                       .num_blocks = num_candidates,
                       .num_tokens = num_candidates,
                       .prefix_end = kSinkTokens,
                       .suffix_begin = num_candidates - kRecentTokens,
                       .num_selected = num_selected,
                       .tokens = layer.tokens.as<int32_t>(),
                       .names = layer.candidates.as<int32_t>()});
    }
    Check(kernels::SelectBlocks({.items = items, .groups = kHeads}, device_.launch));
  }
  void Attend(int64_t num_selected) const {
    std::vector<AttendTokensItem> items;
    for (const Layer& layer : layers_) {
      items.push_back(AttendItem(layer, layer.tokens.as<int32_t>(), num_selected));
    }
    Check(kernels::AttendTokens({.items = items, .groups = kHeads, .softmax_scale = kScale},
                                device_.launch));
  }
  void AttendAll() const {
    std::vector<AttendTokensItem> items;
    for (const Layer& layer : layers_) items.push_back(AttendItem(layer, nullptr, num_tokens_));
    Check(kernels::AttendTokens({.items = items, .groups = 1, .softmax_scale = kScale},
                                device_.launch));
  }

  void Store(const Layer& layer, EncodingPolicy::Format format, const Buffer& rows,
             const Buffer& scales) const {
    const bool encoded = format != EncodingPolicy::Format::kAsIs;
    const DType dtype = OutputDType(DType::kBFloat16, format, false);
    const int64_t row_bytes = kDim * DTypeBytes(dtype);
    const GatherPagesItem item = {
        .source = DenseView(layer.keys.data(), DType::kBFloat16, num_tokens_, kHeads, kDim),
        .num_kept = num_tokens_,
        .page_size = 1,
        .format = format,
        .scale_granularity = ScaleGranularity::kTokenHead,
        .out_dtype = dtype,
        .rotation = {},
        .pages = rows.data(),
        .scales = encoded ? scales.as<float>() : nullptr,
        .slot_stride_bytes = row_bytes,
        .head_stride_bytes = num_tokens_ * row_bytes};
    Check(kernels::GatherPages({.items = {&item, 1}}, device_.launch));
  }

  // `passes`: times that a moved byte crosses what the ceiling measures.
  void RefreshRows(const char* name, int64_t num_rows, bool from_host, Ceiling ceiling,
                   int passes) {
    // Two sets of tokens that share nine tenths, wanted in turns.
    std::vector<int32_t> wanted[2];
    for (int32_t slot = 0; slot < static_cast<int32_t>(num_rows); ++slot) {
      const int32_t token = 10 * slot;
      wanted[0].push_back(token);
      wanted[1].push_back(slot % 10 == 3 ? token + 5 : token);
    }
    const Buffer wanted_on_device[2] = {Upload(device_, wanted[0]), Upload(device_, wanted[1])};
    const int64_t source_bytes = kHeads * num_tokens_ * kRowBytes;
    const std::shared_ptr<PinnedCache> pinned = PinnedCache::Create(0, 0);
    std::vector<Buffer> buffers;
    const auto allocate = [&](int64_t bytes) {
      buffers.push_back(device_.Allocate(bytes));
      return buffers.back().data();
    };
    std::vector<RefreshRowsItem> items;
    for (const Layer& layer : layers_) {
      const std::byte* keys = layer.keys.data();
      const std::byte* values = layer.values.data();
      if (from_host) {
        for (const std::byte** data : {&keys, &values}) {
          buffers.push_back(Check(pinned->AllocateExclusive(source_bytes)));
          Check(cudaMemcpyAsync(buffers.back().data(), *data, static_cast<size_t>(source_bytes),
                                cudaMemcpyDefault, device_.launch.stream));
          *data = buffers.back().data();
        }
      }
      RefreshRowsItem item;
      item.keys = HeadMajor(keys, num_tokens_);
      item.values = HeadMajor(values, num_tokens_);
      item.held = reinterpret_cast<int32_t*>(allocate(kHeads * num_rows * 4));
      item.num_moved = reinterpret_cast<int32_t*>(allocate(kHeads * 4));
      item.key_rows = allocate(kHeads * num_rows * kRowBytes);
      item.value_rows = allocate(kHeads * num_rows * kRowBytes);
      Check(cudaMemsetAsync(item.held, 0xFF, static_cast<size_t>(kHeads * num_rows * 4),
                            device_.launch.stream));
      items.push_back(item);
    }
    const double moved_rows = static_cast<double>(std::count_if(
        wanted[1].begin(), wanted[1].end(), [](int32_t token) { return token % 10 == 5; }));
    const double bytes = moved_rows * kHeads * 2 * kRowBytes * static_cast<double>(items.size());
    ReportRepeats(name, passes * bytes, ceiling, [&](int repeat) {
      for (RefreshRowsItem& item : items) {
        item.wanted = wanted_on_device[repeat % 2].as<int32_t>();
      }
      Check(kernels::RefreshRows({.items = items, .groups = 1, .num_rows = num_rows},
                                 device_.launch));
    });
    CheckMoved(items, static_cast<int32_t>(moved_rows));
    Check(cudaStreamSynchronize(device_.launch.stream));
  }
  // The figure stands for what it says only if that many rows moved.
  void CheckMoved(const std::vector<RefreshRowsItem>& items, int32_t expected) const {
    for (const RefreshRowsItem& item : items) {
      int32_t moved[kHeads] = {};
      Check(cudaMemcpyAsync(moved, item.num_moved, sizeof(moved), cudaMemcpyDefault,
                            device_.launch.stream));
      Check(cudaStreamSynchronize(device_.launch.stream));
      for (int32_t count : moved) {
        if (count != expected) {
          Check(absl::InternalError("refresh moved " + std::to_string(count) + " rows, not " +
                                    std::to_string(expected)));
        }
      }
    }
  }

  void Report(const std::string& name, double bytes, Ceiling ceiling,
              const std::function<void()>& run, double all_bytes = 0) const {
    ReportRepeats(
        name, bytes, ceiling, [&](int) { run(); }, all_bytes);
  }
  void ReportRepeats(const std::string& name, double bytes, Ceiling ceiling,
                     const std::function<void(int)>& run, double all_bytes = 0) const {
    const double ms = timer_.Time(run);
    const double gbps = bytes / ms / 1e6;
    std::printf("%-26s %7lld x%-3zu %8.4f ms %6.0f GB/s %5.1f %% of %s", name.c_str(),
                static_cast<long long>(num_tokens_), layers_.size(), ms, gbps,
                100 * gbps / ceiling.gbps, ceiling.name);
    if (all_bytes > 0) {
      const double all_ms = all_bytes / ceilings_.read_gbps / 1e6;
      std::printf("  all KV %7.4f ms = x%.2f", all_ms, all_ms / ms);
    }
    std::printf("\n");
    std::fflush(stdout);
  }

  const Device& device_;
  const Ceilings ceilings_;
  const ColdTimer& timer_;
  const int64_t num_tokens_;
  int64_t num_blocks_ = 0;
  Buffer starts_;
  std::vector<Layer> layers_;
};

void Main() {
  const Device device = OpenDevice();
  const Ceilings ceilings = MeasureCeilings(device);
  const ColdTimer timer(device);
  RandomSource random(device);
  std::printf("operation                   tokens x sequences\n");
  DecodeBench one(device, ceilings, timer, random, 131072, 1);
  DecodeBench many(device, ceilings, timer, random, 32768, 16);
  one.RunOperations();
  one.RunAllLayers();
  one.RunStore();
  one.RunRefresh();
  many.RunOperations();
  one.RunSteps();
  many.RunSteps();
  one.RunRefinedStep();
  many.RunRefinedStep();
}

}  // namespace
}  // namespace dynsplit::bench

int main() { dynsplit::bench::Main(); }

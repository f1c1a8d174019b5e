// SPDX-License-Identifier: Apache-2.0
//
// Times of the CUDA operations on one layer of Llama-3.1-8B's shape (32 query heads, 8 KV heads,
// D 128, bf16), a window of 64 queries and a fifth of the tokens kept, against ceilings measured in
// the same run. A time is the median of device-event times over inputs that rotate through more
// memory than the L2 cache holds. "floor" counts each input byte read once and each output byte
// written once at the measured copy (or read) rate; share = floor / time.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>

#include "cuda/operations.h"
#include "tests/bench/device_bench.h"
#include "tests/oracle/random_tensors.h"

namespace dynsplit::bench {
namespace {

constexpr int kQueryHeads = 32;
constexpr int kHeads = 8;
constexpr int kDim = 128;
constexpr int kWindow = 64;
constexpr double kKeptRatio = 0.2;
constexpr int kPageSize = 16;
constexpr int kRowBytes = kDim * 2;
constexpr int64_t kRotatedBytes = int64_t{512} << 20;  // inputs of one kind, at least

class LayerBench {
 public:
  LayerBench(const Device& device, const Ceilings& ceilings, RandomSource& random,
             int64_t num_tokens)
      : device_(device), ceilings_(ceilings), num_tokens_(num_tokens) {
    const oracle::ParityShape shape = {.name = "bench", .num_tokens = num_tokens};
    const std::vector<int32_t> starts = oracle::RandomBlockStarts(shape, 1);
    num_blocks_ = static_cast<int64_t>(starts.size()) - 1;
    num_kept_ = static_cast<int64_t>(kKeptRatio * static_cast<double>(num_tokens));
    starts_ = Upload(device, starts);
    std::vector<uint8_t> is_protected(static_cast<size_t>(num_tokens), 0);
    for (int64_t t = 0; t < num_tokens; ++t) {
      is_protected[static_cast<size_t>(t)] = t < 4 || t >= num_tokens - kWindow;
    }
    protected_ = Upload(device, is_protected);
    const int64_t bytes = num_tokens * kHeads * kRowBytes;
    num_sets_ = static_cast<int>(std::max<int64_t>(2, (kRotatedBytes + bytes - 1) / bytes));
    for (int i = 0; i < num_sets_; ++i) {
      keys_.push_back(random.Make(bytes));
      values_.push_back(random.Make(bytes));
      queries_.push_back(random.Make(int64_t{kWindow} * kQueryHeads * kRowBytes));
    }
    const auto allocate = [&](int64_t size) {
      return Check(device.pool->Allocate(size, device.stream));
    };
    scores_ = allocate(kHeads * num_tokens * 4);
    block_scores_ = allocate(kHeads * num_blocks_ * 4);
    kept_ = allocate(kHeads * num_kept_ * 4);
    counts_ = allocate(kHeads * 4);
    num_slots_ = (num_kept_ + kPageSize - 1) / kPageSize * kPageSize;
    key_pages_ = allocate(num_slots_ * kHeads * kRowBytes);
    value_pages_ = allocate(num_slots_ * kHeads * kRowBytes);
    scales_ = allocate(num_slots_ * kHeads * 4);
    for (Buffer* summary : {&min_, &max_}) *summary = allocate(num_blocks_ * kHeads * kRowBytes);
    lse_ = Upload(device, std::vector<float>(kWindow * kQueryHeads, 12.0F));
    losses_ = allocate(3 * kQueryHeads * 4);
  }

  void Run() {
    const double k_bytes = static_cast<double>(num_tokens_) * kHeads * kRowBytes;
    const double kept_bytes = static_cast<double>(num_kept_) * kHeads * kRowBytes;
    const double score_bytes = 4.0 * static_cast<double>(num_tokens_) * kHeads;
    const double pass_flops = 2.0 * kWindow * kQueryHeads * kDim * static_cast<double>(num_tokens_);
    const double copy = ceilings_.copy_gbps;
    const double read = ceilings_.read_gbps;
    Report("score_window", k_bytes + score_bytes, read, 2 * pass_flops,
           [&](int i) { Score(i, false); });
    Report("score_window, LSE given", k_bytes + score_bytes, read, pass_flops,
           [&](int i) { Score(i, true); });
    Report("reduce_blocks", score_bytes, read, 0, [&](int) { Reduce(); });
    Report("summarize_blocks",
           k_bytes + 2.0 * static_cast<double>(num_blocks_) * kHeads * kRowBytes, copy, 0,
           [&](int i) { Summarize(i); });
    Report("score_blocks, bound", 2.0 * static_cast<double>(num_blocks_) * kHeads * kRowBytes, read,
           4.0 * kWindow * kQueryHeads * 2 * kDim * static_cast<double>(num_blocks_),
           [&](int i) { ScoreBlocks(i); });
    Score(0, false);
    Reduce();
    Report("select_tokens, 8 groups", score_bytes + 4.0 * static_cast<double>(num_kept_) * kHeads,
           copy, 0, [&](int) { Select(kHeads); });
    Report("select_tokens, 1 group", (score_bytes + 4.0 * static_cast<double>(num_kept_)) / kHeads,
           copy, 0, [&](int) { Select(1); });
    Report("gather as is (K)", 2 * kept_bytes, copy, 0,
           [&](int i) { Gather(keys_[Set(i)], key_pages_, EncodingPolicy::Format::kAsIs); });
    Report("gather fp8 per head (K)", 1.5 * kept_bytes, copy, 0,
           [&](int i) { Gather(keys_[Set(i)], key_pages_, EncodingPolicy::Format::kFloat8E4M3); });
    Report("check_finite (K)", k_bytes, read, 0, [&](int i) { CheckFinite(i); });
    Report("layer: score..gather K,V", k_bytes + 4 * kept_bytes, copy, 2 * pass_flops,
           [&](int i) { Layer(i, false); });
    Report("layer, LSE given", k_bytes + 4 * kept_bytes, copy, pass_flops,
           [&](int i) { Layer(i, true); });
    Layer(0, false);
    Report("measure_attention", 2 * k_bytes + 2 * kept_bytes, read,
           2 * pass_flops * (1 + 1.5 * kKeptRatio), [&](int i) { Measure(i); });
  }

 private:
  size_t Set(int i) const { return static_cast<size_t>(i % num_sets_); }
  TensorView Keys(int i) const {
    return DenseView(keys_[Set(i)].data(), DType::kBFloat16, num_tokens_, kHeads, kDim);
  }
  TensorView Queries(int i) const {
    return DenseView(queries_[Set(i)].data(), DType::kBFloat16, kWindow, kQueryHeads, kDim);
  }
  static float Scale() { return 0.08838835F; }  // 1 / sqrt(128)

  void Score(int i, bool with_lse) {
    Check(kernels::ScoreWindow({.queries = Queries(i),
                                .keys = Keys(i),
                                .lse = with_lse ? lse_.as<float>() : nullptr,
                                .softmax_scale = Scale(),
                                .pooling_kernel = 5,
                                .scores = scores_.as<float>()},
                               device_.launch));
  }
  void Reduce() {
    Check(kernels::ReduceBlocks({.token_scores = scores_.as<float>(),
                                 .rows = kHeads,
                                 .num_tokens = num_tokens_,
                                 .block_starts = starts_.as<int32_t>(),
                                 .num_blocks = num_blocks_,
                                 .block_scores = block_scores_.as<float>()},
                                device_.launch));
  }
  BlockSummaries Summaries() const {
    return DenseSummaries(DType::kBFloat16, kHeads, kDim, min_.data(), max_.data(), nullptr);
  }
  void Summarize(int i) {
    Check(kernels::SummarizeBlocks({.keys = Keys(i),
                                    .block_starts = starts_.as<int32_t>(),
                                    .num_blocks = num_blocks_,
                                    .summaries = Summaries()},
                                   device_.launch));
  }
  void ScoreBlocks(int i) {
    const ScoreBlocksItem item = {.queries = Queries(i),
                                  .summaries = Summaries(),
                                  .block_starts = starts_.as<int32_t>(),
                                  .num_blocks = num_blocks_,
                                  .block_scores = block_scores_.as<float>()};
    Check(kernels::ScoreBlocks(
        {.items = {&item, 1}, .num_kv_heads = kHeads, .softmax_scale = Scale()}, device_.launch));
  }
  void Select(int groups) {
    Check(kernels::SelectTokens({.block_scores = block_scores_.as<float>(),
                                 .token_scores = scores_.as<float>(),
                                 .groups = groups,
                                 .num_tokens = num_tokens_,
                                 .block_starts = starts_.as<int32_t>(),
                                 .num_blocks = num_blocks_,
                                 .protected_tokens = protected_.as<uint8_t>(),
                                 .num_kept = num_kept_,
                                 .kept = kept_.as<int32_t>(),
                                 .kept_counts = counts_.as<int32_t>()},
                                device_.launch));
    groups_ = groups;
  }
  void Gather(const Buffer& source, const Buffer& pages, EncodingPolicy::Format format) {
    const bool encoded = format != EncodingPolicy::Format::kAsIs;
    const GatherPagesItem item = {
        .source = DenseView(source.data(), DType::kBFloat16, num_tokens_, kHeads, kDim),
        .kept = kept_.as<int32_t>(),
        .groups = groups_,
        .num_kept = num_kept_,
        .page_size = kPageSize,
        .format = format,
        .out_dtype = encoded ? DType::kFloat8E4M3 : DType::kBFloat16,
        .rotation = {},
        .pages = pages.data(),
        .scales = encoded ? scales_.as<float>() : nullptr};
    Check(kernels::GatherPages({.items = {&item, 1}}, device_.launch));
  }
  void CheckFinite(int i) {
    const CheckFiniteItem item = {.tensor = Keys(i), .first_bad_token = counts_.as<int32_t>()};
    Check(kernels::CheckFinite({.items = {&item, 1}}, device_.launch));
  }
  void Layer(int i, bool with_lse) {
    Score(i, with_lse);
    Reduce();
    Select(kHeads);
    Gather(keys_[Set(i)], key_pages_, EncodingPolicy::Format::kAsIs);
    Gather(values_[Set(i)], value_pages_, EncodingPolicy::Format::kAsIs);
  }
  void Measure(int i) {
    MeasureAttentionParams params;
    params.queries = Queries(i);
    params.keys = Keys(i);
    params.values = DenseView(values_[Set(i)].data(), DType::kBFloat16, num_tokens_, kHeads, kDim);
    params.kept_keys = DenseView(key_pages_.data(), DType::kBFloat16, num_kept_, kHeads, kDim);
    params.kept_values = DenseView(value_pages_.data(), DType::kBFloat16, num_kept_, kHeads, kDim);
    params.kept = kept_.as<int32_t>();
    params.groups = groups_;
    params.num_kept = num_kept_;
    params.softmax_scale = Scale();
    params.mass = losses_.as<float>();
    params.err_sq = params.mass + kQueryHeads;
    params.ref_sq = params.err_sq + kQueryHeads;
    Check(kernels::MeasureAttention(params, device_.launch));
  }

  void Report(const char* name, double bytes, double gbps, double flops,
              const std::function<void(int)>& run) {
    const double ms = Time(device_, run);
    const double floor_ms = bytes / gbps / 1e6;
    std::printf("%-26s T=%-7lld %9.4f ms  floor %8.4f ms  share %5.1f %%  %7.0f GB/s", name,
                static_cast<long long>(num_tokens_), ms, floor_ms, 100 * floor_ms / ms,
                bytes / ms / 1e6);
    if (flops > 0) std::printf("  %6.1f TFLOP/s", flops / ms / 1e9);
    std::printf("\n");
    std::fflush(stdout);
  }

  const Device& device_;
  const Ceilings ceilings_;
  const int64_t num_tokens_;
  int64_t num_blocks_ = 0;
  int64_t num_kept_ = 0;
  int64_t num_slots_ = 0;
  int num_sets_ = 0;
  int groups_ = kHeads;
  std::vector<Buffer> keys_, values_, queries_;
  Buffer starts_, protected_, scores_, block_scores_, kept_, counts_, key_pages_, value_pages_,
      scales_, min_, max_, lse_, losses_;
};

void Main(std::vector<int64_t> lengths) {
  if (lengths.empty()) lengths = {32768, 131072};
  const Device device = OpenDevice();
  const Ceilings ceilings = MeasureCeilings(device);
  RandomSource random(device);
  for (const int64_t num_tokens : lengths) {
    LayerBench(device, ceilings, random, num_tokens).Run();
    Check(cudaStreamSynchronize(device.launch.stream));
  }
}

}  // namespace
}  // namespace dynsplit::bench

// bench_gpu [TOKENS...]
int main(int argc, char** argv) {
  std::vector<int64_t> lengths;
  for (int i = 1; i < argc; ++i) lengths.push_back(std::atoll(argv[i]));
  dynsplit::bench::Main(std::move(lengths));
}

// SPDX-License-Identifier: Apache-2.0
//
// Compressing one resident layer of Llama-3.1-8B's shape (32 query heads, 8 KV heads, D 128, bf16)
// with a window of 64 queries, a fifth of the tokens kept: scores, block scores, selection, gather
// of K and V. A time is the median of device-event times over inputs that rotate through more
// memory than the L2 cache holds. The floor is what must be read and written (K once, the kept rows
// of K and V in and out) at the copy rate of the run; one pass of the window over the keys at the
// tensor cores' rate, the other floor, is lower.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/operations.h"
#include "tests/bench/device_bench.h"
#include "tests/bench/report.h"
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
    group_scores_ = allocate(num_tokens * 4);
    block_scores_ = allocate(kHeads * num_blocks_ * 4);
    kept_ = allocate(kHeads * num_kept_ * 4);
    counts_ = allocate(kHeads * 4);
    num_slots_ = (num_kept_ + kPageSize - 1) / kPageSize * kPageSize;
    key_pages_ = allocate(num_slots_ * kHeads * kRowBytes);
    value_pages_ = allocate(num_slots_ * kHeads * kRowBytes);
    for (Buffer* summary : {&min_, &max_}) *summary = allocate(num_blocks_ * kHeads * kRowBytes);
    lse_ = Upload(device, std::vector<float>(kWindow * kQueryHeads, 12.0F));
  }

  void Run() {
    const double k_bytes = static_cast<double>(num_tokens_) * kHeads * kRowBytes;
    const double kept_bytes = static_cast<double>(num_kept_) * kHeads * kRowBytes;
    const double score_bytes = 4.0 * static_cast<double>(num_tokens_) * kHeads;
    ReportTime("score_window", k_bytes + score_bytes, "", [&](int i) { Score(i, false); });
    ReportTime("score_window, LSE given", k_bytes + score_bytes, "",
               [&](int i) { Score(i, true); });
    ReportTime("score_blocks, 64 queries",
               2.0 * static_cast<double>(num_blocks_) * kHeads * kRowBytes, "",
               [&](int i) { ScoreBlocks(i); });
    const bool targets = num_tokens_ == 131072;
    const double bytes = k_bytes + 4 * kept_bytes;
    for (const int groups : {1, kHeads}) {
      const std::string sets = groups == 1 ? "one kept set" : "kept sets per head";
      const double ms = ReportTime("compress, " + sets, bytes, targets ? "share >= 0.4545" : "",
                                   [&](int i) { Layer(i, false, groups); });
      ReportTime("compress, " + sets + ", LSE given", bytes, targets ? "share >= 0.6667" : "",
                 [&](int i) { Layer(i, true, groups); });
      ReportPeer("snapkv", sets, ms, targets ? "peer >= 25" : "");
      ReportPeer("chunkkv", sets, ms, targets ? "peer >= 300" : "");
    }
    ReportMemory(2 * k_bytes);
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
  const float* TokenScores(int groups) const {
    return groups == 1 ? group_scores_.as<float>() : scores_.as<float>();
  }
  void Reduce(int groups) {
    Check(kernels::ReduceBlocks({.token_scores = TokenScores(groups),
                                 .rows = groups,
                                 .num_tokens = num_tokens_,
                                 .block_starts = starts_.as<int32_t>(),
                                 .num_blocks = num_blocks_,
                                 .block_scores = block_scores_.as<float>()},
                                device_.launch));
  }
  BlockSummaries Summaries() const {
    return DenseSummaries(DType::kBFloat16, kHeads, kDim, min_.data(), max_.data(), nullptr);
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
                                 .token_scores = TokenScores(groups),
                                 .groups = groups,
                                 .num_tokens = num_tokens_,
                                 .block_starts = starts_.as<int32_t>(),
                                 .num_blocks = num_blocks_,
                                 .protected_tokens = protected_.as<uint8_t>(),
                                 .num_kept = num_kept_,
                                 .kept = kept_.as<int32_t>(),
                                 .kept_counts = counts_.as<int32_t>()},
                                device_.launch));
  }
  void GatherBoth(int i, int groups) {
    const auto item = [&](const Buffer& source, const Buffer& pages) -> GatherPagesItem {
      return {.source = DenseView(source.data(), DType::kBFloat16, num_tokens_, kHeads, kDim),
              .kept = kept_.as<int32_t>(),
              .groups = groups,
              .num_kept = num_kept_,
              .page_size = kPageSize,
              .out_dtype = DType::kBFloat16,
              .rotation = {},
              .pages = pages.data()};
    };
    const std::array<GatherPagesItem, 2> items = {item(keys_[Set(i)], key_pages_),
                                                  item(values_[Set(i)], value_pages_)};
    Check(kernels::GatherPages({.items = items}, device_.launch));
  }
  void Layer(int i, bool with_lse, int groups) {
    Score(i, with_lse);
    if (groups == 1) {
      Check(kernels::ReduceRows({.in = scores_.as<float>(),
                                 .rows_in = kHeads,
                                 .rows_out = 1,
                                 .columns = num_tokens_,
                                 .out = group_scores_.as<float>()},
                                device_.launch));
    }
    Reduce(groups);
    Select(groups);
    GatherBoth(i, groups);
  }

  // What the operations take beside inputs and outputs: their results for one another, and scratch.
  void ReportMemory(double kv_bytes) {
    const double kept = Peak([&] { Layer(0, false, kHeads); });
    const auto own = static_cast<double>(scores_.size_bytes() + group_scores_.size_bytes() +
                                         block_scores_.size_bytes() + counts_.size_bytes());
    Report(Cost(Name("compress, extra device memory"), kept + own, "bytes", 0.02 * kv_bytes,
                "share >= 1"));
  }
  // Most bytes that `run` holds in the pool at a time, beyond those held before it.
  double Peak(const std::function<void()>& run) {
    const int64_t before = device_.pool->bytes_in_use();
    device_.pool->ResetPeak();
    run();
    Check(cudaStreamSynchronize(device_.launch.stream));
    return static_cast<double>(device_.pool->peak_bytes() - before);
  }

  std::string Name(const std::string& what) const {
    return "cuda/" + what + ", T=" + std::to_string(num_tokens_);
  }
  double ReportTime(const std::string& what, double bytes, const std::string& target,
                    const std::function<void(int)>& run) {
    const double ms = Time(device_, run);
    Report(Cost(Name(what), ms, "ms", bytes / ceilings_.copy_gbps / 1e6, target));
    return ms;
  }
  // The compression's time again, beside that of the real kvpress.
  void ReportPeer(const std::string& press, const std::string& sets, double ms,
                  const std::string& target) {
    Report({.name = Name("compress, " + sets + ", against kvpress " + press),
            .value = ms,
            .unit = "ms",
            .ceiling = std::nullopt,
            .share = std::nullopt,
            .target = target,
            .peer = std::nullopt,
            .peer_name = "kvpress-" + press + "/cuda/T=" + std::to_string(num_tokens_)});
  }

  const Device& device_;
  const Ceilings ceilings_;
  const int64_t num_tokens_;
  int64_t num_blocks_ = 0;
  int64_t num_kept_ = 0;
  int64_t num_slots_ = 0;
  int num_sets_ = 0;
  std::vector<Buffer> keys_, values_, queries_;
  Buffer starts_, protected_, scores_, group_scores_, block_scores_, kept_, counts_, key_pages_,
      value_pages_, min_, max_, lse_;
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

// bench_layer [TOKENS...]
int main(int argc, char** argv) {
  std::vector<int64_t> lengths;
  for (int i = 1; i < argc; ++i) lengths.push_back(std::atoll(argv[i]));
  dynsplit::bench::Main(std::move(lengths));
}

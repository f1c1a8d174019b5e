// SPDX-License-Identifier: Apache-2.0
//
// CPU backend against its ceilings. One layer of a model with 32 query heads, 8 KV heads of 128
// channels, bf16; ceilings are measured between the operations they are held against, with the
// same number of threads: memcpy of the same bytes, and OpenBLAS sgemm of the same shape.
//
//     bench_cpu --benchmark_min_time=0.5
//
// prints the usual lines and a final table: what, value, ceiling, share, target.
#include <benchmark/benchmark.h>
#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "server/cpu/cpu_backend.h"
#include "server/cpu/thread_pool.h"
#include "tests/oracle/device_session.h"
#include "tests/oracle/random_tensors.h"

namespace dynsplit {
namespace {

using oracle::HostTensor;
using Format = EncodingPolicy::Format;

constexpr int32_t kQueryHeads = 32;
constexpr int32_t kKvHeads = 8;
constexpr int32_t kHeadDim = 128;
constexpr int32_t kWindow = 64;
constexpr int64_t kTokens = 32768;
constexpr int64_t kTokenBytes = kKvHeads * kHeadDim * 2;

// Aligned like all memory of the service, on huge pages where the system gives them.
class Memory {
 public:
  static std::shared_ptr<Buffer> Bytes(int64_t size) {
    static Backend& backend = *CreateCpuBackend({.num_threads = 1}).value().release();
    auto buffer = std::make_shared<Buffer>(backend.AllocateHost(size).value());
    std::memset(buffer->data(), 0, static_cast<size_t>(size));
    return buffer;
  }
};

// Dense bf16 values in [-2, 2); fast to make, unlike HostTensor.
std::shared_ptr<Buffer> RandomBFloat16(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  auto values = Memory::Bytes(count * 2);
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bits = random();
    const uint64_t exponent = 122 + bits % 6;  // 2^-5 .. 1
    values->as<uint16_t>()[i] =
        static_cast<uint16_t>((bits >> 40 & 0x8000) | exponent << 7 | (bits >> 20 & 0x7F));
  }
  return values;
}

// Inputs of one layer, shared by all benchmarks.
struct Layer {
  std::shared_ptr<Buffer> keys = RandomBFloat16(kTokens * kKvHeads * kHeadDim, 1);
  std::shared_ptr<Buffer> values = RandomBFloat16(kTokens * kKvHeads * kHeadDim, 2);
  std::shared_ptr<Buffer> queries = RandomBFloat16(kWindow * kQueryHeads * kHeadDim, 3);
  std::vector<float> lse = std::vector<float>(kWindow * kQueryHeads, 12.0F);
  std::vector<int32_t> block_starts;
  oracle::HostRotation rotation = oracle::MakeRotation(kTokens, kHeadDim, false);

  Layer() {
    for (int32_t t = 0; t < kTokens; t += 14) block_starts.push_back(t);
    block_starts.push_back(kTokens);
  }
  TensorView Keys() const {
    return DenseView(keys->data(), DType::kBFloat16, kTokens, kKvHeads, kHeadDim);
  }
  TensorView Values() const {
    return DenseView(values->data(), DType::kBFloat16, kTokens, kKvHeads, kHeadDim);
  }
  TensorView Queries() const {
    return DenseView(queries->data(), DType::kBFloat16, kWindow, kQueryHeads, kHeadDim);
  }
  int64_t num_blocks() const { return static_cast<int64_t>(block_starts.size()) - 1; }
};

const Layer& TheLayer() {
  static const Layer& layer = *new Layer;
  return layer;
}

// Kept tokens in runs of 14, as blocks are kept.
std::vector<int32_t> KeptTokens(int64_t percent) {
  std::vector<int32_t> kept;
  std::mt19937_64 random(4);
  for (int32_t t = 0; t < kTokens; t += 14) {
    if (static_cast<int64_t>(random() % 100) >= percent) continue;
    for (int32_t u = t; u < std::min<int64_t>(t + 14, kTokens); ++u) kept.push_back(u);
  }
  return kept;
}

struct Runner {
  explicit Runner(int num_threads)
      : threads(num_threads),
        pool(num_threads),
        backend(CreateCpuBackend({.num_threads = num_threads}).value()),
        stream(backend->CreateStream().value()) {}
  int threads;
  cpu::ThreadPool pool;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Stream> stream;
};

// Results by (name, threads): seconds of one call. Fastest of the repetitions.
struct Measured {
  double seconds = 0;
  double ceiling_seconds = 0;  // 0 = none
  double work = 0;
  const char* unit = "";
  double target = 0;
};
std::map<std::pair<std::string, int>, Measured>& Table() {
  static auto& table = *new std::map<std::pair<std::string, int>, Measured>;
  return table;
}

double Seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Neighbours on the machine only ever add time.
double Fastest(const std::vector<double>& seconds) {
  return *std::min_element(seconds.begin(), seconds.end());
}

struct Case {
  std::string name;
  double work = 0;  // bytes or floating-point operations of one call
  const char* unit = "B";
  double target = 0;
  std::function<void()> run;
  std::function<void()> ceiling;  // empty = none
};

// Alternates the ceiling and the operation, so that both see the same machine.
void Measure(benchmark::State& state, const Case& test, int threads) {
  std::vector<double> own;
  std::vector<double> ceiling;
  test.run();
  if (test.ceiling) test.ceiling();
  for (auto _ : state) {
    if (test.ceiling) ceiling.push_back(Seconds(test.ceiling));
    own.push_back(Seconds(test.run));
    state.SetIterationTime(own.back());
  }
  Measured& row = Table()[{test.name, threads}];
  row = {Fastest(own), ceiling.empty() ? 0 : Fastest(ceiling), test.work, test.unit, test.target};
  state.counters["rate"] = benchmark::Counter(row.work / row.seconds);
  if (row.ceiling_seconds > 0) state.counters["share"] = row.ceiling_seconds / row.seconds;
}

// memcpy of `num_bytes` in total, cut among the threads. The source window wanders through as many
// bytes as the gather picks from: kept rows come from memory, not from the cache.
std::function<void()> CopyCeiling(Runner& runner, int64_t num_bytes) {
  constexpr int64_t kSourceBytes = kTokens * kTokenBytes;
  auto from = Memory::Bytes(kSourceBytes);
  auto to = Memory::Bytes(num_bytes);
  auto offset = std::make_shared<int64_t>(0);
  return [&runner, from, to, offset, num_bytes] {
    *offset = *offset + 2 * num_bytes <= kSourceBytes ? *offset + num_bytes : 0;
    const std::byte* source = from->data() + *offset;
    runner.pool.ParallelFor(runner.threads, [&](int64_t part, int /*slot*/) {
      const int64_t begin = num_bytes * part / runner.threads;
      const int64_t end = num_bytes * (part + 1) / runner.threads;
      std::memcpy(to->data() + begin, source + begin, static_cast<size_t>(end - begin));
    });
    benchmark::DoNotOptimize(to->data());
  };
}

// Every byte read once, nothing written: the ceiling of reductions.
std::function<void()> ReadCeiling(Runner& runner, int64_t num_bytes) {
  auto from = Memory::Bytes(num_bytes);
  return [&runner, from] {
    const int64_t count = from->size_bytes() / 8;
    runner.pool.ParallelFor(runner.threads, [&](int64_t part, int /*slot*/) {
      uint64_t sums[8] = {};
      const auto* words = from->as<uint64_t>();
      const int64_t end = count * (part + 1) / runner.threads;
      for (int64_t i = count * part / runner.threads; i + 8 <= end; i += 8) {
        for (int lane = 0; lane < 8; ++lane) sums[lane] += words[i + lane];
      }
      benchmark::DoNotOptimize(sums);
    });
  };
}

// OpenBLAS sgemm of M = W * G, N = T, K = D for each KV head, `count` times.
std::function<void()> GemmCeiling(const Runner& runner, int count) {
  constexpr int kRows = kWindow * kQueryHeads / kKvHeads;
  auto a = Memory::Bytes(int64_t{4} * kRows * kHeadDim);
  auto b = Memory::Bytes(4 * kTokens * kHeadDim);
  auto c = Memory::Bytes(4 * kTokens * kRows);
  return [threads = runner.threads, a, b, c, count] {
    openblas_set_num_threads(threads);
    for (int h = 0; h < kKvHeads * count; ++h) {
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, kRows, static_cast<int>(kTokens),
                  kHeadDim, 1.0F, a->as<float>(), kHeadDim, b->as<float>(), kHeadDim, 0.0F,
                  c->as<float>(), static_cast<int>(kTokens));
    }
    benchmark::DoNotOptimize(c->data());
  };
}

template <typename T>
std::shared_ptr<std::vector<T>> Zeros(int64_t count) {
  return std::make_shared<std::vector<T>>(static_cast<size_t>(count));
}

void Check(const absl::Status& status) {
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.ToString().c_str());
    std::abort();
  }
}

Case ApplyCase(Runner& runner, int64_t percent, Format format, bool rotated) {
  const auto kept = std::make_shared<std::vector<int32_t>>(KeptTokens(percent));
  const auto num_kept = static_cast<int64_t>(kept->size());
  auto pages = Memory::Bytes((num_kept + 15) / 16 * 16 * kTokenBytes);
  auto scales = Zeros<float>((num_kept + 15) * kKvHeads);
  GatherPagesItem params{.source = TheLayer().Keys(),
                         .kept = kept->data(),
                         .num_kept = num_kept,
                         .format = format,
                         .rotation = {},
                         .pages = pages->data()};
  std::string name = "Apply " + std::to_string(percent) + "%";
  int64_t out_bytes = num_kept * kTokenBytes;
  if (format != Format::kAsIs) {
    params.scales = scales->data();
    params.out_dtype = format == Format::kInt8 ? DType::kInt8 : DType::kFloat8E4M3;
    params.scale_granularity =
        format == Format::kInt8 ? ScaleGranularity::kTokenHead : ScaleGranularity::kHead;
    name += format == Format::kInt8 ? " int8" : " fp8";
    out_bytes /= 2;
  } else {
    name += " as is";
  }
  if (rotated) {
    params.rotation = TheLayer().rotation.table();
    name += " rotated";
  }
  const int64_t moved = num_kept * kTokenBytes + out_bytes;  // read + written
  return {.name = name,
          .work = static_cast<double>(moved),
          .unit = "B",
          .target = format == Format::kAsIs && !rotated ? 0.5 : 0,
          .run =
              [&runner, params, kept, pages, scales] {
                Check(runner.backend->GatherPages({.items = {&params, 1}}, *runner.stream));
              },
          .ceiling = CopyCeiling(runner, moved / 2)};
}

Case ScoreWindowCase(Runner& runner, bool with_lse) {
  auto scores = Zeros<float>(kKvHeads * kTokens);
  ScoreWindowParams params{.queries = TheLayer().Queries(),
                           .keys = TheLayer().Keys(),
                           .lse = with_lse ? TheLayer().lse.data() : nullptr,
                           .softmax_scale = 1 / std::sqrt(static_cast<float>(kHeadDim)),
                           .pooling_kernel = 5,
                           .scores = scores->data()};
  return {.name = with_lse ? "ScoreWindow, LSE given" : "ScoreWindow",
          .work = 2.0 * kWindow * kQueryHeads * kTokens * kHeadDim,
          .unit = "flop",
          .target = 0.5,
          .run = [&runner, params,
                  scores] { Check(runner.backend->ScoreWindow(params, *runner.stream)); },
          .ceiling = GemmCeiling(runner, 1)};
}

Case MeasureAttentionCase(Runner& runner) {
  const auto kept = std::make_shared<std::vector<int32_t>>(KeptTokens(20));
  const auto num_kept = static_cast<int64_t>(kept->size());
  auto out = Zeros<float>(3 * kQueryHeads);
  const auto kept_view = [&](const Buffer& data) {
    return DenseView(data.data(), DType::kBFloat16, num_kept, kKvHeads, kHeadDim);
  };
  MeasureAttentionParams params{.queries = TheLayer().Queries(),
                                .keys = TheLayer().Keys(),
                                .values = TheLayer().Values(),
                                .kept_keys = kept_view(*TheLayer().keys),
                                .kept_values = kept_view(*TheLayer().values),
                                .kept = kept->data(),
                                .num_kept = num_kept,
                                .rotation = {},
                                .softmax_scale = 1 / std::sqrt(static_cast<float>(kHeadDim)),
                                .mass = out->data(),
                                .err_sq = out->data() + kQueryHeads,
                                .ref_sq = out->data() + 2 * kQueryHeads};
  const double both = 1 + static_cast<double>(num_kept) / kTokens;
  return {.name = "MeasureAttention 20% (ceiling: full K and V only)",
          .work = 4.0 * both * kWindow * kQueryHeads * kTokens * kHeadDim,
          .unit = "flop",
          .run = [&runner, params, kept,
                  out] { Check(runner.backend->MeasureAttention(params, *runner.stream)); },
          .ceiling = GemmCeiling(runner, 2)};
}

Case SummarizeCase(Runner& runner) {
  const int64_t elements = TheLayer().num_blocks() * kKvHeads * kHeadDim;
  auto min = Zeros<uint16_t>(elements);
  auto max = Zeros<uint16_t>(elements);
  SummarizeBlocksParams params{.keys = TheLayer().Keys(),
                               .block_starts = TheLayer().block_starts.data(),
                               .num_blocks = TheLayer().num_blocks(),
                               .summaries = DenseSummaries(DType::kBFloat16, kKvHeads, kHeadDim,
                                                           min->data(), max->data(), nullptr)};
  return {.name = "SummarizeBlocks (ceiling: read)",
          .work = static_cast<double>(kTokens * kTokenBytes + 4 * elements),
          .unit = "B",
          .run = [&runner, params, min,
                  max] { Check(runner.backend->SummarizeBlocks(params, *runner.stream)); },
          .ceiling = ReadCeiling(runner, kTokens * kTokenBytes)};
}

Case CheckFiniteCase(Runner& runner) {
  auto first = Zeros<int32_t>(1);
  CheckFiniteItem params{.tensor = TheLayer().Keys(), .first_bad_token = first->data()};
  return {.name = "CheckFinite (ceiling: read)",
          .work = static_cast<double>(kTokens * kTokenBytes),
          .unit = "B",
          .run =
              [&runner, params, first] {
                Check(runner.backend->CheckFinite({.items = {&params, 1}}, *runner.stream));
              },
          .ceiling = ReadCeiling(runner, kTokens * kTokenBytes)};
}

Case SelectCase(Runner& runner) {
  std::mt19937_64 random(5);
  auto block_scores = Zeros<float>(kKvHeads * TheLayer().num_blocks());
  auto token_scores = Zeros<float>(kKvHeads * kTokens);
  for (float& x : *block_scores) x = static_cast<float>(random() % 1000003);
  for (float& x : *token_scores) x = static_cast<float>(random() % 1000003);
  auto is_protected = Zeros<uint8_t>(kTokens);
  std::fill(is_protected->end() - kWindow, is_protected->end(), uint8_t{1});
  constexpr int64_t kKept = kTokens / 5;
  auto kept = Zeros<int32_t>(kKvHeads * kKept);
  auto counts = Zeros<int32_t>(kKvHeads);
  SelectTokensParams params{.block_scores = block_scores->data(),
                            .token_scores = token_scores->data(),
                            .groups = kKvHeads,
                            .num_tokens = kTokens,
                            .block_starts = TheLayer().block_starts.data(),
                            .num_blocks = TheLayer().num_blocks(),
                            .protected_tokens = is_protected->data(),
                            .num_kept = kKept,
                            .kept = kept->data(),
                            .kept_counts = counts->data()};
  return {.name = "SelectTokens, 8 heads",
          .work = static_cast<double>(kKvHeads * TheLayer().num_blocks()),
          .unit = "block",
          .run = [&runner, params, block_scores, token_scores, is_protected, kept,
                  counts] { Check(runner.backend->SelectTokens(params, *runner.stream)); },
          .ceiling = {}};
}

// One layer of a decode step on a sequence that stays: scores of all blocks, then the tokens. The
// index lies as resident sequences keep it: bounds [Hkv, capacity, 2, D].
Case SelectStepCase(Runner& runner, DType dtype) {
  const int64_t num_blocks = TheLayer().num_blocks();
  constexpr int64_t kSelected = kTokens / 10;
  const int64_t row_bytes = kHeadDim * DTypeBytes(dtype);
  auto bounds = Memory::Bytes(kKvHeads * num_blocks * 2 * row_bytes);
  auto scales = Zeros<float>(kKvHeads * num_blocks);
  auto scores = Zeros<float>(kKvHeads * num_blocks);
  auto tokens = Zeros<int32_t>(kKvHeads * kSelected);
  BlockSummaries summaries{.dtype = dtype,
                           .min = bounds->data(),
                           .max = bounds->data() + row_bytes,
                           .block_stride_bytes = 2 * row_bytes,
                           .head_stride_bytes = 2 * row_bytes * num_blocks};
  if (dtype == DType::kFloat8E4M3) {
    summaries.bound_scales = scales->data();
    summaries.scale_head_stride = num_blocks;
  }
  Check(runner.backend->SummarizeBlocks({.keys = TheLayer().Keys(),
                                         .block_starts = TheLayer().block_starts.data(),
                                         .num_blocks = num_blocks,
                                         .summaries = summaries},
                                        *runner.stream));
  const ScoreBlocksItem score{
      .queries = DenseView(TheLayer().queries->data(), DType::kBFloat16, 1, kQueryHeads, kHeadDim),
      .summaries = summaries,
      .block_starts = TheLayer().block_starts.data(),
      .num_blocks = num_blocks,
      .block_scores = scores->data()};
  const SelectBlocksItem select{.block_scores = scores->data(),
                                .block_starts = TheLayer().block_starts.data(),
                                .num_blocks = num_blocks,
                                .num_tokens = kTokens,
                                .prefix_end = 4,
                                .suffix_begin = kTokens - 32,
                                .num_selected = kSelected,
                                .tokens = tokens->data()};
  return {.name = std::string("select_step 8B 32K ") +
                  (dtype == DType::kFloat8E4M3 ? "e4m3" : "bf16") + " (ceiling: read)",
          .work = static_cast<double>(bounds->size_bytes()),
          .unit = "B",
          .run =
              [&runner, score, select, bounds, scales, scores, tokens] {
                Check(runner.backend->ScoreBlocks(
                    {.items = {&score, 1},
                     .num_kv_heads = kKvHeads,
                     .softmax_scale = 1 / std::sqrt(static_cast<float>(kHeadDim))},
                    *runner.stream));
                Check(runner.backend->SelectBlocks({.items = {&select, 1}, .groups = kKvHeads},
                                                   *runner.stream));
              },
          .ceiling = ReadCeiling(runner, bounds->size_bytes())};
}

std::vector<Case> Cases(Runner& runner) {
  std::vector<Case> cases;
  for (int64_t percent : {10, 20, 50}) {
    cases.push_back(ApplyCase(runner, percent, Format::kAsIs, false));
  }
  cases.push_back(ApplyCase(runner, 20, Format::kFloat8E4M3, false));
  cases.push_back(ApplyCase(runner, 20, Format::kInt8, false));
  cases.push_back(ApplyCase(runner, 20, Format::kAsIs, true));
  cases.push_back(ScoreWindowCase(runner, false));
  cases.push_back(ScoreWindowCase(runner, true));
  cases.push_back(MeasureAttentionCase(runner));
  cases.push_back(SummarizeCase(runner));
  cases.push_back(CheckFiniteCase(runner));
  cases.push_back(SelectCase(runner));
  cases.push_back(SelectStepCase(runner, DType::kFloat8E4M3));
  cases.push_back(SelectStepCase(runner, DType::kBFloat16));
  return cases;
}

void PrintTable() {
  std::printf("\n%-52s %7s %12s %14s %14s %6s %6s\n", "what", "threads", "ms", "value", "ceiling",
              "share", "target");
  for (const auto& [key, row] : Table()) {
    std::printf("%-52s %7d %12.3f %8.2f G%s/s", key.first.c_str(), key.second, row.seconds * 1e3,
                row.work / row.seconds / 1e9, row.unit);
    if (row.ceiling_seconds > 0) {
      std::printf(" %8.2f G%s/s %6.2f", row.work / row.ceiling_seconds / 1e9, row.unit,
                  row.ceiling_seconds / row.seconds);
    }
    if (row.target > 0) std::printf(" %6.2f", row.target);
    std::printf("\n");
  }
}

}  // namespace
}  // namespace dynsplit

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  std::vector<int> thread_counts = {1, 2};
  const auto all = static_cast<int>(std::thread::hardware_concurrency());
  if (all > 2) thread_counts.push_back(all);
  std::vector<std::unique_ptr<dynsplit::Runner>> runners;
  for (int threads : thread_counts) {
    runners.push_back(std::make_unique<dynsplit::Runner>(threads));
    for (const dynsplit::Case& test : dynsplit::Cases(*runners.back())) {
      benchmark::RegisterBenchmark(
          (test.name + "/threads:" + std::to_string(threads)).c_str(),
          [test, threads](benchmark::State& state) { dynsplit::Measure(state, test, threads); })
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  dynsplit::PrintTable();
  return 0;
}

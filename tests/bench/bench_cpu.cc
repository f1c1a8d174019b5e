// SPDX-License-Identifier: Apache-2.0
//
// CPU backend against its ceilings. One layer of a model with 32 query heads, 8 KV heads of 128
// channels, bf16; ceilings are measured between the operations they are held against, with the
// same number of threads: memcpy of the same bytes, and OpenBLAS sgemm of the same shape.
//
//     bench_cpu --benchmark_min_time=0.5 [THREADS...]
//
// prints the usual lines, then the rows of tests/bench/report.h. Targets are those of two threads.
#include <benchmark/benchmark.h>
#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "server/cpu/cpu_backend.h"
#include "server/cpu/thread_pool.h"
#include "tests/bench/layer_input.h"
#include "tests/bench/report.h"
#include "tests/oracle/device_session.h"
#include "tests/oracle/random_tensors.h"

namespace dynsplit::bench {
namespace {

using Format = EncodingPolicy::Format;

constexpr int kTargetThreads = 2;
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

std::shared_ptr<Buffer> RandomBFloat16(int64_t count, uint64_t seed) {
  auto values = Memory::Bytes(count * 2);
  FillBFloat16(count, seed, values->as<uint16_t>());
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

double Seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Neighbours on the machine only ever add time.
double Fastest(const std::vector<double>& seconds) {
  return *std::min_element(seconds.begin(), seconds.end());
}

enum class Unit : uint8_t { kBytes, kFlops, kTime };

struct Case {
  std::string name;
  double work = 0;  // bytes or floating-point operations of one call
  Unit unit = Unit::kBytes;
  std::string target = {};  // with kTargetThreads
  std::function<void()> run;
  std::function<void()> ceiling = {};  // empty = none
  std::string peer_name = {};          // of kTargetThreads
};

// Seconds of one call, the fastest of the repetitions.
struct Measured {
  Case test;
  int threads = 0;
  double seconds = 0;
  double ceiling_seconds = 0;  // 0 = none
};
// By name and threads; Google Benchmark calls more than once, with growing numbers of repetitions.
std::map<std::string, Measured>& Results() {
  static auto& results = *new std::map<std::string, Measured>;
  return results;
}

std::string RowName(const Case& test, int threads) {
  return "cpu/" + test.name + "/threads=" + std::to_string(threads);
}

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
  Results()[RowName(test, threads)] = {test, threads, Fastest(own),
                                       ceiling.empty() ? 0 : Fastest(ceiling)};
}

Row RowOf(const Measured& measured) {
  const Case& test = measured.test;
  const bool at_target = measured.threads == kTargetThreads;
  // What one call comes to in so many seconds.
  const auto value = [&](double seconds) {
    return test.unit == Unit::kTime ? 1e3 * seconds : test.work / seconds / 1e9;
  };
  const char* const units[] = {"GB/s", "Gflop/s", "ms"};
  Row row = {.name = RowName(test, measured.threads),
             .value = value(measured.seconds),
             .unit = units[static_cast<size_t>(test.unit)],
             .ceiling = std::nullopt,
             .share = std::nullopt,
             .target = at_target ? test.target : "",
             .peer = std::nullopt,
             .peer_name = at_target ? test.peer_name : ""};
  if (measured.ceiling_seconds > 0) {
    row.ceiling = value(measured.ceiling_seconds);
    row.share = measured.ceiling_seconds / measured.seconds;
  }
  return row;
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
  std::string name = "apply/keep=" + std::to_string(percent) + "%";
  int64_t out_bytes = num_kept * kTokenBytes;
  if (format != Format::kAsIs) {
    params.scales = scales->data();
    params.out_dtype = format == Format::kInt8 ? DType::kInt8 : DType::kFloat8E4M3;
    params.scale_granularity =
        format == Format::kInt8 ? ScaleGranularity::kTokenHead : ScaleGranularity::kHead;
    name += format == Format::kInt8 ? "/int8" : "/fp8";
    out_bytes /= 2;
  }
  if (rotated) {
    params.rotation = TheLayer().rotation.table();
    name += "/re-rotated";
  }
  const int64_t moved = num_kept * kTokenBytes + out_bytes;  // read + written
  return {.name = name,
          .work = static_cast<double>(moved),
          .unit = Unit::kBytes,
          .target = format == Format::kAsIs ? "share >= 0.80" : "",
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
  return {.name = with_lse ? "score-window/lse" : "score-window",
          .work = 2.0 * kWindow * kQueryHeads * kTokens * kHeadDim,
          .unit = Unit::kFlops,
          .target = "share >= 0.70",
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
  // The ceiling is that of the full K and V only.
  return {.name = "measure-attention/keep=20%",
          .work = 4.0 * both * kWindow * kQueryHeads * kTokens * kHeadDim,
          .unit = Unit::kFlops,
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
  return {.name = "summarize-blocks",
          .work = static_cast<double>(kTokens * kTokenBytes + 4 * elements),
          .unit = Unit::kBytes,
          .run = [&runner, params, min,
                  max] { Check(runner.backend->SummarizeBlocks(params, *runner.stream)); },
          .ceiling = ReadCeiling(runner, kTokens * kTokenBytes)};
}

Case CheckFiniteCase(Runner& runner) {
  auto first = Zeros<int32_t>(1);
  CheckFiniteItem params{.tensor = TheLayer().Keys(), .first_bad_token = first->data()};
  return {.name = "check-finite",
          .work = static_cast<double>(kTokens * kTokenBytes),
          .unit = Unit::kBytes,
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
  return {.name = "select-tokens/groups=8",
          .unit = Unit::kTime,
          .run = [&runner, params, block_scores, token_scores, is_protected, kept, counts] {
            Check(runner.backend->SelectTokens(params, *runner.stream));
          }};
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
  return {.name = std::string("session-select/bounds=") +
                  (dtype == DType::kFloat8E4M3 ? "e4m3" : "bf16"),
          .work = static_cast<double>(bounds->size_bytes()),
          .unit = Unit::kBytes,
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

// Scores, selects and gathers K and V of a layer through the pipeline. The ceiling is the matrix
// product alone; the peer removes as much with the method of the preset snapkv.
Case CompressCase(Runner& runner, const std::string& preset) {
  const auto input = std::make_shared<LayerInput>(*runner.backend, *runner.stream, kTokens, 1);
  return {.name = "compress/T=" + std::to_string(kTokens) + "/" + preset,
          .unit = Unit::kTime,
          .target = "peer >= 3",
          .run = [input, preset] { input->Compress(preset, 1); },
          .ceiling = GemmCeiling(runner, 1),
          .peer_name = "kvpress-snapkv/cpu/T=" + std::to_string(kTokens)};
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
  cases.push_back(CompressCase(runner, "snapkv"));
  cases.push_back(CompressCase(runner, "dynsplit"));
  return cases;
}

}  // namespace
}  // namespace dynsplit::bench

int main(int argc, char** argv) {
  using namespace dynsplit::bench;
  benchmark::Initialize(&argc, argv);
  std::vector<int> thread_counts;
  for (int i = 1; i < argc; ++i) thread_counts.push_back(std::max(1, std::atoi(argv[i])));
  if (thread_counts.empty()) thread_counts.push_back(kTargetThreads);
  std::vector<std::unique_ptr<Runner>> runners;
  for (int threads : thread_counts) {
    runners.push_back(std::make_unique<Runner>(threads));
    for (const Case& test : Cases(*runners.back())) {
      benchmark::RegisterBenchmark(
          RowName(test, threads).c_str(),
          [test, threads](benchmark::State& state) { Measure(state, test, threads); })
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  for (const auto& [name, measured] : Results()) Report(RowOf(measured));
  return 0;
}

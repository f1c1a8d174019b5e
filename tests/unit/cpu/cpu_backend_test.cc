// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/cpu_backend.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <thread>

#include "server/cpu/decode.h"
#include "server/cpu/thread_pool.h"
#include "server/pipeline/numeric.h"
#include "tests/oracle/device_session.h"
#include "tests/oracle/numbers.h"
#include "tests/oracle/parity_suite.h"
#include "tests/oracle/reference.h"

namespace dynsplit {
namespace {

using oracle::DeviceSession;
using oracle::HostTensor;
using oracle::ParityShape;

std::unique_ptr<Backend> MakeBackend(int num_threads, int64_t memory_limit_bytes = 0) {
  return CreateCpuBackend({.num_threads = num_threads, .memory_limit_bytes = memory_limit_bytes})
      .value();
}

TEST(CpuBackend, RefusesNegativeOptions) {
  EXPECT_EQ(CreateCpuBackend({.num_threads = -1}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CreateCpuBackend({.memory_limit_bytes = -1}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(CpuBackend, SaysWhatItIs) {
  const auto backend = MakeBackend(3, 1 << 20);
  EXPECT_EQ(backend->info().name, "cpu");
  EXPECT_NE(backend->info().device.find("3 threads"), std::string::npos);
  EXPECT_EQ(backend->info().memory_bytes, 1 << 20);
  EXPECT_TRUE(backend->Healthy().ok());
}

TEST(CpuBackend, CountsBytesOfLiveBuffers) {
  const auto backend = MakeBackend(1);
  const auto stream = backend->CreateStream().value();
  {
    Buffer device = backend->Allocate(1000, *stream).value();
    Buffer host = backend->AllocateHost(77).value();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(device.data()) % 256, 0U);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(host.data()) % 64, 0U);
    EXPECT_EQ(backend->device_bytes_in_use(), 1000);
    EXPECT_EQ(backend->host_bytes_in_use(), 77);
    const Buffer alias = backend->ToDevice(host, *stream).value();
    EXPECT_EQ(alias.data(), host.data());
    EXPECT_EQ(backend->device_bytes_in_use(), 1000);
    const std::byte* data = device.data();
    const Buffer moved = backend->ToHost(std::move(device), *stream).value();
    EXPECT_EQ(moved.data(), data);
  }
  EXPECT_EQ(backend->device_bytes_in_use(), 0);
  EXPECT_EQ(backend->host_bytes_in_use(), 0);
}

TEST(CpuBackend, EverySizeFitsItsBlock) {
  const auto backend = MakeBackend(1);
  const auto stream = backend->CreateStream().value();
  for (int64_t size = 0; size < 5'000'000; size = size * 9 / 8 + 1) {
    const Buffer buffer = backend->Allocate(size, *stream).value();
    ASSERT_EQ(buffer.size_bytes(), size);
    if (size > 0) std::memset(buffer.data(), 1, static_cast<size_t>(size));  // sanitizers look on
  }
}

TEST(CpuBackend, ReusesFreedBlocks) {
  const auto backend = MakeBackend(1);
  const auto stream = backend->CreateStream().value();
  const std::byte* first = backend->Allocate(100'000, *stream).value().data();
  EXPECT_EQ(backend->Allocate(99'000, *stream).value().data(), first);
}

TEST(CpuBackend, RefusesMoreThanTheLimit) {
  const auto backend = MakeBackend(1, 10'000'000);
  const auto stream = backend->CreateStream().value();
  EXPECT_EQ(backend->Allocate(-1, *stream).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(backend->Allocate(int64_t{1} << 62, *stream).status().code(),
            absl::StatusCode::kResourceExhausted);
  Buffer half = backend->Allocate(6'000'000, *stream).value();
  EXPECT_EQ(backend->Allocate(4'000'001, *stream).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(backend->AllocateHost(4'000'001).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(backend->device_bytes_in_use(), 6'000'000);
  EXPECT_TRUE(backend->AllocateHost(4'000'000).ok());
  half.Reset();  // kept for reuse, and given up for a block of another size
  EXPECT_TRUE(backend->Allocate(10'000'000, *stream).ok());
}

TEST(CpuBackend, ScratchCountsAgainstTheLimit) {
  const ParityShape shape{.name = "limit", .num_tokens = 4096, .head_dim = 64, .num_queries = 16};
  const HostTensor keys = HostTensor::Cache(shape, 1);
  const HostTensor queries = HostTensor::Queries(shape, 2);
  const auto backend = MakeBackend(1, 1000);
  const auto stream = backend->CreateStream().value();
  std::vector<float> scores(4096);
  EXPECT_EQ(backend
                ->ScoreWindow({.queries = queries.view(),
                               .keys = keys.view(),
                               .softmax_scale = 0.125F,
                               .scores = scores.data()},
                              *stream)
                .code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(backend->device_bytes_in_use(), 0);
}

TEST(CpuBackend, BuffersOutliveTheBackend) {
  auto backend = MakeBackend(2);
  const auto stream = backend->CreateStream().value();
  Buffer buffer = backend->Allocate(5000, *stream).value();
  backend.reset();
  std::memset(buffer.data(), 1, 5000);
}

// All float results of one shape, as one list of words.
std::vector<float> FloatResults(Backend& backend, const ParityShape& shape) {
  DeviceSession session(backend);
  const TensorView keys = session.Upload(HostTensor::Cache(shape, 1));
  const TensorView values = session.Upload(HostTensor::Cache(shape, 2));
  const TensorView queries = session.Upload(HostTensor::Queries(shape, 3));
  const std::vector<int32_t> starts = oracle::RandomBlockStarts(shape, 4);
  const auto num_blocks = static_cast<int64_t>(starts.size()) - 1;
  const int64_t row = shape.num_kv_heads * shape.num_tokens;
  const int64_t summary = num_blocks * shape.num_kv_heads * shape.head_dim;
  const oracle::KeptSets kept = oracle::RandomKept(shape, 5);
  auto out = session.Poisoned<float>(2 * row + 2 * summary + shape.num_kv_heads * num_blocks +
                                     3 * shape.num_query_heads);
  float* window = out.data();
  float* differences = window + row;
  float* min = differences + row;
  float* max = min + summary;
  float* block_scores = max + summary;
  float* mass = block_scores + shape.num_kv_heads * num_blocks;
  Stream& stream = session.stream();
  const BlockSummaries summaries =
      DenseSummaries(DType::kFloat32, shape.num_kv_heads, shape.head_dim, min, max, nullptr);
  const int32_t* device_starts = session.Upload(starts);
  EXPECT_TRUE(backend
                  .ScoreWindow({.queries = queries,
                                .keys = keys,
                                .softmax_scale = 0.125F,
                                .pooling_kernel = shape.pooling_kernel,
                                .pooling = shape.pooling,
                                .scores = window},
                               stream)
                  .ok());
  EXPECT_TRUE(backend
                  .ScoreKeys({.keys = keys,
                              .method = ScoringPolicy::Method::kKeyDifference,
                              .scores = differences},
                             stream)
                  .ok());
  EXPECT_TRUE(backend
                  .SummarizeBlocks({.keys = keys,
                                    .block_starts = device_starts,
                                    .num_blocks = num_blocks,
                                    .summaries = summaries},
                                   stream)
                  .ok());
  const ScoreBlocksItem item{.queries = queries,
                             .summaries = summaries,
                             .block_starts = device_starts,
                             .num_blocks = num_blocks,
                             .block_scores = block_scores};
  EXPECT_TRUE(
      backend
          .ScoreBlocks(
              {.items = {&item, 1}, .num_kv_heads = shape.num_kv_heads, .softmax_scale = 0.125F},
              stream)
          .ok());
  EXPECT_TRUE(backend
                  .MeasureAttention({.queries = queries,
                                     .keys = keys,
                                     .values = values,
                                     .kept_keys = keys,
                                     .kept_values = values,
                                     .kept = session.Upload(kept.tokens),
                                     .groups = kept.groups,
                                     .num_kept = kept.num_kept,
                                     .rotation = {},
                                     .softmax_scale = 0.125F,
                                     .mass = mass,
                                     .err_sq = mass + shape.num_query_heads,
                                     .ref_sq = mass + 2 * shape.num_query_heads},
                                    stream)
                  .ok());
  return session.Read(std::move(out));
}

const ParityShape& ShapeNamed(const std::string& name) {
  for (const ParityShape& shape : oracle::ParityShapes()) {
    if (shape.name == name) return shape;
  }
  ADD_FAILURE() << name;
  return oracle::ParityShapes().front();
}

TEST(CpuBackend, ResultsDoNotDependOnTheNumberOfThreads) {
  for (const char* name : {"gqa8_d128_head_major", "gqa4_d128", "tokens_12289"}) {
    ParityShape shape = ShapeNamed(name);
    shape.kept_ratio = 1;  // kept keys are the keys
    const std::vector<float> expected = FloatResults(*MakeBackend(1), shape);
    for (int threads : {2, 3, 7}) {
      const std::vector<float> actual = FloatResults(*MakeBackend(threads), shape);
      ASSERT_EQ(actual.size(), expected.size());
      EXPECT_EQ(std::memcmp(actual.data(), expected.data(), expected.size() * sizeof(float)), 0)
          << name << " with " << threads << " threads";
    }
  }
}

TEST(CpuBackend, StreamsMayRunAtOnce) {
  const auto backend = MakeBackend(3);
  ParityShape shape = ShapeNamed("gqa4_d128");
  shape.kept_ratio = 1;
  const std::vector<float> expected = FloatResults(*backend, shape);
  std::vector<std::thread> callers;
  callers.reserve(5);
  std::atomic<int> wrong{0};
  for (int caller = 0; caller < 5; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 6; ++round) {
        const std::vector<float> actual = FloatResults(*backend, shape);
        if (std::memcmp(actual.data(), expected.data(), expected.size() * sizeof(float)) != 0) {
          ++wrong;
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(backend->device_bytes_in_use(), 0);
  EXPECT_EQ(backend->host_bytes_in_use(), 0);
}

TEST(ThreadPool, RunsEveryChunkOnceInSeparateSlots) {
  cpu::ThreadPool pool(4);
  std::vector<std::thread> callers;
  callers.reserve(5);
  std::atomic<int> failures{0};
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      for (int64_t chunks = 0; chunks < 300; ++chunks) {
        std::vector<std::atomic<int>> runs(static_cast<size_t>(chunks));
        std::vector<std::atomic<int>> inside(static_cast<size_t>(pool.num_slots()));
        pool.ParallelFor(chunks, [&](int64_t chunk, int slot) {
          if (inside[static_cast<size_t>(slot)]++ != 0) ++failures;
          ++runs[static_cast<size_t>(chunk)];
          --inside[static_cast<size_t>(slot)];
        });
        for (const auto& count : runs) failures += count != 1 ? 1 : 0;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(failures, 0);
}

// Every code of the small types, at every place of a vector, against numeric.h and the oracle.
TEST(Decode, AllCodes) {
  for (DType dtype :
       {DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3, DType::kFloat8E5M2, DType::kInt8}) {
    const int64_t bytes = DTypeBytes(dtype);
    const int64_t count = int64_t{1} << (8 * bytes);
    std::vector<std::byte> codes(static_cast<size_t>(count * bytes));
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(codes.data() + i * bytes, &i, static_cast<size_t>(bytes));
    }
    std::vector<float> decoded(static_cast<size_t>(count));
    cpu::DecodeRow(dtype, codes.data() + bytes, 1.0F, count - 1, decoded.data() + 1);
    cpu::DecodeRow(dtype, codes.data(), 1.0F, 1, decoded.data());
    for (int64_t i = 0; i < count; ++i) {
      const float expected = oracle::DecodeElement(dtype, codes.data() + i * bytes);
      const float actual = decoded[static_cast<size_t>(i)];
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(actual)) << i;
      } else {
        ASSERT_EQ(std::signbit(actual), std::signbit(expected)) << i;
        ASSERT_EQ(actual, expected) << i;
      }
      ASSERT_EQ(cpu::HasNonFinite(dtype, codes.data() + i * bytes, 1), !std::isfinite(expected));
    }
  }
}

TEST(Encode, RoundsAsNumericDoes) {
  // Every 1021st float, and the neighbourhoods of all codes and of their midpoints.
  std::vector<float> values;
  for (uint64_t bits = 0; bits <= 0xFFFFFFFF; bits += 10211) {
    const auto word = static_cast<uint32_t>(bits);
    float value = 0;
    std::memcpy(&value, &word, sizeof(value));
    values.push_back(value);
  }
  for (uint32_t top = 0; top < 0x10000; ++top) {
    for (uint32_t low : {0x0000U, 0x0001U, 0x7FFFU, 0x8000U, 0x8001U, 0xFFFFU, 0x1000U, 0x1001U}) {
      const uint32_t word = top << 16 | low;
      float value = 0;
      std::memcpy(&value, &word, sizeof(value));
      values.push_back(value);
    }
  }
  const auto count = static_cast<int64_t>(values.size());
  std::vector<uint16_t> halves(values.size());
  std::vector<uint8_t> bytes(values.size());
  const auto out16 = reinterpret_cast<std::byte*>(halves.data());
  cpu::EncodeRow(DType::kBFloat16, values.data(), 1.0F, count, out16);
  for (size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(halves[i], FloatToBFloat16(values[i])) << values[i];
  }
  cpu::EncodeRow(DType::kFloat16, values.data(), 1.0F, count, out16);
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isnan(values[i])) continue;
    ASSERT_EQ(halves[i], FloatToFloat16(values[i])) << values[i];
  }
  cpu::EncodeRow(DType::kFloat8E4M3, values.data(), 1.0F, count,
                 reinterpret_cast<std::byte*>(bytes.data()));
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isnan(values[i])) continue;
    ASSERT_EQ(bytes[i], FloatToFloat8E4M3(values[i])) << values[i];
  }
}

// gcc tells by a macro, clang by a feature.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#elif defined(__has_feature)
constexpr bool kSanitized = __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
constexpr bool kSanitized = false;
#endif

// 2 GiB in and 2 GiB out: some seconds, but minutes under a sanitizer.
TEST(CpuBackendSlow, MoreThanTwoGibiElements) {
  if (kSanitized) GTEST_SKIP() << "too slow and too large under a sanitizer";
  if (std::getenv("DYNSPLIT_SKIP_SLOW_TESTS") != nullptr) {
    GTEST_SKIP() << "DYNSPLIT_SKIP_SLOW_TESTS is set";
  }
  oracle::CheckBeyondTwoGibiElements(*MakeBackend(0));
}

}  // namespace
}  // namespace dynsplit

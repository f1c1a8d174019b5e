// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/cpu_backend.h"

#include <gtest/gtest.h>
#include <hwy/cache_control.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "server/cpu/block_ranks.h"
#include "server/cpu/decode.h"
#include "server/cpu/encode_bounds.h"
#include "server/cpu/row_math.h"
#include "server/cpu/thread_pool.h"
#include "server/pipeline/errors.h"
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

TEST(CpuBackend, ResidentMemoryIsExactAndUnderTheSameLimit) {
  const auto backend = MakeBackend(1, 10'000'000);
  const auto stream = backend->CreateStream().value();
  Buffer device = backend->AllocateResident(3'000'001, Residence::kDevice).value();
  const Buffer host = backend->AllocateResident(2'000'003, Residence::kHost).value();
  EXPECT_EQ(reinterpret_cast<uintptr_t>(device.data()) % 256, 0U);
  EXPECT_EQ(backend->device_bytes_in_use(), 3'000'001);
  EXPECT_EQ(backend->host_bytes_in_use(), 2'000'003);
  for (Residence residence : {Residence::kDevice, Residence::kHost}) {
    EXPECT_EQ(backend->AllocateResident(4'999'997, residence).status().code(),
              absl::StatusCode::kResourceExhausted);
    EXPECT_TRUE(backend->AllocateResident(4'999'996, residence).ok());
  }
  device.Reset();
  EXPECT_EQ(backend->device_bytes_in_use(), 0);
  EXPECT_TRUE(backend->Allocate(7'999'997, *stream).ok());
  EXPECT_EQ(backend->AllocateResident(0, Residence::kDevice).value().size_bytes(), 0);
}

TEST(CpuBackend, HandlesAreUnimplemented) {
  const auto backend = MakeBackend(1);
  const Buffer buffer = backend->AllocateResident(64, Residence::kDevice).value();
  EXPECT_TRUE(backend->info().uuid.empty());
  const absl::Status statuses[] = {backend->ExportHandle(buffer).status(),
                                   backend->ImportHandle("handle", 0, 64).status()};
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
    EXPECT_EQ(GetErrorDetails(status).type, "UNSUPPORTED_ON_CPU");
  }
}

TEST(CpuBackend, RegisteredMemoryIsAnAlias) {
  const auto backend = MakeBackend(1);
  std::vector<std::byte> memory(100);
  const Buffer buffer = backend->RegisterHost(memory.data(), 100).value();
  EXPECT_EQ(buffer.data(), memory.data());
  EXPECT_EQ(buffer.size_bytes(), 100);
  EXPECT_EQ(backend->host_bytes_in_use(), 0);
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
                                     3 * shape.num_query_heads +
                                     shape.num_query_heads * (shape.head_dim + 1));
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
  float* lse = mass + 3 * shape.num_query_heads;
  std::vector<float> query(static_cast<size_t>(shape.num_query_heads * shape.head_dim), 0.25F);
  const AttendTokensItem attend{
      .queries = DenseView(session.Upload(query), DType::kFloat32, 1, shape.num_query_heads,
                           shape.head_dim),
      .keys = keys,
      .values = values,
      .tokens = session.Upload(kept.tokens),
      .num_tokens = kept.num_kept,
      .tail_keys = DenseView(nullptr, shape.dtype, 0, shape.num_kv_heads, shape.head_dim),
      .tail_values = DenseView(nullptr, shape.dtype, 0, shape.num_kv_heads, shape.head_dim),
      .output = lse + shape.num_query_heads,
      .lse = lse};
  EXPECT_TRUE(
      backend
          .AttendTokens({.items = {&attend, 1}, .groups = kept.groups, .softmax_scale = 0.125F},
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
      for (int round = 0; round < 3; ++round) {
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

// All codes and their neighbourhoods, both ways, against all numbers of the type.
// Finite codes of every exponent, aligned and not, around the caches and through them.
TEST(TurnRow, EqualsDecodingTurningAndEncoding) {
  constexpr int64_t kCount = 128;
  std::mt19937_64 random(3);
  alignas(64) std::array<uint16_t, kCount + 1> out;
  for (const int64_t rotary_dim : {64, 128}) {
    const oracle::HostRotation rotation =
        oracle::MakeRotation(4096, static_cast<int32_t>(rotary_dim), false);
    std::array<float, kCount> cos_sin;
    float* cos = cos_sin.data();
    float* sin = cos + rotary_dim / 2;
    for (int repeat = 0; repeat < 2000; ++repeat) {
      cpu::RotationAngles(rotation.table(), static_cast<int64_t>(random() % 4096), cos, sin);
      std::array<uint16_t, kCount> row;
      for (uint16_t& code : row) code = static_cast<uint16_t>(random() % 0x7F80 | random() << 15);
      std::array<float, kCount> expected;
      const auto* bytes = reinterpret_cast<const std::byte*>(row.data());
      cpu::DecodeRow(DType::kBFloat16, bytes, 1, kCount, expected.data());
      cpu::TurnBack(rotation.table(), cos, sin, expected.data());
      std::array<uint16_t, kCount> encoded;
      cpu::EncodeRow(DType::kBFloat16, expected.data(), 1, kCount,
                     reinterpret_cast<std::byte*>(encoded.data()));
      uint16_t* const target = out.data() + repeat % 2;
      if (!cpu::TurnRow({.dtype = DType::kBFloat16,
                         .count = kCount,
                         .rotary_dim = rotary_dim,
                         .row = bytes,
                         .cos = cos,
                         .sin = sin,
                         .out = reinterpret_cast<std::byte*>(target),
                         .stream = repeat % 4 < 2})) {
        GTEST_SKIP() << "not written for vectors of " << cpu::VectorTargetName();
      }
      hwy::FlushStream();
      ASSERT_EQ(std::memcmp(target, encoded.data(), sizeof(encoded)), 0) << repeat;
    }
  }
}

TEST(EncodeBounds, IsTheNearestNumberOnThatSide) {
  std::vector<float> values = {0.0F, -0.0F, 0x1p-149F, -0x1p-149F, 1e-30F, -1e-30F};
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const auto top = static_cast<uint16_t>(code);
    const float value =
        oracle::DecodeElement(DType::kBFloat16, reinterpret_cast<const std::byte*>(&top));
    if (!(std::fabs(value) <= 448)) continue;
    values.push_back(value);
    values.push_back(std::nextafter(value, 1000.0F));
    values.push_back(std::nextafter(value, -1000.0F));
  }
  std::erase_if(values, [](float value) { return std::fabs(value) > 448; });
  const auto count = static_cast<int64_t>(values.size());
  for (float scale : {1.0F, 0x1p100F, 0x1p-120F}) {
    std::vector<float> scaled = values;
    if (scale != 1) std::erase_if(scaled, [](float value) { return std::fabs(value) < 0x1p-9F; });
    for (float& value : scaled) value *= scale;
    if (scale > 1) scaled.insert(scaled.end(), {0x1p-140F, -0x1p-140F});  // vanish when divided
    for (DType dtype : {DType::kBFloat16, DType::kFloat8E4M3}) {
      for (bool up : {false, true}) {
        const double unit = dtype == DType::kFloat8E4M3 ? scale : 1;
        std::vector<std::byte> actual(scaled.size() * static_cast<size_t>(DTypeBytes(dtype)));
        cpu::EncodeBounds(dtype, up ? cpu::Rounding::kUp : cpu::Rounding::kDown, scaled.data(),
                          scale, static_cast<int64_t>(scaled.size()), actual.data());
        for (size_t i = 0; i < scaled.size(); ++i) {
          std::byte expected[2] = {};
          oracle::EncodeBound(dtype, scaled[i] / unit, up, expected);
          ASSERT_EQ(std::memcmp(actual.data() + static_cast<int64_t>(i) * DTypeBytes(dtype),
                                expected, static_cast<size_t>(DTypeBytes(dtype))),
                    0)
              << scaled[i] << (up ? " up" : " down") << ", scale " << scale;
        }
      }
    }
  }
  EXPECT_GT(count, 100'000);
}

TEST(BoundScale, IsTheSmallestPowerOfTwo) {
  for (float amax = 0x1p-149F; amax < 3e38F; amax *= 1.37F) {
    for (float x : {amax, std::nextafter(amax, 0.0F), std::nextafter(amax, 3e38F)}) {
      ASSERT_EQ(cpu::BoundScale(x), oracle::PowerOfTwoScale(x)) << x;
    }
    if (amax < 0x1p-140F) amax *= 2;  // a subnormal times 1.37 may stay what it was
  }
  for (int exponent = -120; exponent <= 119; ++exponent) {
    const float edge = std::ldexp(448.0F, exponent);
    if (std::isinf(edge)) break;
    EXPECT_EQ(cpu::BoundScale(edge), std::ldexp(1.0F, exponent));
    EXPECT_EQ(cpu::BoundScale(std::nextafter(edge, 3.4e38F)), std::ldexp(1.0F, exponent + 1));
  }
  EXPECT_EQ(cpu::BoundScale(0), 1);
}

TEST(CutRanks, TakesBlocksInOrderUntilTheBudgetIsSpent) {
  const std::vector<float> scores = {1, 5, 5, -2, 9, 0};
  const std::vector<int32_t> free = {3, 2, 4, 1, 2, 0};
  const std::vector<int64_t> order = {4, 1, 2, 0, 5, 3};
  for (int64_t room = 0; room <= 13; ++room) {
    std::vector<uint64_t> keys;
    for (size_t j = 0; j < scores.size(); ++j) {
      keys.push_back(cpu::RankKey(scores[j], static_cast<int64_t>(j)));
    }
    const cpu::RankCut cut = cpu::CutRanks(keys, free, room);
    int64_t left = room;
    for (int64_t j : order) {
      const auto index = static_cast<size_t>(j);
      const uint64_t key = cpu::RankKey(scores[index], j);
      if (key < cut.key) {
        left -= free[index];
      } else if (key == cut.key) {
        EXPECT_EQ(cut.tokens, left) << room;
        EXPECT_LT(cut.tokens, free[index]) << room;
      }
    }
    EXPECT_GE(left, 0);
    EXPECT_EQ(cut.key == UINT64_MAX, room >= 12);
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

// SPDX-License-Identifier: Apache-2.0
//
// The engine library as an engine loads it: by name, through its C interface.
#include "cuda/engine/dynsplit_engine.h"

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tests/gpu/gpu.h"

// Of the CUDA runtime that the backend brings; the library's own is unseen.
extern "C" int cudaDeviceSynchronize();

namespace dynsplit {
namespace {

// Beside the tests in a bundle, or where the build leaves it.
std::string LibraryPath() {
  const std::filesystem::path here = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  for (const char* const place : {"../lib", "../cuda/engine"}) {
    const std::filesystem::path path = here / place / "libdynsplit_engine.so";
    if (std::filesystem::exists(path)) return path.string();
  }
  return "libdynsplit_engine.so";
}

class EngineTest : public testing::Test {
 protected:
  void SetUp() override {
    gpu_ = Gpu();
    ASSERT_NE(gpu_, nullptr);
    library_ = dlopen(LibraryPath().c_str(), RTLD_NOW | RTLD_LOCAL);
    ASSERT_NE(library_, nullptr) << dlerror();
    stream_ = gpu_->CreateStream().value();
  }

  template <typename Function>
  Function* Find(Function* /*like*/, const char* name) {
    void* const symbol = dlsym(library_, name);
    EXPECT_NE(symbol, nullptr) << name;
    return std::bit_cast<Function*>(symbol);
  }
  std::string Error() { return Find(&dynsplit_engine_error, "dynsplit_engine_error")(); }

  template <typename T>
  Buffer Upload(const std::vector<T>& values) {
    Buffer host = gpu_->AllocateHost(static_cast<int64_t>(values.size() * sizeof(T))).value();
    std::memcpy(host.data(), values.data(), values.size() * sizeof(T));
    Buffer device = gpu_->ToDevice(host, *stream_).value();
    EXPECT_TRUE(stream_->Synchronize().ok());
    return device;
  }
  Buffer Zeros(int64_t size_bytes) {
    return Upload(std::vector<uint8_t>(static_cast<size_t>(size_bytes), 0));
  }
  template <typename T>
  std::vector<T> Download(Buffer device) {
    std::vector<T> values(static_cast<size_t>(device.size_bytes()) / sizeof(T));
    Buffer host = gpu_->ToHost(std::move(device), *stream_).value();
    EXPECT_TRUE(stream_->Synchronize().ok());
    std::memcpy(values.data(), host.data(), values.size() * sizeof(T));
    return values;
  }

  Backend* gpu_ = nullptr;
  void* library_ = nullptr;
  std::unique_ptr<Stream> stream_;
};

constexpr int32_t kQueryHeads = 6;
constexpr int32_t kKvHeads = 2;
constexpr int32_t kHeadDim = 64;
constexpr int32_t kGroup = kQueryHeads / kKvHeads;
constexpr int64_t kCapacity = 400;
constexpr int64_t kRowBytes = kHeadDim * 2;
constexpr float kScale = 0.125F;

dynsplit_attend_shape Shape() {
  return {.num_query_heads = kQueryHeads,
          .num_kv_heads = kKvHeads,
          .head_dim = kHeadDim,
          .query_dtype = DYNSPLIT_BFLOAT16,
          .key_dtype = DYNSPLIT_BFLOAT16,
          .value_dtype = DYNSPLIT_BFLOAT16,
          .token_groups = kKvHeads,
          .scales_per_head = 0,
          .softmax_scale = kScale};
}

float ToFloat(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// bfloat16 numbers in (-2, 2).
std::vector<uint16_t> Random(size_t count, uint32_t seed) {
  std::vector<uint16_t> values(count);
  uint32_t state = seed;
  for (uint16_t& value : values) {
    state = state * 1664525U + 1013904223U;
    const float x = static_cast<float>(state >> 8) / static_cast<float>(1U << 23) - 1.0F;
    value = static_cast<uint16_t>(std::bit_cast<uint32_t>(2 * x) >> 16);
  }
  return values;
}

// A sequence, head-major, on the host.
struct Sequence {
  std::vector<uint16_t> queries, keys, values, tail_keys, tail_values;
  std::vector<int32_t> tokens;  // [kKvHeads, num_tokens]
  int64_t num_tokens = 0;
  int64_t num_tail_rows = 0;
};

Sequence MakeSequence(int64_t num_tokens, int64_t num_tail_rows, uint32_t seed) {
  constexpr size_t kSide = kKvHeads * kCapacity * kHeadDim;
  const auto tail = static_cast<size_t>(std::max<int64_t>(num_tail_rows, 1)) * kKvHeads * kHeadDim;
  Sequence sequence = {.queries = Random(kQueryHeads * kHeadDim, seed),
                       .keys = Random(kSide, seed + 1),
                       .values = Random(kSide, seed + 2),
                       .tail_keys = Random(tail, seed + 3),
                       .tail_values = Random(tail, seed + 4),
                       .tokens = {},
                       .num_tokens = num_tokens,
                       .num_tail_rows = num_tail_rows};
  for (int32_t h = 0; h < kKvHeads; ++h) {
    for (int64_t i = 0; i < num_tokens; ++i) {
      sequence.tokens.push_back(static_cast<int32_t>((i * kCapacity + h) / num_tokens));
    }
  }
  return sequence;
}

// Output [kHeadDim] of query head `a`, then its lse, in double precision.
std::vector<double> Expected(const Sequence& s, int32_t a) {
  const int32_t h = a / kGroup;
  const uint16_t* const query = s.queries.data() + int64_t{a} * kHeadDim;
  std::vector<std::pair<const uint16_t*, const uint16_t*>> rows;
  for (int64_t i = 0; i < s.num_tokens; ++i) {
    const int64_t token = s.tokens[static_cast<size_t>(h * s.num_tokens + i)];
    const int64_t at = (h * kCapacity + token) * kHeadDim;
    rows.emplace_back(&s.keys[static_cast<size_t>(at)], &s.values[static_cast<size_t>(at)]);
  }
  for (int64_t i = 0; i < s.num_tail_rows; ++i) {
    const auto at = static_cast<size_t>((i * kKvHeads + h) * kHeadDim);
    rows.emplace_back(&s.tail_keys[at], &s.tail_values[at]);
  }
  std::vector<double> result(kHeadDim + 1, 0.0);
  double sum = 0;
  for (const auto& [key, value] : rows) {
    double logit = 0;
    for (int32_t c = 0; c < kHeadDim; ++c) {
      logit += double{ToFloat(query[c])} * ToFloat(key[c]);
    }
    const double weight = std::exp(logit * kScale);
    sum += weight;
    for (int32_t c = 0; c < kHeadDim; ++c) {
      result[static_cast<size_t>(c)] += weight * ToFloat(value[c]);
    }
  }
  for (double& x : result) x /= sum;
  result.back() = std::log(sum);
  return result;
}

TEST_F(EngineTest, AttendsOverChosenAndTailRows) {
  const std::array<Sequence, 4> sequences = {MakeSequence(0, 1, 1), MakeSequence(7, 0, 20),
                                             MakeSequence(150, 3, 40), MakeSequence(400, 21, 60)};
  std::vector<Buffer> memory;
  std::vector<Buffer> outputs;
  std::vector<Buffer> lses;
  std::vector<dynsplit_attend_item> items;
  const auto upload = [&](const auto& values) {
    return memory.emplace_back(Upload(values)).data();
  };
  const dynsplit_rows head_major = {.data = nullptr,
                                    .token_stride_bytes = kRowBytes,
                                    .head_stride_bytes = kCapacity * kRowBytes,
                                    .scales = nullptr};
  const dynsplit_rows row_major = {.data = nullptr,
                                   .token_stride_bytes = kKvHeads * kRowBytes,
                                   .head_stride_bytes = kRowBytes,
                                   .scales = nullptr};
  for (const Sequence& sequence : sequences) {
    outputs.push_back(Zeros(kQueryHeads * kRowBytes));
    lses.push_back(Zeros(kQueryHeads * int64_t{sizeof(float)}));
    dynsplit_attend_item item = {.queries = upload(sequence.queries),
                                 .query_stride_bytes = kRowBytes,
                                 .keys = head_major,
                                 .values = head_major,
                                 .tokens = nullptr,
                                 .num_tokens = sequence.num_tokens,
                                 .tail_keys = row_major,
                                 .tail_values = row_major,
                                 .num_tail_rows = sequence.num_tail_rows,
                                 .output = outputs.back().data(),
                                 .lse = lses.back().as<float>()};
    item.keys.data = upload(sequence.keys);
    item.values.data = upload(sequence.values);
    item.tail_keys.data = upload(sequence.tail_keys);
    item.tail_values.data = upload(sequence.tail_values);
    if (sequence.num_tokens > 0) {
      item.tokens = reinterpret_cast<const int32_t*>(upload(sequence.tokens));
    }
    items.push_back(item);
  }
  const dynsplit_attend_shape shape = Shape();
  const auto num_items = static_cast<int64_t>(items.size());
  int64_t workspace_bytes = 0;
  ASSERT_EQ(Find(&dynsplit_attend_workspace_bytes, "dynsplit_attend_workspace_bytes")(
                &shape, num_items, &workspace_bytes),
            DYNSPLIT_OK)
      << Error();
  const Buffer workspace = Zeros(workspace_bytes);
  ASSERT_EQ(Find(&dynsplit_attend, "dynsplit_attend")(&shape, items.data(), num_items,
                                                      workspace.data(), workspace_bytes, nullptr),
            DYNSPLIT_OK)
      << Error();
  ASSERT_EQ(cudaDeviceSynchronize(), 0);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const auto output = Download<uint16_t>(std::move(outputs[i]));
    const auto lse = Download<float>(std::move(lses[i]));
    for (int32_t a = 0; a < kQueryHeads; ++a) {
      const std::vector<double> expected = Expected(sequences[i], a);
      EXPECT_NEAR(lse[static_cast<size_t>(a)], expected.back(), 1e-4) << "item " << i;
      for (int32_t c = 0; c < kHeadDim; ++c) {
        const double want = expected[static_cast<size_t>(c)];
        // A step of bfloat16, and fp32 arithmetic.
        EXPECT_NEAR(ToFloat(output[static_cast<size_t>(a * kHeadDim + c)]), want,
                    std::abs(want) / 256 + 1e-4)
            << "item " << i << ", head " << a << ", channel " << c;
      }
    }
  }
}

TEST_F(EngineTest, SaysWhatIsWrong) {
  int64_t bytes = 0;
  auto* const workspace_bytes =
      Find(&dynsplit_attend_workspace_bytes, "dynsplit_attend_workspace_bytes");
  dynsplit_attend_shape shape = Shape();
  shape.head_dim = 63;
  EXPECT_EQ(workspace_bytes(&shape, 1, &bytes), DYNSPLIT_INVALID_ARGUMENT);
  EXPECT_NE(Error().find("head_dim is 63"), std::string::npos) << Error();
  shape = Shape();
  EXPECT_EQ(workspace_bytes(&shape, 0, &bytes), DYNSPLIT_INVALID_ARGUMENT);
  ASSERT_EQ(workspace_bytes(&shape, 1, &bytes), DYNSPLIT_OK) << Error();

  auto* const attend = Find(&dynsplit_attend, "dynsplit_attend");
  const Buffer workspace = Zeros(bytes);
  dynsplit_attend_item item = {};
  EXPECT_EQ(attend(&shape, &item, 1, workspace.data(), bytes, nullptr), DYNSPLIT_INVALID_ARGUMENT);
  EXPECT_NE(Error().find("items[0].num_tokens"), std::string::npos) << Error();
  EXPECT_EQ(attend(&shape, nullptr, 0, workspace.data(), 0, nullptr), DYNSPLIT_INVALID_ARGUMENT);
  EXPECT_NE(Error().find("workspace_bytes is 0"), std::string::npos) << Error();
  EXPECT_EQ(attend(&shape, nullptr, 0, workspace.data(), bytes, nullptr), DYNSPLIT_OK);
}

TEST_F(EngineTest, AllocatesWhatOthersCanMap) {
  auto* const allocate = Find(&dynsplit_allocate, "dynsplit_allocate");
  void* data = nullptr;
  std::array<unsigned char, 64> handle = {};
  ASSERT_EQ(allocate(1 << 20, &data, handle.data()), DYNSPLIT_OK) << Error();
  EXPECT_NE(data, nullptr);
  EXPECT_NE(handle, (std::array<unsigned char, 64>{}));
  EXPECT_EQ(Find(&dynsplit_free, "dynsplit_free")(data), DYNSPLIT_OK) << Error();
  EXPECT_EQ(allocate(0, &data, handle.data()), DYNSPLIT_INVALID_ARGUMENT);
}

TEST_F(EngineTest, NamesTheDevice) {
  std::array<unsigned char, 16> uuid = {};
  ASSERT_EQ(Find(&dynsplit_device_uuid, "dynsplit_device_uuid")(uuid.data()), DYNSPLIT_OK)
      << Error();
  EXPECT_NE(uuid, (std::array<unsigned char, 16>{}));
}

}  // namespace
}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// GatherPages beyond the shapes that the naive reference can take: heads whose rows are encoded
// chunk by chunk while they are in the L2 cache. The CPU's bytes are the reference; the parity
// suite has shown them right.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "tests/gpu/gpu.h"
#include "tests/oracle/random_tensors.h"

namespace dynsplit {
namespace {

using Format = EncodingPolicy::Format;

constexpr int32_t kHeads = 6;
constexpr int32_t kDim = 128;
constexpr int64_t kTokens = 60000;
constexpr int64_t kElements = kTokens * kHeads * kDim;
constexpr int32_t kPageSize = 16;

int64_t NumSlots(int64_t num_kept) { return (num_kept + kPageSize - 1) / kPageSize * kPageSize; }

struct Case {
  int64_t num_kept = 0;
  int32_t groups = 1;
  Format format = Format::kFloat8E4M3;
  bool turned = false;
};

// What the items read; host memory that both backends copy.
class GatherInputs {
 public:
  GatherInputs()
      : rotation_(oracle::MakeRotation(kTokens, kDim, /*interleaved=*/false)),
        elements_(static_cast<size_t>(kElements)) {
    oracle::Random random(5);
    std::vector<uint16_t> block(1 << 16);
    for (uint16_t& element : block) {
      const float value = random.Normal();
      uint32_t bits = 0;
      std::memcpy(&bits, &value, sizeof(bits));
      element = static_cast<uint16_t>(bits >> 16);  // bf16, truncated
    }
    // Heads differ in their largest magnitudes.
    for (size_t i = 0; i < elements_.size(); ++i) elements_[i] = block[(i * 7 + i / 65537) % 65536];
    for (int32_t h = 0; h < kHeads; ++h) {
      const auto token = static_cast<size_t>(1000 + 9001 * h);
      elements_[(token * kHeads + static_cast<size_t>(h)) * kDim + 3] =
          static_cast<uint16_t>(0x4100 + 16 * h);  // 8, 9, 10, ...
    }
    oracle::ParityShape shape = {.name = "gather", .num_tokens = kTokens, .num_kv_heads = kHeads};
    shape.kept_per_head = true;
    shape.kept_ratio = 0.9;
    kept_ = oracle::RandomKept(shape, 6);
  }

  const std::vector<uint16_t>& elements() const { return elements_; }
  const oracle::HostRotation& rotation() const { return rotation_; }
  // The first `num_kept` of each set.
  std::vector<int32_t> Kept(const Case& test) const {
    std::vector<int32_t> tokens;
    for (int32_t g = 0; g < test.groups; ++g) {
      const auto first = kept_.tokens.begin() + g * kept_.num_kept;
      tokens.insert(tokens.end(), first, first + test.num_kept);
    }
    return tokens;
  }

 private:
  const oracle::HostRotation rotation_;
  std::vector<uint16_t> elements_;
  oracle::KeptSets kept_;
};

template <typename T>
Buffer UploadTo(Backend& backend, Stream& stream, const std::vector<T>& values) {
  return backend
      .ToDevice(Buffer(reinterpret_cast<std::byte*>(const_cast<T*>(values.data())),
                       static_cast<int64_t>(values.size() * sizeof(T)), nullptr),
                stream)
      .value();
}

// Pages and scales of all cases, gathered in one call.
std::vector<std::vector<std::byte>> Gather(Backend& backend, const GatherInputs& inputs,
                                           const std::vector<Case>& cases) {
  auto stream = backend.CreateStream().value();
  const Buffer source = UploadTo(backend, *stream, inputs.elements());
  const Buffer coarse = UploadTo(backend, *stream, inputs.rotation().coarse);
  const Buffer fine = UploadTo(backend, *stream, inputs.rotation().fine);
  std::vector<std::vector<int32_t>> kept_host;
  std::vector<Buffer> kept;
  std::vector<Buffer> outputs;
  std::vector<GatherPagesItem> items;
  for (const Case& test : cases) kept_host.push_back(inputs.Kept(test));
  for (size_t i = 0; i < cases.size(); ++i) {
    const Case& test = cases[i];
    kept.push_back(UploadTo(backend, *stream, kept_host[i]));
    const bool encoded = test.format != Format::kAsIs;
    const int64_t bytes = NumSlots(test.num_kept) * kHeads * kDim * (encoded ? 1 : 2);
    outputs.push_back(backend.Allocate(bytes, *stream).value());
    const int64_t scale_bytes = kHeads * int64_t{sizeof(float)};
    outputs.push_back(encoded ? backend.Allocate(scale_bytes, *stream).value() : Buffer());
    GatherPagesItem item;
    item.source = DenseView(source.data(), DType::kBFloat16, kTokens, kHeads, kDim);
    item.kept = kept.back().as<int32_t>();
    item.groups = test.groups;
    item.num_kept = test.num_kept;
    item.page_size = kPageSize;
    item.format = test.format;
    item.out_dtype = OutputDType(DType::kBFloat16, test.format, test.turned);
    if (test.turned) {
      item.rotation = {.coarse = coarse.as<float>(), .fine = fine.as<float>(), .rotary_dim = kDim};
    }
    item.pages = outputs[2 * i].data();
    item.scales = encoded ? outputs[2 * i + 1].as<float>() : nullptr;
    items.push_back(item);
  }
  const absl::Status status = backend.GatherPages({.items = items}, *stream);
  EXPECT_TRUE(status.ok()) << status;
  std::vector<Buffer> hosts;
  for (Buffer& output : outputs) {
    hosts.push_back(output.empty() ? Buffer() : backend.ToHost(std::move(output), *stream).value());
  }
  EXPECT_TRUE(stream->Synchronize().ok());
  std::vector<std::vector<std::byte>> results;
  for (const Buffer& host : hosts) {
    results.emplace_back(host.data(), host.data() + host.size_bytes());
  }
  return results;
}

void ExpectSameOnBoth(const std::vector<Case>& cases) {
  ASSERT_NE(Gpu(), nullptr);
  const auto inputs = std::make_unique<GatherInputs>();
  const auto expected = Gather(Cpu(), *inputs, cases);
  for (int round = 0; round < 3; ++round) {
    const auto actual = Gather(*Gpu(), *inputs, cases);
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_TRUE(actual[i] == expected[i])
          << (i % 2 == 0 ? "pages" : "scales") << " of case " << i / 2 << ", round " << round;
    }
  }
}

// 1.5 to 13.8 MB a head: chunks of all heads, of several, and of one.
TEST(GatherPagesTest, HeadScalesChunkByChunk) {
  ExpectSameOnBoth({{.num_kept = 54000, .groups = kHeads},
                    {.num_kept = 12001, .groups = 1},
                    {.num_kept = 3},
                    {.num_kept = 0},
                    {.num_kept = 6000, .groups = kHeads},
                    {.num_kept = 53999, .groups = 1}});
}

TEST(GatherPagesTest, TurnedKeysAndIntegers) {
  ExpectSameOnBoth({{.num_kept = 40000, .groups = kHeads, .turned = true},
                    {.num_kept = 30011, .groups = 1, .turned = true},
                    {.num_kept = 30011, .groups = kHeads, .format = Format::kInt8},
                    {.num_kept = 54000, .groups = 1, .format = Format::kInt8},
                    {.num_kept = 30011, .groups = 1, .format = Format::kAsIs, .turned = true}});
}

TEST(GatherPagesTest, CopiesOfManyItems) {
  std::vector<Case> cases;
  for (int64_t i = 0; i < 20; ++i) {
    cases.push_back(
        {.num_kept = i * i * 17, .groups = i % 2 == 0 ? 1 : kHeads, .format = Format::kAsIs});
  }
  ExpectSameOnBoth(cases);
}

}  // namespace
}  // namespace dynsplit

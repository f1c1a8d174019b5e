// SPDX-License-Identifier: Apache-2.0
//
// Parity of GatherPages and CheckFinite: bytes are equal, not close.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "tests/oracle/device_session.h"
#include "tests/oracle/numbers.h"
#include "tests/oracle/parity_suite.h"
#include "tests/oracle/reference.h"
#include "tests/oracle/tolerance.h"

namespace dynsplit::oracle {
namespace {

using Format = EncodingPolicy::Format;

struct GatherCase {
  Format format = Format::kAsIs;
  ScaleGranularity granularity = ScaleGranularity::kHead;
  int32_t rotary_dim = 0;
  bool interleaved = false;
};

// One item, with what it must give.
class GatherJob {
 public:
  // Takes the first `num_kept` of each of the kept sets.
  GatherJob(DeviceSession& session, const ParityShape& shape, const HostTensor& source,
            const GatherCase& test, const KeptSets& kept, int64_t num_kept) {
    std::vector<int32_t> tokens;
    for (int32_t g = 0; g < kept.groups; ++g) {
      const auto first = kept.tokens.begin() + g * kept.num_kept;
      tokens.insert(tokens.end(), first, first + num_kept);
    }
    const HostRotation rotation = MakeRotation(shape.num_tokens, test.rotary_dim, test.interleaved);
    item_ = {.source = source.view(),
             .kept = tokens.data(),
             .groups = kept.groups,
             .num_kept = num_kept,
             .page_size = shape.page_size,
             .format = test.format,
             .scale_granularity = test.granularity,
             .out_dtype = EncodedType(shape.dtype, test.format, test.rotary_dim > 0),
             .rotation = rotation.table()};
    expected_ = GatherPages(item_);
    item_.source = session.Upload(source);
    item_.kept = session.Upload(tokens);
    if (test.rotary_dim > 0) item_.rotation = session.Upload(rotation);
    pages_ = session.Poisoned<std::byte>(static_cast<int64_t>(expected_.bytes.size()));
    scales_ = session.Poisoned<float>(static_cast<int64_t>(expected_.scales.size()));
    item_.pages = pages_.data();
    item_.scales = expected_.scales.empty() ? nullptr : scales_.data();
  }

  const GatherPagesItem& item() const { return item_; }
  void Check(DeviceSession& session) {
    ExpectSameBits(session.Read(std::move(scales_)), expected_.scales, "scales");
    ExpectSameBits(session.Read(std::move(pages_)), expected_.bytes, "page bytes");
  }

 private:
  GatherPagesItem item_;
  Pages expected_;
  Output<std::byte> pages_;
  Output<float> scales_;
};

void CheckGather(Backend& backend, const ParityShape& shape, const HostTensor& source,
                 const GatherCase& test) {
  SCOPED_TRACE("format " + std::to_string(static_cast<int>(test.format)) + ", granularity " +
               std::to_string(static_cast<int>(test.granularity)) + ", rotary " +
               std::to_string(test.rotary_dim) + (test.interleaved ? " interleaved" : ""));
  const KeptSets kept = RandomKept(shape, 32);
  DeviceSession session(backend);
  GatherJob job(session, shape, source, test, kept, kept.num_kept);
  ASSERT_TRUE(backend.GatherPages({.items = {&job.item(), 1}}, session.stream()).ok());
  job.Check(session);
}

// K and V in one call; where it does not take long, with so many items of all kinds and sizes that
// they do not go into one launch.
void CheckGatherBatch(Backend& backend, const ParityShape& shape, const HostTensor& keys) {
  const HostTensor values = HostTensor::Cache(shape, 35);
  const KeptSets kept = RandomKept(shape, 36);
  DeviceSession session(backend);
  std::vector<GatherJob> jobs;
  jobs.emplace_back(
      session, shape, keys,
      GatherCase{shape.format, shape.granularity, shape.rotary_dim, shape.interleaved}, kept,
      kept.num_kept);
  jobs.emplace_back(session, shape, values, GatherCase{shape.format, shape.granularity}, kept,
                    kept.num_kept);
  if (shape.small()) {
    for (Format format : {Format::kAsIs, Format::kFloat8E4M3, Format::kInt8}) {
      for (auto granularity : {ScaleGranularity::kHead, ScaleGranularity::kTokenHead}) {
        for (const int64_t num_kept : {kept.num_kept, int64_t{0}, int64_t{1}, kept.num_kept / 2}) {
          for (const HostTensor* source : {&keys, &values}) {
            jobs.emplace_back(session, shape, *source, GatherCase{format, granularity}, kept,
                              num_kept);
          }
        }
      }
    }
  }
  std::vector<GatherPagesItem> items;
  for (const GatherJob& job : jobs) items.push_back(job.item());
  ASSERT_TRUE(backend.GatherPages({.items = items}, session.stream()).ok());
  for (size_t i = 0; i < jobs.size(); ++i) {
    SCOPED_TRACE("item " + std::to_string(i));
    jobs[i].Check(session);
  }
}

// Head-major rows with spare ones between heads, from the second slot on: [Hkv, capacity, D] and
// scales [Hkv, capacity].
void CheckStridedGather(Backend& backend, const ParityShape& shape, const HostTensor& source,
                        const GatherCase& test, bool all_tokens, int32_t page_size) {
  SCOPED_TRACE("strided, format " + std::to_string(static_cast<int>(test.format)) +
               ", granularity " + std::to_string(static_cast<int>(test.granularity)) +
               ", pages of " + std::to_string(page_size) + (all_tokens ? ", all tokens" : ""));
  const KeptSets kept = RandomKept(shape, 34);
  GatherPagesItem item{.source = source.view(),
                       .kept = all_tokens ? nullptr : kept.tokens.data(),
                       .groups = all_tokens ? 1 : kept.groups,
                       .num_kept = all_tokens ? shape.num_tokens : kept.num_kept,
                       .page_size = page_size,
                       .format = test.format,
                       .scale_granularity = test.granularity,
                       .out_dtype = EncodedType(shape.dtype, test.format, false),
                       .rotation = {}};
  const Pages dense = GatherPages(item);
  const int32_t heads = shape.num_kv_heads;
  const int64_t num_slots = (item.num_kept + page_size - 1) / page_size * page_size;
  const int64_t capacity = num_slots + 3;
  const int64_t row_bytes = shape.head_dim * DTypeBytes(item.out_dtype);
  const bool scales_per_token = static_cast<int64_t>(dense.scales.size()) == num_slots * heads &&
                                (num_slots > 1 || test.granularity == ScaleGranularity::kTokenHead);
  std::vector<std::byte> rows(static_cast<size_t>(heads * capacity * row_bytes), kPoison);
  std::vector<float> scales(dense.scales);
  if (scales_per_token) {
    float poison = 0;
    std::memset(&poison, static_cast<int>(kPoison), sizeof(poison));
    scales.assign(static_cast<size_t>(heads * capacity), poison);
  }
  for (int64_t s = 0; s < num_slots; ++s) {
    for (int32_t h = 0; h < heads; ++h) {
      const auto from = dense.bytes.begin() + (s * heads + h) * row_bytes;
      std::copy(from, from + row_bytes, rows.begin() + (h * capacity + s + 1) * row_bytes);
      if (!scales_per_token) continue;
      scales[static_cast<size_t>(h * capacity + s + 1)] =
          dense.scales[static_cast<size_t>(s * heads + h)];
    }
  }
  DeviceSession session(backend);
  item.source = session.Upload(source);
  if (!all_tokens) item.kept = session.Upload(kept.tokens);
  auto out_rows = session.Poisoned<std::byte>(static_cast<int64_t>(rows.size()));
  auto out_scales = session.Poisoned<float>(static_cast<int64_t>(scales.size()));
  item.pages = out_rows.data() + row_bytes;
  if (!scales.empty()) item.scales = out_scales.data() + (scales_per_token ? 1 : 0);
  item.slot_stride_bytes = row_bytes;
  item.head_stride_bytes = capacity * row_bytes;
  item.scale_head_stride = capacity;
  const absl::Status status = backend.GatherPages({.items = {&item, 1}}, session.stream());
  ASSERT_TRUE(status.ok()) << status;
  ExpectSameBits(session.Read(std::move(out_scales)), scales, "scales");
  ExpectSameBits(session.Read(std::move(out_rows)), rows, "rows");
}

int32_t RunCheckFinite(Backend& backend, const HostTensor& tensor) {
  DeviceSession session(backend);
  Output<int32_t> first = session.Poisoned<int32_t>(1);
  const CheckFiniteItem item{.tensor = session.Upload(tensor), .first_bad_token = first.data()};
  EXPECT_TRUE(backend.CheckFinite({.items = {&item, 1}}, session.stream()).ok());
  EXPECT_EQ(session.Read(std::move(first))[0], CheckFinite({.tensor = tensor.view()}));
  return CheckFinite({.tensor = tensor.view()});
}

// Tensors of one call, more than fit into a launch; only some of them bad.
void CheckFiniteBatch(Backend& backend, const ParityShape& shape, const HostTensor& finite) {
  HostTensor bad = finite;
  if (IsQuantized(shape.dtype))
    bad.SetScale(shape.num_tokens - 1, 0, 1e37F);  // some codes overflow
  if (shape.dtype != DType::kInt8) {
    bad.Set(shape.num_tokens / 2, shape.num_kv_heads - 1, 0,
            std::numeric_limits<float>::quiet_NaN());
  }
  const HostTensor queries = HostTensor::Queries(shape, 42);
  DeviceSession session(backend);
  const int32_t rounds = shape.small() ? 20 : 1;
  std::vector<CheckFiniteItem> items;
  std::vector<int32_t> expected;
  Output<int32_t> found = session.Poisoned<int32_t>(3 * rounds);
  const std::array<const HostTensor*, 3> tensors = {&finite, &bad, &queries};
  std::array<TensorView, 3> views;
  std::array<int32_t, 3> firsts{};
  for (size_t i = 0; i < tensors.size(); ++i) {
    views[i] = session.Upload(*tensors[i]);
    firsts[i] = CheckFinite({.tensor = tensors[i]->view()});
  }
  for (int32_t round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      items.push_back({.tensor = views[i], .first_bad_token = found.data() + expected.size()});
      expected.push_back(firsts[i]);
    }
  }
  ASSERT_TRUE(backend.CheckFinite({.items = items}, session.stream()).ok());
  EXPECT_EQ(session.Read(std::move(found)), expected);
}

}  // namespace

void CheckGatherPages(Backend& backend, const ParityShape& shape) {
  HostTensor source = HostTensor::Cache(shape, 31);
  for (int64_t t = 0; t < shape.num_tokens; t += 3) {  // zero rows: scale groups without amax
    for (int32_t c = 0; c < shape.head_dim; ++c) source.Set(t, 0, c, t % 2 == 0 ? 0.0F : -0.0F);
  }
  CheckGather(backend, shape, source,
              {shape.format, shape.granularity, shape.rotary_dim, shape.interleaved});
  CheckGatherBatch(backend, shape, source);
  CheckStridedGather(backend, shape, source, {shape.format, ScaleGranularity::kTokenHead},
                     /*all_tokens=*/true, /*page_size=*/1);
  if (!shape.small() || testing::Test::HasFatalFailure()) return;
  for (Format format : {Format::kAsIs, Format::kFloat8E4M3, Format::kInt8}) {
    for (auto granularity : {ScaleGranularity::kHead, ScaleGranularity::kTokenHead}) {
      for (bool all_tokens : {false, true}) {
        for (int32_t page_size : {1, shape.page_size}) {
          CheckStridedGather(backend, shape, source, {format, granularity}, all_tokens, page_size);
          if (testing::Test::HasFatalFailure()) return;
        }
      }
      for (int32_t rotary_dim : {0, shape.head_dim, shape.head_dim / 8 * 2}) {
        for (bool interleaved : {false, true}) {
          CheckGather(backend, shape, source, {format, granularity, rotary_dim, interleaved});
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
  if (shape.dtype != DType::kFloat32) return;
  // Magnitudes from the smallest subnormal to near the largest: scales under- and overflow nowhere
  // silently.
  Random random(33);
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    const int exponent = static_cast<int>(random.Between(-149, 120));
    for (int32_t h = 0; h < shape.num_kv_heads; ++h) {
      for (int32_t c = 0; c < shape.head_dim; ++c) {
        source.Set(t, h, c, static_cast<float>(std::ldexp(random.Uniform() - 0.5, exponent)));
      }
    }
  }
  for (Format format : {Format::kFloat8E4M3, Format::kInt8}) {
    CheckGather(backend, shape, source, {format, ScaleGranularity::kTokenHead, 0, false});
  }
}

void CheckCheckFinite(Backend& backend, const ParityShape& shape) {
  const HostTensor finite = HostTensor::Cache(shape, 41);
  ASSERT_EQ(RunCheckFinite(backend, finite), shape.num_tokens);
  CheckFiniteBatch(backend, shape, finite);
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t last = shape.num_tokens - 1;
  const int64_t middle = shape.num_tokens / 2;
  for (float bad : {infinity, -infinity, nan}) {
    for (int64_t token : {int64_t{0}, middle, last}) {
      for (bool last_element : {false, true}) {
        HostTensor tensor = finite;
        const int32_t head = last_element ? shape.num_kv_heads - 1 : 0;
        const int32_t channel = last_element ? shape.head_dim - 1 : 0;
        if (shape.dtype == DType::kInt8) {
          tensor.SetScale(token, head, bad);
        } else {
          tensor.Set(token, head, channel, bad);
          tensor.Set(last, 0, 0, bad);
        }
        RunCheckFinite(backend, tensor);
      }
    }
    if (!shape.small()) return;
  }
}

void CheckBeyondTwoGibiElements(Backend& backend) {
  // 2^31 + 2^20 int8 elements in one head pair: [T, 2, 512], scales per head.
  constexpr int32_t kHeads = 2;
  constexpr int32_t kDim = 512;
  constexpr int64_t kTokens = (int64_t{1} << 31) / (kHeads * kDim) + 1024;
  constexpr int64_t kBytes = kTokens * kHeads * kDim;
  DeviceSession session(backend);
  Buffer host = backend.AllocateHost(kBytes).value();
  auto* codes = host.as<int8_t>();
  const auto code = [](int64_t element) {
    return static_cast<int8_t>((element * 2654435761 >> 13) & 127);
  };
  for (int64_t i = 0; i < kBytes; ++i) codes[i] = code(i);
  Buffer device = backend.ToDevice(host, session.stream()).value();
  const std::vector<float> scales = {0.5F, 2.0F};
  TensorView view{.data = device.data(),
                  .dtype = DType::kInt8,
                  .num_tokens = kTokens,
                  .num_heads = kHeads,
                  .head_dim = kDim,
                  .token_stride_bytes = kHeads * kDim,
                  .head_stride_bytes = kDim,
                  .scales = session.Upload(scales)};

  Output<int32_t> first_bad = session.Poisoned<int32_t>(1);
  const CheckFiniteItem check{.tensor = view, .first_bad_token = first_bad.data()};
  ASSERT_TRUE(backend.CheckFinite({.items = {&check, 1}}, session.stream()).ok());
  EXPECT_EQ(session.Read(std::move(first_bad))[0], kTokens);

  // Blocks: a short one at each end, the middle in long ones.
  std::vector<int32_t> starts = {0, 16};
  while (starts.back() + 65536 < kTokens - 16) starts.push_back(starts.back() + 65536);
  starts.push_back(static_cast<int32_t>(kTokens - 16));
  starts.push_back(static_cast<int32_t>(kTokens));
  const auto num_blocks = static_cast<int64_t>(starts.size()) - 1;
  Output<float> min = session.Poisoned<float>(num_blocks * kHeads * kDim);
  Output<float> max = session.Poisoned<float>(num_blocks * kHeads * kDim);
  ASSERT_TRUE(backend
                  .SummarizeBlocks({.keys = view,
                                    .block_starts = session.Upload(starts),
                                    .num_blocks = num_blocks,
                                    .summaries = DenseSummaries(DType::kFloat32, kHeads, kDim,
                                                                min.data(), max.data(), nullptr)},
                                   session.stream())
                  .ok());
  const std::vector<float> min_values = session.Read(std::move(min));
  const std::vector<float> max_values = session.Read(std::move(max));
  for (int64_t j : {int64_t{0}, num_blocks - 1}) {
    for (int64_t c = 0; c < kHeads * kDim; ++c) {
      int8_t smallest = 127;
      int8_t largest = -127;
      for (int64_t t = starts[static_cast<size_t>(j)]; t < starts[static_cast<size_t>(j) + 1];
           ++t) {
        smallest = std::min(smallest, code(t * kHeads * kDim + c));
        largest = std::max(largest, code(t * kHeads * kDim + c));
      }
      const float scale = scales[static_cast<size_t>(c / kDim)];
      const auto index = static_cast<size_t>(j * kHeads * kDim + c);
      ASSERT_EQ(min_values[index], static_cast<float>(smallest) * scale);
      ASSERT_EQ(max_values[index], static_cast<float>(largest) * scale);
    }
  }

  // Every token kept: output offsets pass 2^31 too.
  std::vector<int32_t> kept(static_cast<size_t>(kTokens));
  for (size_t i = 0; i < kept.size(); ++i) kept[i] = static_cast<int32_t>(i);
  Buffer pages = backend.Allocate(kBytes, session.stream()).value();
  Output<float> out_scales = session.Poisoned<float>(kHeads);
  const GatherPagesItem gather{.source = view,
                               .kept = session.Upload(kept),
                               .num_kept = kTokens,
                               .page_size = 128,
                               .out_dtype = DType::kInt8,
                               .rotation = {},
                               .pages = pages.data(),
                               .scales = out_scales.data()};
  ASSERT_TRUE(backend.GatherPages({.items = {&gather, 1}}, session.stream()).ok());
  EXPECT_EQ(session.Read(std::move(out_scales)), scales);
  Buffer out = backend.ToHost(std::move(pages), session.stream()).value();
  ASSERT_TRUE(session.stream().Synchronize().ok());
  static_assert(kTokens % 128 == 0);
  EXPECT_EQ(std::memcmp(out.data(), codes, kBytes), 0);
}

}  // namespace dynsplit::oracle

// SPDX-License-Identifier: Apache-2.0
//
// Parity of block summaries and of their scores. Bounds and their scales are equal, not close.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "tests/oracle/device_session.h"
#include "tests/oracle/host_summaries.h"
#include "tests/oracle/parity_suite.h"
#include "tests/oracle/reference.h"
#include "tests/oracle/tolerance.h"

namespace dynsplit::oracle {
namespace {

constexpr int64_t kSpareBlocks = 5;  // of the capacity in SummaryLayout::kResident

// What summaries of such keys may be stored as.
std::vector<DType> SummaryTypes(DType keys) {
  std::vector<DType> types = {DType::kFloat32, DType::kBFloat16, DType::kFloat8E4M3};
  if (keys == DType::kFloat16) types.push_back(keys);
  return types;
}

HostSummaries Empty(const ParityShape& shape, DType dtype, SummaryLayout layout,
                    int64_t num_blocks) {
  HostSummaries out;
  out.dtype = dtype;
  out.layout = layout;
  out.num_heads = shape.num_kv_heads;
  out.head_dim = shape.head_dim;
  out.capacity = num_blocks + (layout == SummaryLayout::kResident ? kSpareBlocks : 0);
  return out;
}

// Largest error of rounding `value` to the nearest of a type; e4m3 scaled by `scale`.
double RoundingError(DType dtype, double value, double scale) {
  const double magnitude = std::fabs(value);
  switch (dtype) {
    case DType::kBFloat16:
      return 0x1p-8 * magnitude;
    case DType::kFloat16:
      return 0x1p-11 * magnitude + 0x1p-25;
    case DType::kFloat8E4M3:
      return std::max(0x1p-4 * magnitude, 0x1p-10 * scale);
    default:
      return kUnit * magnitude;
  }
}

// One case of SummarizeBlocks: keys, blocks, and the summaries they ought to have.
struct SummaryCase {
  const ParityShape& shape;
  const HostTensor& keys;
  const std::vector<int32_t>& starts;
  const Summaries& exact;
  int64_t num_blocks() const { return static_cast<int64_t>(starts.size()) - 1; }
};

struct Summarized {
  HostSummaries expected;
  HostSummaries actual;
};

// Runs it into poisoned memory; `like` says how the summaries are stored.
Summarized Run(Backend& backend, const SummaryCase& test, HostSummaries like, int64_t first_block) {
  like.Allocate();
  Summarized out{like, like};
  SummarizeBlocksParams params{.keys = test.keys.view(),
                               .block_starts = test.starts.data(),
                               .first_block = first_block,
                               .num_blocks = test.num_blocks(),
                               .summaries = out.expected.view()};
  StoreSummaries(test.exact, params);
  DeviceSession session(backend);
  params.keys = session.Upload(test.keys);
  params.block_starts = session.Upload(test.starts);
  auto bytes = session.Poisoned<std::byte>(static_cast<int64_t>(like.bytes.size()));
  auto bound_scales = session.Poisoned<float>(static_cast<int64_t>(like.bound_scales.size()));
  auto mean_scales = session.Poisoned<float>(static_cast<int64_t>(like.mean_scales.size()));
  params.summaries = like.ViewAt(bytes.data(), bound_scales.data(), mean_scales.data());
  const absl::Status status = backend.SummarizeBlocks(params, session.stream());
  EXPECT_TRUE(status.ok()) << status;
  out.actual.bytes = session.Read(std::move(bytes));
  out.actual.bound_scales = session.Read(std::move(bound_scales));
  out.actual.mean_scales = session.Read(std::move(mean_scales));
  return out;
}

// Means are close; where they are, they become the expected bytes.
void ExpectMeansAreClose(const SummaryCase& test, int64_t first_block, Summarized& out) {
  const int32_t heads = test.shape.num_kv_heads;
  const int32_t dim = test.shape.head_dim;
  const double largest = LargestNorm(test.keys.view());
  const double sum_error = test.shape.max_block * kUnit * largest + 1e-37;
  const BlockSummaries actual = out.actual.view();
  const BlockSummaries expected = out.expected.view();
  for (int64_t j = first_block; j < test.num_blocks(); ++j) {
    for (int32_t h = 0; h < heads; ++h) {
      const double* exact = test.exact.mean.data() + (j * heads + h) * dim;
      double scale = 1;
      if (actual.dtype == DType::kFloat8E4M3) {
        double amax = 0;
        for (int32_t c = 0; c < dim; ++c) amax = std::max(amax, std::fabs(exact[c]));
        const int64_t index = h * actual.scale_head_stride + j;
        scale = actual.mean_scales[index];
        int exponent = 0;
        ASSERT_EQ(std::frexp(scale, &exponent), 0.5) << scale << " is no power of two";
        if (scale != 1 || amax > sum_error) {  // else sums of 0 everywhere
          ASSERT_GE(scale, PowerOfTwoScale(std::max(amax - sum_error, 1e-300))) << j << " " << h;
          ASSERT_LE(scale, PowerOfTwoScale(amax + sum_error)) << j << " " << h;
        }
        expected.mean_scales[index] = actual.mean_scales[index];
      }
      for (int32_t c = 0; c < dim; ++c) {
        const double value = SummaryValue(actual, actual.mean, actual.mean_scales, j, h, c);
        const double bound =
            sum_error + RoundingError(actual.dtype, std::fabs(exact[c]) + sum_error, scale);
        ASSERT_NEAR(value, exact[c], bound) << "mean of block " << j << " head " << h << "," << c;
      }
      const int64_t row = j * actual.block_stride_bytes + h * actual.head_stride_bytes;
      std::copy_n(actual.mean + row, dim * DTypeBytes(actual.dtype), expected.mean + row);
    }
  }
}

// Decoded min <= key <= decoded max, for every key and channel.
void ExpectBoundsHold(const SummaryCase& test, int64_t first_block, HostSummaries& actual) {
  const BlockSummaries view = actual.view();
  const TensorView keys = test.keys.view();
  for (int64_t j = first_block; j < test.num_blocks(); ++j) {
    for (int32_t h = 0; h < keys.num_heads; ++h) {
      for (int32_t c = 0; c < keys.head_dim; ++c) {
        const double min = SummaryValue(view, view.min, view.bound_scales, j, h, c);
        const double max = SummaryValue(view, view.max, view.bound_scales, j, h, c);
        for (int32_t t = test.starts[static_cast<size_t>(j)];
             t < test.starts[static_cast<size_t>(j) + 1]; ++t) {
          const double key = ElementValue(keys, t, h, c);
          ASSERT_TRUE(min <= key && key <= max)
              << key << " of token " << t << " is outside [" << min << ", " << max << "]";
        }
      }
    }
  }
}

void CheckSummaries(Backend& backend, const SummaryCase& test, const HostSummaries& like,
                    int64_t first_block) {
  SCOPED_TRACE("type " + std::string(DTypeName(like.dtype)) + ", layout " +
               std::to_string(static_cast<int>(like.layout)) + (like.bounds ? ", bounds" : "") +
               (like.means ? ", means" : "") + ", from block " + std::to_string(first_block));
  Summarized out = Run(backend, test, like, first_block);
  if (like.means) ExpectMeansAreClose(test, first_block, out);
  if (testing::Test::HasFatalFailure()) return;
  if (like.bounds) ExpectBoundsHold(test, first_block, out.actual);
  // All of memory: bounds, scales, rows of earlier blocks, and what lies between rows.
  ExpectSameBits(out.actual.bytes, out.expected.bytes, "bytes");
  ExpectSameBits(out.actual.bound_scales, out.expected.bound_scales, "scales of bounds");
  ExpectSameBits(out.actual.mean_scales, out.expected.mean_scales, "scales of means");
}

// Magnitudes from the smallest subnormal to 2^119 side by side.
HostTensor WideKeys(const ParityShape& shape, uint64_t seed) {
  HostTensor keys = HostTensor::Cache(shape, seed);
  Random random(seed);
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    for (int32_t h = 0; h < shape.num_kv_heads; ++h) {
      const auto top = static_cast<int>(random.Between(-149, 120));
      for (int32_t c = 0; c < shape.head_dim; ++c) {
        const auto exponent = static_cast<int>(random.Between(-149, top));
        keys.Set(t, h, c, static_cast<float>(std::ldexp(random.Uniform() - 0.5, exponent)));
      }
    }
  }
  return keys;
}

// Keys of a sequence, as far as scores of blocks depend on them.
struct ScoreSource {
  HostTensor keys;
  std::vector<int32_t> starts;
  Summaries exact;
  int64_t num_blocks() const { return static_cast<int64_t>(starts.size()) - 1; }
};

ScoreSource MakeScoreSource(const ParityShape& shape, uint64_t seed) {
  ScoreSource out{HostTensor::Cache(shape, seed), RandomBlockStarts(shape, seed + 1), {}};
  out.exact = SummarizeBlocks({.keys = out.keys.view(),
                               .block_starts = out.starts.data(),
                               .num_blocks = out.num_blocks(),
                               .summaries = {}});
  return out;
}

// One sequence's queries and summaries.
struct ScoreCase {
  HostTensor queries;
  HostSummaries summaries;
  double largest_norm = 0;  // of max(|min|, |max|) or of means
};

ScoreCase MakeScoreCase(const ParityShape& shape, const ScoreSource& source, int64_t num_queries,
                        const HostSummaries& like, uint64_t seed) {
  ScoreCase out{HostTensor::Make(shape, num_queries, shape.num_query_heads, shape.query_dtype,
                                 Layout::kDense, seed),
                like, 0};
  out.summaries.Allocate();
  StoreSummaries(source.exact, {.keys = source.keys.view(),
                                .block_starts = source.starts.data(),
                                .num_blocks = source.num_blocks(),
                                .summaries = out.summaries.view()});
  const BlockSummaries view = out.summaries.view();
  const auto magnitude = [&](const std::byte* base, const float* scales, int64_t j, int32_t h,
                             int32_t c) {
    return base == nullptr ? 0 : std::fabs(SummaryValue(view, base, scales, j, h, c));
  };
  for (int64_t j = 0; j < source.num_blocks(); ++j) {
    for (int32_t h = 0; h < shape.num_kv_heads; ++h) {
      double sum = 0;
      for (int32_t c = 0; c < shape.head_dim; ++c) {
        const double largest = std::max({magnitude(view.min, view.bound_scales, j, h, c),
                                         magnitude(view.max, view.bound_scales, j, h, c),
                                         magnitude(view.mean, view.mean_scales, j, h, c)});
        sum += largest * largest;
      }
      out.largest_norm = std::max(out.largest_norm, std::sqrt(sum));
    }
  }
  return out;
}

// `num_items` items of different lengths, that share a few sequences.
void CheckScores(Backend& backend, const ParityShape& shape,
                 const std::vector<ScoreSource>& sources, const HostSummaries& like,
                 int64_t num_queries, int64_t num_items) {
  SCOPED_TRACE("type " + std::string(DTypeName(like.dtype)) + (like.bounds ? ", bound" : ", mean") +
               ", layout " + std::to_string(static_cast<int>(like.layout)) + ", queries " +
               std::to_string(num_queries) + ", items " + std::to_string(num_items));
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(shape.head_dim)));
  DeviceSession session(backend);
  std::vector<ScoreCase> cases;
  std::vector<ScoreBlocksItem> uploaded;
  for (size_t i = 0; i < sources.size() && static_cast<int64_t>(i) < num_items; ++i) {
    cases.push_back(MakeScoreCase(shape, sources[i], num_queries, like, 130 + i));
    uploaded.push_back({.queries = session.Upload(cases.back().queries),
                        .summaries = cases.back().summaries.Upload(session),
                        .block_starts = session.Upload(sources[i].starts)});
  }
  std::vector<ScoreBlocksItem> items;
  std::vector<Output<float>> scores;
  items.reserve(static_cast<size_t>(num_items));
  scores.reserve(static_cast<size_t>(num_items));
  for (int64_t i = 0; i < num_items; ++i) {
    const size_t c = static_cast<size_t>(i) % cases.size();
    const int64_t all = sources[c].num_blocks();
    items.push_back(uploaded[c]);
    items.back().num_blocks = i < 3 ? all : 1 + i * 7919 % std::min<int64_t>(all, 300);
    scores.push_back(session.Poisoned<float>(shape.num_kv_heads * items.back().num_blocks));
    items.back().block_scores = scores.back().data();
  }
  const absl::Status status = backend.ScoreBlocks(
      {.items = items, .num_kv_heads = shape.num_kv_heads, .softmax_scale = scale},
      session.stream());
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < items.size(); ++i) {
    ScoreCase& test = cases[i % cases.size()];
    const ScoreBlocksItem host{.queries = test.queries.view(),
                               .summaries = test.summaries.view(),
                               .block_starts = sources[i % cases.size()].starts.data(),
                               .num_blocks = items[i].num_blocks};
    const double relative = SoftmaxError(scale, LargestNorm(host.queries) * test.largest_norm,
                                         (like.bounds ? 2 : 1) * shape.head_dim, host.num_blocks) +
                            static_cast<double>(num_queries * shape.group_size()) * kUnit;
    ExpectNear(session.Read(std::move(scores[i])), ScoreBlocks(host, shape.num_kv_heads, scale),
               relative, 1e-30, "scores of item " + std::to_string(i));
    if (testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace

void CheckSummarizeBlocks(Backend& backend, const ParityShape& shape) {
  const HostTensor keys = HostTensor::Cache(shape, 8);
  const std::vector<int32_t> starts = RandomBlockStarts(shape, 9);
  const auto num_blocks = static_cast<int64_t>(starts.size()) - 1;
  const auto summaries_of = [&](const HostTensor& tensor) {
    return SummarizeBlocks({.keys = tensor.view(),
                            .block_starts = starts.data(),
                            .num_blocks = num_blocks,
                            .summaries = {}});
  };
  const Summaries exact = summaries_of(keys);
  for (DType dtype : SummaryTypes(shape.dtype)) {
    for (SummaryLayout layout : {SummaryLayout::kDense, SummaryLayout::kResident}) {
      HostSummaries like = Empty(shape, dtype, layout, num_blocks);
      for (int wanted : {3, 1, 2}) {
        like.bounds = (wanted & 1) != 0;
        like.means = (wanted & 2) != 0;
        const bool in_parts = layout == SummaryLayout::kResident;
        const int64_t first_block = in_parts ? num_blocks / 2 : 0;
        CheckSummaries(backend, {shape, keys, starts, exact}, like, first_block);
        if (testing::Test::HasFatalFailure()) return;
        if (!shape.small()) break;
        CheckSummaries(backend, {shape, keys, starts, exact}, like, num_blocks / 2 - first_block);
      }
    }
  }
  if (!shape.small() || shape.dtype != DType::kFloat32) return;
  const HostTensor wide = WideKeys(shape, 13);
  const Summaries wide_exact = summaries_of(wide);
  for (DType dtype : SummaryTypes(shape.dtype)) {
    HostSummaries like = Empty(shape, dtype, SummaryLayout::kResident, num_blocks);
    like.bounds = true;
    CheckSummaries(backend, {shape, wide, starts, wide_exact}, like, 0);
  }
}

void CheckBlockBound(Backend& backend, const ParityShape& shape) {
  if (!shape.small()) GTEST_SKIP() << "small shapes only";
  const HostTensor keys = HostTensor::Cache(shape, 14);
  const HostTensor queries = HostTensor::Queries(shape, 15);
  const std::vector<int32_t> starts = RandomBlockStarts(shape, 16);
  const auto num_blocks = static_cast<int64_t>(starts.size()) - 1;
  const Summaries exact = SummarizeBlocks({.keys = keys.view(),
                                           .block_starts = starts.data(),
                                           .num_blocks = num_blocks,
                                           .summaries = {}});
  for (DType dtype : SummaryTypes(shape.dtype)) {
    SCOPED_TRACE(DTypeName(dtype));
    HostSummaries like = Empty(shape, dtype, SummaryLayout::kResident, num_blocks);
    like.bounds = true;
    Summarized out = Run(backend, {shape, keys, starts, exact}, like, 0);
    const BlockSummaries view = out.actual.view();
    for (int32_t a = 0; a < shape.num_query_heads; ++a) {
      const int32_t h = a / shape.group_size();
      for (int64_t j = 0; j < num_blocks; ++j) {
        double bound = 0;
        double size = 0;  // of the terms: what a sum of doubles may be off by
        for (int32_t c = 0; c < shape.head_dim; ++c) {
          const double q = ElementValue(queries.view(), 0, a, c);
          const double low = q * SummaryValue(view, view.min, view.bound_scales, j, h, c);
          const double high = q * SummaryValue(view, view.max, view.bound_scales, j, h, c);
          bound += std::max(low, high);
          size += std::fabs(low) + std::fabs(high);
        }
        for (int32_t t = starts[static_cast<size_t>(j)]; t < starts[static_cast<size_t>(j) + 1];
             ++t) {
          double dot = 0;
          for (int32_t c = 0; c < shape.head_dim; ++c) {
            dot += double{ElementValue(queries.view(), 0, a, c)} *
                   double{ElementValue(keys.view(), t, h, c)};
          }
          ASSERT_GE(bound + size * shape.head_dim * 0x1p-52, dot) << "token " << t;
        }
      }
    }
  }
}

void CheckScoreBlocks(Backend& backend, const ParityShape& shape) {
  std::vector<ScoreSource> sources;
  int64_t most_blocks = 0;  // lengths of blocks differ by sequence; strides are equal
  for (uint64_t i = 0; i < (shape.small() ? 3U : 2U); ++i) {
    sources.push_back(MakeScoreSource(shape, 100 + 10 * i));
    most_blocks = std::max(most_blocks, sources.back().num_blocks());
  }
  for (DType dtype : SummaryTypes(shape.dtype)) {
    for (bool bounds : {true, false}) {
      HostSummaries like = Empty(shape, dtype, SummaryLayout::kResident, most_blocks);
      like.bounds = bounds;
      like.means = !bounds;
      CheckScores(backend, shape, sources, like, 1, dtype == DType::kFloat8E4M3 ? 40 : 3);
      CheckScores(backend, shape, sources, like, 5, 1);
      if (testing::Test::HasFatalFailure()) return;
      like.layout = SummaryLayout::kDense;
      if (!shape.small() && dtype != DType::kFloat32) continue;
      CheckScores(backend, shape, sources, like, shape.num_queries, shape.small() ? 3 : 1);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

}  // namespace dynsplit::oracle

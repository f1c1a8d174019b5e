// SPDX-License-Identifier: Apache-2.0
//
// Parity of the operations that measure attention.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/oracle/device_session.h"
#include "tests/oracle/parity_suite.h"
#include "tests/oracle/reference.h"
#include "tests/oracle/tolerance.h"

namespace dynsplit::oracle {
namespace {

// Pages of `source` for the kept sets, as a dense tensor in host memory.
struct KeptTensor {
  Pages pages;
  TensorView view;
};

KeptTensor Keep(const ParityShape& shape, const TensorView& source, const KeptSets& kept,
                const RotationTable& rotation) {
  KeptTensor out;
  const DType dtype = EncodedType(source.dtype, shape.format, rotation.rotary_dim > 0);
  out.pages = GatherPages({.source = source,
                           .kept = kept.tokens.data(),
                           .groups = kept.groups,
                           .num_kept = kept.num_kept,
                           .page_size = shape.page_size,
                           .format = shape.format,
                           .scale_granularity = shape.granularity,
                           .out_dtype = dtype,
                           .rotation = rotation});
  const int64_t row = source.head_dim * DTypeBytes(dtype);
  out.view = {.data = out.pages.bytes.data(),
              .dtype = dtype,
              .num_tokens = kept.num_kept,
              .num_heads = source.num_heads,
              .head_dim = source.head_dim,
              .token_stride_bytes = row * source.num_heads,
              .head_stride_bytes = row,
              .scales = out.pages.scales.empty() ? nullptr : out.pages.scales.data(),
              .scale_granularity = shape.format == EncodingPolicy::Format::kAsIs
                                       ? source.scale_granularity
                                       : shape.granularity};
  return out;
}

TensorView Upload(DeviceSession& session, const KeptTensor& kept) {
  TensorView view = kept.view;
  view.data = session.Upload(kept.pages.bytes);
  view.scales = session.Upload(kept.pages.scales);
  return view;
}

void CheckLoss(Backend& backend, const ParityShape& shape, bool with_values) {
  const HostTensor keys = HostTensor::Cache(shape, 51);
  const HostTensor values = HostTensor::Cache(shape, 52);
  const HostTensor queries = HostTensor::Queries(shape, 53);
  const KeptSets kept = RandomKept(shape, 54);
  const HostRotation rotation = MakeRotation(shape.num_tokens, shape.rotary_dim, shape.interleaved);
  const KeptTensor kept_keys = Keep(shape, keys.view(), kept, rotation.table());
  const KeptTensor kept_values = Keep(shape, values.view(), kept, RotationTable{});
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(shape.head_dim)));
  MeasureAttentionParams host{.queries = queries.view(),
                              .keys = keys.view(),
                              .values = {},
                              .kept_keys = {},
                              .kept_values = {},
                              .kept = kept.tokens.data(),
                              .groups = kept.groups,
                              .num_kept = kept.num_kept,
                              .rotation = {},
                              .softmax_scale = scale};
  DeviceSession session(backend);
  MeasureAttentionParams device = host;
  device.queries = session.Upload(queries);
  device.keys = session.Upload(keys);
  device.kept = session.Upload(kept.tokens);
  Output<float> mass = session.Poisoned<float>(shape.num_query_heads);
  Output<float> err_sq = session.Poisoned<float>(shape.num_query_heads);
  Output<float> ref_sq = session.Poisoned<float>(shape.num_query_heads);
  device.mass = mass.data();
  if (with_values) {
    host.values = values.view();
    host.kept_keys = kept_keys.view;
    host.kept_values = kept_values.view;
    host.rotation = rotation.table();
    host.query_shift = shape.num_tokens - kept.num_kept;
    device.values = session.Upload(values);
    device.kept_keys = Upload(session, kept_keys);
    device.kept_values = Upload(session, kept_values);
    if (shape.rotary_dim > 0) device.rotation = session.Upload(rotation);
    device.query_shift = host.query_shift;
    device.err_sq = err_sq.data();
    device.ref_sq = ref_sq.data();
  }
  const AttentionLoss expected = MeasureAttention(host);
  ASSERT_TRUE(backend.MeasureAttention(device, session.stream()).ok());
  const double relative =
      SoftmaxError(scale, LargestNorm(host.queries) * LargestNorm(host.keys) * 1.01, shape.head_dim,
                   shape.num_tokens) +
      shape.num_queries * kUnit;
  ExpectNear(session.Read(std::move(mass)), expected.mass, relative, 1e-30, "mass");
  const auto err = session.Read(std::move(err_sq));
  const auto ref = session.Read(std::move(ref_sq));
  if (!with_values) return;
  // Outputs are convex combinations of values: a relative error r of the weights moves one by at
  // most d = 2 r max||v|| (numerator and denominator). A sum of W squared norms E of vectors off by
  // 2 d then moves by at most 4 d sqrt(W E) + 4 W d^2 (Cauchy-Schwarz); squaring adds its own D u.
  const double d =
      2 * relative * std::max(LargestNorm(host.values), LargestNorm(host.kept_values)) * 1.01;
  const auto window = static_cast<double>(shape.num_queries);
  ASSERT_EQ(err.size(), expected.err_sq.size());
  for (size_t a = 0; a < err.size(); ++a) {
    const double e = expected.err_sq[a];
    const double r = expected.ref_sq[a];
    const double squares = (shape.head_dim + window) * kUnit;
    EXPECT_NEAR(err[a], e, 4 * d * std::sqrt(window * e) + 4 * window * d * d + squares * e) << a;
    EXPECT_NEAR(ref[a], r, 2 * d * std::sqrt(window * r) + window * d * d + squares * r) << a;
  }
}

}  // namespace

void CheckMeasureAttention(Backend& backend, const ParityShape& shape) {
  CheckLoss(backend, shape, /*with_values=*/true);
  CheckLoss(backend, shape, /*with_values=*/false);
}

// So many rows that a thread block of a large GPU has many tiles of items, more than it holds at a
// time: whole and partial blocks of rows, with and without turned queries, dense and paged.
void CheckMeasureLong(Backend& backend) {
  CheckLoss(backend,
            {.name = "turned",
             .num_tokens = 1500,
             .num_query_heads = 132,
             .num_kv_heads = 33,
             .head_dim = 64,
             .num_queries = 64,
             .kept_ratio = 0.9,
             .rotary_dim = 64},
            /*with_values=*/true);
  CheckLoss(backend,
            {.name = "paged",
             .num_tokens = 1100,
             .num_query_heads = 136,
             .num_kv_heads = 17,
             .head_dim = 128,
             .num_queries = 40,
             .dtype = DType::kFloat16,
             .layout = Layout::kPaged,
             .query_dtype = DType::kFloat16,
             .kept_per_head = true,
             .kept_ratio = 0.9},
            /*with_values=*/true);
}

void CheckMeasureSpans(Backend& backend, const ParityShape& shape) {
  const HostTensor keys = HostTensor::Cache(shape, 61);
  const HostTensor queries = HostTensor::Queries(shape, 62);
  Random random(63);
  std::vector<int32_t> positions;
  std::vector<int32_t> lo;
  std::vector<int32_t> hi;
  for (int32_t n = 0; n < shape.num_queries; ++n) {
    const auto last = static_cast<int32_t>(shape.num_tokens - 1);
    positions.push_back(n == 0 ? 0 : static_cast<int32_t>(random.Between(0, last)));
    hi.push_back(static_cast<int32_t>(random.Between(0, positions.back() + 1)));
    lo.push_back(static_cast<int32_t>(random.Between(0, hi.back())));
  }
  MeasureSpansParams host{
      .queries = queries.view(),
      .positions = positions.data(),
      .lo = lo.data(),
      .hi = hi.data(),
      .keys = keys.view(),
      .softmax_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(shape.head_dim)))};
  DeviceSession session(backend);
  Output<float> masses = session.Poisoned<float>(3 * shape.num_queries);
  MeasureSpansParams device = host;
  device.queries = session.Upload(queries);
  device.positions = session.Upload(positions);
  device.lo = session.Upload(lo);
  device.hi = session.Upload(hi);
  device.keys = session.Upload(keys);
  device.masses = masses.data();
  ASSERT_TRUE(backend.MeasureSpans(device, session.stream()).ok());
  const double relative =
      SoftmaxError(host.softmax_scale, LargestNorm(host.queries) * LargestNorm(host.keys),
                   shape.head_dim, shape.num_tokens) +
      shape.num_query_heads * kUnit;
  ExpectNear(session.Read(std::move(masses)), MeasureSpans(host), relative, 1e-30, "masses");
}

}  // namespace dynsplit::oracle

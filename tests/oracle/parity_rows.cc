// SPDX-License-Identifier: Apache-2.0
//
// Parity of what a decode step does with rows of tokens: ScoreTokens, AttendTokens and RefreshRows.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <string>

#include "tests/oracle/device_session.h"
#include "tests/oracle/parity_suite.h"
#include "tests/oracle/reference.h"
#include "tests/oracle/tolerance.h"

namespace dynsplit::oracle {
namespace {

// Sequences of one kind: keys in the shape's type, values perhaps in another.
struct Sequence {
  HostTensor keys;
  HostTensor values;
};

Sequence MakeSequence(const ParityShape& shape, DType value_dtype, uint64_t seed) {
  return {HostTensor::Cache(shape, seed),
          HostTensor::Make(shape, shape.num_tokens, shape.num_kv_heads, value_dtype, shape.layout,
                           seed + 1)};
}

// Different ones of a kind.
std::vector<Sequence> MakeSequences(const ParityShape& shape, DType value_dtype, uint64_t seed,
                                    uint64_t count) {
  std::vector<Sequence> sequences;
  for (uint64_t i = 0; i < count; ++i) {
    sequences.push_back(MakeSequence(shape, value_dtype, seed + 10 * i));
  }
  return sequences;
}

// Types of values tried with a shape's keys.
std::vector<DType> ValueTypes(const ParityShape& shape) {
  std::vector<DType> types = {shape.dtype};
  if (!shape.small()) return types;
  types.push_back(shape.dtype == DType::kBFloat16 ? DType::kInt8 : DType::kBFloat16);
  return types;
}

std::vector<int32_t> RandomTokens(Random& random, int64_t num_tokens, int64_t count) {
  std::vector<int32_t> all(static_cast<size_t>(num_tokens));
  std::iota(all.begin(), all.end(), 0);
  for (int64_t i = 0; i < count; ++i) {
    std::swap(all[static_cast<size_t>(i)],
              all[static_cast<size_t>(random.Between(i, num_tokens - 1))]);
  }
  all.resize(static_cast<size_t>(count));
  std::sort(all.begin(), all.end());
  return all;
}

// ---- ScoreTokens ----

struct TokenScoreCase {
  int64_t num_tokens = 0;
  bool first_tokens = false;  // tokens null
};

// Items share the keys of a few sequences.
void CheckTokenScores(Backend& backend, const ParityShape& shape,
                      const std::vector<HostTensor>& keys, int32_t groups, int64_t num_queries,
                      const std::vector<TokenScoreCase>& cases) {
  SCOPED_TRACE("layout " + std::to_string(static_cast<int>(shape.layout)) + ", groups " +
               std::to_string(groups) + ", queries " + std::to_string(num_queries) + ", items " +
               std::to_string(cases.size()));
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(shape.head_dim)));
  DeviceSession session(backend);
  std::vector<TensorView> uploaded;
  std::vector<double> norms;
  for (const HostTensor& tensor : keys) {
    uploaded.push_back(session.Upload(tensor));
    norms.push_back(LargestNorm(tensor.view()));
  }
  std::vector<HostTensor> queries;
  std::vector<std::vector<int32_t>> tokens(cases.size());
  std::vector<ScoreTokensItem> items;
  std::vector<Output<float>> scores;
  Random random(61);
  for (size_t i = 0; i < cases.size(); ++i) {
    const int64_t count = cases[i].num_tokens;
    queries.push_back(HostTensor::Make(shape, num_queries, shape.num_query_heads, shape.query_dtype,
                                       Layout::kDense, 600 + i));
    for (int32_t g = 0; g < groups && !cases[i].first_tokens; ++g) {
      const std::vector<int32_t> row = RandomTokens(random, shape.num_tokens, count);
      tokens[i].insert(tokens[i].end(), row.begin(), row.end());
    }
    scores.push_back(session.Poisoned<float>(shape.num_kv_heads * count));
    items.push_back({.queries = session.Upload(queries.back()),
                     .keys = uploaded[i % keys.size()],
                     .tokens = session.Upload(tokens[i]),
                     .num_tokens = count,
                     .token_scores = scores.back().data()});
  }
  const absl::Status status = backend.ScoreTokens(
      {.items = items, .groups = groups, .softmax_scale = scale}, session.stream());
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < cases.size(); ++i) {
    const ScoreTokensItem host{.queries = queries[i].view(),
                               .keys = keys[i % keys.size()].view(),
                               .tokens = tokens[i].empty() ? nullptr : tokens[i].data(),
                               .num_tokens = cases[i].num_tokens};
    const double dot = LargestNorm(host.queries) * norms[i % norms.size()] * 1.01;
    const double relative = SoftmaxError(scale, dot, shape.head_dim, host.num_tokens) +
                            static_cast<double>(num_queries * shape.group_size()) * kUnit;
    ExpectNear(session.Read(std::move(scores[i])), ScoreTokens(host, groups, scale), relative,
               1e-30, "scores of item " + std::to_string(i));
    if (testing::Test::HasFatalFailure()) return;
  }
}

// ---- AttendTokens ----

// Rows of one item: chosen tokens (or the first ones) and a tail.
struct AttendCase {
  int64_t num_tokens = 0;
  bool first_tokens = false;  // tokens null
  int64_t tail = 0;
};

struct AttendInputs {
  Sequence tail;
  HostTensor queries;
  std::vector<int32_t> tokens;  // [groups, num_tokens]
};

AttendInputs MakeInputs(const ParityShape& shape, DType value_dtype, const AttendCase& test,
                        int32_t groups, uint64_t seed) {
  const auto tail = [&](DType dtype, uint64_t tail_seed) {
    return HostTensor::Make(shape, test.tail, shape.num_kv_heads, dtype, Layout::kDense, tail_seed);
  };
  AttendInputs inputs{{tail(shape.dtype, seed + 2), tail(value_dtype, seed + 3)},
                      HostTensor::Make(shape, 1, shape.num_query_heads, shape.query_dtype,
                                       Layout::kDense, seed + 4),
                      {}};
  Random random(seed + 5);
  for (int32_t g = 0; g < groups && !test.first_tokens; ++g) {
    const auto tokens = RandomTokens(random, shape.num_tokens, test.num_tokens);
    inputs.tokens.insert(inputs.tokens.end(), tokens.begin(), tokens.end());
  }
  return inputs;
}

// Largest error of rounding to the nearest of a float type.
double HalfSpacing(DType dtype, double value) {
  const double magnitude = std::fabs(value);
  if (dtype == DType::kBFloat16) return 0x1p-8 * magnitude;
  if (dtype == DType::kFloat16) return 0x1p-11 * magnitude + 0x1p-25;
  return 0;
}

void ExpectAttention(const AttendTokensItem& host, int32_t groups, float scale,
                     const std::vector<std::byte>& output, const std::vector<float>& lse) {
  const Attention expected = AttendTokens(host, groups, scale);
  const double key_norm = std::max(LargestNorm(host.keys), LargestNorm(host.tail_keys));
  const double value_norm = std::max(LargestNorm(host.values), LargestNorm(host.tail_values));
  const double dot = LargestNorm(host.queries) * key_norm * 1.01;
  const int64_t num_rows = host.num_tokens + host.tail_keys.num_tokens;
  const double relative = SoftmaxError(scale, dot, host.queries.head_dim, num_rows);
  // As in MeasureAttention: outputs are convex combinations of values.
  const double absolute = 2 * relative * value_norm * 1.01;
  const DType dtype = host.queries.dtype;
  for (size_t i = 0; i < expected.output.size(); ++i) {
    const double value =
        DecodeElement(dtype, output.data() + static_cast<int64_t>(i) * DTypeBytes(dtype));
    const double bound = absolute + HalfSpacing(dtype, std::fabs(expected.output[i]) + absolute);
    ASSERT_NEAR(value, expected.output[i], bound) << "output " << i;
  }
  if (!lse.empty()) ExpectNear(lse, expected.lse, 2 * kUnit, relative, "lse");
}

// Items share the sequences.
void CheckAttend(Backend& backend, const ParityShape& shape, const std::vector<Sequence>& sequences,
                 int32_t groups, const std::vector<AttendCase>& cases, bool with_lse) {
  const DType value_dtype = sequences.front().values.view().dtype;
  SCOPED_TRACE("values " + std::string(DTypeName(value_dtype)) + ", groups " +
               std::to_string(groups) + ", items " + std::to_string(cases.size()));
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(shape.head_dim)));
  DeviceSession session(backend);
  std::vector<std::pair<TensorView, TensorView>> uploaded;
  for (const Sequence& sequence : sequences) {
    uploaded.emplace_back(session.Upload(sequence.keys), session.Upload(sequence.values));
  }
  std::vector<AttendInputs> inputs;
  std::vector<AttendTokensItem> items;
  std::vector<Output<std::byte>> outputs;
  std::vector<Output<float>> lse;
  for (size_t i = 0; i < cases.size(); ++i) {
    inputs.push_back(MakeInputs(shape, value_dtype, cases[i], groups, 300 + 10 * i));
    const AttendInputs& in = inputs.back();
    outputs.push_back(session.Poisoned<std::byte>(shape.num_query_heads * shape.head_dim *
                                                  DTypeBytes(shape.query_dtype)));
    lse.push_back(session.Poisoned<float>(with_lse ? shape.num_query_heads : 0));
    items.push_back({.queries = session.Upload(in.queries),
                     .keys = uploaded[i % uploaded.size()].first,
                     .values = uploaded[i % uploaded.size()].second,
                     .tokens = session.Upload(in.tokens),
                     .num_tokens = cases[i].num_tokens,
                     .tail_keys = session.Upload(in.tail.keys),
                     .tail_values = session.Upload(in.tail.values),
                     .output = outputs.back().data(),
                     .lse = with_lse ? lse.back().data() : nullptr});
    // Tokens of no size are still tokens.
    if (in.tokens.empty() && !cases[i].first_tokens) {
      items.back().tokens = session.Upload(std::vector<int32_t>{-1});
    }
  }
  const absl::Status status = backend.AttendTokens(
      {.items = items, .groups = groups, .softmax_scale = scale}, session.stream());
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE("item " + std::to_string(i));
    const AttendInputs& in = inputs[i];
    const Sequence& sequence = sequences[i % sequences.size()];
    const AttendTokensItem host{.queries = in.queries.view(),
                                .keys = sequence.keys.view(),
                                .values = sequence.values.view(),
                                .tokens = cases[i].first_tokens ? nullptr : in.tokens.data(),
                                .num_tokens = cases[i].num_tokens,
                                .tail_keys = in.tail.keys.view(),
                                .tail_values = in.tail.values.view()};
    const std::vector<float> lse_values = session.Read(std::move(lse[i]));
    ExpectAttention(host, groups, scale, session.Read(std::move(outputs[i])), lse_values);
    if (testing::Test::HasFatalFailure()) return;
    if (with_lse && cases[i].num_tokens == shape.num_tokens && cases[i].tail == 0) {
      // Everything chosen: plain attention of the last position.
      const double error =
          SoftmaxError(scale, LargestNorm(host.queries) * LargestNorm(host.keys) * 1.01,
                       shape.head_dim, shape.num_tokens);
      ExpectNear(lse_values, WindowLse(host.queries, host.keys, scale), 2 * kUnit, error,
                 "lse of plain attention");
    }
  }
}

// ---- RefreshRows ----

// What a caller keeps between steps, in host memory.
struct Slots {
  std::vector<int32_t> held;
  std::vector<std::byte> key_rows, value_rows;  // empty = null
  std::vector<float> key_scales, value_scales;
};

Slots EmptySlots(const ParityShape& shape, DType value_dtype, int64_t num_rows, bool with_rows) {
  const auto count = static_cast<size_t>(shape.num_kv_heads * num_rows);
  const auto dim = static_cast<size_t>(shape.head_dim);
  Slots slots;
  slots.held.assign(count, -1);
  if (!with_rows) return slots;
  slots.key_rows.resize(count * dim * static_cast<size_t>(DTypeBytes(shape.dtype)));
  slots.value_rows.resize(count * dim * static_cast<size_t>(DTypeBytes(value_dtype)));
  if (IsQuantized(shape.dtype)) slots.key_scales.resize(count);
  if (IsQuantized(value_dtype)) slots.value_scales.resize(count);
  return slots;
}

// Rows are overwritten between steps, so that rows touched without need show.
void Sentinel(Slots& slots, int step) {
  for (auto* rows : {&slots.key_rows, &slots.value_rows}) {
    std::fill(rows->begin(), rows->end(), static_cast<std::byte>(0xB0 + step));
  }
  for (auto* scales : {&slots.key_scales, &slots.value_scales}) {
    std::fill(scales->begin(), scales->end(), static_cast<float>(-1 - step));
  }
}

// A share of the last step's tokens and new ones, ascending.
std::vector<int32_t> NextWanted(Random& random, std::span<const int32_t> last, int64_t num_tokens,
                                int64_t percent_kept) {
  std::set<int32_t> wanted;
  for (int32_t token : last) {
    if (random.Between(0, 99) < percent_kept) wanted.insert(token);
  }
  while (wanted.size() < last.size()) {
    wanted.insert(static_cast<int32_t>(random.Between(0, num_tokens - 1)));
  }
  return {wanted.begin(), wanted.end()};
}

struct RefreshItem {
  const Sequence* sequence = nullptr;
  TensorView device_keys, device_values;
  Slots slots;
  bool with_moved = true;
  std::vector<int32_t> wanted;  // [groups, num_rows]
};

// One step of all items against the oracle; their slots go on to the next step.
void CheckStep(DeviceSession& session, const ParityShape& shape, std::vector<RefreshItem>& items,
               int32_t groups, int64_t num_rows) {
  const int64_t count = shape.num_kv_heads * num_rows;
  struct Outputs {
    Output<int32_t> held, moved, num_moved;
    Output<std::byte> key_rows, value_rows;
    Output<float> key_scales, value_scales;
  };
  const auto null_if_empty = [](const auto& output) {
    return output.count == 0 ? nullptr : output.data();
  };
  std::vector<Outputs> outputs;
  std::vector<RefreshRowsItem> device;
  for (const RefreshItem& item : items) {
    outputs.push_back({session.Holding(item.slots.held), session.Poisoned<int32_t>(count),
                       session.Poisoned<int32_t>(shape.num_kv_heads),
                       session.Holding(item.slots.key_rows), session.Holding(item.slots.value_rows),
                       session.Holding(item.slots.key_scales),
                       session.Holding(item.slots.value_scales)});
    const Outputs& out = outputs.back();
    device.push_back({.keys = item.device_keys,
                      .values = item.device_values,
                      .wanted = session.Upload(item.wanted),
                      .held = out.held.data(),
                      .moved_slots = item.with_moved ? out.moved.data() : nullptr,
                      .num_moved = out.num_moved.data(),
                      .key_rows = null_if_empty(out.key_rows),
                      .value_rows = null_if_empty(out.value_rows),
                      .key_scales = null_if_empty(out.key_scales),
                      .value_scales = null_if_empty(out.value_scales)});
  }
  const absl::Status status = session.backend().RefreshRows(
      {.items = device, .groups = groups, .num_rows = num_rows}, session.stream());
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < items.size(); ++i) {
    SCOPED_TRACE("item " + std::to_string(i));
    RefreshItem& item = items[i];
    Slots& slots = item.slots;
    std::vector<int32_t> moved(static_cast<size_t>(count));
    std::vector<int32_t> num_moved(static_cast<size_t>(shape.num_kv_heads));
    const auto pointer = [](auto& values) { return values.empty() ? nullptr : values.data(); };
    RefreshRows({.keys = item.sequence->keys.view(),
                 .values = item.sequence->values.view(),
                 .wanted = item.wanted.data(),
                 .held = slots.held.data(),
                 .moved_slots = moved.data(),
                 .num_moved = num_moved.data(),
                 .key_rows = pointer(slots.key_rows),
                 .value_rows = pointer(slots.value_rows),
                 .key_scales = pointer(slots.key_scales),
                 .value_scales = pointer(slots.value_scales)},
                groups, num_rows);
    Outputs& out = outputs[i];
    ExpectEqual(session.Read(std::move(out.num_moved)), num_moved, "num_moved");
    ExpectEqual(session.Read(std::move(out.held)), slots.held, "held");
    const std::vector<int32_t> moved_slots = session.Read(std::move(out.moved));
    ExpectSameBits(session.Read(std::move(out.key_rows)), slots.key_rows, "key rows");
    ExpectSameBits(session.Read(std::move(out.value_rows)), slots.value_rows, "value rows");
    ExpectSameBits(session.Read(std::move(out.key_scales)), slots.key_scales, "key scales");
    ExpectSameBits(session.Read(std::move(out.value_scales)), slots.value_scales, "value scales");
    if (testing::Test::HasFatalFailure()) return;
    for (int32_t h = 0; h < shape.num_kv_heads; ++h) {
      // Held and wanted are one set; of moved slots, what lies behind the count means nothing.
      const int64_t first = h * num_rows;
      std::vector<int32_t> held(slots.held.begin() + first, slots.held.begin() + first + num_rows);
      std::sort(held.begin(), held.end());
      const auto wanted = item.wanted.begin() + (groups == 1 ? 0 : first);
      ASSERT_TRUE(std::equal(held.begin(), held.end(), wanted));
      for (int32_t m = 0; item.with_moved && m < num_moved[static_cast<size_t>(h)]; ++m) {
        ASSERT_EQ(moved_slots[static_cast<size_t>(first + m)],
                  moved[static_cast<size_t>(first + m)])
            << "moved slot " << m << " of head " << h;
      }
    }
  }
}

// One item a sequence.
void CheckRefresh(Backend& backend, const ParityShape& shape,
                  const std::vector<Sequence>& sequences, int32_t groups, int64_t num_rows) {
  const DType value_dtype = sequences.front().values.view().dtype;
  SCOPED_TRACE("values " + std::string(DTypeName(value_dtype)) + ", groups " +
               std::to_string(groups) + ", rows " + std::to_string(num_rows));
  Random random(400);
  DeviceSession session(backend);
  std::vector<RefreshItem> items;
  for (size_t i = 0; i < sequences.size(); ++i) {
    items.push_back({&sequences[i],
                     session.Upload(sequences[i].keys),
                     session.Upload(sequences[i].values),
                     EmptySlots(shape, value_dtype, num_rows, /*with_rows=*/i != 1),
                     /*with_moved=*/i != 2,
                     {}});
    for (int32_t g = 0; g < groups; ++g) {
      const auto tokens = RandomTokens(random, shape.num_tokens, num_rows);
      items.back().wanted.insert(items.back().wanted.end(), tokens.begin(), tokens.end());
    }
  }
  const int64_t percents[] = {0, 80, 100, 0,
                              50};  // of tokens that stay wanted; the first is unused
  for (int step = 0; step < (shape.small() ? 5 : 3); ++step) {
    SCOPED_TRACE("step " + std::to_string(step));
    for (RefreshItem& item : items) {
      Sentinel(item.slots, step);
      if (step == 0) continue;
      std::vector<int32_t> next;
      for (int32_t g = 0; g < groups; ++g) {
        const auto tokens = NextWanted(
            random,
            std::span(item.wanted)
                .subspan(static_cast<size_t>(g * num_rows), static_cast<size_t>(num_rows)),
            shape.num_tokens, percents[step]);
        next.insert(next.end(), tokens.begin(), tokens.end());
      }
      item.wanted = next;
    }
    CheckStep(session, shape, items, groups, num_rows);
    if (testing::Test::HasFatalFailure()) return;
  }
}

ParityShape OtherGranularity(ParityShape shape) {
  shape.input_granularity = shape.input_granularity == ScaleGranularity::kHead
                                ? ScaleGranularity::kTokenHead
                                : ScaleGranularity::kHead;
  return shape;
}

}  // namespace

void CheckScoreTokens(Backend& backend, const ParityShape& shape) {
  const int64_t all = shape.num_tokens;
  const int64_t some = std::clamp<int64_t>(
      static_cast<int64_t>(shape.kept_ratio * static_cast<double>(all)), 1, all);
  std::vector<ParityShape> variants = {shape};
  if (shape.small()) {
    variants.push_back(shape);
    variants.back().layout = Layout::kHeadMajor;  // as sessions rest
    if (IsQuantized(shape.dtype)) {
      variants.push_back(OtherGranularity(shape));
      variants.back().layout = Layout::kHeadMajor;
    }
  }
  for (const ParityShape& variant : variants) {
    std::vector<HostTensor> keys = {HostTensor::Cache(variant, 501)};
    if (shape.small()) keys.push_back(HostTensor::Cache(variant, 502));
    std::vector<TokenScoreCase> batch = {{some, false}, {all, true}};
    if (shape.small()) {
      batch.insert(batch.end(), {{0, false}, {1, false}, {all, false}, {(some + 1) / 2, true}});
      // More than a launch takes, of different lengths.
      while (batch.size() < 66) {
        batch.push_back({std::min<int64_t>(all, static_cast<int64_t>(batch.size() % 23)), false});
      }
    }
    for (int32_t groups : {shape.num_kv_heads, 1}) {
      CheckTokenScores(backend, variant, keys, groups, 1, batch);
      if (testing::Test::HasFatalFailure() || !shape.small()) return;
      for (int64_t num_queries : {int64_t{5}, int64_t{shape.num_queries}}) {
        CheckTokenScores(backend, variant, keys, groups, num_queries, {{some, false}, {all, true}});
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

void CheckAttendTokens(Backend& backend, const ParityShape& shape) {
  const int64_t all = shape.num_tokens;
  const int64_t some = std::clamp<int64_t>(
      static_cast<int64_t>(shape.kept_ratio * static_cast<double>(all)), 1, all);
  for (DType value_dtype : ValueTypes(shape)) {
    const auto sequences = MakeSequences(shape, value_dtype, 280, shape.small() ? 2 : 1);
    for (int32_t groups : {shape.num_kv_heads, 1}) {
      CheckAttend(backend, shape, sequences, groups, {{some, false, 0}}, true);
      if (testing::Test::HasFatalFailure()) return;
      std::vector<AttendCase> cases = {
          {some, false, 37}, {0, false, 1}, {all, true, 0}, {(some + 1) / 2, true, 300}};
      if (shape.small()) cases.push_back({all, false, 0});
      CheckAttend(backend, shape, sequences, groups, cases, shape.small());
      if (testing::Test::HasFatalFailure() || !shape.small()) return;
    }
    const ParityShape other = OtherGranularity(shape);
    CheckAttend(backend, other, MakeSequences(other, value_dtype, 280, 1), 1, {{some, false, 3}},
                false);
    if (testing::Test::HasFatalFailure()) return;
  }
}

void CheckRefreshRows(Backend& backend, const ParityShape& shape) {
  const int64_t all = shape.num_tokens;
  const int64_t some = std::clamp<int64_t>(
      static_cast<int64_t>(shape.kept_ratio * static_cast<double>(all)), 1, all);
  for (DType value_dtype : ValueTypes(shape)) {
    const uint64_t count = shape.small() ? 3 : 2;
    const auto sequences = MakeSequences(shape, value_dtype, 401, count);
    for (int32_t groups : {shape.num_kv_heads, 1}) {
      for (int64_t num_rows : {some, (some + all) / 2, all}) {
        CheckRefresh(backend, shape, sequences, groups, num_rows);
        if (testing::Test::HasFatalFailure()) return;
        if (!shape.small()) return;
      }
    }
    if (!IsQuantized(shape.dtype) && !IsQuantized(value_dtype)) continue;
    const ParityShape other = OtherGranularity(shape);
    CheckRefresh(backend, other, MakeSequences(other, value_dtype, 401, count),
                 shape.num_kept_sets(), some);
    if (testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace dynsplit::oracle

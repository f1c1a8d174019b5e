// SPDX-License-Identifier: Apache-2.0
//
// Operations whose results are defined to the bit: CPU and GPU give equal bytes for equal inputs,
// and every operation of the GPU gives equal bytes on every run.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "tests/gpu/gpu.h"
#include "tests/oracle/device_session.h"
#include "tests/oracle/random_tensors.h"
#include "tests/oracle/shapes.h"

namespace dynsplit {
namespace {

using oracle::DeviceSession;
using oracle::HostTensor;
using oracle::KeptSets;
using oracle::Output;
using oracle::ParityShape;

using Bytes = std::vector<std::byte>;

std::vector<float> Scores(int64_t count, uint64_t seed) {
  oracle::Random random(seed);
  std::vector<float> scores(static_cast<size_t>(count));
  // A coarse grid, so that ties occur.
  for (float& score : scores) score = std::round(random.Normal() * 64) / 64;
  return scores;
}

struct Inputs {
  explicit Inputs(const ParityShape& s)
      : shape(s),
        keys(HostTensor::Cache(s, 101)),
        queries(HostTensor::Queries(s, 102)),
        starts(oracle::RandomBlockStarts(s, 103)),
        kept(oracle::RandomKept(s, 104)),
        token_scores(Scores(s.num_kv_heads * s.num_tokens, 105)),
        block_scores(Scores(s.num_kv_heads * num_blocks(), 106)),
        protected_tokens(static_cast<size_t>(s.num_tokens), 0),
        rotation(oracle::MakeRotation(s.num_tokens, s.rotary_dim, s.interleaved)) {
    protected_tokens.front() = protected_tokens.back() = 1;
  }
  int64_t num_blocks() const { return static_cast<int64_t>(starts.size()) - 1; }

  const ParityShape& shape;
  HostTensor keys;
  HostTensor queries;
  std::vector<int32_t> starts;
  KeptSets kept;
  std::vector<float> token_scores;
  std::vector<float> block_scores;
  std::vector<uint8_t> protected_tokens;
  oracle::HostRotation rotation;
};

// Runs one operation and returns the bytes of its outputs.
using Operation = std::function<std::vector<Bytes>(Backend&, const Inputs&)>;

std::vector<Bytes> ReduceBlocks(Backend& backend, const Inputs& in) {
  DeviceSession session(backend);
  const int32_t rows = in.shape.num_kv_heads;
  Output<std::byte> out = session.Poisoned<std::byte>(rows * in.num_blocks() * 4);
  EXPECT_TRUE(backend
                  .ReduceBlocks({.token_scores = session.Upload(in.token_scores),
                                 .rows = rows,
                                 .num_tokens = in.shape.num_tokens,
                                 .block_starts = session.Upload(in.starts),
                                 .num_blocks = in.num_blocks(),
                                 .block_scores = out.device.as<float>()},
                                session.stream())
                  .ok());
  return {session.Read(std::move(out))};
}

std::vector<Bytes> SummarizeBlocks(Backend& backend, const Inputs& in) {
  DeviceSession session(backend);
  const int64_t bytes = in.num_blocks() * in.shape.num_kv_heads * in.shape.head_dim * 4;
  Output<std::byte> min = session.Poisoned<std::byte>(bytes);
  Output<std::byte> max = session.Poisoned<std::byte>(bytes);
  Output<std::byte> mean = session.Poisoned<std::byte>(bytes);
  EXPECT_TRUE(backend
                  .SummarizeBlocks({.keys = session.Upload(in.keys),
                                    .block_starts = session.Upload(in.starts),
                                    .first_block = 0,
                                    .num_blocks = in.num_blocks(),
                                    .summaries = DenseSummaries(
                                        DType::kFloat32, in.shape.num_kv_heads, in.shape.head_dim,
                                        min.device.data(), max.device.data(), mean.device.data())},
                                   session.stream())
                  .ok());
  std::vector<Bytes> results;
  results.push_back(session.Read(std::move(min)));
  results.push_back(session.Read(std::move(max)));
  results.push_back(session.Read(std::move(mean)));
  return results;
}

std::vector<Bytes> SelectTokens(Backend& backend, const Inputs& in) {
  DeviceSession session(backend);
  std::vector<Bytes> results;
  for (bool with_token_scores : {false, true}) {
    SelectTokensParams params;
    params.block_scores = session.Upload(in.block_scores);
    params.token_scores = with_token_scores ? session.Upload(in.token_scores) : nullptr;
    params.groups = in.kept.groups;
    params.num_tokens = in.shape.num_tokens;
    params.block_starts = session.Upload(in.starts);
    params.num_blocks = in.num_blocks();
    params.protected_tokens = session.Upload(in.protected_tokens);
    params.num_kept = std::max<int64_t>(in.kept.num_kept, 2);
    Output<std::byte> kept = session.Poisoned<std::byte>(params.groups * params.num_kept * 4);
    Output<std::byte> counts = session.Poisoned<std::byte>(params.groups * 4);
    params.kept = kept.device.as<int32_t>();
    params.kept_counts = counts.device.as<int32_t>();
    EXPECT_TRUE(backend.SelectTokens(params, session.stream()).ok());
    results.push_back(session.Read(std::move(kept)));
    results.push_back(session.Read(std::move(counts)));
  }
  return results;
}

std::vector<Bytes> GatherPages(Backend& backend, const Inputs& in) {
  const ParityShape& shape = in.shape;
  DeviceSession session(backend);
  const bool rotated = shape.rotary_dim > 0;
  GatherPagesItem item;
  item.source = session.Upload(in.keys);
  item.kept = session.Upload(in.kept.tokens);
  item.groups = in.kept.groups;
  item.num_kept = in.kept.num_kept;
  item.page_size = shape.page_size;
  item.format = shape.format;
  item.scale_granularity = shape.granularity;
  item.out_dtype = OutputDType(shape.dtype, shape.format, rotated);
  if (rotated) item.rotation = session.Upload(in.rotation);
  const int64_t rows = (item.num_kept + shape.page_size - 1) / shape.page_size * shape.page_size *
                       shape.num_kv_heads;
  Output<std::byte> pages =
      session.Poisoned<std::byte>(rows * shape.head_dim * DTypeBytes(item.out_dtype));
  Output<std::byte> scales = session.Poisoned<std::byte>(rows * 4);
  item.pages = pages.device.data();
  item.scales = IsQuantized(item.out_dtype) ? scales.device.as<float>() : nullptr;
  EXPECT_TRUE(backend.GatherPages({.items = {&item, 1}}, session.stream()).ok());
  std::vector<Bytes> results;
  results.push_back(session.Read(std::move(pages)));
  results.push_back(session.Read(std::move(scales)));
  return results;
}

std::vector<Bytes> ScoreWindow(Backend& backend, const Inputs& in) {
  DeviceSession session(backend);
  Output<std::byte> scores =
      session.Poisoned<std::byte>(in.shape.num_kv_heads * in.shape.num_tokens * 4);
  EXPECT_TRUE(backend
                  .ScoreWindow({.queries = session.Upload(in.queries),
                                .keys = session.Upload(in.keys),
                                .softmax_scale = 0.1F,
                                .pooling_kernel = in.shape.pooling_kernel,
                                .pooling = in.shape.pooling,
                                .scores = scores.device.as<float>()},
                               session.stream())
                  .ok());
  return {session.Read(std::move(scores))};
}

std::vector<Bytes> ScoreKeys(Backend& backend, const Inputs& in) {
  DeviceSession session(backend);
  Output<std::byte> scores =
      session.Poisoned<std::byte>(in.shape.num_kv_heads * in.shape.num_tokens * 4);
  EXPECT_TRUE(backend
                  .ScoreKeys({.keys = session.Upload(in.keys),
                              .method = ScoringPolicy::Method::kKeyDifference,
                              .scores = scores.device.as<float>()},
                             session.stream())
                  .ok());
  return {session.Read(std::move(scores))};
}

std::vector<Bytes> MeasureAttention(Backend& backend, const Inputs& in) {
  const ParityShape& shape = in.shape;
  DeviceSession session(backend);
  Output<std::byte> mass = session.Poisoned<std::byte>(shape.num_query_heads * 4);
  Output<std::byte> error = session.Poisoned<std::byte>(shape.num_query_heads * 4);
  Output<std::byte> reference = session.Poisoned<std::byte>(shape.num_query_heads * 4);
  MeasureAttentionParams params;
  params.queries = session.Upload(in.queries);
  params.keys = params.values = session.Upload(in.keys);
  // Any tensor of the right shape serves for the kept rows.
  params.kept_keys = params.kept_values = params.keys;
  params.kept_keys.num_tokens = params.kept_values.num_tokens = in.kept.num_kept;
  params.kept = session.Upload(in.kept.tokens);
  params.groups = in.kept.groups;
  params.num_kept = in.kept.num_kept;
  params.softmax_scale = 0.1F;
  params.mass = mass.device.as<float>();
  params.err_sq = error.device.as<float>();
  params.ref_sq = reference.device.as<float>();
  EXPECT_TRUE(backend.MeasureAttention(params, session.stream()).ok());
  std::vector<Bytes> results;
  results.push_back(session.Read(std::move(mass)));
  results.push_back(session.Read(std::move(error)));
  results.push_back(session.Read(std::move(reference)));
  return results;
}

struct NamedOperation {
  const char* name;
  Operation run;
};

std::string ShapeName(const testing::TestParamInfo<ParityShape>& info) { return info.param.name; }

class SameBytesTest : public testing::TestWithParam<ParityShape> {};

TEST_P(SameBytesTest, CpuAndGpu) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  const Inputs inputs(GetParam());
  const NamedOperation operations[] = {{"ReduceBlocks", ReduceBlocks},
                                       {"SummarizeBlocks", SummarizeBlocks},
                                       {"SelectTokens", SelectTokens},
                                       {"GatherPages", GatherPages}};
  for (const NamedOperation& operation : operations) {
    const std::vector<Bytes> on_gpu = operation.run(*gpu, inputs);
    const std::vector<Bytes> on_cpu = operation.run(Cpu(), inputs);
    EXPECT_TRUE(on_gpu == on_cpu) << operation.name;
  }
}

TEST_P(SameBytesTest, EveryRun) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  const Inputs inputs(GetParam());
  const NamedOperation operations[] = {
      {"ScoreWindow", ScoreWindow},   {"ScoreKeys", ScoreKeys},
      {"GatherPages", GatherPages},   {"MeasureAttention", MeasureAttention},
      {"SelectTokens", SelectTokens}, {"SummarizeBlocks", SummarizeBlocks}};
  for (const NamedOperation& operation : operations) {
    const std::vector<Bytes> first = operation.run(*gpu, inputs);
    for (int round = 0; round < 3; ++round) {
      EXPECT_TRUE(operation.run(*gpu, inputs) == first) << operation.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, SameBytesTest,
                         testing::ValuesIn(oracle::ParityShapes().begin(),
                                           oracle::ParityShapes().end()),
                         ShapeName);

}  // namespace
}  // namespace dynsplit

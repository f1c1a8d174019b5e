// SPDX-License-Identifier: Apache-2.0
//
// What sessions answer: the same tokens and bytes however they were filled, wherever they rest and
// whoever else is there.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/e2e/sequences.h"
#include "tests/oracle/reference.h"

namespace dynsplit::e2e {
namespace {

using Summaries = v1::SessionOptions::Summaries;

class SessionsTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { server_ = new SessionServer; }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }
  void TearDown() override { EXPECT_TRUE(server_->server().ReturnsToBaseline()); }

  static SessionServer* server_;
};
SessionServer* SessionsTest::server_ = nullptr;

void SetEncoding(CompressJob& job, v1::Encoding::Format format) {
  job.begin.mutable_policy()->mutable_encoding()->set_key(format);
  job.begin.mutable_policy()->mutable_encoding()->set_value(format);
}

v1::SequenceStep ScoredStep(const Sequence& sequence, const std::string& id, int64_t behind = 0) {
  v1::SequenceStep step = StepOf(sequence, id, behind);
  step.set_with_scores(true);
  return step;
}

TEST_F(SessionsTest, FullBudgetReadsAllAndFetchReturnsWhatWasOpened) {
  for (const char* kind : {"prose", "code", "dialogue"}) {
    const Sequence sequence = SampleSequence(kind);
    const std::string id = server_->OpenAll(sequence);
    v1::SequenceStep step = StepOf(sequence, id);
    step.set_tokens_per_head(sequence.tokens());
    const v1::SequenceSelection all = server_->Select(step);
    EXPECT_EQ(all.tokens_per_head(), sequence.tokens());
    EXPECT_EQ(all.num_groups(), 3);
    const std::vector<int32_t> tokens = Int32s(all.tokens());
    ASSERT_EQ(tokens.size(), static_cast<size_t>(3 * 3 * sequence.tokens()));
    for (size_t i = 0; i < tokens.size(); ++i) {
      ASSERT_EQ(tokens[i], static_cast<int32_t>(i % static_cast<size_t>(sequence.tokens())));
    }
    const RestingRows rows = server_->Fetch(id);
    ASSERT_EQ(rows.layers.size(), 3U);
    for (size_t l = 0; l < 3; ++l) {
      EXPECT_TRUE(rows.layers[l].keys == sequence.keys[l]) << kind << " layer " << l;
      EXPECT_TRUE(rows.layers[l].values == sequence.values[l]) << kind << " layer " << l;
      EXPECT_EQ(rows.layers[l].key_scales, "");
    }
    EXPECT_GT(server_->Release(id), sequence.tokens() * 3 * 3 * 64 * 2 * 2);
  }
}

// What a Fetch that broke there would have left: bytes from `offset` on are rubbish.
PartialFetch PartOf(const CompressResult& whole, size_t layer, size_t index, int64_t offset) {
  PartialFetch partial;
  partial.num_layers = partial.last_layer = static_cast<int32_t>(layer);
  --partial.last_layer;
  partial.tensor_index = static_cast<int32_t>(index);
  partial.offset = offset;
  LayerOutput& open = partial.open.emplace();
  open.result = whole.layers[layer].result;
  for (size_t i = 0; i < whole.layers[layer].tensors.size(); ++i) {
    const OutputTensor& from = whole.layers[layer].tensors[i];
    OutputTensor& to = open.tensors.emplace_back();
    to.descriptor = from.descriptor;
    to.data = *AlignedBuffer::Allocate(from.data.size());
    std::memset(to.data.data(), 0x5a, to.data.size());
    const size_t had = i < index ? from.data.size() : i == index ? static_cast<size_t>(offset) : 0;
    std::memcpy(to.data.data(), from.data.bytes().data(), had);
  }
  return partial;
}

TEST_F(SessionsTest, FetchGoesOnFromAnyByteOfAnyTensor) {
  const Sequence sequence = RandomSequence({.num_layers = 3, .num_tokens = 131});
  const std::string id = server_->OpenAll(sequence);
  const auto client =
      *Client::Connect("unix:" + server_->server().unix_socket(), {.chunk_bytes = 4096});
  CompressJob job;
  job.begin.mutable_target()->set_session_id(id);
  job.begin.mutable_policy()->mutable_encoding()->set_key(v1::Encoding::FORMAT_INT8);
  job.begin.mutable_policy()->mutable_encoding()->set_scale_granularity(
      v1::SCALE_GRANULARITY_TOKEN_HEAD);
  const absl::StatusOr<CompressResult> whole = client->FetchSession(job);
  ASSERT_TRUE(whole.ok()) << whole.status();
  ASSERT_EQ(whole->layers.size(), 3U);
  for (size_t l = 0; l < 3; ++l) {
    const std::vector<OutputTensor>& tensors = whole->layers[l].tensors;
    EXPECT_GE(tensors.size(), 3U);  // keys with scales, values
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto size = static_cast<int64_t>(tensors[i].data.size());
      for (const int64_t offset : {int64_t{0}, int64_t{1}, size / 2, int64_t{4096}, size - 1}) {
        if (offset >= size) continue;
        SCOPED_TRACE(absl::StrCat("layer ", l, " tensor ", i, " offset ", offset));
        PartialFetch partial = PartOf(*whole, l, i, offset);
        job.partial = &partial;
        const absl::StatusOr<CompressResult> rest = client->FetchSession(job);
        if (!rest.ok() || rest->layers.size() != 3 - l) {
          ADD_FAILURE() << rest.status();
          continue;
        }
        int64_t missing = -offset;
        for (size_t later = l; later < 3; ++later) {
          for (size_t j = 0; j < whole->layers[later].tensors.size(); ++j) {
            const OutputTensor& expected = whole->layers[later].tensors[j];
            EXPECT_TRUE(rest->layers[later - l].tensors[j].data.bytes() == expected.data.bytes())
                << "layer " << later << " tensor " << j;
            if (later > l || j >= i) missing += static_cast<int64_t>(expected.data.size());
          }
        }
        EXPECT_EQ(rest->received_bytes, missing) << "bytes were sent again";
      }
    }
  }
  server_->Release(id);
}

TEST_F(SessionsTest, ClientPutsBrokenFetchesTogether) {
  const Sequence sequence = SampleSequence("code");
  const std::string id = server_->OpenAll(sequence);
  const RestingRows whole = server_->Fetch(id);
  PartialFetch partial;
  CompressJob job;
  job.begin.mutable_target()->set_session_id(id);
  job.partial = &partial;
  int calls = 0;
  absl::StatusOr<CompressResult> result = absl::UnknownError("");
  const auto client = *Client::Connect("unix:" + server_->server().unix_socket(),
                                       {.chunk_bytes = size_t{64} << 10});
  for (; !result.ok() && calls < 200; ++calls) {
    // Cancelled after a few messages, wherever that is.
    Cancellation cancellation;
    int messages = 0;
    job.cancellation = &cancellation;
    job.on_progress = [&](const Progress&) {
      if (++messages == 4) cancellation.Cancel();
    };
    result = client->FetchSession(job);
    ASSERT_TRUE(result.ok() || absl::IsCancelled(result.status())) << result.status();
  }
  ASSERT_TRUE(result.ok());
  EXPECT_GT(calls, 2);
  ASSERT_EQ(result->layers.size(), 3U);
  for (size_t l = 0; l < 3; ++l) {
    const OutputTensor* keys = FindTensor(result->layers[l].tensors, v1::TENSOR_KIND_KEY_PAGES);
    ASSERT_NE(keys, nullptr);
    EXPECT_EQ(std::memcmp(keys->data.bytes().data(), whole.layers[l].keys.data(),
                          whole.layers[l].keys.size()),
              0);
  }
  server_->Release(id);
}

// The plan that keeps `ratio` of the tokens of each head, and its execution as Apply does it.
CompressResult PlanAndApply(Client& client, const Sequence& sequence, CompressJob job,
                            CompressResult& plan) {
  *job.begin.mutable_shape() = sequence.shape;
  absl::StatusOr<CompressResult> planned = client.Plan(job);
  if (!planned.ok()) {
    ADD_FAILURE() << planned.status();
    return {};
  }
  plan = *std::move(planned);
  CompressJob apply = TokensJob(sequence, 0, sequence.tokens());
  apply.tensors.erase(apply.tensors.begin());  // no token ids
  *apply.begin.mutable_plan() = plan.end.plan();
  const auto add = [&apply](const OutputTensor& tensor, std::optional<int32_t> layer) {
    InputTensor& input = apply.tensors.emplace_back();
    input.kind = tensor.descriptor.kind();
    input.layer = layer;
    input.dtype = tensor.descriptor.dtype();
    input.bytes = tensor.data.bytes();
  };
  for (const OutputTensor& tensor : plan.sequence_tensors) add(tensor, std::nullopt);
  for (const LayerOutput& layer : plan.layers) {
    add(*FindTensor(layer.tensors, v1::TENSOR_KIND_KEPT_TOKENS), layer.result.plan().layer());
  }
  absl::StatusOr<CompressResult> applied = client.Apply(apply);
  if (!applied.ok()) {
    ADD_FAILURE() << applied.status();
    return {};
  }
  return *std::move(applied);
}

TEST_F(SessionsTest, FetchEncodesAsApplyDoes) {
  const Sequence sequence = SampleSequence("dialogue");
  const std::string id = server_->OpenAll(sequence);
  for (const v1::Encoding::Format format :
       {v1::Encoding::FORMAT_AS_IS, v1::Encoding::FORMAT_FLOAT8_E4M3, v1::Encoding::FORMAT_INT8}) {
    for (const v1::ScaleGranularity granularity :
         {v1::SCALE_GRANULARITY_HEAD, v1::SCALE_GRANULARITY_TOKEN_HEAD}) {
      for (const double ratio : {1.0, 0.3}) {
        SCOPED_TRACE(absl::StrCat(v1::Encoding::Format_Name(format), " ", granularity, " ", ratio));
        CompressJob job = TokensJob(sequence, 0, sequence.tokens());
        v1::Policy& policy = *job.begin.mutable_policy();
        policy.set_preset("keydiff");
        policy.set_scope(v1::SCOPE_LAYER_HEAD);
        policy.mutable_budget()->set_kept_ratio(ratio);
        SetEncoding(job, format);
        policy.mutable_encoding()->set_scale_granularity(granularity);
        CompressResult plan;
        const CompressResult applied =
            PlanAndApply(server_->client(), sequence, std::move(job), plan);
        ASSERT_EQ(applied.layers.size(), 3U);
        CompressJob fetch;
        fetch.begin.mutable_target()->set_session_id(id);
        *fetch.begin.mutable_policy()->mutable_encoding() = plan.end.plan().policy().encoding();
        for (const LayerOutput& layer : plan.layers) {
          if (ratio == 1) break;  // whole without being named
          const OutputTensor& kept = *FindTensor(layer.tensors, v1::TENSOR_KIND_KEPT_TOKENS);
          InputTensor& tensor = fetch.tensors.emplace_back();
          tensor.kind = v1::TENSOR_KIND_KEPT_TOKENS;
          tensor.layer = layer.result.plan().layer();
          tensor.dtype = v1::DTYPE_INT32;
          tensor.bytes = kept.data.bytes();
        }
        const absl::StatusOr<CompressResult> fetched = server_->client().FetchSession(fetch);
        ASSERT_TRUE(fetched.ok()) << fetched.status();
        ASSERT_EQ(fetched->layers.size(), 3U);
        for (size_t l = 0; l < 3; ++l) {
          for (const v1::TensorKind kind :
               {v1::TENSOR_KIND_KEY_PAGES, v1::TENSOR_KIND_VALUE_PAGES,
                v1::TENSOR_KIND_KEY_PAGE_SCALES, v1::TENSOR_KIND_VALUE_PAGE_SCALES}) {
            const OutputTensor* expected = FindTensor(applied.layers[l].tensors, kind);
            const OutputTensor* actual = FindTensor(fetched->layers[l].tensors, kind);
            ASSERT_EQ(expected == nullptr, actual == nullptr) << v1::TensorKind_Name(kind);
            if (expected == nullptr) continue;
            EXPECT_TRUE(actual->data.bytes() == expected->data.bytes())
                << "layer " << l << " " << v1::TensorKind_Name(kind);
          }
        }
      }
    }
  }
  server_->Release(id);
}

// How K, V and summaries rest.
struct Rest {
  v1::Encoding::Format format;
  Summaries summaries;
};
constexpr Rest kRests[] = {
    {v1::Encoding::FORMAT_AS_IS, v1::SessionOptions::SUMMARIES_AS_KEYS},
    {v1::Encoding::FORMAT_AS_IS, v1::SessionOptions::SUMMARIES_FLOAT8_E4M3},
    {v1::Encoding::FORMAT_FLOAT8_E4M3, v1::SessionOptions::SUMMARIES_AS_KEYS},
    {v1::Encoding::FORMAT_FLOAT8_E4M3, v1::SessionOptions::SUMMARIES_FLOAT8_E4M3},
    {v1::Encoding::FORMAT_INT8, v1::SessionOptions::SUMMARIES_AS_KEYS},
    {v1::Encoding::FORMAT_INT8, v1::SessionOptions::SUMMARIES_FLOAT8_E4M3},
};

CompressJob OpenJobAt(const Sequence& sequence, int64_t end, const Rest& rest) {
  CompressJob job = OpenJob(sequence, end, sequence.tokens() - end);
  SetEncoding(job, rest.format);
  job.begin.mutable_session()->set_summaries(rest.summaries);
  return job;
}

TEST_F(SessionsTest, AppendThenSelectIsOpenThenSelect) {
  const Sequence sequence = SampleSequence("prose");
  const int64_t total = sequence.tokens();
  const std::vector<std::vector<int64_t>> splits = {
      {1, total}, {17, total}, {640, total}, {total - 1, total}, {33, 34, 500, 501, 1200, total}};
  for (const Rest& rest : kRests) {
    const v1::SessionInfo opened = server_->Open(OpenJobAt(sequence, total, rest));
    const v1::SequenceSelection expected =
        server_->Select(ScoredStep(sequence, opened.session_id()));
    ASSERT_EQ(expected.scores_size(), 3);
    const RestingRows rows = server_->Fetch(opened.session_id());
    server_->Release(opened.session_id());
    for (const std::vector<int64_t>& split : splits) {
      SCOPED_TRACE(absl::StrCat(v1::Encoding::Format_Name(rest.format), ", summaries ",
                                rest.summaries, ", opened with ", split[0]));
      v1::SessionInfo info = server_->Open(OpenJobAt(sequence, split[0], rest));
      const std::string id = info.session_id();
      for (size_t i = 1; i < split.size(); ++i) {
        info = server_->Append(sequence, id, split[i - 1], split[i]);
        EXPECT_EQ(info.shape().num_tokens(), split[i]);
      }
      EXPECT_EQ(info.num_blocks(), opened.num_blocks());
      EXPECT_EQ(info.open_block_begin(), opened.open_block_begin());
      const v1::SequenceSelection appended = server_->Select(ScoredStep(sequence, id));
      EXPECT_TRUE(appended.tokens() == expected.tokens());
      EXPECT_TRUE(AnswerOf(appended) == AnswerOf(expected)) << "scores differ";
      const RestingRows again = server_->Fetch(id);
      for (size_t l = 0; l < 3; ++l) {
        EXPECT_TRUE(again.layers[l].keys == rows.layers[l].keys);
        EXPECT_TRUE(again.layers[l].key_scales == rows.layers[l].key_scales);
        EXPECT_TRUE(again.layers[l].values == rows.layers[l].values);
      }
      server_->Release(id);
    }
  }
}

TEST_F(SessionsTest, AppendingTokenByTokenIsOpeningAtEachLength) {
  const Sequence sequence = SampleSequence("code");
  constexpr int64_t kBegin = 400, kSteps = 48;
  const Rest rest = kRests[1];
  const std::string id = server_->Open(OpenJobAt(sequence, kBegin, rest)).session_id();
  for (int64_t tokens = kBegin + 1; tokens <= kBegin + kSteps; ++tokens) {
    server_->Append(sequence, id, tokens - 1, tokens);
    const std::string other = server_->Open(OpenJobAt(sequence, tokens, rest)).session_id();
    EXPECT_TRUE(AnswerOf(server_->Select(ScoredStep(sequence, id))) ==
                AnswerOf(server_->Select(ScoredStep(sequence, other))))
        << tokens << " tokens";
    server_->Release(other);
  }
  server_->Release(id);
}

TEST_F(SessionsTest, SegmentationOfAllKindsAppends) {
  const Sequence sequence = SampleSequence("dialogue");
  for (const v1::Segmentation::Method method :
       {v1::Segmentation::METHOD_FIXED, v1::Segmentation::METHOD_DELIMITER_SET}) {
    for (const v1::Scoring::Method scoring :
         {v1::Scoring::METHOD_BLOCK_BOUND, v1::Scoring::METHOD_BLOCK_MEAN_KEY}) {
      SCOPED_TRACE(absl::StrCat(method, " ", scoring));
      std::vector<std::string> answers;
      for (const int64_t first : {sequence.tokens(), int64_t{501}}) {
        CompressJob job = OpenJob(sequence, first, sequence.tokens() - first);
        job.begin.mutable_policy()->mutable_segmentation()->set_method(method);
        job.begin.mutable_policy()->mutable_scoring()->set_method(scoring);
        const std::string id = server_->Open(job).session_id();
        if (first < sequence.tokens()) server_->Append(sequence, id, first, sequence.tokens());
        answers.push_back(AnswerOf(server_->Select(ScoredStep(sequence, id))));
        server_->Release(id);
      }
      EXPECT_FALSE(answers[0].empty());
      EXPECT_TRUE(answers[0] == answers[1]);
    }
  }
}

TEST_F(SessionsTest, CompanyDoesNotMix) {
  constexpr int kThreads = 6, kPieces = 5;
  std::vector<Sequence> sequences;
  std::vector<std::vector<std::string>> lone(kThreads);
  const auto live = [&](Client& client, const Sequence& sequence,
                        std::vector<std::string>& answers) {
    const int64_t piece = sequence.tokens() / kPieces;
    const auto opened = client.OpenSession(OpenJob(sequence, piece, sequence.tokens() - piece));
    ASSERT_TRUE(opened.ok()) << opened.status();
    const std::string id = opened->end.session().session_id();
    for (int i = 1; i <= kPieces; ++i) {
      const auto response = client.Select(Request({ScoredStep(sequence, id)}));
      ASSERT_TRUE(response.ok()) << response.status();
      answers.push_back(AnswerOf(response->sequences(0)));
      if (i == kPieces) break;
      const auto appended =
          client.AppendSession(AppendJob(sequence, id, i * piece, (i + 1) * piece));
      ASSERT_TRUE(appended.ok()) << appended.status();
    }
    ASSERT_TRUE(client.ReleaseSession(ReleaseRequest(id)).ok());
  };
  for (int i = 0; i < kThreads; ++i) {
    sequences.push_back(RandomSequence({.num_layers = 1 + i % 3,
                                        .num_tokens = 500 + 35 * i,
                                        .seed = 50U + static_cast<uint32_t>(i)}));
    live(server_->client(), sequences.back(), lone[static_cast<size_t>(i)]);
  }
  std::vector<std::vector<std::string>> together(kThreads * 2);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < together.size(); ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 2; ++round) {
        together[i].clear();
        live(server_->client(), sequences[i % kThreads], together[i]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < together.size(); ++i) {
    EXPECT_TRUE(together[i] == lone[i % kThreads]) << "thread " << i;
  }
}

TEST_F(SessionsTest, BatchAnswersAsEachAlone) {
  std::vector<Sequence> sequences;
  std::vector<v1::SequenceStep> steps;
  sequences.push_back(SampleSequence("prose"));
  sequences.push_back(SampleSequence("code"));
  for (uint64_t i = 0; i < 5; ++i) {
    sequences.push_back(RandomSequence({.num_layers = static_cast<int32_t>(1 + i % 2),
                                        .num_query_heads = 8,
                                        .num_kv_heads = i == 4 ? 8 : 4,
                                        .head_dim = i < 3 ? 32 : 64,
                                        .num_tokens = static_cast<int64_t>(100 + 64 * i),
                                        .seed = i}));
  }
  for (size_t i = 0; i < sequences.size(); ++i) {
    CompressJob job = OpenJob(sequences[i], sequences[i].tokens());
    if (i == 1) job.begin.mutable_policy()->mutable_protection()->add_dense_layers(1);
    if (i == 2) job.begin.mutable_policy()->set_scope(v1::SCOPE_LAYER);
    if (i == 3) SetEncoding(job, v1::Encoding::FORMAT_INT8);
    if (i == 5) {
      job.begin.mutable_policy()->mutable_scoring()->set_method(v1::Scoring::METHOD_BLOCK_MEAN_KEY);
    }
    steps.push_back(ScoredStep(sequences[i], server_->Open(job).session_id()));
    if (i % 2 == 0) steps.back().set_tokens_per_head(50 + static_cast<int64_t>(i));
    steps.back().set_with_pages(i % 3 == 0);
  }
  const auto batch = server_->client().Select(Request(steps));
  ASSERT_TRUE(batch.ok()) << batch.status();
  ASSERT_EQ(batch->sequences_size(), static_cast<int>(steps.size()));
  for (size_t i = 0; i < steps.size(); ++i) {
    const v1::SequenceSelection alone = server_->Select(steps[i]);
    EXPECT_TRUE(batch->sequences(static_cast<int>(i)).SerializeAsString() ==
                alone.SerializeAsString())
        << "sequence " << i;
    EXPECT_EQ(alone.num_groups(), i == 2 ? 1 : sequences[i].shape.num_kv_heads());
    EXPECT_FALSE(alone.tokens().empty());
  }
  const v1::SequenceSelection& with_dense = batch->sequences(1);
  ASSERT_EQ(with_dense.dense_layers_size(), 1);
  const std::vector<int32_t> tokens = Int32s(with_dense.tokens());
  const size_t layer = tokens.size() / 3;
  EXPECT_TRUE(std::all_of(tokens.begin() + static_cast<std::ptrdiff_t>(layer),
                          tokens.begin() + static_cast<std::ptrdiff_t>(2 * layer),
                          [](int32_t token) { return token == -1; }));
  EXPECT_NE(tokens[0], -1);
  for (const v1::SequenceStep& step : steps) server_->Release(step.session_id());
}

TEST_F(SessionsTest, LayersAndQueriesOfAStepAreItsOwn) {
  const Sequence sequence = SampleSequence("prose");
  const std::string id = server_->OpenAll(sequence);
  const v1::SequenceSelection all = server_->Select(ScoredStep(sequence, id));
  const size_t layer_bytes = all.tokens().size() / 3;
  for (int32_t layer = 0; layer < 3; ++layer) {
    v1::SequenceStep step = ScoredStep(sequence, id);
    const std::string queries = step.query_data();
    step.set_first_layer(layer);
    step.set_num_layers(1);
    step.set_query_data(
        queries.substr(static_cast<size_t>(layer) * queries.size() / 3, queries.size() / 3));
    const v1::SequenceSelection one = server_->Select(step);
    EXPECT_EQ(one.first_layer(), layer);
    EXPECT_TRUE(one.tokens() ==
                all.tokens().substr(static_cast<size_t>(layer) * layer_bytes, layer_bytes));
    EXPECT_TRUE(one.scores(0) == all.scores(layer));
  }
  // Scores of several queries are the mean of each one's.
  v1::SequenceStep two = ScoredStep(sequence, id);
  two.clear_query_data();
  two.set_num_queries(2);
  const v1::SequenceStep before = ScoredStep(sequence, id, 1);
  const v1::SequenceStep last = ScoredStep(sequence, id, 0);
  const size_t row = last.query_data().size() / 3;
  for (size_t l = 0; l < 3; ++l) {
    two.mutable_query_data()->append(before.query_data(), l * row, row);
    two.mutable_query_data()->append(last.query_data(), l * row, row);
  }
  const v1::SequenceSelection mean = server_->Select(two);
  const v1::SequenceSelection first = server_->Select(before);
  for (int l = 0; l < 3; ++l) {
    const std::vector<float> a = Floats(first.scores(l));
    const std::vector<float> b = Floats(all.scores(l));
    const std::vector<float> m = Floats(mean.scores(l));
    ASSERT_EQ(m.size(), a.size());
    for (size_t i = 0; i < m.size(); ++i) {
      ASSERT_NEAR(m[i], (a[i] + b[i]) / 2, 1e-5F * (a[i] + b[i]) + 1e-12F);
    }
  }
  server_->Release(id);
}

TEST_F(SessionsTest, PagesAreThoseOfTheChosenTokens) {
  const Sequence sequence = SampleSequence("code");
  const std::string id = server_->OpenAll(sequence);
  v1::SequenceStep step = StepOf(sequence, id);
  step.set_with_pages(true);
  const v1::SequenceSelection selection = server_->Select(step);
  const std::vector<int32_t> tokens = Int32s(selection.tokens());
  ASSERT_EQ(selection.pages_size(), 3);
  const size_t layer = tokens.size() / 3;
  for (size_t l = 0; l < 3; ++l) {
    std::vector<int32_t> expected;
    for (size_t i = l * layer; i < (l + 1) * layer; ++i) expected.push_back(tokens[i] / 16);
    std::sort(expected.begin(), expected.end());
    expected.erase(std::unique(expected.begin(), expected.end()), expected.end());
    EXPECT_EQ(Int32s(selection.pages(static_cast<int>(l))), expected);
  }
  server_->Release(id);
}

TEST_F(SessionsTest, CompressKeepsWhatItCompresses) {
  const Sequence sequence = SampleSequence("prose");
  CompressJob job = TokensJob(sequence, 0, sequence.tokens());
  job.begin.mutable_policy()->set_preset("dynsplit_keys");
  job.begin.mutable_policy()->mutable_budget()->set_kept_ratio(0.25);
  const absl::StatusOr<CompressResult> plain = server_->client().Compress(job);
  job.begin.mutable_session()->set_reserve_tokens(10);
  job.begin.mutable_session_policy()->mutable_budget()->set_kept_ratio(0.1);
  const absl::StatusOr<CompressResult> kept = server_->client().Compress(job);
  ASSERT_TRUE(plain.ok()) << plain.status();
  ASSERT_TRUE(kept.ok()) << kept.status();
  EXPECT_FALSE(plain->end.has_session());
  EXPECT_EQ(kept->end.plan().hash(), plain->end.plan().hash());
  for (size_t l = 0; l < 3; ++l) {
    for (size_t i = 0; i < plain->layers[l].tensors.size(); ++i) {
      EXPECT_TRUE(kept->layers[l].tensors[i].data.bytes() ==
                  plain->layers[l].tensors[i].data.bytes());
    }
  }
  const std::string id = kept->end.session().session_id();
  EXPECT_EQ(kept->end.session().capacity_tokens(), sequence.tokens() + 10);
  const std::string other = server_->OpenAll(sequence);
  EXPECT_TRUE(AnswerOf(server_->Select(ScoredStep(sequence, id))) ==
              AnswerOf(server_->Select(ScoredStep(sequence, other))));
  server_->Release(id);
  server_->Release(other);
}

// ---- against plain loops ----

float FromBFloat16(const char* at) {
  uint16_t bits = 0;
  std::memcpy(&bits, at, 2);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value = 0;
  std::memcpy(&value, &wide, 4);
  return value;
}

// V2F as the oracle has it: exact bounds, double scores.
std::vector<int32_t> OracleTokens(const Sequence& sequence, size_t layer,
                                  const std::vector<int32_t>& starts, int64_t open_begin,
                                  const std::string& query, int64_t num_selected) {
  const v1::SequenceShape& shape = sequence.shape;
  const auto num_blocks = static_cast<int64_t>(starts.size()) - 1;
  SummarizeBlocksParams summarize;
  summarize.keys = DenseView(sequence.keys[layer].data(), DType::kBFloat16, shape.num_tokens(),
                             shape.num_kv_heads(), shape.head_dim());
  summarize.block_starts = starts.data();
  summarize.num_blocks = num_blocks;
  const auto count = static_cast<size_t>(num_blocks * shape.num_kv_heads() * shape.head_dim());
  std::vector<std::byte> min(count * 2), max(count * 2);
  summarize.summaries = DenseSummaries(DType::kBFloat16, shape.num_kv_heads(), shape.head_dim(),
                                       min.data(), max.data(), nullptr);
  oracle::StoreSummaries(oracle::SummarizeBlocks(summarize), summarize);
  ScoreBlocksItem score;
  score.queries =
      DenseView(query.data(), DType::kBFloat16, 1, shape.num_query_heads(), shape.head_dim());
  score.summaries = summarize.summaries;
  score.block_starts = starts.data();
  score.num_blocks = num_blocks;
  const float scale = 1 / std::sqrt(static_cast<float>(shape.head_dim()));
  const std::vector<double> scores = oracle::ScoreBlocks(score, shape.num_kv_heads(), scale);
  const std::vector<float> ranks(scores.begin(), scores.end());
  SelectBlocksItem select;
  select.block_scores = ranks.data();
  select.block_starts = starts.data();
  select.num_blocks = num_blocks;
  select.num_tokens = shape.num_tokens();
  select.prefix_end = 4;
  select.suffix_begin = std::min<int64_t>(shape.num_tokens() - 8, open_begin);
  select.num_selected = num_selected;
  return oracle::SelectBlocks(select, shape.num_kv_heads());
}

TEST_F(SessionsTest, RealSampleSelectsTheOraclesTokens) {
  for (const char* kind : {"prose", "code", "dialogue"}) {
    const Sequence sequence = SampleSequence(kind);
    CompressJob job = OpenJob(sequence, sequence.tokens());
    job.begin.mutable_policy()->mutable_scoring()->set_method(v1::Scoring::METHOD_BLOCK_BOUND);
    job.begin.mutable_session()->set_summaries(v1::SessionOptions::SUMMARIES_AS_KEYS);
    const absl::StatusOr<CompressResult> opened = server_->client().OpenSession(job);
    ASSERT_TRUE(opened.ok()) << opened.status();
    const v1::SessionInfo& info = opened->end.session();
    EXPECT_EQ(info.policy().scoring().refinement_factor(), 0);  // another method begins anew
    const OutputTensor* tensor = FindTensor(opened->sequence_tensors, v1::TENSOR_KIND_BLOCK_STARTS);
    ASSERT_NE(tensor, nullptr);
    const std::vector<int32_t> starts =
        Int32s({reinterpret_cast<const char*>(tensor->data.bytes().data()), tensor->data.size()});
    ASSERT_EQ(static_cast<int64_t>(starts.size()), info.num_blocks() + 1);
    const int64_t open_begin = info.open_block_begin();  // T where none is open
    ASSERT_TRUE(open_begin == sequence.tokens() || open_begin == starts[starts.size() - 2]);
    for (const int64_t behind : {0, 7, 31}) {
      for (const int64_t budget : {int64_t{128}, int64_t{400}}) {
        v1::SequenceStep step = StepOf(sequence, info.session_id(), behind);
        step.set_tokens_per_head(budget);
        const std::vector<int32_t> tokens = Int32s(server_->Select(step).tokens());
        ASSERT_EQ(static_cast<int64_t>(tokens.size()), 3 * 3 * budget);
        for (size_t l = 0; l < 3; ++l) {
          const size_t row = step.query_data().size() / 3;
          const std::vector<int32_t> expected = OracleTokens(
              sequence, l, starts, open_begin, step.query_data().substr(l * row, row), budget);
          const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(l * expected.size());
          EXPECT_EQ(
              std::vector<int32_t>(first, first + static_cast<std::ptrdiff_t>(expected.size())),
              expected)
              << kind << " layer " << l << ", " << behind << " before the last, " << budget;
        }
      }
    }
    server_->Release(info.session_id());
  }
}

// The best tokens of all by their own keys, as the oracle has it.
std::vector<int32_t> OracleBestTokens(const Sequence& sequence, size_t layer, int64_t open_begin,
                                      const std::string& query, int64_t num_selected) {
  const v1::SequenceShape& shape = sequence.shape;
  ScoreTokensItem score;
  score.queries =
      DenseView(query.data(), DType::kBFloat16, 1, shape.num_query_heads(), shape.head_dim());
  score.keys = DenseView(sequence.keys[layer].data(), DType::kBFloat16, shape.num_tokens(),
                         shape.num_kv_heads(), shape.head_dim());
  score.num_tokens = shape.num_tokens();
  const float scale = 1 / std::sqrt(static_cast<float>(shape.head_dim()));
  const std::vector<double> scores = oracle::ScoreTokens(score, shape.num_kv_heads(), scale);
  const std::vector<float> ranks(scores.begin(), scores.end());
  SelectBlocksItem select;
  select.block_scores = ranks.data();
  select.num_blocks = shape.num_tokens();
  select.num_tokens = shape.num_tokens();
  select.prefix_end = 4;
  select.suffix_begin = std::min<int64_t>(shape.num_tokens() - 8, open_begin);
  select.num_selected = num_selected;
  return oracle::SelectBlocks(select, shape.num_kv_heads());
}

// Where blocks propose everything, tokens decide alone; where they propose no more than is read,
// blocks do; and in between the answer is as good as its candidates.
TEST_F(SessionsTest, RealSampleRefinesToTheBestTokens) {
  constexpr int64_t kBudget = 128;
  for (const char* kind : {"prose", "code", "dialogue"}) {
    const Sequence sequence = SampleSequence(kind);
    const auto open = [&](int32_t factor) {
      CompressJob job = OpenJob(sequence, sequence.tokens());
      if (factor > 0) job.begin.mutable_policy()->mutable_scoring()->set_refinement_factor(factor);
      return server_->Open(job);
    };
    const v1::SessionInfo exact = open(16);
    const v1::SessionInfo refined = open(0);
    const v1::SessionInfo by_blocks = open(1);
    EXPECT_EQ(refined.policy().scoring().refinement_factor(), 4);
    EXPECT_EQ(by_blocks.policy().scoring().refinement_factor(), 1);
    ASSERT_GE(16 * kBudget, sequence.tokens());
    const auto select = [&](const v1::SessionInfo& session, int64_t budget) {
      v1::SequenceStep step = StepOf(sequence, session.session_id());
      step.set_tokens_per_head(budget);
      return Int32s(server_->Select(step).tokens());
    };
    const std::vector<int32_t> all_best = select(exact, kBudget);
    const std::vector<int32_t> refined_tokens = select(refined, kBudget);
    const std::vector<int32_t> candidates = select(by_blocks, 4 * kBudget);
    const std::vector<int32_t> block_tokens = select(by_blocks, kBudget);
    const std::string queries = StepOf(sequence, "").query_data();
    std::vector<int32_t> expected;
    for (size_t l = 0; l < 3; ++l) {
      const size_t row = queries.size() / 3;
      const std::vector<int32_t> layer = OracleBestTokens(sequence, l, exact.open_block_begin(),
                                                          queries.substr(l * row, row), kBudget);
      expected.insert(expected.end(), layer.begin(), layer.end());
    }
    EXPECT_EQ(all_best, expected) << kind;
    // Of each layer's and head's best tokens, how many are read: more than blocks alone find.
    const auto found = [&](const std::vector<int32_t>& tokens) {
      int64_t count = 0;
      for (size_t set = 0; set < expected.size(); set += kBudget) {
        for (size_t i = set; i < set + kBudget; ++i) {
          const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(set);
          count += std::binary_search(first, first + kBudget, expected[i]) ? 1 : 0;
        }
      }
      return count;
    };
    EXPECT_GT(found(refined_tokens), found(block_tokens)) << kind;
    for (size_t i = 0; i < refined_tokens.size(); ++i) {
      const auto first =
          candidates.begin() + static_cast<std::ptrdiff_t>(i / kBudget * (4 * kBudget));
      EXPECT_TRUE(std::binary_search(first, first + 4 * kBudget, refined_tokens[i]));
    }
    for (const v1::SessionInfo& session : {exact, refined, by_blocks}) {
      server_->Release(session.session_id());
    }
  }
}

// Scores are s_j = exp(scale * S_j) / Z for one query head a group. The last block is one zero key,
// whose S is 0 in any type, so that every S_j can be read off: it must not be less than the block's
// largest q.k.
TEST_F(SessionsTest, BlockScoresBoundTheBlocksDotProducts) {
  constexpr int64_t kBlock = 9, kTokens = 20 * kBlock + 1;
  constexpr int32_t kHeads = 3, kDim = 32;
  Sequence sequence = RandomSequence({.num_layers = 1,
                                      .num_query_heads = kHeads,
                                      .num_kv_heads = kHeads,
                                      .head_dim = kDim,
                                      .num_tokens = kTokens});
  std::string& keys = sequence.keys[0];
  std::fill(keys.end() - kHeads * kDim * 2, keys.end(), '\0');
  for (const Summaries summaries :
       {v1::SessionOptions::SUMMARIES_AS_KEYS, v1::SessionOptions::SUMMARIES_FLOAT8_E4M3}) {
    CompressJob job = OpenJob(sequence, kTokens);
    job.begin.mutable_session()->set_summaries(summaries);
    job.begin.mutable_policy()->mutable_scoring()->set_method(v1::Scoring::METHOD_BLOCK_BOUND);
    v1::Segmentation& segmentation = *job.begin.mutable_policy()->mutable_segmentation();
    segmentation.set_method(v1::Segmentation::METHOD_FIXED);
    segmentation.set_block_size(kBlock);
    const v1::SessionInfo info = server_->Open(job);
    ASSERT_EQ(info.num_blocks(), 21);
    const v1::SequenceStep step = ScoredStep(sequence, info.session_id());
    const std::vector<float> scores = Floats(server_->Select(step).scores(0));
    ASSERT_EQ(scores.size(), size_t{kHeads} * 21);
    double slack = 0;
    for (size_t h = 0; h < kHeads; ++h) {
      for (size_t j = 0; j < 20; ++j) {
        const double bound = std::log(double{scores[h * 21 + j]} / double{scores[h * 21 + 20]}) *
                             std::sqrt(double{kDim});
        double largest = -1e30;
        for (size_t t = j * kBlock; t < (j + 1) * kBlock; ++t) {
          double dot = 0;
          for (size_t c = 0; c < kDim; ++c) {
            dot += double{FromBFloat16(&step.query_data()[(h * kDim + c) * 2])} *
                   double{FromBFloat16(&keys[((t * kHeads + h) * kDim + c) * 2])};
          }
          largest = std::max(largest, dot);
        }
        EXPECT_GE(bound, largest - 1e-3) << "head " << h << " block " << j;
        slack += bound - largest;
      }
    }
    EXPECT_LT(slack / (kHeads * 20), 60);  // a bound, and no wild one
    server_->Release(info.session_id());
  }
}

// ---- memory ----

TEST_F(SessionsTest, AdviceIsWhatSessionsWeigh) {
  const Sequence sequence = SampleSequence("prose");
  for (const v1::Segmentation::Method method :
       {v1::Segmentation::METHOD_DYNAMIC, v1::Segmentation::METHOD_FIXED}) {
    for (const Rest& rest : kRests) {
      CompressJob job = OpenJobAt(sequence, sequence.tokens(), rest);
      job.begin.mutable_session()->set_reserve_tokens(100);
      job.begin.mutable_policy()->mutable_segmentation()->set_method(method);
      v1::AdviseRequest request;
      *request.mutable_shape() = sequence.shape;
      request.set_dtype(sequence.dtype);
      *request.mutable_session() = job.begin.session();
      *request.mutable_session_policy() = job.begin.policy();
      const auto advice = server_->client().Advise(request);
      ASSERT_TRUE(advice.ok()) << advice.status();
      const v1::SessionBytes& predicted = advice->session_bytes();
      const v1::SessionInfo info = server_->Open(job);
      const v1::SessionBytes& actual = info.bytes();
      SCOPED_TRACE(absl::StrCat(v1::Segmentation::Method_Name(method), " ",
                                v1::Encoding::Format_Name(rest.format), " ", rest.summaries));
      EXPECT_EQ(actual.key_value(), predicted.key_value());
      const double tolerance = method == v1::Segmentation::METHOD_FIXED ? 0 : 0.05;
      EXPECT_NEAR(static_cast<double>(actual.key_value() + actual.index()),
                  static_cast<double>(predicted.key_value() + predicted.index()),
                  tolerance * static_cast<double>(predicted.key_value() + predicted.index()));
      EXPECT_EQ(actual.device() + actual.host(),
                actual.key_value() + actual.index() + actual.reuse());
      EXPECT_EQ(server_->server().settled_bytes(), actual.device() + actual.host());
      EXPECT_EQ(server_->Release(info.session_id()), actual.device() + actual.host());
    }
  }
}

TEST(SessionResidenceTest, DemotedAndRestoredSessionsAnswerTheSame) {
  const Sequence sequence = SampleSequence("prose");
  const Sequence other = SampleSequence("code");
  ServerConfig config = SessionConfig();
  config.session_device_bytes = int64_t{4} << 20;  // one of 3 MiB, and another's index
  SessionServer server(config);
  const v1::SessionInfo opened = server.Open(OpenJob(sequence, sequence.tokens()));
  const std::string id = opened.session_id();
  EXPECT_EQ(opened.residence(), v1::SessionOptions::RESIDENCE_DEVICE);
  EXPECT_EQ(opened.bytes().host(), 0);
  const std::string expected = AnswerOf(server.Select(ScoredStep(sequence, id)));
  const RestingRows rows = server.Fetch(id);

  const v1::SessionInfo second = server.Open(OpenJob(other, other.tokens()));
  EXPECT_EQ(second.residence(), v1::SessionOptions::RESIDENCE_DEVICE);
  const v1::SessionInfo demoted = server.Get(id);
  EXPECT_EQ(demoted.residence(), v1::SessionOptions::RESIDENCE_HOST);
  EXPECT_EQ(demoted.num_demotions(), 1);
  EXPECT_EQ(demoted.num_restorations(), 0);
  EXPECT_EQ(demoted.bytes().host(), demoted.bytes().key_value());
  EXPECT_EQ(demoted.bytes().device(), demoted.bytes().index() + demoted.bytes().reuse());
  EXPECT_EQ(demoted.bytes().key_value(), opened.bytes().key_value());
  EXPECT_TRUE(AnswerOf(server.Select(ScoredStep(sequence, id))) == expected);
  EXPECT_TRUE(server.Fetch(id).layers[2].values == rows.layers[2].values);

  server.Release(second.session_id());
  ASSERT_TRUE(Eventually([&] {
    EXPECT_TRUE(AnswerOf(server.Select(ScoredStep(sequence, id))) == expected);
    return server.Get(id).num_restorations() == 1;
  }));
  const v1::SessionInfo restored = server.Get(id);
  EXPECT_EQ(restored.residence(), v1::SessionOptions::RESIDENCE_DEVICE);
  EXPECT_EQ(restored.bytes().host(), 0);
  EXPECT_TRUE(AnswerOf(server.Select(ScoredStep(sequence, id))) == expected);
  const RestingRows again = server.Fetch(id);
  for (size_t l = 0; l < 3; ++l) {
    EXPECT_TRUE(again.layers[l].keys == rows.layers[l].keys);
    EXPECT_TRUE(again.layers[l].values == rows.layers[l].values);
  }
  server.Release(id);
  EXPECT_TRUE(server.server().ReturnsToBaseline());
}

TEST(SessionResidenceTest, HostSessionsAndAppendsToDemotedOnes) {
  const Sequence sequence = SampleSequence("dialogue");
  const int64_t total = sequence.tokens();
  ServerConfig config = SessionConfig();
  config.session_device_bytes = int64_t{4} << 20;
  SessionServer server(config);
  const std::string reference = server.OpenAll(sequence);
  const std::string expected = AnswerOf(server.Select(ScoredStep(sequence, reference)));
  server.Release(reference);

  CompressJob on_host = OpenJob(sequence, total);
  on_host.begin.mutable_session()->set_residence(v1::SessionOptions::RESIDENCE_HOST);
  const v1::SessionInfo host = server.Open(on_host);
  EXPECT_EQ(host.residence(), v1::SessionOptions::RESIDENCE_HOST);
  EXPECT_EQ(host.num_demotions(), 0);
  EXPECT_TRUE(AnswerOf(server.Select(ScoredStep(sequence, host.session_id()))) == expected);
  server.Release(host.session_id());

  const std::string id = server.Open(OpenJob(sequence, 500, total - 500)).session_id();
  const std::string filler = server.OpenAll(sequence);
  EXPECT_EQ(server.Get(id).residence(), v1::SessionOptions::RESIDENCE_HOST);
  server.Append(sequence, id, 500, total);
  EXPECT_TRUE(AnswerOf(server.Select(ScoredStep(sequence, id))) == expected);
  server.Release(filler);
  server.Release(id);
  EXPECT_TRUE(server.server().ReturnsToBaseline());
}

}  // namespace
}  // namespace dynsplit::e2e

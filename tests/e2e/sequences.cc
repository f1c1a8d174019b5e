// SPDX-License-Identifier: Apache-2.0
#include "tests/e2e/sequences.h"

#include <gtest/gtest.h>

#include <cstring>
#include <utility>

#include "tests/e2e/sample.h"

namespace dynsplit::e2e {
namespace {

template <typename T>
std::vector<T> Values(std::string_view bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

std::string Text(absl::Span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

InputTensor Slice(v1::TensorKind kind, int32_t layer, v1::DType dtype, const std::string& bytes,
                  int64_t begin, int64_t end, int64_t total) {
  InputTensor tensor;
  tensor.kind = kind;
  tensor.layer = layer;
  tensor.dtype = dtype;
  const size_t row = bytes.size() / static_cast<size_t>(total);
  tensor.bytes = {
      reinterpret_cast<const std::byte*>(bytes.data()) + static_cast<size_t>(begin) * row,
      static_cast<size_t>(end - begin) * row};
  return tensor;
}

// Rows of the first `size` bytes; pages are padded.
std::string TensorText(const LayerOutput& layer, v1::TensorKind kind, size_t size) {
  const OutputTensor* tensor = FindTensor(layer.tensors, kind);
  return tensor == nullptr ? std::string() : Text(tensor->data.bytes()).substr(0, size);
}

template <typename T>
T OrFail(absl::StatusOr<T> value) {
  if (value.ok()) return *std::move(value);
  ADD_FAILURE() << value.status();
  return {};
}

}  // namespace

std::string_view Sequence::Row(const std::string& rows, int64_t token, int64_t head) const {
  const auto at = static_cast<size_t>(token * shape.num_kv_heads() + head);
  return std::string_view(rows).substr(at * row_bytes(), row_bytes());
}

Sequence SampleSequence(const std::string& kind) {
  const Capture capture = LoadData("sample/" + kind + ".safetensors");
  Sequence sequence;
  sequence.shape = capture.shape;
  sequence.dtype = capture.dtype;
  sequence.token_ids = capture.token_ids;
  sequence.num_queries = capture.num_window_queries();
  for (const Capture::Layer& layer : capture.layers) {
    sequence.keys.push_back(Text(layer.key));
    sequence.values.push_back(Text(layer.value));
    sequence.queries.push_back(Text(capture.WindowQueries(layer, sequence.num_queries)));
  }
  return sequence;
}

Sequence RandomSequence(const ScriptOptions& options) {
  Script script = MakeScript(options);
  Sequence sequence;
  sequence.shape = script.begin.shape();
  sequence.token_ids = Int32s(Find(script, v1::TENSOR_KIND_TOKEN_IDS).bytes);
  sequence.num_queries = options.num_queries;
  for (int32_t layer = 0; layer < options.num_layers; ++layer) {
    sequence.keys.push_back(Find(script, v1::TENSOR_KIND_KEY, layer).bytes);
    sequence.values.push_back(Find(script, v1::TENSOR_KIND_VALUE, layer).bytes);
    sequence.queries.push_back(Find(script, v1::TENSOR_KIND_QUERIES, layer).bytes);
  }
  return sequence;
}

CompressJob TokensJob(const Sequence& sequence, int64_t begin, int64_t end) {
  CompressJob job;
  *job.begin.mutable_shape() = sequence.shape;
  job.begin.mutable_shape()->set_num_tokens(end - begin);
  InputTensor& ids = job.tensors.emplace_back();
  ids.kind = v1::TENSOR_KIND_TOKEN_IDS;
  ids.dtype = v1::DTYPE_INT32;
  ids.bytes = {reinterpret_cast<const std::byte*>(sequence.token_ids.data() + begin),
               static_cast<size_t>(end - begin) * sizeof(int32_t)};
  for (size_t l = 0; l < sequence.keys.size(); ++l) {
    const auto layer = static_cast<int32_t>(l);
    job.tensors.push_back(Slice(v1::TENSOR_KIND_KEY, layer, sequence.dtype, sequence.keys[l], begin,
                                end, sequence.tokens()));
    job.tensors.push_back(Slice(v1::TENSOR_KIND_VALUE, layer, sequence.dtype, sequence.values[l],
                                begin, end, sequence.tokens()));
  }
  return job;
}

CompressJob OpenJob(const Sequence& sequence, int64_t end, int64_t reserve) {
  CompressJob job = TokensJob(sequence, 0, end);
  job.begin.mutable_session()->set_reserve_tokens(reserve);
  job.begin.mutable_policy()->set_preset("dynsplit_index");
  job.begin.mutable_policy()->mutable_budget()->set_kept_ratio(0.1);
  return job;
}

CompressJob AppendJob(const Sequence& sequence, const std::string& id, int64_t begin, int64_t end) {
  CompressJob job = TokensJob(sequence, begin, end);
  job.begin.mutable_target()->set_session_id(id);
  job.begin.mutable_target()->set_position(begin);
  return job;
}

v1::SequenceStep StepOf(const Sequence& sequence, const std::string& id, int64_t behind) {
  v1::SequenceStep step;
  step.set_session_id(id);
  step.set_dtype(sequence.dtype);
  const size_t row = static_cast<size_t>(sequence.shape.num_query_heads()) * sequence.row_bytes();
  const auto at = static_cast<size_t>(sequence.num_queries - 1 - behind) * row;
  for (const std::string& layer : sequence.queries) {
    step.mutable_query_data()->append(layer, at, row);
  }
  return step;
}

v1::SelectRequest Request(const std::vector<v1::SequenceStep>& steps) {
  v1::SelectRequest request;
  for (const v1::SequenceStep& step : steps) *request.add_sequences() = step;
  return request;
}

std::vector<int32_t> Int32s(const std::string& bytes) { return Values<int32_t>(bytes); }
std::vector<float> Floats(const std::string& bytes) { return Values<float>(bytes); }

std::string AnswerOf(const v1::SequenceSelection& selection) {
  std::string answer = selection.tokens();
  for (const std::string& scores : selection.scores()) answer += scores;
  return answer;
}

ServerConfig SessionConfig() {
  ServerConfig config = TestConfig();
  config.regions = "shm";
  return config;
}

SessionServer::SessionServer(const ServerConfig& config,
                             std::vector<std::unique_ptr<Backend>> backends)
    : server_(config, std::move(backends)), client_(AnotherClient()) {}

std::unique_ptr<Client> SessionServer::AnotherClient() const {
  return *Client::Connect("unix:" + server_.unix_socket(), {.timeout = absl::Seconds(60)});
}

v1::SessionInfo SessionServer::Open(const CompressJob& job) {
  return OrFail(client_->OpenSession(job)).end.session();
}

v1::SessionInfo SessionServer::Append(const Sequence& sequence, const std::string& id,
                                      int64_t begin, int64_t end) {
  return OrFail(client_->AppendSession(AppendJob(sequence, id, begin, end))).end.session();
}

v1::SequenceSelection SessionServer::Select(const v1::SequenceStep& step,
                                            const std::string& tenant) {
  v1::SelectRequest request = Request({step});
  request.set_tenant(tenant);
  const v1::SelectResponse response = OrFail(client_->Select(request));
  EXPECT_EQ(response.sequences_size(), 1);
  return response.sequences_size() == 1 ? response.sequences(0) : v1::SequenceSelection();
}

v1::SessionInfo SessionServer::Get(const std::string& id) {
  return OrFail(client_->GetSession(GetRequest(id)));
}

int64_t SessionServer::Release(const std::string& id) {
  return OrFail(client_->ReleaseSession(ReleaseRequest(id))).freed_bytes();
}

RestingRows SessionServer::Fetch(const std::string& id) {
  CompressJob job;
  job.begin.mutable_target()->set_session_id(id);
  const CompressResult result = OrFail(client_->FetchSession(job));
  const v1::SequenceShape& shape = result.end.session().shape();
  const auto rows = static_cast<size_t>(shape.num_tokens() * shape.num_kv_heads());
  RestingRows resting;
  for (const LayerOutput& layer : result.layers) {
    const OutputTensor* keys = FindTensor(layer.tensors, v1::TENSOR_KIND_KEY_PAGES);
    if (keys == nullptr) {
      ADD_FAILURE() << "no key pages";
      continue;
    }
    const size_t element = keys->descriptor.dtype() == v1::DTYPE_BFLOAT16 ? 2 : 1;
    const size_t size = rows * static_cast<size_t>(shape.head_dim()) * element;
    resting.layers.push_back({
        TensorText(layer, v1::TENSOR_KIND_KEY_PAGES, size),
        TensorText(layer, v1::TENSOR_KIND_VALUE_PAGES, size),
        TensorText(layer, v1::TENSOR_KIND_KEY_PAGE_SCALES, rows * 4),
        TensorText(layer, v1::TENSOR_KIND_VALUE_PAGE_SCALES, rows * 4),
    });
  }
  return resting;
}

v1::GetSessionRequest GetRequest(const std::string& id, const std::string& tenant) {
  v1::GetSessionRequest request;
  request.set_session_id(id);
  request.set_tenant(tenant);
  return request;
}

v1::ReleaseSessionRequest ReleaseRequest(const std::string& id, const std::string& tenant) {
  v1::ReleaseSessionRequest request;
  request.set_session_id(id);
  request.set_tenant(tenant);
  return request;
}

}  // namespace dynsplit::e2e

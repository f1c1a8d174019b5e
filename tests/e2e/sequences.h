// SPDX-License-Identifier: Apache-2.0
//
// Sequences that tests keep in a server as sessions, and what an engine would do with them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cpp/client.h"
#include "server/runtime/config.h"
#include "tests/e2e/harness.h"

namespace dynsplit::e2e {

// K, V, token ids and queries, in memory of their own.
struct Sequence {
  v1::SequenceShape shape;
  v1::DType dtype = v1::DTYPE_BFLOAT16;
  std::vector<int32_t> token_ids;
  std::vector<std::string> keys, values;  // a layer each: [T, Hkv, D]
  std::vector<std::string> queries;       // a layer each: [W, Hq, D], the last W positions'
  int64_t num_queries = 0;                // W

  int64_t tokens() const { return shape.num_tokens(); }
  size_t row_bytes() const { return static_cast<size_t>(shape.head_dim()) * 2; }
  // Row of a head's token within [T, Hkv, D] bytes.
  std::string_view Row(const std::string& rows, int64_t token, int64_t head) const;
};
// A capture of tests/data/sample: three layers of a real model.
Sequence SampleSequence(const std::string& kind);
Sequence RandomSequence(const ScriptOptions& options = {});

// Shape, token ids, keys and values of tokens [begin, end). Views the sequence.
CompressJob TokensJob(const Sequence& sequence, int64_t begin, int64_t end);
// Room for `reserve` tokens; default budget 10 %.
CompressJob OpenJob(const Sequence& sequence, int64_t end, int64_t reserve = 0);
CompressJob AppendJob(const Sequence& sequence, const std::string& id, int64_t begin, int64_t end);
// The query `behind` places before the last one, of all layers.
v1::SequenceStep StepOf(const Sequence& sequence, const std::string& id, int64_t behind = 0);
v1::SelectRequest Request(const std::vector<v1::SequenceStep>& steps);

std::vector<int32_t> Int32s(const std::string& bytes);
std::vector<float> Floats(const std::string& bytes);
// Scores per layer and chosen tokens: equal strings are equal answers, bit for bit.
std::string AnswerOf(const v1::SequenceSelection& selection);

// K and V of a whole session as it rests: rows [T, Hkv, D] and scales [T, Hkv] a layer.
struct RestingRows {
  struct Layer {
    std::string keys, values, key_scales, value_scales;
  };
  std::vector<Layer> layers;
};

// Allows shared memory.
ServerConfig SessionConfig();

// A server of its own for a test, and a client of it.
class SessionServer {
 public:
  explicit SessionServer(const ServerConfig& config = SessionConfig(),
                         std::vector<std::unique_ptr<Backend>> backends = {});

  TestServer& server() { return server_; }
  Client& client() { return *client_; }
  std::unique_ptr<Client> AnotherClient() const;

  // Each fails the test where the server says no.
  v1::SessionInfo Open(const CompressJob& job);
  std::string OpenAll(const Sequence& sequence) {
    return Open(OpenJob(sequence, sequence.tokens())).session_id();
  }
  v1::SessionInfo Append(const Sequence& sequence, const std::string& id, int64_t begin,
                         int64_t end);
  v1::SequenceSelection Select(const v1::SequenceStep& step, const std::string& tenant = "");
  v1::SessionInfo Get(const std::string& id);
  int64_t Release(const std::string& id);
  RestingRows Fetch(const std::string& id);

 private:
  TestServer server_;
  std::unique_ptr<Client> client_;
};

v1::GetSessionRequest GetRequest(const std::string& id, const std::string& tenant = "");
v1::ReleaseSessionRequest ReleaseRequest(const std::string& id, const std::string& tenant = "");

}  // namespace dynsplit::e2e

// SPDX-License-Identifier: Apache-2.0
//
// Calibration through the server against an independent fp64 reference (tests/data/README.md).
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "absl/types/span.h"
#include "client/cpp/client.h"
#include "tests/e2e/harness.h"
#include "tests/e2e/sample.h"

namespace dynsplit::e2e {
namespace {

using Json = nlohmann::json;

CompressJob MakeCalibration(const Capture& capture, const Json& golden) {
  CompressJob job = MakeJob(capture, /*values=*/false);
  InputTensor& positions = *job.tensors.emplace(job.tensors.begin() + 1);
  positions.kind = v1::TENSOR_KIND_QUERY_POSITIONS;
  positions.dtype = v1::DTYPE_INT32;
  positions.bytes =
      absl::MakeConstSpan(reinterpret_cast<const std::byte*>(capture.query_positions.data()),
                          capture.query_positions.size() * sizeof(int32_t));
  v1::CalibrationOptions& options = *job.begin.mutable_calibration();
  for (const Json& id : golden["candidates"]) options.add_candidate_token_ids(id.get<int32_t>());
  const Json& given = golden["options"];
  options.set_num_future_queries(given["num_future_queries"].get<int32_t>());
  options.set_overlap_size(given["overlap_size"].get<int32_t>());
  options.set_alpha(given["alpha"].get<double>());
  options.set_min_occurrences(given["min_occurrences"].get<int32_t>());
  options.set_max_occurrences(given["max_occurrences"].get<int32_t>());
  return job;
}

TEST(CalibrateTest, ServerMeasuresWhatTheReferenceDoes) {
  const Capture capture = LoadData("golden/calibration_input.safetensors");
  std::ifstream file(DataPath("golden/calibration_prose.json"));
  const Json golden = Json::parse(file, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(golden.is_object());
  TestServer server;
  const auto client = Client::Connect("unix:" + server.unix_socket());
  ASSERT_TRUE(client.ok()) << client.status();
  const absl::StatusOr<CompressResult> result =
      (*client)->Calibrate(MakeCalibration(capture, golden));
  ASSERT_TRUE(result.ok()) << result.status();

  std::map<int32_t, v1::DelimiterWeight> measured;
  for (const v1::DelimiterWeight& weight : result->end.profile().weights()) {
    if (weight.num_occurrences() > 0) measured[weight.token_id()] = weight;
  }
  // fp32 softmax over at most 379 keys against fp64: 2^-24 per term with random signs.
  constexpr double kTolerance = 2e-5;
  ASSERT_FALSE(golden["weights"].empty());
  for (const Json& expected : golden["weights"]) {
    const auto id = expected["token_id"].get<int32_t>();
    SCOPED_TRACE(id);
    ASSERT_TRUE(measured.contains(id));
    const v1::DelimiterWeight& actual = measured.at(id);
    EXPECT_EQ(actual.num_occurrences(), expected["num_occurrences"].get<int32_t>());
    EXPECT_NEAR(actual.weight(), expected["weight"].get<double>(), kTolerance);
    EXPECT_NEAR(actual.score(), expected["score"].get<double>(), 2 * kTolerance);
  }
  EXPECT_TRUE(server.ReturnsToBaseline());
}

}  // namespace
}  // namespace dynsplit::e2e

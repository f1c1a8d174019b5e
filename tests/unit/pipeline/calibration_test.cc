// SPDX-License-Identifier: Apache-2.0
//
// Calibration against an independent fp64 reference (tests/data/README.md, golden/), and its
// bookkeeping on random layers.
#include "server/pipeline/calibration.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>

#include "server/cpu/cpu_backend.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/numeric.h"

namespace dynsplit {
namespace {

using nlohmann::json;

// A safetensors file in memory.
class TensorFile {
 public:
  explicit TensorFile(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    uint64_t header_size = 0;
    file.read(reinterpret_cast<char*>(&header_size), sizeof(header_size));
    std::string header(header_size, '\0');
    file.read(header.data(), static_cast<std::streamsize>(header_size));
    header_ = json::parse(header);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
  }
  // A copy: the format aligns tensors to their file, not to their elements.
  std::vector<int32_t> Ints(const std::string& name) const {
    const auto [begin, end] = Range(name);
    std::vector<int32_t> values((end - begin) / sizeof(int32_t));
    std::memcpy(values.data(), bytes_.data() + begin, end - begin);
    return values;
  }
  TensorView View(const std::string& name) const {
    const json& shape = header_[name]["shape"];
    EXPECT_EQ(header_[name]["dtype"], "BF16");
    return DenseView(bytes_.data() + Range(name).first, DType::kBFloat16, shape[0].get<int64_t>(),
                     shape[1].get<int32_t>(), shape[2].get<int32_t>());
  }
  bool Has(const std::string& name) const { return header_.contains(name); }

 private:
  std::pair<size_t, size_t> Range(const std::string& name) const {
    const json& offsets = header_[name]["data_offsets"];
    return {offsets[0].get<size_t>(), offsets[1].get<size_t>()};
  }
  json header_;
  std::vector<char> bytes_;
};

DelimiterWeight Weight(int32_t id, float weight, const char* text = "") {
  DelimiterWeight entry;
  entry.token_id = id;
  entry.weight = weight;
  entry.text = text;
  entry.num_occurrences = 99;
  return entry;
}

DelimiterProfile Base(std::vector<DelimiterWeight> weights) {
  return DelimiterProfile::Create("base", "", std::move(weights)).value();
}

class CalibrationTest : public testing::Test {
 protected:
  CalibrationTest() : backend_(CreateCpuBackend({.num_threads = 2}).value()) {
    stream_ = backend_->CreateStream().value();
  }
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Stream> stream_;
};

TEST_F(CalibrationTest, EqualsTheReferenceOnARealCache) {
  const std::string folder = DYNSPLIT_TEST_DATA "/golden/";
  std::ifstream golden_file(folder + "calibration_prose.json");
  ASSERT_TRUE(golden_file.good());
  const json golden = json::parse(golden_file);
  const TensorFile input(folder + "calibration_input.safetensors");

  CalibrationOptions options;
  options.candidates = golden["candidates"].get<std::vector<int32_t>>();
  options.num_future_queries = golden["options"]["num_future_queries"];
  options.overlap_size = golden["options"]["overlap_size"];
  options.alpha = golden["options"]["alpha"];
  options.min_occurrences = golden["options"]["min_occurrences"];
  options.max_occurrences = golden["options"]["max_occurrences"];
  Calibrator calibrator =
      Calibrator::Create(options, Base({}), input.Ints("token_ids"), input.Ints("query_positions"))
          .value();
  for (int layer = 0; input.Has("layers." + std::to_string(layer) + ".key"); ++layer) {
    const std::string prefix = "layers." + std::to_string(layer);
    const TensorView keys = input.View(prefix + ".key");
    const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(keys.head_dim)));
    ASSERT_TRUE(
        calibrator.AddLayer(keys, input.View(prefix + ".query"), scale, *backend_, *stream_).ok());
  }

  const std::vector<Calibrator::Occurrence> occurrences = calibrator.Occurrences();
  ASSERT_EQ(occurrences.size(), golden["occurrences"].size());
  // fp32 softmax over at most 379 keys against fp64: 2^-24 per term with random signs.
  constexpr double kTolerance = 2e-5;
  for (size_t i = 0; i < occurrences.size(); ++i) {
    const json& expected = golden["occurrences"][i];
    EXPECT_EQ(occurrences[i].position, expected["position"].get<int32_t>());
    EXPECT_EQ(occurrences[i].token_id, expected["token_id"].get<int32_t>());
    EXPECT_NEAR(occurrences[i].drop, expected["drop"].get<double>(), kTolerance) << i;
    EXPECT_NEAR(occurrences[i].overlap, expected["overlap"].get<double>(), kTolerance) << i;
    EXPECT_NEAR(occurrences[i].own, expected["own"].get<double>(), kTolerance) << i;
    EXPECT_NEAR(occurrences[i].score, expected["score"].get<double>(), 2 * kTolerance) << i;
    EXPECT_NEAR(occurrences[i].drop + occurrences[i].overlap + occurrences[i].own, 1, kTolerance);
  }
  const DelimiterProfile profile = calibrator.Finish("measured").value();
  ASSERT_EQ(profile.weights().size(), golden["weights"].size());
  for (const json& expected : golden["weights"]) {
    const DelimiterWeight* weight = profile.Find(expected["token_id"].get<int32_t>());
    ASSERT_NE(weight, nullptr);
    EXPECT_EQ(weight->num_occurrences, expected["num_occurrences"].get<int32_t>());
    EXPECT_NEAR(static_cast<double>(weight->weight), expected["weight"].get<double>(), kTolerance);
  }
}

TEST_F(CalibrationTest, SamplesOnlyMeasurableOccurrencesSpreadEvenly) {
  // Delimiter 7 at 0, 10, 20, ..., 90 and at the last position 95.
  std::vector<int32_t> tokens(96, 1);
  for (size_t i = 0; i < 96; i += 10) tokens[i] = 7;
  tokens[95] = 7;  // has no future
  std::vector<int32_t> positions(96);
  std::iota(positions.begin(), positions.end(), 0);
  positions.erase(positions.begin() + 33);  // hides the future of 30

  CalibrationOptions options;
  options.num_future_queries = 8;
  const DelimiterProfile base = Base({Weight(7, 0.5f)});
  Calibrator all = Calibrator::Create(options, base, tokens, positions).value();
  std::vector<int32_t> found;
  for (const auto& occurrence : all.Occurrences()) found.push_back(occurrence.position);
  EXPECT_EQ(found, (std::vector<int32_t>{0, 10, 20, 40, 50, 60, 70, 80, 90}));
  // Eight queries each, five behind 90; rows skip the missing position.
  EXPECT_EQ(all.query_rows().size(), 8u * 8 + 5);
  EXPECT_EQ(all.query_rows().front(), 1);
  EXPECT_EQ(all.query_rows().back(), 94);

  options.max_occurrences = 4;
  found.clear();
  const Calibrator some = Calibrator::Create(options, base, tokens, positions).value();
  for (const auto& occurrence : some.Occurrences()) found.push_back(occurrence.position);
  EXPECT_EQ(found, (std::vector<int32_t>{0, 20, 50, 70}));
}

TEST_F(CalibrationTest, RareTypesKeepTheBaseWeightAndMassesAddUpToOne) {
  std::mt19937_64 random(5);
  std::normal_distribution<float> normal;
  constexpr int32_t kTokens = 200;
  std::vector<int32_t> tokens(kTokens, 1);
  for (const size_t i : {20u, 60u, 100u, 140u, 180u}) tokens[i] = 7;
  tokens[50] = 8;
  std::vector<int32_t> positions(kTokens);
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<float> keys(kTokens * 2 * 16);
  std::vector<float> queries(kTokens * 4 * 16);
  CalibrationOptions options;
  options.overlap_size = 30;
  options.alpha = 0.5;
  options.candidates = {7, 8, 9};
  const DelimiterProfile base = Base({Weight(8, 0.25f, "rare"), Weight(3, 0.75f, "other")});
  Calibrator calibrator = Calibrator::Create(options, base, tokens, positions).value();
  EXPECT_EQ(calibrator.Finish("early").status().code(), absl::StatusCode::kFailedPrecondition);
  for (int layer = 0; layer < 3; ++layer) {
    for (float& value : keys) value = normal(random);
    for (float& value : queries) value = normal(random);
    ASSERT_TRUE(calibrator
                    .AddLayer(DenseView(keys.data(), DType::kFloat32, kTokens, 2, 16),
                              DenseView(queries.data(), DType::kFloat32, kTokens, 4, 16), 0.25f,
                              *backend_, *stream_)
                    .ok());
  }
  double sum = 0;
  int count = 0;
  for (const auto& occurrence : calibrator.Occurrences()) {
    EXPECT_NEAR(occurrence.drop + occurrence.overlap + occurrence.own, 1, 1e-5);
    EXPECT_NEAR(occurrence.score, occurrence.overlap - 0.5 * occurrence.drop, 1e-12);
    EXPECT_EQ(occurrence.drop == 0, occurrence.position < 30) << occurrence.position;
    EXPECT_GT(occurrence.overlap, 0);
    if (occurrence.token_id == 7) {
      sum += occurrence.score;
      ++count;
    }
  }
  ASSERT_EQ(count, 5);
  const DelimiterProfile profile = calibrator.Finish("measured").value();
  ASSERT_EQ(profile.weights().size(), 3u);  // 9 was never seen
  EXPECT_NEAR(static_cast<double>(profile.Find(7)->weight), (sum / 5 + 1) / 2, 1e-6);
  EXPECT_EQ(profile.Find(7)->num_occurrences, 5);
  EXPECT_EQ(profile.Find(8)->weight, 0.25f);
  EXPECT_EQ(profile.Find(8)->text, "rare");
  EXPECT_EQ(profile.Find(8)->num_occurrences, 0);
  EXPECT_EQ(profile.Find(3)->weight, 0.75f);
}

TEST_F(CalibrationTest, RefusesBadOptionsAndPositions) {
  const std::vector<int32_t> tokens(10, 1);
  const auto field = [&](const CalibrationOptions& options, const std::vector<int32_t>& positions) {
    return GetErrorDetails(Calibrator::Create(options, Base({}), tokens, positions).status())
        .subject;
  };
  const auto with = [](auto change) {
    CalibrationOptions options;
    change(options);
    return options;
  };
  EXPECT_EQ(field(with([](auto& o) { o.num_future_queries = 0; }), {}),
            "calibration.num_future_queries");
  EXPECT_EQ(field(with([](auto& o) { o.num_future_queries = 65; }), {}),
            "calibration.num_future_queries");
  EXPECT_EQ(field(with([](auto& o) { o.overlap_size = 0; }), {}), "calibration.overlap_size");
  EXPECT_EQ(field(with([](auto& o) { o.overlap_size = 65537; }), {}), "calibration.overlap_size");
  EXPECT_EQ(field(with([](auto& o) { o.min_occurrences = 0; }), {}), "calibration.min_occurrences");
  EXPECT_EQ(field(with([](auto& o) { o.max_occurrences = 0; }), {}), "calibration.max_occurrences");
  EXPECT_EQ(field(with([](auto& o) { o.alpha = 16.5; }), {}), "calibration.alpha");
  EXPECT_EQ(field(with([](auto& o) { o.alpha = std::numeric_limits<double>::quiet_NaN(); }), {}),
            "calibration.alpha");
  EXPECT_EQ(field(with([](auto& o) {
                    o.candidates = {3, -1};
                  }),
                  {}),
            "calibration.candidate_token_ids[1]");
  EXPECT_EQ(field({}, {0, 0}), "tensors.query_positions[1]");
  EXPECT_EQ(field({}, {-1}), "tensors.query_positions[0]");
  EXPECT_EQ(field({}, {3, 10}), "tensors.query_positions[1]");
}

}  // namespace
}  // namespace dynsplit

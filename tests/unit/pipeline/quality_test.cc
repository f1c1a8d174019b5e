// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/quality.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/pipeline/policy.h"

namespace dynsplit {
namespace {

constexpr QualityPoint kFull = {.kept_ratio = 1, .quality = {}};

// 0.2 -> (0.6, 0.5, 2), 0.6 -> (0.9, 0.1, 0.2), 1 -> nothing lost.
QualityCurve Sample() {
  return *QualityCurve::Create({{0.2, {.mass = 0.6, .error = 0.5, .divergence = 2}},
                                {0.6, {.mass = 0.9, .error = 0.1, .divergence = 0.2}},
                                kFull});
}

constexpr char kPresets[] =
    "# model: M\n"
    "preset,kept_ratio,mass,error,divergence\n"
    "a,0.2,0.6,0.5,2\n"
    "a,1,1,0,0\n";
constexpr char kReceipts[] =
    "figure,value,divergence\n"
    "error,0.5,1\n"
    "error,1,3\n"
    "lost_mass,0.5,4\n";

TEST(QualityCurveTest, LiesOnStraightLinesBetweenPoints) {
  const QualityCurve curve = Sample();
  EXPECT_EQ(curve.At(0.2), curve.points()[0].quality);
  EXPECT_EQ(curve.At(1), Quality());
  const Quality middle = curve.At(0.4);
  EXPECT_NEAR(middle.mass, 0.75, 1e-12);
  EXPECT_NEAR(middle.error, 0.3, 1e-12);
  EXPECT_NEAR(middle.divergence, 1.1, 1e-12);
  EXPECT_EQ(curve.At(0.01), curve.At(0.2)) << "nothing is told of fewer tokens";
}

TEST(QualityCurveTest, KeptRatioForIsTheLeastThatMeetsBothBounds) {
  const QualityCurve curve = Sample();
  EXPECT_EQ(curve.KeptRatioFor(0.1, 0), 0.2);
  EXPECT_NEAR(curve.KeptRatioFor(0.75, 0), 0.4, 1e-12);
  EXPECT_NEAR(curve.KeptRatioFor(0.95, 0), 0.8, 1e-12);
  EXPECT_EQ(curve.KeptRatioFor(1, 0), 1);
  EXPECT_NEAR(curve.KeptRatioFor(0.1, 1.1), 0.4, 1e-12);
  EXPECT_NEAR(curve.KeptRatioFor(0.95, 1.1), 0.8, 1e-12);
  EXPECT_NEAR(curve.KeptRatioFor(0.75, 0.1), 0.8, 1e-12);
  for (double mass = 0; mass <= 1; mass += 0.01) {
    EXPECT_GE(curve.At(curve.KeptRatioFor(mass, 0)).mass, mass - 1e-12);
  }
}

TEST(QualityCurveTest, RefusesWhatIsNotMonotoneOrOutOfRange) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const QualityPoint good = {0.5, {.mass = 0.5, .error = 0.5, .divergence = 0.5}};
  EXPECT_TRUE(QualityCurve::Create({good, kFull}).ok());
  EXPECT_FALSE(QualityCurve::Create({}).ok());
  EXPECT_FALSE(QualityCurve::Create({good}).ok());
  EXPECT_FALSE(QualityCurve::Create({kFull}).ok());
  EXPECT_FALSE(QualityCurve::Create({good, good, kFull}).ok()) << "equal shares";
  EXPECT_FALSE(QualityCurve::Create({good, {1, {.mass = 0.9, .error = 0, .divergence = 0}}}).ok());
  const std::vector<QualityPoint> bad = {
      {0, good.quality},
      {0.5, {.mass = 1.1, .error = 0.5, .divergence = 0.5}},
      {0.5, {.mass = 0.5, .error = -1, .divergence = 0.5}},
      {0.5, {.mass = 0.5, .error = 0.5, .divergence = nan}},
      {0.6, {.mass = 0.4, .error = 0.5, .divergence = 0.5}},  // worse than `good`
      {0.6, {.mass = 0.5, .error = 0.6, .divergence = 0.5}},
      {0.6, {.mass = 0.5, .error = 0.5, .divergence = 0.6}},
  };
  for (const QualityPoint& point : bad) {
    EXPECT_FALSE(QualityCurve::Create({good, point, kFull}).ok()) << point.kept_ratio;
  }
}

TEST(QualityCurveTest, TellsTheLossOfItsOwnReceipts) {
  const QualityCurve curve = Sample();
  const Loss& loss = curve.loss();
  EXPECT_EQ(loss.of_error.Divergence(0), 0);
  EXPECT_NEAR(loss.of_error.Divergence(0.05), 0.1, 1e-12);
  EXPECT_NEAR(loss.of_error.Divergence(0.3), 1.1, 1e-12);
  EXPECT_NEAR(loss.of_lost_mass.Divergence(0.25), 1.1, 1e-12);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_NEAR(loss.Divergence(0.1, 0.3), 1.1, 1e-12) << "the error is nearer to the loss";
  EXPECT_NEAR(loss.Divergence(0.75, nan), 1.1, 1e-12);
  EXPECT_TRUE(std::isnan(loss.Divergence(nan, nan)));
}

TEST(QualityCurveTest, PlateausLeaveALossCurveThatRises) {
  const absl::StatusOr<QualityCurve> curve =
      QualityCurve::Create({{0.1, {.mass = 0.5, .error = 0.5, .divergence = 1}},
                            {0.2, {.mass = 0.5, .error = 0.5, .divergence = 1}},
                            {0.5, {.mass = 0.9, .error = 0.1, .divergence = 0}},
                            kFull});
  ASSERT_TRUE(curve.ok()) << curve.status();
  EXPECT_NEAR(curve->loss().of_error.Divergence(0.25), 0.5, 1e-12);
}

TEST(QualityCurveTest, CorrectionsScaleLossesAndStayMonotone) {
  const QualityCurve curve = Sample();
  EXPECT_EQ(curve.Corrected({}).At(0.4), curve.At(0.4));

  const std::array<QualityCorrection, 1> half = {{{0.5, 0.5, 0.5}}};
  const QualityCurve better = curve.Corrected(half);
  EXPECT_NEAR(better.At(0.2).mass, 0.8, 1e-12);
  EXPECT_NEAR(better.At(0.2).error, 0.25, 1e-12);
  EXPECT_NEAR(better.At(0.2).divergence, curve.loss().of_error.Divergence(0.25), 1e-12);
  EXPECT_LT(better.KeptRatioFor(0.85, 0), curve.KeptRatioFor(0.85, 0));
  EXPECT_EQ(better.At(1), Quality());

  // Better at few tokens, eight times as bad at many: no share may look worse than a smaller one.
  const std::array<QualityCorrection, 2> crossed = {{{0.2, 0.125, 0.125}, {0.6, 8, 8}}};
  const QualityCurve bent = curve.Corrected(crossed);
  for (double ratio = 0.2; ratio < 0.99; ratio += 0.01) {
    EXPECT_LE(bent.At(ratio).mass, bent.At(ratio + 0.01).mass + 1e-12) << ratio;
    EXPECT_GE(bent.At(ratio).error, bent.At(ratio + 0.01).error - 1e-12) << ratio;
    EXPECT_GE(bent.At(ratio).divergence, bent.At(ratio + 0.01).divergence - 1e-12) << ratio;
  }
}

TEST(LossCurveTest, GoesThereAndBack) {
  const absl::StatusOr<LossCurve> curve = LossCurve::Create({{0.5, 1}, {1, 3}});
  ASSERT_TRUE(curve.ok());
  for (const double value : {0.0, 0.2, 0.5, 0.6, 1.0}) {
    EXPECT_NEAR(curve->ValueFor(curve->Divergence(value)), value, 1e-12);
  }
  EXPECT_NEAR(curve->Divergence(0.75), 2, 1e-12);
  EXPECT_EQ(curve->Divergence(7), 3);
  EXPECT_EQ(curve->Divergence(std::numeric_limits<double>::infinity()), 3);
  EXPECT_EQ(curve->Divergence(-1e-9), 0);
  EXPECT_EQ(curve->ValueFor(50), 1);
  EXPECT_FALSE(LossCurve::Create({}).ok());
  EXPECT_FALSE(LossCurve::Create({{0, 1}}).ok());
  EXPECT_FALSE(LossCurve::Create({{0.5, 1}, {0.5, 2}}).ok());
  EXPECT_FALSE(LossCurve::Create({{0.5, 1}, {0.6, 1}}).ok());
}

TEST(QualityTableTest, ReadsBothFiles) {
  const absl::StatusOr<QualityTable> table = QualityTable::Parse(kPresets, kReceipts);
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ(table->model(), "M");
  ASSERT_NE(table->Find("a"), nullptr);
  EXPECT_EQ(table->Find("b"), nullptr);
  EXPECT_EQ(table->LossOf("a").of_error.Divergence(0.5), 2) << "its own curve";
  EXPECT_EQ(table->LossOf("b").of_error.Divergence(0.5), 1) << "that of all methods";
}

TEST(QualityTableTest, NamesTheLineThatIsWrong) {
  const auto problem = [](const std::string& presets, const std::string& receipts) {
    return std::string(QualityTable::Parse(presets, receipts).status().message());
  };
  using testing::HasSubstr;
  EXPECT_THAT(problem("preset,mass\n", kReceipts), HasSubstr("line 1"));
  EXPECT_THAT(problem(absl::StrCat(kPresets, "a,1,1\n"), kReceipts), HasSubstr("line 5"));
  EXPECT_THAT(problem(absl::StrCat(kPresets, "b,1,x,0,0\n"), kReceipts), HasSubstr("'x'"));
  EXPECT_THAT(problem(absl::StrCat(kPresets, "b,0.5,0.5,0.5,0.5\n"), kReceipts), HasSubstr("b"));
  EXPECT_FALSE(problem(kPresets, "figure,value,divergence\nerror,1,1\n").empty());
}

TEST(QualityTableTest, TheBuiltinOneHasEveryPresetThatDropsTokens) {
  const QualityTable& table = QualityTable::Builtin();
  EXPECT_FALSE(table.model().empty());
  for (const auto& [name, curve] : table.presets()) EXPECT_TRUE(FindPreset(name).ok()) << name;
  for (const Preset& preset : Presets()) {
    if (preset.policy.transform == Transform::kIndex) continue;
    const QualityCurve* curve = table.Find(preset.policy.preset);
    ASSERT_NE(curve, nullptr) << preset.policy.preset << ": run tests/eval/curves.py";
    EXPECT_LE(curve->min_kept_ratio(), 0.2) << preset.policy.preset;
  }
}

}  // namespace
}  // namespace dynsplit

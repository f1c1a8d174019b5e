// SPDX-License-Identifier: Apache-2.0
//
// What compression is expected to cost in quality: curves measured by tests/eval, compiled in from
// server/pipeline/quality (tests/eval/curves.py writes those files).
//
//     presets.csv    preset, kept share       -> receipt and true divergence
//     receipts.csv   what a receipt says, whatever the method -> true divergence
//
// Divergence is that of the next token's distribution from the full cache's (Kullback-Leibler),
// nats a token, mean over the tokens of an answer. The curves are of one model: for another they
// are a guess, good to rank and to start from. Receipts of the model's own requests correct them
// (server/runtime/experience.h).
#pragma once

#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace dynsplit {

// Means over heads and layers, as in the receipt of a request.
struct Quality {
  double mass = 1;        // retained attention mass
  double error = 0;       // ||o_kept - o_full|| / ||o_full||
  double divergence = 0;  // nats a token
  bool operator==(const Quality&) const = default;
};

struct QualityPoint {
  double kept_ratio = 1;
  Quality quality;
};

// How much worse than a curve requests turned out around some share.
struct QualityCorrection {
  double kept_ratio = 1;
  double lost_mass_factor = 1;  // 1 - mass is that many times the curve's
  double error_factor = 1;
};

// From what a receipt says to a divergence. Straight lines from (0, 0) through points. Immutable.
class LossCurve {
 public:
  struct Point {
    double value = 0;  // error, or lost mass
    double divergence = 0;
  };
  // Strictly ascending in both; values and divergences > 0; at least one.
  static absl::StatusOr<LossCurve> Create(std::vector<Point> points);

  // Beyond the last point: that of the last point, a lower bound. NaN for NaN.
  double Divergence(double value) const;
  // Largest value whose divergence is at most that: of the last point where all are. Requires:
  // divergence >= 0.
  double ValueFor(double divergence) const;

 private:
  explicit LossCurve(std::vector<Point> points) : points_(std::move(points)) {}

  std::vector<Point> points_;
};

// What a receipt tells of the loss.
struct Loss {
  LossCurve of_error;
  LossCurve of_lost_mass;
  // By the error, else by the mass; NaN where neither was measured.
  double Divergence(double mass, double error) const;
};

// Straight lines through points; more tokens are never worse. Immutable.
class QualityCurve {
 public:
  // Ascending kept ratios in (0, 1]; mass never falls, error and divergence never rise. At least
  // two: the first loses something, the last is 1 and loses nothing.
  static absl::StatusOr<QualityCurve> Create(std::vector<QualityPoint> points);

  // Least share the curve knows of.
  double min_kept_ratio() const { return points_.front().kept_ratio; }
  std::span<const QualityPoint> points() const { return points_; }
  // By the same points: receipts of this preset.
  const Loss& loss() const { return loss_; }
  // Below min_kept_ratio: that of min_kept_ratio.
  Quality At(double kept_ratio) const;
  // Least share from min_kept_ratio on with mass >= min_mass and, unless that is 0, divergence <=
  // max_divergence. Requires: min_mass <= 1, max_divergence >= 0.
  double KeptRatioFor(double min_mass, double max_divergence) const;
  // The curve as requests found it. Corrections have ascending kept ratios; between two the factors
  // lie between theirs, outside they are the nearest one's. Divergence follows the error.
  QualityCurve Corrected(std::span<const QualityCorrection> corrections) const;

 private:
  QualityCurve(std::vector<QualityPoint> points, Loss loss)
      : points_(std::move(points)), loss_(std::move(loss)) {}

  std::vector<QualityPoint> points_;
  Loss loss_;
};

// Immutable.
class QualityTable {
 public:
  static absl::StatusOr<QualityTable> Parse(std::string_view presets_csv,
                                            std::string_view receipts_csv);
  // The one compiled in.
  static const QualityTable& Builtin();

  const std::string& model() const { return model_; }  // whose curves these are
  const std::map<std::string, QualityCurve, std::less<>>& presets() const { return presets_; }
  const QualityCurve* Find(std::string_view preset) const;  // null = not measured
  // Of receipts of that preset, where it was measured: a method that chose tokens by the queries of
  // the receipt looks better on them than one that did not. Of all methods together otherwise.
  const Loss& LossOf(std::string_view preset) const;

 private:
  QualityTable(std::string model, std::map<std::string, QualityCurve, std::less<>> presets,
               Loss loss)
      : model_(std::move(model)), presets_(std::move(presets)), loss_(std::move(loss)) {}

  std::string model_;
  std::map<std::string, QualityCurve, std::less<>> presets_;
  Loss loss_;
};

}  // namespace dynsplit

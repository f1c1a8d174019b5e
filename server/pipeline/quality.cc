// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/quality.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "server/pipeline/embedded_files.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

using View = absl::string_view;  // Debian's Abseil has one of its own

// Share of the way from `low` to `high` at which `value` lies.
double Share(double low, double high, double value) { return (value - low) / (high - low); }

// NaN where a is NaN or b is.
double Between(double a, double b, double share) { return a + (b - a) * share; }

Quality Between(const Quality& a, const Quality& b, double share) {
  return {.mass = Between(a.mass, b.mass, share),
          .error = Between(a.error, b.error, share),
          .divergence = Between(a.divergence, b.divergence, share)};
}

bool InRange(const QualityPoint& point) {
  const Quality& quality = point.quality;
  return point.kept_ratio > 0 && point.kept_ratio <= 1 && quality.mass >= 0 && quality.mass <= 1 &&
         quality.error >= 0 && std::isfinite(quality.error) && quality.divergence >= 0 &&
         std::isfinite(quality.divergence);
}

// Where on the way from a (too bad) to b (good enough) a figure reaches its limit: in [0, 1].
double Crossing(double a, double b, double limit) {
  return a == b ? 0 : std::clamp(Share(a, b, limit), 0.0, 1.0);
}

// -- reading --------------------------------------------------------------------------------------

absl::Status LineError(int line, const std::string& problem) {
  return InvalidField("quality", absl::StrCat("line ", line, ": ", problem));
}

struct Row {
  std::string name;
  std::vector<double> numbers;
};
struct Csv {
  std::string model;  // of the comment "# model: ..."
  std::vector<Row> rows;
};

// A header that must be `header`; then a name and numbers in each line.
absl::StatusOr<Csv> ReadCsv(std::string_view text, View header) {
  constexpr View kModel = "model:";
  Csv csv;
  bool has_header = false;
  int line = 0;
  for (View row : absl::StrSplit(View(text.data(), text.size()), '\n')) {
    ++line;
    row = absl::StripAsciiWhitespace(row);
    if (row.empty()) continue;
    if (row.front() == '#') {
      const View comment = absl::StripAsciiWhitespace(row.substr(1));
      if (comment.rfind(kModel, 0) == 0) {
        csv.model = std::string(absl::StripAsciiWhitespace(comment.substr(kModel.size())));
      }
      continue;
    }
    if (!std::exchange(has_header, true)) {
      if (row != header) return LineError(line, absl::StrCat("must be '", header, "'"));
      continue;
    }
    const std::vector<View> cells = absl::StrSplit(row, ',');
    const size_t num_cells = std::vector<View>(absl::StrSplit(header, ',')).size();
    if (cells.size() != num_cells) {
      return LineError(line, absl::StrCat("has ", cells.size(), " columns; must have ", num_cells));
    }
    Row& added = csv.rows.emplace_back(Row{.name = std::string(cells[0]), .numbers = {}});
    for (size_t i = 1; i < cells.size(); ++i) {
      if (!absl::SimpleAtod(cells[i], &added.numbers.emplace_back())) {
        return LineError(line, absl::StrCat("'", cells[i], "' is no number"));
      }
    }
  }
  return csv;
}

absl::StatusOr<LossCurve> ReadLossCurve(const Csv& csv, const std::string& figure) {
  std::vector<LossCurve::Point> points;
  for (const Row& row : csv.rows) {
    if (row.name == figure) {
      points.push_back({.value = row.numbers[0], .divergence = row.numbers[1]});
    }
  }
  return LossCurve::Create(std::move(points));
}

absl::StatusOr<Loss> MakeLoss(absl::StatusOr<LossCurve> of_error,
                              absl::StatusOr<LossCurve> of_lost_mass) {
  if (!of_error.ok()) return of_error.status();
  if (!of_lost_mass.ok()) return of_lost_mass.status();
  return Loss{*std::move(of_error), *std::move(of_lost_mass)};
}

// -- curves ---------------------------------------------------------------------------------------

// From the full cache on; points that do not rise from those before are left out.
template <typename Figure>
absl::StatusOr<LossCurve> LossBy(std::span<const QualityPoint> points, Figure figure) {
  std::vector<LossCurve::Point> rising;
  LossCurve::Point last;
  for (auto point = points.rbegin(); point != points.rend(); ++point) {
    const LossCurve::Point next = {.value = figure(point->quality),
                                   .divergence = point->quality.divergence};
    if (next.value <= last.value || next.divergence <= last.divergence) continue;
    rising.push_back(next);
    last = next;
  }
  return LossCurve::Create(std::move(rising));
}

QualityCorrection CorrectionAt(std::span<const QualityCorrection> corrections, double kept_ratio) {
  const auto above =
      std::find_if(corrections.begin(), corrections.end(),
                   [&](const QualityCorrection& each) { return each.kept_ratio >= kept_ratio; });
  if (above == corrections.end()) return corrections.back();
  if (above == corrections.begin()) return *above;
  const QualityCorrection& below = *(above - 1);
  const double share = Share(below.kept_ratio, above->kept_ratio, kept_ratio);
  return {.kept_ratio = kept_ratio,
          .lost_mass_factor = Between(below.lost_mass_factor, above->lost_mass_factor, share),
          .error_factor = Between(below.error_factor, above->error_factor, share)};
}

Quality Correct(const Quality& quality, const QualityCorrection& correction,
                const LossCurve& of_error) {
  Quality result;
  result.mass = std::max(0.0, 1 - (1 - quality.mass) * correction.lost_mass_factor);
  result.error = quality.error * correction.error_factor;
  result.divergence = of_error.Divergence(result.error);
  return result;
}

}  // namespace

absl::StatusOr<QualityCurve> QualityCurve::Create(std::vector<QualityPoint> points) {
  constexpr QualityPoint kFull;
  if (points.size() < 2 || points.back().kept_ratio != 1 ||
      points.back().quality != kFull.quality) {
    return InvalidField("quality", "does not end in a point at kept_ratio 1 without loss");
  }
  for (size_t i = 0; i < points.size(); ++i) {
    if (!InRange(points[i])) {
      return InvalidField("quality", absl::StrCat("point ", i, " is out of range"));
    }
    if (i == 0) continue;
    const Quality& before = points[i - 1].quality;
    const Quality& after = points[i].quality;
    if (points[i].kept_ratio <= points[i - 1].kept_ratio || after.mass < before.mass ||
        after.error > before.error || after.divergence > before.divergence) {
      return InvalidField("quality", absl::StrCat("is worse at ", points[i].kept_ratio, " than at ",
                                                  points[i - 1].kept_ratio));
    }
  }
  absl::StatusOr<Loss> loss =
      MakeLoss(LossBy(points, [](const Quality& quality) { return quality.error; }),
               LossBy(points, [](const Quality& quality) { return 1 - quality.mass; }));
  if (!loss.ok()) return loss.status();
  return QualityCurve(std::move(points), *std::move(loss));
}

Quality QualityCurve::At(double kept_ratio) const {
  const auto above = std::upper_bound(
      points_.begin(), points_.end(), kept_ratio,
      [](double ratio, const QualityPoint& point) { return ratio < point.kept_ratio; });
  if (above == points_.begin()) return points_.front().quality;
  if (above == points_.end()) return points_.back().quality;
  const QualityPoint& below = *(above - 1);
  return Between(below.quality, above->quality,
                 Share(below.kept_ratio, above->kept_ratio, kept_ratio));
}

double QualityCurve::KeptRatioFor(double min_mass, double max_divergence) const {
  const auto good = [&](const QualityPoint& point) {
    return point.quality.mass >= min_mass &&
           (max_divergence == 0 || point.quality.divergence <= max_divergence);
  };
  const auto first = std::find_if(points_.begin(), points_.end(), good);
  if (first == points_.begin()) return min_kept_ratio();
  if (first == points_.end()) return 1;
  const QualityPoint& below = *(first - 1);
  const Quality& bad = below.quality;
  double share = 0;
  if (bad.mass < min_mass) share = Crossing(bad.mass, first->quality.mass, min_mass);
  if (max_divergence > 0 && bad.divergence > max_divergence) {
    share = std::max(share, Crossing(bad.divergence, first->quality.divergence, max_divergence));
  }
  return Between(below.kept_ratio, first->kept_ratio, share);
}

QualityCurve QualityCurve::Corrected(std::span<const QualityCorrection> corrections) const {
  if (corrections.empty()) return *this;
  std::vector<double> ratios;
  for (const QualityPoint& point : points_) ratios.push_back(point.kept_ratio);
  for (const QualityCorrection& each : corrections) {
    if (each.kept_ratio > min_kept_ratio() && each.kept_ratio < 1) {
      ratios.push_back(each.kept_ratio);
    }
  }
  std::sort(ratios.begin(), ratios.end());
  ratios.erase(std::unique(ratios.begin(), ratios.end()), ratios.end());
  std::vector<QualityPoint> points;
  points.reserve(ratios.size());
  for (const double ratio : ratios) {
    points.push_back({ratio, Correct(At(ratio), CorrectionAt(corrections, ratio), loss_.of_error)});
  }
  // Where factors differ so much that fewer tokens came out better, the worse figure stands.
  for (size_t i = points.size() - 1; i > 0; --i) {
    const Quality& more = points[i].quality;
    Quality& fewer = points[i - 1].quality;
    fewer.mass = std::min(fewer.mass, more.mass);
    fewer.error = std::max(fewer.error, more.error);
    fewer.divergence = std::max(fewer.divergence, more.divergence);
  }
  // Loses something, ascends and is monotone by construction.
  return *Create(std::move(points));
}

double Loss::Divergence(double mass, double error) const {
  return std::isnan(error) ? of_lost_mass.Divergence(1 - mass) : of_error.Divergence(error);
}

absl::StatusOr<LossCurve> LossCurve::Create(std::vector<Point> points) {
  if (points.empty()) return InvalidField("quality", "has a loss curve without points");
  Point before;
  for (const Point& point : points) {
    if (!(point.value > before.value && point.divergence > before.divergence &&
          std::isfinite(point.value) && std::isfinite(point.divergence))) {
      return InvalidField("quality",
                          absl::StrCat("has a loss curve that does not rise at ", point.value));
    }
    before = point;
  }
  return LossCurve(std::move(points));
}

double LossCurve::Divergence(double value) const {
  if (std::isnan(value)) return value;
  Point below;
  for (const Point& point : points_) {
    if (value < point.value) {
      const double share = Share(below.value, point.value, std::max(value, 0.0));
      return Between(below.divergence, point.divergence, share);
    }
    below = point;
  }
  return below.divergence;
}

double LossCurve::ValueFor(double divergence) const {
  Point below;
  for (const Point& point : points_) {
    if (divergence < point.divergence) {
      const double share = Share(below.divergence, point.divergence, divergence);
      return Between(below.value, point.value, share);
    }
    below = point;
  }
  return below.value;
}

absl::StatusOr<QualityTable> QualityTable::Parse(std::string_view presets_csv,
                                                 std::string_view receipts_csv) {
  const absl::StatusOr<Csv> presets =
      ReadCsv(presets_csv, "preset,kept_ratio,mass,error,divergence");
  if (!presets.ok()) return presets.status();
  std::map<std::string, std::vector<QualityPoint>> points;
  for (const Row& row : presets->rows) {
    points[row.name].push_back(
        {.kept_ratio = row.numbers[0],
         .quality = {
             .mass = row.numbers[1], .error = row.numbers[2], .divergence = row.numbers[3]}});
  }
  std::map<std::string, QualityCurve, std::less<>> curves;
  for (auto& [preset, of_preset] : points) {
    absl::StatusOr<QualityCurve> curve = QualityCurve::Create(std::move(of_preset));
    if (!curve.ok()) return InvalidField(preset, GetErrorDetails(curve.status()).problem);
    curves.emplace(preset, *std::move(curve));
  }
  const absl::StatusOr<Csv> receipts = ReadCsv(receipts_csv, "figure,value,divergence");
  if (!receipts.ok()) return receipts.status();
  absl::StatusOr<Loss> loss =
      MakeLoss(ReadLossCurve(*receipts, "error"), ReadLossCurve(*receipts, "lost_mass"));
  if (!loss.ok()) return loss.status();
  return QualityTable(presets->model, std::move(curves), *std::move(loss));
}

const QualityTable& QualityTable::Builtin() {
  static const auto* const table = [] {
    std::map<std::string_view, std::string_view> files;
    for (const EmbeddedFile& file : EmbeddedQuality()) files[file.name] = file.csv;
    absl::StatusOr<QualityTable> parsed = Parse(files["presets"], files["receipts"]);
    if (!parsed.ok()) {  // a defect of the build, which the unit tests would have shown
      std::fprintf(stderr, "built-in quality curves: %s\n", parsed.status().ToString().c_str());
      std::abort();
    }
    return new QualityTable(*std::move(parsed));
  }();
  return *table;
}

const QualityCurve* QualityTable::Find(std::string_view preset) const {
  const auto found = presets_.find(preset);
  return found == presets_.end() ? nullptr : &found->second;
}

const Loss& QualityTable::LossOf(std::string_view preset) const {
  const QualityCurve* curve = Find(preset);
  return curve == nullptr ? loss_ : curve->loss();
}

}  // namespace dynsplit

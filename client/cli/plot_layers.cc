// SPDX-License-Identifier: Apache-2.0
//
// Charts over the layers: what each kept, and what that cost.
#include <algorithm>
#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli/canvas.h"
#include "client/cli/chart.h"
#include "client/cli/console.h"
#include "client/cli/plots.h"

namespace dynsplit::cli {
namespace {

// One panel of the receipt: a bar for the mean of each layer, a dot for its extreme.
void DrawReceiptPanel(Canvas& canvas, const PlotData& data, Frame frame, const std::string& name,
                      double PlotData::Layer::*mean, double PlotData::Layer::*extreme,
                      const std::string& extreme_name, bool share) {
  for (const PlotData::Layer& layer : data.layers) {
    for (const double value : {layer.*mean, layer.*extreme}) {
      if (!share && std::isfinite(value)) frame.max_value = std::max(frame.max_value, value);
    }
  }
  DrawValueAxis(
      canvas, frame, name,
      [share](double value) {
        return share ? absl::StrFormat("%.0f %%", value * 100) : absl::StrFormat("%.2f", value);
      },
      share);
  const double slot = (frame.right - frame.left) / static_cast<double>(data.layers.size());
  const double bar = std::min(slot * 0.62, 64.0);
  for (size_t i = 0; i < data.layers.size(); ++i) {
    const PlotData::Layer& layer = data.layers[i];
    const double center = frame.left + slot * (static_cast<double>(i) + 0.5);
    if (ShowLabel(i, data.layers.size(), slot, 26)) {
      canvas.Text(layer.label, center, frame.bottom + 18, 11, Font::kSans, kMutedInk,
                  Align::kCenter);
    }
    if (!std::isfinite(layer.*mean)) continue;
    canvas.Rectangle(center - bar / 2, frame.Y(layer.*mean), bar,
                     frame.bottom - frame.Y(layer.*mean), kPaleBlue);
    if (slot > 56) {
      canvas.Text(share ? Percent(layer.*mean) : Decimal(layer.*mean, 3), center, frame.bottom - 8,
                  11, Font::kSansBold, kInk, Align::kCenter);
    }
    if (std::isfinite(layer.*extreme)) {
      canvas.Line(center, frame.Y(layer.*mean), center, frame.Y(layer.*extreme), 1.2, kOrange);
      canvas.Dot(center, frame.Y(layer.*extreme), std::clamp(slot / 6, 1.5, 4.5), kOrange);
    }
  }
  canvas.Text("layer of the model", frame.right, frame.bottom + 36, 11, Font::kSans, kMutedInk,
              Align::kRight);
  double x = frame.left;
  DrawLegendBox(canvas, x, frame.bottom + 36, kPaleBlue, "mean over heads");
  DrawLegendDot(canvas, x, frame.bottom + 36, kOrange, extreme_name);
}

}  // namespace

absl::Status PlotBudget(const PlotData& data, const std::string& path) {
  Canvas canvas(880, 480);
  DrawHeader(canvas, absl::StrCat("Kept tokens by layer, ", data.title), data.subtitle);
  Frame frame = {kMargin + 50, kHeaderHeight + 46, canvas.width() - kMargin, canvas.height() - 66,
                 static_cast<double>(std::max<size_t>(data.tokens.size(), 1))};
  DrawValueAxis(
      canvas, frame, "tokens a KV head",
      [](double value) { return HumanCount(static_cast<int64_t>(value)); }, true);
  const auto num_tokens = static_cast<double>(data.tokens.size());
  canvas.Line(frame.left, frame.top, frame.right, frame.top, 1.2, kFaintInk);
  canvas.Text(absl::StrCat("whole sequence, ", HumanCount(static_cast<int64_t>(num_tokens))),
              frame.right, frame.top - 6, 11, Font::kSans, kMutedInk, Align::kRight);
  const double slot =
      (frame.right - frame.left) / static_cast<double>(std::max<size_t>(data.layers.size(), 1));
  const double bar = std::min(slot * 0.62, 64.0);
  for (size_t i = 0; i < data.layers.size(); ++i) {
    const double center = frame.left + slot * (static_cast<double>(i) + 0.5);
    const auto kept = static_cast<double>(data.layers[i].num_kept);
    canvas.Rectangle(center - bar / 2, frame.Y(kept), bar, frame.bottom - frame.Y(kept), kBlue);
    if (slot > 72) {
      canvas.Text(
          absl::StrCat(HumanCount(data.layers[i].num_kept), "  (", Percent(kept / num_tokens), ")"),
          center, frame.Y(kept) - 7, 11, Font::kSansBold, kInk, Align::kCenter);
    }
    if (ShowLabel(i, data.layers.size(), slot, 26)) {
      canvas.Text(data.layers[i].label, center, frame.bottom + 18, 11, Font::kSans, kMutedInk,
                  Align::kCenter);
    }
  }
  canvas.Text("layer of the model", frame.right, frame.bottom + 38, 11, Font::kSans, kMutedInk,
              Align::kRight);
  return canvas.Save(path);
}

absl::Status PlotReceipt(const PlotData& data, const std::string& path) {
  Canvas canvas(1080, 500);
  DrawHeader(canvas, absl::StrCat("What compression cost, ", data.title), data.subtitle);
  const bool measured =
      std::any_of(data.layers.begin(), data.layers.end(),
                  [](const PlotData::Layer& layer) { return std::isfinite(layer.mass_mean); });
  if (!measured) {
    canvas.Text("not measured: no window queries, or no receipt was asked for", canvas.width() / 2,
                270, 14, Font::kSans, kMutedInk, Align::kCenter);
    return canvas.Save(path);
  }
  const double middle = canvas.width() / 2;
  const double top = kHeaderHeight + 46;
  const double bottom = canvas.height() - 66;
  DrawReceiptPanel(canvas, data, {kMargin + 46, top, middle - 22, bottom, 1},
                   "retained attention mass", &PlotData::Layer::mass_mean,
                   &PlotData::Layer::mass_min, "worst head", true);
  DrawReceiptPanel(canvas, data, {middle + 62, top, canvas.width() - kMargin, bottom, 0.01},
                   "relative error of attention outputs", &PlotData::Layer::error_mean,
                   &PlotData::Layer::error_max, "worst head", false);
  return canvas.Save(path);
}

}  // namespace dynsplit::cli

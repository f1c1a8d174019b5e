// SPDX-License-Identifier: Apache-2.0
#include "client/cli/chart.h"

#include <algorithm>
#include <cmath>

namespace dynsplit::cli {
namespace {

// Text at the left margin, smaller where the page is too narrow for it.
void DrawFitted(Canvas& canvas, const std::string& text, double y, double size, Font font,
                Color color) {
  const double room = canvas.width() - 2 * kMargin;
  const double needed = canvas.TextWidth(text, size, font);
  canvas.Text(text, kMargin, y, needed <= room ? size : size * room / needed, font, color);
}

// A round step that cuts `range` into about five.
double NiceStep(double range) {
  const double raw = std::max(range, 1e-12) / 5;
  const double power = std::pow(10, std::floor(std::log10(raw)));
  for (const double step : {1.0, 2.0, 2.5, 5.0}) {
    if (raw <= step * power) return step * power;
  }
  return 10 * power;
}

}  // namespace

void DrawHeader(Canvas& canvas, const std::string& title, const std::string& subtitle) {
  DrawFitted(canvas, title, 40, 19, Font::kSansBold, kInk);
  DrawFitted(canvas, subtitle, 62, 12, Font::kSans, kMutedInk);
}

void DrawValueAxis(Canvas& canvas, Frame& frame, const std::string& name,
                   const std::function<std::string(double)>& label, bool exact) {
  const double step = NiceStep(frame.max_value);
  if (!exact) frame.max_value = std::ceil(frame.max_value / step - 1e-9) * step;
  for (double value = 0; value <= frame.max_value * (1 + 1e-9); value += step) {
    const double y = frame.Y(value);
    canvas.Line(frame.left, y, frame.right, y, value == 0 ? 1.2 : 0.8,
                value == 0 ? kFaintInk : kRule);
    canvas.Text(label(value), frame.left - 8, y + 4, 11, Font::kSans, kMutedInk, Align::kRight);
  }
  canvas.Text(name, frame.left - 8, frame.top - 16, 11.5, Font::kSansBold, kInk);
}

bool ShowLabel(size_t i, size_t n, double room, double needed) {
  const auto every = static_cast<size_t>(std::max(1.0, std::ceil(needed / std::max(room, 0.01))));
  return i % every == 0 || (i + 1 == n && n % every == 0);
}

void DrawLegendBox(Canvas& canvas, double& x, double y, Color color, const std::string& text) {
  canvas.Rectangle(x, y - 10, 14, 12, color);
  canvas.Text(text, x + 20, y, 11, Font::kSans, kInk);
  x += 20 + canvas.TextWidth(text, 11, Font::kSans) + 24;
}

void DrawLegendDot(Canvas& canvas, double& x, double y, Color color, const std::string& text) {
  canvas.Dot(x + 5, y - 4, 4.5, color);
  canvas.Text(text, x + 16, y, 11, Font::kSans, kInk);
  x += 16 + canvas.TextWidth(text, 11, Font::kSans) + 24;
}

}  // namespace dynsplit::cli

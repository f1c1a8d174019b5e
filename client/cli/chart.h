// SPDX-License-Identifier: Apache-2.0
//
// What the charts share: title, frame with its value axis, labels, legends.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

#include "client/cli/canvas.h"

namespace dynsplit::cli {

inline constexpr double kMargin = 36;
inline constexpr double kHeaderHeight = 84;

// At the top left, smaller where the page is too narrow.
void DrawHeader(Canvas& canvas, const std::string& title, const std::string& subtitle);

struct Frame {
  double left, top, right, bottom;
  double max_value;  // at the top; 0 is at the bottom

  double Y(double value) const { return bottom - value / max_value * (bottom - top); }
};

// Draws grid and labels; rounds max_value up to a whole step unless it is exact.
void DrawValueAxis(Canvas& canvas, Frame& frame, const std::string& name,
                   const std::function<std::string(double)>& label, bool exact);

// Whether the i-th of n labels is shown when `room` points are there for each of them.
bool ShowLabel(size_t i, size_t n, double room, double needed);

// A sign and its meaning at (x, y); moves x behind them.
void DrawLegendBox(Canvas& canvas, double& x, double y, Color color, const std::string& text);
void DrawLegendDot(Canvas& canvas, double& x, double y, Color color, const std::string& text);

}  // namespace dynsplit::cli

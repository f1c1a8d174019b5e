// SPDX-License-Identifier: Apache-2.0
//
// Histogram of block lengths.
#include <algorithm>
#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli/canvas.h"
#include "client/cli/chart.h"
#include "client/cli/plots.h"

namespace dynsplit::cli {

absl::Status PlotBlockLengths(const PlotData& data, const std::string& path) {
  std::vector<int64_t> lengths;
  for (size_t i = 1; i < data.block_starts.size(); ++i) {
    lengths.push_back(int64_t{data.block_starts[i]} - data.block_starts[i - 1]);
  }
  Canvas canvas(880, 480);
  DrawHeader(canvas, absl::StrCat("Block lengths, ", data.title), data.subtitle);
  if (lengths.empty()) {
    canvas.Text("no blocks", canvas.width() / 2, 260, 14, Font::kSans, kMutedInk, Align::kCenter);
    return canvas.Save(path);
  }
  constexpr int64_t kMaxBins = 48;
  const auto [shortest, longest] = std::minmax_element(lengths.begin(), lengths.end());
  const int64_t width = (*longest - *shortest) / kMaxBins + 1;
  const int64_t first = *shortest / width;
  std::vector<int64_t> counts(static_cast<size_t>(*longest / width - first + 1));
  for (const int64_t length : lengths) ++counts[static_cast<size_t>(length / width - first)];
  const double mean =
      static_cast<double>(std::accumulate(lengths.begin(), lengths.end(), int64_t{0})) /
      static_cast<double>(lengths.size());

  Frame frame = {kMargin + 40, kHeaderHeight + 46, canvas.width() - kMargin, canvas.height() - 66,
                 static_cast<double>(*std::max_element(counts.begin(), counts.end()))};
  DrawValueAxis(
      canvas, frame, "blocks", [](double value) { return absl::StrFormat("%g", value); }, false);
  const double slot = (frame.right - frame.left) / static_cast<double>(counts.size());
  for (size_t i = 0; i < counts.size(); ++i) {
    const double x = frame.left + slot * static_cast<double>(i);
    const double y = frame.Y(static_cast<double>(counts[i]));
    const double bar = std::min(slot * 0.84, 72.0);
    canvas.Rectangle(x + (slot - bar) / 2, y, bar, frame.bottom - y, kBlue);
    if (ShowLabel(i, counts.size(), slot, 26)) {
      canvas.Text(absl::StrCat((static_cast<int64_t>(i) + first) * width), x + slot / 2,
                  frame.bottom + 18, 11, Font::kSans, kMutedInk, Align::kCenter);
    }
  }
  const double mean_x =
      frame.left + slot * (mean / static_cast<double>(width) - static_cast<double>(first) + 0.5);
  canvas.Line(mean_x, frame.top - 6, mean_x, frame.bottom, 1.6, kOrange);
  const bool right_half = mean_x > (frame.left + frame.right) / 2;
  canvas.Text(absl::StrFormat("mean %.1f", mean), mean_x + (right_half ? -6 : 6), frame.top - 8,
              11.5, Font::kSansBold, kOrange, right_half ? Align::kRight : Align::kLeft);
  canvas.Text(
      width == 1 ? "tokens in the block" : absl::StrCat("tokens in the block, bins of ", width),
      frame.right, frame.bottom + 38, 11, Font::kSans, kMutedInk, Align::kRight);
  return canvas.Save(path);
}

}  // namespace dynsplit::cli

// SPDX-License-Identifier: Apache-2.0
#include "client/cli/plots.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli/canvas.h"
#include "client/cli/console.h"
#include "client/cli/report.h"
#include "client/cli/request.h"

namespace dynsplit::cli {
namespace {

constexpr double kMargin = 36;
constexpr double kHeaderHeight = 84;

// Text at the left margin, smaller where the page is too narrow for it.
void DrawFitted(Canvas& canvas, const std::string& text, double y, double size, Font font,
                Color color) {
  const double room = canvas.width() - 2 * kMargin;
  const double needed = canvas.TextWidth(text, size, font);
  canvas.Text(text, kMargin, y, needed <= room ? size : size * room / needed, font, color);
}

void DrawHeader(Canvas& canvas, const std::string& title, const std::string& subtitle) {
  DrawFitted(canvas, title, 40, 19, Font::kSansBold, kInk);
  DrawFitted(canvas, subtitle, 62, 12, Font::kSans, kMutedInk);
}

// ---- axes -------------------------------------------------------------------------------------

struct Frame {
  double left, top, right, bottom;
  double max_value;  // at the top; 0 is at the bottom

  double Y(double value) const { return bottom - value / max_value * (bottom - top); }
};

// A round step that cuts `range` into about five.
double NiceStep(double range) {
  const double raw = std::max(range, 1e-12) / 5;
  const double power = std::pow(10, std::floor(std::log10(raw)));
  for (const double step : {1.0, 2.0, 2.5, 5.0}) {
    if (raw <= step * power) return step * power;
  }
  return 10 * power;
}

// Draws grid and labels; rounds max_value up to a whole step unless it is exact.
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

// Whether the i-th of n labels is shown when `room` points are there for each of them.
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

// ---- text -------------------------------------------------------------------------------------

// One character on the grid.
struct Cell {
  std::string glyph;
  size_t token = 0;
  int row = 0, column = 0;
  bool begins_block = false;
};

constexpr int kColumns = 112;
constexpr int kMaxRows = 84;
constexpr int kFirstRows = 52;  // of a text that does not fit; the rest are its last

// Bytes of the UTF-8 character that begins with `lead`; 1 where none does.
size_t CharacterBytes(unsigned char lead) {
  if (lead >= 0xF0 && lead < 0xF8) return 4;
  if (lead >= 0xE0) return lead < 0xF0 ? 3 : 1;
  return lead >= 0xC2 && lead < 0xE0 ? 2 : 1;
}

// What is drawn for the bytes of one character; empty for what has no picture.
std::string Glyph(const std::string& bytes) {
  const auto lead = static_cast<unsigned char>(bytes[0]);
  if (bytes.size() == 1) return lead < 0x20 || lead >= 0x7F ? "·" : bytes;
  for (size_t i = 1; i < bytes.size(); ++i) {
    if ((static_cast<unsigned char>(bytes[i]) & 0xC0) != 0x80) return "·";
  }
  return bytes;
}

// All characters with the token that their first byte belongs to.
std::vector<Cell> Characters(const PlotData& data) {
  std::string text;
  std::vector<size_t> token_of;
  for (size_t t = 0; t < data.tokens.size(); ++t) {
    text += data.tokens[t];
    token_of.insert(token_of.end(), data.tokens[t].size(), t);
  }
  std::vector<Cell> cells;
  for (size_t at = 0; at < text.size();) {
    const size_t size =
        std::min(CharacterBytes(static_cast<unsigned char>(text[at])), text.size() - at);
    Cell& cell = cells.emplace_back();
    cell.glyph = text.substr(at, size);
    cell.token = token_of[at];
    at += size;
  }
  return cells;
}

// Places characters on rows: wraps between words where it can, else anywhere. Returns the rows
// used.
int Wrap(std::vector<Cell>& cells) {
  int row = 0;
  int column = 0;
  size_t word = 0;  // first cell of the current word
  for (size_t i = 0; i < cells.size(); ++i) {
    if (column >= kColumns) {
      ++row;
      column = 0;
      if (word > 0 && cells[word].row == row - 1 && cells[word].column > kColumns / 2) {
        for (size_t j = word; j < i; ++j) {
          cells[j].row = row;
          cells[j].column = column++;
        }
      }
    }
    cells[i].row = row;
    cells[i].column = column++;
    const std::string& glyph = cells[i].glyph;
    if (glyph == "\n") {
      ++row;
      column = 0;
    } else if (glyph == "\t") {
      column = std::min((column + 3) / 4 * 4, kColumns);
    }
    if (glyph == " " || glyph == "\n" || glyph == "\t") word = i + 1;
  }
  return row + 1;
}

void MarkBlocks(const PlotData& data, std::vector<Cell>& cells) {
  std::vector<bool> begins(data.tokens.size() + 1);
  for (const int32_t start : data.block_starts) begins[static_cast<size_t>(start)] = true;
  for (size_t i = 0; i < cells.size(); ++i) {
    // A token without a character of its own hands its boundary to the next.
    const size_t previous = i == 0 ? 0 : cells[i - 1].token + 1;
    for (size_t t = previous; t <= cells[i].token; ++t) {
      cells[i].begins_block = cells[i].begins_block || begins[t];
    }
  }
}

void DrawTextLegend(Canvas& canvas, double y) {
  double x = kMargin;
  DrawLegendBox(canvas, x, y, {kBlue.red, kBlue.green, kBlue.blue, 0.36}, "kept in every set");
  DrawLegendBox(canvas, x, y, {kBlue.red, kBlue.green, kBlue.blue, 0.14},
                "kept in some (layer, head) sets");
  canvas.Text("text", x, y, 12, Font::kMono, kFaintInk);
  canvas.Text("dropped everywhere", x + 38, y, 11, Font::kSans, kInk);
  x += 38 + canvas.TextWidth("dropped everywhere", 11, Font::kSans) + 24;
  canvas.Line(x + 2, y - 11, x + 2, y + 3, 1.4, kOrange);
  canvas.Text("block boundary", x + 10, y, 11, Font::kSans, kInk);
}

// Row on the page of a row of the text; nothing where it is left out.
std::optional<int> PageRow(int row, int num_rows) {
  if (num_rows <= kMaxRows || row < kFirstRows) return row;
  const int from_end = num_rows - row;  // 1 for the last
  const int last_rows = kMaxRows - kFirstRows - 1;
  if (from_end > last_rows) return std::nullopt;
  return kMaxRows - from_end;
}

void DrawCell(Canvas& canvas, const Cell& cell, double share, double x, double y) {
  constexpr double kCellWidth = 7.83;
  constexpr double kRowHeight = 18;
  const bool line_break = cell.glyph == "\n";
  if (share > 0 && !line_break) {
    const double alpha = share >= 1 ? 0.36 : 0.08 + 0.20 * share;
    // A hair wider than the cell: no seams between neighbours.
    canvas.Rectangle(x, y - 13, kCellWidth + 0.1, kRowHeight - 0.6,
                     {kBlue.red, kBlue.green, kBlue.blue, alpha});
  }
  if (cell.begins_block) canvas.Line(x, y - 13.5, x, y + 4.5, 1.3, kOrange);
  const std::string glyph = line_break ? "↵" : Glyph(cell.glyph);
  if (cell.glyph == " " || cell.glyph == "\t") return;
  const Color ink = line_break ? kRule : share > 0 ? kInk : kFaintInk;
  canvas.Text(glyph, x, y, 13, Font::kMono, ink);
}

// ---- layers -----------------------------------------------------------------------------------

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

const v1::LayerReceipt* FindReceipt(const v1::Receipt& receipt, int32_t layer) {
  for (const v1::LayerReceipt& candidate : receipt.layers()) {
    if (candidate.layer() == layer) return &candidate;
  }
  return nullptr;
}

// Adds one to `counts` for each set of the layer that keeps the token; returns the number of sets.
int64_t CountKept(const LayerOutput& layer, std::vector<int64_t>& counts) {
  const OutputTensor* kept = FindTensor(layer.tensors, v1::TENSOR_KIND_KEPT_TOKENS);
  const int64_t num_groups = std::max(layer.result.plan().num_groups(), 1);
  if (kept == nullptr) {
    // Dense layers keep all, whether or not they say so.
    if (!layer.result.plan().dense()) return 0;
    for (int64_t& count : counts) count += num_groups;
    return num_groups;
  }
  for (const int32_t token : Int32Values(*kept)) {
    if (token >= 0 && std::cmp_less(token, counts.size())) ++counts[static_cast<size_t>(token)];
  }
  return num_groups;
}

}  // namespace

PlotData MakePlotData(const Capture& capture, const CompressResult& result) {
  PlotData data;
  const v1::Plan& plan = result.end.plan();
  data.title = capture.text_kind;
  if (!capture.text_title.empty()) {
    absl::StrAppend(&data.title, data.title.empty() ? "" : ": ", capture.text_title);
  }
  for (int64_t t = 0; t < capture.shape.num_tokens(); ++t) {
    data.tokens.emplace_back(capture.token_text(t));
  }
  std::vector<int64_t> counts(data.tokens.size());
  int64_t num_sets = 0;
  for (const LayerOutput& layer : result.layers) num_sets += CountKept(layer, counts);
  for (const int64_t count : counts) {
    data.kept_share.push_back(
        num_sets == 0 ? 0 : static_cast<double>(count) / static_cast<double>(num_sets));
  }
  if (const OutputTensor* starts =
          FindTensor(result.sequence_tensors, v1::TENSOR_KIND_BLOCK_STARTS)) {
    data.block_starts = Int32Values(*starts);
  }
  const auto beyond = [&data](int32_t start) {
    return start < 0 || std::cmp_greater(start, data.tokens.size());
  };
  std::erase_if(data.block_starts, beyond);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const v1::LayerPlan& decided : plan.layers()) {
    PlotData::Layer& layer = data.layers.emplace_back();
    const auto index = static_cast<size_t>(decided.layer());
    layer.label = absl::StrCat(index < capture.layers.size() ? capture.layers[index].model_layer
                                                             : decided.layer());
    layer.num_kept = decided.num_kept_tokens();
    const v1::LayerReceipt* receipt = FindReceipt(result.end.receipt(), decided.layer());
    layer.mass_mean = receipt == nullptr ? nan : receipt->retained_attention_mass_mean();
    layer.mass_min = receipt == nullptr ? nan : receipt->retained_attention_mass_min();
    layer.error_mean = receipt == nullptr ? nan : receipt->output_relative_error_mean();
    layer.error_max = receipt == nullptr ? nan : receipt->output_relative_error_max();
    data.kept_ratio += static_cast<double>(layer.num_kept) /
                       static_cast<double>(data.tokens.size()) / plan.layers_size();
  }
  data.subtitle =
      absl::StrCat(capture.model, "  ·  ", DescribePolicy(plan.policy()), "  ·  kept ",
                   Percent(data.kept_ratio), " of ", HumanCount(capture.shape.num_tokens()),
                   " tokens, ", HumanCount(plan.num_blocks()), " blocks");
  return data;
}

absl::Status PlotText(const PlotData& data, const std::string& path) {
  constexpr double kRowHeight = 18;
  constexpr double kCellWidth = 7.83;
  std::vector<Cell> cells = Characters(data);
  const int num_rows = Wrap(cells);
  MarkBlocks(data, cells);
  const int page_rows = std::min(num_rows, kMaxRows);
  const double top = kHeaderHeight + 44;
  Canvas canvas(2 * kMargin + kColumns * kCellWidth, top + page_rows * kRowHeight + 30);
  DrawHeader(canvas, data.title, data.subtitle);
  DrawTextLegend(canvas, kHeaderHeight + 10);
  for (const Cell& cell : cells) {
    const std::optional<int> row = PageRow(cell.row, num_rows);
    if (!row.has_value()) continue;
    DrawCell(canvas, cell, data.kept_share[cell.token], kMargin + cell.column * kCellWidth,
             top + *row * kRowHeight + 13);
  }
  if (num_rows > kMaxRows) {
    const double y = top + kFirstRows * kRowHeight + 13;
    canvas.Text(absl::StrFormat("···  %d lines of %d are not shown  ···", num_rows - kMaxRows + 1,
                                num_rows),
                canvas.width() / 2, y, 12, Font::kSansBold, kMutedInk, Align::kCenter);
  }
  return canvas.Save(path);
}

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

absl::Status PlotAll(const PlotData& data, const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot make folder ", folder, ": ", error.message()));
  }
  absl::Status status = PlotText(data, folder + "/text.png");
  status.Update(PlotBlockLengths(data, folder + "/block_lengths.png"));
  status.Update(PlotBudget(data, folder + "/budget.png"));
  status.Update(PlotReceipt(data, folder + "/receipt.png"));
  return status;
}

}  // namespace dynsplit::cli

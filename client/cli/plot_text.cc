// SPDX-License-Identifier: Apache-2.0
//
// The text itself: what was cut where, and what stayed.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "client/cli/canvas.h"
#include "client/cli/chart.h"
#include "client/cli/plots.h"

namespace dynsplit::cli {
namespace {

// One character on the grid.
struct Cell {
  std::string glyph;
  size_t token = 0;
  int row = 0, column = 0;
  bool begins_block = false;
};

constexpr double kCellWidth = 7.83;
constexpr double kRowHeight = 18;
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

}  // namespace

absl::Status PlotText(const PlotData& data, const std::string& path) {
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

}  // namespace dynsplit::cli

// SPDX-License-Identifier: Apache-2.0
#include "client/cli/console.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <iostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "proto/wire/status.h"

namespace dynsplit::cli {
namespace {

// Columns that text takes on a terminal, for the texts of this program.
size_t Width(const std::string& text) {
  return static_cast<size_t>(std::count_if(
      text.begin(), text.end(), [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; }));
}

}  // namespace

std::string HumanBytes(double bytes) {
  static constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (std::abs(bytes) >= 1024 && unit + 1 < kUnits.size()) {
    bytes /= 1024;
    ++unit;
  }
  return unit == 0 ? absl::StrFormat("%.0f B", bytes)
                   : absl::StrFormat("%.*f %s", bytes < 100 ? 1 : 0, bytes, kUnits.at(unit));
}

std::string HumanCount(int64_t count) {
  const std::string digits = absl::StrCat(count);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    const bool after_digit = i > 0 && digits[i - 1] != '-';
    if (after_digit && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

std::string HumanDuration(absl::Duration duration) {
  const double seconds = absl::ToDoubleSeconds(duration);
  if (seconds < 1e-3) return absl::StrFormat("%.0f µs", seconds * 1e6);
  if (seconds < 1) return absl::StrFormat("%.1f ms", seconds * 1e3);
  if (seconds < 120) return absl::StrFormat("%.2f s", seconds);
  return absl::StrFormat("%.1f min", seconds / 60);
}

std::string Percent(double share) {
  return std::isfinite(share) ? absl::StrFormat("%.1f %%", share * 100) : "-";
}

std::string Decimal(double value, int digits) {
  return std::isfinite(value) ? absl::StrFormat("%.*f", digits, value) : "-";
}

std::string Table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], Width(row[i]));
  }
  std::string text;
  for (size_t r = 0; r < rows.size(); ++r) {
    std::string line;
    for (size_t i = 0; i < rows[r].size(); ++i) {
      const std::string padding(widths[i] - Width(rows[r][i]), ' ');
      absl::StrAppend(&line, i == 0 ? "" : "  ");
      absl::StrAppend(&line, i == 0 ? rows[r][i] + padding : padding + rows[r][i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    absl::StrAppend(&text, line, "\n");
    if (r > 0) continue;
    for (size_t i = 0; i < widths.size(); ++i) {
      absl::StrAppend(&text, i == 0 ? "" : "  ", std::string(widths[i], '-'));
    }
    absl::StrAppend(&text, "\n");
  }
  return text;
}

int PrintError(const absl::Status& status) {
  const wire::RichError error = wire::ReadError(status);
  std::cerr << "error: " << absl::StatusCodeToString(error.code) << ": " << error.message << "\n";
  for (const auto& violation : error.fields) {
    std::cerr << "  field " << violation.field << ": " << violation.description << "\n";
  }
  for (const auto& violation : error.preconditions) {
    std::cerr << "  " << violation.type << " " << violation.subject << ": " << violation.description
              << "\n";
  }
  for (const auto& violation : error.quotas) {
    std::cerr << "  quota " << violation.subject << ": " << violation.description << "\n";
  }
  if (!error.resource_name.empty()) {
    std::cerr << "  " << error.resource_type << " '" << error.resource_name << "'\n";
  }
  if (!error.reason.empty()) std::cerr << "  reason " << error.reason << "\n";
  if (error.retry_after_ms.has_value()) {
    std::cerr << "  try again in " << HumanDuration(absl::Milliseconds(*error.retry_after_ms))
              << "\n";
  }
  return kExitFailed;
}

ProgressBar::ProgressBar(bool enabled)
    : enabled_(enabled && isatty(STDERR_FILENO) != 0),
      start_(absl::Now()),
      shown_(absl::InfinitePast()) {}

ProgressBar::~ProgressBar() {
  if (visible_) std::cerr << "\r\033[K" << std::flush;
}

void ProgressBar::Show(const Progress& progress, int32_t num_layers) {
  constexpr absl::Duration kInterval = absl::Milliseconds(50);
  constexpr int kCells = 24;
  const absl::Time now = absl::Now();
  if (!enabled_ || now - shown_ < kInterval) return;
  shown_ = now;
  visible_ = true;
  const double total = static_cast<double>(std::max<int64_t>(progress.total_bytes, 1));
  const double sent = static_cast<double>(progress.sent_bytes);
  const int full = static_cast<int>(sent / total * kCells);
  std::string cells;
  for (int i = 0; i < kCells; ++i) cells += i < full ? "█" : "░";
  std::cerr << absl::StrFormat("\r\033[K%s %3.0f %%  %s of %s  %s/s  layer %d of %d", cells,
                               sent / total * 100, HumanBytes(sent), HumanBytes(total),
                               HumanBytes(sent / absl::ToDoubleSeconds(now - start_)),
                               progress.received_layers, num_layers)
            << std::flush;
}

}  // namespace dynsplit::cli

// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "server/pipeline/embedded_files.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/segmentation.h"

namespace dynsplit {
namespace {

constexpr size_t kMaxNameLength = 64;
// Ids beyond are looked up by binary search: an id of 2^31 - 1 must not cost gigabytes.
constexpr int32_t kDenseIds = 1 << 20;

// Debian's Abseil has a string_view of its own; parsing below speaks it.
using View = absl::string_view;

bool IsProfileName(std::string_view name) {
  return !name.empty() && name.size() <= kMaxNameLength &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return absl::ascii_islower(static_cast<unsigned char>(c)) ||
                  absl::ascii_isdigit(static_cast<unsigned char>(c)) || c == '_' || c == '.' ||
                  c == '-';
         });
}

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::optional<std::string> UnescapeText(View escaped) {
  std::string text;
  for (size_t i = 0; i < escaped.size(); ++i) {
    if (escaped[i] != '\\') {
      text.push_back(escaped[i]);
      continue;
    }
    if (++i == escaped.size()) return std::nullopt;
    switch (escaped[i]) {
      case 'n':
        text.push_back('\n');
        break;
      case 'r':
        text.push_back('\r');
        break;
      case 't':
        text.push_back('\t');
        break;
      case '\\':
        text.push_back('\\');
        break;
      case 'x': {
        if (escaped.size() - i < 3) return std::nullopt;
        const int high = HexDigit(escaped[i + 1]);
        const int low = HexDigit(escaped[i + 2]);
        if (high < 0 || low < 0) return std::nullopt;
        text.push_back(static_cast<char>(high * 16 + low));
        i += 2;
        break;
      }
      default:
        return std::nullopt;
    }
  }
  return text;
}

// Indices of the columns we read; -1 = absent.
struct Columns {
  int token_id = -1;
  int text = -1;
  int weight = -1;
  int occurrences = -1;
  int sentence_end = -1;
  size_t count = 0;
};

absl::Status LineError(int line, const std::string& problem) {
  return InvalidField("profile", absl::StrCat("line ", line, ": ", problem));
}

absl::StatusOr<Columns> ParseHeader(View row, int line) {
  Columns columns;
  for (const View name : absl::StrSplit(row, ',')) {
    const int index = static_cast<int>(columns.count++);
    if (name == "token_id") columns.token_id = index;
    if (name == "text_escaped") columns.text = index;
    if (name == "weight") columns.weight = index;
    if (name == "occurrences") columns.occurrences = index;
    if (name == "sentence_end") columns.sentence_end = index;
  }
  if (columns.token_id < 0 || columns.weight < 0) {
    return LineError(line, "the header must name token_id and weight");
  }
  return columns;
}

absl::StatusOr<DelimiterWeight> ParseRow(View row, const Columns& columns, int line) {
  const std::vector<View> cells = absl::StrSplit(row, ',');
  if (cells.size() != columns.count) {
    return LineError(
        line, absl::StrCat("has ", cells.size(), " columns; the header has ", columns.count));
  }
  const auto cell = [&cells](int column) {
    return column < 0 ? View() : cells[static_cast<size_t>(column)];
  };
  DelimiterWeight weight;
  if (!absl::SimpleAtoi(cell(columns.token_id), &weight.token_id)) {
    return LineError(line, "token_id is no 32-bit integer");
  }
  if (!absl::SimpleAtof(cell(columns.weight), &weight.weight)) {
    return LineError(line, "weight is no number");
  }
  if (const View occurrences = cell(columns.occurrences);
      !occurrences.empty() && !absl::SimpleAtoi(occurrences, &weight.num_occurrences)) {
    return LineError(line, "occurrences is no 32-bit integer");
  }
  if (const View sentence_end = cell(columns.sentence_end);
      !sentence_end.empty() && !absl::SimpleAtob(sentence_end, &weight.sentence_end)) {
    return LineError(line, "sentence_end is neither 0 nor 1");
  }
  std::optional<std::string> text = UnescapeText(cell(columns.text));
  if (!text.has_value()) return LineError(line, "text_escaped has an unknown escape");
  weight.text = *std::move(text);
  return weight;
}

}  // namespace

absl::StatusOr<DelimiterProfile> DelimiterProfile::Create(std::string name, std::string description,
                                                          std::vector<DelimiterWeight> weights) {
  if (!IsProfileName(name)) {
    return InvalidField("profile.name",
                        "is no profile name; must be 1 to 64 characters of [a-z0-9_.-]");
  }
  if (weights.size() > kMaxDelimiters) {
    return InvalidField("profile.weights",
                        absl::StrCat("has ", weights.size(), " entries; at most ", kMaxDelimiters));
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string field = absl::StrCat("profile.weights[", i, "]");
    if (weights[i].token_id < 0) {
      return InvalidField(field + ".token_id",
                          absl::StrCat("is ", weights[i].token_id, "; must not be negative"));
    }
    if (!(weights[i].weight >= 0 && weights[i].weight <= 1)) {  // refuses NaN as well
      return InvalidField(field + ".weight",
                          absl::StrCat("is ", weights[i].weight, "; must be in [0, 1]"));
    }
    if (weights[i].num_occurrences < 0) {
      return InvalidField(
          field + ".num_occurrences",
          absl::StrCat("is ", weights[i].num_occurrences, "; must not be negative"));
    }
  }
  const auto by_id = [](const DelimiterWeight& a, const DelimiterWeight& b) {
    return a.token_id < b.token_id;
  };
  std::sort(weights.begin(), weights.end(), by_id);
  const auto duplicate = std::adjacent_find(
      weights.begin(), weights.end(),
      [](const DelimiterWeight& a, const DelimiterWeight& b) { return a.token_id == b.token_id; });
  if (duplicate != weights.end()) {
    return InvalidField("profile.weights",
                        absl::StrCat("names token id ", duplicate->token_id, " twice"));
  }

  DelimiterProfile profile;
  profile.name_ = std::move(name);
  profile.description_ = std::move(description);
  profile.weights_ = std::move(weights);
  for (size_t row = 0; row < profile.weights_.size(); ++row) {
    const int32_t id = profile.weights_[row].token_id;
    if (id >= kDenseIds) break;
    profile.dense_.resize(static_cast<size_t>(id) + 1, 0);
    profile.dense_.back() = static_cast<uint16_t>(row + 1);
  }
  const bool has_sparse_ids =
      !profile.weights_.empty() && profile.weights_.back().token_id >= kDenseIds;
  if (!has_sparse_ids) {
    profile.weight_table_.assign(profile.dense_.size(), kNoDelimiter);
    for (const DelimiterWeight& weight : profile.weights_) {
      profile.weight_table_[static_cast<size_t>(weight.token_id)] = weight.weight;
    }
  }
  return profile;
}

const DelimiterWeight* DelimiterProfile::FindSparse(int32_t token_id) const {
  const auto found = std::lower_bound(
      weights_.begin(), weights_.end(), token_id,
      [](const DelimiterWeight& weight, int32_t id) { return weight.token_id < id; });
  return found != weights_.end() && found->token_id == token_id ? &*found : nullptr;
}

absl::StatusOr<DelimiterProfile> DelimiterProfile::FromCsv(std::string name, std::string_view csv) {
  std::string description;
  std::optional<Columns> columns;
  std::vector<DelimiterWeight> weights;
  int line = 0;
  for (View row : absl::StrSplit(View(csv.data(), csv.size()), '\n')) {
    ++line;
    if (!row.empty() && row.back() == '\r') row.remove_suffix(1);
    if (row.empty()) continue;
    if (row.front() == '#') {
      const View comment = absl::StripAsciiWhitespace(row.substr(1));
      if (comment.rfind("SPDX-License-Identifier:", 0) == 0) continue;
      absl::StrAppend(&description, description.empty() ? "" : "\n", comment);
      continue;
    }
    if (!columns.has_value()) {
      const absl::StatusOr<Columns> header = ParseHeader(row, line);
      if (!header.ok()) return header.status();
      columns = *header;
      continue;
    }
    absl::StatusOr<DelimiterWeight> weight = ParseRow(row, *columns, line);
    if (!weight.ok()) return weight.status();
    weights.push_back(*std::move(weight));
  }
  if (!columns.has_value()) return InvalidField("profile", "has no header line");
  return Create(std::move(name), std::move(description), std::move(weights));
}

std::span<const DelimiterProfile> BuiltinProfiles() {
  static const auto* const profiles = [] {
    auto* parsed = new std::vector<DelimiterProfile>;
    for (const EmbeddedFile& embedded : EmbeddedProfiles()) {
      absl::StatusOr<DelimiterProfile> profile =
          DelimiterProfile::FromCsv(std::string(embedded.name), embedded.csv);
      if (!profile.ok()) {  // a defect of the build, which the unit tests would have shown
        std::fprintf(stderr, "built-in delimiter profile: %s\n",
                     profile.status().ToString().c_str());
        std::abort();
      }
      parsed->push_back(*std::move(profile));
    }
    return parsed;
  }();
  return *profiles;
}

}  // namespace dynsplit

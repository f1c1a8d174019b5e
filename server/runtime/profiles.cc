// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/profiles.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

namespace fs = std::filesystem;

// Everything that could break a row becomes \xNN.
std::string EscapeText(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f || c == '\\' || c == ',' || c == '"') {
      absl::StrAppendFormat(&escaped, "\\x%02x", byte);
    } else {
      escaped.push_back(c);
    }
  }
  return escaped;
}

// The form that DelimiterProfile::FromCsv reads.
std::string ToCsv(const DelimiterProfile& profile) {
  std::string csv = "# SPDX-License-Identifier: Apache-2.0\n";
  for (const absl::string_view line : absl::StrSplit(profile.description(), '\n')) {
    if (!line.empty()) absl::StrAppend(&csv, "# ", line, "\n");
  }
  absl::StrAppend(&csv, "token_id,text_escaped,weight,occurrences,sentence_end\n");
  for (const DelimiterWeight& weight : profile.weights()) {
    absl::StrAppendFormat(&csv, "%d,%s,%.9g,%d,%d\n", weight.token_id, EscapeText(weight.text),
                          weight.weight, weight.num_occurrences, weight.sentence_end ? 1 : 0);
  }
  return csv;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ProfileStore>> ProfileStore::Create(Options options) {
  std::unique_ptr<ProfileStore> store(new ProfileStore(std::move(options)));
  if (absl::Status status = store->Load(); !status.ok()) return status;
  return store;
}

absl::Status ProfileStore::Load() {
  absl::MutexLock lock(&mu_);
  for (const DelimiterProfile& profile : BuiltinProfiles()) {
    entries_.emplace(profile.name(),
                     Entry{std::make_shared<const DelimiterProfile>(profile), /*builtin=*/true});
  }
  if (!options_.directory.empty()) {
    std::error_code error;
    fs::directory_iterator files(options_.directory, error);
    if (error) {
      return absl::InvalidArgumentError(absl::StrCat("option profile-directory is '",
                                                     options_.directory, "': ", error.message()));
    }
    for (const fs::directory_entry& file : files) {
      if (file.path().extension() != ".csv") continue;
      std::ifstream stream(file.path(), std::ios::binary);
      std::ostringstream content;
      content << stream.rdbuf();
      absl::StatusOr<DelimiterProfile> profile =
          DelimiterProfile::FromCsv(file.path().stem().string(), content.str());
      if (!profile.ok()) {
        return absl::InvalidArgumentError(absl::StrCat("delimiter profile '", file.path().string(),
                                                       "': ", profile.status().message()));
      }
      const std::string name = profile->name();
      entries_.emplace(name, Entry{std::make_shared<const DelimiterProfile>(*std::move(profile)),
                                   /*builtin=*/false});
    }
  }
  if (!options_.default_name.empty() && !entries_.contains(options_.default_name)) {
    return absl::InvalidArgumentError(absl::StrCat("option default-profile is '",
                                                   options_.default_name,
                                                   "'; there is no such delimiter profile"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const DelimiterProfile>> ProfileStore::Find(
    std::string_view name) const {
  absl::MutexLock lock(&mu_);
  const auto found = entries_.find(name.empty() ? std::string_view(options_.default_name) : name);
  if (found == entries_.end()) return NotFound("profile", name);
  return found->second.profile;
}

std::vector<ProfileStore::Entry> ProfileStore::List() const {
  absl::MutexLock lock(&mu_);
  std::vector<Entry> entries;
  for (const auto& [name, entry] : entries_) entries.push_back(entry);
  return entries;
}

absl::StatusOr<ProfileStore::PutResult> ProfileStore::Put(DelimiterProfile profile, bool replace) {
  absl::MutexLock lock(&mu_);
  const auto found = entries_.find(profile.name());
  PutResult result;
  result.replaced = found != entries_.end();
  if (result.replaced && (found->second.builtin || !replace)) {
    return absl::AlreadyExistsError(
        absl::StrCat("profile '", profile.name(), "' exists",
                     found->second.builtin ? " and is built in" : "; set replace to replace it"));
  }
  const auto num_stored = std::count_if(entries_.begin(), entries_.end(),
                                        [](const auto& entry) { return !entry.second.builtin; });
  if (!result.replaced && num_stored >= options_.max_stored) {
    return absl::ResourceExhaustedError(absl::StrCat(
        num_stored, " profiles are stored; the server keeps at most ", options_.max_stored));
  }
  if (!options_.directory.empty()) {
    if (absl::Status status = Save(profile); !status.ok()) return status;
    result.persisted = true;
  }
  const std::string name = profile.name();
  entries_.insert_or_assign(
      name, Entry{std::make_shared<const DelimiterProfile>(std::move(profile)), false});
  return result;
}

absl::Status ProfileStore::Save(const DelimiterProfile& profile) const {
  // The name has no '/' (DelimiterProfile::Create), so it stays in the directory. Written aside and
  // renamed, so that a crash leaves the old file or the new one.
  const fs::path path = fs::path(options_.directory) / (profile.name() + ".csv");
  const fs::path aside = fs::path(options_.directory) / ("." + profile.name() + ".new");
  std::ofstream stream(aside, std::ios::binary | std::ios::trunc);
  stream << ToCsv(profile);
  stream.close();
  std::error_code error;
  if (stream) fs::rename(aside, path, error);
  if (!stream || error) {
    return absl::InternalError(absl::StrCat("cannot write delimiter profile '", path.string(), "'",
                                            error ? ": " + error.message() : ""));
  }
  return absl::OkStatus();
}

}  // namespace dynsplit

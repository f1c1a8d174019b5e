// SPDX-License-Identifier: Apache-2.0
//
// Delimiter profiles by name: built-in ones, and stored ones in memory and optionally in a
// directory (one <name>.csv each).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/pipeline/segmentation.h"

namespace dynsplit {

// Thread-safe.
class ProfileStore {
 public:
  struct Options {
    std::string default_name;  // empty = none: every request names its profile
    std::string directory;     // empty = memory only; must exist
    int32_t max_stored = 256;
  };
  struct Entry {
    std::shared_ptr<const DelimiterProfile> profile;
    bool builtin = false;
  };
  struct PutResult {
    bool replaced = false;
    bool persisted = false;
  };

  // Loads the directory. INVALID_ARGUMENT when a file in it is not a profile, or the default is
  // unknown.
  static absl::StatusOr<std::unique_ptr<ProfileStore>> Create(Options options);

  const std::string& default_name() const { return options_.default_name; }
  // Empty name = the default, if there is one. NOT_FOUND.
  absl::StatusOr<std::shared_ptr<const DelimiterProfile>> Find(std::string_view name) const;
  std::vector<Entry> List() const;  // ascending names
  // ALREADY_EXISTS for built-in names, and for stored ones without `replace`.
  absl::StatusOr<PutResult> Put(DelimiterProfile profile, bool replace);

 private:
  explicit ProfileStore(Options options) : options_(std::move(options)) {}
  absl::Status Load();
  absl::Status Save(const DelimiterProfile& profile) const;

  Options options_;  // constant after construction
  mutable absl::Mutex mu_;
  std::map<std::string, Entry, std::less<>> entries_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dynsplit

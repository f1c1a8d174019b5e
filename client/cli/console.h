// SPDX-License-Identifier: Apache-2.0
//
// What people and scripts see of the program: units, tables, errors, progress, exit codes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/cpp/job.h"

namespace dynsplit::cli {

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;  // the server or a file said no
inline constexpr int kExitUsage = 2;   // the command line is wrong

std::string HumanBytes(double bytes);                // "2.9 MiB"
std::string HumanCount(int64_t count);               // "1,283"
std::string HumanDuration(absl::Duration duration);  // "12.4 ms"
std::string Percent(double share);                   // "25.0 %"; "-" for NaN
std::string Decimal(double value, int digits);       // "-" for NaN

// Columns aligned: the first to the left, the others to the right; a rule under the first row.
std::string Table(const std::vector<std::vector<std::string>>& rows);

// "NOT_FOUND: ...", then one line for each detail, on stderr. Returns kExitFailed.
int PrintError(const absl::Status& status);

// One line on stderr that overwrites itself; nothing when stderr is no terminal or `enabled` is
// false.
class ProgressBar {
 public:
  explicit ProgressBar(bool enabled);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void Show(const Progress& progress, int32_t num_layers);

 private:
  const bool enabled_;
  const absl::Time start_;
  absl::Time shown_;
  bool visible_ = false;
};

}  // namespace dynsplit::cli

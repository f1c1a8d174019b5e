// SPDX-License-Identifier: Apache-2.0
//
// JSON lines on stderr: {"time":...,"level":...,"msg":...,<fields>}. Fields carry names, sizes and
// codes; never prompt text, token ids or KV bytes. Thread-safe; a line is written whole.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <variant>

#include "absl/status/status.h"

namespace dynsplit {

enum class LogLevel : uint8_t { kDebug, kInfo, kWarning, kError };

struct LogField {
  std::string_view key;
  std::variant<std::string_view, int64_t, double, bool> value;
};

// Least level that is written; process-wide, default kInfo.
void SetLogLevel(LogLevel level);
absl::Status SetLogLevel(std::string_view name);  // "debug", "info", "warning", "error"

void Log(LogLevel level, std::string_view message, std::initializer_list<LogField> fields = {});
// The line Log would write, without time; for tests and for messages printed elsewhere.
std::string FormatLogLine(LogLevel level, std::string_view message,
                          std::initializer_list<LogField> fields);

}  // namespace dynsplit

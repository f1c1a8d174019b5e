// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/log.h"

#include <atomic>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "nlohmann/json.hpp"

namespace dynsplit {
namespace {

std::atomic<LogLevel> least_level{LogLevel::kInfo};
constexpr std::string_view kLevelNames[] = {"debug", "info", "warning", "error"};

std::string Render(nlohmann::ordered_json line, LogLevel level, std::string_view message,
                   std::initializer_list<LogField> fields) {
  line["level"] = kLevelNames[static_cast<size_t>(level)];
  line["msg"] = message;
  for (const LogField& field : fields) {
    std::visit([&](const auto& value) { line[std::string(field.key)] = value; }, field.value);
  }
  // Callers' strings may hold any bytes: replace what is not UTF-8.
  return line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace

void SetLogLevel(LogLevel level) { least_level.store(level, std::memory_order_relaxed); }

absl::Status SetLogLevel(std::string_view name) {
  for (size_t i = 0; i < std::size(kLevelNames); ++i) {
    if (kLevelNames[i] == name) {
      SetLogLevel(static_cast<LogLevel>(i));
      return absl::OkStatus();
    }
  }
  return absl::InvalidArgumentError(absl::StrCat("log level is '", std::string(name),
                                                 "'; must be debug, info, warning or error"));
}

std::string FormatLogLine(LogLevel level, std::string_view message,
                          std::initializer_list<LogField> fields) {
  return Render({}, level, message, fields);
}

void Log(LogLevel level, std::string_view message, std::initializer_list<LogField> fields) {
  if (level < least_level.load(std::memory_order_relaxed)) return;
  nlohmann::ordered_json line;
  line["time"] = absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone());
  const std::string text = Render(std::move(line), level, message, fields) + "\n";
  // One call a line: stdio locks the stream for it.
  std::fwrite(text.data(), 1, text.size(), stderr);
}

}  // namespace dynsplit

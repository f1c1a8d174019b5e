// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/trace.h"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "nlohmann/json.hpp"

namespace dynsplit {
namespace {

struct TraceFile {
  absl::Mutex mu;
  std::FILE* file ABSL_GUARDED_BY(mu) = nullptr;
  std::atomic<bool> open = false;
};

TraceFile& TheTrace() {
  static auto& trace = *new TraceFile;
  return trace;
}

double Microseconds(Stream::Clock::time_point time) {
  return std::chrono::duration<double, std::micro>(time.time_since_epoch()).count();
}

}  // namespace

absl::Status OpenTrace(const std::string& path) {
  std::FILE* file = nullptr;
  if (!path.empty()) {
    file = std::fopen(path.c_str(), "ae");
    if (file == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("option trace is '", path,
                       "', which cannot be opened for appending: ", std::strerror(errno)));
    }
  }
  TraceFile& trace = TheTrace();
  absl::MutexLock lock(&trace.mu);
  trace.open.store(file != nullptr, std::memory_order_relaxed);
  std::swap(trace.file, file);
  if (file != nullptr) std::fclose(file);
  return absl::OkStatus();
}

bool Tracing() { return TheTrace().open.load(std::memory_order_relaxed); }

void Trace(std::string_view request_id, int32_t layer, std::span<const TraceSpan> spans) {
  if (!Tracing()) return;
  std::string lines;
  for (const TraceSpan& span : spans) {
    const nlohmann::ordered_json line = {{"request", request_id},
                                         {"layer", layer},
                                         {"what", span.what},
                                         {"begin_us", Microseconds(span.begin)},
                                         {"end_us", Microseconds(span.end)}};
    // A client's name for its request may hold any bytes.
    lines += line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
    lines += '\n';
  }
  TraceFile& trace = TheTrace();
  absl::MutexLock lock(&trace.mu);
  if (trace.file == nullptr) return;
  std::fwrite(lines.data(), 1, lines.size(), trace.file);
  std::fflush(trace.file);  // so that it can be read while the server runs
}

}  // namespace dynsplit

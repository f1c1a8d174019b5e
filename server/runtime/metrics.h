// SPDX-License-Identifier: Apache-2.0
//
// What operators see at /metrics. One object, every family registered once at construction; names
// are dynsplit_<noun>_<unit>[_total], and the help text says whether a value is per request, per
// layer or of the process. Thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace dynsplit {

// One finished call, whatever its fate.
struct CallRecord {
  std::string_view method;  // "Compress", ...
  std::string_view code;    // "OK", "INVALID_ARGUMENT", ...
  double seconds = 0;
};

// One request that returned results.
struct ResultRecord {
  std::string_view preset;
  std::string_view evidence;
  std::string_view fallback_preset;  // empty = none
  double receive_seconds = 0, host_to_device_seconds = 0, score_seconds = 0, split_seconds = 0;
  double select_seconds = 0, gather_seconds = 0, receipt_seconds = 0, device_to_host_seconds = 0;
  double send_seconds = 0;
  int64_t bytes_in = 0, bytes_out = 0;
  int64_t tokens_in = 0;    // tokens x layers x KV heads
  int64_t tokens_kept = 0;  // likewise
  int64_t num_blocks = 0;
  double mass_mean = 0, mass_min = 0, error_mean = 0;  // NaN = not measured
  bool shadow = false;
};

// One Select that answered.
struct SelectRecord {
  double total_seconds = 0, device_seconds = 0;
  int64_t selected_tokens = 0;              // tokens x groups x layers
  int64_t moved_rows = 0, chosen_rows = 0;  // of callers that reuse rows
};

class Metrics {
 public:
  // One device, when /metrics is scraped.
  struct LiveDevice {
    std::string name;
    int64_t reserved_bytes = 0, queue_depth = 0;
    int64_t device_bytes = 0, host_bytes = 0;
    bool healthy = true;
  };
  // Values read when /metrics is scraped; of all devices together, but for `devices`.
  struct Live {
    int64_t reserved_bytes = 0, capacity_bytes = 0, queue_depth = 0, streams = 0;
    int64_t device_bytes = 0, host_bytes = 0;
    int64_t sessions = 0, session_device_bytes = 0, session_host_bytes = 0;
    int64_t sessions_opened = 0, sessions_released = 0, sessions_expired = 0, sessions_lost = 0;
    int64_t demotions = 0, restorations = 0;
    int64_t regions = 0, region_bytes = 0;
    bool draining = false;
    std::vector<LiveDevice> devices;
  };

  Metrics(std::string_view version, std::string_view backend, std::string_view device);

  void Finished(const CallRecord& call);
  void Returned(const ResultRecord& result);
  // "queue_full", "queue_timeout", "too_large", "draining", "too_many_streams"
  void Rejected(std::string_view reason);
  void Cancelled(std::string_view phase);  // "queue", "receive", "send"
  void ChecksumFailed() { checksum_failures_.Increment(); }
  void Selected(const SelectRecord& select);
  // A batch of so many Select calls.
  void SelectsLaunched(int64_t calls) { select_batch_.Observe(static_cast<double>(calls)); }
  // Tokens x layers x KV heads.
  void Appended(int64_t tokens) { appended_tokens_.Increment(static_cast<double>(tokens)); }
  void Waited(double seconds) { queue_wait_.Observe(seconds); }

  // Prometheus text exposition, version 0.0.4.
  std::string Text(const Live& live);

 private:
  using CounterFamily = prometheus::Family<prometheus::Counter>;
  using GaugeFamily = prometheus::Family<prometheus::Gauge>;
  using HistogramFamily = prometheus::Family<prometheus::Histogram>;

  // Self-synchronised.
  prometheus::Registry registry_;
  CounterFamily& requests_;
  HistogramFamily& request_seconds_;
  HistogramFamily& stage_seconds_;
  CounterFamily& rejected_;
  CounterFamily& cancelled_;
  CounterFamily& evidence_;
  CounterFamily& fallbacks_;
  CounterFamily& input_bytes_;
  CounterFamily& output_bytes_;
  CounterFamily& shadow_requests_;
  prometheus::Counter& tokens_in_;
  prometheus::Counter& tokens_kept_;
  prometheus::Counter& blocks_;
  prometheus::Counter& checksum_failures_;
  prometheus::Histogram& queue_wait_;
  prometheus::Histogram& kept_ratio_;
  prometheus::Histogram& mass_mean_;
  prometheus::Histogram& mass_min_;
  prometheus::Histogram& error_mean_;
  prometheus::Histogram& select_total_;
  prometheus::Histogram& select_device_;
  prometheus::Histogram& select_batch_;
  prometheus::Counter& selected_tokens_;
  prometheus::Counter& moved_rows_;
  prometheus::Counter& chosen_rows_;
  prometheus::Counter& appended_tokens_;
  prometheus::Counter& sessions_opened_;
  CounterFamily& sessions_ended_;
  prometheus::Counter& demotions_;
  prometheus::Counter& restorations_;
  prometheus::Gauge& sessions_;
  GaugeFamily& session_bytes_;
  prometheus::Gauge& regions_;
  prometheus::Gauge& region_bytes_;
  prometheus::Gauge& reserved_bytes_;
  prometheus::Gauge& capacity_bytes_;
  prometheus::Gauge& queue_depth_;
  prometheus::Gauge& streams_;
  GaugeFamily& memory_bytes_;
  GaugeFamily& device_healthy_;
  GaugeFamily& device_reserved_bytes_;
  prometheus::Gauge& draining_;
};

}  // namespace dynsplit

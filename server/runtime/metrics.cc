// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/metrics.h"

#include <cmath>
#include <utility>

#include "prometheus/text_serializer.h"

namespace dynsplit {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;

const prometheus::Histogram::BucketBoundaries& SecondsBuckets() {
  static const auto& buckets = *new prometheus::Histogram::BucketBoundaries{
      0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60};
  return buckets;
}

// A decode step is short: a Select is meant to take tens of microseconds.
const prometheus::Histogram::BucketBoundaries& SelectBuckets() {
  static const auto& buckets = *new prometheus::Histogram::BucketBoundaries{
      1e-5, 2.5e-5, 5e-5, 1e-4, 1.5e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.1, 1};
  return buckets;
}

// What is counted elsewhere is carried over when it is read.
void CatchUp(prometheus::Counter& counter, int64_t total) {
  const double behind = static_cast<double>(total) - counter.Value();
  if (behind > 0) counter.Increment(behind);
}

const prometheus::Histogram::BucketBoundaries& ShareBuckets() {
  static const auto& buckets = *new prometheus::Histogram::BucketBoundaries{
      0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999};
  return buckets;
}

prometheus::Family<prometheus::Counter>& CounterOf(prometheus::Registry& registry, const char* name,
                                                   const char* help) {
  return BuildCounter().Name(name).Help(help).Register(registry);
}

prometheus::Family<prometheus::Gauge>& GaugeOf(prometheus::Registry& registry, const char* name,
                                               const char* help) {
  return BuildGauge().Name(name).Help(help).Register(registry);
}

prometheus::Family<prometheus::Histogram>& HistogramOf(prometheus::Registry& registry,
                                                       const char* name, const char* help) {
  return BuildHistogram().Name(name).Help(help).Register(registry);
}

void ObserveMeasured(prometheus::Histogram& histogram, double value) {
  if (!std::isnan(value)) histogram.Observe(value);
}

}  // namespace

Metrics::Metrics(std::string_view version, std::string_view backend, std::string_view device)
    : requests_(CounterOf(registry_, "dynsplit_requests_total",
                          "Finished calls by method and gRPC code.")),
      request_seconds_(HistogramOf(registry_, "dynsplit_request_duration_seconds",
                                   "Wall clock of one call from its first message to its status.")),
      stage_seconds_(
          HistogramOf(registry_, "dynsplit_stage_duration_seconds",
                      "Wall clock of one stage of one request, summed over its layers.")),
      rejected_(CounterOf(registry_, "dynsplit_rejected_total",
                          "Requests turned away before any work, by reason.")),
      cancelled_(CounterOf(registry_, "dynsplit_cancelled_total",
                           "Requests that ended by cancellation or deadline, by phase.")),
      evidence_(CounterOf(registry_, "dynsplit_evidence_total",
                          "Requests that returned results, by evidence used.")),
      fallbacks_(CounterOf(registry_, "dynsplit_fallback_total",
                           "Requests whose policy was replaced by a fallback, by preset used.")),
      input_bytes_(CounterOf(registry_, "dynsplit_input_bytes_total",
                             "K and V bytes, with scales, of requests that returned results.")),
      output_bytes_(CounterOf(registry_, "dynsplit_output_bytes_total",
                              "Page, scale and summary bytes of requests that returned results.")),
      shadow_requests_(CounterOf(registry_, "dynsplit_shadow_requests_total",
                                 "Requests served in shadow mode (originals returned).")),
      tokens_in_(CounterOf(registry_, "dynsplit_tokens_in_total",
                           "Tokens x layers x KV heads of requests that returned results.")
                     .Add({})),
      tokens_kept_(CounterOf(registry_, "dynsplit_tokens_kept_total",
                             "Tokens x layers x KV heads kept by those requests.")
                       .Add({})),
      blocks_(CounterOf(registry_, "dynsplit_blocks_total",
                        "Semantic blocks of requests that returned results.")
                  .Add({})),
      checksum_failures_(CounterOf(registry_, "dynsplit_checksum_failures_total",
                                   "Chunks or tensors received with a wrong CRC32C.")
                             .Add({})),
      queue_wait_(HistogramOf(registry_, "dynsplit_queue_wait_seconds",
                              "Time one request waited for memory before it was admitted.")
                      .Add({}, SecondsBuckets())),
      kept_ratio_(HistogramOf(registry_, "dynsplit_compression_ratio",
                              "Bytes out over bytes in of one request.")
                      .Add({}, ShareBuckets())),
      mass_mean_(HistogramOf(registry_, "dynsplit_retained_attention_mass_mean",
                             "Receipt of one request: attention mass on kept tokens, mean over "
                             "heads and layers.")
                     .Add({}, ShareBuckets())),
      mass_min_(HistogramOf(registry_, "dynsplit_retained_attention_mass_min",
                            "Receipt of one request: attention mass on kept tokens, smallest head.")
                    .Add({}, ShareBuckets())),
      error_mean_(HistogramOf(registry_, "dynsplit_output_relative_error_mean",
                              "Receipt of one request: relative error of the attention output, "
                              "mean over heads and layers.")
                      .Add({}, ShareBuckets())),
      select_total_(HistogramOf(registry_, "dynsplit_select_duration_seconds",
                                "Wall clock of one Select in the server.")
                        .Add({}, SelectBuckets())),
      select_device_(HistogramOf(registry_, "dynsplit_select_device_seconds",
                                 "Of one Select's batch: from the first launch to the last result.")
                         .Add({}, SelectBuckets())),
      select_batch_(HistogramOf(registry_, "dynsplit_select_batch_calls",
                                "Select calls that shared launches, of one batch.")
                        .Add({}, prometheus::Histogram::BucketBoundaries{1, 2, 4, 8, 16, 32, 64})),
      selected_tokens_(CounterOf(registry_, "dynsplit_selected_tokens_total",
                                 "Tokens x groups x layers that Selects chose.")
                           .Add({})),
      moved_rows_(CounterOf(registry_, "dynsplit_moved_rows_total",
                            "Rows x KV heads x layers that moved to callers that reuse rows.")
                      .Add({})),
      chosen_rows_(CounterOf(registry_, "dynsplit_chosen_rows_total",
                             "Rows x KV heads x layers that such callers read.")
                       .Add({})),
      appended_tokens_(CounterOf(registry_, "dynsplit_appended_tokens_total",
                                 "Tokens x layers x KV heads appended to sessions.")
                           .Add({})),
      sessions_opened_(
          CounterOf(registry_, "dynsplit_sessions_opened_total", "Sessions opened.").Add({})),
      sessions_ended_(
          CounterOf(registry_, "dynsplit_sessions_ended_total",
                    "Sessions that ended, by how (released, expired, lost with their device).")),
      demotions_(CounterOf(registry_, "dynsplit_session_demotions_total",
                           "Moves of a session's K and V from device to host memory.")
                     .Add({})),
      restorations_(CounterOf(registry_, "dynsplit_session_restorations_total",
                              "Moves of a session's K and V back to device memory.")
                        .Add({})),
      sessions_(GaugeOf(registry_, "dynsplit_sessions", "Sessions of this process.").Add({})),
      session_bytes_(GaugeOf(registry_, "dynsplit_session_bytes",
                             "Memory of all sessions of this process, by place.")),
      regions_(
          GaugeOf(registry_, "dynsplit_regions", "Regions of memory that clients have registered.")
              .Add({})),
      region_bytes_(
          GaugeOf(registry_, "dynsplit_region_bytes", "Size of those regions together.").Add({})),
      reserved_bytes_(GaugeOf(registry_, "dynsplit_in_flight_bytes",
                              "Memory reserved by admitted requests of this process.")
                          .Add({})),
      capacity_bytes_(GaugeOf(registry_, "dynsplit_in_flight_limit_bytes",
                              "Memory that requests of this process may reserve.")
                          .Add({})),
      queue_depth_(
          GaugeOf(registry_, "dynsplit_queue_depth", "Requests of this process waiting for memory.")
              .Add({})),
      streams_(GaugeOf(registry_, "dynsplit_streams",
                       "Compression streams open in this process, waiting ones included.")
                   .Add({})),
      memory_bytes_(GaugeOf(registry_, "dynsplit_device_memory_bytes",
                            "Memory in use by live buffers, by device and pool.")),
      device_healthy_(GaugeOf(registry_, "dynsplit_device_healthy",
                              "1 while the device works, 0 after a fault.")),
      device_reserved_bytes_(GaugeOf(registry_, "dynsplit_device_in_flight_bytes",
                                     "Memory reserved by admitted requests, by device.")),
      draining_(
          GaugeOf(registry_, "dynsplit_draining", "1 while the process finishes its last requests.")
              .Add({})) {
  GaugeOf(registry_, "dynsplit_build_info", "Always 1; the labels say what runs.")
      .Add({{"version", std::string(version)},
            {"backend", std::string(backend)},
            {"device", std::string(device)}})
      .Set(1);
  // Series that alerts are written against exist from the start.
  for (const char* reason :
       {"queue_full", "queue_timeout", "too_large", "draining", "too_many_streams"}) {
    rejected_.Add({{"reason", reason}});
  }
  for (const char* place : {"device", "host"}) session_bytes_.Add({{"place", place}});
  for (const char* how : {"released", "expired", "lost"}) sessions_ended_.Add({{"how", how}});
}

void Metrics::Finished(const CallRecord& call) {
  const std::string method(call.method);
  requests_.Add({{"method", method}, {"code", std::string(call.code)}}).Increment();
  request_seconds_.Add({{"method", method}}, SecondsBuckets()).Observe(call.seconds);
}

void Metrics::Returned(const ResultRecord& result) {
  const std::pair<const char*, double> stages[] = {
      {"receive", result.receive_seconds}, {"h2d", result.host_to_device_seconds},
      {"score", result.score_seconds},     {"split", result.split_seconds},
      {"select", result.select_seconds},   {"gather", result.gather_seconds},
      {"receipt", result.receipt_seconds}, {"d2h", result.device_to_host_seconds},
      {"send", result.send_seconds}};
  for (const auto& [stage, seconds] : stages) {
    stage_seconds_.Add({{"stage", stage}}, SecondsBuckets()).Observe(seconds);
  }
  const prometheus::Labels policy{{"policy", std::string(result.preset)}};
  input_bytes_.Add(policy).Increment(static_cast<double>(result.bytes_in));
  output_bytes_.Add(policy).Increment(static_cast<double>(result.bytes_out));
  evidence_.Add({{"kind", std::string(result.evidence)}}).Increment();
  if (!result.fallback_preset.empty()) {
    fallbacks_.Add({{"policy", std::string(result.fallback_preset)}}).Increment();
  }
  if (result.shadow) shadow_requests_.Add(policy).Increment();
  tokens_in_.Increment(static_cast<double>(result.tokens_in));
  tokens_kept_.Increment(static_cast<double>(result.tokens_kept));
  blocks_.Increment(static_cast<double>(result.num_blocks));
  if (result.bytes_in > 0 && result.bytes_out > 0) {
    kept_ratio_.Observe(static_cast<double>(result.bytes_out) /
                        static_cast<double>(result.bytes_in));
  }
  ObserveMeasured(mass_mean_, result.mass_mean);
  ObserveMeasured(mass_min_, result.mass_min);
  ObserveMeasured(error_mean_, result.error_mean);
}

void Metrics::Selected(const SelectRecord& select) {
  select_total_.Observe(select.total_seconds);
  select_device_.Observe(select.device_seconds);
  selected_tokens_.Increment(static_cast<double>(select.selected_tokens));
  moved_rows_.Increment(static_cast<double>(select.moved_rows));
  chosen_rows_.Increment(static_cast<double>(select.chosen_rows));
}

void Metrics::Rejected(std::string_view reason) {
  rejected_.Add({{"reason", std::string(reason)}}).Increment();
}

void Metrics::Cancelled(std::string_view phase) {
  cancelled_.Add({{"phase", std::string(phase)}}).Increment();
}

std::string Metrics::Text(const Live& live) {
  reserved_bytes_.Set(static_cast<double>(live.reserved_bytes));
  capacity_bytes_.Set(static_cast<double>(live.capacity_bytes));
  queue_depth_.Set(static_cast<double>(live.queue_depth));
  streams_.Set(static_cast<double>(live.streams));
  for (const LiveDevice& device : live.devices) {
    memory_bytes_.Add({{"device", device.name}, {"pool", "device"}})
        .Set(static_cast<double>(device.device_bytes));
    memory_bytes_.Add({{"device", device.name}, {"pool", "host"}})
        .Set(static_cast<double>(device.host_bytes));
    device_healthy_.Add({{"device", device.name}}).Set(device.healthy ? 1 : 0);
    device_reserved_bytes_.Add({{"device", device.name}})
        .Set(static_cast<double>(device.reserved_bytes));
  }
  CatchUp(sessions_opened_, live.sessions_opened);
  CatchUp(sessions_ended_.Add({{"how", "released"}}), live.sessions_released);
  CatchUp(sessions_ended_.Add({{"how", "expired"}}), live.sessions_expired);
  CatchUp(sessions_ended_.Add({{"how", "lost"}}), live.sessions_lost);
  CatchUp(demotions_, live.demotions);
  CatchUp(restorations_, live.restorations);
  sessions_.Set(static_cast<double>(live.sessions));
  session_bytes_.Add({{"place", "device"}}).Set(static_cast<double>(live.session_device_bytes));
  session_bytes_.Add({{"place", "host"}}).Set(static_cast<double>(live.session_host_bytes));
  regions_.Set(static_cast<double>(live.regions));
  region_bytes_.Set(static_cast<double>(live.region_bytes));
  draining_.Set(live.draining ? 1 : 0);
  return prometheus::TextSerializer().Serialize(registry_.Collect());
}

}  // namespace dynsplit

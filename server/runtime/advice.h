// SPDX-License-Identifier: Apache-2.0
//
// Whether compressing a sequence between prefill and decode pays, and how. Pure: from a model of
// time and curves of quality to a decision.
//
// Time. As it is, K and V take bytes / link. Compressed, the layers pass two stations one behind
// the other, the service and the link. Of L equal layers of which the service needs C seconds in
// all and the link S, the last leaves the link after max(C, S) + min(C, S) / L.
//
// Quality. The best preset whose evidence there is, with the fewest tokens that meet the bounds by
// the built-in curves as this server's own receipts correct them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "server/pipeline/policy.h"
#include "server/pipeline/quality.h"
#include "server/pipeline/types.h"
#include "server/runtime/experience.h"

namespace dynsplit {

struct AdviceRequest {
  SequenceShape shape;  // valid
  DType dtype = DType::kBFloat16;
  double link_bytes_per_second = 0;  // > 0
  double goal_seconds = 0;           // 0 = as soon as possible
  std::vector<Evidence> evidence;    // that the engine has
  double min_mass = 0.9;             // in [0, 1]
  double max_divergence = 0;         // nats a token; 0 = none
};

struct Advice {
  bool compress = false;
  Policy policy;     // of what was considered best
  Quality expected;  // of that policy; NaN where nothing acceptable was found
  double plain_seconds = 0;
  double compressed_seconds = 0;  // NaN likewise
  // Below, compression is the faster; 0 = never.
  double break_even_bytes_per_second = 0;
  // Requests of this server that the figures rest on; 0 = the built-in ones alone.
  int64_t num_receipts = 0;
  int64_t num_timed = 0;
  std::string reason;  // one sentence
};

// Seconds a byte of K and V that compression takes in a server of that backend ("cpu", "cuda"),
// until it has served requests of its own: as README's measurements have it.
double DefaultSecondsPerByte(std::string_view backend);

// Seconds until all layers have passed the service and the link.
double PipelinedSeconds(double service_seconds, double link_seconds, int32_t num_layers);
// Throughput of the link at which the two are equally fast; 0 where as it is always wins.
double BreakEven(double bytes_in, double bytes_out, double service_seconds, int32_t num_layers);

Advice Advise(const AdviceRequest& request, const QualityTable& table, const Experience& experience,
              std::string_view backend);

}  // namespace dynsplit

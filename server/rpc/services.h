// SPDX-License-Identifier: Apache-2.0
//
// What all handlers share.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/runtime/admission.h"
#include "server/runtime/config.h"
#include "server/runtime/executor.h"
#include "server/runtime/metrics.h"
#include "server/runtime/profiles.h"

namespace dynsplit::rpc {

// Members are self-synchronised or constant; outlives every call.
struct Services {
  const ServerConfig& config;
  const std::string version;
  Executor& executor;
  Admission& admission;
  ProfileStore& profiles;
  Metrics& metrics;
  const absl::Time started = absl::Now();
  std::atomic<int64_t> num_streams = 0;    // compression streams open
  std::atomic<bool> draining = false;      // new requests are refused
  std::atomic<uint64_t> next_request = 1;  // names requests that do not name themselves

  const BackendInfo& backend() const { return executor.backend().info(); }
};

// What refused requests are told to wait while draining.
inline constexpr int64_t kDrainRetryAfterMs = 1000;

}  // namespace dynsplit::rpc

// SPDX-License-Identifier: Apache-2.0
//
// What all handlers share.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/rpc/shard_table.h"
#include "server/runtime/config.h"
#include "server/runtime/devices.h"
#include "server/runtime/experience.h"
#include "server/runtime/metrics.h"
#include "server/runtime/profiles.h"
#include "server/runtime/regions.h"
#include "server/runtime/sessions.h"

namespace dynsplit::rpc {

// Members are self-synchronised or constant; outlives every call.
struct Services {
  const ServerConfig& config;
  const std::string version;
  DeviceSet& devices;
  ProfileStore& profiles;
  Metrics& metrics;
  Experience& experience;
  RegionStore& regions;
  SessionStore& sessions;
  const absl::Time started = absl::Now();
  std::atomic<int64_t> num_streams = 0;    // compression streams open
  std::atomic<bool> draining = false;      // new requests are refused
  std::atomic<uint64_t> next_request = 1;  // names requests that do not name themselves

  ShardTable shards{};  // requests that streams may join

  std::atomic<int> port = 0;  // TCP, once it is bound

  // Of the first device; all have the same kind of backend.
  const BackendInfo& backend() const { return devices.all().front()->backend().info(); }
  // Where calls about a session of this server must go.
  std::string endpoint() const {
    if (config.listen.empty()) return "unix:" + config.unix_socket;
    return config.listen.substr(0, config.listen.rfind(':') + 1) + std::to_string(port);
  }
};

// What refused requests are told to wait while draining.
inline constexpr int64_t kDrainRetryAfterMs = 1000;

}  // namespace dynsplit::rpc

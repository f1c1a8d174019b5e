// SPDX-License-Identifier: Apache-2.0
//
// Options of the server: one struct, one table. A value comes from flags, then environment, then
// the configuration file, then the default; absent means the default, present but wrong is refused
// with one sentence.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace dynsplit {

struct ServerConfig {
  // Where gRPC listens. "host:port" (port 0 = any free one); empty = no TCP.
  std::string listen = "127.0.0.1:8001";
  // Path of a unix socket, at most 107 bytes; empty = none.
  std::string unix_socket;
  // Where /metrics, /healthz and /readyz are served over HTTP; empty = nowhere.
  std::string metrics_listen = "127.0.0.1:8002";

  std::string backend = "auto";     // auto, cpu or cuda
  int32_t device = 0;               // CUDA device number
  std::string devices;              // several: see ParseDevices; empty = `device` alone
  int32_t threads = 0;              // threads of the CPU backend; 0 = one per processor
  int32_t workers = 0;              // layers computed at a time; 0 = 4 on CUDA, else 2
  int64_t device_memory_bytes = 0;  // cap of the backend's device pool; 0 = the backend's own
  int64_t pinned_memory_bytes = 0;  // cap of pinned host memory (CUDA); 0 = the backend's own
  int64_t max_request_bytes = int64_t{8} << 30;      // memory one request may reserve
  int64_t max_in_flight_bytes = int64_t{16} << 30;   // memory all requests may reserve
  int32_t max_queue = 64;                            // requests waiting for memory
  absl::Duration queue_timeout = absl::Seconds(30);  // longest wait for memory
  int32_t max_streams = 256;                         // compression streams open at a time
  int32_t max_message_bytes = 8 << 20;               // one gRPC message
  int32_t max_chunk_bytes = 3 << 20;                 // data of one chunk
  int64_t max_total_tensors = 16384;                 // descriptors of one request

  int32_t max_sessions = 1024;       // sequences kept at a time
  int64_t session_device_bytes = 0;  // cap of all sessions on the device; 0 = device_memory_bytes'
  int64_t session_host_bytes = 0;    // cap of all in pinned host memory; 0 = pinned_memory_bytes'
  int64_t tenant_session_bytes = 0;  // cap of one tenant's sessions, wherever; 0 = none

  std::string regions = "none";  // memory that clients may register: none, shm, cuda-ipc or all
  int32_t max_regions = 256;     // registered at a time, and owners of regions
  // Path of the side socket over which clients pass memory as descriptors, at most 107 bytes; empty
  // = none.
  std::string region_socket;

  absl::Duration drain_timeout = absl::Seconds(30);  // for requests in flight after SIGTERM
  absl::Duration pre_stop_delay;  // between "not serving" and refusing new requests; 0 s

  // Delimiter profile where a policy names none. Empty = requests must name theirs: token ids of
  // another tokenizer would cut at random, so that no profile is a safe default.
  std::string default_profile;
  std::string profile_directory;  // stored profiles; empty = memory only
  int32_t max_profiles = 256;     // stored profiles

  std::string log_level = "info";  // debug, info, warning or error
  bool reflection = true;          // gRPC server reflection
  std::string trace;               // file for the times of every layer's steps; empty = none
};

// One option: its name on the command line ("max-queue"), in the environment (DYNSPLIT_MAX_QUEUE)
// and in the file (max-queue = 64).
struct ConfigOption {
  std::string_view name;
  std::string_view help;  // with the unit
  std::function<absl::Status(std::string_view value, ServerConfig& config)> set;
  std::function<std::string(const ServerConfig& config)> get;
};
std::span<const ConfigOption> ConfigOptions();

// Sets one option. INVALID_ARGUMENT naming option, value and what would be right.
absl::Status SetOption(std::string_view name, std::string_view value, ServerConfig& config);
// Lines "name = value"; '#' starts a comment. Unknown names are refused, with their line.
absl::Status ApplyConfigText(std::string_view text, ServerConfig& config);
// DYNSPLIT_<NAME> of every option. `lookup` returns null for unset variables.
absl::Status ApplyEnvironment(const std::function<const char*(const char* name)>& lookup,
                              ServerConfig& config);
// Ranges and combinations.
absl::Status ValidateConfig(const ServerConfig& config);

// "10s", "250ms", "2m"; plain numbers are seconds. >= 0.
absl::Status ParseDuration(std::string_view text, absl::Duration& value);
// "8GiB", "512MiB", "4096"; binary units only.
absl::Status ParseBytes(std::string_view text, int64_t& value);

// "4": the first four; "0,2": those. Numbers of CUDA devices; on the CPU backend only their count
// matters: each is an equal share of threads and memory.
absl::StatusOr<std::vector<int32_t>> ParseDevices(std::string_view text);

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/config.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace dynsplit {
namespace {

// Debian's Abseil has a string_view of its own.
absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

absl::Status Expect(std::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("must be ", View(what)));
}

ConfigOption Text(std::string_view name, std::string ServerConfig::*field, std::string_view help) {
  return {name, help,
          [field](std::string_view value, ServerConfig& config) {
            config.*field = std::string(value);
            return absl::OkStatus();
          },
          [field](const ServerConfig& config) { return config.*field; }};
}

ConfigOption Int32(std::string_view name, int32_t ServerConfig::*field, std::string_view help) {
  return {name, help,
          [field](std::string_view value, ServerConfig& config) {
            return absl::SimpleAtoi(View(value), &(config.*field)) ? absl::OkStatus()
                                                                   : Expect("a whole number");
          },
          [field](const ServerConfig& config) { return absl::StrCat(config.*field); }};
}

ConfigOption Bytes(std::string_view name, int64_t ServerConfig::*field, std::string_view help) {
  return {name, help,
          [field](std::string_view value, ServerConfig& config) {
            return ParseBytes(value, config.*field);
          },
          [field](const ServerConfig& config) { return absl::StrCat(config.*field); }};
}

ConfigOption Bytes32(std::string_view name, int32_t ServerConfig::*field, std::string_view help) {
  return {name, help,
          [field](std::string_view value, ServerConfig& config) {
            int64_t bytes = 0;
            if (absl::Status status = ParseBytes(value, bytes); !status.ok()) return status;
            if (bytes > std::numeric_limits<int32_t>::max()) return Expect("less than 2 GiB");
            config.*field = static_cast<int32_t>(bytes);
            return absl::OkStatus();
          },
          [field](const ServerConfig& config) { return absl::StrCat(config.*field); }};
}

ConfigOption Duration(std::string_view name, absl::Duration ServerConfig::*field,
                      std::string_view help) {
  return {name, help,
          [field](std::string_view value, ServerConfig& config) {
            return ParseDuration(value, config.*field);
          },
          [field](const ServerConfig& config) { return absl::FormatDuration(config.*field); }};
}

ConfigOption Bool(std::string_view name, bool ServerConfig::*field, std::string_view help) {
  return {name, help,
          [field](std::string_view value, ServerConfig& config) {
            return absl::SimpleAtob(View(value), &(config.*field)) ? absl::OkStatus()
                                                                   : Expect("true or false");
          },
          [field](const ServerConfig& config) {
            return std::string(config.*field ? "true" : "false");
          }};
}

std::vector<ConfigOption> MakeOptions() {
  using C = ServerConfig;
  return {
      Text("listen", &C::listen, "host:port of gRPC; port 0 = any free one; empty = no TCP"),
      Text("unix-socket", &C::unix_socket, "path of a unix socket for gRPC; empty = none"),
      Text("metrics-listen", &C::metrics_listen,
           "host:port of /metrics, /healthz and /readyz; empty = nowhere"),
      Text("backend", &C::backend, "auto, cpu or cuda"),
      Int32("device", &C::device, "CUDA device number"),
      Text("devices", &C::devices,
           "several devices: their number, or CUDA device numbers as in 0,2; on the CPU each is a "
           "share of threads and device-memory; empty = device alone"),
      Int32("threads", &C::threads, "threads of the CPU backend; 0 = one per processor"),
      Int32("workers", &C::workers, "layers computed at a time; 0 = 4 on CUDA, else 2"),
      Bytes("device-memory", &C::device_memory_bytes,
            "cap of device memory, bytes or with KiB, MiB, GiB; 0 = the backend's own"),
      Bytes("pinned-memory", &C::pinned_memory_bytes,
            "cap of pinned host memory (CUDA), bytes; 0 = the backend's own"),
      Bytes("max-request-bytes", &C::max_request_bytes, "memory one request may reserve, bytes"),
      Bytes("max-in-flight-bytes", &C::max_in_flight_bytes,
            "memory all requests may reserve, in equal shares of the devices, bytes"),
      Int32("max-queue", &C::max_queue, "requests that may wait for memory of a device"),
      Duration("queue-timeout", &C::queue_timeout, "longest wait for memory, e.g. 30s"),
      Int32("max-streams", &C::max_streams, "compression streams open at a time"),
      Bytes32("max-message-bytes", &C::max_message_bytes, "one gRPC message, bytes"),
      Bytes32("max-chunk-bytes", &C::max_chunk_bytes, "data of one chunk, bytes"),
      Bytes("max-total-tensors", &C::max_total_tensors, "tensor descriptors of one request"),
      Int32("max-sessions", &C::max_sessions, "sequences kept as sessions at a time"),
      Bytes("session-device-memory", &C::session_device_bytes,
            "cap of the sessions' memory on each device, bytes; 0 = as device-memory"),
      Bytes("session-host-memory", &C::session_host_bytes,
            "cap of all sessions' pinned host memory, bytes; 0 = as pinned-memory"),
      Bytes("tenant-session-bytes", &C::tenant_session_bytes,
            "cap of one tenant's sessions, device and host together, bytes; 0 = none"),
      Text("regions", &C::regions,
           "memory that clients on this host may register: none, shm, cuda-ipc or all"),
      Int32("max-regions", &C::max_regions, "regions of memory registered at a time"),
      Text("region-socket", &C::region_socket,
           "path of a side socket over which clients pass memory as descriptors; empty = none"),
      Duration("drain-timeout", &C::drain_timeout, "time for requests in flight after SIGTERM"),
      Duration("pre-stop-delay", &C::pre_stop_delay,
               "time between turning not ready and refusing new requests"),
      Text("default-profile", &C::default_profile,
           "delimiter profile where a policy names none; empty = requests must name it"),
      Text("profile-directory", &C::profile_directory,
           "directory of stored delimiter profiles; empty = memory only"),
      Int32("max-profiles", &C::max_profiles, "delimiter profiles that can be stored"),
      Text("log-level", &C::log_level, "debug, info, warning or error"),
      Bool("reflection", &C::reflection, "gRPC server reflection, true or false"),
      Text("trace", &C::trace,
           "debugging: file to append the times of every layer's steps to; empty = none"),
  };
}

absl::Status CheckRange(std::string_view name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("option ", View(name), " is ", value, "; must be in [", low, ", ", high, "]"));
}

absl::Status CheckAddress(std::string_view name, const std::string& address) {
  if (address.empty()) return absl::OkStatus();
  const size_t colon = address.rfind(':');
  int32_t port = -1;
  if (colon == std::string::npos || colon == 0 ||
      !absl::SimpleAtoi(address.substr(colon + 1), &port) || port < 0 || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("option ", View(name), " is '", address, "'; must be host:port or empty"));
  }
  return absl::OkStatus();
}

}  // namespace

std::span<const ConfigOption> ConfigOptions() {
  static const auto& options = *new std::vector<ConfigOption>(MakeOptions());
  return options;
}

absl::Status ParseDuration(std::string_view text, absl::Duration& value) {
  absl::Duration parsed;
  double seconds = 0;
  if (absl::SimpleAtod(View(text), &seconds)) {
    parsed = absl::Seconds(seconds);
  } else if (!absl::ParseDuration(View(text), &parsed)) {
    return Expect("a duration such as 10s or 250ms");
  }
  if (!(parsed >= absl::ZeroDuration()) || parsed > absl::Hours(24)) {
    return Expect("a duration in [0s, 24h]");
  }
  value = parsed;
  return absl::OkStatus();
}

absl::Status ParseBytes(std::string_view text, int64_t& value) {
  constexpr std::pair<std::string_view, int> kUnits[] = {
      {"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"TiB", 40}};
  int shift = 0;
  absl::string_view digits = View(text);
  for (const auto& [unit, bits] : kUnits) {
    if (absl::EndsWith(digits, View(unit))) {
      shift = bits;
      digits.remove_suffix(unit.size());
      break;
    }
  }
  int64_t number = 0;
  if (!absl::SimpleAtoi(absl::StripAsciiWhitespace(digits), &number) || number < 0 ||
      number > (std::numeric_limits<int64_t>::max() >> shift)) {
    return Expect("a number of bytes such as 4096, 512MiB or 8GiB");
  }
  value = number << shift;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> ParseDevices(std::string_view text) {
  const absl::Status wrong =
      Expect("a number of devices in [1, 64], or different device numbers in [0, 1023] as in 0,2");
  std::vector<int32_t> devices;
  if (!absl::StrContains(View(text), ',')) {
    int32_t count = 0;
    if (!absl::SimpleAtoi(View(text), &count) || count < 1 || count > 64) return wrong;
    devices.resize(static_cast<size_t>(count));
    std::iota(devices.begin(), devices.end(), 0);
    return devices;
  }
  for (const absl::string_view number : absl::StrSplit(View(text), ',')) {
    int32_t device = 0;
    if (!absl::SimpleAtoi(number, &device) || device < 0 || device > 1023 ||
        std::find(devices.begin(), devices.end(), device) != devices.end()) {
      return wrong;
    }
    devices.push_back(device);
  }
  return devices;
}

absl::Status SetOption(std::string_view name, std::string_view value, ServerConfig& config) {
  for (const ConfigOption& option : ConfigOptions()) {
    if (option.name != name) continue;
    absl::Status status = option.set(value, config);
    if (status.ok()) return status;
    return absl::InvalidArgumentError(
        absl::StrCat("option ", View(name), " is '", View(value), "'; ", status.message()));
  }
  return absl::InvalidArgumentError(absl::StrCat("there is no option '", View(name), "'"));
}

absl::Status ApplyConfigText(std::string_view text, ServerConfig& config) {
  int line_number = 0;
  for (absl::string_view line : absl::StrSplit(View(text), '\n')) {
    ++line_number;
    line = absl::StripAsciiWhitespace(line.substr(0, line.find('#')));
    if (line.empty()) continue;
    const size_t equals = line.find('=');
    if (equals == absl::string_view::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat("line ", line_number, ": must read name = value"));
    }
    const absl::string_view name = absl::StripAsciiWhitespace(line.substr(0, equals));
    const absl::string_view value = absl::StripAsciiWhitespace(line.substr(equals + 1));
    const absl::Status status =
        SetOption({name.data(), name.size()}, {value.data(), value.size()}, config);
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("line ", line_number, ": ", status.message()));
    }
  }
  return absl::OkStatus();
}

absl::Status ApplyEnvironment(const std::function<const char*(const char* name)>& lookup,
                              ServerConfig& config) {
  for (const ConfigOption& option : ConfigOptions()) {
    const std::string variable = absl::StrCat(
        "DYNSPLIT_", absl::AsciiStrToUpper(absl::StrReplaceAll(View(option.name), {{"-", "_"}})));
    const char* value = lookup(variable.c_str());
    if (value == nullptr) continue;
    const absl::Status status = SetOption(option.name, value, config);
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(variable, ": ", status.message()));
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateConfig(const ServerConfig& config) {
  constexpr int64_t kMost = int64_t{1} << 46;
  const std::pair<std::string_view, std::array<int64_t, 3>> ranges[] = {
      {"device", {config.device, 0, 1023}},
      {"threads", {config.threads, 0, 4096}},
      {"workers", {config.workers, 0, 256}},
      {"device-memory", {config.device_memory_bytes, 0, kMost}},
      {"pinned-memory", {config.pinned_memory_bytes, 0, kMost}},
      {"max-request-bytes", {config.max_request_bytes, 1 << 16, kMost}},
      {"max-in-flight-bytes", {config.max_in_flight_bytes, config.max_request_bytes, kMost}},
      {"max-queue", {config.max_queue, 0, 1 << 20}},
      {"max-streams", {config.max_streams, 1, 1 << 20}},
      {"max-chunk-bytes", {config.max_chunk_bytes, 4096, 3 << 20}},
      // Room for the fields around the data, and for Begin.
      {"max-message-bytes",
       {config.max_message_bytes, config.max_chunk_bytes + (1 << 16), 64 << 20}},
      {"max-total-tensors", {config.max_total_tensors, 8, 1 << 20}},
      {"max-profiles", {config.max_profiles, 0, 1 << 16}},
      {"max-sessions", {config.max_sessions, 0, 1 << 20}},
      {"session-device-memory", {config.session_device_bytes, 0, kMost}},
      {"session-host-memory", {config.session_host_bytes, 0, kMost}},
      {"tenant-session-bytes", {config.tenant_session_bytes, 0, kMost}},
      {"max-regions", {config.max_regions, 0, 1 << 16}},
  };
  for (const auto& [name, range] : ranges) {
    if (absl::Status status = CheckRange(name, range[0], range[1], range[2]); !status.ok()) {
      return status;
    }
  }
  if (absl::Status status = CheckAddress("listen", config.listen); !status.ok()) return status;
  if (absl::Status status = CheckAddress("metrics-listen", config.metrics_listen); !status.ok()) {
    return status;
  }
  if (config.listen.empty() && config.unix_socket.empty()) {
    return absl::InvalidArgumentError("options listen and unix-socket are both empty");
  }
  if (!config.devices.empty()) {
    if (config.device != 0) {
      return absl::InvalidArgumentError("options device and devices are both set");
    }
    if (const auto devices = ParseDevices(config.devices); !devices.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("option devices is '", config.devices, "'; ", devices.status().message()));
    }
  }
  if (config.unix_socket.size() > 107) {
    return absl::InvalidArgumentError(absl::StrCat(
        "option unix-socket has ", config.unix_socket.size(), " bytes; must have at most 107"));
  }
  if (config.region_socket.size() > 107) {
    return absl::InvalidArgumentError(absl::StrCat(
        "option region-socket has ", config.region_socket.size(), " bytes; must have at most 107"));
  }
  if (!config.region_socket.empty() && config.regions != "shm" && config.regions != "all") {
    return absl::InvalidArgumentError(
        absl::StrCat("option region-socket is set; option regions is '", config.regions,
                     "' and must be shm or all"));
  }
  if (config.backend != "auto" && config.backend != "cpu" && config.backend != "cuda") {
    return absl::InvalidArgumentError(
        absl::StrCat("option backend is '", config.backend, "'; must be auto, cpu or cuda"));
  }
  if (config.regions != "none" && config.regions != "shm" && config.regions != "cuda-ipc" &&
      config.regions != "all") {
    return absl::InvalidArgumentError(absl::StrCat("option regions is '", config.regions,
                                                   "'; must be none, shm, cuda-ipc or all"));
  }
  if (config.log_level != "debug" && config.log_level != "info" && config.log_level != "warning" &&
      config.log_level != "error") {
    return absl::InvalidArgumentError(absl::StrCat("option log-level is '", config.log_level,
                                                   "'; must be debug, info, warning or error"));
  }
  return absl::OkStatus();
}

}  // namespace dynsplit

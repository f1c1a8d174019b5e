// SPDX-License-Identifier: Apache-2.0
//
// The devices of a server. Each has its backend, its threads and its share of memory; a request
// runs on one of them, and a session stays with one for good.
//
//     new request ──► the device of its memory, if that is some device's own; else the working one
//                     with most free memory ──► that device's admission ──► its executor
//     session's later calls ──► its device
//     a fault ──► the device is out: its requests fail with DEVICE_FAULT, its sessions are lost;
//                 the others go on
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/pipeline/backend.h"
#include "server/runtime/admission.h"
#include "server/runtime/executor.h"
#include "server/runtime/metrics.h"
#include "server/runtime/regions.h"
#include "server/runtime/select_batcher.h"

namespace dynsplit {

// Thread-safe.
class Device {
 public:
  struct Options {
    int32_t num_workers = 2;  // layers computed at a time
    Admission::Options admission;
  };
  // References outlive the device. `name` tells it from the others, for people and metrics.
  static absl::StatusOr<std::unique_ptr<Device>> Create(const Options& options, std::string name,
                                                        Backend& backend,
                                                        const RegionStore& regions,
                                                        Metrics& metrics);

  const std::string& name() const { return name_; }
  Backend& backend() { return backend_; }
  const Backend& backend() const { return backend_; }
  Admission& admission() { return admission_; }
  Executor& executor() { return *executor_; }
  SelectBatcher& selects() { return *selects_; }  // of decode steps only

  int64_t capacity_bytes() const { return capacity_bytes_; }  // of admission
  // Memory that is neither in use nor reserved; may be negative, as what is reserved is soon in
  // use.
  int64_t free_bytes() const;
  Metrics::LiveDevice live() const;

 private:
  Device(const Options& options, std::string name, Backend& backend)
      : name_(std::move(name)),
        backend_(backend),
        capacity_bytes_(options.admission.capacity_bytes),
        admission_(options.admission) {}

  const std::string name_;
  Backend& backend_;
  const int64_t capacity_bytes_;
  Admission admission_;
  // Go first: their jobs use the rest.
  std::unique_ptr<SelectBatcher> selects_;
  std::unique_ptr<Executor> executor_;
};

// Thread-safe.
class DeviceSet {
 public:
  struct Options {
    int32_t num_workers = 2;          // of each device
    int64_t max_request_bytes = 0;    // what each device must be able to admit
    int64_t max_in_flight_bytes = 0;  // of all devices, in equal shares
    int32_t max_queue = 64;           // of each device
    absl::Duration queue_timeout = absl::Seconds(30);
  };
  // Requires: at least one backend. References outlive the set.
  static absl::StatusOr<std::unique_ptr<DeviceSet>> Create(const Options& options,
                                                           std::span<Backend* const> backends,
                                                           const RegionStore& regions,
                                                           Metrics& metrics);

  std::span<const std::unique_ptr<Device>> all() const { return devices_; }
  // Requires: one of the set's.
  Device& Of(const Backend& backend) const;
  // The working device with most free memory, the first of equals; the first where none works.
  Device& Place() const;
  // OK while one device works; then the first one's fault.
  absl::Status Healthy() const;
  // Of all devices; see Admission::Drain.
  void Drain(int64_t retry_after_ms);

 private:
  explicit DeviceSet(std::vector<std::unique_ptr<Device>> devices) : devices_(std::move(devices)) {}

  const std::vector<std::unique_ptr<Device>> devices_;
};

}  // namespace dynsplit

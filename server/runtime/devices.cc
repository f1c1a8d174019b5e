// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/devices.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace dynsplit {

absl::StatusOr<std::unique_ptr<Device>> Device::Create(const Options& options, std::string name,
                                                       Backend& backend, const RegionStore& regions,
                                                       Metrics& metrics) {
  std::unique_ptr<Device> device(new Device(options, std::move(name), backend));
  absl::StatusOr<std::unique_ptr<SelectBatcher>> selects =
      SelectBatcher::Create(backend, regions, metrics);
  if (!selects.ok()) return selects.status();
  device->selects_ = *std::move(selects);
  absl::StatusOr<std::unique_ptr<Executor>> executor =
      Executor::Create(backend, options.num_workers);
  if (!executor.ok()) return executor.status();
  device->executor_ = *std::move(executor);
  return device;
}

int64_t Device::free_bytes() const {
  return backend_.info().memory_bytes - backend_.device_bytes_in_use() -
         admission_.reserved_bytes();
}

Metrics::LiveDevice Device::live() const {
  return {.name = name_,
          .reserved_bytes = admission_.reserved_bytes(),
          .queue_depth = admission_.queue_depth(),
          .device_bytes = backend_.device_bytes_in_use(),
          .host_bytes = backend_.host_bytes_in_use(),
          .healthy = backend_.Healthy().ok()};
}

absl::StatusOr<std::unique_ptr<DeviceSet>> DeviceSet::Create(const Options& options,
                                                             std::span<Backend* const> backends,
                                                             const RegionStore& regions,
                                                             Metrics& metrics) {
  const int64_t share = options.max_in_flight_bytes / static_cast<int64_t>(backends.size());
  const Device::Options each = {
      .num_workers = options.num_workers,
      .admission = {.capacity_bytes = std::max(share, options.max_request_bytes),
                    .max_queue = options.max_queue,
                    .queue_timeout = options.queue_timeout}};
  std::vector<std::unique_ptr<Device>> devices;
  for (Backend* backend : backends) {
    std::string name = backend->info().device;
    if (backends.size() > 1) name = absl::StrCat(devices.size(), ": ", name);
    absl::StatusOr<std::unique_ptr<Device>> device =
        Device::Create(each, std::move(name), *backend, regions, metrics);
    if (!device.ok()) return device.status();
    devices.push_back(*std::move(device));
  }
  return std::unique_ptr<DeviceSet>(new DeviceSet(std::move(devices)));
}

Device& DeviceSet::Of(const Backend& backend) const {
  return **std::find_if(devices_.begin(), devices_.end(),
                        [&](const auto& device) { return &device->backend() == &backend; });
}

Device& DeviceSet::Place() const {
  Device* best = nullptr;
  int64_t most = 0;
  for (const std::unique_ptr<Device>& device : devices_) {
    if (!device->backend().Healthy().ok()) continue;
    const int64_t bytes = device->free_bytes();
    if (best != nullptr && bytes <= most) continue;
    best = device.get();
    most = bytes;
  }
  return best == nullptr ? *devices_.front() : *best;
}

absl::Status DeviceSet::Healthy() const {
  absl::Status first;
  for (const std::unique_ptr<Device>& device : devices_) {
    absl::Status status = device->backend().Healthy();
    if (status.ok()) return status;
    first.Update(status);
  }
  return first;
}

void DeviceSet::Drain(int64_t retry_after_ms) {
  for (const std::unique_ptr<Device>& device : devices_) device->admission().Drain(retry_after_ms);
}

}  // namespace dynsplit

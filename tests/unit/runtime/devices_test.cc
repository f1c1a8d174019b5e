// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/devices.h"

#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "server/cpu/cpu_backend.h"
#include "server/pipeline/errors.h"
#include "tests/unit/runtime/hooked_backend.h"

namespace dynsplit {
namespace {

constexpr int64_t kMemoryBytes = int64_t{64} << 20;

class DeviceSetTest : public testing::Test {
 protected:
  void Start(int num_devices, DeviceSet::Options options) {
    std::vector<Backend*> backends;
    for (int i = 0; i < num_devices; ++i) {
      backends_.push_back(std::make_unique<HookedBackend>(
          *CreateCpuBackend({.num_threads = 1, .memory_limit_bytes = kMemoryBytes})));
      backends.push_back(backends_.back().get());
      streams_.push_back(*backends_.back()->CreateStream());
    }
    regions_ = std::make_unique<RegionStore>(RegionStore::Options{}, backends);
    devices_ = *DeviceSet::Create(options, backends, *regions_, metrics_);
  }
  // The device's number.
  size_t Place() const {
    for (size_t i = 0; i < backends_.size(); ++i) {
      if (&devices_->Place().backend() == backends_[i].get()) return i;
    }
    ADD_FAILURE();
    return 0;
  }
  void Break(size_t i) {
    backends_[i]->SetHook([](std::string_view) { return DeviceFault(); });
    std::byte from{}, to{};
    EXPECT_FALSE(backends_[i]->Copy(&to, &from, 1, *streams_[i]).ok());
  }

  std::vector<std::unique_ptr<HookedBackend>> backends_;
  std::vector<std::unique_ptr<Stream>> streams_;
  Metrics metrics_{"test", "cpu", "test"};
  std::unique_ptr<RegionStore> regions_;
  std::unique_ptr<DeviceSet> devices_;
};

TEST_F(DeviceSetTest, PlacesWhereMostMemoryIsNeitherUsedNorReserved) {
  Start(3, {.max_request_bytes = 1 << 20, .max_in_flight_bytes = 96 << 20});
  EXPECT_EQ(Place(), 0U) << "the first of equals";
  Buffer used = *backends_[0]->Allocate(8 << 20, *streams_[0]);
  EXPECT_EQ(Place(), 1U);
  Reservation reserved;
  devices_->all()[1]->admission().Request(
      "a", 16 << 20, absl::InfiniteFuture(),
      [&](absl::StatusOr<Reservation> got) { reserved = *std::move(got); });
  EXPECT_EQ(reserved.bytes(), 16 << 20);
  EXPECT_EQ(Place(), 2U);
  Buffer more = *backends_[2]->Allocate(12 << 20, *streams_[2]);
  EXPECT_EQ(Place(), 0U);
  used.Reset();
  reserved.Release();
  EXPECT_EQ(Place(), 0U);
}

TEST_F(DeviceSetTest, FaultyDevicesAreOut) {
  Start(2, {.max_request_bytes = 1 << 20, .max_in_flight_bytes = 64 << 20});
  EXPECT_EQ(devices_->all()[0]->name().substr(0, 3), "0: ");
  Break(0);
  EXPECT_EQ(Place(), 1U);
  EXPECT_TRUE(devices_->Healthy().ok());
  EXPECT_FALSE(devices_->all()[0]->live().healthy);
  EXPECT_TRUE(devices_->all()[1]->live().healthy);
  Break(1);
  EXPECT_EQ(GetErrorDetails(devices_->Healthy()).type, "DEVICE_FAULT");
  EXPECT_EQ(Place(), 0U) << "whose fault the request is told";
}

TEST_F(DeviceSetTest, ShareTheBudgetButEachAdmitsTheLargestRequest) {
  Start(2, {.max_request_bytes = 1 << 20, .max_in_flight_bytes = 64 << 20});
  EXPECT_EQ(devices_->all()[1]->capacity_bytes(), 32 << 20);
  devices_ = nullptr;
  backends_.clear();
  streams_.clear();
  Start(4, {.max_request_bytes = 24 << 20, .max_in_flight_bytes = 64 << 20});
  EXPECT_EQ(devices_->all()[3]->capacity_bytes(), 24 << 20);
  devices_ = nullptr;
  backends_.clear();
  streams_.clear();
  Start(1, {.max_request_bytes = 1 << 20, .max_in_flight_bytes = 64 << 20});
  EXPECT_EQ(devices_->all()[0]->capacity_bytes(), 64 << 20);
  EXPECT_EQ(devices_->all()[0]->name(), backends_[0]->info().device);
}

TEST_F(DeviceSetTest, JobsRunOnTheirDevice) {
  Start(2, {.max_request_bytes = 1 << 20, .max_in_flight_bytes = 64 << 20});
  for (const std::unique_ptr<Device>& device : devices_->all()) {
    EXPECT_EQ(&devices_->Of(device->backend()), device.get());
    absl::Notification done;
    const Backend* ran_on = nullptr;
    device->executor().Submit([&](Backend& backend, Stream& /*stream*/) {
      ran_on = &backend;
      done.Notify();
    });
    done.WaitForNotification();
    EXPECT_EQ(ran_on, &device->backend());
  }
}

}  // namespace
}  // namespace dynsplit

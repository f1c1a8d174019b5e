// SPDX-License-Identifier: Apache-2.0
//
// What benchmarks of the CUDA operations share: a device, ceilings measured in the same run, times
// by device events, random inputs. Any error ends the program.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cuda/device_memory.h"
#include "cuda/operations.h"

namespace dynsplit::bench {

void Check(const absl::Status& status);
void Check(cudaError_t error);
template <typename T>
T Check(absl::StatusOr<T> value) {
  Check(value.status());
  return *std::move(value);
}

struct Device {
  std::shared_ptr<StreamHandle> stream;
  std::shared_ptr<DevicePool> pool;
  kernels::Launch launch;

  Buffer Allocate(int64_t bytes) const { return Check(pool->Allocate(bytes, stream)); }
};
// Device 0; prints what it is.
Device OpenDevice();

struct Ceilings {
  double copy_gbps = 0;  // bytes read + written
  double read_gbps = 0;
  double host_gbps = 0;  // pinned host memory to the device
};
// Prints them.
Ceilings MeasureCeilings(const Device& device);

// Median milliseconds of `run(repeat)`, from an idle stream.
double Time(const Device& device, const std::function<void(int)>& run);

// Median milliseconds of `run(repeat)` behind a read of more memory than the L2 cache holds: inputs
// come from memory, and the host enqueues while the device reads.
class ColdTimer {
 public:
  explicit ColdTimer(const Device& device);
  double Time(const std::function<void(int)>& run) const;

 private:
  const Device& device_;
  Buffer flush_;
};

// Random normal bf16 values. The host makes a block; the device repeats it at shifted offsets.
class RandomSource {
 public:
  explicit RandomSource(const Device& device);
  Buffer Make(int64_t bytes);

 private:
  const Device& device_;
  Buffer block_;
  int64_t next_ = 0;
};

Buffer UploadBytes(const Device& device, const void* data, int64_t bytes);
template <typename T>
Buffer Upload(const Device& device, const std::vector<T>& values) {
  return UploadBytes(device, values.data(), static_cast<int64_t>(values.size() * sizeof(T)));
}

}  // namespace dynsplit::bench

// SPDX-License-Identifier: Apache-2.0
//
// The CUDA implementation of Backend. No CUDA header is needed to include this file.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "server/pipeline/backend.h"

namespace dynsplit {

struct CudaOptions {
  int device = 0;
  int64_t memory_limit_bytes = 0;  // of device memory in live buffers; 0 = 90 % of what is free
  int64_t pinned_limit_bytes = 0;  // of pinned host memory, cached or in use; 0 = all the host has
};

// Devices that this process can use; 0 where there is no driver.
int CudaDeviceCount();

// Buffers and streams may outlive the backend. A buffer is freed in the order of the stream it was
// allocated on: whoever uses it on another stream synchronises that stream first.
// NOT_FOUND without such a device; INTERNAL (DEVICE_FAULT) where the driver refuses;
// UNIMPLEMENTED (DEVICE_UNSUPPORTED) for devices older than compute capability 8.0 or without
// memory pools.
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaOptions& options);

}  // namespace dynsplit

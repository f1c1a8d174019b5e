// SPDX-License-Identifier: Apache-2.0
//
// CUDA errors as absl::Status. Every CUDA call's result goes through here.
#pragma once

#include <cuda_runtime_api.h>

#include <string_view>

#include "absl/status/status.h"

namespace dynsplit {

// OK, or INTERNAL with reason DEVICE_FAULT: "<call>: <CUDA's name and description>".
absl::Status CudaStatus(cudaError_t error, std::string_view call);

// Error of the launch just made (and of earlier asynchronous work, should one have surfaced).
absl::Status LaunchStatus(std::string_view kernel);

// Status of a call that may fail on its arguments without harm to the device; clears the runtime's
// record of the error. DEVICE_FAULT only where the device is indeed unusable, RESOURCE_EXHAUSTED
// for want of memory, UNIMPLEMENTED where the platform cannot, else `code`.
absl::Status RefusalStatus(cudaError_t error, std::string_view call, absl::StatusCode code);

bool IsDeviceFault(const absl::Status& status);

}  // namespace dynsplit

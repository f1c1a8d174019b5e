// SPDX-License-Identifier: Apache-2.0
#include "cuda/cuda_status.h"

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

constexpr int64_t kRetryAfterMs = 100;

std::string Describe(cudaError_t error, std::string_view call) {
  return absl::StrCat(absl::string_view(call.data(), call.size()), ": ", cudaGetErrorName(error),
                      ", ", cudaGetErrorString(error));
}

}  // namespace

absl::Status CudaStatus(cudaError_t error, std::string_view call) {
  if (error == cudaSuccess) return absl::OkStatus();
  return WithReason(absl::StatusCode::kInternal, "DEVICE_FAULT", Describe(error, call));
}

absl::Status RefusalStatus(cudaError_t error, std::string_view call, absl::StatusCode code) {
  if (error == cudaSuccess) return absl::OkStatus();
  (void)cudaGetLastError();
  // Errors that a device does not recover from come back from every call.
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  absl::Status device = CudaStatus(cudaMemGetInfo(&free_bytes, &total_bytes), call);
  if (!device.ok()) return device;
  const std::string problem = Describe(error, call);
  if (error == cudaErrorMemoryAllocation) {
    return RetryLater(absl::StatusCode::kResourceExhausted, problem, kRetryAfterMs);
  }
  if (error == cudaErrorNotSupported) {
    return WithReason(absl::StatusCode::kUnimplemented, "DEVICE_UNSUPPORTED", problem);
  }
  return absl::Status(code, problem);
}

absl::Status LaunchStatus(std::string_view kernel) {
  return CudaStatus(cudaGetLastError(), kernel);
}

bool IsDeviceFault(const absl::Status& status) {
  return absl::IsInternal(status) && GetErrorDetails(status).type == "DEVICE_FAULT";
}

}  // namespace dynsplit

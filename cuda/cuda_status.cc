// SPDX-License-Identifier: Apache-2.0
#include "cuda/cuda_status.h"

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"

namespace dynsplit {

absl::Status CudaStatus(cudaError_t error, std::string_view call) {
  if (error == cudaSuccess) return absl::OkStatus();
  return WithReason(absl::StatusCode::kInternal, "DEVICE_FAULT",
                    absl::StrCat(absl::string_view(call.data(), call.size()), ": ",
                                 cudaGetErrorName(error), ", ", cudaGetErrorString(error)));
}

absl::Status LaunchStatus(std::string_view kernel) {
  return CudaStatus(cudaGetLastError(), kernel);
}

bool IsDeviceFault(const absl::Status& status) {
  return absl::IsInternal(status) && GetErrorDetails(status).type == "DEVICE_FAULT";
}

}  // namespace dynsplit

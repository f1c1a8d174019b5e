// SPDX-License-Identifier: Apache-2.0
//
// Kernels whose thread blocks may be scheduled while the grid before them in the stream still runs
// (programmatic dependent launch, since 9.0), which hides the time of the launch.
#pragma once

#include <cuda_runtime_api.h>

namespace dynsplit::kernels {

// Lets a dependent grid be scheduled as soon as all thread blocks of this one have begun; it still
// waits for this grid's end.
__device__ inline void AllowDependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Until everything before this grid in the stream has ended, whatever it was. What is launched by
// LaunchDependent calls it in every thread block, before its first access to global memory.
__device__ inline void WaitForEarlierGrids() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

template <typename Batch>
cudaError_t LaunchDependent(cudaLaunchConfig_t config, void (*kernel)(Batch), const Batch& batch) {
  int device = 0;
  int major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, batch);
}

}  // namespace dynsplit::kernels

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

// Thread blocks that may work together on the current device.
inline int ClusterLimit() {
  constexpr int kPortable = 8;
  int device = 0;
  int major = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess;
  return known && major >= 9 ? kPortable : 1;
}

// `cluster` thread blocks along x work together; at most ClusterLimit(), and divides gridDim.x.
template <typename Batch>
cudaError_t LaunchDependent(cudaLaunchConfig_t config, void (*kernel)(Batch), const Batch& batch,
                            int cluster = 1) {
  int device = 0;
  int major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = attributes;
  config.numAttrs = major < 9 ? 0 : cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, batch);
}

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// Thread blocks that work on one problem together: a cluster, which reads each other's shared
// memory (since 9.0), or one thread block, for which the same code holds.
#pragma once

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#include <cooperative_groups.h>
#endif

namespace dynsplit::kernels {

// The thread blocks of a cluster, or this one alone. All threads of all of them call Sync, Arrive
// and Wait alike. Requires: a thread block does not end while others read its shared memory.
struct Team {
  int rank = 0;
  int size = 1;

  __device__ static Team OfCluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    return {static_cast<int>(cluster.block_rank()), static_cast<int>(cluster.num_blocks())};
#else
    return {};
#endif
  }
  __device__ void Sync() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (size > 1) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    __syncthreads();
  }
  // Sync in two halves; nothing of the others is read after Arrive.
  __device__ void Arrive() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (size > 1) cooperative_groups::this_cluster().barrier_arrive();
#endif
  }
  __device__ void Wait() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (size > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
  }
  // Where the thread block of that rank has what this one has at `shared`.
  template <typename T>
  __device__ const T* At(const T* shared, int of_rank) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (size > 1) {
      return cooperative_groups::this_cluster().map_shared_rank(const_cast<T*>(shared), of_rank);
    }
#endif
    (void)of_rank;
    return shared;
  }
};

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
//
// AttendTokens on memory that the caller provides: what the backend's operation and the engine
// library (cuda/engine) share. Enqueues kernels only, so that streams may be captured into graphs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "server/pipeline/backend.h"

namespace dynsplit::kernels {

// Shapes that are equal in all items.
struct AttendShape {
  int32_t num_query_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
};
// Workspace that suffices for so many items, whatever their rows. Calls on one stream may share it.
int64_t AttendWorkspaceBytes(const AttendShape& shape, int64_t num_items, int num_sms);

// Requires: `workspace` is 256-byte aligned device memory of AttendWorkspaceBytes.
cudaError_t AttendTokensIn(const AttendTokensParams& params, int num_sms, void* workspace,
                           cudaStream_t stream);

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
#include "cuda/attend_tokens.h"

#include "cuda/cuda_status.h"
#include "cuda/operations.h"

namespace dynsplit::kernels {

absl::Status AttendTokens(const AttendTokensParams& params, const Launch& launch) {
  if (params.items.empty()) return absl::OkStatus();
  const AttendTokensItem& first = params.items[0];
  const AttendShape shape = {.num_query_heads = first.queries.num_heads,
                             .num_kv_heads = first.keys.num_heads,
                             .head_dim = first.queries.head_dim};
  absl::StatusOr<Buffer> workspace = launch.Scratch(
      AttendWorkspaceBytes(shape, static_cast<int64_t>(params.items.size()), launch.num_sms));
  if (!workspace.ok()) return workspace.status();
  return CudaStatus(AttendTokensIn(params, launch.num_sms, workspace->data(), launch.stream),
                    "AttendTokens");
}

}  // namespace dynsplit::kernels

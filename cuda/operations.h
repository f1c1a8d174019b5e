// SPDX-License-Identifier: Apache-2.0
//
// The operations of Backend as functions, one .cu file each. Each enqueues kernels and returns;
// scratch memory comes from the pool in stream order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cuda/device_memory.h"
#include "server/pipeline/backend.h"

namespace dynsplit::kernels {

// Where an operation runs.
struct Launch {
  cudaStream_t stream = nullptr;
  int num_sms = 0;
  int64_t max_shared_bytes = 0;  // a block's dynamic shared memory, after opting in
  DevicePool* pool = nullptr;
  std::shared_ptr<StreamHandle> handle;  // of `stream`

  absl::StatusOr<Buffer> Scratch(int64_t size_bytes) const {
    return pool->Allocate(size_bytes, handle);
  }
};

absl::Status ScoreWindow(const ScoreWindowParams& params, const Launch& launch);
absl::Status ScoreKeys(const ScoreKeysParams& params, const Launch& launch);
absl::Status ReduceRows(const ReduceRowsParams& params, const Launch& launch);
absl::Status ReduceBlocks(const ReduceBlocksParams& params, const Launch& launch);
absl::Status SummarizeBlocks(const SummarizeBlocksParams& params, const Launch& launch);
absl::Status ScoreBlocks(const ScoreBlocksParams& params, const Launch& launch);
absl::Status ScoreTokens(const ScoreTokensParams& params, const Launch& launch);
absl::Status SelectTokens(const SelectTokensParams& params, const Launch& launch);
absl::Status GatherPages(const GatherPagesParams& params, const Launch& launch);
absl::Status MeasureAttention(const MeasureAttentionParams& params, const Launch& launch);
absl::Status MeasureSpans(const MeasureSpansParams& params, const Launch& launch);
absl::Status CheckFinite(const CheckFiniteParams& params, const Launch& launch);
absl::Status SelectBlocks(const SelectBlocksParams& params, const Launch& launch);
absl::Status AttendTokens(const AttendTokensParams& params, const Launch& launch);
absl::Status RefreshRows(const RefreshRowsParams& params, const Launch& launch);
absl::Status SegmentTokens(const SegmentTokensParams& params, const Launch& launch);

}  // namespace dynsplit::kernels

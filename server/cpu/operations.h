// SPDX-License-Identifier: Apache-2.0
//
// The operations of Backend as functions; <operation>.cc each.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/cpu/memory_pool.h"
#include "server/cpu/thread_pool.h"
#include "server/pipeline/backend.h"

namespace dynsplit::cpu {

// What an operation runs on.
struct Workspace {
  ThreadPool& threads;
  MemoryPool& memory;

  // Uninitialised scratch; counts as device memory while it lives.
  template <typename T>
  absl::StatusOr<Buffer> Scratch(int64_t count) const {
    return memory.Allocate(count * static_cast<int64_t>(sizeof(T)), MemoryPool::Kind::kDevice);
  }
};

absl::Status ScoreWindow(const ScoreWindowParams& params, const Workspace& workspace);
absl::Status ScoreKeys(const ScoreKeysParams& params, const Workspace& workspace);
absl::Status ReduceRows(const ReduceRowsParams& params, const Workspace& workspace);
absl::Status ReduceBlocks(const ReduceBlocksParams& params, const Workspace& workspace);
absl::Status SummarizeBlocks(const SummarizeBlocksParams& params, const Workspace& workspace);
absl::Status ScoreBlocks(const ScoreBlocksParams& params, const Workspace& workspace);
absl::Status ScoreTokens(const ScoreTokensParams& params, const Workspace& workspace);
absl::Status SelectTokens(const SelectTokensParams& params, const Workspace& workspace);
absl::Status GatherPages(const GatherPagesParams& params, const Workspace& workspace);
absl::Status MeasureAttention(const MeasureAttentionParams& params, const Workspace& workspace);
absl::Status MeasureSpans(const MeasureSpansParams& params, const Workspace& workspace);
absl::Status CheckFinite(const CheckFiniteParams& params, const Workspace& workspace);
absl::Status SelectBlocks(const SelectBlocksParams& params, const Workspace& workspace);
absl::Status AttendTokens(const AttendTokensParams& params, const Workspace& workspace);
absl::Status RefreshRows(const RefreshRowsParams& params, const Workspace& workspace);
absl::Status SegmentTokens(const SegmentTokensParams& params, const Workspace& workspace);

}  // namespace dynsplit::cpu

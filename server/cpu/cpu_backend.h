// SPDX-License-Identifier: Apache-2.0
//
// The Backend on host memory. Operations run on the calling thread and a pool shared by all
// streams; they are complete when they return. Every result is bitwise the same for any number of
// threads: work is cut into pieces of fixed size and partial sums are added in piece order.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "server/pipeline/backend.h"

namespace dynsplit {

struct CpuOptions {
  int num_threads = 0;             // of one operation, the caller's included; 0 = all processors
  int64_t memory_limit_bytes = 0;  // buffers and scratch together; 0 = unlimited
};

// INVALID_ARGUMENT for negative options.
absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuOptions& options);

}  // namespace dynsplit

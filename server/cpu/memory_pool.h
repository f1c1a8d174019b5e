// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/pipeline/backend.h"

namespace dynsplit::cpu {

// Aligned host memory that is kept for reuse when freed: touching fresh pages costs several times
// what copying into warm ones does. Blocks come in size classes, four to a doubling, so that at
// most a quarter of a block is slack.
//
// The limit is on bytes asked for by live buffers; kept blocks are given back to the system first
// where live and kept ones together would pass it.
// Thread safety: all methods may be called concurrently. Buffers keep the pool alive.
class MemoryPool : public std::enable_shared_from_this<MemoryPool> {
 public:
  enum class Kind : uint8_t { kDevice, kHost };
  static constexpr int64_t kAlignment = 256;

  // limit_bytes 0 = unlimited.
  static std::shared_ptr<MemoryPool> Create(int64_t limit_bytes);
  ~MemoryPool();
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  // RESOURCE_EXHAUSTED beyond the limit or when the system has none; INVALID_ARGUMENT if negative.
  absl::StatusOr<Buffer> Allocate(int64_t size_bytes, Kind kind);
  // The same for memory that stays: no slack, and back to the system when freed.
  absl::StatusOr<Buffer> AllocateExact(int64_t size_bytes, Kind kind);

  int64_t bytes_in_use(Kind kind) const {
    return in_use_[static_cast<size_t>(kind)].load(std::memory_order_relaxed);
  }

 private:
  static constexpr int kNumClasses = 4 * 44;  // 256 bytes to 4 PiB
  explicit MemoryPool(int64_t limit_bytes) : limit_bytes_(limit_bytes) {}

  static int ClassOf(int64_t size_bytes);
  static int64_t ClassBytes(int size_class);
  // Counts the bytes as in use, if the limit allows.
  absl::Status Reserve(int64_t size_bytes, Kind kind) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Memory from the system for what is reserved; without any, the reservation is gone.
  absl::StatusOr<std::byte*> NewReserved(int64_t block_bytes, int64_t size_bytes, Kind kind);
  void Free(std::byte* data, int64_t size_bytes, int size_class, Kind kind);
  // Returns kept blocks to the system until at most `target_bytes` are kept, largest first.
  void Trim(int64_t target_bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Until kept and live blocks together are within the limit.
  void TrimToLimit() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const int64_t limit_bytes_;
  std::array<std::atomic<int64_t>, 2> in_use_ = {};
  absl::Mutex mu_;
  std::array<std::vector<std::byte*>, kNumClasses> kept_ ABSL_GUARDED_BY(mu_);
  int64_t kept_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace dynsplit::cpu

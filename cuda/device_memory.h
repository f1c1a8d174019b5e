// SPDX-License-Identifier: Apache-2.0
//
// Owners of CUDA memory and streams. All classes are thread-safe; objects shared with live buffers
// stay alive until the last of those is gone, so owners may be destroyed in any order. Destructors
// ignore errors: at process exit the driver may be gone before them.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/pipeline/backend.h"

namespace dynsplit {

// Calls of this process that had the driver allocate: buffers in device memory, blocks of pinned
// memory. Neither grows while the caches have what is asked for.
struct DriverAllocations {
  int64_t device = 0;
  int64_t pinned = 0;
};
DriverAllocations CountDriverAllocations();

// A non-blocking stream, shared by the Stream object and the buffers that are freed in its order.
class StreamHandle {
 public:
  static absl::StatusOr<std::shared_ptr<StreamHandle>> Create(int device);
  ~StreamHandle();
  StreamHandle(const StreamHandle&) = delete;
  StreamHandle& operator=(const StreamHandle&) = delete;

  int device() const { return device_; }
  cudaStream_t get() const { return stream_; }

 private:
  StreamHandle(int device, cudaStream_t stream) : device_(device), stream_(stream) {}

  const int device_;
  const cudaStream_t stream_;
};

// Device memory, capped by the bytes in live buffers: stream-ordered from a pool of our own, or in
// allocations of their own.
//
// Blocks freed in the order of an attached stream stay with it, and what that stream allocates next
// takes them without a call of the driver: its work runs after the work that used them. They count
// as free; where live and kept bytes together would pass the cap, or the device has no more, they
// go back to the driver, which knows when another stream may have them.
class DevicePool : public std::enable_shared_from_this<DevicePool> {
 public:
  static absl::StatusOr<std::shared_ptr<DevicePool>> Create(int device, int64_t limit_bytes);
  ~DevicePool();
  DevicePool(const DevicePool&) = delete;
  DevicePool& operator=(const DevicePool&) = delete;

  // Keeps from now on what is freed in the order of `stream`, until Detach.
  void Attach(const std::shared_ptr<StreamHandle>& stream);
  // Gives back what is kept for it. No effect on streams that are not attached.
  void Detach(const std::shared_ptr<StreamHandle>& stream);

  // RESOURCE_EXHAUSTED beyond the cap, or when the device has no more.
  absl::StatusOr<Buffer> Allocate(int64_t size_bytes, std::shared_ptr<StreamHandle> stream);
  // An allocation of its own, that other processes may map; takes back what the pool has cached
  // where the device has no more. Freeing it waits for all work of the device (cudaFree). Takes
  // whole multiples of 2 MiB of the device, because a handle names all of the granules it touches.
  absl::StatusOr<Buffer> AllocateExclusive(int64_t size_bytes);
  // cudaIpcMemHandle_t of what AllocateExclusive returned, 64 bytes. INVALID_ARGUMENT for all else.
  absl::StatusOr<std::string> ExportHandle(const Buffer& buffer);
  // From now on `buffer` is freed in the order of `stream`, which uses it last. No effect on
  // buffers of others.
  void FreeOn(const Buffer& buffer, std::shared_ptr<StreamHandle> stream);

  int64_t limit_bytes() const { return limit_bytes_; }
  int64_t bytes_in_use() const { return in_use_bytes_.load(std::memory_order_relaxed); }
  // Most that were in use at a time since the last ResetPeak.
  int64_t peak_bytes() const { return peak_bytes_.load(std::memory_order_relaxed); }
  void ResetPeak() { peak_bytes_.store(bytes_in_use(), std::memory_order_relaxed); }
  int64_t bytes_kept() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Block {
    std::byte* data = nullptr;
    int64_t block_bytes = 0;
  };
  struct Owner {
    std::shared_ptr<StreamHandle> stream;
    int64_t block_bytes = 0;
  };
  // What is kept for a stream, by size.
  using Kept = std::multimap<int64_t, std::byte*>;

  DevicePool(int device, int64_t limit_bytes, cudaMemPool_t pool)
      : device_(device), limit_bytes_(limit_bytes), pool_(pool) {}
  absl::Status Reserve(int64_t size_bytes);
  void GiveBack(int64_t size_bytes) {
    in_use_bytes_.fetch_sub(size_bytes, std::memory_order_relaxed);
  }
  // A block of this size kept for the stream, or null data.
  Block TakeKept(int64_t block_bytes, const std::shared_ptr<StreamHandle>& stream)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Gives kept blocks back to the driver until at most `target_bytes` are kept.
  void Trim(int64_t target_bytes) ABSL_LOCKS_EXCLUDED(mu_);
  cudaError_t AllocateFromPool(void** data, int64_t size_bytes, cudaStream_t stream);
  cudaError_t AllocateFromDevice(void** data, int64_t size_bytes);
  void Free(std::byte* data, int64_t size_bytes);
  void FreeExclusive(std::byte* data, int64_t size_bytes);

  const int device_;
  const int64_t limit_bytes_;
  const cudaMemPool_t pool_;
  std::atomic<int64_t> in_use_bytes_ = 0;
  std::atomic<int64_t> peak_bytes_ = 0;
  mutable absl::Mutex mu_;
  absl::flat_hash_map<const std::byte*, Owner> owners_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<std::shared_ptr<StreamHandle>, Kept> kept_ ABSL_GUARDED_BY(mu_);  // attached
  int64_t kept_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  absl::flat_hash_set<const std::byte*> exclusive_ ABSL_GUARDED_BY(mu_);
};

// Pinned host memory, behind a cache of size classes for what comes and goes: pinning costs as much
// as copying, so blocks are pinned once and reused.
class PinnedCache : public std::enable_shared_from_this<PinnedCache> {
 public:
  // limit_bytes 0 = the host's physical memory.
  static std::shared_ptr<PinnedCache> Create(int device, int64_t limit_bytes);
  ~PinnedCache();
  PinnedCache(const PinnedCache&) = delete;
  PinnedCache& operator=(const PinnedCache&) = delete;

  absl::StatusOr<Buffer> Allocate(int64_t size_bytes);
  // Exactly this size, unpinned with the buffer. Against the same limit.
  absl::StatusOr<Buffer> AllocateExclusive(int64_t size_bytes);
  int64_t bytes_in_use() const { return in_use_bytes_.load(std::memory_order_relaxed); }

  // Size that a request is rounded up to: at most a quarter more, at least 4 KiB.
  static int64_t ClassBytes(int64_t size_bytes);

 private:
  PinnedCache(int device, int64_t limit_bytes) : device_(device), limit_bytes_(limit_bytes) {}
  absl::StatusOr<std::byte*> Take(int64_t class_bytes);
  void Return(std::byte* data, int64_t class_bytes);
  // Takes room under the limit, then pins; not under the lock, since pinning takes seconds a GiB.
  absl::StatusOr<std::byte*> Pin(int64_t size_bytes) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status ReservePinned(int64_t size_bytes) ABSL_LOCKS_EXCLUDED(mu_);
  void Unpin(std::byte* data, int64_t size_bytes) ABSL_LOCKS_EXCLUDED(mu_);
  void ReleaseFreeBlocks() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const int device_;
  const int64_t limit_bytes_;
  std::atomic<int64_t> in_use_bytes_ = 0;
  absl::Mutex mu_;
  std::map<int64_t, std::vector<std::byte*>> free_ ABSL_GUARDED_BY(mu_);
  int64_t pinned_bytes_ ABSL_GUARDED_BY(mu_) = 0;  // cached and in use
};

}  // namespace dynsplit

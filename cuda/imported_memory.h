// SPDX-License-Identifier: Apache-2.0
//
// Memory of others that the device reads and writes: allocations of other processes, and host
// memory mapped by this one. Counts against no cap: who made it pays for it. As in device_memory.h,
// owners may go in any order, and destructors ignore errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/pipeline/backend.h"

namespace dynsplit {

// Allocations of other processes, each mapped once however often it is imported. Thread-safe.
class ImportedMemory : public std::enable_shared_from_this<ImportedMemory> {
 public:
  explicit ImportedMemory(int device) : device_(device) {}
  ImportedMemory(const ImportedMemory&) = delete;
  ImportedMemory& operator=(const ImportedMemory&) = delete;

  // Backend::ImportHandle. Requires: the device is current.
  absl::StatusOr<Buffer> Import(std::string_view handle, int64_t offset_bytes, int64_t size_bytes);

 private:
  struct Mapping {
    std::byte* base = nullptr;
    int64_t size_bytes = 0;
    int64_t num_users = 0;
  };
  // Maps the allocation, or finds it mapped; its users are one more.
  absl::StatusOr<Mapping> Acquire(const std::string& handle) ABSL_LOCKS_EXCLUDED(mu_);
  void Release(const std::string& handle) ABSL_LOCKS_EXCLUDED(mu_);

  const int device_;
  absl::Mutex mu_;
  absl::flat_hash_map<std::string, Mapping> mappings_ ABSL_GUARDED_BY(mu_);  // by handle
};

// Backend::RegisterHost: pins mapped memory in place. Requires: `device` is current.
absl::StatusOr<Buffer> PinMapped(int device, std::byte* data, int64_t size_bytes);

}  // namespace dynsplit

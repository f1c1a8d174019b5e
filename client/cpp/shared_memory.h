// SPDX-License-Identifier: Apache-2.0
//
// POSIX shared memory that a caller fills, or lets the server fill, in place:
//
//     auto memory = dynsplit::SharedMemory::Create(bytes);
//     auto region = client->RegisterRegion((*memory)->Registration("step", /*writable=*/true));
//     tensor.region = dynsplit::SliceOf("step", region->generation(), offset);
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dynsplit/v1/memory.pb.h"
#include "dynsplit/v1/types.pb.h"

namespace dynsplit {

// Memory that only this user can open, mapped and zero: an object of a random name, which goes with
// the object of this class, or one without a name, passed to one server. A server that has
// registered it keeps its own mapping. Thread-compatible.
class SharedMemory {
 public:
  // RESOURCE_EXHAUSTED where the host has no room for so many bytes, INVALID_ARGUMENT for none.
  static absl::StatusOr<std::unique_ptr<SharedMemory>> Create(size_t size);
  // Without a name, sealed against resizing, passed over the server's side socket (its option
  // region-socket); to be registered within 30 seconds. UNAVAILABLE where nobody listens there,
  // FAILED_PRECONDITION with the server's words where it refuses.
  static absl::StatusOr<std::unique_ptr<SharedMemory>> CreateSealed(
      size_t size, const std::string& region_socket);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // As in PosixShm.key: without the leading '/'. Empty where it has no name.
  const std::string& key() const { return key_; }
  absl::Span<std::byte> bytes() { return {data_, size_}; }

  // Registers all of it under `name` with a server of this host.
  v1::RegisterRegionRequest Registration(const std::string& name, bool writable) const;

 private:
  SharedMemory(std::string key, std::string token, std::byte* data, size_t size)
      : key_(std::move(key)), token_(std::move(token)), data_(data), size_(size) {}

  const std::string key_;    // or
  const std::string token_;  // as in MemFd
  std::byte* const data_;
  const size_t size_;
};

// Names the bytes from `offset_bytes` on of a registered region.
v1::RegionSlice SliceOf(const std::string& name, uint64_t generation, int64_t offset_bytes);

// The bytes of a result that lies in a region (Begin.output), where `region` is all of it as this
// process has it mapped. Empty where the tensor lies elsewhere.
absl::Span<const std::byte> PlacedBytes(const v1::TensorDescriptor& tensor,
                                        absl::Span<const std::byte> region);

}  // namespace dynsplit

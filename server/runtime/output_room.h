// SPDX-License-Identifier: Apache-2.0
//
// Where a request's results go instead of into its stream: a part of a region, filled from its
// begin on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/pipeline/backend.h"
#include "server/runtime/regions.h"

namespace dynsplit {

// Thread-safe.
class OutputRoom {
 public:
  static constexpr int64_t kAlignmentBytes = 256;
  static constexpr int64_t Aligned(int64_t bytes) {
    return (bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
  }

  // `begin` names where `part` begins. `enough_bytes`: what no result exceeds, for errors.
  OutputRoom(RegionName begin, RegionPart part, int64_t size_bytes, int64_t enough_bytes)
      : begin_(std::move(begin)),
        part_(std::move(part)),
        size_bytes_(size_bytes),
        enough_bytes_(enough_bytes) {}

  // Room for one tensor, aligned; no owner: valid while this object is. INVALID_ARGUMENT where none
  // is left.
  absl::StatusOr<Buffer> Take(int64_t size_bytes);

  bool on_device() const { return part_.region->kind() == Region::Kind::kDevice; }
  bool Holds(const std::byte* data) const {
    return data >= part_.data && data < part_.data + size_bytes_;
  }
  // Requires: Holds(data).
  RegionName NameOf(const std::byte* data) const;

 private:
  // Constant after construction.
  const RegionName begin_;
  const RegionPart part_;
  const int64_t size_bytes_;
  const int64_t enough_bytes_;

  absl::Mutex mu_;
  int64_t taken_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace dynsplit

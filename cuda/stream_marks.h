// SPDX-License-Identifier: Apache-2.0
//
// Moments on a stream by the host's clock: a ring of events, and one event whose host time is
// known.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cuda/device_memory.h"
#include "server/pipeline/backend.h"

namespace dynsplit {

// Mark and TimeOf of Stream. Not thread-safe. Requires: the stream's device is current.
class StreamMarks {
 public:
  // Waits for the stream.
  static absl::StatusOr<std::unique_ptr<StreamMarks>> Create(std::shared_ptr<StreamHandle> stream);
  ~StreamMarks();
  StreamMarks(const StreamMarks&) = delete;
  StreamMarks& operator=(const StreamMarks&) = delete;

  // `mark` counts up. Where the clocks were set long ago and the stream has nothing to do, sets
  // them first, which takes as long as one empty launch.
  absl::Status Record(int64_t mark);
  Stream::Clock::time_point TimeOf(int64_t mark) const;

 private:
  explicit StreamMarks(std::shared_ptr<StreamHandle> stream) : stream_(std::move(stream)) {}
  absl::Status Calibrate();
  cudaEvent_t Event(int64_t mark) const {
    return events_[static_cast<size_t>(mark % Stream::kMaxMarks)];
  }

  const std::shared_ptr<StreamHandle> stream_;
  std::array<cudaEvent_t, Stream::kMaxMarks> events_ = {};
  cudaEvent_t origin_ = nullptr;  // was reached at origin_time_
  Stream::Clock::time_point origin_time_;
  // Marks before the origin, that may still be asked for, are read against the one before.
  cudaEvent_t former_origin_ = nullptr;
  Stream::Clock::time_point former_time_;
  int64_t num_marks_ = 0;    // recorded
  int64_t origin_mark_ = 0;  // marks from here on follow origin_
};

}  // namespace dynsplit

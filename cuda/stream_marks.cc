// SPDX-License-Identifier: Apache-2.0
#include "cuda/stream_marks.h"

#include <chrono>
#include <utility>

#include "cuda/cuda_status.h"

namespace dynsplit {
namespace {

using Clock = Stream::Clock;

// Distances are told as float milliseconds: after this time still to a quarter of a microsecond.
constexpr auto kRecalibrateAfter = std::chrono::seconds(4);

Clock::duration Distance(cudaEvent_t from, cudaEvent_t to) {
  float milliseconds = 0;
  if (cudaEventElapsedTime(&milliseconds, from, to) != cudaSuccess) {
    (void)cudaGetLastError();
    return {};
  }
  return std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double, std::milli>(milliseconds));
}

}  // namespace

absl::StatusOr<std::unique_ptr<StreamMarks>> StreamMarks::Create(
    std::shared_ptr<StreamHandle> stream) {
  std::unique_ptr<StreamMarks> marks(new StreamMarks(std::move(stream)));
  for (cudaEvent_t& event : marks->events_) {
    absl::Status status = CudaStatus(cudaEventCreate(&event), "cudaEventCreate");
    if (!status.ok()) return status;
  }
  for (cudaEvent_t* event : {&marks->origin_, &marks->former_origin_}) {
    absl::Status status = CudaStatus(cudaEventCreate(event), "cudaEventCreate");
    if (!status.ok()) return status;
  }
  // Twice: the first event of a stream takes its time.
  for (int i = 0; i < 2; ++i) {
    if (absl::Status status = marks->Calibrate(); !status.ok()) return status;
  }
  return marks;
}

StreamMarks::~StreamMarks() {
  if (cudaSetDevice(stream_->device()) != cudaSuccess) return;
  for (cudaEvent_t event : events_) {
    if (event != nullptr) (void)cudaEventDestroy(event);
  }
  for (cudaEvent_t event : {origin_, former_origin_}) {
    if (event != nullptr) (void)cudaEventDestroy(event);
  }
}

absl::Status StreamMarks::Calibrate() {
  std::swap(origin_, former_origin_);
  former_time_ = origin_time_;
  // On an idle stream the event comes between these two readings of the clock.
  const Clock::time_point before = Clock::now();
  absl::Status status = CudaStatus(cudaEventRecord(origin_, stream_->get()), "cudaEventRecord");
  if (status.ok()) status = CudaStatus(cudaEventSynchronize(origin_), "cudaEventSynchronize");
  if (!status.ok()) return status;
  origin_time_ = before + (Clock::now() - before) / 2;
  origin_mark_ = num_marks_;
  return absl::OkStatus();
}

absl::Status StreamMarks::Record(int64_t mark) {
  if (Clock::now() - origin_time_ > kRecalibrateAfter) {
    if (cudaStreamQuery(stream_->get()) == cudaSuccess) {
      if (absl::Status status = Calibrate(); !status.ok()) return status;
    } else {
      (void)cudaGetLastError();  // not ready: no error of anyone's
    }
  }
  num_marks_ = mark + 1;
  return CudaStatus(cudaEventRecord(Event(mark), stream_->get()), "cudaEventRecord");
}

Clock::time_point StreamMarks::TimeOf(int64_t mark) const {
  if (mark >= origin_mark_) return origin_time_ + Distance(origin_, Event(mark));
  return former_time_ + Distance(former_origin_, Event(mark));
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// The work of one layer between host staging memory and host results: views, checks, pipeline,
// copies back. No state of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/pipeline/backend.h"
#include "server/pipeline/compress.h"
#include "server/runtime/request_spec.h"

namespace dynsplit {

// Tensors that are staged together: those of one layer, those of the whole sequence, or all.
struct StagePlan {
  static constexpr int32_t kEverything = -2;  // as a layer
  static constexpr int64_t kNotStaged = -1;   // bulk in a region: used there, or copied from there

  std::vector<size_t> tensors;        // indices into RequestSpec::tensors
  std::vector<int64_t> offset_bytes;  // of each in the stage, 64-byte aligned
  int64_t byte_size = 0;
};
StagePlan PlanStage(std::span<const RequestTensor> tensors, int32_t layer);

// Host staging memory of one StagePlan, and its device copy once made. Host memory is shared with
// whoever copies into it; null where nothing is staged.
struct Stage {
  std::shared_ptr<Buffer> host;
  Buffer device;
  std::vector<Buffer> located;  // device copies of bulk in host regions, by place in the plan
};

// Host bytes of a tensor of the stage, or empty when the stage has none of that kind.
std::span<const std::byte> HostBytes(std::span<const RequestTensor> tensors, const StagePlan& plan,
                                     const Stage& stage, TensorKind kind);
template <typename T>
std::span<const T> HostValues(std::span<const RequestTensor> tensors, const StagePlan& plan,
                              const Stage& stage, TensorKind kind) {
  const std::span<const std::byte> bytes = HostBytes(tensors, plan, stage, kind);
  return {reinterpret_cast<const T*>(bytes.data()), bytes.size() / sizeof(T)};
}

// Copies into the stage what lies in regions and is read on the host. Complete when it returns.
absl::Status FillStage(const RequestSpec& spec, const StagePlan& plan, const Stage& stage,
                       Backend& backend, Stream& stream);

// Refuses, on the host, what devices cannot see: scales that are not finite and > 0, evidence that
// is not finite, token ids < 0, pages out of range, query positions out of order.
absl::Status CheckStageValues(const RequestSpec& spec, const StagePlan& plan, const Stage& stage);

// Copies the stage to the device.
absl::Status StageToDevice(const RequestSpec& spec, const StagePlan& plan, Stage& stage,
                           Backend& backend, Stream& stream);

// Views of one layer's tensors over the device's copy. `block_table` is on the device, null unless
// paged. Valid while `stage` is.
LayerTensors LayerViews(const RequestSpec& spec, int32_t layer, const StagePlan& plan,
                        const Stage& stage, const int32_t* block_table);

// CheckLayerFinite of every layer where all is in the stage's host memory: without the device.
// UNIMPLEMENTED where something is not.
absl::Status CheckStageFinite(const RequestSpec& spec, const StagePlan& plan, const Stage& stage);

// What leaves of a layer: in `room` where it is not null, else in host memory. Consumes decision
// and pages. The one wait of a layer: what was enqueued before on the timer's stream is complete
// when it returns, also after a failure.
absl::StatusOr<ComputedLayer> CollectLayer(const SequenceContext& context, LayerResult& result,
                                           OutputRoom* room, Backend& backend, StageTimer& timer);

ResultTensor Int32Output(TensorKind kind, std::vector<int64_t> shape, std::vector<int32_t> values);

// Bytes that count as compressed output: pages, scales, summaries.
int64_t PayloadBytes(const ComputedLayer& output);

// Memory to reserve for a request, bytes: stages of the layers that may be in flight, their device
// copies where the device has its own memory, results not yet sent, scores.
int64_t ReservationBytes(const RequestSpec& spec, bool device_has_own_memory);
// Layers that may occupy memory at a time.
int32_t MaxLayersInFlight(const RequestSpec& spec);

}  // namespace dynsplit

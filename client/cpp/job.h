// SPDX-License-Identifier: Apache-2.0
//
// What goes into a compression call and what comes out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/cpp/aligned_buffer.h"
#include "dynsplit/v1/compression.pb.h"

namespace dynsplit {

class Cancellation;

// A tensor of the caller. `bytes` is sent from where it is; with `region` it is not sent, and says
// only how many bytes the server finds there (its data() is not read and may be null).
struct InputTensor {
  v1::TensorKind kind = v1::TENSOR_KIND_UNSPECIFIED;
  std::optional<int32_t> layer;  // absent for tensors of the whole sequence
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  absl::Span<const std::byte> bytes;
  std::vector<v1::Dim> dims;  // empty = the dense shape of the kind
  v1::ScaleGranularity scale_granularity = v1::SCALE_GRANULARITY_UNSPECIFIED;
  // Part of a region registered with this server (Client::RegisterRegion) that holds the bytes.
  // They must not change before the call has ended.
  std::optional<v1::RegionSlice> region;
};

// A tensor of the server. Move-only.
struct OutputTensor {
  v1::TensorDescriptor descriptor;
  AlignedBuffer data;
};

struct LayerOutput {
  v1::LayerResult result;
  std::vector<OutputTensor> tensors;
};

// What Fetch calls that broke have received of a session. Give it to each call for the same target
// and policy, without changes in between: the next goes on where the last one broke, and the result
// of the one that succeeds is whole, with every tensor's checksum checked over all of its bytes.
struct PartialFetch {
  // Complete layers; empty with on_layer, which has had them.
  std::vector<LayerOutput> layers;
  int32_t num_layers = 0;   // complete ones, here or with on_layer
  int32_t last_layer = -1;  // the last of them, and the number of its tensors
  int32_t last_layer_tensors = 0;
  // The layer that was under way: tensors before `tensor_index` are complete, that one has its
  // first `offset` bytes, and what later ones hold counts for nothing.
  std::optional<LayerOutput> open;
  int32_t tensor_index = 0;
  int64_t offset = 0;
};

// Null when there is none of that kind.
const OutputTensor* FindTensor(absl::Span<const OutputTensor> tensors, v1::TensorKind kind);

struct Progress {
  int64_t sent_bytes = 0;  // handed to the transport
  int64_t total_bytes = 0;
  int64_t received_bytes = 0;
  int32_t received_layers = 0;
};

// One request. Sequence tensors are sent first, then those of layer 0, 1, ...; within a layer in
// their order here.
struct CompressJob {
  // begin.tensors is made from `tensors`; begin.max_chunk_bytes from the client's options. All else
  // is sent as it is (shape, policy, rope, plan, calibration, ...). With begin.output, layers have
  // no `tensors`; result.tensors() says where each lies (PlacedBytes in shared_memory.h views it).
  v1::Begin begin;
  std::vector<InputTensor> tensors;

  // Keeps the tensors' memory. The transport may hold on to it after the call has returned; it is
  // released on one of gRPC's threads, so its deleter must not block. Without an owner the call
  // returns only when the transport has let go of the memory, and a peer that stops reading can
  // delay that until its connection breaks.
  std::shared_ptr<const void> owner;

  // Takes each layer as it arrives, in ascending order, in the thread of the call; layers are then
  // not collected in the result. An error cancels the call and is returned from it.
  std::function<absl::Status(LayerOutput)> on_layer;
  // Called in the thread of the call after each received message, and no more often.
  std::function<void(const Progress&)> on_progress;
  // Optional; outlives the call.
  Cancellation* cancellation = nullptr;
  // FetchSession without begin.output only; outlives the call, which sets begin.target.resume from
  // it. Left empty by a call that succeeds. FAILED_PRECONDITION where the session has been appended
  // to meanwhile: begin anew with an empty one.
  PartialFetch* partial = nullptr;
  // Longest duration of the call. Default: ClientOptions::timeout.
  std::optional<absl::Duration> timeout;
};

struct CompressResult {
  v1::Accepted accepted;
  v1::SequenceResult sequence;
  std::vector<OutputTensor> sequence_tensors;
  std::vector<LayerOutput> layers;  // empty with on_layer
  v1::CompressEnd end;
  int64_t sent_bytes = 0;      // tensor bytes
  int64_t received_bytes = 0;  // tensor bytes
  absl::Duration elapsed;
};

}  // namespace dynsplit

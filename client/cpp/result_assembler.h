// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "client/cpp/job.h"
#include "dynsplit/v1/compression.pb.h"
#include "proto/wire/frame.h"

namespace dynsplit {

// The server's side of a compression stream, put together and checked against its grammar. One
// thread at a time.
class ResultAssembler {
 public:
  // `job` outlives the object. Takes over what job.partial holds.
  ResultAssembler(const CompressJob& job, int64_t max_result_bytes);

  // Takes the next message. INTERNAL where the grammar forbids it, DATA_LOSS on a checksum,
  // RESOURCE_EXHAUSTED beyond max_result_bytes or memory, or what on_layer returned.
  absl::Status Take(const wire::Frame& frame);
  // Whether Take could take the frame now: streams of one request are not ordered among each other,
  // so a chunk may come before its announcement, and an announcement before all chunks of the last.
  bool Expects(const wire::Frame& frame) const;

  bool accepted() const { return accepted_; }
  int32_t num_layers() const { return num_layers_; }
  // Gives what was received to job.partial, where there is one: the call has failed.
  void SavePartial();
  // Gives away all that was received. INTERNAL when the end message is missing.
  absl::StatusOr<CompressResult> Finish();
  const CompressResult& result() const { return result_; }

 private:
  struct OpenTensor {
    OutputTensor* tensor = nullptr;
    size_t received = 0;
    uint32_t crc32c = 0;
  };

  absl::Status TakeControl(const wire::Frame& frame);
  absl::Status TakeChunk(const wire::Frame& frame);
  absl::Status TakeLayer(v1::LayerResult layer);
  // Makes room for what was announced and expects its chunks.
  absl::Status Announce(const google::protobuf::RepeatedPtrField<v1::TensorDescriptor>& descriptors,
                        std::vector<OutputTensor>& tensors);
  // Expects the chunks of a tensor behind the `received` bytes that it has.
  absl::Status Expect(OutputTensor& tensor, size_t received);
  // The first layer of a stream that goes on within, or right behind, that layer.
  absl::Status ResumeLayer(v1::LayerResult layer);
  absl::Status DeliverLayer();

  const CompressJob& job_;
  const int64_t max_result_bytes_;
  CompressResult result_;
  bool accepted_ = false, sequence_ = false, ended_ = false;
  int32_t num_layers_ = 0;  // complete ones
  int32_t complete_layer_ = -1;
  int32_t complete_layer_tensors_ = 0;
  int32_t last_layer_ = -1;             // complete or being received
  bool resuming_ = false;               // the layer to go on with has not come yet
  std::optional<LayerOutput> resumed_;  // what was received of it before; none = all
  int32_t resumed_tensor_ = 0;
  int64_t resumed_offset_ = 0;
  int64_t announced_bytes_ = 0;
  bool layer_open_ = false;
  LayerOutput layer_;  // the one being received
  std::unordered_map<uint32_t, OpenTensor> open_;
};

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
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
  // `job` outlives the object.
  ResultAssembler(const CompressJob& job, int64_t max_result_bytes)
      : job_(job), max_result_bytes_(max_result_bytes) {}

  // Takes the next message. INTERNAL where the grammar forbids it, DATA_LOSS on a checksum,
  // RESOURCE_EXHAUSTED beyond max_result_bytes or memory, or what on_layer returned.
  absl::Status Take(const wire::Frame& frame);

  bool accepted() const { return accepted_; }
  int32_t num_layers() const { return num_layers_; }
  // All that was received. INTERNAL when the end message is missing.
  absl::StatusOr<CompressResult> Finish() &&;
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
  absl::Status DeliverLayer();

  const CompressJob& job_;
  const int64_t max_result_bytes_;
  CompressResult result_;
  bool accepted_ = false, sequence_ = false, ended_ = false;
  int32_t num_layers_ = 0;  // complete ones
  int32_t last_layer_ = -1;
  int64_t announced_bytes_ = 0;
  bool layer_open_ = false;
  LayerOutput layer_;  // the one being received
  std::unordered_map<uint32_t, OpenTensor> open_;
};

}  // namespace dynsplit

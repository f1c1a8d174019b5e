// SPDX-License-Identifier: Apache-2.0
//
// Results as wire messages: control messages and chunks that point into the result's memory.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "grpcpp/support/byte_buffer.h"
#include "server/runtime/request_spec.h"

namespace dynsplit::rpc {

struct Outgoing {
  grpc::ByteBuffer message;
  bool ends_layer = false;  // the layer's memory is free once this has left
};

// Numbers tensors consecutively over the stream. Not thread-safe.
class ResultEncoder {
 public:
  explicit ResultEncoder(int32_t max_chunk_bytes, std::optional<FetchResume> resume = std::nullopt)
      : max_chunk_bytes_(max_chunk_bytes), resume_(resume) {}

  std::vector<Outgoing> Encode(const SequenceOutput& output);
  // INVALID_ARGUMENT where the stream is to go on behind the layer's end.
  absl::StatusOr<std::vector<Outgoing>> Encode(const ComputedLayer& output);

 private:
  // Computes the checksums: reads every byte once. What comes before `resume` is not sent.
  void AppendChunks(const std::vector<ResultTensor>& tensors, const FetchResume& resume,
                    std::vector<Outgoing>& messages);

  const int32_t max_chunk_bytes_;
  const std::optional<FetchResume> resume_;
  uint32_t next_tensor_id_ = 1;
};

}  // namespace dynsplit::rpc

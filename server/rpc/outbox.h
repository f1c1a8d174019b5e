// SPDX-License-Identifier: Apache-2.0
//
// Results as wire messages: control messages and chunks that point into the result's memory.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

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
  explicit ResultEncoder(int32_t max_chunk_bytes) : max_chunk_bytes_(max_chunk_bytes) {}

  std::vector<Outgoing> Encode(const SequenceOutput& output);
  std::vector<Outgoing> Encode(const ComputedLayer& output);

 private:
  // Computes the checksums: reads every byte once.
  void AppendChunks(const std::vector<ResultTensor>& tensors, std::vector<Outgoing>& messages);

  const int32_t max_chunk_bytes_;
  uint32_t next_tensor_id_ = 1;
};

}  // namespace dynsplit::rpc

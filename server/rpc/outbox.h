// SPDX-License-Identifier: Apache-2.0
//
// Results as wire messages: control messages and chunks that point into the result's memory.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "grpcpp/support/byte_buffer.h"
#include "server/runtime/request_spec.h"

namespace dynsplit::rpc {

// A control message, or one tensor as chunks. Move-only. Not thread-safe.
class Outgoing {
 public:
  explicit Outgoing(const grpc::ByteBuffer& message) : message_(message) {}
  // The tensor's bytes from `offset` on. Reads those before it, for the checksum of the whole.
  Outgoing(const ResultTensor& tensor, uint32_t id, int64_t offset, int32_t max_chunk_bytes);
  Outgoing(Outgoing&&) = default;
  Outgoing& operator=(Outgoing&&) = default;

  // Tensor bytes that are still to come.
  int64_t num_bytes() const { return byte_size_ - offset_; }
  bool exhausted() const { return exhausted_; }
  // The next message. Checksums are taken here, so that the bytes are in the cache when they are
  // sent. Requires !exhausted().
  grpc::ByteBuffer Next();

  // Released once all messages of it have left, or will not.
  std::shared_ptr<const void> part_of;

 private:
  grpc::ByteBuffer message_;  // of control
  uint32_t id_ = 0;
  const std::byte* data_ = nullptr;
  std::shared_ptr<const void> owner_;
  int64_t byte_size_ = 0;
  int64_t offset_ = 0;
  int64_t max_chunk_bytes_ = 0;
  uint32_t crc32c_ = 0;  // of the bytes before offset_
  bool exhausted_ = false;
};

// Numbers tensors consecutively over the request. Not thread-safe.
class ResultEncoder {
 public:
  explicit ResultEncoder(int32_t max_chunk_bytes, std::optional<FetchResume> resume = std::nullopt)
      : max_chunk_bytes_(max_chunk_bytes), resume_(resume) {}

  // The control message, and behind it the tensors.
  std::vector<Outgoing> Encode(const SequenceOutput& output);
  // INVALID_ARGUMENT where the stream is to go on behind the layer's end.
  absl::StatusOr<std::vector<Outgoing>> Encode(const ComputedLayer& output);

 private:
  // What comes before `resume` is not sent.
  void AppendTensors(const std::vector<ResultTensor>& tensors, const FetchResume& resume,
                     std::vector<Outgoing>& messages);

  const int32_t max_chunk_bytes_;
  const std::optional<FetchResume> resume_;
  uint32_t next_tensor_id_ = 1;
};

}  // namespace dynsplit::rpc

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "client/cpp/job.h"
#include "proto/wire/frame.h"

namespace dynsplit {

// Which of the streams of a request.
struct ShardOf {
  int32_t index = 0;
  int32_t count = 1;
};

// The client's side of a compression stream as frames: begin, the chunks, end. Of several streams
// each sends whole tensors, about as many bytes as the others. One thread at a time; sent_bytes may
// be read from any.
class RequestFrames {
 public:
  // `job` outlives the object. `lease` is what the slices in flight keep.
  RequestFrames(const CompressJob& job, std::shared_ptr<const void> lease, ShardOf shard = {});

  // `request_id` is what the shards of several are joined by, and replaces the job's.
  grpc::ByteBuffer Begin(size_t max_response_chunk_bytes, const std::string& request_id) const;
  // Size of the chunks to come. Before the first Next.
  void set_chunk_bytes(size_t chunk_bytes) { chunk_bytes_ = chunk_bytes; }
  // False after the end message.
  bool Next(grpc::ByteBuffer& frame);

  // Of all shards.
  int64_t total_bytes() const { return total_bytes_; }
  int64_t sent_bytes() const { return sent_bytes_.load(std::memory_order_relaxed); }

 private:
  grpc::ByteBuffer NextChunk();

  const CompressJob& job_;
  const std::shared_ptr<const void> lease_;
  const ShardOf shard_;
  std::vector<uint32_t> order_;  // indices of job_.tensors; ids are index + 1
  std::vector<uint32_t> sent_;   // those of order_ that travel in the stream
  int64_t total_bytes_ = 0;

  size_t chunk_bytes_ = wire::kDefaultChunkDataBytes;
  size_t next_tensor_ = 0;  // index into sent_
  size_t offset_ = 0;       // within that tensor
  uint32_t tensor_crc_ = 0;
  bool ended_ = false;
  std::atomic<int64_t> sent_bytes_{0};
};

}  // namespace dynsplit

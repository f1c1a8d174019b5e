// SPDX-License-Identifier: Apache-2.0
//
// Messages of a compression stream as gRPC byte buffers, so that tensor bytes are never held in a
// std::string: the sender points into the tensor, the receiver copies once, into its place.
//
//     chunk    tensor(2) offset(3) crc32c(4) [last(5) tensor_crc32c(7)] data(15)
//     control  anything else of CompressRequest or CompressResponse
//
// The two messages share the chunk's field numbers, and each keeps clear of the other's control
// fields (1, 6, 8, 9). The bytes are ordinary protobuf: any client in any language may send them,
// with fields in any order and with fields this version does not know.
#pragma once

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace google::protobuf {
class MessageLite;
}

namespace dynsplit::wire {

// Most data bytes any chunk may carry, and the chunk size to prefer.
inline constexpr size_t kMaxChunkDataBytes = size_t{3} << 20;
inline constexpr size_t kDefaultChunkDataBytes = size_t{2} << 20;

struct ChunkHeader {
  uint32_t tensor = 0;         // TensorDescriptor.id
  uint64_t offset = 0;         // of the data within the tensor, bytes
  uint32_t crc32c = 0;         // of the data
  bool last = false;           // the tensor ends with this chunk
  uint32_t tensor_crc32c = 0;  // with last: of the whole tensor
};

// A chunk whose payload is the `size` bytes at `data`, not copied: they must stay unchanged until
// `owner` is released, which happens when gRPC drops the slice; that may be after the call ended,
// and on one of gRPC's threads, so the owner's deleter must neither block nor call CUDA.
// Requires 1 <= size <= kMaxChunkDataBytes.
grpc::ByteBuffer EncodeChunk(const ChunkHeader& header, const std::byte* data, size_t size,
                             std::shared_ptr<const void> owner);

// A control message. Requires message.ByteSizeLong() < 2^31.
grpc::ByteBuffer EncodeMessage(const google::protobuf::MessageLite& message);

// One received message. Movable; the bytes stay in gRPC's slices.
class Frame {
 public:
  bool is_chunk() const { return data_size_ > 0; }

  // The rest of a chunk. Requires is_chunk().
  const ChunkHeader& header() const { return header_; }
  size_t data_size() const { return data_size_; }
  // Copies the payload to dst[0, data_size()). DATA_LOSS with reason CHECKSUM_MISMATCH, naming
  // tensor and offset, where it does not have header().crc32c; dst then holds rubbish.
  absl::Status CopyTo(std::byte* dst) const;

  // Parses a control message into `message`. INVALID_ARGUMENT where it is not one. Requires
  // !is_chunk().
  absl::Status ParseControl(google::protobuf::MessageLite* message) const;

 private:
  friend absl::StatusOr<Frame> ParseFrame(grpc::ByteBuffer&& buffer, size_t max_data_bytes);

  ChunkHeader header_;
  size_t data_size_ = 0;    // 0 = control message
  size_t data_offset_ = 0;  // of the payload within the concatenated slices
  std::vector<grpc::Slice> slices_;
};

// Reads the fields of one message without touching the payload. INVALID_ARGUMENT where the bytes
// are not protobuf, a chunk has no data or more than max_data_bytes, or a chunk carries control
// fields. Scalars that occur twice count by their last occurrence, as protobuf has it.
absl::StatusOr<Frame> ParseFrame(grpc::ByteBuffer&& buffer, size_t max_data_bytes);

}  // namespace dynsplit::wire

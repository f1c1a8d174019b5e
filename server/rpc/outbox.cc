// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/outbox.h"

#include <algorithm>
#include <utility>

#include "proto/wire/crc32c.h"
#include "proto/wire/frame.h"
#include "server/rpc/result_adapter.h"

namespace dynsplit::rpc {

std::vector<Outgoing> ResultEncoder::Encode(const SequenceOutput& output) {
  v1::CompressResponse response;
  *response.mutable_sequence() = SequenceToProto(output, next_tensor_id_);
  std::vector<Outgoing> messages;
  messages.push_back({.message = wire::EncodeMessage(response)});
  AppendChunks(output.tensors, messages);
  return messages;
}

std::vector<Outgoing> ResultEncoder::Encode(const ComputedLayer& output) {
  v1::CompressResponse response;
  *response.mutable_layer() = LayerToProto(output, next_tensor_id_);
  std::vector<Outgoing> messages;
  messages.push_back({.message = wire::EncodeMessage(response)});
  AppendChunks(output.tensors, messages);
  messages.back().ends_layer = true;
  return messages;
}

void ResultEncoder::AppendChunks(const std::vector<ResultTensor>& tensors,
                                 std::vector<Outgoing>& messages) {
  for (const ResultTensor& tensor : tensors) {
    const uint32_t id = next_tensor_id_++;
    uint32_t tensor_crc = 0;
    for (int64_t offset = 0; offset < tensor.byte_size;) {
      const int64_t size = std::min<int64_t>(max_chunk_bytes_, tensor.byte_size - offset);
      const std::byte* data = tensor.data + offset;
      wire::ChunkHeader header = {.tensor = id,
                                  .offset = static_cast<uint64_t>(offset),
                                  .crc32c = wire::Crc32c(data, static_cast<size_t>(size))};
      tensor_crc = wire::Crc32cCombine(tensor_crc, header.crc32c, static_cast<uint64_t>(size));
      offset += size;
      header.last = offset == tensor.byte_size;
      if (header.last) header.tensor_crc32c = tensor_crc;
      messages.push_back(
          {.message = wire::EncodeChunk(header, data, static_cast<size_t>(size), tensor.owner)});
    }
  }
}

}  // namespace dynsplit::rpc

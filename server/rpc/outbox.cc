// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/outbox.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/wire/crc32c.h"
#include "proto/wire/frame.h"
#include "server/pipeline/errors.h"
#include "server/rpc/result_adapter.h"

namespace dynsplit::rpc {

std::vector<Outgoing> ResultEncoder::Encode(const SequenceOutput& output) {
  v1::CompressResponse response;
  *response.mutable_sequence() = SequenceToProto(output, next_tensor_id_);
  std::vector<Outgoing> messages;
  messages.push_back({.message = wire::EncodeMessage(response)});
  AppendChunks(output.tensors, {}, messages);
  return messages;
}

absl::StatusOr<std::vector<Outgoing>> ResultEncoder::Encode(const ComputedLayer& output) {
  FetchResume resume;
  const auto num_tensors = static_cast<int32_t>(output.tensors.size());
  if (resume_.has_value() && resume_->layer == output.plan->layer) {
    resume = *resume_;
    // Tensors have the numbers that they had in the stream that broke; all layers have as many.
    next_tensor_id_ += static_cast<uint32_t>(resume.num_skipped_layers * num_tensors);
  }
  if (resume.tensor_index > num_tensors) {
    return InvalidField(
        "target.resume.tensor_index",
        absl::StrCat("is ", resume.tensor_index, "; the layer has ", num_tensors, " tensors"));
  }
  const int64_t size = resume.tensor_index < num_tensors
                           ? output.tensors[static_cast<size_t>(resume.tensor_index)].byte_size
                           : 0;
  if (resume.offset > size || (resume.offset > 0 && resume.offset == size)) {
    return InvalidField("target.resume.offset",
                        absl::StrCat("is ", resume.offset, "; the tensor has ", size,
                                     " bytes, and the next begins behind them"));
  }
  v1::CompressResponse response;
  *response.mutable_layer() = LayerToProto(output, next_tensor_id_);
  std::vector<Outgoing> messages;
  messages.push_back({.message = wire::EncodeMessage(response)});
  AppendChunks(output.tensors, resume, messages);
  messages.back().ends_layer = true;
  return messages;
}

void ResultEncoder::AppendChunks(const std::vector<ResultTensor>& tensors,
                                 const FetchResume& resume, std::vector<Outgoing>& messages) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const ResultTensor& tensor = tensors[i];
    const uint32_t id = next_tensor_id_++;
    const auto resumed = static_cast<size_t>(resume.tensor_index);
    if (i < resumed || tensor.region.has_value()) continue;
    const int64_t begin = i == resumed ? resume.offset : 0;
    uint32_t tensor_crc = wire::Crc32c(tensor.data, static_cast<size_t>(begin));
    for (int64_t offset = begin; offset < tensor.byte_size;) {
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

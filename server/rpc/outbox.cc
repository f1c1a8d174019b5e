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

Outgoing::Outgoing(const ResultTensor& tensor, uint32_t id, int64_t offset, int32_t max_chunk_bytes)
    : id_(id),
      data_(tensor.data),
      owner_(tensor.owner),
      byte_size_(tensor.byte_size),
      offset_(offset),
      max_chunk_bytes_(max_chunk_bytes),
      crc32c_(wire::Crc32c(tensor.data, static_cast<size_t>(offset))),
      exhausted_(offset == tensor.byte_size) {}

grpc::ByteBuffer Outgoing::Next() {
  if (data_ == nullptr) {
    exhausted_ = true;
    return message_;
  }
  const auto size = static_cast<size_t>(std::min(max_chunk_bytes_, byte_size_ - offset_));
  const std::byte* data = data_ + offset_;
  wire::ChunkHeader header = {
      .tensor = id_, .offset = static_cast<uint64_t>(offset_), .crc32c = wire::Crc32c(data, size)};
  crc32c_ = wire::Crc32cCombine(crc32c_, header.crc32c, size);
  offset_ += static_cast<int64_t>(size);
  exhausted_ = offset_ == byte_size_;
  header.last = exhausted_;
  if (header.last) header.tensor_crc32c = crc32c_;
  return wire::EncodeChunk(header, data, size, owner_);
}

std::vector<Outgoing> ResultEncoder::Encode(const SequenceOutput& output) {
  v1::CompressResponse response;
  *response.mutable_sequence() = SequenceToProto(output, next_tensor_id_);
  std::vector<Outgoing> messages;
  messages.emplace_back(wire::EncodeMessage(response));
  AppendTensors(output.tensors, {}, messages);
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
  messages.emplace_back(wire::EncodeMessage(response));
  AppendTensors(output.tensors, resume, messages);
  return messages;
}

void ResultEncoder::AppendTensors(const std::vector<ResultTensor>& tensors,
                                  const FetchResume& resume, std::vector<Outgoing>& messages) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const uint32_t id = next_tensor_id_++;
    const auto resumed = static_cast<size_t>(resume.tensor_index);
    if (i < resumed || tensors[i].region.has_value() || tensors[i].byte_size == 0) continue;
    messages.emplace_back(tensors[i], id, i == resumed ? resume.offset : 0, max_chunk_bytes_);
  }
}

}  // namespace dynsplit::rpc

// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/request_frames.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "dynsplit/v1/compression.pb.h"
#include "proto/wire/crc32c.h"

namespace dynsplit {
namespace {

// Where the next Fetch goes on. Between layers that is the end of the last complete one, whose
// result comes again without chunks: there need not be a next layer.
void SetResume(const PartialFetch& partial, v1::SessionTarget& target) {
  target.clear_resume();
  if (partial.open.has_value()) {
    target.mutable_resume()->set_layer(partial.open->result.plan().layer());
    target.mutable_resume()->set_tensor_index(partial.tensor_index);
    target.mutable_resume()->set_offset(partial.offset);
  } else if (partial.last_layer >= 0) {
    target.mutable_resume()->set_layer(partial.last_layer);
    target.mutable_resume()->set_tensor_index(partial.last_layer_tensors);
  }
}

}  // namespace

RequestFrames::RequestFrames(const CompressJob& job, std::shared_ptr<const void> lease,
                             ShardOf shard)
    : job_(job), lease_(std::move(lease)), shard_(shard), order_(job.tensors.size()) {
  std::iota(order_.begin(), order_.end(), uint32_t{0});
  std::stable_sort(order_.begin(), order_.end(), [&job](uint32_t a, uint32_t b) {
    return job.tensors[a].layer.value_or(-1) < job.tensors[b].layer.value_or(-1);
  });
  std::vector<int64_t> bytes(static_cast<size_t>(shard.count));
  for (const uint32_t index : order_) {
    if (job.tensors[index].region.has_value()) continue;
    const auto size = static_cast<int64_t>(job.tensors[index].bytes.size());
    const auto least = std::min_element(bytes.begin(), bytes.end());
    if (least - bytes.begin() == shard.index) sent_.push_back(index);
    *least += size;
    total_bytes_ += size;
  }
}

grpc::ByteBuffer RequestFrames::Begin(size_t max_response_chunk_bytes,
                                      const std::string& request_id) const {
  v1::CompressRequest request;
  v1::Begin& begin = *request.mutable_begin();
  if (shard_.index == 0) begin = job_.begin;
  if (shard_.count > 1) {
    begin.set_request_id(request_id);
    begin.set_tenant(job_.begin.tenant());
    begin.set_shard_index(shard_.index);
    begin.set_num_shards(shard_.count);
    // Keys and values of as many layers as the shards bring side by side, and one more.
    if (shard_.index == 0 && begin.max_open_layers() == 0 && begin.shape().num_layers() > 0) {
      begin.set_max_open_layers(std::min(begin.shape().num_layers(), 2 + (shard_.count - 1) / 2));
    }
  }
  if (shard_.index > 0) return wire::EncodeMessage(request);
  begin.set_max_chunk_bytes(static_cast<int32_t>(max_response_chunk_bytes));
  begin.clear_tensors();
  if (job_.partial != nullptr) SetResume(*job_.partial, *begin.mutable_target());
  for (const uint32_t index : order_) {
    const InputTensor& tensor = job_.tensors[index];
    v1::TensorDescriptor& descriptor = *begin.add_tensors();
    descriptor.set_id(index + 1);
    descriptor.set_kind(tensor.kind);
    if (tensor.layer.has_value()) descriptor.set_layer(*tensor.layer);
    descriptor.set_dtype(tensor.dtype);
    descriptor.set_byte_size(static_cast<int64_t>(tensor.bytes.size()));
    descriptor.mutable_dims()->Add(tensor.dims.begin(), tensor.dims.end());
    descriptor.set_scale_granularity(tensor.scale_granularity);
    if (tensor.region.has_value())
      *descriptor.mutable_location()->mutable_region() = *tensor.region;
  }
  return wire::EncodeMessage(request);
}

bool RequestFrames::Next(grpc::ByteBuffer& frame) {
  if (ended_) return false;
  if (next_tensor_ < sent_.size()) {
    frame = NextChunk();
    return true;
  }
  v1::CompressRequest request;
  request.mutable_end()->set_num_tensors(static_cast<int32_t>(sent_.size()));
  frame = wire::EncodeMessage(request);
  ended_ = true;
  return true;
}

grpc::ByteBuffer RequestFrames::NextChunk() {
  const uint32_t index = sent_[next_tensor_];
  const absl::Span<const std::byte> bytes = job_.tensors[index].bytes;
  const size_t size = std::min(chunk_bytes_, bytes.size() - offset_);
  const std::byte* data = bytes.data() + offset_;

  wire::ChunkHeader header;
  header.tensor = index + 1;
  header.offset = offset_;
  header.crc32c = wire::Crc32c(data, size);
  header.last = offset_ + size == bytes.size();
  tensor_crc_ = wire::Crc32cCombine(tensor_crc_, header.crc32c, size);
  header.tensor_crc32c = tensor_crc_;

  offset_ += size;
  sent_bytes_.fetch_add(static_cast<int64_t>(size), std::memory_order_relaxed);
  if (header.last) {
    ++next_tensor_;
    offset_ = 0;
    tensor_crc_ = 0;
  }
  return wire::EncodeChunk(header, data, size, lease_);
}

}  // namespace dynsplit

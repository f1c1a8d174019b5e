// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/result_assembler.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/wire/crc32c.h"
#include "proto/wire/status.h"

namespace dynsplit {
namespace {

template <typename... Parts>
absl::Status Protocol(const Parts&... parts) {
  return absl::InternalError(absl::StrCat("server broke the protocol: ", parts...));
}

// The tensor lies in the room that the request offered.
bool IsPlaced(const v1::TensorDescriptor& descriptor, const v1::Begin& begin) {
  const v1::RegionSlice& place = descriptor.location().region();
  const v1::RegionSlice& room = begin.output().region();
  const int64_t size = begin.output().byte_size();
  return begin.has_output() && place.name() == room.name() &&
         place.generation() == room.generation() && place.offset_bytes() >= room.offset_bytes() &&
         descriptor.byte_size() >= 1 &&
         (size == 0 ||
          descriptor.byte_size() <= size - (place.offset_bytes() - room.offset_bytes()));
}

}  // namespace

const OutputTensor* FindTensor(absl::Span<const OutputTensor> tensors, v1::TensorKind kind) {
  for (const OutputTensor& tensor : tensors) {
    if (tensor.descriptor.kind() == kind) return &tensor;
  }
  return nullptr;
}

ResultAssembler::ResultAssembler(const CompressJob& job, int64_t max_result_bytes)
    : job_(job), max_result_bytes_(max_result_bytes) {
  if (job.partial == nullptr) return;
  PartialFetch partial = std::exchange(*job.partial, {});
  result_.layers = std::move(partial.layers);
  num_layers_ = partial.num_layers;
  last_layer_ = complete_layer_ = partial.last_layer;
  complete_layer_tensors_ = partial.last_layer_tensors;
  resumed_ = std::move(partial.open);
  resumed_tensor_ = partial.tensor_index;
  resumed_offset_ = partial.offset;
  resuming_ = resumed_.has_value() || last_layer_ >= 0;
}

void ResultAssembler::SavePartial() {
  if (job_.partial == nullptr) return;
  PartialFetch& partial = *job_.partial;
  partial.layers = std::move(result_.layers);
  partial.num_layers = num_layers_;
  partial.last_layer = complete_layer_;
  partial.last_layer_tensors = complete_layer_tensors_;
  const bool whole = std::cmp_equal(layer_.tensors.size(), layer_.result.tensors_size());
  if (!layer_open_ || !whole || open_.empty()) {  // where this call was to go on, or nothing
    partial.open = std::move(resumed_);
    partial.tensor_index = resumed_tensor_;
    partial.offset = resumed_offset_;
    return;
  }
  partial.offset = 0;
  for (partial.tensor_index = 0;; ++partial.tensor_index) {
    const OutputTensor& tensor = layer_.tensors[static_cast<size_t>(partial.tensor_index)];
    const auto found = open_.find(tensor.descriptor.id());
    if (found == open_.end()) continue;
    // All bytes and still open: they do not have their checksum.
    const size_t received = found->second.received;
    partial.offset = received < tensor.data.size() ? static_cast<int64_t>(received) : 0;
    break;
  }
  partial.open = std::move(layer_);
}

absl::Status ResultAssembler::Take(const wire::Frame& frame) {
  if (ended_) return Protocol("message after the end");
  return frame.is_chunk() ? TakeChunk(frame) : TakeControl(frame);
}

bool ResultAssembler::Expects(const wire::Frame& frame) const {
  return frame.is_chunk() ? open_.contains(frame.header().tensor) : open_.empty();
}

absl::Status ResultAssembler::TakeControl(const wire::Frame& frame) {
  v1::CompressResponse response;
  if (absl::Status status = frame.ParseControl(&response); !status.ok()) {
    return Protocol(status.message());
  }
  if (response.has_accepted() == accepted_) return Protocol("accepted must come first, and once");
  if (!open_.empty()) return Protocol(open_.size(), " tensors are not complete");
  if (response.has_accepted()) {
    accepted_ = true;
    result_.accepted = std::move(*response.mutable_accepted());
    return absl::OkStatus();
  }
  if (response.has_sequence()) {
    if (sequence_ || last_layer_ >= 0) return Protocol("sequence must come before layers, once");
    sequence_ = true;
    result_.sequence = std::move(*response.mutable_sequence());
    return Announce(result_.sequence.tensors(), result_.sequence_tensors);
  }
  if (response.has_layer()) return TakeLayer(std::move(*response.mutable_layer()));
  // A message that this version does not know is passed over.
  if (!response.has_end()) return absl::OkStatus();
  if (resumed_.has_value()) return Protocol("the layer to go on with did not come");
  ended_ = true;
  result_.end = std::move(*response.mutable_end());
  return absl::OkStatus();
}

absl::Status ResultAssembler::TakeLayer(v1::LayerResult layer) {
  if (std::exchange(resuming_, false) &&
      (resumed_.has_value() || layer.plan().layer() == last_layer_)) {
    return ResumeLayer(std::move(layer));
  }
  if (layer.plan().layer() <= last_layer_) {
    return Protocol("layer ", layer.plan().layer(), " after layer ", last_layer_);
  }
  last_layer_ = layer.plan().layer();
  layer_.result = std::move(layer);
  layer_.tensors.clear();
  layer_open_ = true;
  if (absl::Status status = Announce(layer_.result.tensors(), layer_.tensors); !status.ok()) {
    return status;
  }
  return open_.empty() ? DeliverLayer() : absl::OkStatus();
}

absl::Status ResultAssembler::ResumeLayer(v1::LayerResult layer) {
  if (!resumed_.has_value()) return absl::OkStatus();  // it is complete: its chunks do not come
  const int32_t number = resumed_->result.plan().layer();
  if (layer.plan().layer() != number) {
    return Protocol("layer ", layer.plan().layer(), " where layer ", number, " was to go on");
  }
  const auto num_tensors = static_cast<size_t>(layer.tensors_size());
  const auto first = static_cast<size_t>(resumed_tensor_);
  bool same = resumed_->tensors.size() == num_tensors && first < num_tensors;
  for (size_t i = 0; same && i < num_tensors; ++i) {
    const v1::TensorDescriptor& now = layer.tensors(static_cast<int>(i));
    OutputTensor& tensor = resumed_->tensors[i];
    same = now.kind() == tensor.descriptor.kind() && now.dtype() == tensor.descriptor.dtype() &&
           std::cmp_equal(now.byte_size(), tensor.data.size());
    tensor.descriptor = now;
  }
  if (!same || resumed_offset_ < 0 ||
      std::cmp_greater_equal(resumed_offset_, resumed_->tensors[first].data.size())) {
    return absl::FailedPreconditionError(absl::StrCat(
        "layer ", number, " is not what job.partial has a part of; begin with an empty one"));
  }
  last_layer_ = number;
  layer_ = *std::exchange(resumed_, std::nullopt);
  layer_.result = std::move(layer);
  layer_open_ = true;
  for (size_t i = first; i < num_tensors; ++i) {
    const size_t received = i == first ? static_cast<size_t>(resumed_offset_) : 0;
    if (absl::Status status = Expect(layer_.tensors[i], received); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status ResultAssembler::Announce(
    const google::protobuf::RepeatedPtrField<v1::TensorDescriptor>& descriptors,
    std::vector<OutputTensor>& tensors) {
  tensors.reserve(static_cast<size_t>(descriptors.size()));  // open_ points into it
  for (const v1::TensorDescriptor& descriptor : descriptors) {
    const int64_t size = descriptor.byte_size();
    if (descriptor.has_location()) {  // not in this stream
      if (!IsPlaced(descriptor, job_.begin)) {
        return Protocol("tensor ", descriptor.id(), " is not where begin.output wants it");
      }
      continue;
    }
    if (size < 1) return Protocol("tensor ", descriptor.id(), " has ", size, " bytes");
    if (size > max_result_bytes_ - announced_bytes_) {
      return absl::ResourceExhaustedError(
          absl::StrCat("result is larger than max_result_bytes, ", max_result_bytes_));
    }
    announced_bytes_ += size;
    auto data = AlignedBuffer::Allocate(static_cast<size_t>(size));
    if (!data.ok()) return data.status();
    tensors.push_back({descriptor, *std::move(data)});
    if (absl::Status status = Expect(tensors.back(), 0); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status ResultAssembler::Expect(OutputTensor& tensor, size_t received) {
  const uint32_t crc = wire::Crc32c(tensor.data.data(), received);
  if (!open_.emplace(tensor.descriptor.id(), OpenTensor{&tensor, received, crc}).second) {
    return Protocol("tensor id ", tensor.descriptor.id(), " occurs twice");
  }
  return absl::OkStatus();
}

absl::Status ResultAssembler::TakeChunk(const wire::Frame& frame) {
  const wire::ChunkHeader& header = frame.header();
  const auto found = open_.find(header.tensor);
  if (found == open_.end()) return Protocol("chunk of tensor ", header.tensor, ", not announced");
  OpenTensor& open = found->second;
  AlignedBuffer& data = open.tensor->data;
  if (header.offset != open.received || frame.data_size() > data.size() - open.received) {
    return Protocol("chunk of ", frame.data_size(), " bytes at offset ", header.offset,
                    " of tensor ", header.tensor, ", which has ", open.received, " of ",
                    data.size());
  }
  if (absl::Status status = frame.CopyTo(data.data() + open.received); !status.ok()) return status;
  open.received += frame.data_size();
  open.crc32c = wire::Crc32cCombine(open.crc32c, header.crc32c, frame.data_size());
  result_.received_bytes += static_cast<int64_t>(frame.data_size());
  const bool complete = open.received == data.size();
  if (header.last != complete) return Protocol("'last' of tensor ", header.tensor, " is wrong");
  if (!complete) return absl::OkStatus();
  if (open.crc32c != header.tensor_crc32c) {
    return wire::ChecksumMismatch(header.tensor, 0, "whole tensor", header.tensor_crc32c,
                                  open.crc32c);
  }
  open_.erase(found);
  return open_.empty() && layer_open_ ? DeliverLayer() : absl::OkStatus();
}

absl::Status ResultAssembler::DeliverLayer() {
  ++num_layers_;
  layer_open_ = false;
  complete_layer_ = last_layer_;
  complete_layer_tensors_ = layer_.result.tensors_size();
  if (job_.on_layer) return job_.on_layer(std::exchange(layer_, {}));
  result_.layers.push_back(std::exchange(layer_, {}));
  return absl::OkStatus();
}

absl::StatusOr<CompressResult> ResultAssembler::Finish() {
  if (!ended_) return Protocol("the stream ended without an end message");
  return std::move(result_);
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/inbox.h"

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"

namespace dynsplit {

Inbox::Inbox(std::span<const RequestTensor> tensors, int32_t num_layers, int32_t max_open_layers,
             int32_t num_shards)
    : tensors_(tensors),
      num_layers_(num_layers),
      max_open_layers_(max_open_layers),
      received_bytes_(tensors.size()),
      shard_of_tensor_(tensors.size(), kUnclaimed),
      shards_(Index(num_shards)),
      num_missing_(Index(num_layers)) {
  index_of_id_.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    index_of_id_.emplace(tensors[i].id, i);
    if (tensors[i].located()) {
      received_bytes_[i] = tensors[i].byte_size;
      continue;
    }
    ++num_streamed_;
    if (tensors[i].layer == RequestTensor::kWholeSequence) {
      ++num_sequence_missing_;
    } else {
      ++num_missing_[Index(tensors[i].layer)];
    }
  }
  while (lowest_incomplete_layer_ < num_layers_ && layer_complete(lowest_incomplete_layer_)) {
    ++lowest_incomplete_layer_;
  }
}

absl::StatusOr<size_t> Inbox::Check(const Chunk& chunk) const {
  const auto found = index_of_id_.find(chunk.tensor);
  if (found == index_of_id_.end()) {
    return InvalidField("tensor", absl::StrCat("is ", chunk.tensor,
                                               "; must be the id of a tensor of begin.tensors"));
  }
  const RequestTensor& tensor = tensors_[found->second];
  const auto received = static_cast<uint64_t>(received_bytes_[found->second]);
  const auto total = static_cast<uint64_t>(tensor.byte_size);
  if (tensor.located()) {
    return InvalidField("tensor",
                        absl::StrCat("is ", chunk.tensor, "; that tensor is in a region"));
  }
  if (received == total) {
    return InvalidField("tensor",
                        absl::StrCat("is ", chunk.tensor, "; that tensor is complete already"));
  }
  if (chunk.offset != received) {
    return InvalidField("offset",
                        absl::StrCat("is ", chunk.offset, " for tensor ", chunk.tensor,
                                     "; chunks are ascending and gapless, next is ", received));
  }
  if (chunk.size > total - received) {
    return InvalidField("data",
                        absl::StrCat("ends at byte ", chunk.offset + chunk.size, " of tensor ",
                                     chunk.tensor, "; byte_size is ", total));
  }
  if (chunk.last != (received + chunk.size == total)) {
    return InvalidField("last", absl::StrCat("is ", chunk.last ? "true" : "false", " at byte ",
                                             received + chunk.size, " of ", total, " of tensor ",
                                             chunk.tensor, "; must mark the final chunk, only"));
  }
  if (shards_.size() > 1) {
    if (absl::Status status = CheckShard(found->second, chunk); !status.ok()) return status;
  } else if (tensor.layer >= window_end()) {
    return InvalidField(
        "max_open_layers",
        absl::StrCat("is ", max_open_layers_, "; a chunk of layer ", tensor.layer, " came while ",
                     sequence_complete()
                         ? absl::StrCat("layer ", lowest_incomplete_layer_, " is not complete")
                         : std::string("tensors of the whole sequence are not complete")));
  }
  return found->second;
}

absl::Status Inbox::CheckShard(size_t tensor_index, const Chunk& chunk) const {
  const int32_t claimed = shard_of_tensor_[tensor_index];
  if (claimed != kUnclaimed && claimed != chunk.shard) {
    return InvalidField("tensor",
                        absl::StrCat("is ", chunk.tensor, " on shard ", chunk.shard,
                                     "; it came on shard ", claimed, ", and comes whole on one"));
  }
  const int32_t layer = tensors_[tensor_index].layer;
  const int32_t before = shards_[Index(chunk.shard)].layer;
  if (layer >= before) return absl::OkStatus();
  return InvalidField("tensor", absl::StrCat("is ", chunk.tensor, ", which comes behind layer ",
                                             before, " on shard ", chunk.shard,
                                             "; on each shard the tensors of the sequence come "
                                             "first and layers ascend"));
}

bool Inbox::Early(size_t tensor_index) const {
  return tensors_[tensor_index].layer >= window_end();
}

void Inbox::Claim(size_t tensor_index, const Chunk& chunk) {
  shard_of_tensor_[tensor_index] = chunk.shard;
  shards_[Index(chunk.shard)].layer = tensors_[tensor_index].layer;
}

void Inbox::Add(size_t tensor_index, const Chunk& chunk) {
  const RequestTensor& tensor = tensors_[tensor_index];
  received_bytes_[tensor_index] += static_cast<int64_t>(chunk.size);
  if (received_bytes_[tensor_index] < tensor.byte_size) return;
  ++num_complete_;
  ++shards_[Index(chunk.shard)].num_complete;
  if (tensor.layer == RequestTensor::kWholeSequence) {
    --num_sequence_missing_;
    return;
  }
  --num_missing_[Index(tensor.layer)];
  while (lowest_incomplete_layer_ < num_layers_ && layer_complete(lowest_incomplete_layer_)) {
    ++lowest_incomplete_layer_;
  }
}

absl::Status Inbox::End(int32_t shard, int64_t num_tensors) {
  if (shards_.size() == 1 && num_tensors != num_streamed_) {
    return InvalidField("end.num_tensors", absl::StrCat("is ", num_tensors, "; begin.tensors has ",
                                                        num_streamed_, " that are streamed"));
  }
  const int64_t num_complete = shards_[Index(shard)].num_complete;
  if (shards_.size() > 1 && num_tensors != num_complete) {
    return InvalidField("end.num_tensors",
                        absl::StrCat("is ", num_tensors, "; shard ", shard, " has brought ",
                                     num_complete, " whole tensors"));
  }
  ++num_ended_;
  if (!all_ended()) return absl::OkStatus();
  if (num_complete_ == num_streamed_) return absl::OkStatus();
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (received_bytes_[i] == tensors_[i].byte_size) continue;
    return InvalidField(tensors_[i].field, absl::StrCat("ended after ", received_bytes_[i], " of ",
                                                        tensors_[i].byte_size, " bytes"));
  }
  return absl::OkStatus();
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// Which bytes of a request have arrived: order, gaps, overlap and completeness. Bookkeeping only;
// the bytes themselves are elsewhere.
//
// Chunks of one tensor come ascending and gapless, the final one marked last; tensors may
// interleave. With lowest the lowest layer that is not complete (0 while a tensor of the whole
// sequence is missing), a chunk may belong to layers below lowest + max_open_layers only: so that
// layers which cannot leave yet never occupy more memory than was reserved.
//
// A request may come as several shards: streams that are not ordered among each other. A tensor
// comes whole on one of them, layers ascend on each, and a chunk beyond the window is not wrong but
// early: since layers ascend, what the lowest layer lacks is never behind it on its stream.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/runtime/request_spec.h"

namespace dynsplit {

struct Chunk {
  uint32_t tensor = 0;  // RequestTensor::id
  uint64_t offset = 0;  // bytes
  uint64_t size = 0;    // bytes, > 0
  bool last = false;
  int32_t shard = 0;
};

// Not thread-safe.
class Inbox {
 public:
  // Tensors in regions are complete from the start.
  // Requires: ids unique, layers in [0, num_layers) or kWholeSequence, sizes > 0. `tensors` must
  // outlive the inbox.
  Inbox(std::span<const RequestTensor> tensors, int32_t num_layers, int32_t max_open_layers,
        int32_t num_shards = 1);

  // Index of the tensor that the chunk continues. INVALID_ARGUMENT where it does not fit. Changes
  // nothing.
  absl::StatusOr<size_t> Check(const Chunk& chunk) const;
  // Whether a chunk of that tensor must wait until the lowest incomplete layer is another: with one
  // shard never, since Check refuses it.
  bool Early(size_t tensor_index) const;
  // From here on the tensor comes on the chunk's shard. Requires Check and !Early.
  void Claim(size_t tensor_index, const Chunk& chunk);
  // Counts a chunk that was claimed.
  void Add(size_t tensor_index, const Chunk& chunk);
  // A shard has ended; with the last of them everything must have arrived. INVALID_ARGUMENT naming
  // what is missing.
  absl::Status End(int32_t shard, int64_t num_tensors);

  bool sequence_complete() const { return num_sequence_missing_ == 0; }
  bool layer_complete(int32_t layer) const { return num_missing_[Index(layer)] == 0; }
  int32_t lowest_incomplete_layer() const { return lowest_incomplete_layer_; }
  bool all_ended() const { return num_ended_ == shards_.size(); }
  bool all_complete() const {
    return sequence_complete() && lowest_incomplete_layer_ == num_layers_;
  }

 private:
  static size_t Index(int32_t layer) { return static_cast<size_t>(layer); }

  struct Shard {
    int32_t layer = RequestTensor::kWholeSequence;  // of its last chunk
    int64_t num_complete = 0;                       // tensors
  };
  static constexpr int32_t kUnclaimed = -1;

  // First layer that is beyond the window.
  int32_t window_end() const {
    return (sequence_complete() ? lowest_incomplete_layer_ : 0) + max_open_layers_;
  }
  absl::Status CheckShard(size_t tensor_index, const Chunk& chunk) const;

  std::span<const RequestTensor> tensors_;
  const int32_t num_layers_;
  const int32_t max_open_layers_;
  absl::flat_hash_map<uint32_t, size_t> index_of_id_;
  std::vector<int64_t> received_bytes_;   // per tensor
  std::vector<int32_t> shard_of_tensor_;  // that brings it; kUnclaimed before its first chunk
  std::vector<Shard> shards_;
  size_t num_ended_ = 0;              // of shards_
  std::vector<int32_t> num_missing_;  // per layer: tensors not complete
  int64_t num_sequence_missing_ = 0;
  int64_t num_complete_ = 0;
  int64_t num_streamed_ = 0;  // tensors that arrive as chunks
  int32_t lowest_incomplete_layer_ = 0;
};

}  // namespace dynsplit

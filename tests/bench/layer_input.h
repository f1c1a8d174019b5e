// SPDX-License-Identifier: Apache-2.0
//
// A sequence to compress on any backend: layers of Llama-3.1-8B's shape (32 query heads, 8 KV
// heads, D 128, bf16, a window of 64 queries) with random contents, and token ids with delimiters
// among them. Any error ends the program.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/pipeline/backend.h"
#include "server/pipeline/compress.h"

namespace dynsplit::bench {

inline constexpr int32_t kQueryHeads = 32;
inline constexpr int32_t kKvHeads = 8;
inline constexpr int32_t kHeadDim = 128;
inline constexpr int32_t kWindow = 64;

void Check(const absl::Status& status);
template <typename T>
T Check(absl::StatusOr<T> value) {
  Check(value.status());
  return *std::move(value);
}

// Writes `count` bf16 values of magnitude 2^-5 to 2.
void FillBFloat16(int64_t count, uint64_t seed, uint16_t* values);

class LayerInput {
 public:
  // Layer i of any number shows layer i % distinct_layers of those made here.
  LayerInput(Backend& backend, Stream& stream, int64_t num_tokens, int32_t distinct_layers);

  LayerTensors Layer(int32_t layer) const;
  int64_t num_tokens() const { return num_tokens_; }
  // Segmentation and all layers by the preset, a fifth kept, no receipt; complete on return.
  void Compress(std::string_view preset, int32_t num_layers) const;

 private:
  Backend& backend_;
  Stream& stream_;
  const int64_t num_tokens_;
  std::vector<int32_t> token_ids_;
  std::vector<Buffer> host_;    // what device_ may be an alias of
  std::vector<Buffer> device_;  // keys, values, queries of each layer
};

}  // namespace dynsplit::bench

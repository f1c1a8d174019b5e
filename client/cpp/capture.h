// SPDX-License-Identifier: Apache-2.0
//
// A captured KV cache with its text: safetensors with the fixed set of tensors of "kv-capture/1".
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/cpp/safetensors.h"
#include "dynsplit/v1/types.pb.h"

namespace dynsplit {

// Immutable once loaded; spans live as long as `owner`.
struct Capture {
  struct Layer {
    int32_t model_layer = 0;              // its number in the model
    absl::Span<const std::byte> key;      // [T, Hkv, D]
    absl::Span<const std::byte> value;    // [T, Hkv, D]
    absl::Span<const std::byte> queries;  // [W, Hq, D]; empty when not captured
  };

  v1::SequenceShape shape;
  v1::Rope rope;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // of key, value and queries
  std::string model;
  int32_t vocab_size = 0;
  std::string text_kind, text_title;
  std::vector<int32_t> token_ids;        // [T]
  std::vector<int32_t> query_positions;  // [W], ascending
  std::string text;                      // all tokens' bytes; may be no UTF-8
  std::vector<int32_t> token_offsets;    // [T + 1]: token t is text[offsets[t], offsets[t + 1])
  std::vector<Layer> layers;
  std::shared_ptr<const void> owner;

  std::string_view token_text(int64_t token) const;
  // Queries at the end of query_positions that belong to the last tokens without a gap.
  int64_t num_window_queries() const;
  // The last `num` queries of a layer. Requires num <= query_positions.size().
  absl::Span<const std::byte> WindowQueries(const Layer& layer, int64_t num) const;
};

// INVALID_ARGUMENT names the tensor or key that is missing or does not fit.
absl::StatusOr<Capture> LoadCapture(const std::string& path);
absl::StatusOr<Capture> ReadCapture(const Safetensors& file);

}  // namespace dynsplit

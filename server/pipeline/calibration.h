// SPDX-License-Identifier: Apache-2.0
//
// Delimiter importance from real attention (arXiv 2602.03184 section 3, Algorithm 1): for an
// occurrence i of a delimiter, future queries i+1..i+W, overlap keys (i-R, i], discarded keys
// before. Scores are averaged over occurrences and mapped to weights by w = clamp((s + 1) / 2, 0,
// 1) (ours; the paper gives no map).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/pipeline/backend.h"
#include "server/pipeline/segmentation.h"

namespace dynsplit {

struct CalibrationOptions {
  std::vector<int32_t> candidates;  // token ids; empty = those of the base profile
  int32_t num_future_queries = 8;   // W, [1, 64]
  int32_t overlap_size = 128;       // R, [1, 65536]
  double alpha = 1;                 // [0, 16]
  int32_t min_occurrences = 4;
  int32_t max_occurrences = 64;
};

// Collects layers one at a time. Not thread-safe.
class Calibrator {
 public:
  // `query_positions` ascending: rows of the query tensors that every layer supplies. Occurrences
  // whose W following positions (clipped to the end) are not all supplied are skipped. `base` gives
  // candidates, texts and the weights of types seen too rarely.
  static absl::StatusOr<Calibrator> Create(CalibrationOptions options, const DelimiterProfile& base,
                                           std::span<const int32_t> token_ids,
                                           std::span<const int32_t> query_positions);

  // Positions of query rows that will be read, as indices into query_positions.
  std::span<const int32_t> query_rows() const { return query_rows_; }
  // Adds one layer. queries [N, Hq, D] with N = query_positions.size().
  absl::Status AddLayer(const TensorView& keys, const TensorView& queries, float softmax_scale,
                        Backend& backend, Stream& stream);
  // Mean masses of one sampled occurrence over layers, heads and its queries.
  struct Occurrence {
    int32_t position = 0;
    int32_t token_id = 0;
    double drop = 0, overlap = 0, own = 0;
    double score = 0;  // overlap - alpha * drop
  };
  std::vector<Occurrence> Occurrences() const;
  absl::StatusOr<DelimiterProfile> Finish(std::string name) const;

 private:
  Calibrator() = default;
  CalibrationOptions options_;
  std::vector<DelimiterWeight> base_weights_;
  std::vector<Occurrence> occurrences_;        // positions and ids; masses filled by AddLayer
  std::vector<int32_t> query_rows_;            // rows used, grouped by occurrence
  std::vector<int32_t> occurrence_row_begin_;  // [occurrences + 1] into query_rows_
  std::vector<int32_t> positions_, lo_, hi_;   // per used row
  int32_t num_layers_ = 0;
};

}  // namespace dynsplit

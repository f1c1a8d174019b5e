// SPDX-License-Identifier: Apache-2.0
//
// The one list of shapes that every backend is checked on.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "server/pipeline/policy.h"
#include "server/pipeline/types.h"

namespace dynsplit::oracle {

enum class Layout : uint8_t {
  kDense,           // [T, H, D]
  kHeadMajor,       // [H, T, D]
  kPadded,          // [T, H, D] with odd element strides and a base aligned to one element only
  kPaged,           // pages of [page_size, H, D] behind a shuffled block table
  kPagedHeadMajor,  // pages of [H, page_size, D]
};

struct ParityShape {
  std::string name;
  int64_t num_tokens = 0;
  int32_t num_query_heads = 1;
  int32_t num_kv_heads = 1;
  int32_t head_dim = 64;
  int32_t num_queries = 1;  // window, 1 <= W <= T; ScoreWindow needs W < T
  DType dtype = DType::kBFloat16;
  Layout layout = Layout::kDense;
  int32_t input_page_size = 16;                                  // paged layouts
  ScaleGranularity input_granularity = ScaleGranularity::kHead;  // quantised input
  DType query_dtype = DType::kBFloat16;
  // Block lengths are uniform in [min, max]; the last block takes what is left.
  int32_t min_block = 8;
  int32_t max_block = 20;
  bool kept_per_head = false;  // groups = Hkv, else 1
  double kept_ratio = 0.2;
  int32_t page_size = 16;  // output pages
  EncodingPolicy::Format format = EncodingPolicy::Format::kAsIs;
  ScaleGranularity granularity = ScaleGranularity::kHead;
  int32_t rotary_dim = 0;  // 0 = no rotation
  bool interleaved = false;
  int32_t pooling_kernel = 5;
  ScoringPolicy::Pooling pooling = ScoringPolicy::Pooling::kAverage;

  int32_t group_size() const { return num_query_heads / num_kv_heads; }
  int32_t num_kept_sets() const { return kept_per_head ? num_kv_heads : 1; }
  // Small enough for every format and rotation to be tried on it.
  bool small() const { return num_tokens * num_kv_heads * head_dim <= (1 << 18); }
};

std::span<const ParityShape> ParityShapes();

}  // namespace dynsplit::oracle

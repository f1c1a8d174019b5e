// SPDX-License-Identifier: Apache-2.0
//
// DD-Select as methods.md states it, block after block.
#include <algorithm>
#include <cstdlib>

#include "tests/oracle/reference.h"

namespace dynsplit::oracle {
namespace {

struct Candidate {
  double value = 0;
  int32_t distance = 0;  // from the ideal end
  int32_t cut = 0;
};

bool IsBetter(const Candidate& a, const Candidate& b) {
  if (a.value != b.value) return a.value > b.value;
  if (a.distance != b.distance) return a.distance < b.distance;
  return a.cut < b.cut;
}

// Negative if the token is no delimiter.
float TokenWeight(const SegmentTokensParams& p, int64_t token) {
  const int32_t id = p.token_ids[token];
  return id >= 0 && id < p.num_weights ? p.weights[id] : -1.0F;
}

// Where the block that starts at `start` ends. Requires: its window is known.
int32_t BestCut(const SegmentTokensParams& p, int32_t start) {
  const int32_t ideal = start + p.block_size;
  const int32_t first = ideal - p.max_deviation;
  const int32_t last = ideal + p.max_deviation;
  const auto closes_delimiter = [&](int32_t cut) {
    return cut >= first && cut <= last && TokenWeight(p, cut - 1) >= 0;
  };
  std::vector<Candidate> candidates;
  for (int32_t cut = first; cut <= last; ++cut) {
    if (!closes_delimiter(cut) || closes_delimiter(cut + 1)) continue;  // not the end of a run
    double weight = 0;
    for (int32_t of_run = cut; closes_delimiter(of_run); --of_run) {
      weight = std::max(weight, static_cast<double>(TokenWeight(p, of_run - 1)));
    }
    const int32_t distance = std::abs(cut - ideal);
    const double closeness =
        1.0 - static_cast<double>(distance) / static_cast<double>(p.max_deviation + 1);
    candidates.push_back({p.balance * weight + (1.0 - p.balance) * closeness, distance, cut});
  }
  if (candidates.empty()) return ideal;
  return std::min_element(candidates.begin(), candidates.end(), IsBetter)->cut;
}

}  // namespace

Segmentation SegmentTokens(const SegmentTokensParams& params) {
  Segmentation result;
  result.starts = {0};
  while (result.starts.back() + params.block_size + params.max_deviation <= params.num_tokens) {
    result.starts.push_back(BestCut(params, result.starts.back()));
  }
  result.open_begin = result.starts.back();
  if (result.open_begin < params.num_tokens) {
    result.starts.push_back(static_cast<int32_t>(params.num_tokens));
  }
  return result;
}

}  // namespace dynsplit::oracle

// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "server/cpu/operations.h"
#include "server/pipeline/segmentation.h"

namespace dynsplit::cpu {

// On the calling thread: each block starts where the one before ends.
absl::Status SegmentTokens(const SegmentTokensParams& params, const Workspace& /*workspace*/) {
  const SegmentationPolicy policy = {.method = SegmentationPolicy::Method::kDynamic,
                                     .block_size = params.block_size,
                                     .max_deviation = params.max_deviation,
                                     .balance = params.balance,
                                     .profile = ""};
  const Segmentation segmentation =
      SegmentByWeights({params.token_ids, static_cast<size_t>(params.num_tokens)}, policy,
                       {params.weights, static_cast<size_t>(params.num_weights)});
  std::copy(segmentation.starts.begin(), segmentation.starts.end(), params.block_starts);
  params.counts[0] = static_cast<int32_t>(segmentation.num_blocks());
  params.counts[1] = segmentation.open_begin;
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu

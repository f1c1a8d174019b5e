// SPDX-License-Identifier: Apache-2.0
//
// A sequence long enough to be cut on the device is cut as it is on the host.
#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

#include "server/pipeline/compress.h"
#include "tests/gpu/gpu.h"
#include "tests/oracle/random_tensors.h"

namespace dynsplit {
namespace {

DelimiterProfile Profile(int32_t largest_id) {
  std::vector<DelimiterWeight> weights(4);
  constexpr float kWeights[] = {1.0F, 0.6F, 0.3F, 0.0F};
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i].token_id = static_cast<int32_t>(i);
    weights[i].weight = kWeights[i];
  }
  weights.back().token_id = largest_id;
  return DelimiterProfile::Create("test", "", std::move(weights)).value();
}

// 128,256 as of a large vocabulary, and an id that no table holds.
TEST(CudaSegmentTest, PreparedSequencesAreCutAsOnTheHost) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  const std::unique_ptr<Stream> stream = gpu->CreateStream().value();
  for (const int32_t largest_id : {128255, 1 << 30}) {
    const DelimiterProfile profile = Profile(largest_id);
    for (const int64_t num_tokens : {1000, (1 << 15) - 1, 1 << 15, 300'007}) {
      oracle::Random random(41);
      std::vector<int32_t> ids(static_cast<size_t>(num_tokens));
      for (int32_t& id : ids) {
        const int64_t draw = random.Between(0, 40);
        id = draw < 3 ? static_cast<int32_t>(draw) : draw == 3 ? largest_id : 5000;
      }
      SequenceSpec spec;
      spec.shape = {.num_layers = 1,
                    .num_query_heads = 1,
                    .num_kv_heads = 1,
                    .num_tokens = num_tokens,
                    .head_dim = 64};
      spec.policy.segmentation.method = SegmentationPolicy::Method::kDynamic;
      spec.policy.positions = Positions::kOriginal;
      spec.policy.scoring.method = ScoringPolicy::Method::kKeyNorm;
      const auto context = PrepareSequence(spec, ids, &profile, *gpu, *stream);
      ASSERT_TRUE(context.ok()) << context.status();
      EXPECT_EQ((*context)->segmentation, Segment(ids, spec.policy.segmentation, &profile))
          << num_tokens << " tokens, ids to " << largest_id;
    }
  }
}

}  // namespace
}  // namespace dynsplit

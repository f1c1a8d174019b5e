// SPDX-License-Identifier: Apache-2.0
//
// Methods of the literature as rows. A row states only what differs from the defaults of policy.h;
// kept_ratio is 0.2 in all of them.
#include "server/pipeline/errors.h"
#include "server/pipeline/policy.h"

namespace dynsplit {
namespace {

using Segment = SegmentationPolicy::Method;
using Score = ScoringPolicy::Method;

Policy Row(const char* name, Segment segment, Score score, Scope scope) {
  Policy policy;
  policy.preset = name;
  policy.segmentation.method = segment;
  policy.scoring.method = score;
  policy.scope = scope;
  // Only attention over tokens is smoothed.
  policy.scoring.pooling_kernel = score == Score::kWindowQueries ? 5 : 1;
  return policy;
}

Policy Protecting(Policy policy, int64_t num_sink_tokens, int64_t num_recent_tokens) {
  policy.protection.num_sink_tokens = num_sink_tokens;
  policy.protection.num_recent_tokens = num_recent_tokens;
  return policy;
}

Policy WithWindow(Policy policy, int32_t num_queries, int32_t pooling_kernel) {
  policy.scoring.num_window_queries = num_queries;
  policy.scoring.pooling_kernel = pooling_kernel;
  return policy;
}

// What ranks blocks best on SmolLM2 (README, accuracy): few queries, so that the question outweighs
// the text before it; sharp ones, so that a fact that one query asks for outranks what all glance
// at; and blocks instead of pooling.
Policy WithOurWindow(Policy policy) {
  policy = WithWindow(std::move(policy), 16, 1);
  policy.scoring.query_reduction = ScoringPolicy::QueryReduction::kRootMeanSquare;
  return policy;
}

Policy WithBlocks(Policy policy, int32_t block_size) {
  policy.segmentation.block_size = block_size;
  return policy;
}

Policy WithCut(Policy policy, int32_t block_size, int32_t max_deviation) {
  policy.segmentation.block_size = block_size;
  policy.segmentation.max_deviation = max_deviation;
  return policy;
}

Policy Refined(Policy policy, int32_t factor) {
  policy.scoring.refinement_factor = factor;
  return policy;
}

Policy AsIndex(Policy policy) {
  policy.transform = Transform::kIndex;
  return policy;
}

Policy InWholeBlocks(Policy policy) {
  policy.budget.whole_blocks = true;
  return policy;
}

Policy WithMaxPooling(Policy policy) {
  policy.scoring.pooling = ScoringPolicy::Pooling::kMax;
  return policy;
}

std::vector<Preset> MakePresets() {
  return {
      {WithOurWindow(Row("dynsplit", Segment::kDynamic, Score::kWindowQueries, Scope::kLayerHead)),
       "Dynamic delimiter blocks ranked per KV head by the root mean square of the attention of up "
       "to 16 window queries; blocks are kept by rank, the last one cut so that all heads keep "
       "equal counts.",
       "segmentation and uniform mapping of arXiv 2602.03184 section 4; eviction is ours",
       "dynsplit_keys"},
      {Protecting(Refined(WithCut(AsIndex(Row("dynsplit_index", Segment::kDynamic,
                                              Score::kBlockMeanKey, Scope::kLayerHead)),
                                  14, 13),
                          4),
                  4, 8),
       "Keeps all tokens and adds mean keys of dynamic delimiter blocks, for selection at each "
       "decode step: blocks propose four times the budget, the tokens' own keys decide.",
       "arXiv 2602.03184 sections 4.1 and 4.2; mean keys and the second stage are ours", ""},
      {Row("dynsplit_keys", Segment::kDynamic, Score::kKeyDifference, Scope::kLayer),
       "Dynamic delimiter blocks ranked by how far their keys point from the mean direction; needs "
       "no queries.",
       "segmentation of arXiv 2602.03184; scores of arXiv 2504.15364", "streamingllm"},
      {Protecting(WithBlocks(WithWindow(InWholeBlocks(Row("chunkkv", Segment::kFixed,
                                                          Score::kWindowQueries, Scope::kLayer)),
                                        64, 5),
                             20),
                  0, 64),
       "Whole chunks of 20 tokens ranked by their mean window attention, one set for all heads of "
       "a "
       "layer; no index reuse between layers.",
       "arXiv 2502.00299, as in kvpress", "dynsplit_keys"},
      {Protecting(
           WithWindow(Row("snapkv", Segment::kNone, Score::kWindowQueries, Scope::kLayerHead), 64,
                      5),
           0, 64),
       "Tokens ranked per KV head by the pooled attention of the last 64 queries.",
       "arXiv 2404.14469, as in kvpress", "keydiff"},
      {Protecting(Row("streamingllm", Segment::kNone, Score::kRecency, Scope::kLayer), 4, 0),
       "The first 4 tokens and the most recent ones.", "arXiv 2309.17453", ""},
      {Protecting(Row("h2o", Segment::kNone, Score::kAccumulated, Scope::kLayerHead), 0, 32),
       "Tokens ranked per KV head by the attention they received so far, plus the last 32 tokens; "
       "the paper gives half of the budget to recent tokens.",
       "arXiv 2306.14048", "keydiff"},
      {Protecting(
           WithWindow(Row("tova", Segment::kNone, Score::kWindowQueries, Scope::kLayer), 1, 1), 0,
           0),
       "Tokens ranked by the last query's attention, over all heads of a layer; decided once after "
       "prefill.",
       "arXiv 2401.06104", "keydiff"},
      {Protecting(Row("knorm", Segment::kNone, Score::kKeyNorm, Scope::kLayerHead), 0, 0),
       "Tokens with the smallest key norms, per KV head.", "arXiv 2406.11430, as in kvpress",
       "streamingllm"},
      {Protecting(Row("keydiff", Segment::kNone, Score::kKeyDifference, Scope::kLayerHead), 0, 0),
       "Tokens whose keys point furthest from the mean direction, per KV head.",
       "arXiv 2504.15364, as in kvpress", "streamingllm"},
      {WithBlocks(AsIndex(Row("quest", Segment::kFixed, Score::kBlockBound, Scope::kLayerHead)),
                  16),
       "Keeps all tokens and adds key bounds (min, max) of blocks of 16, for selection at each "
       "decode step.",
       "arXiv 2406.10774", ""},
      {Protecting(WithMaxPooling(WithWindow(Row("sentencekv", Segment::kDelimiterSet,
                                                Score::kWindowQueries, Scope::kLayerHead),
                                            32, 7)),
                  32, 32),
       "Sentences ranked per KV head by the max-pooled attention of the last 32 queries; decided "
       "once, where the paper ranks sentences again for each one generated.",
       "arXiv 2504.00970", "dynsplit_keys"},
      {WithBlocks(WithOurWindow(Row("fixed_window", Segment::kFixed, Score::kWindowQueries,
                                    Scope::kLayerHead)),
                  20),
       "dynsplit with blocks of 20 tokens wherever they fall: what the delimiters are worth is the "
       "difference to dynsplit.",
       "ablation of arXiv 2602.03184 section 5", "dynsplit_keys"},
  };
}

}  // namespace

std::span<const Preset> Presets() {
  static const auto* const presets = new std::vector<Preset>(MakePresets());
  return *presets;
}

absl::StatusOr<const Preset*> FindPreset(std::string_view name) {
  for (const Preset& preset : Presets()) {
    if (preset.policy.preset == name) return &preset;
  }
  return NotFound("preset", name);
}

}  // namespace dynsplit

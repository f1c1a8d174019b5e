// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/output_need.h"

#include <iterator>

namespace dynsplit {
namespace {

// Bytes that a layer takes in an OutputRoom, up to where the next begins.
int64_t PlacedBytes(const SequenceSpec& spec, int64_t num_kept, int32_t groups,
                    int64_t num_blocks) {
  const int64_t num_pages = (num_kept + spec.policy.page_size - 1) / spec.policy.page_size;
  int64_t bytes = OutputRoom::Aligned(int64_t{4} * groups * num_kept) +
                  OutputRoom::Aligned(int64_t{4} * num_pages);
  for (const int64_t size : LayerPageBytes(spec, num_kept, num_blocks)) {
    bytes += OutputRoom::Aligned(size);
  }
  return bytes;
}

}  // namespace

SequenceSpec OriginalsSpec(SequenceSpec spec) {
  spec.policy.transform = Transform::kEvict;
  spec.policy.scoring.refinement_factor = 0;
  spec.policy.encoding = EncodingPolicy{};
  spec.policy.positions = Positions::kOriginal;
  return spec;
}

bool WritesInPlace(const RequestSpec& spec, bool device_has_own_memory) {
  return spec.output != nullptr && (spec.output->on_device() || !device_has_own_memory) &&
         !spec.shadow && spec.sequence.policy.quality_floor.max_output_relative_error == 0;
}

OutputNeed OutputNeedOf(const RequestSpec& spec) {
  const SequenceSpec& sequence = spec.sequence;
  const int64_t num_tokens = sequence.shape.num_tokens;
  const int32_t most_groups =
      sequence.policy.scope == Scope::kLayerHead ? sequence.shape.num_kv_heads : 1;
  OutputNeed need;
  if (spec.shadow) {
    need.least_bytes = need.most_bytes =
        sequence.shape.num_layers * PlacedBytes(OriginalsSpec(sequence), num_tokens, 1, 0);
    return need;
  }
  if (spec.method == Method::kApply) {
    int64_t num_blocks = 0;
    for (const RequestTensor& tensor : spec.tensors) {
      if (tensor.kind == TensorKind::kBlockStarts) num_blocks = tensor.byte_size / 4 - 1;
    }
    for (const LayerPlan& layer : spec.plan->layers) {
      need.least_bytes += PlacedBytes(sequence, layer.num_kept, layer.groups, num_blocks);
    }
    need.most_bytes = need.least_bytes;
    return need;
  }
  if (spec.method == Method::kFetch) {
    int64_t num_whole = std::ssize(spec.fetch_layers);
    for (const RequestTensor& tensor : spec.tensors) {  // KEPT_TOKENS of some layers
      const int64_t num_kept = tensor.byte_size / 4 / most_groups;
      need.least_bytes += PlacedBytes(sequence, num_kept, most_groups, 0);
      --num_whole;
    }
    need.least_bytes += num_whole * PlacedBytes(sequence, num_tokens, 1, 0);
    need.most_bytes = need.least_bytes;
    return need;
  }
  for (int32_t layer = 0; layer < sequence.shape.num_layers; ++layer) {
    const int64_t least = LeastKept(sequence, layer);
    need.least_bytes += PlacedBytes(sequence, least, least == num_tokens ? 1 : most_groups, 1);
  }
  need.most_bytes =
      sequence.shape.num_layers * PlacedBytes(sequence, num_tokens, most_groups, num_tokens);
  return need;
}

}  // namespace dynsplit

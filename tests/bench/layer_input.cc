// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/layer_input.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>

#include "server/pipeline/policy.h"
#include "server/pipeline/segmentation.h"

namespace dynsplit::bench {
namespace {

const DelimiterProfile& Profile() { return BuiltinProfiles().front(); }

// One delimiter in nine tokens, as in prose.
std::vector<int32_t> TokenIds(int64_t num_tokens) {
  std::mt19937_64 random(7);
  std::vector<int32_t> ids(static_cast<size_t>(num_tokens));
  const auto weights = Profile().weights();
  for (int32_t& id : ids) {
    id = random() % 9 == 0 ? weights[random() % weights.size()].token_id
                           : static_cast<int32_t>(random() % 32000);
  }
  return ids;
}

}  // namespace

void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

void FillBFloat16(int64_t count, uint64_t seed, uint16_t* values) {
  std::mt19937_64 random(seed);
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bits = random();
    const uint64_t exponent = 122 + bits % 6;  // 2^-5 .. 1
    values[i] = static_cast<uint16_t>((bits >> 40 & 0x8000) | exponent << 7 | (bits >> 20 & 0x7F));
  }
}

LayerInput::LayerInput(Backend& backend, Stream& stream, int64_t num_tokens,
                       int32_t distinct_layers)
    : backend_(backend),
      stream_(stream),
      num_tokens_(num_tokens),
      token_ids_(TokenIds(num_tokens)) {
  const int64_t counts[] = {num_tokens * kKvHeads * kHeadDim, num_tokens * kKvHeads * kHeadDim,
                            int64_t{kWindow} * kQueryHeads * kHeadDim};
  uint64_t seed = 0;
  for (int32_t layer = 0; layer < distinct_layers; ++layer) {
    for (const int64_t count : counts) {
      Buffer host = Check(backend.AllocateHost(count * 2));
      FillBFloat16(count, ++seed, host.as<uint16_t>());
      device_.push_back(Check(backend.ToDevice(host, stream)));
      host_.push_back(std::move(host));
    }
  }
  Check(stream.Synchronize());
}

LayerTensors LayerInput::Layer(int32_t layer) const {
  const size_t first = static_cast<size_t>(layer) * 3 % device_.size();
  LayerTensors tensors;
  tensors.layer = layer;
  tensors.keys =
      DenseView(device_[first].data(), DType::kBFloat16, num_tokens_, kKvHeads, kHeadDim);
  tensors.values =
      DenseView(device_[first + 1].data(), DType::kBFloat16, num_tokens_, kKvHeads, kHeadDim);
  tensors.queries =
      DenseView(device_[first + 2].data(), DType::kBFloat16, kWindow, kQueryHeads, kHeadDim);
  return tensors;
}

void LayerInput::Compress(std::string_view preset, int32_t num_layers) const {
  SequenceSpec spec;
  spec.shape = {.num_layers = num_layers,
                .num_query_heads = kQueryHeads,
                .num_kv_heads = kKvHeads,
                .num_tokens = num_tokens_,
                .head_dim = kHeadDim};
  spec.policy = Check(FindPreset(preset))->policy;
  spec.supply.num_window_queries = kWindow;
  spec.with_receipt = false;
  Check(ResolveEvidence(spec));
  const std::unique_ptr<SequenceContext> context =
      Check(PrepareSequence(std::move(spec), token_ids_, &Profile(), backend_, stream_));
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    Check(CompressLayer(*context, Layer(layer), /*with_pages=*/true, backend_, stream_));
  }
  Check(stream_.Synchronize());
}

}  // namespace dynsplit::bench

// SPDX-License-Identifier: Apache-2.0
//
// Random layers in host memory on the CPU backend, and the plain attention that tests compare with.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "server/cpu/cpu_backend.h"
#include "server/pipeline/compress.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/numeric.h"

namespace dynsplit {

// bf16 tensor [tokens, heads, head_dim].
struct HostTensor {
  int64_t num_tokens = 0;
  int32_t num_heads = 0;
  int32_t head_dim = 0;
  std::vector<uint16_t> bits;

  size_t Index(int64_t t, int32_t h, int32_t c) const {
    return static_cast<size_t>((t * num_heads + h) * head_dim + c);
  }
  double At(int64_t t, int32_t h, int32_t c) const { return BFloat16ToFloat(bits[Index(t, h, c)]); }
  void Set(int64_t t, int32_t h, int32_t c, float value) {
    bits[Index(t, h, c)] = FloatToBFloat16(value);
  }
  TensorView view() const {
    return DenseView(bits.data(), DType::kBFloat16, num_tokens, num_heads, head_dim);
  }
};

struct HostLayer {
  HostTensor keys, values, queries;
};

class LayerFixture : public testing::Test {
 protected:
  LayerFixture() : backend_(CreateCpuBackend({.num_threads = 2}).value()) {
    stream_ = backend_->CreateStream().value();
    std::vector<DelimiterWeight> weights(2);
    weights[0].token_id = 1;
    weights[0].weight = 1.0f;
    weights[0].sentence_end = true;
    weights[1].token_id = 2;
    weights[1].weight = 0.5f;
    profile_ = DelimiterProfile::Create("test", "", weights).value();
    std::bernoulli_distribution is_delimiter(0.1);
    token_ids_.resize(static_cast<size_t>(shape_.num_tokens));
    for (int32_t& id : token_ids_) {
      id = is_delimiter(random_) ? 1 + static_cast<int32_t>(random_() % 2) : 50;
    }
    for (int32_t layer = 0; layer < shape_.num_layers; ++layer) {
      layers_.push_back({RandomTensor(shape_.num_tokens, shape_.num_kv_heads),
                         RandomTensor(shape_.num_tokens, shape_.num_kv_heads),
                         RandomTensor(kWindow, shape_.num_query_heads)});
    }
  }

  HostTensor RandomTensor(int64_t num_tokens, int32_t num_heads) {
    std::normal_distribution<float> normal(0, 1.5f);
    HostTensor tensor{num_tokens, num_heads, shape_.head_dim, {}};
    tensor.bits.resize(tensor.Index(num_tokens, 0, 0));
    for (uint16_t& bits : tensor.bits) bits = FloatToBFloat16(normal(random_));
    return tensor;
  }

  static Policy PresetPolicy(std::string_view name) { return FindPreset(name).value()->policy; }

  // Resolved, as the services hand it to the pipeline.
  SequenceSpec Spec(const Policy& policy) const {
    SequenceSpec spec;
    spec.shape = shape_;
    spec.policy = policy;
    spec.supply.num_window_queries = kWindow;
    if (policy.positions == Positions::kContiguous) {
      Rope rope{.rotary_dim = shape_.head_dim, .interleaved = false, .inverse_frequencies = {}};
      for (int32_t i = 0; i < shape_.head_dim / 2; ++i) {
        rope.inverse_frequencies.push_back(std::pow(10000.0, -2.0 * i / shape_.head_dim));
      }
      spec.rope = rope;
    }
    return spec;
  }

  std::unique_ptr<SequenceContext> Prepare(const SequenceSpec& spec) {
    const Rope* rope = spec.rope.has_value() ? &*spec.rope : nullptr;
    EXPECT_TRUE(ValidatePolicy(spec.policy, spec.shape, rope).ok())
        << ValidatePolicy(spec.policy, spec.shape, rope);
    return PrepareSequence(spec, token_ids_, &profile_, *backend_, *stream_).value();
  }

  LayerTensors Tensors(int32_t layer) const {
    const HostLayer& host = layers_[static_cast<size_t>(layer)];
    LayerTensors tensors;
    tensors.layer = layer;
    tensors.keys = host.keys.view();
    tensors.values = host.values.view();
    tensors.queries = host.queries.view();
    return tensors;
  }

  absl::StatusOr<LayerResult> Compress(const SequenceContext& context, int32_t layer,
                                       bool with_pages = true) {
    return CompressLayer(context, Tensors(layer), with_pages, *backend_, *stream_);
  }
  LayerResult Compress(const Policy& policy) {
    contexts_.push_back(Prepare(Spec(policy)));
    return Compress(*contexts_.back(), 0).value();
  }

  // Softmax attention of query row i (position T - W + i) of head a over keys 0..position, in
  // double.
  std::vector<double> Attention(const HostLayer& layer, int64_t i, int32_t a) const {
    const int64_t position = shape_.num_tokens - layer.queries.num_tokens + i;
    const int32_t h = a / shape_.group_size();
    std::vector<double> weights(static_cast<size_t>(position + 1));
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t t = 0; t <= position; ++t) {
      double dot = 0;
      for (int32_t c = 0; c < shape_.head_dim; ++c) {
        dot += layer.queries.At(i, a, c) * layer.keys.At(t, h, c);
      }
      weights[static_cast<size_t>(t)] = dot / std::sqrt(shape_.head_dim);
      largest = std::max(largest, weights[static_cast<size_t>(t)]);
    }
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    for (double& weight : weights) weight /= sum;
    return weights;
  }

  // SnapKV's scores [Hkv][T - W]: mean over the last `window` queries, zero-padded average pool,
  // mean over the group.
  std::vector<std::vector<double>> WindowScores(const HostLayer& layer, int64_t window,
                                                int32_t kernel) const {
    const int64_t num_scored = shape_.num_tokens - window;
    std::vector<std::vector<double>> scores(
        static_cast<size_t>(shape_.num_kv_heads),
        std::vector<double>(static_cast<size_t>(num_scored), 0.0));
    for (int32_t a = 0; a < shape_.num_query_heads; ++a) {
      std::vector<double> mean(static_cast<size_t>(num_scored), 0.0);
      for (int64_t i = layer.queries.num_tokens - window; i < layer.queries.num_tokens; ++i) {
        const std::vector<double> weights = Attention(layer, i, a);
        for (size_t t = 0; t < mean.size(); ++t) {
          mean[t] += weights[t] / static_cast<double>(window);
        }
      }
      std::vector<double>& head = scores[static_cast<size_t>(a / shape_.group_size())];
      for (int64_t t = 0; t < num_scored; ++t) {
        for (int64_t u = t - kernel / 2; u <= t + kernel / 2; ++u) {
          if (u < 0 || u >= num_scored) continue;
          head[static_cast<size_t>(t)] +=
              mean[static_cast<size_t>(u)] / kernel / shape_.group_size();
        }
      }
    }
    return scores;
  }

  static constexpr int64_t kWindow = 16;
  const SequenceShape shape_ = {
      .num_layers = 2, .num_query_heads = 4, .num_kv_heads = 2, .num_tokens = 307, .head_dim = 32};
  std::mt19937_64 random_{2026};
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Stream> stream_;
  DelimiterProfile profile_ = DelimiterProfile::Create("none", "", {}).value();
  std::vector<int32_t> token_ids_;
  std::vector<HostLayer> layers_;
  std::vector<std::unique_ptr<SequenceContext>> contexts_;  // results may refer to them
};

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "tests/oracle/random_tensors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "tests/oracle/numbers.h"

namespace dynsplit::oracle {
namespace {

constexpr int64_t kPaddingTokens = 3;  // elements of padding after each head in Layout::kPadded
constexpr int32_t kSparePages = 3;     // pages of the pool that no table entry names

int64_t AlignUp(int64_t value, int64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

// Sets strides; returns the bytes the elements span.
int64_t LayOut(TensorView& view, Layout layout, int32_t page_size) {
  const int64_t row = view.head_dim * DTypeBytes(view.dtype);
  const int64_t num_pages = (view.num_tokens + page_size - 1) / page_size + kSparePages;
  switch (layout) {
    case Layout::kDense:
      view.head_stride_bytes = row;
      view.token_stride_bytes = row * view.num_heads;
      return view.token_stride_bytes * view.num_tokens;
    case Layout::kHeadMajor:
      view.token_stride_bytes = row;
      view.head_stride_bytes = row * view.num_tokens;
      return view.head_stride_bytes * view.num_heads;
    case Layout::kPadded:
      view.head_stride_bytes = row + kPaddingTokens * DTypeBytes(view.dtype);
      view.token_stride_bytes =
          view.head_stride_bytes * view.num_heads + 5 * DTypeBytes(view.dtype);
      return view.token_stride_bytes * view.num_tokens;
    case Layout::kPaged:
      view.head_stride_bytes = row;
      view.token_stride_bytes = row * view.num_heads;
      break;
    case Layout::kPagedHeadMajor:
      view.token_stride_bytes = row;
      view.head_stride_bytes = row * page_size;
      break;
  }
  view.page_size = page_size;
  view.page_stride_bytes = row * view.num_heads * page_size;
  return view.page_stride_bytes * num_pages;
}

float RandomValue(Random& random) {
  const int64_t kind = random.Between(0, 199);
  if (kind == 0) return 0.0F;
  if (kind == 1) return -0.0F;
  if (kind == 2) return random.Normal() * 1e-6F;
  if (kind == 3) return random.Normal() * 6.0F;
  return random.Normal();
}

}  // namespace

int64_t Random::Between(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
}

double Random::Uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

float Random::Normal() {
  // Each draw of 64 bits gives four uniforms of 16 bits.
  int64_t sum = 0;
  for (int draw = 0; draw < 3; ++draw) {
    const uint64_t bits = engine_();
    for (int part = 0; part < 4; ++part)
      sum += static_cast<int64_t>((bits >> (16 * part)) & 0xFFFF);
  }
  return static_cast<float>(static_cast<double>(sum) * 0x1p-16 - 6.0);
}

HostTensor HostTensor::Make(const ParityShape& shape, int64_t num_tokens, int32_t num_heads,
                            DType dtype, Layout layout, uint64_t seed) {
  Random random(seed);
  HostTensor tensor;
  TensorView& view = tensor.geometry_;
  view.dtype = dtype;
  view.num_tokens = num_tokens;
  view.num_heads = num_heads;
  view.head_dim = shape.head_dim;
  const int64_t data_bytes = LayOut(view, layout, shape.input_page_size);
  tensor.data_offset_ = layout == Layout::kPadded ? DTypeBytes(dtype) : 0;
  int64_t size = AlignUp(tensor.data_offset_ + data_bytes, 256);
  std::vector<int32_t> table;
  if (view.page_size > 0) {
    table.resize(static_cast<size_t>(data_bytes / view.page_stride_bytes));
    std::iota(table.begin(), table.end(), 0);
    for (size_t i = table.size() - 1; i > 0; --i) {
      std::swap(table[i], table[static_cast<size_t>(random.Between(0, static_cast<int64_t>(i)))]);
    }
    table.resize(table.size() - kSparePages);
    tensor.block_table_offset_ = size;
    size = AlignUp(size + static_cast<int64_t>(table.size() * sizeof(int32_t)), 256);
  }
  std::vector<float> scales;
  if (IsQuantized(dtype)) {
    view.scale_granularity = shape.input_granularity;
    const bool per_token = view.scale_granularity == ScaleGranularity::kTokenHead;
    scales.resize(static_cast<size_t>(per_token ? num_tokens * num_heads : num_heads));
    const double unit = dtype == DType::kInt8 ? 1.0 / 40 : 1.0;
    for (float& scale : scales) scale = static_cast<float>((0.5 + random.Uniform()) * unit);
    tensor.scales_offset_ = size;
    size += static_cast<int64_t>(scales.size() * sizeof(float));
  }
  tensor.blob_.assign(static_cast<size_t>(size), std::byte{0xFF});
  if (!table.empty()) {
    std::memcpy(tensor.blob_.data() + tensor.block_table_offset_, table.data(),
                table.size() * sizeof(int32_t));
  }
  if (!scales.empty()) {
    std::memcpy(tensor.blob_.data() + tensor.scales_offset_, scales.data(),
                scales.size() * sizeof(float));
  }
  const float code_unit = dtype == DType::kInt8 ? 40.0F : 1.0F;
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int32_t h = 0; h < num_heads; ++h) {
      for (int32_t c = 0; c < shape.head_dim; ++c)
        tensor.Set(t, h, c, RandomValue(random) * code_unit);
    }
  }
  return tensor;
}

HostTensor HostTensor::Cache(const ParityShape& shape, uint64_t seed) {
  return Make(shape, shape.num_tokens, shape.num_kv_heads, shape.dtype, shape.layout, seed);
}

HostTensor HostTensor::Queries(const ParityShape& shape, uint64_t seed) {
  return Make(shape, shape.num_queries, shape.num_query_heads, shape.query_dtype, Layout::kDense,
              seed);
}

TensorView HostTensor::ViewAt(const std::byte* base) const {
  TensorView view = geometry_;
  view.data = base + data_offset_;
  if (block_table_offset_ >= 0) {
    view.block_table = reinterpret_cast<const int32_t*>(base + block_table_offset_);
  }
  if (scales_offset_ >= 0) view.scales = reinterpret_cast<const float*>(base + scales_offset_);
  return view;
}

void HostTensor::Set(int64_t token, int32_t head, int32_t c, float value) {
  const int64_t offset = ElementAddress(view(), token, head, c) - blob_.data();
  EncodeElement(geometry_.dtype, value, blob_.data() + offset);
}

void HostTensor::SetScale(int64_t token, int32_t head, float scale) {
  const int64_t index = geometry_.scale_granularity == ScaleGranularity::kHead
                            ? head
                            : token * geometry_.num_heads + head;
  std::memcpy(blob_.data() + scales_offset_ + index * static_cast<int64_t>(sizeof(float)), &scale,
              sizeof(float));
}

std::vector<int32_t> RandomBlockStarts(const ParityShape& shape, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> starts = {0};
  while (starts.back() < shape.num_tokens) {
    const int64_t next = starts.back() + random.Between(shape.min_block, shape.max_block);
    starts.push_back(static_cast<int32_t>(std::min(next, shape.num_tokens)));
  }
  return starts;
}

KeptSets RandomKept(const ParityShape& shape, uint64_t seed) {
  Random random(seed);
  KeptSets kept;
  kept.groups = shape.num_kept_sets();
  kept.num_kept = std::clamp<int64_t>(
      static_cast<int64_t>(shape.kept_ratio * static_cast<double>(shape.num_tokens)), 1,
      shape.num_tokens);
  for (int32_t g = 0; g < kept.groups; ++g) {
    int64_t wanted = kept.num_kept;  // selection sampling: ascending, each set equally likely
    for (int64_t t = 0; t < shape.num_tokens && wanted > 0; ++t) {
      if (random.Between(0, shape.num_tokens - t - 1) < wanted) {
        kept.tokens.push_back(static_cast<int32_t>(t));
        --wanted;
      }
    }
  }
  return kept;
}

HostRotation MakeRotation(int64_t num_tokens, int32_t rotary_dim, bool interleaved) {
  HostRotation rotation;
  rotation.rotary_dim = rotary_dim;
  rotation.interleaved = interleaved;
  const int32_t pairs = rotary_dim / 2;
  const auto fill = [&](std::vector<float>& out, int64_t count, int64_t step) {
    for (int64_t n = 0; n < count; ++n) {
      for (int32_t i = 0; i < pairs; ++i) {
        const double angle =
            static_cast<double>(n * step) * std::pow(10000.0, -2.0 * i / rotary_dim);
        out.push_back(static_cast<float>(std::cos(angle)));
        out.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  };
  fill(rotation.coarse, (num_tokens + 255) / 256 + 1, 256);
  fill(rotation.fine, 256, 1);
  return rotation;
}

}  // namespace dynsplit::oracle

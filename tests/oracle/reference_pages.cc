// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>

#include "tests/oracle/numbers.h"
#include "tests/oracle/reference.h"

namespace dynsplit::oracle {
namespace {

// NaN orders as -infinity, -0 as 0.
bool Better(float a, float b) {
  const float low = -std::numeric_limits<float>::infinity();
  return (std::isnan(a) ? low : a) > (std::isnan(b) ? low : b);
}

std::vector<int64_t> BlocksByRank(const float* scores, int64_t num_blocks) {
  std::vector<int64_t> order(static_cast<size_t>(num_blocks));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [scores](int64_t a, int64_t b) { return Better(scores[a], scores[b]); });
  return order;
}

std::vector<int32_t> SelectExact(const SelectTokensParams& p, const float* block_scores,
                                 const float* token_scores) {
  std::vector<int32_t> kept;
  for (int32_t t = 0; t < p.num_tokens; ++t) {
    if (p.protected_tokens[t] != 0) kept.push_back(t);
  }
  for (int64_t j : BlocksByRank(block_scores, p.num_blocks)) {
    std::vector<int32_t> tokens;
    for (int32_t t = p.block_starts[j]; t < p.block_starts[j + 1]; ++t) {
      if (p.protected_tokens[t] == 0) tokens.push_back(t);
    }
    const int64_t room = p.num_kept - static_cast<int64_t>(kept.size());
    if (static_cast<int64_t>(tokens.size()) > room) {
      if (token_scores != nullptr) {
        std::stable_sort(tokens.begin(), tokens.end(), [&](int32_t a, int32_t b) {
          return Better(token_scores[a], token_scores[b]);
        });
      }
      tokens.resize(static_cast<size_t>(room));
    }
    kept.insert(kept.end(), tokens.begin(), tokens.end());
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

std::vector<int32_t> SelectWholeBlocks(const SelectTokensParams& p, const float* block_scores) {
  std::vector<uint8_t> chosen(static_cast<size_t>(p.num_blocks), 0);
  int64_t count = 0;
  for (int64_t j = 0; j < p.num_blocks; ++j) {
    for (int32_t t = p.block_starts[j]; t < p.block_starts[j + 1]; ++t) {
      if (p.protected_tokens[t] != 0) chosen[static_cast<size_t>(j)] = 1;
    }
    count += chosen[static_cast<size_t>(j)];
  }
  for (int64_t j : BlocksByRank(block_scores, p.num_blocks)) {
    if (count >= p.num_whole_blocks) break;
    if (chosen[static_cast<size_t>(j)] != 0) continue;
    chosen[static_cast<size_t>(j)] = 1;
    ++count;
  }
  std::vector<int32_t> kept;
  for (int64_t j = 0; j < p.num_blocks; ++j) {
    if (chosen[static_cast<size_t>(j)] == 0) continue;
    for (int32_t t = p.block_starts[j]; t < p.block_starts[j + 1]; ++t) kept.push_back(t);
  }
  return kept;
}

// One scale group: amax -> scale. An amax so small that the quotient is zero counts as zero.
float ScaleOf(float amax, DType dtype) {
  const float scale = amax / (dtype == DType::kInt8 ? 127.0F : 448.0F);
  return scale == 0 ? 1.0F : scale;
}

float Amax(const std::vector<float>& row) {
  float amax = 0;
  for (float x : row) amax = std::max(amax, std::fabs(x));
  return amax;
}

}  // namespace

Selection SelectTokens(const SelectTokensParams& params) {
  Selection selection;
  for (int32_t g = 0; g < params.groups; ++g) {
    const float* block_scores = params.block_scores + g * params.num_blocks;
    const float* token_scores =
        params.token_scores == nullptr ? nullptr : params.token_scores + g * params.num_tokens;
    selection.kept.push_back(params.num_whole_blocks > 0
                                 ? SelectWholeBlocks(params, block_scores)
                                 : SelectExact(params, block_scores, token_scores));
  }
  return selection;
}

DType EncodedType(DType source, EncodingPolicy::Format format, bool rotated) {
  if (format == EncodingPolicy::Format::kFloat8E4M3) return DType::kFloat8E4M3;
  if (format == EncodingPolicy::Format::kInt8) return DType::kInt8;
  return IsQuantized(source) && rotated ? DType::kBFloat16 : source;
}

void TurnBack(const RotationTable& rotation, int64_t delta, std::vector<float>& row) {
  const int32_t half = rotation.rotary_dim / 2;
  for (int32_t i = 0; i < half; ++i) {
    const float* coarse = rotation.coarse + 2 * (delta / 256 * half + i);
    const float* fine = rotation.fine + 2 * (delta % 256 * half + i);
    const float cc = coarse[0] * fine[0];
    const float ss = coarse[1] * fine[1];
    const float cs = coarse[0] * fine[1];
    const float sc = coarse[1] * fine[0];
    const float cos = cc - ss;
    const float sin = cs + sc;
    float& x = row[static_cast<size_t>(rotation.interleaved ? 2 * i : i)];
    float& y = row[static_cast<size_t>(rotation.interleaved ? 2 * i + 1 : i + half)];
    const float x_cos = x * cos;
    const float y_sin = y * sin;
    const float y_cos = y * cos;
    const float x_sin = x * sin;
    x = x_cos + y_sin;
    y = y_cos - x_sin;
  }
}

Pages GatherPages(const GatherPagesItem& p) {
  const TensorView& source = p.source;
  const bool rotated = p.rotation.rotary_dim > 0;
  const bool encoded = p.format != EncodingPolicy::Format::kAsIs;
  const bool copied = !encoded && !rotated;
  const DType dtype = EncodedType(source.dtype, p.format, rotated);
  const bool scaled = encoded || (copied && source.scales != nullptr);
  const bool per_token =
      (encoded ? p.scale_granularity : source.scale_granularity) == ScaleGranularity::kTokenHead;
  const int64_t num_slots = (p.num_kept + p.page_size - 1) / p.page_size * p.page_size;
  const int32_t heads = source.num_heads;
  const int64_t row_bytes = source.head_dim * DTypeBytes(dtype);
  Pages out;
  out.bytes.assign(static_cast<size_t>(num_slots * heads * row_bytes), std::byte{0});
  if (scaled) out.scales.assign(static_cast<size_t>(per_token ? num_slots * heads : heads), 1.0F);

  for (int32_t h = 0; h < heads; ++h) {
    std::vector<int32_t> kept(static_cast<size_t>(p.num_kept));
    std::iota(kept.begin(), kept.end(), 0);
    if (p.kept != nullptr) {
      std::copy_n(p.kept + (p.groups == 1 ? 0 : h) * p.num_kept, p.num_kept, kept.begin());
    }
    std::vector<std::vector<float>> rows;
    for (int64_t s = 0; s < p.num_kept; ++s) {
      std::vector<float> row;
      for (int32_t c = 0; c < source.head_dim; ++c) {
        row.push_back(ElementValue(source, kept[static_cast<size_t>(s)], h, c));
      }
      if (rotated) TurnBack(p.rotation, kept[static_cast<size_t>(s)] - s, row);
      rows.push_back(row);
    }
    float head_amax = 0;
    for (const auto& row : rows) head_amax = std::max(head_amax, Amax(row));
    if (scaled && !per_token) {
      out.scales[static_cast<size_t>(h)] = encoded ? ScaleOf(head_amax, dtype) : source.scales[h];
    }
    for (int64_t s = 0; s < p.num_kept; ++s) {
      std::byte* slot = out.bytes.data() + (s * heads + h) * row_bytes;
      if (copied) {
        if (scaled && per_token) {
          out.scales[static_cast<size_t>(s * heads + h)] =
              ElementScale(source, kept[static_cast<size_t>(s)], h);
        }
        std::memcpy(slot, ElementAddress(source, kept[static_cast<size_t>(s)], h, 0),
                    static_cast<size_t>(row_bytes));
        continue;
      }
      const auto& row = rows[static_cast<size_t>(s)];
      float scale = 1;
      if (encoded) {
        scale = ScaleOf(per_token ? Amax(row) : head_amax, dtype);
        if (per_token) out.scales[static_cast<size_t>(s * heads + h)] = scale;
      }
      for (size_t c = 0; c < row.size(); ++c) {
        EncodeElement(dtype, encoded ? row[c] / scale : row[c],
                      slot + static_cast<int64_t>(c) * DTypeBytes(dtype));
      }
    }
  }
  return out;
}

void RefreshRows(const RefreshRowsItem& item, int32_t groups, int64_t num_rows) {
  const auto move = [&](const TensorView& source, int32_t token, int32_t head, int64_t row,
                        std::byte* rows, float* scales) {
    const int64_t row_bytes = source.head_dim * DTypeBytes(source.dtype);
    if (rows != nullptr) {
      std::memcpy(rows + row * row_bytes, ElementAddress(source, token, head, 0),
                  static_cast<size_t>(row_bytes));
    }
    if (scales != nullptr) scales[row] = ElementScale(source, token, head);
  };
  for (int32_t h = 0; h < item.keys.num_heads; ++h) {
    const int32_t* wanted = item.wanted + (groups == 1 ? 0 : h) * num_rows;
    int32_t* held = item.held + h * num_rows;
    const std::set<int32_t> wants(wanted, wanted + num_rows);
    std::set<int32_t> missing = wants;
    for (int64_t s = 0; s < num_rows; ++s) missing.erase(held[s]);
    int32_t moved = 0;
    for (int64_t s = 0; s < num_rows; ++s) {
      if (wants.count(held[s]) > 0) continue;
      held[s] = *missing.begin();
      missing.erase(missing.begin());
      move(item.keys, held[s], h, h * num_rows + s, item.key_rows, item.key_scales);
      move(item.values, held[s], h, h * num_rows + s, item.value_rows, item.value_scales);
      if (item.moved_slots != nullptr) {
        item.moved_slots[h * num_rows + moved] = static_cast<int32_t>(s);
      }
      ++moved;
    }
    item.num_moved[h] = moved;
  }
}

int32_t CheckFinite(const CheckFiniteItem& item) {
  const TensorView& view = item.tensor;
  for (int64_t t = 0; t < view.num_tokens; ++t) {
    for (int32_t h = 0; h < view.num_heads; ++h) {
      for (int32_t c = 0; c < view.head_dim; ++c) {
        if (!std::isfinite(ElementValue(view, t, h, c))) return static_cast<int32_t>(t);
      }
    }
  }
  return static_cast<int32_t>(view.num_tokens);
}

}  // namespace dynsplit::oracle

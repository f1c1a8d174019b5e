// SPDX-License-Identifier: Apache-2.0
//
// Summaries of blocks, their scores, and the tokens chosen by them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "tests/oracle/numbers.h"
#include "tests/oracle/reference.h"

namespace dynsplit::oracle {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double LogSumExp(const std::vector<double>& logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double x : logits) sum += std::exp(x - largest);
  return largest + std::log(sum);
}

double Amax(const double* row, int32_t count) {
  double amax = 0;
  for (int32_t c = 0; c < count; ++c) amax = std::max(amax, std::fabs(row[c]));
  return amax;
}

// Decoded rows of a head: [B, D].
std::vector<double> HeadSummaries(const ScoreBlocksItem& item, const std::byte* base,
                                  const float* scales, int32_t head) {
  std::vector<double> rows;
  for (int64_t j = 0; j < item.num_blocks; ++j) {
    for (int32_t c = 0; c < item.queries.head_dim; ++c) {
      rows.push_back(SummaryValue(item.summaries, base, scales, j, head, c));
    }
  }
  return rows;
}

// One row of bounds; types that the decoded keys fit into are exact.
void StoreBounds(const double* row, double scale, bool up, int32_t count, DType dtype,
                 std::byte* out) {
  for (int32_t c = 0; c < count; ++c) {
    std::byte* element = out + c * DTypeBytes(dtype);
    if (dtype == DType::kBFloat16 || dtype == DType::kFloat8E4M3) {
      EncodeBound(dtype, row[c] / scale, up, element);
    } else {
      EncodeElement(dtype, static_cast<float>(row[c]) + 0.0F, element);
    }
  }
}

}  // namespace

Summaries SummarizeBlocks(const SummarizeBlocksParams& params) {
  const TensorView& keys = params.keys;
  Summaries out;
  for (int64_t j = 0; j < params.num_blocks; ++j) {
    for (int32_t h = 0; h < keys.num_heads; ++h) {
      for (int32_t c = 0; c < keys.head_dim; ++c) {
        double smallest = kInfinity;
        double largest = -kInfinity;
        double sum = 0;
        for (int32_t t = params.block_starts[j]; t < params.block_starts[j + 1]; ++t) {
          const double value = ElementValue(keys, t, h, c);
          smallest = std::min(smallest, value);
          largest = std::max(largest, value);
          sum += value;
        }
        out.min.push_back(smallest);
        out.max.push_back(largest);
        out.mean.push_back(sum / (params.block_starts[j + 1] - params.block_starts[j]));
      }
    }
  }
  return out;
}

double PowerOfTwoScale(double amax) {
  if (amax == 0) return 1;
  double scale = 0x1p-120;
  while (amax > 448 * scale) scale *= 2;
  return scale;
}

void StoreSummaries(const Summaries& summaries, const SummarizeBlocksParams& params) {
  const BlockSummaries& out = params.summaries;
  const int32_t dim = params.keys.head_dim;
  const bool scaled = out.dtype == DType::kFloat8E4M3;
  for (int64_t j = params.first_block; j < params.num_blocks; ++j) {
    for (int32_t h = 0; h < params.keys.num_heads; ++h) {
      const int64_t row = (j * params.keys.num_heads + h) * dim;
      const int64_t offset = j * out.block_stride_bytes + h * out.head_stride_bytes;
      const int64_t scale_index = h * out.scale_head_stride + j;
      if (out.min != nullptr) {
        const double* min = summaries.min.data() + row;
        const double* max = summaries.max.data() + row;
        double scale = 1;
        if (scaled) {
          scale = PowerOfTwoScale(std::max(Amax(min, dim), Amax(max, dim)));
          out.bound_scales[scale_index] = static_cast<float>(scale);
        }
        StoreBounds(min, scale, /*up=*/false, dim, out.dtype, out.min + offset);
        StoreBounds(max, scale, /*up=*/true, dim, out.dtype, out.max + offset);
      }
      if (out.mean != nullptr) {
        const double* mean = summaries.mean.data() + row;
        double scale = 1;
        if (scaled) {
          scale = PowerOfTwoScale(Amax(mean, dim));
          out.mean_scales[scale_index] = static_cast<float>(scale);
        }
        for (int32_t c = 0; c < dim; ++c) {
          EncodeElement(out.dtype, static_cast<float>(mean[c] / scale),
                        out.mean + offset + c * DTypeBytes(out.dtype));
        }
      }
    }
  }
}

double SummaryValue(const BlockSummaries& summaries, const std::byte* base, const float* scales,
                    int64_t j, int32_t h, int32_t c) {
  const double code = DecodeElement(summaries.dtype, base + j * summaries.block_stride_bytes +
                                                         h * summaries.head_stride_bytes +
                                                         c * DTypeBytes(summaries.dtype));
  return scales == nullptr ? code : code * scales[h * summaries.scale_head_stride + j];
}

std::vector<double> ScoreBlocks(const ScoreBlocksItem& item, int32_t num_kv_heads,
                                float softmax_scale) {
  const TensorView& queries = item.queries;
  const BlockSummaries& s = item.summaries;
  const int32_t group = queries.num_heads / num_kv_heads;
  std::vector<double> scores(static_cast<size_t>(num_kv_heads * item.num_blocks), 0.0);
  const bool bound = s.min != nullptr;
  for (int32_t a = 0; a < queries.num_heads; ++a) {
    const int32_t h = a / group;
    const std::vector<double> high = bound ? HeadSummaries(item, s.max, s.bound_scales, h)
                                           : HeadSummaries(item, s.mean, s.mean_scales, h);
    const std::vector<double> low = bound ? HeadSummaries(item, s.min, s.bound_scales, h) : high;
    for (int64_t i = 0; i < queries.num_tokens; ++i) {
      std::vector<double> query;
      query.reserve(static_cast<size_t>(queries.head_dim));
      for (int32_t c = 0; c < queries.head_dim; ++c)
        query.push_back(ElementValue(queries, i, a, c));
      std::vector<double> logits;
      std::vector<double> weighted;  // logit + log(length): the softmax over blocks
      for (int64_t j = 0; j < item.num_blocks; ++j) {
        double raw = 0;
        for (size_t c = 0; c < query.size(); ++c) {
          const size_t index = static_cast<size_t>(j) * query.size() + c;
          raw += std::max(query[c] * high[index], query[c] * low[index]);
        }
        logits.push_back(softmax_scale * raw);
        weighted.push_back(logits.back() +
                           std::log(item.block_starts[j + 1] - item.block_starts[j]));
      }
      const double lse = LogSumExp(weighted);
      for (size_t j = 0; j < logits.size(); ++j) {  // weight * length / length
        scores[static_cast<size_t>(h * item.num_blocks) + j] +=
            std::exp(logits[j] - lse) / static_cast<double>(queries.num_tokens);
      }
    }
  }
  return scores;
}

std::vector<double> ScoreTokens(const ScoreTokensItem& item, int32_t groups, float softmax_scale) {
  const TensorView& queries = item.queries;
  const int32_t group = queries.num_heads / item.keys.num_heads;
  const int64_t n = item.num_tokens;
  std::vector<double> scores(static_cast<size_t>(item.keys.num_heads * n), 0.0);
  for (int32_t a = 0; n > 0 && a < queries.num_heads; ++a) {
    const int32_t h = a / group;
    for (int64_t i = 0; i < queries.num_tokens; ++i) {
      std::vector<double> logits;
      for (int64_t j = 0; j < n; ++j) {
        const int64_t t = item.tokens == nullptr ? j : item.tokens[(groups == 1 ? 0 : h) * n + j];
        double dot = 0;
        for (int32_t c = 0; c < queries.head_dim; ++c) {
          dot += double{ElementValue(queries, i, a, c)} * double{ElementValue(item.keys, t, h, c)};
        }
        logits.push_back(softmax_scale * dot);
      }
      const double lse = LogSumExp(logits);
      for (int64_t j = 0; j < n; ++j) {
        scores[static_cast<size_t>(h * n + j)] += std::exp(logits[static_cast<size_t>(j)] - lse) /
                                                  static_cast<double>(queries.num_tokens);
      }
    }
  }
  return scores;
}

// Every token takes its block's score; protected ones rank first, NaN as -infinity.
std::vector<int32_t> SelectBlocks(const SelectBlocksItem& item, int32_t groups) {
  std::vector<int32_t> tokens;
  for (int32_t g = 0; g < groups; ++g) {
    std::vector<std::pair<float, int32_t>> ranked;  // (score, token); stable: ties by token
    for (int64_t j = 0; j < item.num_blocks; ++j) {
      const float score = item.block_scores[g * item.num_blocks + j];
      const bool of_one = item.block_starts == nullptr;
      const auto begin = of_one ? static_cast<int32_t>(j) : item.block_starts[j];
      const int32_t end = of_one ? begin + 1 : item.block_starts[j + 1];
      for (int32_t t = begin; t < end; ++t) {
        if (t < item.prefix_end || t >= item.suffix_begin) continue;
        ranked.emplace_back(std::isnan(score) ? -std::numeric_limits<float>::infinity() : score, t);
      }
    }
    std::stable_sort(ranked.begin(), ranked.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    std::vector<int32_t> chosen;
    for (int32_t t = 0; t < item.num_tokens; ++t) {
      if (t < item.prefix_end || t >= item.suffix_begin) chosen.push_back(t);
    }
    for (size_t r = 0; static_cast<int64_t>(chosen.size()) < item.num_selected; ++r) {
      chosen.push_back(ranked[r].second);
    }
    std::sort(chosen.begin(), chosen.end());
    for (int32_t& t : chosen) {
      if (item.names != nullptr) t = item.names[g * item.num_tokens + t];
    }
    tokens.insert(tokens.end(), chosen.begin(), chosen.end());
  }
  return tokens;
}

}  // namespace dynsplit::oracle

// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/oracle/numbers.h"
#include "tests/oracle/reference.h"

namespace dynsplit::oracle {
namespace {

std::vector<float> Row(const TensorView& view, int64_t token, int32_t head) {
  std::vector<float> row;
  row.reserve(static_cast<size_t>(view.head_dim));
  for (int32_t c = 0; c < view.head_dim; ++c) row.push_back(ElementValue(view, token, head, c));
  return row;
}

// Softmax over the given logits; empty in, empty out.
std::vector<double> Softmax(std::vector<double> logits) {
  double largest = -std::numeric_limits<double>::infinity();
  for (double x : logits) largest = std::max(largest, x);
  double sum = 0;
  for (double& x : logits) sum += x = std::exp(x - largest);
  for (double& x : logits) x /= sum;
  return logits;
}

std::vector<double> WeightedValues(const std::vector<double>& weights,
                                   const std::vector<std::vector<float>>& rows, int32_t head_dim) {
  std::vector<double> out(static_cast<size_t>(head_dim), 0.0);
  for (size_t t = 0; t < weights.size(); ++t) {
    for (size_t c = 0; c < out.size(); ++c) out[c] += weights[t] * rows[t][c];
  }
  return out;
}

std::vector<std::vector<float>> Rows(const TensorView& view, int32_t head) {
  std::vector<std::vector<float>> rows;
  for (int64_t t = 0; t < view.num_tokens; ++t) rows.push_back(Row(view, t, head));
  return rows;
}

}  // namespace

AttentionLoss MeasureAttention(const MeasureAttentionParams& p) {
  const int64_t window = p.queries.num_tokens;
  const int64_t first = p.keys.num_tokens - window;
  const int32_t group = p.queries.num_heads / p.keys.num_heads;
  const bool with_values = p.values.data != nullptr && p.kept_keys.data != nullptr;
  AttentionLoss loss;
  std::vector<std::vector<float>> keys;  // of the group's head
  std::vector<std::vector<float>> values;
  std::vector<std::vector<float>> kept_keys;
  std::vector<std::vector<float>> kept_values;
  for (int32_t a = 0; a < p.queries.num_heads; ++a) {
    const int32_t h = a / group;
    const int32_t* kept = p.kept + (p.groups == 1 ? 0 : h) * p.num_kept;
    if (a % group == 0) keys = Rows(p.keys, h);
    if (a % group == 0 && with_values) {
      values = Rows(p.values, h);
      kept_keys = Rows(p.kept_keys, h);
      kept_values = Rows(p.kept_values, h);
    }
    double mass = 0;
    double err_sq = 0;
    double ref_sq = 0;
    for (int64_t i = 0; i < window; ++i) {
      const int64_t position = first + i;
      std::vector<float> query = Row(p.queries, i, a);
      std::vector<double> logits;
      for (int64_t t = 0; t <= position; ++t) {
        logits.push_back(p.softmax_scale * Dot(query, keys[static_cast<size_t>(t)]));
      }
      const std::vector<double> weights = Softmax(logits);
      for (int64_t s = 0; s < p.num_kept; ++s) {
        if (kept[s] <= position) mass += weights[static_cast<size_t>(kept[s])];
      }
      if (!with_values) continue;
      if (p.rotation.rotary_dim > 0) TurnBack(p.rotation, p.query_shift, query);
      std::vector<double> kept_logits;  // kept is ascending: the visible ones come first
      for (int64_t s = 0; s < p.num_kept && kept[s] <= position; ++s) {
        kept_logits.push_back(p.softmax_scale * Dot(query, kept_keys[static_cast<size_t>(s)]));
      }
      const auto full = WeightedValues(weights, values, p.values.head_dim);
      const auto part = WeightedValues(Softmax(kept_logits), kept_values, p.values.head_dim);
      for (size_t c = 0; c < full.size(); ++c) {
        err_sq += (part[c] - full[c]) * (part[c] - full[c]);
        ref_sq += full[c] * full[c];
      }
    }
    loss.mass.push_back(mass / static_cast<double>(window));
    if (with_values) {
      loss.err_sq.push_back(err_sq);
      loss.ref_sq.push_back(ref_sq);
    }
  }
  return loss;
}

std::vector<double> MeasureSpans(const MeasureSpansParams& p) {
  const int32_t group = p.queries.num_heads / p.keys.num_heads;
  std::vector<double> masses(static_cast<size_t>(3 * p.queries.num_tokens), 0.0);
  std::vector<std::vector<float>> keys;  // of the group's head
  for (int32_t a = 0; a < p.queries.num_heads; ++a) {
    if (a % group == 0) keys = Rows(p.keys, a / group);
    for (int64_t n = 0; n < p.queries.num_tokens; ++n) {
      const std::vector<float> query = Row(p.queries, n, a);
      std::vector<double> logits;
      for (int32_t t = 0; t <= p.positions[n]; ++t) {
        logits.push_back(p.softmax_scale * Dot(query, keys[static_cast<size_t>(t)]));
      }
      const std::vector<double> weights = Softmax(logits);
      for (int32_t t = 0; t <= p.positions[n]; ++t) {
        const int span = t < p.lo[n] ? 0 : t < p.hi[n] ? 1 : 2;
        masses[static_cast<size_t>(3 * n + span)] +=
            weights[static_cast<size_t>(t)] / p.queries.num_heads;
      }
    }
  }
  return masses;
}

Attention AttendTokens(const AttendTokensItem& item, int32_t groups, float softmax_scale) {
  const int32_t group = item.queries.num_heads / item.keys.num_heads;
  Attention out;
  for (int32_t h = 0; h < item.keys.num_heads; ++h) {
    const int32_t* tokens =
        item.tokens == nullptr ? nullptr : item.tokens + (groups == 1 ? 0 : h) * item.num_tokens;
    std::vector<std::vector<float>> keys;
    std::vector<std::vector<float>> values;
    for (int64_t r = 0; r < item.num_tokens; ++r) {
      const int64_t token = tokens == nullptr ? r : tokens[r];
      keys.push_back(Row(item.keys, token, h));
      values.push_back(Row(item.values, token, h));
    }
    for (int64_t r = 0; r < item.tail_keys.num_tokens; ++r) {
      keys.push_back(Row(item.tail_keys, r, h));
      values.push_back(Row(item.tail_values, r, h));
    }
    for (int32_t a = h * group; a < (h + 1) * group; ++a) {
      const std::vector<float> query = Row(item.queries, 0, a);
      std::vector<double> logits;
      for (const auto& key : keys) logits.push_back(softmax_scale * Dot(query, key));
      const double largest = *std::max_element(logits.begin(), logits.end());
      double sum = 0;
      for (double x : logits) sum += std::exp(x - largest);
      out.lse.push_back(largest + std::log(sum));
      const auto row = WeightedValues(Softmax(logits), values, item.queries.head_dim);
      out.output.insert(out.output.end(), row.begin(), row.end());
    }
  }
  return out;
}

}  // namespace dynsplit::oracle

// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/calibration.h"

#include <algorithm>
#include <cmath>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

absl::Status CheckRange(const char* field, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return InvalidField(absl::StrCat("calibration.", field),
                      absl::StrCat("is ", value, "; must be in [", low, ", ", high, "]"));
}

absl::Status ValidateOptions(const CalibrationOptions& options) {
  constexpr int64_t kMaxCount = int64_t{1} << 30;
  absl::Status status = CheckRange("num_future_queries", options.num_future_queries, 1, 64);
  status.Update(CheckRange("overlap_size", options.overlap_size, 1, 65536));
  status.Update(CheckRange("min_occurrences", options.min_occurrences, 1, kMaxCount));
  status.Update(CheckRange("max_occurrences", options.max_occurrences, 1, kMaxCount));
  if (!status.ok()) return status;
  if (!(options.alpha >= 0 && options.alpha <= 16)) {  // refuses NaN as well
    return InvalidField("calibration.alpha",
                        absl::StrCat("is ", options.alpha, "; must be in [0, 16]"));
  }
  for (size_t i = 0; i < options.candidates.size(); ++i) {
    if (options.candidates[i] < 0) {
      return InvalidField(absl::StrCat("calibration.candidate_token_ids[", i, "]"),
                          absl::StrCat("is ", options.candidates[i], "; must not be negative"));
    }
  }
  return absl::OkStatus();
}

absl::Status ValidatePositions(std::span<const int32_t> positions, size_t num_tokens) {
  int64_t previous = -1;
  for (size_t i = 0; i < positions.size(); ++i) {
    if (positions[i] <= previous || static_cast<size_t>(positions[i]) >= num_tokens) {
      return InvalidField(
          absl::StrCat("tensors.query_positions[", i, "]"),
          absl::StrCat("is ", positions[i], "; must be ascending and in [0, ", num_tokens, ")"));
    }
    previous = positions[i];
  }
  return absl::OkStatus();
}

// Rows of the query tensors that hold the positions behind `delimiter`; empty if there is no such
// position or one of them was not supplied.
std::span<const int32_t> FutureQueries(std::span<const int32_t> positions, int32_t delimiter,
                                       int32_t num_future_queries, int32_t num_tokens) {
  const int32_t count = std::min(num_future_queries, num_tokens - 1 - delimiter);
  const auto first = std::lower_bound(positions.begin(), positions.end(), delimiter + 1);
  if (count < 1 || positions.end() - first < count) return {};
  // Ascending and distinct: the ends match only if all between do.
  if (*first != delimiter + 1 || first[count - 1] != delimiter + count) return {};
  return {first, static_cast<size_t>(count)};
}

// At most `limit` of `all`, spread evenly from the first on.
std::vector<int32_t> Spread(const std::vector<int32_t>& all, int32_t limit) {
  const auto size = static_cast<int64_t>(all.size());
  if (size <= limit) return all;
  std::vector<int32_t> chosen;
  for (int64_t i = 0; i < limit; ++i) chosen.push_back(all[static_cast<size_t>(i * size / limit)]);
  return chosen;
}

absl::StatusOr<Buffer> UploadInts(std::span<const int32_t> values, Backend& backend, Stream& stream,
                                  Buffer& host) {
  absl::StatusOr<Buffer> copy = backend.AllocateHost(static_cast<int64_t>(values.size_bytes()));
  if (!copy.ok()) return copy;
  std::copy(values.begin(), values.end(), copy->as<int32_t>());
  host = *std::move(copy);
  return backend.ToDevice(host, stream);
}

}  // namespace

absl::StatusOr<Calibrator> Calibrator::Create(CalibrationOptions options,
                                              const DelimiterProfile& base,
                                              std::span<const int32_t> token_ids,
                                              std::span<const int32_t> query_positions) {
  if (auto status = ValidateOptions(options); !status.ok()) return status;
  if (auto status = ValidatePositions(query_positions, token_ids.size()); !status.ok()) {
    return status;
  }
  Calibrator calibrator;
  calibrator.base_weights_.assign(base.weights().begin(), base.weights().end());
  if (options.candidates.empty()) {
    for (const DelimiterWeight& weight : base.weights()) {
      options.candidates.push_back(weight.token_id);
    }
  }
  absl::flat_hash_map<int32_t, std::vector<int32_t>> places;  // measurable ones, by token id
  for (const int32_t id : options.candidates) places[id];
  const auto num_tokens = static_cast<int32_t>(token_ids.size());
  for (int32_t i = 0; i < num_tokens; ++i) {
    const auto found = places.find(token_ids[static_cast<size_t>(i)]);
    if (found == places.end()) continue;
    if (!FutureQueries(query_positions, i, options.num_future_queries, num_tokens).empty()) {
      found->second.push_back(i);
    }
  }
  for (const auto& [id, all] : places) {
    for (const int32_t position : Spread(all, options.max_occurrences)) {
      Occurrence occurrence;
      occurrence.position = position;
      occurrence.token_id = id;
      calibrator.occurrences_.push_back(occurrence);
    }
  }
  std::sort(calibrator.occurrences_.begin(), calibrator.occurrences_.end(),
            [](const Occurrence& a, const Occurrence& b) { return a.position < b.position; });

  calibrator.occurrence_row_begin_.push_back(0);
  for (const Occurrence& occurrence : calibrator.occurrences_) {
    const int32_t i = occurrence.position;
    const auto queries = FutureQueries(query_positions, i, options.num_future_queries, num_tokens);
    for (const int32_t& position : queries) {
      calibrator.query_rows_.push_back(static_cast<int32_t>(&position - query_positions.data()));
      calibrator.positions_.push_back(position);
      // The paper's D_i is {0} for i < R, which O_i holds already: nothing is dropped there.
      calibrator.lo_.push_back(std::max(0, i - options.overlap_size + 1));
      calibrator.hi_.push_back(i + 1);
    }
    calibrator.occurrence_row_begin_.push_back(static_cast<int32_t>(calibrator.query_rows_.size()));
  }
  calibrator.options_ = std::move(options);
  return calibrator;
}

absl::Status Calibrator::AddLayer(const TensorView& keys, const TensorView& queries,
                                  float softmax_scale, Backend& backend, Stream& stream) {
  const auto num_rows = static_cast<int64_t>(query_rows_.size());
  ++num_layers_;
  if (num_rows == 0) return absl::OkStatus();
  struct Uploaded {
    Buffer host, device;
  };
  Uploaded rows, positions, lo, hi;
  const std::pair<const std::vector<int32_t>*, Uploaded*> uploads[] = {
      {&query_rows_, &rows}, {&positions_, &positions}, {&lo_, &lo}, {&hi_, &hi}};
  for (const auto& [values, target] : uploads) {
    absl::StatusOr<Buffer> device = UploadInts(*values, backend, stream, target->host);
    if (!device.ok()) return device.status();
    target->device = *std::move(device);
  }
  absl::StatusOr<Buffer> masses =
      backend.Allocate(num_rows * 3 * static_cast<int64_t>(sizeof(float)), stream);
  if (!masses.ok()) return masses.status();

  MeasureSpansParams params;
  // The rows wanted, as pages of one row each: no copy, and a row may serve several occurrences.
  params.queries = queries;
  params.queries.num_tokens = num_rows;
  params.queries.block_table = rows.device.as<int32_t>();
  params.queries.page_size = 1;
  params.queries.page_stride_bytes = queries.token_stride_bytes;
  params.positions = positions.device.as<int32_t>();
  params.lo = lo.device.as<int32_t>();
  params.hi = hi.device.as<int32_t>();
  params.keys = keys;
  params.softmax_scale = softmax_scale;
  params.masses = masses->as<float>();
  absl::Status status = backend.MeasureSpans(params, stream);
  absl::StatusOr<Buffer> host = backend.ToHost(*std::move(masses), stream);
  // Also after a failure: the device may still read what this frame owns.
  status.Update(stream.Synchronize());
  if (!status.ok()) return status;
  if (!host.ok()) return host.status();

  for (size_t o = 0; o < occurrences_.size(); ++o) {
    const int32_t begin = occurrence_row_begin_[o];
    const int32_t end = occurrence_row_begin_[o + 1];
    for (int32_t row = begin; row < end; ++row) {
      const float* mass = host->as<float>() + int64_t{3} * row;
      occurrences_[o].drop += static_cast<double>(mass[0]) / (end - begin);
      occurrences_[o].overlap += static_cast<double>(mass[1]) / (end - begin);
      occurrences_[o].own += static_cast<double>(mass[2]) / (end - begin);
    }
  }
  return absl::OkStatus();
}

std::vector<Calibrator::Occurrence> Calibrator::Occurrences() const {
  std::vector<Occurrence> means = occurrences_;
  const double layers = std::max(num_layers_, 1);
  for (Occurrence& occurrence : means) {
    occurrence.drop /= layers;
    occurrence.overlap /= layers;
    occurrence.own /= layers;
    occurrence.score = occurrence.overlap - options_.alpha * occurrence.drop;
  }
  return means;
}

absl::StatusOr<DelimiterProfile> Calibrator::Finish(std::string name) const {
  if (num_layers_ == 0) return absl::FailedPreconditionError("calibration got no layers");
  struct Total {
    double score = 0;
    int32_t count = 0;
  };
  absl::flat_hash_map<int32_t, Total> totals;
  for (const Occurrence& occurrence : Occurrences()) {
    Total& total = totals[occurrence.token_id];
    total.score += occurrence.score;
    ++total.count;
  }
  std::vector<DelimiterWeight> weights = base_weights_;
  for (DelimiterWeight& weight : weights) {
    weight.num_occurrences = 0;
    weight.score = 0;
  }
  for (const auto& [id, total] : totals) {
    if (total.count < options_.min_occurrences) continue;
    auto weight = std::find_if(weights.begin(), weights.end(),
                               [token_id = id](const DelimiterWeight& candidate) {
                                 return candidate.token_id == token_id;
                               });
    if (weight == weights.end()) {
      weight = weights.insert(weights.end(), DelimiterWeight());
      weight->token_id = id;
    }
    weight->score = total.score / total.count;
    weight->weight = static_cast<float>(std::clamp((weight->score + 1) / 2, 0.0, 1.0));
    weight->num_occurrences = total.count;
  }
  return DelimiterProfile::Create(
      std::move(name),
      absl::StrCat("measured over ", num_layers_, " layers: W = ", options_.num_future_queries,
                   ", R = ", options_.overlap_size, ", alpha = ", options_.alpha,
                   "; types with 0 occurrences have the base profile's weight"),
      std::move(weights));
}

}  // namespace dynsplit

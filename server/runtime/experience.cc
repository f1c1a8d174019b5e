// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/experience.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "server/pipeline/plan.h"

namespace dynsplit {
namespace {

// Least upper ends of the buckets of kept shares; the last ends at 1.
constexpr std::array<double, 6> kBucketEnds = {0.075, 0.15, 0.25, 0.4, 0.6, 0.8};
// One request never counts for more than this many times the curve, or this part of it.
constexpr double kMaxFactor = 8;
// Of so little loss, ratios are noise.
constexpr double kLeastLoss = 1e-3;

size_t BucketOf(double kept_ratio) {
  return static_cast<size_t>(std::lower_bound(kBucketEnds.begin(), kBucketEnds.end(), kept_ratio) -
                             kBucketEnds.begin());
}

double LogFactor(double found, double expected) {
  return std::log(std::clamp(found / expected, 1 / kMaxFactor, kMaxFactor));
}

}  // namespace

bool IsPresetItself(const Policy& policy) {
  const absl::StatusOr<const Preset*> preset = FindPreset(policy.preset);
  if (!preset.ok()) return false;
  Policy own = (*preset)->policy;
  const bool whole_blocks = own.budget.whole_blocks;
  own.budget = policy.budget;
  own.budget.whole_blocks = whole_blocks;
  own.segmentation.profile = policy.segmentation.profile;
  own.page_size = policy.page_size;
  own.allow_fallback = policy.allow_fallback;
  return CanonicalPolicy(own) == CanonicalPolicy(policy);
}

void Experience::Mean::Add(double sample) {
  ++count;
  value += (sample - value) / static_cast<double>(std::min(count, kHorizon));
}

Experience::OfModel& Experience::ModelOf(const ModelKey& key) {
  const auto found = models_.find(key);
  if (found != models_.end()) return found->second;
  if (models_.size() >= kMaxModels) {
    models_.erase(std::min_element(
        models_.begin(), models_.end(),
        [](const auto& a, const auto& b) { return a.second.last_use < b.second.last_use; }));
  }
  return models_[key];
}

void Experience::Record(const Compression& compression) {
  const QualityCurve* curve = table_.Find(compression.preset);
  if (curve == nullptr) return;
  const Quality expected = curve->At(compression.kept_ratio);
  const double expected_loss = 1 - expected.mass;
  const bool measured = !std::isnan(compression.mass) && !std::isnan(compression.error);
  const bool comparable = expected_loss > kLeastLoss && expected.error > kLeastLoss;

  absl::MutexLock lock(&mu_);
  OfModel& model = ModelOf(KeyOf(compression.shape, compression.dtype));
  model.last_use = ++num_recorded_;
  OfPreset& preset = model.presets[std::string(compression.preset)];
  if (measured && comparable) {
    Bucket& bucket = preset.buckets[BucketOf(compression.kept_ratio)];
    bucket.kept_ratio.Add(compression.kept_ratio);
    bucket.log_lost_mass_factor.Add(LogFactor(1 - compression.mass, expected_loss));
    bucket.log_error_factor.Add(LogFactor(compression.error, expected.error));
  }
  if (compression.seconds > 0 && compression.bytes_in > 0) {
    preset.seconds.Add(compression.seconds);
    preset.bytes.Add(static_cast<double>(compression.bytes_in));
  }
}

Experience::Outlook Experience::Of(const SequenceShape& shape, DType dtype,
                                   std::string_view preset) const {
  Outlook outlook;
  absl::MutexLock lock(&mu_);
  const auto model = models_.find(KeyOf(shape, dtype));
  if (model == models_.end()) return outlook;
  const auto found = model->second.presets.find(preset);
  if (found == model->second.presets.end()) return outlook;
  for (const Bucket& bucket : found->second.buckets) {
    if (bucket.kept_ratio.count < kEnough) continue;
    outlook.num_receipts += bucket.kept_ratio.count;
    outlook.corrections.push_back({.kept_ratio = bucket.kept_ratio.value,
                                   .lost_mass_factor = std::exp(bucket.log_lost_mass_factor.value),
                                   .error_factor = std::exp(bucket.log_error_factor.value)});
  }
  if (const Mean& seconds = found->second.seconds; seconds.count >= kEnough) {
    outlook.seconds_per_byte = seconds.value / found->second.bytes.value;
    outlook.num_timed = seconds.count;
  }
  return outlook;
}

}  // namespace dynsplit

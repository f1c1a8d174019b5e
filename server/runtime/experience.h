// SPDX-License-Identifier: Apache-2.0
//
// What this server has learnt from its own requests: by how much their receipts differ from the
// built-in quality curves, and how long compression takes. Kept by shape and type of the model,
// which the receipts are of, and by preset; receipts also by kept share.
//
// Old requests fade: a mean is plain over its first kHorizon requests and exponential afterwards.
// Memory is bounded: kMaxModels models, of which the one unused for longest is forgotten; the
// curves' presets; seven shares.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/pipeline/policy.h"
#include "server/pipeline/quality.h"
#include "server/pipeline/types.h"

namespace dynsplit {

// One request that compressed.
struct Compression {
  SequenceShape shape;
  DType dtype = DType::kBFloat16;  // of K
  std::string_view preset;
  double kept_ratio = 1;       // tokens kept over tokens
  double mass = 0, error = 0;  // means of the receipt; NaN = not measured
  int64_t bytes_in = 0;        // of K and V
  double seconds = 0;          // that they took; 0 = says nothing of costs
};

// Whether requests of that policy tell of its preset: all choices but the budget's target, the
// delimiter profile and the page size are the preset's own.
bool IsPresetItself(const Policy& policy);

// Thread-safe.
class Experience {
 public:
  // Requests of a kind below which they count for nothing.
  static constexpr int64_t kEnough = 8;
  static constexpr int64_t kHorizon = 64;  // requests
  static constexpr size_t kMaxModels = 16;

  struct Outlook {
    // Where there were enough receipts, ascending kept ratios; see QualityCurve::Corrected.
    std::vector<QualityCorrection> corrections;
    int64_t num_receipts = 0;  // that those rest on
    // Of K and V; 0 = too few requests.
    double seconds_per_byte = 0;
    int64_t num_timed = 0;
  };

  // The table outlives this.
  explicit Experience(const QualityTable& table) : table_(table) {}

  // Presets that the table lacks are not recorded.
  void Record(const Compression& compression) ABSL_LOCKS_EXCLUDED(mu_);
  // shape.num_tokens is not looked at.
  Outlook Of(const SequenceShape& shape, DType dtype, std::string_view preset) const
      ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Mean {
    double value = 0;
    int64_t count = 0;
    void Add(double sample);
  };
  // Requests that kept about equal shares. Factors are averaged by their logarithms, so that twice
  // and half cancel out.
  struct Bucket {
    Mean kept_ratio, log_lost_mass_factor, log_error_factor;
  };
  struct OfPreset {
    std::array<Bucket, 7> buckets;
    Mean seconds, bytes;  // of a request: their ratio counts large requests for more
  };
  struct OfModel {
    std::map<std::string, OfPreset, std::less<>> presets;
    int64_t last_use = 0;
  };
  // Layers, query heads, KV heads, head dim, type.
  using ModelKey = std::tuple<int32_t, int32_t, int32_t, int32_t, DType>;

  static ModelKey KeyOf(const SequenceShape& shape, DType dtype) {
    return {shape.num_layers, shape.num_query_heads, shape.num_kv_heads, shape.head_dim, dtype};
  }
  OfModel& ModelOf(const ModelKey& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const QualityTable& table_;
  mutable absl::Mutex mu_;
  std::map<ModelKey, OfModel> models_ ABSL_GUARDED_BY(mu_);
  int64_t num_recorded_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace dynsplit

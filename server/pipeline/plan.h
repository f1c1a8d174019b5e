// SPDX-License-Identifier: Apache-2.0
//
// The decision as plain data: printable, hashable, equal on CPU and GPU.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/pipeline/policy.h"
#include "server/pipeline/segmentation.h"
#include "server/pipeline/types.h"

namespace dynsplit {

using Hash128 = std::array<uint8_t, 16>;
std::string ToHex(const Hash128& hash);  // 32 lower-case digits

struct LayerPlan {
  int32_t layer = 0;
  int32_t groups = 1;    // rows of kept: 1 or num_kv_heads
  int64_t num_kept = 0;  // tokens per KV head
  bool dense = false;
  bool raised_by_protection = false;
  bool raised_by_quality_floor = false;
  std::vector<int32_t> kept;  // [groups, num_kept], ascending per group

  Hash128 Hash() const;  // over layer, groups, num_kept, dense and kept (XXH3-128, little endian)
  bool operator==(const LayerPlan&) const = default;
};

struct Plan {
  SequenceShape shape;
  Policy policy;  // resolved
  int32_t policy_version = kPolicyVersion;
  Evidence evidence = Evidence::kNone;
  Segmentation segmentation;
  std::vector<LayerPlan> layers;
  std::string fallback_preset;
};

// Hash over shape, policy, version, block starts and the layers' hashes, in that order, so that it
// can be made while layers flow.
class PlanHasher {
 public:
  PlanHasher(const SequenceShape& shape, const Policy& policy, const Segmentation& segmentation);
  // Ascending layers; by their hashes where those are known.
  void Add(const Hash128& layer);
  void Add(const LayerPlan& layer) { Add(layer.Hash()); }
  Hash128 Finish() const;

 private:
  std::string bytes_;
};
Hash128 HashPlan(const Plan& plan);

// Canonical one-line text of a policy: equal text <=> equal policy. Used in hashes, salts and logs.
std::string CanonicalPolicy(const Policy& policy);

// Distinguishes lossy KV from exact KV in prefix caches; empty when the output bytes are the
// input's (index transform or a full budget, as-is, original positions).
std::string RepresentationSalt(const Policy& policy, const Hash128& plan_hash, bool lossless);

// Structure of a plan received from outside: layers ascending and in range, kept ascending, in
// range and of the stated size, block starts a partition. Field paths as in the proto.
absl::Status ValidatePlan(const Plan& plan);

}  // namespace dynsplit

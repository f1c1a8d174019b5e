// SPDX-License-Identifier: Apache-2.0
//
// What is made once per sequence: evidence, segmentation, protection, tables.
#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "server/pipeline/compress.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/stage_inputs.h"

namespace dynsplit {
namespace {

constexpr int64_t kFineAngles = 256;  // RotationTable's radix

bool Supplies(const EvidenceSupply& supply, Evidence evidence) {
  switch (evidence) {
    case Evidence::kNone:
      return true;
    case Evidence::kKeys:
      return supply.keys;
    case Evidence::kWindowQueries:
      return supply.keys && supply.num_window_queries > 0;
    case Evidence::kWindowQueriesWithLse:
      return supply.keys && supply.num_window_queries > 0 && supply.lse;
    case Evidence::kAccumulatedScores:
      return supply.accumulated_rows > 0;
  }
  return false;
}

// The choices that make up a method come from the row, what the caller demands of the result stays.
Policy TakeOver(const Policy& policy, const Preset& preset) {
  Policy result = preset.policy;
  if (policy.segmentation.method == result.segmentation.method) {
    result.segmentation = policy.segmentation;
  }
  result.scoring.softmax_scale = policy.scoring.softmax_scale;
  const bool whole_blocks = result.budget.whole_blocks;
  result.budget = policy.budget;
  result.budget.whole_blocks = whole_blocks;
  result.transform = policy.transform;
  result.encoding = policy.encoding;
  result.protection = policy.protection;
  result.positions = policy.positions;
  result.quality_floor = policy.quality_floor;
  result.allow_fallback = policy.allow_fallback;
  result.page_size = policy.page_size;
  return result;
}

absl::Status CheckFloorEvidence(const SequenceSpec& spec) {
  const QualityFloor& floor = spec.policy.quality_floor;
  if (floor.empty()) return absl::OkStatus();
  if (!Supplies(spec.supply, Evidence::kWindowQueries)) {
    return PreconditionFailed("EVIDENCE_MISSING", "policy.quality_floor",
                              "is measured on window queries over keys, and the request supplies "
                              "none");
  }
  if (floor.max_output_relative_error > 0 && !spec.supply.values) {
    return PreconditionFailed("EVIDENCE_MISSING", "policy.quality_floor.max_output_relative_error",
                              "is measured on values, and the request supplies none");
  }
  return absl::OkStatus();
}

absl::Status CheckSupply(const SequenceSpec& spec) {
  const EvidenceSupply& supply = spec.supply;
  if (supply.num_window_queries < 0 || supply.num_window_queries > spec.shape.num_tokens) {
    return InvalidField("tensors.queries",
                        absl::StrCat("has ", supply.num_window_queries,
                                     " rows; must have at most shape.num_tokens, which is ",
                                     spec.shape.num_tokens));
  }
  if (supply.accumulated_rows != 0 && supply.accumulated_rows != spec.shape.num_query_heads &&
      supply.accumulated_rows != spec.shape.num_kv_heads) {
    return InvalidField("tensors.accumulated_scores",
                        absl::StrCat("has ", supply.accumulated_rows, " rows; must have ",
                                     spec.shape.num_query_heads, " or ", spec.shape.num_kv_heads));
  }
  return absl::OkStatus();
}

absl::Status Upload(std::span<const std::byte> bytes, Backend& backend, Stream& stream,
                    Buffer& host, Buffer& device) {
  absl::StatusOr<Buffer> host_copy = HostCopy(bytes, backend);
  if (!host_copy.ok()) return host_copy.status();
  host = *std::move(host_copy);
  absl::StatusOr<Buffer> device_copy = backend.ToDevice(host, stream);
  if (!device_copy.ok()) return device_copy.status();
  device = *std::move(device_copy);
  return absl::OkStatus();
}

// A processor takes 2.5 to 3 ns a token. A device takes some 0.1 ms for the copies to and from it,
// the profile's table among them, and little for each token, so it pays from about here on.
constexpr int64_t kDeviceSegmentTokens = 1 << 15;

bool SegmentsOnDevice(const SegmentationPolicy& policy, const DelimiterProfile& profile,
                      int64_t num_tokens, const Backend& backend) {
  const bool is_device = !backend.info().uuid.empty();
  return is_device && policy.method == SegmentationPolicy::Method::kDynamic &&
         num_tokens >= kDeviceSegmentTokens && !profile.weight_table().empty();
}

struct SegmentBuffers {
  Buffer ids_host, ids;
  Buffer weights_host, weights;
};
constexpr int64_t kNumSegmentCounts = 2;  // B and open_begin, before the starts

// Enqueues the operation; returns the host copy of counts and starts, complete once the stream is.
absl::StatusOr<Buffer> EnqueueSegment(std::span<const int32_t> token_ids,
                                      const SegmentationPolicy& policy,
                                      const DelimiterProfile& profile, Backend& backend,
                                      Stream& stream, SegmentBuffers& buffers) {
  absl::Status status =
      Upload(std::as_bytes(token_ids), backend, stream, buffers.ids_host, buffers.ids);
  if (!status.ok()) return status;
  status = Upload(std::as_bytes(profile.weight_table()), backend, stream, buffers.weights_host,
                  buffers.weights);
  if (!status.ok()) return status;
  const auto num_tokens = static_cast<int64_t>(token_ids.size());
  const int64_t num_values =
      kNumSegmentCounts + MaxSegmentStarts(num_tokens, policy.block_size, policy.max_deviation);
  absl::StatusOr<Buffer> out =
      backend.Allocate(num_values * static_cast<int64_t>(sizeof(int32_t)), stream);
  if (!out.ok()) return out.status();
  status = backend.SegmentTokens({.token_ids = buffers.ids.as<int32_t>(),
                                  .num_tokens = num_tokens,
                                  .weights = buffers.weights.as<float>(),
                                  .num_weights = std::ssize(profile.weight_table()),
                                  .block_size = policy.block_size,
                                  .max_deviation = policy.max_deviation,
                                  .balance = policy.balance,
                                  .block_starts = out->as<int32_t>() + kNumSegmentCounts,
                                  .counts = out->as<int32_t>()},
                                 stream);
  if (!status.ok()) return status;
  return backend.ToHost(*std::move(out), stream);
}

// Equal to Segment; waits, because the host needs the starts too.
absl::StatusOr<Segmentation> SegmentOnDevice(std::span<const int32_t> token_ids,
                                             const SegmentationPolicy& policy,
                                             const DelimiterProfile& profile, Backend& backend,
                                             Stream& stream) {
  SegmentBuffers buffers;
  const absl::StatusOr<Buffer> result =
      EnqueueSegment(token_ids, policy, profile, backend, stream, buffers);
  // Sources of copies outlive them, whatever became of the operation.
  absl::Status status = result.status();
  status.Update(stream.Synchronize());
  if (!status.ok()) return status;
  const auto* const counts = result->as<int32_t>();
  const int32_t* const starts = counts + kNumSegmentCounts;
  return Segmentation{.starts = std::vector<int32_t>(starts, starts + counts[0] + 1),
                      .open_begin = counts[1]};
}

// (cos, sin) pairs of multiples 0, step, 2 step, ... of every frequency. A position is an integer,
// so whole turns can be taken off the frequency, which keeps angles of any table finite.
void AppendAngles(const Rope& rope, int64_t num_angles, int64_t step, std::vector<float>& pairs) {
  for (int64_t i = 0; i < num_angles; ++i) {
    for (const double frequency : rope.inverse_frequencies) {
      const double angle =
          std::remainder(frequency, 2 * std::numbers::pi) * static_cast<double>(i * step);
      pairs.push_back(static_cast<float>(std::cos(angle)));
      pairs.push_back(static_cast<float>(std::sin(angle)));
    }
  }
}

absl::Status MakeRotation(SequenceContext& context, Backend& backend, Stream& stream) {
  const Rope& rope = *context.spec.rope;
  const int64_t num_coarse = (context.spec.shape.num_tokens + kFineAngles - 1) / kFineAngles + 1;
  std::vector<float> pairs;
  pairs.reserve(static_cast<size_t>((num_coarse + kFineAngles) * rope.rotary_dim));
  AppendAngles(rope, num_coarse, kFineAngles, pairs);
  AppendAngles(rope, kFineAngles, 1, pairs);
  if (auto status = Upload(std::as_bytes(std::span(pairs)), backend, stream, context.rotation_host,
                           context.rotation_device);
      !status.ok()) {
    return status;
  }
  context.rotation.coarse = context.rotation_device.as<float>();
  context.rotation.fine = context.rotation.coarse + num_coarse * rope.rotary_dim;
  context.rotation.rotary_dim = rope.rotary_dim;
  context.rotation.interleaved = rope.interleaved;
  return absl::OkStatus();
}

// A float holds integers only up to 2^24, but consecutive bit patterns of positive floats ascend
// strictly: rank i becomes the i-th normal float.
void AppendRanks(int64_t count, std::vector<float>& ranks) {
  constexpr uint32_t kSmallestNormal = 0x00800000;
  for (int64_t i = 0; i < count; ++i) {
    ranks.push_back(std::bit_cast<float>(kSmallestNormal + static_cast<uint32_t>(i)));
  }
}

absl::Status MakeRecencyScores(SequenceContext& context, Backend& backend, Stream& stream) {
  const SequenceShape& shape = context.spec.shape;
  constexpr int64_t kNumNormalFloats = 0x7f000000;
  if (shape.num_tokens > kNumNormalFloats) {
    return InvalidField("shape.num_tokens",
                        absl::StrCat("is ", shape.num_tokens, "; recency ranks at most ",
                                     kNumNormalFloats, " tokens"));
  }
  const int32_t rows = context.spec.policy.scope == Scope::kLayerHead ? shape.num_kv_heads : 1;
  std::vector<float> ranks;
  ranks.reserve(static_cast<size_t>(rows * (shape.num_tokens + context.segmentation.num_blocks())));
  for (int32_t row = 0; row < rows; ++row) AppendRanks(shape.num_tokens, ranks);
  for (int32_t row = 0; row < rows; ++row) AppendRanks(context.segmentation.num_blocks(), ranks);
  return Upload(std::as_bytes(std::span(ranks)), backend, stream, context.recency_host,
                context.recency_device);
}

absl::Status MakeTables(SequenceContext& context, Backend& backend, Stream& stream) {
  if (auto status = Upload(std::as_bytes(std::span(context.segmentation.starts)), backend, stream,
                           context.block_starts_host, context.block_starts);
      !status.ok()) {
    return status;
  }
  if (auto status = Upload(std::as_bytes(std::span(context.protected_tokens)), backend, stream,
                           context.protected_host, context.protected_device);
      !status.ok()) {
    return status;
  }
  const Policy& policy = context.spec.policy;
  if (policy.positions == Positions::kContiguous) {
    if (auto status = MakeRotation(context, backend, stream); !status.ok()) return status;
  }
  if (policy.scoring.method == ScoringPolicy::Method::kRecency &&
      policy.transform == Transform::kEvict) {
    return MakeRecencyScores(context, backend, stream);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ResolveEvidence(SequenceSpec& spec) {
  if (auto status = CheckFloorEvidence(spec); !status.ok()) return status;
  const Evidence wanted = RequiredEvidence(spec.policy);
  if (Supplies(spec.supply, wanted)) return absl::OkStatus();
  std::string_view candidate;
  if (spec.policy.allow_fallback) {
    const absl::StatusOr<const Preset*> preset = FindPreset(spec.policy.preset);
    if (preset.ok()) candidate = (*preset)->fallback;
  }
  // Rows name other rows, so the chain ends at the first whose evidence is there, or without one.
  for (size_t hops = 0; !candidate.empty() && hops < Presets().size(); ++hops) {
    const absl::StatusOr<const Preset*> preset = FindPreset(candidate);
    if (!preset.ok()) return preset.status();
    Policy policy = TakeOver(spec.policy, **preset);
    if (Supplies(spec.supply, RequiredEvidence(policy))) {
      spec.policy = std::move(policy);
      spec.fallback_preset = spec.policy.preset;
      return absl::OkStatus();
    }
    candidate = (*preset)->fallback;
  }
  const std::string_view name = EvidenceName(wanted);
  return PreconditionFailed(
      "EVIDENCE_MISSING", "policy.scoring.method",
      absl::StrCat("needs ", absl::string_view(name.data(), name.size()),
                   spec.policy.allow_fallback
                       ? ", which the request does not supply, and no fallback works without"
                       : ", which the request does not supply; set allow_fallback or choose "
                         "another preset"));
}

Evidence UsedEvidence(const SequenceSpec& spec) {
  const Evidence required = RequiredEvidence(spec.policy);
  const bool reads_lse = spec.policy.scoring.method == ScoringPolicy::Method::kWindowQueries;
  if (required == Evidence::kWindowQueries && reads_lse && spec.supply.lse) {
    return Evidence::kWindowQueriesWithLse;
  }
  return required;
}

absl::StatusOr<std::unique_ptr<SequenceContext>> PrepareSequence(SequenceSpec spec,
                                                                 std::span<const int32_t> token_ids,
                                                                 const DelimiterProfile* profile,
                                                                 Backend& backend, Stream& stream) {
  const SegmentationPolicy& policy = spec.policy.segmentation;
  if (!ReadsTokenIds(policy)) {
    Segmentation segmentation = SegmentPositions(spec.shape.num_tokens, policy);
    return PrepareSequence(std::move(spec), std::move(segmentation), backend, stream);
  }
  if (static_cast<int64_t>(token_ids.size()) != spec.shape.num_tokens) {
    return InvalidField(
        "tensors.token_ids",
        absl::StrCat("has ", token_ids.size(), " entries; must have ", spec.shape.num_tokens,
                     " (policy.segmentation.method cuts by token ids)"));
  }
  const auto negative =
      std::find_if(token_ids.begin(), token_ids.end(), [](int32_t id) { return id < 0; });
  if (negative != token_ids.end()) {
    return InvalidField(absl::StrCat("tensors.token_ids[", negative - token_ids.begin(), "]"),
                        absl::StrCat("is ", *negative, "; must not be negative"));
  }
  if (profile == nullptr) return NotFound("delimiter profile", policy.profile);
  // The CPU backend cuts block by block, as short texts are anywhere.
  if (!SegmentsOnDevice(policy, *profile, spec.shape.num_tokens, backend)) {
    Segmentation segmentation = Segment(token_ids, policy, profile);
    return PrepareSequence(std::move(spec), std::move(segmentation), backend, stream);
  }
  absl::StatusOr<Segmentation> segmentation =
      SegmentOnDevice(token_ids, policy, *profile, backend, stream);
  if (!segmentation.ok()) return segmentation.status();
  return PrepareSequence(std::move(spec), *std::move(segmentation), backend, stream);
}

absl::StatusOr<std::unique_ptr<SequenceContext>> PrepareSequence(SequenceSpec spec,
                                                                 Segmentation segmentation,
                                                                 Backend& backend, Stream& stream) {
  if (auto status = CheckSupply(spec); !status.ok()) return status;
  auto context = std::make_unique<SequenceContext>();
  context->spec = std::move(spec);
  context->segmentation = std::move(segmentation);
  const Policy& policy = context->spec.policy;
  // Window attention does not score its own columns.
  const int64_t window = policy.scoring.method == ScoringPolicy::Method::kWindowQueries
                             ? NumScoringQueries(context->spec)
                             : 0;
  context->protected_tokens =
      ProtectedTokens(policy, context->spec.shape, context->segmentation, window);
  context->num_protected =
      std::count(context->protected_tokens.begin(), context->protected_tokens.end(), uint8_t{1});
  if (auto status = MakeTables(*context, backend, stream); !status.ok()) return status;
  return context;
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/advice.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/pipeline/compress.h"

namespace dynsplit {
namespace {

// What is advised, by falling measured quality: this project's own methods, and one for each
// evidence that they do not read.
constexpr std::array<std::string_view, 4> kAdvised = {"dynsplit", "dynsplit_keys", "h2o",
                                                      "streamingllm"};
// Kept shares are advised in steps of one thousandth.
constexpr int64_t kSteps = 1000;

// README, "Measured": 8 GiB through shared memory at 53.5 GB/s; CPU up to 4.0 us a token and layer
// of 4,096 B.
constexpr double kCudaSecondsPerByte = 1 / 53.5e9;
constexpr double kCpuSecondsPerByte = 4.0e-6 / 4096;

struct Candidate {
  Policy policy;
  QualityCurve curve;
  Experience::Outlook outlook;
  double service_seconds = 0;
  int64_t num_steps = 0;  // least kept share that is acceptable; kSteps = none is
};

bool Supplies(const std::vector<Evidence>& supplied, Evidence needed) {
  if (needed == Evidence::kNone) return true;
  return std::any_of(supplied.begin(), supplied.end(), [needed](Evidence each) {
    if (each == needed) return true;
    const bool queries =
        each == Evidence::kWindowQueries || each == Evidence::kWindowQueriesWithLse;
    // Queries are evidence over keys.
    return queries && (needed == Evidence::kWindowQueries || needed == Evidence::kKeys);
  });
}

double InputBytes(const AdviceRequest& request) {
  const SequenceShape& shape = request.shape;
  return 2.0 * static_cast<double>(DTypeBytes(request.dtype)) * shape.num_layers *
         static_cast<double>(shape.num_tokens) * shape.num_kv_heads * shape.head_dim;
}

double ShareOf(int64_t num_steps) { return static_cast<double>(num_steps) / kSteps; }

// Of pages, as they will be returned.
double OutputBytes(const AdviceRequest& request, Policy policy, int64_t num_steps) {
  const ProtectionPolicy& protection = policy.protection;
  const int64_t num_recent = std::max<int64_t>(protection.num_recent_tokens,  //
                                               policy.scoring.num_window_queries);
  const int64_t num_protected =
      std::min(request.shape.num_tokens, protection.num_sink_tokens + num_recent);
  policy.budget.kept_ratio = ShareOf(num_steps);
  SequenceSpec spec;
  spec.shape = request.shape;
  spec.policy = std::move(policy);
  spec.key_dtype = spec.value_dtype = request.dtype;
  const int64_t num_kept = std::max(LeastKept(spec, /*layer=*/0), num_protected);
  return static_cast<double>(LayerOutputBytes(spec, num_kept, /*num_blocks=*/0)) *
         request.shape.num_layers;
}

double CompressedSeconds(const AdviceRequest& request, const Candidate& candidate,
                         int64_t num_steps) {
  const double bytes = OutputBytes(request, candidate.policy, num_steps);
  return PipelinedSeconds(candidate.service_seconds, bytes / request.link_bytes_per_second,
                          request.shape.num_layers);
}

std::optional<Candidate> MakeCandidate(std::string_view name, const AdviceRequest& request,
                                       const QualityTable& table, const Experience& experience,
                                       std::string_view backend) {
  const QualityCurve* curve = table.Find(name);
  const absl::StatusOr<const Preset*> preset = FindPreset(name);
  if (curve == nullptr || !preset.ok()) return std::nullopt;
  if (!Supplies(request.evidence, RequiredEvidence((*preset)->policy))) return std::nullopt;
  const Experience::Outlook outlook = experience.Of(request.shape, request.dtype, name);
  Candidate candidate = {.policy = (*preset)->policy,
                         .curve = curve->Corrected(outlook.corrections),
                         .outlook = outlook};
  const double rate = candidate.outlook.num_timed > 0 ? candidate.outlook.seconds_per_byte
                                                      : DefaultSecondsPerByte(backend);
  candidate.service_seconds = rate * InputBytes(request);
  const double share = candidate.curve.KeptRatioFor(request.min_mass, request.max_divergence);
  candidate.num_steps = static_cast<int64_t>(std::ceil(share * kSteps));
  return candidate;
}

// The first that can do with less than all tokens. Not the one that can do with the fewest: mass
// compares requests of one method, not methods. Recent tokens hold much of it and little of what an
// answer needs.
std::optional<Candidate> BestCandidate(const AdviceRequest& request, const QualityTable& table,
                                       const Experience& experience, std::string_view backend) {
  std::optional<Candidate> best;
  for (const std::string_view name : kAdvised) {
    std::optional<Candidate> candidate = MakeCandidate(name, request, table, experience, backend);
    if (!candidate.has_value()) continue;
    if (!best.has_value() || candidate->num_steps < kSteps) best = std::move(candidate);
    if (best->num_steps < kSteps) break;
  }
  return best;
}

// The largest share that still meets the goal: time that is there is spent on quality. Requires:
// the candidate's own share meets it.
int64_t StepsForGoal(const AdviceRequest& request, const Candidate& candidate) {
  int64_t low = candidate.num_steps;
  int64_t high = kSteps;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (CompressedSeconds(request, candidate, middle) <= request.goal_seconds ? low : high) = middle;
  }
  return low;
}

// -- words ----------------------------------------------------------------------------------------

std::string Seconds(double seconds) { return absl::StrFormat("%.3g s", seconds); }

std::string Bounds(const AdviceRequest& request) {
  std::string text = absl::StrFormat("%.4g of the attention mass", request.min_mass);
  if (request.max_divergence > 0) {
    absl::StrAppendFormat(&text, " at an expected divergence of at most %.3g nats",
                          request.max_divergence);
  }
  return text;
}

// Where the figures are from.
std::string Sources(const Candidate& candidate, const QualityTable& table) {
  const int64_t receipts = candidate.outlook.num_receipts;
  const int64_t timed = candidate.outlook.num_timed;
  return absl::StrCat(
      "; quality by the built-in curves of ", table.model(),
      receipts > 0 ? absl::StrCat(" as ", receipts, " receipts of this server correct them") : "",
      ", time by ",
      timed > 0 ? absl::StrCat(timed, " requests of this server") : "the built-in default");
}

std::string Verdict(const AdviceRequest& request, const Candidate& candidate,
                    const Advice& advice) {
  const std::string how = absl::StrFormat("%s keeping %.1f %%", candidate.policy.preset,
                                          100 * advice.policy.budget.kept_ratio);
  const std::string plain = Seconds(advice.plain_seconds);
  const std::string compressed = Seconds(advice.compressed_seconds);
  if (request.goal_seconds == 0) {
    return advice.compress
               ? absl::StrCat(how, " takes ", compressed, " where K and V as they are take ", plain)
               : absl::StrCat("K and V as they are take ", plain, " where ", how, " takes ",
                              compressed);
  }
  const std::string goal = Seconds(request.goal_seconds);
  if (advice.plain_seconds <= request.goal_seconds) {
    return absl::StrCat("K and V as they are take ", plain, ", within the goal of ", goal);
  }
  return advice.compress
             ? absl::StrCat(how, " takes ", compressed, ", within the goal of ", goal,
                            ", where K and V as they are take ", plain)
             : absl::StrCat("the goal of ", goal, " is out of reach at acceptable quality: ", how,
                            " takes ", compressed, ", K and V as they are ", plain);
}

}  // namespace

double DefaultSecondsPerByte(std::string_view backend) {
  return backend == "cuda" ? kCudaSecondsPerByte : kCpuSecondsPerByte;
}

double PipelinedSeconds(double service_seconds, double link_seconds, int32_t num_layers) {
  return std::max(service_seconds, link_seconds) +
         std::min(service_seconds, link_seconds) / num_layers;
}

double BreakEven(double bytes_in, double bytes_out, double service_seconds, int32_t num_layers) {
  // Of in / b = PipelinedSeconds(C, out / b, L), whose difference falls with b.
  if (bytes_out >= bytes_in) return 0;
  const bool service_is_slower = bytes_in > bytes_out + bytes_out / num_layers;
  return service_is_slower ? (bytes_in - bytes_out / num_layers) / service_seconds
                           : (bytes_in - bytes_out) * num_layers / service_seconds;
}

Advice Advise(const AdviceRequest& request, const QualityTable& table, const Experience& experience,
              std::string_view backend) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  Advice advice;
  advice.plain_seconds = InputBytes(request) / request.link_bytes_per_second;
  advice.compressed_seconds = kNaN;
  advice.expected = {.mass = kNaN, .error = kNaN, .divergence = kNaN};
  const std::optional<Candidate> best = BestCandidate(request, table, experience, backend);
  // streamingllm needs nothing, so that there is one.
  if (!best.has_value() || best->num_steps >= kSteps) {
    advice.reason =
        absl::StrCat("no preset that the evidence allows is expected to retain ", Bounds(request),
                     " with fewer than all tokens", best.has_value() ? Sources(*best, table) : "");
    return advice;
  }
  advice.num_receipts = best->outlook.num_receipts;
  advice.num_timed = best->outlook.num_timed;
  int64_t num_steps = best->num_steps;
  advice.compressed_seconds = CompressedSeconds(request, *best, num_steps);
  if (request.goal_seconds == 0) {
    advice.compress = advice.compressed_seconds < advice.plain_seconds;
  } else if (advice.plain_seconds > request.goal_seconds) {
    advice.compress = advice.compressed_seconds <= request.goal_seconds;
    if (advice.compress) num_steps = StepsForGoal(request, *best);
  }
  advice.policy = best->policy;
  advice.policy.budget.kept_ratio = ShareOf(num_steps);
  advice.compressed_seconds = CompressedSeconds(request, *best, num_steps);
  advice.expected = best->curve.At(ShareOf(num_steps));
  advice.break_even_bytes_per_second =
      BreakEven(InputBytes(request), OutputBytes(request, best->policy, num_steps),
                best->service_seconds, request.shape.num_layers);
  advice.reason = absl::StrCat(Verdict(request, *best, advice), Sources(*best, table));
  return advice;
}

}  // namespace dynsplit

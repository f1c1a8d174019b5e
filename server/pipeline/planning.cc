// SPDX-License-Identifier: Apache-2.0
//
// Stage 3 meets stage 2: budget and scores -> the tokens one layer keeps.
#include <algorithm>
#include <numeric>
#include <span>

#include "server/pipeline/compress.h"
#include "server/pipeline/stage_inputs.h"

namespace dynsplit {
namespace {

constexpr int64_t kIndexBytes = 4;

absl::StatusOr<LayerDecision> KeepAllAs(const SequenceContext& context, LayerPlan plan,
                                        Backend& backend, Stream& stream) {
  plan.groups = 1;
  plan.num_kept = context.spec.shape.num_tokens;
  plan.kept.resize(static_cast<size_t>(plan.num_kept));
  std::iota(plan.kept.begin(), plan.kept.end(), 0);
  return FromPlan(std::move(plan), backend, stream);
}

// What the selection of one layer is asked for.
struct Request {
  int64_t num_kept = 0;          // exact mode
  int64_t num_whole_blocks = 0;  // whole-block mode
};

// The tokens each group keeps in whole-block mode. Whole blocks come in one group (policy
// validation), so that rows are dense in both modes.
absl::StatusOr<int64_t> ReadCount(Buffer counts, Backend& backend, Stream& stream) {
  const absl::StatusOr<Buffer> host = backend.ToHost(std::move(counts), stream);
  if (!host.ok()) return host.status();
  if (auto status = stream.Synchronize(); !status.ok()) return status;
  return host->as<int32_t>()[0];
}

// Runs the selection and sends its result to the host. plan.groups is set already.
absl::StatusOr<LayerDecision> Select(const SequenceContext& context, const LayerScores& scores,
                                     const Request& request, LayerPlan plan, Backend& backend,
                                     Stream& stream) {
  const int64_t num_tokens = context.spec.shape.num_tokens;
  const bool whole_blocks = request.num_whole_blocks > 0;
  const int64_t row_stride = whole_blocks ? num_tokens : request.num_kept;
  absl::StatusOr<Buffer> kept = backend.Allocate(plan.groups * row_stride * kIndexBytes, stream);
  if (!kept.ok()) return kept.status();
  absl::StatusOr<Buffer> counts = backend.Allocate(plan.groups * kIndexBytes, stream);
  if (!counts.ok()) return counts.status();
  const SelectTokensParams params = {.block_scores = scores.block_scores.as<float>(),
                                     .token_scores = scores.token_scores.as<float>(),
                                     .groups = plan.groups,
                                     .num_tokens = num_tokens,
                                     .block_starts = context.block_starts.as<int32_t>(),
                                     .num_blocks = context.segmentation.num_blocks(),
                                     .protected_tokens = context.protected_device.as<uint8_t>(),
                                     .num_kept = request.num_kept,
                                     .num_whole_blocks = request.num_whole_blocks,
                                     .kept = kept->as<int32_t>(),
                                     .kept_counts = counts->as<int32_t>()};
  if (auto status = backend.SelectTokens(params, stream); !status.ok()) return status;
  plan.num_kept = request.num_kept;
  if (whole_blocks) {
    const absl::StatusOr<int64_t> count = ReadCount(*std::move(counts), backend, stream);
    if (!count.ok()) return count.status();
    plan.num_kept = *count;
  }
  // The device copy stays where it is for the stages that follow.
  absl::StatusOr<Buffer> kept_host = backend.ToHost(
      Buffer(kept->data(), plan.groups * plan.num_kept * kIndexBytes, nullptr), stream);
  if (!kept_host.ok()) return kept_host.status();
  LayerDecision decision;
  decision.plan = std::move(plan);
  decision.kept_host = *std::move(kept_host);
  decision.kept = *std::move(kept);
  decision.kept_pending = true;
  return decision;
}

int64_t NumProtectedBlocks(const SequenceContext& context) {
  const std::vector<int32_t>& starts = context.segmentation.starts;
  const auto flags = context.protected_tokens.begin();
  int64_t count = 0;
  for (size_t j = 0; j + 1 < starts.size(); ++j) {
    const auto end = flags + starts[j + 1];
    if (std::find(flags + starts[j], end, uint8_t{1}) != end) ++count;
  }
  return count;
}

}  // namespace

absl::StatusOr<LayerDecision> EnqueuePlan(const SequenceContext& context, const LayerScores& scores,
                                          int32_t layer, int64_t min_num_kept, Backend& backend,
                                          Stream& stream) {
  absl::StatusOr<LayerBudget> budget = BudgetOf(context, layer);
  if (!budget.ok()) return budget.status();
  if (budget->dense) return KeepAll(context, layer, backend, stream);

  const bool whole_blocks = budget->num_whole_blocks > 0;
  int64_t& target = whole_blocks ? budget->num_whole_blocks : budget->num_kept;
  LayerPlan plan;
  plan.layer = layer;
  plan.raised_by_quality_floor = min_num_kept > target;
  plan.raised_by_protection =
      whole_blocks ? NumProtectedBlocks(context) > target : budget->raised_by_protection;
  target = std::max(target, min_num_kept);
  if (KeepsEverything(context, *budget)) {
    return KeepAllAs(context, std::move(plan), backend, stream);
  }
  plan.groups = scores.groups;
  return Select(context, scores,
                {.num_kept = budget->num_kept, .num_whole_blocks = budget->num_whole_blocks},
                std::move(plan), backend, stream);
}

void ReadDecision(LayerDecision& decision) {
  if (!decision.kept_pending) return;
  const std::span<const int32_t> rows(
      decision.kept_host.as<int32_t>(),
      static_cast<size_t>(decision.plan.groups * decision.plan.num_kept));
  decision.plan.kept.assign(rows.begin(), rows.end());
  decision.kept_pending = false;
}

absl::StatusOr<LayerDecision> PlanLayer(const SequenceContext& context, const LayerScores& scores,
                                        int32_t layer, int64_t min_num_kept, Backend& backend,
                                        Stream& stream) {
  absl::StatusOr<LayerDecision> decision =
      EnqueuePlan(context, scores, layer, min_num_kept, backend, stream);
  if (!decision.ok()) return decision;
  if (auto status = stream.Synchronize(); !status.ok()) return status;
  ReadDecision(*decision);
  return decision;
}

absl::StatusOr<LayerDecision> KeepAll(const SequenceContext& context, int32_t layer,
                                      Backend& backend, Stream& stream) {
  LayerPlan plan;
  plan.layer = layer;
  plan.dense = true;
  return KeepAllAs(context, std::move(plan), backend, stream);
}

int64_t LeastKept(const SequenceSpec& spec, int32_t layer) {
  const absl::StatusOr<LayerBudget> budget = BudgetForLayer(
      spec.policy, spec.shape, layer, /*num_blocks=*/1, /*num_protected=*/0, OutputCostOf(spec));
  return budget.ok() ? std::max<int64_t>(1, budget->num_kept) : 1;
}

absl::StatusOr<LayerDecision> FromPlan(LayerPlan plan, Backend& backend, Stream& stream) {
  absl::StatusOr<Buffer> host = HostCopy(std::as_bytes(std::span(plan.kept)), backend);
  if (!host.ok()) return host.status();
  absl::StatusOr<Buffer> device = backend.ToDevice(*host, stream);
  if (!device.ok()) return device.status();
  LayerDecision decision;
  decision.plan = std::move(plan);
  decision.kept_host = *std::move(host);
  decision.kept = *std::move(device);
  return decision;
}

}  // namespace dynsplit

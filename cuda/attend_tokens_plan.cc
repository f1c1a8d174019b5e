// SPDX-License-Identifier: Apache-2.0
#include "cuda/attend_tokens_plan.h"

#include <algorithm>
#include <array>
#include <cstddef>

namespace dynsplit::kernels {
namespace {

// What starting and ending a block costs, in steps that it could have made.
constexpr int64_t kBlockOverheadSteps = 4;

uint32_t CeilDiv(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

struct Work {
  std::array<uint32_t, kAttendMaxLaunchItems> steps{};  // >= 1
  size_t num_items = 0;
  uint32_t num_kv_heads = 0;

  int64_t BlocksOf(uint32_t steps_per_split) const {
    int64_t splits = 0;
    for (size_t i = 0; i < num_items; ++i) splits += CeilDiv(steps[i], steps_per_split);
    return splits * num_kv_heads;
  }
  // Smallest number of steps in [least, most] that makes at most `max_blocks` blocks.
  uint32_t StepsFor(int64_t max_blocks, uint32_t least, uint32_t most) const {
    while (least < most) {
      const uint32_t middle = least + (most - least) / 2;
      if (BlocksOf(middle) <= max_blocks) {
        most = middle;
      } else {
        least = middle + 1;
      }
    }
    return least;
  }
};

uint32_t StepsPerSplit(const Work& work, int num_sms) {
  uint32_t longest = 1;
  int64_t total = 0;
  for (size_t i = 0; i < work.num_items; ++i) {
    longest = std::max(longest, work.steps[i]);
    total += work.steps[i];
  }
  const int64_t resident = int64_t{kAttendBlocksPerSm} * num_sms;
  const int64_t ideal = total * work.num_kv_heads / resident;
  const uint32_t least = kAttendWarps;  // a step for every warp
  if (longest <= least) return least;
  uint32_t best = longest;
  int64_t best_cost = INT64_MAX;
  for (int64_t waves = 1; waves <= kAttendMaxWaves; ++waves) {
    if (ideal + waves * kBlockOverheadSteps >= best_cost) break;
    if (work.BlocksOf(longest) > waves * resident) continue;
    const uint32_t steps = work.StepsFor(waves * resident, least, longest);
    const int64_t cost = waves * (steps + kBlockOverheadSteps);
    if (cost < best_cost) {
      best_cost = cost;
      best = steps;
    }
  }
  return best;
}

}  // namespace

int32_t PlanAttend(std::span<const int64_t> num_rows, int32_t num_kv_heads, int num_sms,
                   std::span<AttendCut> cuts) {
  Work work = {.num_items = num_rows.size(), .num_kv_heads = static_cast<uint32_t>(num_kv_heads)};
  for (size_t i = 0; i < num_rows.size(); ++i) {
    const int64_t steps = (num_rows[i] + kAttendStepRows - 1) / kAttendStepRows;
    work.steps[i] = static_cast<uint32_t>(std::max<int64_t>(steps, 1));
  }
  const uint32_t steps_per_split = StepsPerSplit(work, num_sms);
  int32_t num_partials = 0;
  for (size_t i = 0; i < num_rows.size(); ++i) {
    const uint32_t splits = CeilDiv(work.steps[i], steps_per_split);
    cuts[i] = {
        .first_partial = num_partials,
        .splits = static_cast<int32_t>(splits),
        .rows_per_split = static_cast<int32_t>(CeilDiv(work.steps[i], splits) * kAttendStepRows)};
    num_partials += static_cast<int32_t>(splits) * num_kv_heads;
  }
  return num_partials;
}

int64_t MaxAttendPartials(int64_t num_items, int32_t num_kv_heads, int num_sms) {
  const int64_t resident = int64_t{kAttendBlocksPerSm} * num_sms;
  return std::max(kAttendMaxWaves * resident,
                  std::min<int64_t>(num_items, kAttendMaxLaunchItems) * num_kv_heads);
}

}  // namespace dynsplit::kernels

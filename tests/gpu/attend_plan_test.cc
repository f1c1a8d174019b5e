// SPDX-License-Identifier: Apache-2.0
//
// How AttendTokens cuts rows into thread blocks; needs no device.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cuda/attend_tokens_plan.h"

namespace dynsplit::kernels {
namespace {

constexpr int kSms = 132;
constexpr int64_t kResident = int64_t{kSms} * kAttendBlocksPerSm;

struct Plan {
  std::vector<AttendCut> cuts;
  int32_t num_partials = 0;
};

Plan PlanOf(const std::vector<int64_t>& num_rows, int32_t num_kv_heads) {
  Plan plan = {.cuts = std::vector<AttendCut>(num_rows.size())};
  plan.num_partials = PlanAttend(num_rows, num_kv_heads, kSms, plan.cuts);
  return plan;
}

// Every row has one split, partials are dense and in order, and the workspace suffices.
void ExpectSound(const Plan& plan, const std::vector<int64_t>& num_rows, int32_t num_kv_heads) {
  int32_t next = 0;
  for (size_t i = 0; i < num_rows.size(); ++i) {
    const AttendCut& cut = plan.cuts[i];
    EXPECT_EQ(cut.first_partial, next) << i;
    EXPECT_EQ(cut.rows_per_split % kAttendStepRows, 0) << i;
    EXPECT_GE(int64_t{cut.splits} * cut.rows_per_split, num_rows[i]) << i;
    EXPECT_GE(cut.splits, 1) << i;
    next += cut.splits * num_kv_heads;
  }
  EXPECT_EQ(plan.num_partials, next);
  EXPECT_LE(plan.num_partials,
            MaxAttendPartials(static_cast<int64_t>(num_rows.size()), num_kv_heads, kSms));
}

TEST(AttendPlanTest, FillsTheDeviceWithOneSequence) {
  const Plan plan = PlanOf({13107}, 8);
  ExpectSound(plan, {13107}, 8);
  EXPECT_EQ(plan.num_partials, kResident);
}

TEST(AttendPlanTest, FillsTheDeviceWithSixteenSequences) {
  const std::vector<int64_t> num_rows(16, 3277);
  const Plan plan = PlanOf(num_rows, 8);
  ExpectSound(plan, num_rows, 8);
  EXPECT_EQ(plan.num_partials, 256);
}

TEST(AttendPlanTest, CutsLongSequencesMoreThanShortOnes) {
  const std::vector<int64_t> num_rows = {100000, 1, 0, 5000};
  const Plan plan = PlanOf(num_rows, 4);
  ExpectSound(plan, num_rows, 4);
  EXPECT_GT(plan.cuts[0].splits, 10 * plan.cuts[3].splits);
  EXPECT_EQ(plan.cuts[1].splits, 1);
  EXPECT_EQ(plan.cuts[2].splits, 1);
}

TEST(AttendPlanTest, AvoidsAWaveThatIsNearlyEmpty) {
  // One block a head would be 1.2 waves.
  const std::vector<int64_t> num_rows(40, 3277);
  const Plan plan = PlanOf(num_rows, 8);
  ExpectSound(plan, num_rows, 8);
  const int64_t waves = (plan.num_partials + kResident - 1) / kResident;
  EXPECT_GT(plan.num_partials, waves * kResident * 85 / 100);
}

TEST(AttendPlanTest, IsSoundForAnyRows) {
  uint32_t state = 1;
  const auto next = [&state](int64_t limit) {
    state = state * 1664525U + 1013904223U;
    return static_cast<int64_t>(state >> 8) % limit;
  };
  for (int round = 0; round < 500; ++round) {
    std::vector<int64_t> num_rows(static_cast<size_t>(1 + next(kAttendMaxLaunchItems)));
    const int64_t limit = int64_t{1} << next(22);
    for (int64_t& rows : num_rows) rows = next(limit + 1);
    const auto num_kv_heads = static_cast<int32_t>(1 + next(128));
    ExpectSound(PlanOf(num_rows, num_kv_heads), num_rows, num_kv_heads);
  }
}

}  // namespace
}  // namespace dynsplit::kernels

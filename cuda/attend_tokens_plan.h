// SPDX-License-Identifier: Apache-2.0
//
// How the rows of AttendTokens are cut into thread blocks. Pure arithmetic on the host.
#pragma once

#include <cstdint>
#include <span>

namespace dynsplit::kernels {

inline constexpr int kAttendStepRows = 16;        // rows a warp takes at a time
inline constexpr int kAttendWarps = 4;            // of a thread block; they take steps in turn
inline constexpr int kAttendBlocksPerSm = 2;      // resident at once
inline constexpr int kAttendMaxWaves = 4;         // of resident blocks, where items allow a choice
inline constexpr int kAttendMaxLaunchItems = 64;  // items that one launch takes by value

// Split s of KV head h of an item reads rows [s * rows_per_split, (s + 1) * rows_per_split) and
// writes partial first_partial + h * splits + s.
struct AttendCut {
  int32_t first_partial = 0;
  int32_t splits = 1;
  int32_t rows_per_split = kAttendStepRows;  // a multiple of kAttendStepRows
};

// Cuts items of num_rows[i] rows so that the device is full for as few steps as possible. Returns
// the number of partials. Requires: as many cuts as items, at most kAttendMaxLaunchItems.
int32_t PlanAttend(std::span<const int64_t> num_rows, int32_t num_kv_heads, int num_sms,
                   std::span<AttendCut> cuts);

// The most partials that PlanAttend returns for so many items, whatever their rows.
int64_t MaxAttendPartials(int64_t num_items, int32_t num_kv_heads, int num_sms);

}  // namespace dynsplit::kernels

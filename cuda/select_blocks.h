// SPDX-License-Identifier: Apache-2.0
//
// How SelectBlocks and SelectTokens are cut into launches and runs. Plain numbers, tested without a
// device.
#pragma once

#include <cstdint>

namespace dynsplit::kernels {

inline constexpr int kSelectBatchItems = 64;  // of a launch: 3 KiB of kernel parameters
inline constexpr int kSelectThreads = 1024;   // of a thread block

// Lines of 32 blocks that a warp keeps in registers; longer runs are read at every step.
inline constexpr int kSelectFewLines = 4;    // two thread blocks an SM at a time
inline constexpr int kSelectManyLines = 16;  // 16,384 blocks a thread block

// Thread blocks that select for one group together: as many as its blocks give work to, while the
// `num_teams` teams of a launch run at once. A power of two, at most `limit`.
int SelectTeamSize(int64_t num_blocks, int64_t num_teams, int num_sms, int limit);

// Consecutive blocks that each of a team's warps takes: a multiple of 32.
int64_t SelectRunBlocks(int64_t num_blocks, int team_size);

}  // namespace dynsplit::kernels

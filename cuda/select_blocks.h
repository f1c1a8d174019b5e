// SPDX-License-Identifier: Apache-2.0
//
// How SelectBlocks is cut into launches and runs. Plain numbers, tested without a device.
#pragma once

#include <cstdint>

namespace dynsplit::kernels {

inline constexpr int kSelectBatchItems = 64;  // of a launch: 3 KiB of kernel parameters
inline constexpr int kSelectThreads = 1024;   // for one group of one item

// Lines of 32 blocks that a warp keeps in registers; longer runs are read at every step.
inline constexpr int kSelectFewLines = 4;    // 4,096 blocks a group, two groups an SM at a time
inline constexpr int kSelectManyLines = 16;  // 16,384 blocks

// Consecutive blocks that each of the warps takes: a multiple of 32.
int64_t SelectRunBlocks(int64_t num_blocks);

}  // namespace dynsplit::kernels

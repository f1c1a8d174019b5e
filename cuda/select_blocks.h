// SPDX-License-Identifier: Apache-2.0
//
// How SelectBlocks is cut into launches and runs. Plain numbers, tested without a device.
#pragma once

#include <cstdint>

namespace dynsplit::kernels {

inline constexpr int kSelectBatchItems = 64;  // of a launch: 3 KiB of kernel parameters
inline constexpr int kSelectThreads = 1024;   // for one group of one item

// Consecutive blocks that a warp takes at a time, so that there are at most as many runs as
// threads: a multiple of 32.
int64_t SelectRunBlocks(int64_t num_blocks);

}  // namespace dynsplit::kernels

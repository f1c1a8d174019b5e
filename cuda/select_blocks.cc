// SPDX-License-Identifier: Apache-2.0
#include "cuda/select_blocks.h"

#include <algorithm>

namespace dynsplit::kernels {

int64_t SelectRunBlocks(int64_t num_blocks) {
  constexpr int64_t kLine = 32;
  return std::max<int64_t>((num_blocks + kSelectThreads - 1) / kSelectThreads, 1) * kLine;
}

}  // namespace dynsplit::kernels

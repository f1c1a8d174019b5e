// SPDX-License-Identifier: Apache-2.0
#include "cuda/select_blocks.h"

#include <algorithm>

namespace dynsplit::kernels {

int SelectTeamSize(int64_t num_blocks, int64_t num_teams, int num_sms, int limit) {
  int size = 1;
  while (2 * size <= limit && 2 * size * num_teams <= num_sms &&
         int64_t{size} * kSelectThreads < num_blocks) {
    size *= 2;
  }
  return size;
}

int64_t SelectRunBlocks(int64_t num_blocks, int team_size) {
  constexpr int64_t kLine = 32;
  const int64_t threads = int64_t{kSelectThreads} * team_size;
  return std::max<int64_t>((num_blocks + threads - 1) / threads, 1) * kLine;
}

}  // namespace dynsplit::kernels

// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/generation.h"

#include <sys/random.h>

namespace dynsplit {

uint64_t RandomGeneration() {
  uint64_t generation = 0;
  while (generation == 0) {
    if (getrandom(&generation, sizeof(generation), 0) != sizeof(generation)) generation = 0;
    generation &= ~(uint64_t{1} << 63);
  }
  return generation;
}

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// Names of versions of something that others hold a copy of or a claim to.
#pragma once

#include <cstdint>

namespace dynsplit {

// Unguessable, below 2^63, so that it survives languages without unsigned types, and never 0.
uint64_t RandomGeneration();

}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// Sequences that stay, on the GPU.
#include "tests/oracle/resident_suite.h"

#include "tests/gpu/gpu.h"

namespace dynsplit {
namespace {

[[maybe_unused]] const int kNumRegistered = oracle::RegisterResidentTests("Cuda", Gpu);

}  // namespace
}  // namespace dynsplit

// SPDX-License-Identifier: Apache-2.0
//
// The parity suite on the GPU: every operation, every shape, against the oracle.
#include "tests/oracle/parity_suite.h"

#include <gtest/gtest.h>

#include "tests/gpu/gpu.h"

namespace dynsplit {
namespace {

[[maybe_unused]] const int kNumRegistered = oracle::RegisterParityTests("Cuda", Gpu);

TEST(CudaLargeTest, BeyondTwoGibiElements) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  oracle::CheckBeyondTwoGibiElements(*gpu);
}

}  // namespace
}  // namespace dynsplit

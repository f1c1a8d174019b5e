// SPDX-License-Identifier: Apache-2.0
#include "tests/gpu/gpu.h"

#include <gtest/gtest.h>

#include <memory>

#include "cuda/cuda_backend.h"
#include "server/cpu/cpu_backend.h"

namespace dynsplit {

Backend* Gpu() {
  static absl::StatusOr<std::unique_ptr<Backend>>& backend =
      *new absl::StatusOr<std::unique_ptr<Backend>>(CreateCudaBackend({}));
  if (!backend.ok()) {
    ADD_FAILURE() << "no GPU: " << backend.status();
    return nullptr;
  }
  EXPECT_TRUE((*backend)->Healthy().ok()) << (*backend)->Healthy();
  return backend->get();
}

Backend& Cpu() {
  static Backend& backend = *CreateCpuBackend({}).value().release();
  return backend;
}

}  // namespace dynsplit

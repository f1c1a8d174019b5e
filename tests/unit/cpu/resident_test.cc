// SPDX-License-Identifier: Apache-2.0
//
// Sequences that stay, on the CPU backend.
#include <memory>

#include "server/cpu/cpu_backend.h"
#include "tests/oracle/resident_suite.h"

namespace dynsplit {
namespace {

Backend* TwoThreads() {
  static const auto& backend =
      *new std::unique_ptr<Backend>(CreateCpuBackend({.num_threads = 2}).value());
  return backend.get();
}

[[maybe_unused]] const int kNumRegistered = oracle::RegisterResidentTests("Cpu", TwoThreads);

}  // namespace
}  // namespace dynsplit

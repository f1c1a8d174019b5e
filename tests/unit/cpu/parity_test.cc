// SPDX-License-Identifier: Apache-2.0
//
// The parity suite on the CPU backend, with several threads and, where no shape takes long, with
// one.
#include <memory>

#include "server/cpu/cpu_backend.h"
#include "tests/oracle/parity_suite.h"

namespace dynsplit {
namespace {

Backend* OneThread() {
  static const auto& backend =
      *new std::unique_ptr<Backend>(CreateCpuBackend({.num_threads = 1}).value());
  return backend.get();
}

Backend* FourThreads() {
  static const auto& backend =
      *new std::unique_ptr<Backend>(CreateCpuBackend({.num_threads = 4}).value());
  return backend.get();
}

const int kRegistered =
    oracle::RegisterParityTests("CpuOneThread", OneThread, oracle::ShapeSet::kSmall) +
    oracle::RegisterParityTests("CpuFourThreads", FourThreads);

}  // namespace
}  // namespace dynsplit

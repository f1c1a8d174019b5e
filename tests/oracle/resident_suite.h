// SPDX-License-Identifier: Apache-2.0
//
// What must hold of sequences that stay, on any backend:
//
//     const int registered = oracle::RegisterResidentTests("Cuda", [] { return TheBackend(); });
//
// at namespace scope of a test file. Tests are named "<prefix>Resident.<Property>/<kind>".
#pragma once

#include <string>

#include "tests/oracle/parity_suite.h"

namespace dynsplit::oracle {

// Returns the number of tests registered.
int RegisterResidentTests(const std::string& prefix, BackendFactory backend);

}  // namespace dynsplit::oracle

// SPDX-License-Identifier: Apache-2.0
//
// The backends under test. A machine without a GPU fails these tests; it does not skip them.
#pragma once

#include "server/pipeline/backend.h"

namespace dynsplit {

// Device 0 with default options, shared by all tests; null (and a failure) without a device.
Backend* Gpu();
// The CPU backend to compare with.
Backend& Cpu();

}  // namespace dynsplit

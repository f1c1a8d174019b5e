// SPDX-License-Identifier: Apache-2.0
//
// A sequence long enough to be cut on the device is cut as it is on the host.
#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "server/pipeline/compress.h"
#include "server/pipeline/presets.h"
#include "tests/gpu/gpu.h"
#include "tests/oracle/random_tensors.h"

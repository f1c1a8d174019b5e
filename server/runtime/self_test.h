// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "absl/status/status.h"
#include "server/pipeline/backend.h"

namespace dynsplit {

// Compresses a small made-up layer on `backend` and checks what must hold whatever the device:
// the tokens that attention points at are kept, and their rows come back bit by bit. INTERNAL
// naming what differed.
absl::Status SelfTest(Backend& backend);

}  // namespace dynsplit

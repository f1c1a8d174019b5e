// SPDX-License-Identifier: Apache-2.0
//
// What requests and calls do with sessions.
#pragma once

#include "server/runtime/request_spec.h"
#include "server/runtime/sessions.h"

namespace dynsplit {

// The session as it is now. Requires: it is materialized, and the caller holds none of its locks.
SessionSnapshot Snapshot(Session& session, const SessionStore& store);

// Policy of what Fetch returns: as the session rests, all of it, in `output`'s bits, positions and
// pages.
Policy FetchPolicy(const Policy& resident, const Policy& output);

}  // namespace dynsplit

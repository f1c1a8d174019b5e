// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "dynsplit/v1/compression.pb.h"
#include "server/runtime/profiles.h"
#include "server/runtime/request_spec.h"

namespace dynsplit {

struct BeginSeed {
  std::string name;
  Method method;
  v1::Begin begin;
};

// What a server would make of it. Append and Fetch: for a session that seed "Open" opened.
absl::StatusOr<RequestSpec> ReadBegin(const v1::Begin& begin, Method method,
                                      const ProfileStore& profiles);

// Some of every method and every kind of tensor. Each is one that the server accepts; an error
// where it does not.
absl::StatusOr<std::vector<BeginSeed>> BeginSeeds();

}  // namespace dynsplit

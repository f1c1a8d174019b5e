// SPDX-License-Identifier: Apache-2.0
//
// The files of server/pipeline/profiles as text; the definition is written by embed_profiles.cmake.
#pragma once

#include <span>
#include <string_view>

namespace dynsplit {

struct EmbeddedProfile {
  std::string_view name;  // file name less .csv
  std::string_view csv;
};

std::span<const EmbeddedProfile> EmbeddedProfiles();  // ascending names

}  // namespace dynsplit

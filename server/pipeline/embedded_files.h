// SPDX-License-Identifier: Apache-2.0
//
// Files of data as text, compiled in; the definitions are written by embed_files.cmake.
#pragma once

#include <span>
#include <string_view>

namespace dynsplit {

struct EmbeddedFile {
  std::string_view name;  // file name less .csv
  std::string_view csv;
};

// Ascending names.
std::span<const EmbeddedFile> EmbeddedProfiles();  // server/pipeline/profiles
std::span<const EmbeddedFile> EmbeddedQuality();   // server/pipeline/quality

}  // namespace dynsplit

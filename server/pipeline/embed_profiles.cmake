# SPDX-License-Identifier: Apache-2.0
#
# cmake -DOUTPUT=<file.cc> -DPROFILES=<a.csv|b.csv|...> -P embed_profiles.cmake
# Writes the definition of embedded_profiles.h: every profile as a raw string literal.
string(REPLACE "|" ";" profiles "${PROFILES}")
set(rows "")
foreach(profile IN LISTS profiles)
  get_filename_component(name ${profile} NAME_WLE)
  # Read as text that keeps ';' and '[' as they are: the content is never treated as a list.
  file(READ ${profile} content)
  string(FIND "${content}" ")profile\"" terminator)
  if(NOT terminator EQUAL -1)
    message(FATAL_ERROR "${profile} contains the terminator of its raw string")
  endif()
  string(APPEND rows "    {\"${name}\", R\"profile(${content})profile\"},\n")
endforeach()
list(LENGTH profiles count)
file(WRITE ${OUTPUT}.new "// SPDX-License-Identifier: Apache-2.0
// Written by embed_profiles.cmake.
#include \"server/pipeline/embedded_profiles.h\"

#include <array>

namespace dynsplit {

std::span<const EmbeddedProfile> EmbeddedProfiles() {
  static constexpr std::array<EmbeddedProfile, ${count}> kProfiles = {{
${rows}  }};
  return kProfiles;
}

}  // namespace dynsplit
")
file(COPY_FILE ${OUTPUT}.new ${OUTPUT} ONLY_IF_DIFFERENT)

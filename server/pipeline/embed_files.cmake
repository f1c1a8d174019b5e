# SPDX-License-Identifier: Apache-2.0
#
# cmake -DOUTPUT=<file.cc> -DFUNCTION=<name> -DFILES=<a.csv|b.csv|...> -P embed_files.cmake
# Writes the definition of a function of embedded_files.h: every file as a raw string literal.
string(REPLACE "|" ";" files "${FILES}")
set(rows "")
foreach(file IN LISTS files)
  get_filename_component(name ${file} NAME_WLE)
  # Read as text that keeps ';' and '[' as they are: the content is never treated as a list.
  file(READ ${file} content)
  string(FIND "${content}" ")embedded\"" terminator)
  if(NOT terminator EQUAL -1)
    message(FATAL_ERROR "${file} contains the terminator of its raw string")
  endif()
  string(APPEND rows "    {\"${name}\", R\"embedded(${content})embedded\"},\n")
endforeach()
list(LENGTH files count)
file(WRITE ${OUTPUT}.new "// SPDX-License-Identifier: Apache-2.0
// Written by embed_files.cmake.
#include \"server/pipeline/embedded_files.h\"

#include <array>

namespace dynsplit {

std::span<const EmbeddedFile> ${FUNCTION}() {
  static constexpr std::array<EmbeddedFile, ${count}> kFiles = {{
${rows}  }};
  return kFiles;
}

}  // namespace dynsplit
")
file(COPY_FILE ${OUTPUT}.new ${OUTPUT} ONLY_IF_DIFFERENT)

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The permitted include directions between rooms. Fails with every line that goes against them.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
failed=0
# forbid ROOM REGEX: no include in ROOM may match REGEX.
forbid() {
  [[ -d $1 ]] || { echo "architecture: room $1 does not exist"; failed=1; return; }
  if grep -rnE "^ *#include *[\"<]($2)" "$1" --include='*.cc' --include='*.h' --include='*.cu' --include='*.cuh'; then
    echo "architecture: $1 must not include $2"
    failed=1
  fi
}
forbid server/pipeline 'grpc|google/|dynsplit/v1|proto/|cuda|server/(cpu|runtime|rpc)|prometheus|client/'
forbid server/cpu 'grpc|google/|dynsplit/v1|proto/|cuda|server/(runtime|rpc)|prometheus|client/'
forbid cuda 'grpc|google/|dynsplit/v1|proto/|server/(cpu|runtime|rpc)|prometheus|client/'
forbid server/runtime 'grpc|google/|dynsplit/v1|proto/|cuda|server/(cpu|rpc)|client/'
forbid server/rpc 'cuda|server/cpu|client/'
forbid proto/wire 'server/|client/|cuda'
forbid client/cpp 'server/|cuda|client/cli'
forbid client/cli 'server/|cuda'
allowed='^(CMakeLists\.txt|CMakePresets\.json|LICENSE|README\.md|run|proto|server|client|cuda|tests|docker|\..*)$'
while read -r entry; do
  [[ $entry =~ $allowed ]] || { echo "architecture: top level holds $entry"; failed=1; }
done < <(git ls-files | cut -d/ -f1 | sort -u)
exit "$failed"

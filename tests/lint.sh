#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Format, static analysis and shell checks over all tracked sources. Needs a configured build (made here).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mapfile -t sources < <(git ls-files '*.cc' '*.h' '*.cu' '*.cuh')
mapfile -t units < <(git ls-files 'server/*.cc' 'client/*.cc' 'proto/*.cc' 'cuda/*.cc')
mapfile -t scripts < <(git ls-files run .ci/run '*.sh')

clang-format-14 --dry-run --Werror "${sources[@]}"
echo "lint: format ok (${#sources[@]} files)"
shellcheck "${scripts[@]}"
echo "lint: shell ok (${#scripts[@]} scripts)"
cmake --preset asan >build/configure-lint.log 2>&1 || { tail -n 20 build/configure-lint.log >&2; exit 1; }
# Generated headers must exist before the analysis can parse anything.
cmake --build build/asan --target dynsplit_proto -j "$(nproc)" >build/build-lint.log 2>&1 ||
  { tail -n 20 build/build-lint.log >&2; exit 1; }
printf '%s\n' "${units[@]}" | xargs -P "$(nproc)" -n 2 clang-tidy-14 -p build/asan --quiet 2>build/clang-tidy.err >build/clang-tidy.log ||
  { grep -E 'error|warning' build/clang-tidy.log | sort -u | head -n 40 >&2; exit 1; }
echo "lint: clang-tidy ok (${#units[@]} files)"

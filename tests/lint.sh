#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Format, static analysis and shell checks over all tracked sources. Needs a configured build (made here).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mapfile -t sources < <(git ls-files '*.cc' '*.h' '*.cu' '*.cuh')
mapfile -t units < <(git ls-files 'server/*.cc' 'client/*.cc' 'proto/*.cc')
mapfile -t cuda_units < <(git ls-files 'cuda/*.cc')
mapfile -t scripts < <(git ls-files run .ci/run '*.sh')
mkdir -p build

clang-format-14 --dry-run --Werror "${sources[@]}"
echo "lint: format ok (${#sources[@]} files)"
shellcheck "${scripts[@]}"
echo "lint: shell ok (${#scripts[@]} scripts)"
cmake --preset asan >build/configure-lint.log 2>&1 || { tail -n 20 build/configure-lint.log >&2; exit 1; }
# Generated headers must exist before the analysis can parse anything.
cmake --build build/asan --target dynsplit_proto -j "$(nproc)" >build/build-lint.log 2>&1 ||
  { tail -n 20 build/build-lint.log >&2; exit 1; }

tests/tidy.py build/asan "${units[@]}"
# The host side of cuda/ has no entry among the asan build's commands (that build has no CUDA): it needs the
# toolkit's headers only. Kernels (.cu) are nvcc's, with all its warnings as errors.
toolkit=${CUDA_HOME:-/usr/local/cuda}/include
if [[ -e $toolkit/cuda_runtime_api.h ]]; then
  tests/tidy.py --flags "-x c++ -std=c++20 -I. -isystem $toolkit" "${cuda_units[@]}"
else
  echo "lint: no CUDA headers in $toolkit: ${#cuda_units[@]} files of cuda/ not analysed"
fi

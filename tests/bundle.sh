#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Packs what a GPU host needs into BUNDLE_DIR/bundle.tar.gz: binaries, the engine library, shared
# libraries (all but glibc's, libstdc++ and libgcc), the Python client, tests/gpu.sh and the sample data. On the host:
# unpack it, run tests/gpu.sh. LEAVE_OUT="bench_cpu" leaves benchmarks out (that one brings 11 MB of OpenBLAS).
#   usage: tests/bundle.sh BUILD_DIR [BUNDLE_DIR]     BUNDLE_DIR defaults to build/bundle
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:?usage: tests/bundle.sh BUILD_DIR [BUNDLE_DIR]}
target=${2:-build/bundle}
bundle=$(mktemp -d)
trap 'rm -rf "$bundle"' EXIT
mkdir -p "$bundle/bin" "$bundle/lib" "$bundle/tests/data"

for name in gpu_tests dynsplitd dynsplit; do
  path=$(find "$build" -type f -executable -name "$name" | head -n 1)
  if [ -z "$path" ]; then
    echo "bundle.sh: $name is not built in $build" >&2
    case $name in gpu_tests) exit 1 ;; *) continue ;; esac
  fi
  strip -o "$bundle/bin/$name" "$path"
done
find "$build/tests/bench" -maxdepth 1 -type f -executable -name 'bench_*' | while read -r path; do
  case " ${LEAVE_OUT:-} " in *" $(basename "$path") "*) continue ;; esac
  strip -o "$bundle/bin/$(basename "$path")" "$path"
done
engine=$(find "$build" -name libdynsplit_engine.so | head -n 1)
if [ -z "$engine" ]; then
  echo "bundle.sh: libdynsplit_engine.so is not built in $build" >&2
  exit 1
fi
strip -o "$bundle/lib/libdynsplit_engine.so" "$engine"
system='/(libc|libm|libpthread|libdl|librt|libresolv|libutil|libstdc\+\+|libgcc_s|ld-linux[^/]*)\.so'
ldd "$bundle"/bin/* | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u |
  { grep -Ev "$system" || true; } | while read -r library; do
  install -m 755 "$(realpath "$library")" "$bundle/lib/$(basename "$library")"
  strip "$bundle/lib/$(basename "$library")"
done
mkdir -p "$bundle/tests/judges" "$bundle/tests/bench"
cp tests/gpu.sh tests/service_parity.sh tests/mps.sh "$bundle/tests/"
cp tests/bench/*.sh tests/bench/*.py "$bundle/tests/bench/"
mkdir -p "$bundle/python"
"${PYTHON:-python3}" client/python/generate_stubs.py "$bundle/python"
cp -r client/python/dynsplit "$bundle/python/"
find "$bundle/python" -name __pycache__ -prune -exec rm -rf {} +
cp client/python/tests/cuda_road.py "$bundle/tests/"
git describe --always --dirty >"$bundle/REVISION" 2>/dev/null || rm -f "$bundle/REVISION"
cp tests/judges/compare_results.py tests/judges/compare_sessions.py "$bundle/tests/judges/"
[ -d tests/data/sample ] && cp -r tests/data/sample "$bundle/tests/data/"
rm -rf "$target"
mkdir -p "$target"
tar -cf - -C "$bundle" . | gzip -9 >"$target/bundle.tar.gz"
ls -l "$target/bundle.tar.gz"

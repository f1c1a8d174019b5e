#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The GPU's tests, sanitizers and benchmarks, from an unpacked bundle (tests/bundle.sh) on a machine
# with an NVIDIA GPU. Builds nothing. Logs go to ${OUT:-.}; what they come to is printed at the end:
# the benchmarks' tables, then which steps passed. Exits non-zero if anything failed.
# `STEPS="tests bench"` runs a part.
set -u
cd "$(dirname "$0")/.." || exit 1
inherited=${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH="$PWD/lib$inherited"
out=${OUT:-.}
steps=${STEPS:-tests service python memcheck racecheck initcheck synccheck bench}
python=${PYTHON:-python3}
mkdir -p "$out"

# Every kernel in few, small shapes: all element types, layouts, encodings and both score paths.
small="two_tokens gqa3_d64_padded gqa4_d96_partial_rope gqa2_d256 mha_d512 float32_padded
  float16_paged e4m3_token_scales_paged e5m2_padded int8_token_scales kernel_longer_than_prefix"
filter=""
for shape in $small; do filter="$filter:CudaParity.*/$shape"; done
filter="${filter#:}:CudaParity.Copies:CudaParity.ResidentLimits:CudaBackendTest.*:GatherPagesTest.*:CudaMemoryTest.*:DevicePoolTest.*:-*SelectAdversarial/gqa*"

names=() results=() seconds=()
failed=0
step() {  # step NAME LIMIT_S COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  case " $steps " in *" $name "*) ;; *) return ;; esac
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  names+=("$name") seconds+=($((SECONDS - start)))
  if [ $rc -eq 0 ]; then results+=(ok); else results+=("failed, exit $rc"); failed=1; fi
}
sanitize() {  # sanitize TOOL LIMIT_S FILTER
  local flags=()
  # Some tests ask for what the driver must refuse, and check that it did.
  [ "$1" = memcheck ] && flags=(--report-api-errors no)
  step "$1" "$2" compute-sanitizer --tool "$1" "${flags[@]}" --error-exitcode 9 --print-limit 20 \
    bin/gpu_tests --gtest_filter="$3"
}
# racecheck is slower by far, and needs only one shape a kernel: 16-bit and fp32 paths, small and large depth.
# Selection and what reads it also at the depth of most models, which has kernels of its own.
race="CudaParity.*/gqa3_d64_padded:CudaParity.*/gqa2_d256:CudaParity.*/e4m3_token_scales_paged"
for operation in ScoreWindow MeasureAttention ScoreBlocks SelectBlocks ScoreTokens SelectCandidates AttendTokens RefreshRows; do race="$race:CudaParity.$operation/gqa4_d128"; done
race="$race:-*SelectAdversarial*"

step tests 300 bin/gpu_tests --gtest_brief=1
step service 120 tests/service_parity.sh bin/dynsplitd bin/dynsplit cuda
# Python sees only libisal of the bundle's libraries (CRC32C): the others would shadow its own.
isal=$(mktemp -d)
trap 'rm -rf "$isal"' EXIT
for library in "$PWD"/lib/libisal.so.2*; do ln -sf "$library" "$isal/libisal.so.2"; done
step python 400 env LD_LIBRARY_PATH="$isal$inherited" PYTHONPATH="$PWD/python" DYNSPLITD=bin/dynsplitd \
  DYNSPLITD_LIBRARIES="$LD_LIBRARY_PATH" DYNSPLIT_ENGINE=lib/libdynsplit_engine.so "$python" tests/cuda_road.py
for tool in memcheck initcheck synccheck; do sanitize "$tool" 150 "$filter"; done
sanitize racecheck 280 "$race"
# BENCHES="layer decode" runs a part of the benchmarks, PEER_WHEELS names kvpress' folder (tests/bench/run.sh).
step bench 1800 tests/bench/run.sh bin "$out/bench"

if [ -f "$out/tests.log" ]; then grep -E '^\[  FAILED  \]' "$out/tests.log" | sort -u | head -20 | cut -c 1-100; fi
for name in "${names[@]}"; do
  case $name in
    bench) printf '== %s\n' "$name"; cut -c 1-170 "$out/$name.log" ;;
    python) grep -E ' s  (ok|FAILED)|passed in' "$out/python.log" | sed -E 's/  +/ /g; s/^/python: /' | cut -c 1-150 ;;
    service) tail -n 8 "$out/service.log" | cut -c 1-150 ;;
    *) tail -n 2 "$out/$name.log" | cut -c 1-150 | sed "s/^/$name: /" ;;
  esac
done
printf '\n%-12s %8s  %s\n' step seconds result
for i in "${!names[@]}"; do printf '%-12s %8s  %s\n' "${names[$i]}" "${seconds[$i]}" "${results[$i]}"; done
exit $failed

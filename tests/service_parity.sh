#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# service_parity.sh DYNSPLITD DYNSPLIT BACKEND: the real sample through two running servers, the CPU backend
# and BACKEND (cuda on a GPU host); their results must agree as tests/judges/compare_results.py says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
server=$(realpath "$1") client=$(realpath "$2") backend=$3
work=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$work"' EXIT

for side in cpu "$backend"; do
  "$server" --backend "$side" --listen "" --unix-socket "$work/$side.sock" --metrics-listen "" \
    --default-profile smollm2_table7 2>"$work/$side.log" &
  pids+=($!)
  for _ in $(seq 100); do
    "$client" serve-check --target "unix:$work/$side.sock" >/dev/null 2>&1 && break
    sleep 0.1
  done
  [[ -S $work/$side.sock ]] || { tail -n 5 "$work/$side.log" >&2; echo "the $side server did not start" >&2; exit 1; }
done

failed=0
run() {  # run NAME KIND FLAG...
  local name=$1 kind=$2
  shift 2
  for side in cpu "$backend"; do
    "$client" compress "tests/data/sample/$kind.safetensors" --target "unix:$work/$side.sock" --quiet "$@" \
      --output "$work/$side.safetensors" || { failed=1; return; }
  done
  printf '%-32s ' "$name $kind"
  python3 tests/judges/compare_results.py "$work/cpu.safetensors" "$work/$backend.safetensors" || failed=1
}
session() {  # session NAME KIND FLAG...: as run, with a session; what it holds must be equal byte for byte
  local name=$1 kind=$2
  shift 2
  for side in cpu "$backend"; do
    "$client" session "tests/data/sample/$kind.safetensors" --target "unix:$work/$side.sock" --json --with-tokens \
      --ratio 0.1 --steps 32 --fetch "$work/$side.safetensors" "$@" >"$work/$side.json" || { failed=1; return; }
  done
  printf '%-32s ' "$name $kind"
  python3 tests/judges/compare_sessions.py "$work/cpu.json" "$work/$backend.json" || failed=1
  cmp "$work/cpu.safetensors" "$work/$backend.safetensors" || failed=1
}
for kind in prose code dialogue; do
  run dynsplit "$kind"
  run "dynsplit fp8" "$kind" --encoding float8-e4m3
  run "dynsplit int8 contiguous" "$kind" --encoding int8 --positions contiguous
  run "dynsplit per head, contiguous" "$kind" --scope layer-head --positions contiguous
  run "dynsplit global" "$kind" --scope global --ratio 0.5
  run dynsplit_index "$kind" --preset dynsplit_index
  run dynsplit_keys "$kind" --preset dynsplit_keys
  run snapkv "$kind" --preset snapkv
  run chunkkv "$kind" --preset chunkkv
  run sentencekv "$kind" --preset sentencekv
  run "quality floor" "$kind" --ratio 0.05 --min-mass 0.9
  session "session" "$kind"
  session "session fp8" "$kind" --encoding float8-e4m3
  session "session int8, bf16 index" "$kind" --encoding int8 --summaries as-keys
  session "session on the host" "$kind" --residence host
  session "session, mean keys per layer" "$kind" --scoring block-mean-key --scope layer
done
grep -ah '"serving"\|"backend"' "$work/$backend.log" | head -n 3
exit "$failed"

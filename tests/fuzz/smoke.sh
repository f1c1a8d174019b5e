#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# smoke.sh BUILD_DIR SECONDS: runs every fuzzer of BUILD_DIR/tests/fuzz for SECONDS over a copy of its
# seeds, two at a time. Fails if any finds something; log and input of what it found are kept.
set -euo pipefail

if (($# != 2)) || [[ ! $2 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: smoke.sh BUILD_DIR SECONDS" >&2
  exit 2
fi
folder=$1/tests/fuzz
duration=$2
shopt -s nullglob
fuzzers=("$folder"/*_fuzzer)
if ((${#fuzzers[@]} == 0)); then
  echo "smoke.sh: no fuzzers in $folder (build the targets fuzz and fuzz_corpus)" >&2
  exit 2
fi
parallel=$(($(nproc) < 2 ? 1 : 2))
work=$(mktemp -d)
cleanup() {
  local pids
  mapfile -t pids < <(jobs -p)
  ((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null || true
  compgen -G "$work/*.failed" >/dev/null || rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# fuzz FUZZER: one line of result; NAME.passed or NAME.failed says which.
fuzz() {
  local fuzzer=$1 name options runs result=passed status=0
  name=$(basename "$fuzzer" _fuzzer)
  local home=$work/$name
  mkdir -p "$home/corpus" "$home/found"
  if ! cp -r "$folder/corpus/$name/." "$home/corpus/" || ! mapfile -t options <"$fuzzer.options"; then
    status=2
  else
    # Its own process to wait for, so that a signal reaches it.
    "$fuzzer" -max_total_time="$duration" "${options[@]}" -artifact_prefix="$home/found/" \
      "$home/corpus" >"$home/log" 2>&1 &
    trap 'kill $! 2>/dev/null' TERM
    wait $! || status=$?
  fi
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$home/log" 2>/dev/null | tail -n 1) || true
  ((status == 0)) && [[ -n $runs ]] || result=failed
  touch "$work/$name.$result"
  printf '%-12s %10s runs  %s\n' "$name" "${runs:-?}" "$result"
}

running=0
for fuzzer in "${fuzzers[@]}"; do
  if ((running == parallel)); then
    wait -n
    running=$((running - 1))
  fi
  fuzz "$fuzzer" &
  running=$((running + 1))
done
wait

passed=("$work"/*.passed)
failed=("$work"/*.failed)
for mark in "${failed[@]}"; do
  home=${mark%.failed}
  echo "--- $(basename "$home"): $home/log"
  [[ ! -f $home/log ]] || tail -n 40 "$home/log"
  for input in "$home/found/"*; do echo "input: $input"; done
done
echo "${#passed[@]} passed, ${#failed[@]} failed"
# A fuzzer that left no mark did not run to its end.
((${#passed[@]} == ${#fuzzers[@]}))

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Accuracy through the running service. Builds nothing.
#
#   tests/eval.sh [SIZE [OPTION...]]     run, from the root of an unpacked bundle or of the sources
#   tests/eval.sh pack DIR               on the build machine: what the bundle lacks, into DIR
#
# Starts a dynsplitd of its own and runs tests/eval/evaluate.py with the size (small) and options, then
# report.py. Results go to ${OUT:-tests/eval/results}; a folder of an earlier run there is carried on.
# RESUME=path, a folder of an earlier run or the cases.tar.gz of one, brings that run's cases and measured
# weights first. PACK=1 is for a run that goes on elsewhere, or a host that gives back few files: it works in a
# folder of its own and leaves in OUT only cases.tar.gz, results.tar.gz (all else), report.md and summary.csv.
#
# DEVICE=cuda|cpu (cuda where bin/dynsplitd is). On cuda the engine library is needed (ENGINE, or
# lib/libdynsplit_engine.so), numbers are bf16, and WORKERS=n processes (1; more go through CUDA's multi-process
# service, tests/mps.sh, and have been seen to hang) ask SERVERS=n instances of dynsplitd, which together may take
# SERVER_MEMORY GiB (26) of the device.
# On a CPU that others use too, OMP_NUM_THREADS=1 keeps torch from waiting for threads that do not run.
# DYNSPLITD, PYTHON, DATA (root of what pack wrote) and WEIGHTS as in tests/decode.sh, whose pack this
# one extends by the texts and kvpress. Python: as for tests/decode.sh, and tokenizers; for kvpress also
# transformers. Exit status 3: some method failed; the table at the end says which.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}

if [ "${1:-}" = pack ]; then
  set -e
  target=${2:?usage: tests/eval.sh pack DIR}
  tests/decode.sh pack "$target"
  cp -r tests/eval/accuracy "$target/tests/eval/"
  cp tests/eval.sh tests/mps.sh "$target/tests/"
  PYTHONPATH=client/python:tests/eval "$python" - "$target/data" <<'PYTHON'
import shutil, sys
from pathlib import Path
from accuracy import corpus
from dynsplit.capture import sources
for kind in corpus.KINDS:
    for split in corpus.SPLITS:
        corpus.load(kind, split, sources.cache_dir())
        for path in corpus.files(kind, split, sources.cache_dir()):
            shutil.copy(path, Path(sys.argv[1]) / path.name)
PYTHON
  site=$(mktemp -d)
  "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$site" kvpress==0.5.5
  cp -r "$site/kvpress" "$target/python/"
  rm -rf "$site"
  find "$target" -name __pycache__ -prune -exec rm -rf {} +
  du -sh "$target"/*
  exit
fi

size=${1:-small}
[ $# -gt 0 ] && shift
data=${DATA:-.}
out=${OUT:-tests/eval/results}
if [ -x bin/dynsplitd ]; then
  server_binary=${DYNSPLITD:-bin/dynsplitd} device=${DEVICE:-cuda} cache=$data/data
else
  server_binary=${DYNSPLITD:-build/dev/server/dynsplitd} device=${DEVICE:-cpu} cache=
fi
mkdir -p "$out"
out=$(realpath "$out")
work=$(mktemp -d)
packed=$out
[ "${PACK:-0}" = 1 ] && out=$work/out && mkdir "$out"
if [ -f "${RESUME:-}" ]; then
  tar -xzf "$RESUME" -C "$out" --skip-old-files || exit 1
elif [ -n "${RESUME:-}" ]; then
  mkdir -p "$out/cases"
  cp -n "$RESUME"/cases/*.json "$out/cases/" 2>/dev/null
  cp -n "$RESUME"/weights_*.pb "$out/" 2>/dev/null
fi
running=()
# shellcheck source=tests/mps.sh
. tests/mps.sh
trap 'kill "${running[@]}" 2>/dev/null && wait "${running[@]}" 2>/dev/null; mps_stop; rm -rf "$work"' EXIT

options=(--out "$out" --size "$size" --device "$device")
if [ -n "$cache" ]; then
  export PYTHONPATH="$data/python${PYTHONPATH:+:$PYTHONPATH}"
  options+=(--cache "$cache")
  model=$cache/$("$python" -c 'from dynsplit.capture import sources as s
print(f"{s.MODEL_ARCHIVE.sha256[:12]}-{s.MODEL_MEMBER.rpartition(chr(47))[2]}")') || exit 1
  if [ ! -f "$model" ]; then
    cat "${WEIGHTS:-$cache}"/weights.a[ab] >"$work/weights" || exit 1
    (cd "$work" && sha256sum --quiet -c -) <"$cache/weights.sha256" || exit 1
    mv "$work/weights" "$model" || exit 1
  fi
  mkdir "$work/lib"  # Python sees only libisal of the bundle's libraries
  for library in "$PWD"/lib/libisal.so.2*; do ln -s "$library" "$work/lib/libisal.so.2"; done
fi

limits=(--regions=shm) servers=${SERVERS:-1}
if [ "$device" = cuda ]; then
  engine=${ENGINE:-$PWD/lib/libdynsplit_engine.so}
  [ -f "$engine" ] || { echo "eval.sh: no $engine (ENGINE=path)"; exit 1; }
  [ "${WORKERS:-1}" -gt 1 ] && mps_start "$work"
  workers=${WORKERS:-$( ((mps_running)) && echo 8 || echo 1)}
  servers=${SERVERS:-$( ((mps_running)) && echo 2 || echo 1)}
  memory=${SERVER_MEMORY:-26}
  limits=(--regions=all --device-memory="$((memory * 1024 / servers))MiB" --pinned-memory=8GiB --workers=8 --max-queue=1024)
  options+=(--engine "$engine" --dtype bfloat16 --workers "$workers" --calls 4 --server-memory "$memory")
  echo "engine and service share the GPU $( ((mps_running)) && echo 'through MPS' || echo 'in time slices'), $workers workers"
fi
targets=
for ((number = 0; number < servers; ++number)); do
  socket=$work/server$number.sock
  LD_LIBRARY_PATH="$PWD/lib" "$server_binary" --backend="$device" --listen=127.0.0.1:0 --metrics-listen=127.0.0.1:0 \
    --unix-socket="$socket" "${limits[@]}" --default-profile="${PROFILE:-smollm2_table7}" --log-level=warning \
    >"$out/dynsplitd$number.log" 2>&1 &
  running+=($!)
  targets+=${targets:+,}unix:$socket
  for _ in $(seq 200); do
    [ -S "$socket" ] && break
    kill -0 "${running[-1]}" 2>/dev/null || break
    sleep 0.1
  done
  [ -S "$socket" ] || { echo "eval.sh: dynsplitd does not listen:"; tail -n 5 "$out/dynsplitd$number.log"; exit 1; }
done

evaluation=$([ -n "$cache" ] && echo "$data/tests/eval" || echo tests/eval)
export LD_LIBRARY_PATH="$work/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
"$python" "$evaluation/evaluate.py" --target "$targets" "${options[@]}" "$@"
status=$?
if [ $status -eq 0 ] || [ $status -eq 3 ]; then
  "$python" "$evaluation/report.py" "$out" || status=1
else
  tail -n 5 "$out"/dynsplitd*.log
fi
if [ "$out" != "$packed" ]; then
  (cd "$out" && find cases weights_*.pb run.json -type f -print0 2>/dev/null |
    tar -czf "$packed/cases.tar.gz" --null -T -) || status=1
  tar -czf "$packed/results.tar.gz" -C "$out" --exclude=./cases . || status=1
  cp "$out/report.md" "$out/summary.csv" "$packed/" 2>/dev/null
fi
exit $status

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Accuracy through the running service. Builds nothing.
#
#   tests/eval.sh [SIZE [OPTION...]]     run, from the root of an unpacked bundle or of the sources
#   tests/eval.sh pack DIR               on the build machine: what the bundle lacks, into DIR
#
# Starts a dynsplitd of its own and runs tests/eval/evaluate.py with the size (small) and options, then
# report.py. Results go to ${OUT:-tests/eval/results}; a folder of an earlier run there is carried on:
# RESUME=folder copies that run's cases first. DEVICE=cuda|cpu (cuda where bin/dynsplitd is).
# DYNSPLITD, PYTHON, DATA (root of what pack wrote) and WEIGHTS as in tests/decode.sh, whose pack this
# one extends by the texts and kvpress. Python: as for tests/decode.sh, and tokenizers; for kvpress also
# transformers.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}

if [ "${1:-}" = pack ]; then
  set -e
  target=${2:?usage: tests/eval.sh pack DIR}
  tests/decode.sh pack "$target"
  cp -r tests/eval/accuracy "$target/tests/eval/"
  cp tests/eval.sh "$target/tests/"
  PYTHONPATH=client/python:tests/eval "$python" - "$target/data" <<'PYTHON'
import shutil, sys
from pathlib import Path
from accuracy import corpus
from dynsplit.capture import sources
for kind in corpus.KINDS:
    for split in corpus.SPLITS:
        corpus.load(kind, split, sources.cache_dir())
        name = f"eval_{kind}_{split}.txt"
        shutil.copy(sources.cache_dir() / name, Path(sys.argv[1]) / name)
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
[ -n "${RESUME:-}" ] && cp -rn "$RESUME"/. "$out"/
work=$(mktemp -d)
server=
trap '[ -n "$server" ] && kill "$server" 2>/dev/null && wait "$server" 2>/dev/null; rm -rf "$work"' EXIT

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

limits=(--regions=shm)
[ "$device" = cuda ] && limits=(--regions=all --device-memory=24GiB --pinned-memory=16GiB)
LD_LIBRARY_PATH="$PWD/lib" "$server_binary" --backend="$device" --listen=127.0.0.1:0 \
  --metrics-listen=127.0.0.1:0 --unix-socket="$work/server.sock" "${limits[@]}" \
  --default-profile="${PROFILE:-smollm2}" >"$out/dynsplitd.log" 2>&1 &
server=$!
for _ in $(seq 200); do
  [ -S "$work/server.sock" ] && break
  kill -0 "$server" 2>/dev/null || break
  sleep 0.1
done
[ -S "$work/server.sock" ] || { echo "eval.sh: dynsplitd does not listen:"; tail -n 5 "$out/dynsplitd.log"; exit 1; }

evaluation=$([ -n "$cache" ] && echo "$data/tests/eval" || echo tests/eval)
LD_LIBRARY_PATH="$work/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" \
  "$python" "$evaluation/evaluate.py" --target "unix:$work/server.sock" "${options[@]}" "$@" || exit
"$python" "$evaluation/report.py" "$out"

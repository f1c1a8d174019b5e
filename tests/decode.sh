#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Decoding with the service in the loop, on a machine with an NVIDIA GPU. Builds nothing.
#
#   tests/decode.sh                      run, from the root of an unpacked bundle
#   tests/decode.sh pack DIR             on the build machine: what the bundle lacks, into DIR
#
# Runs, of MODES="check kernels step naive long", each in a process of its own, against a dynsplitd of
# its own (tests/eval/decode_loop.py says what a mode does). Logs, JSON and tables go to ${OUT:-.};
# the tables come last, at most 6 KB. Exits non-zero if anything failed.
#
# Expects, from the root:
#   bin/dynsplitd  lib/*.so*             as in the bundle (lib/libisal.so.2 also computes CRC32C here)
#   lib/libdynsplit_engine.so            the engine library; or ENGINE=path
#   tests/mps.sh                         MPS=0 leaves CUDA's multi-process service out
#   bin/bench_decode                     optional: run by "kernels"; BENCH=0 leaves it out
# and from pack, in the root or in ${DATA:-.}:
#   python/dynsplit  python/gguf         the client with its generated wire code; gguf 0.19.0
#   tests/eval/*.py                      the evaluation
#   data/*_ids.npy                       token ids of the texts
#   data/weights.aa  data/weights.ab     SmolLM2-135M-Instruct, GGUF Q4_1, in two halves (49 MB each);
#   data/weights.sha256                  of the whole. Only "check" needs them
# weights.a? may also lie in WEIGHTS=folder; they are joined once, into data/. Options of a mode come
# from CHECK_OPTIONS, KERNELS_OPTIONS, STEP_OPTIONS, NAIVE_OPTIONS, LONG_OPTIONS.
# Python: numpy, torch, grpcio, protobuf; for "check" also PyYAML (gguf imports it).
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}

pack() {
  local target=$1 part site model
  set -e
  "$python" client/python/generate_stubs.py
  mkdir -p "$target/python" "$target/tests/eval" "$target/data"
  cp -r client/python/dynsplit "$target/python/"
  cp tests/eval/*.py "$target/tests/eval/"
  cp tests/decode.sh "$target/tests/"
  site=$(mktemp -d)
  "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$site" gguf==0.19.0
  cp -r "$site/gguf" "$target/python/"
  rm -rf "$site"
  find "$target" -name __pycache__ -prune -exec rm -rf {} +
  PYTHONPATH=client/python "$python" - "$target/data" <<'PYTHON'
import shutil, sys
from dynsplit.capture import sources
shutil.copy(sources.model_file(sources.cache_dir()), f"{sys.argv[1]}/weights")
PYTHON
  PYTHONPATH=client/python "$python" tests/eval/texts.py "$target/data"
  model=$target/data/weights
  (cd "$target/data" && sha256sum weights >weights.sha256)
  split -n 2 "$model" "$model."
  rm "$model"
  for part in "$target"/*; do du -sh "$part"; done
}
if [ "${1:-}" = pack ]; then
  pack "${2:?usage: tests/decode.sh pack DIR}"
  exit
fi

data=${DATA:-.}
out=${OUT:-.}
modes=${MODES:-check kernels step naive long}
engine=${ENGINE:-$PWD/lib/libdynsplit_engine.so}
mkdir -p "$out"
work=$(mktemp -d)
server=
stop() {
  [ -n "$server" ] && kill "$server" 2>/dev/null && wait "$server" 2>/dev/null
  server=
}
# shellcheck source=tests/mps.sh
. tests/mps.sh
trap 'stop; mps_stop; rm -rf "$work"' EXIT
mps_start "$work"

# Python sees only libisal of the bundle's libraries: the others would shadow its own.
mkdir "$work/lib"
for library in "$PWD"/lib/libisal.so.2*; do ln -s "$library" "$work/lib/libisal.so.2"; done
export PYTHONPATH="$data/python${PYTHONPATH:+:$PYTHONPATH}"

cache=$data/data
join_weights() {
  local model
  model=$cache/$("$python" -c 'from dynsplit.capture import sources as s
print(f"{s.MODEL_ARCHIVE.sha256[:12]}-{s.MODEL_MEMBER.rpartition(chr(47))[2]}")') || return 1
  [ -f "$model" ] && return 0
  cat "${WEIGHTS:-$cache}"/weights.a[ab] >"$work/weights" || return 1
  (cd "$work" && sha256sum --quiet -c -) <"$cache/weights.sha256" || return 1
  mv "$work/weights" "$model"
}

start() {  # start MODE
  LD_LIBRARY_PATH="$PWD/lib" bin/dynsplitd --backend=cuda --listen=127.0.0.1:0 --metrics-listen=127.0.0.1:0 \
    --unix-socket="$work/server.sock" --regions=cuda-ipc \
    --device-memory="${DEVICE_MEMORY:-72GiB}" --pinned-memory="${PINNED_MEMORY:-96GiB}" \
    --max-request-bytes=160GiB --max-in-flight-bytes=200GiB >"$out/dynsplitd_$1.log" 2>&1 &
  server=$!
  for _ in $(seq 200); do
    [ -S "$work/server.sock" ] && return 0
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
  done
  echo "decode.sh: dynsplitd does not listen:" && tail -n 5 "$out/dynsplitd_$1.log"
  return 1
}

failed=0
run() {  # run MODE LIMIT_S [OPTION...]
  local mode=$1 limit=$2 begin=$SECONDS rc=1 variable=${1^^}_OPTIONS options
  shift 2
  read -ra options <<<"${!variable:-}"
  case " $modes " in *" $mode "*) ;; *) return ;; esac
  rm -f "$work/server.sock"
  if start "$mode"; then
    LD_LIBRARY_PATH="$work/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" timeout -k 5 "$limit" \
      "$python" "$data/tests/eval/decode_loop.py" --target "unix:$work/server.sock" \
      --engine "$engine" --cache "$cache" --out "$out/decode_$mode.json" "--$mode" "$@" "${options[@]}" \
      >"$out/decode_$mode.table" 2>"$out/decode_$mode.log"
    rc=$?
  fi
  stop
  if [ $rc -ne 0 ]; then
    failed=1
    {
      echo "$mode: failed, exit $rc after $((SECONDS - begin)) s"
      grep -v '^ *$' "$out/decode_$mode.log" | tail -n 4 | cut -c 1-300
      tail -n 2 "$out/dynsplitd_$mode.log" | cut -c 1-300
    } >>"$out/decode_$mode.table" 2>/dev/null
  fi
}

bench=()
[ "${BENCH:-1}" = 1 ] && [ -x bin/bench_decode ] && bench=(--bench bin/bench_decode)
case " $modes " in
  *" check "*)
    if ! join_weights; then
      echo "decode.sh: no weights, or damaged ones: check is left out" >&2
      failed=1 modes=${modes/check/}
    fi
    ;;
esac
run check 150
run kernels 90 "${bench[@]}"
run step 240
run naive 60
run long 120

echo "engine and service share the GPU $( ((mps_running)) && echo 'through MPS' || echo 'in time slices')"
for mode in $modes; do
  [ -f "$out/decode_$mode.table" ] && cat "$out/decode_$mode.table"
done | head -c 6000
exit $failed

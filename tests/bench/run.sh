#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the benchmarks that BIN_DIR has and this host can run; builds nothing. `./run bench` calls it on a build
# tree, tests/gpu.sh on an unpacked bundle.
#
#   usage: tests/bench/run.sh BIN_DIR OUT_DIR
#
#   OUT_DIR/summary.json      a list of {name, value, unit, ceiling, share, target, met, peer}
#   OUT_DIR/environment.json  the host, its GPU, date and revision
#   OUT_DIR/peers.json        what peers.py timed, which the benchmarks fill their rows' peer from
#   OUT_DIR/NAME.log          what each printed;  OUT_DIR/scaling.png  where Python has matplotlib
#
# BENCHES="cpu scaling" runs a part. PEER_WHEELS names a folder that pack_peers.sh filled; PYTHON an interpreter,
# with torch where peers are to be timed. A target that is missed is a row, not a failure: exits non-zero
# only where a benchmark did not run to its end.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=${1:?usage: tests/bench/run.sh BIN_DIR OUT_DIR} out=${2:?usage: tests/bench/run.sh BIN_DIR OUT_DIR}
python=${PYTHON:-python3}
benches=${BENCHES:-peers cpu scaling transport regions_shm regions_ipc bytes layer selection decode select}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export DYNSPLIT_BENCH_ROWS=$out/rows.jsonl
: >"$DYNSPLIT_BENCH_ROWS"
has_gpu=0
if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then has_gpu=1; fi

first_line() { head -n 1 | tr -cd '[:alnum:] @().,:_+-' | xargs; }
gpu() { { ((has_gpu)) && nvidia-smi --query-gpu="$1" --format=csv,noheader; } 2>/dev/null | first_line; }
environment() {
  local revision
  revision=$(git -C "$here" describe --always --dirty 2>/dev/null || cat "$here/../../REVISION" 2>/dev/null || echo unknown)
  cat <<JSON
{
 "date": "$(date -u +%FT%TZ)",
 "revision": "$revision",
 "processor": "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | first_line)",
 "cores": $(nproc),
 "kernel": "$(uname -sr)",
 "memory_gib": $(awk '/^MemTotal/ {printf "%.1f", $2 / 1048576}' /proc/meminfo),
 "load": $(cut -d ' ' -f 1 /proc/loadavg),
 "tcp_congestion_control": "$(cat /proc/sys/net/ipv4/tcp_congestion_control 2>/dev/null)",
 "gpu": "$(gpu name)",
 "driver": "$(gpu driver_version)",
 "gpu_clocks": "$(gpu clocks.sm,clocks.mem)",
 "gpu_max_clocks": "$(gpu clocks.max.sm,clocks.max.mem)"
}
JSON
}
program() { find "$bin" -type f -executable -name "$1" | head -n 1; }
script() { if [[ -x $here/$1 ]]; then echo "$here/$1"; fi; }

names=() results=() seconds=()
failed=0
note() {
  names+=("$1") seconds+=("$2") results+=("$3")
}
wanted() { case " $benches " in *" $1 "*) return 0 ;; *) return 1 ;; esac }
# step NAME LIMIT_S COMMAND...: an empty word among them is a program that is not there.
step() {
  local name=$1 limit=$2 start=$SECONDS word
  shift 2
  wanted "$name" || return 0
  for word in "$@"; do
    [[ -n $word ]] || { note "$name" 0 'not built'; return 0; }
  done
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  if ((rc == 0)); then note "$name" $((SECONDS - start)) ok
  else note "$name" $((SECONDS - start)) "failed, exit $rc"; failed=1; fi
}
gpu_step() {
  if ((has_gpu)); then step "$@"; elif wanted "$1"; then note "$1" 0 'needs a GPU'; fi
}

environment >"$out/environment.json"
step peers 280 "$python" "$here/peers.py" --out "$out/peers.json" ${PEER_WHEELS:+--wheels "$PEER_WHEELS"}
if [[ -s $out/peers.json ]]; then export DYNSPLIT_BENCH_PEERS=$out/peers.json; fi
step cpu 200 "$(program bench_cpu)" --benchmark_min_time=0.5
step scaling 280 "$(program bench_scaling)" 0.5
DYNSPLITD=$(program dynsplitd) step transport 280 "$(program bench_transport)"
if ((has_gpu)); then backend=cuda gib=8; else backend=cpu gib=2; fi
step regions_shm 280 "$(script with_server.sh)" "$backend" "$(program dynsplitd)" "$(program bench_regions)" \
  --kind shm --gib "$gib"
gpu_step regions_ipc 280 "$(script with_server.sh)" cuda "$(program dynsplitd)" "$(program bench_regions)" \
  --kind cuda-ipc --tokens 131072
gpu_step bytes 200 "$(program bench_bytes)"
gpu_step layer 200 "$(program bench_layer)"
gpu_step selection 200 "$(program bench_selection)"
gpu_step decode 200 "$(program bench_decode)"
gpu_step select 280 "$(script with_server.sh)" cuda "$(program dynsplitd)" "$(program bench_select)" \
  --ipc --tokens 131072 --layers 32

{
  echo '['
  sed '$!s/$/,/' "$DYNSPLIT_BENCH_ROWS"
  echo ']'
} >"$out/summary.json"
"$python" "$here/table.py" "$out/summary.json" || failed=1
if wanted scaling && ! "$python" "$here/plot_scaling.py" "$out/summary.json" "$out/scaling.png"; then
  note plot 0 'not drawn'
fi
printf '\n%-12s %8s  %s\n' benchmark seconds result
for i in "${!names[@]}"; do printf '%-12s %8s  %s\n' "${names[$i]}" "${seconds[$i]}" "${results[$i]}"; done
for i in "${!names[@]}"; do
  case ${results[$i]} in failed*) printf '== %s\n' "${names[$i]}"; tail -n 5 "$out/${names[$i]}.log" ;; esac
done
echo "$out/summary.json: $(wc -l <"$DYNSPLIT_BENCH_ROWS") rows"
exit $failed

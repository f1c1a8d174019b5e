#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# select.sh DYNSPLITD BENCH_SELECT [FLAG...]: bench_select with these flags against a CUDA server of its own,
# which shares device memory with its clients, on a unix socket.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=tests/mps.sh
. "$here/../mps.sh"
server=$(realpath "$1") bench=$(realpath "$2")
shift 2
work=$(mktemp -d)
pid=
trap '[[ -z $pid ]] || kill "$pid" 2>/dev/null || true; wait 2>/dev/null || true; mps_stop; rm -rf "$work"' EXIT
mps_start "$work"
echo "client and service share the GPU $( ((mps_running)) && echo 'through MPS' || echo 'in time slices')"

"$server" --backend=cuda --regions=cuda-ipc --listen "" --unix-socket "$work/server.sock" --metrics-listen "" \
  2>"$work/server.log" &
pid=$!
for _ in $(seq 300); do
  [[ -S $work/server.sock ]] && break
  kill -0 "$pid" 2>/dev/null || break
  sleep 0.1
done
if ! [[ -S $work/server.sock ]]; then
  tail -n 5 "$work/server.log" >&2
  echo "the server did not start" >&2
  exit 1
fi
"$bench" --target "unix:$work/server.sock" "$@" || {
  tail -n 5 "$work/server.log" >&2
  exit 1
}

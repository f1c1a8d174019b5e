#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# with_server.sh BACKEND DYNSPLITD BENCH [FLAG...]: a benchmark with these flags against a server of its own on a
# unix socket, which shares memory with its clients. BACKEND is cpu or cuda.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=tests/mps.sh
. "$here/../mps.sh"
backend=$1 server=$(realpath "$2") bench=$(realpath "$3")
shift 3
work=$(mktemp -d)
pid=
trap '[[ -z $pid ]] || kill "$pid" 2>/dev/null || true; wait 2>/dev/null || true; mps_stop; rm -rf "$work"' EXIT
regions=shm
if [[ $backend == cuda ]]; then
  regions=all
  mps_start "$work"
  echo "client and service share the GPU $( ((mps_running)) && echo 'through MPS' || echo 'in time slices')"
fi

"$server" --backend="$backend" --regions="$regions" --listen "" --unix-socket "$work/server.sock" \
  --metrics-listen "" 2>"$work/server.log" &
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

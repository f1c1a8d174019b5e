#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# select.sh DYNSPLITD BENCH [FLAG...]: a benchmark that is a client (bench_select, bench_regions), with these flags,
# against a server of its own on a unix socket. SERVER_FLAGS (--backend=cuda --regions=cuda-ipc) are the server's.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=tests/mps.sh
. "$here/../mps.sh"
server=$(realpath "$1") bench=$(realpath "$2")
shift 2
work=$(mktemp -d)
pid=
trap '[[ -z $pid ]] || kill "$pid" 2>/dev/null || true; wait 2>/dev/null || true; mps_stop; rm -rf "$work"' EXIT
case ${SERVER_FLAGS:-cuda} in *cuda*) mps_start "$work" ;; esac
echo "client and service share the device $( ((mps_running)) && echo 'through MPS' || echo 'in time slices')"

read -ra server_flags <<<"${SERVER_FLAGS:---backend=cuda --regions=cuda-ipc}"
"$server" "${server_flags[@]}" --listen "" --unix-socket "$work/server.sock" --metrics-listen "" \
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

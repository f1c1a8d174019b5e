#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# demo.sh BUILD_DIR: starts the real server on a unix socket, sends it the real sample (K, V, queries and
# token ids of SmolLM2-135M-Instruct over prose, code and dialogue) through the real client, shows the
# result; then keeps the prose as a session and chooses 10 % of its tokens for each of the last queries;
# stops the server. Leaves build/demo/summary.json, session.json, containers and plots.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=$1
out=build/demo
socket=$PWD/$out/dynsplitd.sock
rm -rf "$out"
mkdir -p "$out"

"$build/server/dynsplitd" --listen "" --unix-socket "$socket" --metrics-listen "" >"$out/server.log" 2>&1 &
server=$!
trap 'kill -TERM $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT
for _ in $(seq 100); do
  "$build/client/cli/dynsplit" serve-check --target "unix:$socket" >/dev/null 2>&1 && break
  kill -0 $server 2>/dev/null || { tail -n 5 "$out/server.log" >&2; echo "demo: the server did not start" >&2; exit 1; }
  sleep 0.1
done

compress() {  # compress KIND: the real client; keeps container, plots and the summary's entry
  "$build/client/cli/dynsplit" compress "tests/data/sample/$1.safetensors" --target "unix:$socket" --quiet \
    --preset dynsplit --profile smollm2_table7 --output "$out/$1.dskv" --plots "$out/$1" --summary "$out/summary.json"
}
compress prose >/dev/null
compress code >/dev/null
compress dialogue

session() {  # session FLAG...: 10 % of the prose, a step for each of the last queries
  "$build/client/cli/dynsplit" session tests/data/sample/prose.safetensors --target "unix:$socket" \
    --profile smollm2_table7 --ratio 0.1 --steps 32 "$@"
}
echo
echo "demo: the same prose kept in the server, nothing dropped; each step reads 10 % of it"
echo
session
session --json >"$out/session.json"
echo
echo "demo: figures in $out/summary.json and $out/session.json, containers in $out/*.dskv (dynsplit inspect FILE),"
echo "demo: text with its blocks and what was kept in $out/{prose,code,dialogue}/text.png"

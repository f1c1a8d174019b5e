#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Collects kvpress, and what it needs beside a host's torch and pandas, as wheels for hosts without a
# network; tests/bench/peers.py takes the folder with --wheels. About 16 MB, fetched now, never committed.
#   usage: tests/bench/pack_peers.sh DIR        PYTHON_VERSION=3.12 is the Python of that host
set -euo pipefail
target=${1:?usage: tests/bench/pack_peers.sh DIR}
# kvpress imports datasets, fire and cachetools as soon as it is imported, and is pinned below transformers
# 5.3, which in turn is pinned to these tokenizers and this hub client.
wheels=(
  kvpress==0.5.5 transformers==5.2.0 tokenizers==0.22.2 huggingface_hub==1.5.0 datasets==4.5.0 dill==0.4.0
  multiprocess==0.70.18 cachetools==5.5.2 termcolor==3.3.0 six==1.17.0
)
sources=(fire==0.7.1)  # pure Python, published without a wheel; kvpress asks for <0.7, which lacks Python 3.13
pip=(python3 -m pip -q --disable-pip-version-check)
mkdir -p "$target"
"${pip[@]}" wheel --no-deps --wheel-dir "$target" "${sources[@]}"
"${pip[@]}" download --no-deps --dest "$target" --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any "${wheels[@]}"
du -sh "$target"

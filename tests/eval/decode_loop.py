#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Decoding with the service in the loop: is it right, is it faster, what does it weigh.

    decode_loop.py --target unix:/path --check --kernels --step --naive --long [--out results.json]

    --check    SmolLM2-135M over real texts: reading all tokens through a session changes no token
    --kernels  one layer of Llama-3.1-8B's shape: full-KV attention of torch, ours beside it
    --step     a whole step of Llama-3.1-8B's shape, full KV against resident and offloaded sessions
    --naive    selection over unequal blocks: V2F against serial handling of each head
    --long     a session of a million tokens at rest as fp8 in host memory

The service must run already. Without a GPU: --device cpu; all but --kernels, with --tiny shapes.
Random weights and random K and V stand in for Llama-3.1-8B: --step measures speed and memory, not
quality; token ids are of real texts, so that blocks end where sentences do.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from dynsplit.sessions import SessionClient

from runtime import Context, default_cache

# Mode -> module with run(context) -> dict and table(result) -> lines.
MODES = {
    "check": "check",
    "kernels": "kernels",
    "step": "whole_step",
    "naive": "selection",
    "long": "long_context",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="address of dynsplitd")
    for mode in MODES:
        parser.add_argument(f"--{mode}", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--engine", type=Path, help="libdynsplit_engine.so (with --device cuda)")
    parser.add_argument("--bench", type=Path, help="bench_decode, run by --kernels where given")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="model and texts")
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--texts", default="prose,code,dialogue")
    parser.add_argument("--check-tokens", type=int, default=512, help="prompt of --check")
    parser.add_argument("--check-steps", type=int, default=64, help="tokens decoded by --check")
    parser.add_argument("--tokens", type=int, default=32768, help="length in --step and --naive")
    parser.add_argument("--batches", default="1,2,4,8,12,14", help="tried by --step while they fit")
    parser.add_argument("--ratio", type=float, default=0.1, help="share of the tokens that is read")
    parser.add_argument("--window", type=int, default=128, help="steps between appends")
    parser.add_argument("--drift", type=float, default=0.3, help="see whole_step.py")
    parser.add_argument(
        "--host-gib", type=float, default=64, help="pinned memory --step may ask for"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model in --step and --naive")
    parser.add_argument("--long-tokens", type=int, default=1_000_000)
    return parser


def main() -> int:
    """Runs the chosen modes; 0 if none failed."""
    arguments = _parser().parse_args()
    engine = None
    if arguments.device == "cuda":
        from dynsplit.engine import Engine

        engine = Engine(arguments.engine)
    results: dict[str, Any] = {"torch": torch.__version__, "device": arguments.device}
    if arguments.device == "cuda":
        results["device"] = torch.cuda.get_device_name()
    failed = False
    client = SessionClient(arguments.target, timeout_seconds=120, stream_timeout_seconds=300)
    with client:
        context = Context(arguments, client, engine)
        for mode, module in MODES.items():
            if not getattr(arguments, mode):
                continue
            begin = time.perf_counter()
            implementation = importlib.import_module(module)
            try:
                result = implementation.run(context)
                lines = implementation.table(result)
            except Exception as error:  # one mode's fault must not cost the others
                traceback.print_exc()
                result, lines = {"error": f"{type(error).__name__}: {error}", "passed": False}, []
                lines = [f"{mode}: {result['error']}"]
            result["seconds"] = time.perf_counter() - begin
            failed |= not result.get("passed", True)
            results[mode] = result
            print("\n".join([*lines, f"({mode}: {result['seconds']:.1f} s)", ""]), flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(results, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

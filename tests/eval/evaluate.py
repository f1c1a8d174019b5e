#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Accuracy through the running service; `./run eval [SIZE]` starts one and runs this.

    evaluate.py --target unix:/path --size small --out FOLDER [--time-limit 1200]

Each prompt is computed once. For every method and share the service is asked what is read of it:
Compress, whose pages come back (a fixed fourth of them is compared with the prompt's rows, see
--check-one-in; of all others the kept tokens are taken), or a session's Select in every layer and
step; the model then goes on over those tokens. Cases are measured one by one into FOLDER/cases and
not measured again; a run that was cut short, by --time-limit or otherwise, goes on where it was.
FOLDER/*.csv tell what has been measured so far (accuracy/summary.py); report.py makes tables and
plots of them.

A method that fails does not end the run: failures are listed at the end and in
FOLDER/failures.csv, and the exit status is then 3.

Equal sizes, splits and seeds are equal cases. Tune on --split tuning, report on held-out. --grid
adds policies of a JSON file to the methods:

    [{"name": "cut20", "mode": "evict", "choices": {"preset": "dynsplit", "block_size": 20}}]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dynsplit.capture import sources
from dynsplit.capture.tokenizer import GgufTokenizer
from dynsplit.client import Client
from dynsplit.v1 import compression_pb2
from gguf import GGUFReader

from accuracy import cases, corpus, methods, metrics, presses, summary
from accuracy.measure import Settings
from accuracy.workers import Setup, Workers

# Cases of every kind and task, by prompt length. "full": 50 of each, 200 over the four kinds.
SIZES: dict[str, dict[int, int]] = {
    "tiny": {512: 1},
    "small": {2048: 2},
    "medium": {2048: 10, 4096: 5},
    "full": {2048: 25, 4096: 15, 8192: 10},
    "long": {8192: 25},
}
FAILED = 3  # exit status
_CALIBRATION_TOKENS = 2048
_SEED = "dynsplit-eval-2"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="address of dynsplitd, or several: a,b")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--split", choices=corpus.SPLITS, default="held-out")
    parser.add_argument("--shares", default="0.05,0.1,0.2,0.5", help="above 1: tokens")
    parser.add_argument("--kinds", default=",".join(corpus.KINDS))
    parser.add_argument("--tasks", default=",".join((*cases.ACCURACY_TASKS, "text")))
    parser.add_argument("--methods", default=".", help="regular expression of method names")
    parser.add_argument("--grid", type=Path, metavar="JSON", help="further methods, see above")
    parser.add_argument("--presses", default=",".join(methods.PRESSES), help="of kvpress")
    parser.add_argument("--max-cases", type=int, default=0, help="0 = all")
    parser.add_argument(
        "--time-limit", type=float, default=0, help="seconds of measuring; 0 = none"
    )
    parser.add_argument("--again", action="store_true", help="measure cases with failures again")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--engine", type=Path, help="libdynsplit_engine.so: share device memory")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cache", type=Path, default=sources.cache_dir(), help="model and texts")
    parser.add_argument("--workers", type=int, default=1, help="processes that measure cases")
    parser.add_argument("--calls", type=int, default=2, help="compressions in flight, each worker")
    parser.add_argument("--server-memory", type=float, default=24, help="GiB of the GPU, its own")
    parser.add_argument("--index-positions", type=int, default=8, help="of text and line answers")
    parser.add_argument("--check-one-in", type=int, default=4, help="compressions: rows compared")
    return parser


def _setup(arguments: argparse.Namespace, max_tokens: int) -> Setup:
    if arguments.device == "cuda" and arguments.engine is None:
        raise SystemExit("evaluate: --device cuda needs --engine")
    settings = Settings(
        shares=tuple(float(share) for share in arguments.shares.split(",")),
        index_positions=arguments.index_positions,
        check_one_in=arguments.check_one_in,
    )
    return Setup(
        targets=tuple(arguments.target.split(",")),
        model_file=sources.model_file(arguments.cache),
        device=arguments.device,
        dtype=arguments.dtype,
        engine=arguments.engine,
        max_tokens=max_tokens,
        num_workers=arguments.workers,
        server_bytes=int(arguments.server_memory * 2**30),
        calls_at_once=arguments.calls,
        settings=settings,
    )


def _texts(kind: str, split: str, cache: Path, tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode(text) for text in corpus.load(kind, split, cache)]


def _cases(arguments: argparse.Namespace, tokenizer: Any) -> list[cases.Case]:
    """All cases, the first of every kind and task first, so that a part of them is a fair one."""
    found = []
    for kind in arguments.kinds.split(","):
        texts = _texts(kind, arguments.split, arguments.cache, tokenizer)
        for length, count in SIZES[arguments.size].items():
            seed = f"{_SEED}/{arguments.split}"
            built = cases.build(kind, texts, length, count, seed, tokenizer)
            wanted = [case for case in built if case.task in arguments.tasks.split(",")]
            found += [(int(case.name.rpartition("-")[2]), case) for case in wanted]
    order = hashlib.sha256
    found.sort(key=lambda entry: (entry[0], order(entry[1].name.encode()).digest()))
    chosen = [case for _, case in found]
    return chosen[: arguments.max_cases or None]


def _measured_profiles(
    arguments: argparse.Namespace, tokenizer: Any, workers: Workers, num_tokens: int
) -> dict[str, Any]:
    """Delimiter weights of every kind, measured by the service on the begin of its tuning text."""
    kinds = arguments.kinds.split(",")
    kept = {kind: arguments.out / f"weights_{kind}_{arguments.size}.pb" for kind in kinds}
    calls = {}
    for kind in kinds:
        if not kept[kind].exists():
            ids = _texts(kind, "tuning", arguments.cache, tokenizer)[0][:num_tokens]
            calls[kind] = workers.submit("calibrate", ids)
    for kind, call in calls.items():
        kept[kind].write_bytes(call.result())
    parse = compression_pb2.DelimiterProfile.FromString
    return {kind: parse(path.read_bytes()) for kind, path in kept.items()}


def _table(arguments: argparse.Namespace, client: Client) -> list[methods.Method]:
    names = tuple(filter(None, arguments.presses.split(",")))
    why = presses.available() if names else ""
    if why:
        print(f"evaluate: without kvpress: {why}", file=sys.stderr)
        names = ()
    table = methods.table(client, tuple(arguments.kinds.split(",")), names)
    if arguments.grid is not None:
        table += methods.grid(arguments.grid)
    chosen = [method for method in table if re.search(arguments.methods, method.name)]
    named = {(method.mode, method.name) for method in chosen}
    if len(named) < len(chosen) or not chosen:
        raise SystemExit("evaluate: no methods, or two of the same name and mode")
    return chosen


def _config(arguments: argparse.Namespace, table: list[methods.Method]) -> str:
    """Names what cases of one result must have in common."""
    parts = [arguments.shares, arguments.split, arguments.dtype, [repr(m) for m in table], _SEED]
    parts += [arguments.index_positions]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _report_failures(rows: list[dict[str, Any]]) -> bool:
    """Prints what failed, by method; whether anything did."""
    for row in rows:
        method = f"{row['method']} ({row['mode']})"
        print(f"FAILED {method}, {row['cases']} cases, shares {row['shares']}: {row['error']}")
    return bool(rows)


def _is_measured(path: Path, config: str, again: bool) -> bool:
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    return found.get("config") == config and not (again and found["failures"])


def _run(
    workers: Workers,
    chosen: list[cases.Case],
    table: list[methods.Method],
    config: str,
    arguments: argparse.Namespace,
    begin: float,
) -> None:
    """Measures what is missing."""
    folder = arguments.out / "cases"
    folder.mkdir(parents=True, exist_ok=True)
    again = arguments.again
    missing = [c for c in chosen if not _is_measured(folder / f"{c.name}.json", config, again)]
    print(f"{len(chosen) - len(missing)} of {len(chosen)} cases are there already", flush=True)
    left = arguments.time_limit and max(0.01, arguments.time_limit - time.monotonic() + begin)
    done = 0
    for case, result in workers.measured(missing, table, left):
        path = folder / f"{case.name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result | {"config": config}))
        os.replace(partial, path)
        done += 1
        parts = ", ".join(f"{name} {value:.2f}" for name, value in result["seconds"].items())
        failed = f", {len(result['failures'])} failures" if result["failures"] else ""
        passed = time.monotonic() - begin
        print(f"{passed:6.1f} s {done}/{len(missing)} {case.name}: {parts}{failed}", flush=True)
    if done < len(missing):
        print(f"evaluate: {len(missing) - done} cases left when time was up")


def main() -> int:
    """Command line; 0 also where time was up, FAILED where a method failed."""
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # shared memory outlives what is killed
    arguments = _parser().parse_args()
    tokenizer = GgufTokenizer(GGUFReader(sources.model_file(arguments.cache)))
    chosen = _cases(arguments, tokenizer)
    longest = max(len(case.prompt) for case in chosen)
    arguments.out.mkdir(parents=True, exist_ok=True)
    workers = Workers(_setup(arguments, longest))
    try:
        tokens = min(longest, _CALIBRATION_TOKENS)
        profiles = _measured_profiles(arguments, tokenizer, workers, tokens)
        for target in arguments.target.split(","):
            with Client(target) as client:
                methods.put_profiles(client, profiles)
                table = _table(arguments, client)
        config = _config(arguments, table)
        described = {
            "config": config,
            "methods": [dataclasses.asdict(method) for method in table],
            "cases": [case.name for case in chosen],
        }
        (arguments.out / summary.RUN).write_text(json.dumps(described, indent=1))
        _run(workers, chosen, table, config, arguments, begin)
    finally:
        workers.close()
    measured = summary.load(arguments.out)
    tables = summary.tables(measured)
    summary.write_all(arguments.out, tables)
    receipts = tables["receipts"]
    kl = [row["kl"] for row in receipts]
    for name, sign in (("mass", -1), ("error", 1)):
        value = metrics.rank_correlation([sign * row[name] for row in receipts], kl)
        print(f"rank correlation of the receipt's {name} with KL, {len(kl)} cells: {value:.3f}")
    print(f"{arguments.out}/summary.csv: {len(measured)} of {len(chosen)} cases")
    return FAILED if _report_failures(tables["failures"]) else 0


if __name__ == "__main__":
    sys.exit(main())

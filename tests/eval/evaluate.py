#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Accuracy through the running service; `./run eval [SIZE]` starts one and runs this.

    evaluate.py --target unix:/path --size small --out FOLDER [--time-limit 1200]

Each prompt is computed once. For every method and share the service is asked what is read of it
(Compress, or a session's Select in every layer and step); the model then goes on over those tokens.
Cases are measured one by one into FOLDER/cases and not measured again; a run that was cut short, by
--time-limit or otherwise, goes on where it was. FOLDER/*.csv tell what has been measured so far
(accuracy/summary.py); report.py makes tables and plots of them.

Equal sizes, splits and seeds are equal cases. Tune on --split tuning, report on held-out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from dynsplit.capture import sources
from dynsplit.capture.llama import LlamaModel
from dynsplit.capture.tokenizer import GgufTokenizer
from dynsplit.client import Client
from dynsplit.v1 import compression_pb2
from gguf import GGUFReader

from accuracy import cases, corpus, measure, methods, metrics, presses, summary
from accuracy.engine import prefill
from accuracy.service import Service
from buffers import DeviceBuffers, HostBuffers
from torch_llama import TorchLlama

# Cases of every kind and task, by prompt length. "full": 50 of each, 200 over the four kinds.
SIZES: dict[str, dict[int, int]] = {
    "tiny": {512: 1},
    "small": {2048: 2},
    "medium": {2048: 10, 4096: 5},
    "full": {2048: 25, 4096: 15, 8192: 10},
}
_CALIBRATION_TOKENS = 2048
_SEED = "dynsplit-eval-1"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="address of dynsplitd")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--split", choices=corpus.SPLITS, default="held-out")
    parser.add_argument("--shares", default="0.05,0.1,0.2,0.5")
    parser.add_argument("--kinds", default=",".join(corpus.KINDS))
    parser.add_argument("--methods", default=".", help="regular expression of method names")
    parser.add_argument("--presses", default=",".join(methods.PRESSES), help="of kvpress")
    parser.add_argument("--max-cases", type=int, default=0, help="0 = all")
    parser.add_argument("--time-limit", type=float, default=0, help="seconds; 0 = none")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--engine", type=Path, help="libdynsplit_engine.so: share device memory")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cache", type=Path, default=sources.cache_dir(), help="model and texts")
    return parser


def _cases(arguments: argparse.Namespace, tokenizer: Any) -> list[cases.Case]:
    """All cases, the first of every kind and task first, so that a part of them is a fair one."""
    found = []
    for kind in arguments.kinds.split(","):
        ids = tokenizer.encode(corpus.load(kind, arguments.split, arguments.cache))
        for length, count in SIZES[arguments.size].items():
            built = cases.build(
                kind, ids, length, count, f"{_SEED}/{arguments.split}", tokenizer
            )
            found += [(int(case.name.rpartition("-")[2]), case) for case in built]
    order = hashlib.sha256
    found.sort(key=lambda entry: (entry[0], order(entry[1].name.encode()).digest()))
    chosen = [case for _, case in found]
    return chosen[: arguments.max_cases or None]


def _measured_profiles(
    arguments: argparse.Namespace,
    model: TorchLlama,
    tokenizer: Any,
    service: Service,
    num_tokens: int,
) -> dict[str, Any]:
    """Delimiter weights of every kind, measured by the service on the begin of its tuning text."""
    found = {}
    for kind in arguments.kinds.split(","):
        kept = arguments.out / f"weights_{kind}_{arguments.size}.pb"
        if kept.exists():
            found[kind] = compression_pb2.DelimiterProfile.FromString(kept.read_bytes())
            continue
        ids = tokenizer.encode(corpus.load(kind, "tuning", arguments.cache))
        past = prefill(model, ids[:num_tokens])
        service.load(past)
        found[kind] = service.calibrate(past)
        kept.write_bytes(found[kind].SerializeToString())
    return found


def _table(arguments: argparse.Namespace, client: Client) -> list[methods.Method]:
    names = tuple(filter(None, arguments.presses.split(",")))
    why = presses.available() if names else ""
    if why:
        print(f"evaluate: without kvpress: {why}", file=sys.stderr)
        names = ()
    table = methods.table(client, tuple(arguments.kinds.split(",")), names)
    return [method for method in table if re.search(arguments.methods, method.name)]


def _config(arguments: argparse.Namespace, table: list[methods.Method]) -> str:
    """Names what cases of one result must have in common."""
    parts = [arguments.shares, arguments.split, arguments.dtype, [repr(m) for m in table], _SEED]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _write_results(folder: Path, measured: list[dict[str, Any]]) -> None:
    found = summary.cells(measured)
    receipts = summary.receipts(measured)
    summary.write(folder / "summary.csv", summary.SUMMARY, summary.summary(found))
    summary.write(folder / "comparisons.csv", summary.COMPARISONS, summary.comparisons(found))
    summary.write(folder / "receipts.csv", summary.RECEIPTS, receipts)
    kl = [row["kl"] for row in receipts]
    for name, sign in (("mass", -1), ("error", 1)):
        value = metrics.rank_correlation([sign * row[name] for row in receipts], kl)
        print(f"rank correlation of the receipt's {name} with KL, {len(kl)} cells: {value:.3f}")


def _run(bench: measure.Bench, chosen: list[cases.Case], config: str, arguments: Any) -> bool:
    """Measures what is missing; whether all is there now."""
    folder = arguments.out / "cases"
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    for number, case in enumerate(chosen):
        path = folder / f"{case.name}.json"
        if path.exists() and json.loads(path.read_text()).get("config") == config:
            continue
        spent = time.monotonic() - begin
        if arguments.time_limit and spent > arguments.time_limit:
            print(f"evaluate: {len(chosen) - number} cases left when time was up")
            return False
        result = measure.measure(bench, case) | {"config": config}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        os.replace(partial, path)
        seconds = time.monotonic() - begin - spent
        print(f"{number + 1}/{len(chosen)} {case.name}: {seconds:.1f} s", flush=True)
    return True


def main() -> int:
    """Command line; 0 also where time was up."""
    arguments = _parser().parse_args()
    reader = GGUFReader(sources.model_file(arguments.cache))
    tokenizer = GgufTokenizer(reader)
    chosen = _cases(arguments, tokenizer)
    longest = max(len(case.prompt) for case in chosen)
    arguments.out.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, arguments.dtype)
    # 512 positions behind the prompt for answers and expected attention, 2.3 K for kvzip's repeats.
    room = longest + 2560
    model = TorchLlama.from_numpy(LlamaModel(reader), arguments.device, dtype, room)
    engine = None
    if arguments.engine is not None:
        from dynsplit.engine import Engine

        engine = Engine(arguments.engine)
    with Client(arguments.target, stream_timeout_seconds=300, engine=engine) as client:
        buffers = HostBuffers(client) if engine is None else DeviceBuffers(client, engine)
        service = Service(client, buffers, model.shape, dtype, longest)
        try:
            profiles = _measured_profiles(
                arguments, model, tokenizer, service, min(longest, _CALIBRATION_TOKENS)
            )
            methods.put_profiles(client, profiles)
            table = _table(arguments, client)
            shares = [float(share) for share in arguments.shares.split(",")]
            bench = measure.Bench(model, tokenizer, service, table, shares)
            config = _config(arguments, table)
            _run(bench, chosen, config, arguments)
        finally:
            service.close()
            buffers.close()
    names = {case.name for case in chosen}
    measured = [c for c in summary.load(arguments.out / "cases", config) if c["case"] in names]
    _write_results(arguments.out, measured)
    print(f"{arguments.out}/summary.csv: {len(measured)} of {len(chosen)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())

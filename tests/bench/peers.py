#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times what else compresses a layer: kvpress' SnapKV and ChunkKV, and bare torch.

One layer of Llama-3.1-8B's shape, window of 64 queries, 80 % removed; on the CPU with --threads
threads, and on a GPU where torch finds one. The presses run unchanged: a stand-in module hands them
queries that are projected and rotated already, which spares them that work. kvpress is taken from
where Python finds it, or from the wheels that pack_peers.sh collected (--wheels).

Writes --out, a JSON list of {name, value, unit, ...}, from which benchmarks fill their rows' peer
(DYNSPLIT_BENCH_PEERS, tests/bench/report.h), and appends the same as rows to the file that
DYNSPLIT_BENCH_ROWS names:

    kvpress-snapkv/cuda/T=131072         ms; on the CPU that of the faster of fp32 and bf16
    kvpress-snapkv/cuda/T=131072/memory  MiB at the peak beyond the inputs, results included
    copy/cuda                            GB/s, read and written

Without torch it says so and succeeds; without kvpress, only bare torch is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

QUERY_HEADS = 32
KV_HEADS = 8
DIM = 128
WINDOW = 64
KERNEL = 5
REMOVED = 0.8
CHUNK_LENGTH = 20
SECONDS_PER_CASE = 1.5
MIN_REPEATS = 3
MAX_REPEATS = 30

Results = list[dict[str, Any]]
Compress = "Callable[[Layer], tuple[torch.Tensor, torch.Tensor]]"


class Layer:
    """Inputs of one layer as kvpress sees them: [1, heads, tokens, channels]."""

    def __init__(self, tokens: int, device: str, dtype: torch.dtype) -> None:
        """Random keys, values and window queries."""
        import torch
        from torch import nn

        generator = torch.Generator(device).manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

        self.keys = normal(1, KV_HEADS, tokens, DIM)
        self.values = normal(1, KV_HEADS, tokens, DIM)
        # Presses read the last WINDOW rows, and ask only that there be more.
        self.hidden = normal(1, WINDOW + 1, QUERY_HEADS * DIM)
        ones = torch.ones(1, WINDOW + 1, DIM, device=device, dtype=dtype)
        self.kwargs = {"position_embeddings": (ones, torch.zeros_like(ones))}
        self.module = nn.Module()
        self.module.q_proj = nn.Identity()
        self.module.head_dim = DIM
        self.module.layer_idx = 0
        self.module.config = SimpleNamespace(
            num_attention_heads=QUERY_HEADS,
            num_key_value_heads=KV_HEADS,
            hidden_size=QUERY_HEADS * DIM,
            head_dim=DIM,
        )

    @property
    def floor_bytes(self) -> float:
        """Least bytes to move: K read once, the kept part of K and V read and written."""
        one = self.keys.numel() * self.keys.element_size()
        return one * (1 + 4 * (1 - REMOVED))


def bare_torch(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """SnapKV in torch operations, with the query heads of a group folded so that K is not repeated."""
    import torch
    from torch.nn import functional

    keys, values = layer.keys[0], layer.values[0]
    tokens = keys.shape[1]
    group = QUERY_HEADS // KV_HEADS
    queries = layer.hidden[0, -WINDOW:].view(WINDOW, KV_HEADS, group, DIM).permute(1, 2, 0, 3)
    logits = (queries.reshape(KV_HEADS, group * WINDOW, DIM) @ keys.transpose(1, 2)) / DIM**0.5
    future = torch.ones(WINDOW, WINDOW, dtype=torch.bool, device=keys.device).triu(1)
    logits.view(KV_HEADS, group, WINDOW, tokens)[..., -WINDOW:].masked_fill_(future, float("-inf"))
    weights = logits.softmax(-1, dtype=torch.float32)[..., :-WINDOW].mean(1)
    scores = functional.avg_pool1d(weights, KERNEL, padding=KERNEL // 2, stride=1)
    scores = functional.pad(scores, (0, WINDOW), value=float("inf"))
    kept = scores.topk(int(tokens * (1 - REMOVED)), dim=-1).indices.unsqueeze(-1).expand(-1, -1, DIM)
    return keys.gather(1, kept), values.gather(1, kept)


def find_kvpress(wheels: Path | None) -> str | None:
    """Makes kvpress importable; why not, where it cannot be."""
    if wheels is not None:
        packages = sorted(wheels.glob("*.whl"))
        if not packages:
            return f"no wheels in {wheels}"
        # transformers finds its modules by listing folders, which a wheel on sys.path does not allow.
        site = tempfile.mkdtemp(prefix="peers-")
        for package in packages:
            with zipfile.ZipFile(package) as archive:
                archive.extractall(site)
        sys.path.insert(0, site)
    try:
        import kvpress  # noqa: F401
    except Exception as error:  # whatever an unfitting transformers raises
        return f"{type(error).__name__}: {error}"
    return None


def competitors(with_kvpress: bool) -> dict[str, Compress]:
    """What is timed, by name."""
    found: dict[str, Compress] = {"torch": bare_torch}
    if with_kvpress:
        from kvpress import ChunkKVPress, SnapKVPress

        def snapkv() -> Any:
            return SnapKVPress(compression_ratio=REMOVED, window_size=WINDOW, kernel_size=KERNEL)

        def runner(press: Any) -> Compress:
            return lambda layer: press.compress(
                layer.module, layer.hidden, layer.keys, layer.values, None, layer.kwargs
            )

        found["kvpress-snapkv"] = runner(snapkv())
        found["kvpress-chunkkv"] = runner(ChunkKVPress(press=snapkv(), chunk_length=CHUNK_LENGTH))
    return found


def repeated(once: Callable[[], float]) -> list[float]:
    """Results of `once`, the first left out, for about SECONDS_PER_CASE."""
    once()
    measured: list[float] = []
    end = time.perf_counter() + SECONDS_PER_CASE
    while len(measured) < MIN_REPEATS or (time.perf_counter() < end and len(measured) < MAX_REPEATS):
        measured.append(once())
    return measured


class Cpu:
    """Wall time; neighbours on the machine only ever add to it, so the fastest counts."""

    name = "cpu"

    def milliseconds(self, run: Callable[[], Any]) -> float:
        def once() -> float:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)

        return min(repeated(once))


class Cuda:
    """Device events; the median."""

    name = "cuda"

    def milliseconds(self, run: Callable[[], Any]) -> float:
        import torch

        def once() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

        return statistics.median(repeated(once))

    def extra_mebibytes(self, run: Callable[[], Any]) -> float:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_gbps(timer: Cpu | Cuda) -> float:
    """Rate of a large copy, bytes read and written."""
    import torch

    source = torch.ones(2**28, dtype=torch.uint8, device=timer.name)
    target = torch.empty_like(source)
    return 2 * source.numel() / 1e6 / timer.milliseconds(lambda: target.copy_(source))


def measure(timer: Cpu | Cuda, tokens: int, dtypes: Sequence[str], presses: dict[str, Compress],
            gbps: float) -> Results:
    """Every competitor on one length; of several element types the fastest."""
    import torch

    best: dict[str, dict[str, Any]] = {}
    memory: Results = []
    for dtype in dtypes:
        layer = Layer(tokens, timer.name, getattr(torch, dtype))
        floor = layer.floor_bytes / 1e6 / gbps
        for name, press in presses.items():
            full_name = f"{name}/{timer.name}/T={tokens}"
            took = timer.milliseconds(lambda press=press: press(layer))
            print(f"{full_name:<40} {dtype:<9} {took:10.3f} ms  copies alone {floor:8.3f} ms", flush=True)
            if full_name not in best or took < best[full_name]["value"]:
                best[full_name] = {"name": full_name, "value": took, "unit": "ms", "ceiling": floor,
                                   "share": floor / took, "dtype": dtype}
            if isinstance(timer, Cuda):
                memory.append({"name": f"{full_name}/memory", "unit": "MiB", "dtype": dtype,
                               "value": timer.extra_mebibytes(lambda press=press: press(layer))})
    return [*best.values(), *memory]


def measure_device(timer: Cpu | Cuda, lengths: Sequence[int], dtypes: Sequence[str],
                   presses: dict[str, Compress]) -> Results:
    """All lengths on one device; a length that does not fit is left out."""
    import torch

    gbps = copy_gbps(timer)
    results: Results = [{"name": f"copy/{timer.name}", "value": gbps, "unit": "GB/s"}]
    for tokens in lengths:
        try:
            results += measure(timer, tokens, dtypes, presses, gbps)
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            print(f"peers: T={tokens} on {timer.name} left out: {error}")
    return results


def append_rows(results: Results) -> None:
    """The results as rows of the summary."""
    file = os.environ.get("DYNSPLIT_BENCH_ROWS")
    if file is None:
        return
    with open(file, "a", encoding="utf-8") as rows:
        for result in results:
            row = {"name": f"peer/{result['name']}", "value": result["value"], "unit": result["unit"],
                   "ceiling": result.get("ceiling"), "share": result.get("share"),
                   "target": None, "met": None, "peer": None}
            rows.write(json.dumps(row) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Times kvpress and bare torch on one layer.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="what pack_peers.sh collected")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (2)")
    parser.add_argument("--cpu-tokens", type=int, nargs="*", default=[8192, 32768], metavar="T")
    parser.add_argument("--cuda-tokens", type=int, nargs="*", default=[8192, 32768, 131072], metavar="T")
    arguments = parser.parse_args(argv)
    arguments.out.write_text("[]\n", encoding="utf-8")
    try:
        import torch
    except ImportError as error:
        print(f"peers: none timed: {error}")
        return 0
    missing = find_kvpress(arguments.wheels)
    if missing is not None:
        print(f"peers: bare torch only, kvpress cannot be imported: {missing}")
    presses = competitors(with_kvpress=missing is None)
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads on the CPU")
    results: Results = []
    with torch.inference_mode():
        results += measure_device(Cpu(), arguments.cpu_tokens, ("float32", "bfloat16"), presses)
        if torch.cuda.is_available():
            print(torch.cuda.get_device_name())
            results += measure_device(Cuda(), arguments.cuda_tokens, ("bfloat16",), presses)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    append_rows(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""One layer's decode attention, Llama-3.1-8B's shape, bf16: full KV by torch, chosen rows by ours.

Full KV: the faster of torch's FlashAttention and cuDNN, the G heads of a group folded into queries
of one KV head, so that KV is read once; device time of a CUDA graph. Ours: the service's own device
time of Select (scores of blocks, choice of tokens) plus the device time of attention over the
chosen rows in place. The C++ benchmark measures the same chain without RPC; its output is kept
where the program is given.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from dynsplit.sessions import Step
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention import open_session, over_rows
from runtime import Context, device_seconds
from texts import long_ids
from torch_llama import LLAMA_8B

POINTS = ((131072, 1), (32768, 16))  # tokens, batch
SELECTS = 30
# name, tokens, sequences, milliseconds of a line of bench_decode
_BENCH_LINE = re.compile(r"(.{26}) +(\d+) x(\d+) +([0-9.]+) ms")
ONE_LAYER = dataclasses.replace(LLAMA_8B, num_layers=1)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def full_attention_seconds(q: Tensor, keys: Tensor, values: Tensor) -> dict[str, float]:
    """Device seconds of each of torch's kernels that takes the shape."""
    seconds = {}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend), torch.inference_mode():
                seconds[name] = device_seconds(lambda: over_rows(q, keys, values))
        except RuntimeError as error:
            print(f"kernels: {name} does not take the shape: {str(error).splitlines()[0]}")
    return seconds


def _random_kv(tokens: int, batch: int) -> Tensor:
    """[2, b, Hkv, T, D]."""
    size = (2, batch, LLAMA_8B.num_kv_heads, tokens, LLAMA_8B.head_dim)
    return torch.empty(size, dtype=torch.bfloat16, device="cuda").normal_()


def _full(q: Tensor, kv: Tensor) -> dict[str, Any]:
    seconds = full_attention_seconds(q, kv[0], kv[1])
    best = min(seconds, key=seconds.__getitem__)
    return {
        "full_seconds": seconds,
        "full_kernel": best,
        "full_best_seconds": seconds[best],
        "full_bytes_per_second": kv.nbytes / seconds[best],
    }


def _ours(context: Context, q: Tensor, tokens: int, batch: int) -> dict[str, Any]:
    """Select through the service, and attention over what it chose."""
    engine, shape = context.engine, ONE_LAYER
    assert engine is not None
    buffers, sessions, mapped = context.buffers(), [], []
    try:
        heads, dim = shape.num_kv_heads, shape.head_dim
        pool = buffers.allocate(torch.bfloat16, 2, tokens, heads, dim)
        budget = int(tokens * context.arguments.ratio)
        queries = buffers.allocate(torch.bfloat16, batch, 1, 1, shape.num_query_heads, dim)
        chosen = buffers.allocate(torch.int32, batch, heads, budget)
        queries.tensor[:, 0, 0] = q
        ids = long_ids(tokens, context.arguments.cache)
        for _ in range(batch):
            pool.tensor.normal_()
            torch.cuda.synchronize()
            keys, values = ([pool.part((kind,), tokens, heads, dim)] for kind in range(2))
            stored = open_session(
                context.client, shape, ids, keys, values, residence="device", room=0
            )
            sessions.append(stored.session_id)
            mapped.append(engine.map(context.client, stored.session_id))
        steps = [
            Step(
                session,
                queries.part((index,), 1, 1, shape.num_query_heads, dim),
                tokens_per_head=budget,
                token_region=chosen.at(index),
            )
            for index, session in enumerate(sessions)
        ]
        request = context.client.select_request(steps)
        answers = [context.client.select_message(request) for _ in range(SELECTS)]
        tail = torch.empty(batch, 0, heads, dim, dtype=torch.bfloat16, device="cuda")
        attend: Callable[[], Tensor] = lambda: engine.attend(  # noqa: E731
            q,
            [entry.keys[0] for entry in mapped],
            [entry.values[0] for entry in mapped],
            chosen.tensor,
            tail,
            tail,
        )
        return {
            "budget": budget,
            "select_device_seconds": statistics.median(a.device_seconds for a in answers),
            "select_total_seconds": statistics.median(a.total_seconds for a in answers),
            "attend_seconds": device_seconds(attend),
        }
    finally:
        while mapped:
            mapped.pop().close()
        for session in sessions:
            context.client.release(session)
        buffers.close()


def _bench(context: Context) -> str:
    """Output of the C++ benchmark; empty where it is not there."""
    program = context.arguments.bench
    if program is None or not program.exists():
        return ""
    done = subprocess.run([program], capture_output=True, text=True, timeout=200, check=False)
    if done.returncode != 0:
        return f"bench failed, exit {done.returncode}: {done.stderr.strip()[-300:]}"
    return done.stdout


def _bench_ratios(output: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The benchmark's lines at the points of `rows`, with torch's full KV over their time."""
    full = {(row["tokens"], row["batch"]): row["full_best_seconds"] for row in rows}
    found = []
    for line in output.splitlines():
        match = _BENCH_LINE.match(line)
        if match is None or (int(match[2]), int(match[3])) not in full:
            continue
        point, seconds = (int(match[2]), int(match[3])), float(match[4]) * 1e-3
        found.append(
            {
                "name": match[1].strip(),
                "tokens": point[0],
                "batch": point[1],
                "seconds": seconds,
                "full_over_this": full[point] / seconds,
            }
        )
    return found


def run(context: Context) -> dict[str, Any]:
    """Both points, then the C++ benchmark."""
    if not context.on_gpu:
        raise ValueError("--kernels needs a GPU")
    rows = []
    for tokens, batch in POINTS:
        size = (batch, LLAMA_8B.num_query_heads, LLAMA_8B.head_dim)
        q = torch.empty(size, dtype=torch.bfloat16, device="cuda").normal_()
        kv = _random_kv(tokens, batch)
        row: dict[str, Any] = {"tokens": tokens, "batch": batch} | _full(q, kv)
        del kv
        torch.cuda.empty_cache()
        row |= _ours(context, q, tokens, batch)
        ours = row["select_device_seconds"] + row["attend_seconds"]
        row["ratio"] = row["full_best_seconds"] / ours
        rows.append(row)
    torch.cuda.empty_cache()
    output = _bench(context)
    return {"rows": rows, "bench_output": output, "bench": _bench_ratios(output, rows)}


def table(result: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [
        "one layer, bf16, 32 query heads, 8 KV heads, D 128; device ms (full: CUDA graph)",
        f"{'T':>7} {'b':>3} {'flash':>7} {'cudnn':>7} {'TB/s':>5} | {'rows':>6} {'select':>7} "
        f"{'attend':>7} {'sum':>7} {'full/sum':>8} {'full/attend':>11}",
    ]
    for row in result["rows"]:
        full, select = row["full_seconds"], row["select_device_seconds"]
        both = select + row["attend_seconds"]
        lines.append(
            f"{row['tokens']:7} {row['batch']:3} {full.get('flash', float('nan')) * 1e3:7.3f} "
            f"{full.get('cudnn', float('nan')) * 1e3:7.3f} "
            f"{row['full_bytes_per_second'] / 1e12:5.2f} | {row['budget']:6} {select * 1e3:7.3f} "
            f"{row['attend_seconds'] * 1e3:7.3f} {both * 1e3:7.3f} {row['ratio']:8.2f} "
            f"{row['full_best_seconds'] / row['attend_seconds']:11.2f}"
        )
    wanted = [row for row in result["bench"] if row["name"].startswith(("step", "attend_tokens"))]
    if wanted:
        lines.append("C++ benchmark (device time, no RPC) beside torch's full KV of this run:")
    for row in wanted:
        lines.append(
            f"{row['name']:26} {row['tokens']:7} x{row['batch']:<3} {row['seconds'] * 1e3:8.4f} ms "
            f" full/this {row['full_over_this']:6.2f}"
        )
    if result["bench_output"].startswith("bench failed"):
        lines.append(result["bench_output"])
    return lines

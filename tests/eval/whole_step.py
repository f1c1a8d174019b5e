# SPDX-License-Identifier: Apache-2.0
"""A whole decode step of Llama-3.1-8B's shape: full KV against sessions, resident and offloaded.

Random weights and random K and V: speed and memory only. Every backend's step is one CUDA graph a
tail length; full KV is read by the faster of FlashAttention and cuDNN. A session's step also has
its Select (all layers, all sequences, for the next step) and every `window` steps an Append, over
RPC. The first window captures and is not timed.

Rows: all backends at each batch that full KV fits in. Weights of a step are read once whatever the
batch; `bound` is what the row must read at the read rate measured in the same run.

`--drift` sets how much Select's queries change from step to step. Random weights give unrelated
queries, so most rows would move at every step. SmolLM2 moves 21 to 23 % of them at a tenth of 1,200
tokens (--check prints the like); drift 0.3, the default, moves about as many. The share that moved
is printed beside the time it cost.

Peak memory is that of all processes, the idle service and its CUDA context included where KV is
full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attention import (
    Attention,
    FullAttention,
    GatheredAttention,
    MappedAttention,
    Options,
    SessionAttention,
    open_session,
)
from buffers import Buffers, Shared
from kernels import BACKENDS, full_attention_seconds
from runtime import Context, DecodeLoop, PeakMemory, read_rate
from texts import long_ids
from torch_llama import LLAMA_8B, TINY, Shape, TorchLlama

_MEAN_BLOCK = 14  # tokens, DD-Select's base length
_RESERVED_BYTES = 2 << 30  # workspaces, graphs, activations, two CUDA contexts


@dataclasses.dataclass
class _Bench:
    """What all rows share."""

    context: Context
    shape: Shape
    model: TorchLlama
    pool: Shared  # [2, T + L, Hkv, D]: layer l's tokens begin at row l
    ids: Any

    @property
    def tokens(self) -> int:
        return int(self.context.arguments.tokens)

    @property
    def window(self) -> int:
        return int(self.context.arguments.window)

    @property
    def budget(self) -> int:
        return int(self.tokens * self.context.arguments.ratio)

    def layer(self, kind: int, layer: int) -> Tensor:
        """Keys (0) or values (1) of a layer, [T, Hkv, D]."""
        return self.pool.tensor[kind, layer : layer + self.tokens]

    def open(self, residence: str) -> str:
        """One more session, its rows from the pool."""
        shape = self.shape
        rows = (self.tokens, shape.num_kv_heads, shape.head_dim)
        keys, values = (
            [self.pool.part((kind, layer), *rows) for layer in range(shape.num_layers)]
            for kind in (0, 1)
        )
        return open_session(
            self.context.client,
            shape,
            self.ids,
            keys,
            values,
            residence=residence,
            room=3 * self.window,
        ).session_id

    def timed(self, attention: Attention, batch: int) -> float:
        """Seconds a step, over one window after one that captures."""
        generator = torch.Generator().manual_seed(batch)
        first = torch.randint(0, self.shape.vocab_size, (batch,), generator=generator)
        graphs = self.context.on_gpu
        loop = DecodeLoop(self.model, attention, first.to(self.model.device), self.tokens, graphs)
        loop.run(self.window)
        if isinstance(attention, SessionAttention):
            attention.times = type(attention.times)()
        return loop.run(self.window)


def _full(bench: _Bench, batch: int) -> tuple[float, dict[str, Any]]:
    attention = FullAttention(bench.shape, batch, bench.tokens, bench.window, bench.pool.tensor)
    try:
        for sequence in range(batch):
            for layer in range(bench.shape.num_layers):
                attention.load(sequence, layer, bench.layer(0, layer), bench.layer(1, layer))
        detail: dict[str, Any] = {}
        if bench.context.on_gpu:  # the faster of torch's kernels at this very shape
            size = (batch, bench.shape.num_query_heads, bench.shape.head_dim)
            q = torch.empty(size, dtype=bench.pool.tensor.dtype, device="cuda").normal_()
            seconds = full_attention_seconds(q, *attention.rows(0))
            best = min(seconds, key=seconds.__getitem__)
            attention.backend = BACKENDS[best]
            detail = {"attention_seconds": seconds, "kernel": best}
        try:
            return bench.timed(attention, batch), detail
        except RuntimeError as error:  # a kernel may take T, but not every length after it
            if attention.backend in (None, BACKENDS["flash"]):
                raise
            print(f"step: {detail['kernel']}: {str(error).splitlines()[0]}; flash instead")
            attention.backend, attention.tail = BACKENDS["flash"], 0
            return bench.timed(attention, batch), detail | {"kernel": "flash"}
    finally:
        attention.close()


def _session_row(
    bench: _Bench, sessions: list[str], residence: str
) -> tuple[float, dict[str, Any]]:
    context, batch, shape = bench.context, len(sessions), bench.shape
    mapped = context.engine is not None and residence == "device"
    # Rows that are read in place do not move, whatever the queries.
    drift = 1.0 if mapped else context.arguments.drift
    options = Options(bench.budget, False, bench.window, drift)
    buffers: Buffers = context.buffers()
    like = bench.pool.tensor
    rest = (context.client, buffers, shape, sessions, bench.tokens, like, options, 0)
    attention: SessionAttention
    if mapped and context.engine is not None:
        attention = MappedAttention(*rest, context.engine)
    else:
        attention = GatheredAttention(*rest, context.engine)
    try:
        size = (batch, shape.num_layers, shape.num_query_heads, shape.head_dim)
        attention.prime(torch.randn(size, device=like.device).to(like.dtype))
        seconds = bench.timed(attention, batch)
        times = attention.times
        return seconds, {
            "select_seconds": times.select_seconds / max(1, times.num_selects),
            "select_device_seconds": times.select_device_seconds / max(1, times.num_selects),
            "append_seconds": times.append_seconds / max(1, times.num_appends),
            "moved_share": times.moved_rows / max(1, times.chosen_rows),
            "moved_rows": times.moved_rows / max(1, times.num_selects),
        }
    finally:
        attention.close()
        buffers.close()


def _reset(bench: _Bench) -> None:
    if bench.context.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _with_sessions(
    bench: _Bench, residence: str, batches: list[int], record: Callable[..., None]
) -> None:
    """Fresh sessions for every batch: a row's appends must not lengthen the next row's."""
    client = bench.context.client
    for batch in batches:
        sessions: list[str] = []
        try:
            with PeakMemory(bench.context.on_gpu) as memory:
                for _ in range(batch):
                    sessions.append(bench.open(residence))
                seconds, detail = _session_row(bench, sessions, residence)
            info = client.get(sessions[0])
            detail["session_bytes"] = {
                name: getattr(info.bytes, name)
                for name in ("key_value", "index", "reuse", "device", "host")
            }
            record(batch, seconds, memory.peak_bytes, detail)
        finally:
            for session in sessions:
                client.release(session)
            _reset(bench)


def bytes_of_row(bench: _Bench, backend: str, batch: int) -> dict[str, float]:
    """What a step of a row must read: from the device's memory, and over PCIe (per moved row)."""
    shape = bench.shape
    element = bench.pool.tensor.element_size()
    weights = shape.matrix_parameters * bench.model.dtype.itemsize
    if backend == "full":
        kv, index = shape.kv_bytes(bench.tokens, element), 0.0
    else:
        kv = shape.kv_bytes(bench.budget, element)
        index = shape.kv_bytes(bench.tokens, 1) / _MEAN_BLOCK  # fp8 minima and maxima of keys
    return {"weights": weights, "kv": batch * kv, "index": batch * index}


def _fitting(context: Context, shape: Shape, tokens: int, element: int) -> list[int]:
    """Batches that full KV has room for."""
    batches = [int(part) for part in context.arguments.batches.split(",")]
    if not context.on_gpu:
        return batches
    free, _ = torch.cuda.mem_get_info()
    one = shape.kv_bytes(tokens + 3 * context.arguments.window, element)
    one += shape.kv_bytes(tokens, 1) // _MEAN_BLOCK  # resident rows have their index, too
    return [batch for batch in batches if batch * one + _RESERVED_BYTES < free]


def run(context: Context) -> dict[str, Any]:
    """All backends at all batches."""
    arguments = context.arguments
    shape = TINY if arguments.tiny else LLAMA_8B
    dtype = torch.bfloat16 if context.on_gpu else torch.float32
    tokens = arguments.tokens
    model = TorchLlama.random(shape, context.device, dtype, tokens + 8 * arguments.window)
    buffers = context.buffers()
    try:
        rows_of_pool = tokens + shape.num_layers
        pool = buffers.allocate(dtype, 2, rows_of_pool, shape.num_kv_heads, shape.head_dim)
        pool.tensor.normal_()
        bench = _Bench(context, shape, model, pool, long_ids(tokens, context.arguments.cache))
        _reset(bench)
        rate = read_rate() if context.on_gpu else 0.0
        _reset(bench)
        batches = _fitting(context, shape, tokens, pool.tensor.element_size())
        rows: list[dict[str, Any]] = []

        def record(backend: str) -> Callable[..., None]:
            def add(batch: int, seconds: float, peak: int, detail: dict[str, Any]) -> None:
                reads = bytes_of_row(bench, backend, batch)
                bound = sum(reads.values()) / rate if rate else 0.0
                rows.append(
                    {"backend": backend, "batch": batch, "seconds": seconds, "reads": reads,
                     "bound_seconds": bound, "peak_bytes": peak, **detail}
                )  # fmt: skip

            return add

        for batch in batches:
            with PeakMemory(context.on_gpu) as memory:
                seconds, detail = _full(bench, batch)
            record("full")(batch, seconds, memory.peak_bytes, detail)
            _reset(bench)
        _with_sessions(bench, "device" if context.on_gpu else "any", batches, record("resident"))
        one = shape.kv_bytes(tokens, pool.tensor.element_size())
        hosted = [batch for batch in batches if batch * one <= arguments.host_gib * 2**30]
        _with_sessions(bench, "host", hosted, record("offloaded"))
        return {
            "rows": rows,
            "read_bytes_per_second": rate,
            "tokens": tokens,
            "budget": bench.budget,
            "window": bench.window,
            "drift": arguments.drift,
        }
    finally:
        buffers.close()


def table(result: dict[str, Any]) -> list[str]:
    """For people."""
    full = {row["batch"]: row for row in result["rows"] if row["backend"] == "full"}
    lines = [
        f"whole step, T {result['tokens']}, {result['budget']} rows a head, append every "
        f"{result['window']} steps, read rate {result['read_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"drift {result['drift']}",
        f"{'backend':10} {'b':>3} {'ms/step':>8} {'full/x':>6} {'GB read':>8} {'bound ms':>8} "
        f"{'select ms':>9} {'append ms':>9} {'moved':>6} {'peak GB':>8} {'full/x':>6}",
    ]
    for row in result["rows"]:
        base = full[row["batch"]]
        peak = row["peak_bytes"]
        lines.append(
            f"{row['backend']:10} {row['batch']:3} {row['seconds'] * 1e3:8.2f} "
            f"{base['seconds'] / row['seconds']:6.2f} {sum(row['reads'].values()) / 1e9:8.2f} "
            f"{row['bound_seconds'] * 1e3:8.2f} {row.get('select_seconds', 0) * 1e3:9.2f} "
            f"{row.get('append_seconds', 0) * 1e3:9.2f} {row.get('moved_share', 0):6.1%} "
            f"{peak / 1e9:8.2f} {base['peak_bytes'] / peak if peak else 0:6.2f}"
        )
    return lines

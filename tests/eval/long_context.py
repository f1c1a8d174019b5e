# SPDX-License-Identifier: Apache-2.0
"""A session of a million tokens, Llama-3.1-8B's shape, at rest as fp8 in pinned host memory.

Keys and values are random, made on the device, and opened from one registered allocation: layer l's
tokens begin at its row l, so that layers differ and 32 of them fit.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from dynsplit.sessions import RESIDENCES, Step, index_policy
from dynsplit.v1 import types_pb2

from attention import open_session
from runtime import Context
from texts import long_ids
from torch_llama import LLAMA_8B, TINY

APPENDED = 1000
SELECTS = 10
_PARTS = ("key_value", "index", "device", "host")


def run(context: Context) -> dict[str, Any]:
    """Open, append, select, release; times and bytes."""
    arguments, client = context.arguments, context.client
    shape = TINY if arguments.tiny else LLAMA_8B
    tokens, heads, dim = arguments.long_tokens, shape.num_kv_heads, shape.head_dim
    layers = range(shape.num_layers)
    dtype = torch.bfloat16 if context.on_gpu else torch.float32
    synchronize = torch.cuda.synchronize if context.on_gpu else lambda: None
    budget = int(tokens * arguments.ratio)
    buffers = context.buffers()
    session = ""
    result: dict[str, Any] = {"tokens": tokens, "budget": budget}

    def seconds(work: Any) -> tuple[float, Any]:
        begin = time.perf_counter()
        value = work()
        return time.perf_counter() - begin, value

    try:
        predicted = client.session_bytes(
            types_pb2.SequenceShape(
                num_layers=shape.num_layers,
                num_query_heads=shape.num_query_heads,
                num_kv_heads=heads,
                num_tokens=tokens,
                head_dim=dim,
            ),
            dtype=str(dtype),
            options=types_pb2.SessionOptions(residence=RESIDENCES["host"], reserve_tokens=APPENDED),
            policy=index_policy(profile="smollm2", rest="float8"),
        )
        pool = buffers.allocate(dtype, 2, tokens + shape.num_layers, heads, dim)
        for part in pool.tensor.flatten().split(1 << 28):
            part.normal_()
        queries = buffers.allocate(dtype, shape.num_layers, 1, shape.num_query_heads, dim)
        queries.tensor.normal_()
        chosen = buffers.allocate(torch.int32, shape.num_layers, heads, budget)
        synchronize()
        ids = long_ids(tokens + APPENDED, context.arguments.cache)

        def rows(count: int) -> Any:
            return (
                [pool.part((kind, layer), count, heads, dim) for layer in layers] for kind in (0, 1)
            )

        result["open_seconds"], stored = seconds(
            lambda: open_session(
                client, shape, ids[:tokens], *rows(tokens), residence="host", room=APPENDED,
                rest="float8",
            )
        )  # fmt: skip
        session = stored.session_id
        result["append_seconds"], appended = seconds(
            lambda: client.append(session, tokens, ids[tokens:], *rows(APPENDED))
        )
        step = Step(
            session,
            queries.part((0,), shape.num_layers, 1, shape.num_query_heads, dim),
            tokens_per_head=budget,
            token_region=chosen.place,
        )
        request = client.select_request([step])
        timed = [seconds(lambda: client.select_message(request)) for _ in range(SELECTS)]
        result["select_seconds"] = statistics.median(entry[0] for entry in timed)
        result["select_device_seconds"] = statistics.median(
            entry[1].device_seconds for entry in timed
        )
        last = chosen.tensor[-1, -1].cpu()
        if not (last[1:] > last[:-1]).all() or int(last[-1]) != tokens + APPENDED - 1:
            raise AssertionError("chosen tokens are not ascending up to the newest one")
        info = client.get(session)
        result["num_blocks"] = appended.info.num_blocks
        result["bytes"] = {part: getattr(info.bytes, part) for part in _PARTS}
        result["advised_bytes"] = {part: getattr(predicted, part) for part in _PARTS}
        result["as_bfloat16_bytes"] = shape.kv_bytes(tokens + APPENDED, 2)
        result["release_seconds"], _ = seconds(lambda: client.release(session))
        session = ""
        return result
    finally:
        if session:
            client.release(session)
        buffers.close()


def table(result: dict[str, Any]) -> list[str]:
    """For people."""
    held, advised = result["bytes"], result["advised_bytes"]
    shares = ", ".join(
        f"{part} {held[part] / 1e9:.3f} ({advised[part] / 1e9:.3f})" for part in _PARTS
    )
    return [
        f"session of {result['tokens']} + {APPENDED} tokens, fp8 in host memory, "
        f"{result['num_blocks']} blocks",
        f"open {result['open_seconds']:.2f} s, append {result['append_seconds'] * 1e3:.1f} ms, "
        f"select of {result['budget']} tokens a head, all layers "
        f"{result['select_seconds'] * 1e3:.2f} ms ({result['select_device_seconds'] * 1e3:.2f} on "
        f"the device), release {result['release_seconds']:.2f} s",
        f"GB held (advised): {shares}; K and V as bf16 would be "
        f"{result['as_bfloat16_bytes'] / 1e9:.3f}",
    ]

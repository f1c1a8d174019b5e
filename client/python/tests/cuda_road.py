#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The road over device memory, on a machine with an NVIDIA GPU; fails where there is none.

    cuda_road.py [NAME...]        or        pytest client/python/tests/cuda_road.py

Not collected by its name, so that runs without a GPU leave it out. Needs torch and transformers, no
pytest. $DYNSPLITD is the server (with CUDA), $DYNSPLIT_ENGINE the engine library,
$DYNSPLITD_LIBRARIES a folder of shared libraries that the server alone needs. Every result of the
device road is compared, bit for bit, with the same call over shared memory.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dynsplit
import dynsplit.aio
from dynsplit import Client, Compressed, errors, tensor_at
from dynsplit.engine import DeviceRegion, Engine, EngineError
from dynsplit.v1 import info_pb2

LAYERS, TOKENS, Q_HEADS, KV_HEADS, DIM, WINDOW = 3, 2065, 8, 2, 64, 32
SPIN = 400_000_000  # cycles: a fifth of a second on any GPU that this runs on
PLANES = info_pb2.Capabilities
POLICIES = {
    "evict": dynsplit.policy("dynsplit", kept_ratio=0.25, profile="smollm2"),
    "per head, int8": dynsplit.policy("snapkv", kept_ratio=0.3, encoding="int8"),
    "fp8, contiguous": dynsplit.policy(
        "dynsplit",
        kept_ratio=0.2,
        profile="smollm2",
        encoding="float8_e4m3",
        positions="contiguous",
    ),
    "index": dynsplit.policy("dynsplit_index", profile="smollm2"),
}
ROPE = dynsplit.Rope(theta=10000.0)
INDEX = dynsplit.index_policy(profile="smollm2", kept_ratio=0.2)


# -- what the tests stand on --


def start_server(*options: str) -> str:
    """A dynsplitd of our own, until this process ends; its address."""
    binary = os.environ.get("DYNSPLITD", "bin/dynsplitd")
    folder = tempfile.TemporaryDirectory(prefix="dynsplit-cuda-")
    path = Path(folder.name) / "server.sock"
    command = [binary, "--backend=cuda", "--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"]
    command += [f"--unix-socket={path}", "--device-memory=8GiB", "--pinned-memory=8GiB"]
    environment = dict(os.environ)
    if "DYNSPLITD_LIBRARIES" in environment:
        environment["LD_LIBRARY_PATH"] = environment["DYNSPLITD_LIBRARIES"]
    log = Path(folder.name, "log").open("wb")
    server = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)

    def stop() -> None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()
        folder.cleanup()

    atexit.register(stop)
    with Client(f"unix:{path}", timeout_seconds=5) as client:
        end = time.monotonic() + 60
        while not client.healthy():
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError("dynsplitd: " + Path(folder.name, "log").read_text()[-800:])
            time.sleep(0.1)
    return f"unix:{path}"


@functools.cache
def target() -> str:
    """Of a server that takes every kind of memory."""
    return start_server("--regions=all")


@functools.cache
def engine() -> Engine:
    """The library, on the GPU."""
    assert torch.cuda.is_available(), "no GPU"
    return Engine(os.environ.get("DYNSPLIT_ENGINE", "lib/libdynsplit_engine.so"))


@contextlib.contextmanager
def clients() -> Iterator[tuple[Client, Client]]:
    """The device road, and the one it is compared with."""
    with (
        Client(target(), road="cuda-ipc", engine=engine()) as device,
        Client(target(), road="shm") as host,
    ):
        yield device, host


def sequence(dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS) -> dict[str, Any]:
    """Token ids in numpy; keys, values and queries on the GPU."""
    generator = torch.Generator().manual_seed(11)
    kv = torch.randn(2, LAYERS, tokens, KV_HEADS, DIM, generator=generator)
    queries = torch.randn(LAYERS, WINDOW, Q_HEADS, DIM, generator=generator)
    ids = torch.randint(0, 64, (tokens,), generator=generator, dtype=torch.int32)
    on_gpu = {"keys": kv[0], "values": kv[1], "queries": queries}
    return {"token_ids": ids.numpy()} | {
        name: part.to("cuda", dtype) for name, part in on_gpu.items()
    }


def on_host(parts: dict[str, Any]) -> dict[str, Any]:
    """The same with its tensors in host memory."""
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in parts.items()}


def bits(array: Any) -> Any:
    """Bytes of a tensor of torch or numpy, in host memory."""
    if isinstance(array, torch.Tensor):
        return array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


_PARTS = ("tokens", "key_pages", "value_pages", "key_scales", "value_scales")
_SUMMARIES = ("block_key_min", "block_key_max", "block_key_mean")


def assert_equal(found: Compressed, expected: Compressed) -> None:
    """Plans, receipts and every byte."""
    assert found.plan.hash == expected.plan.hash
    if found.receipt is not None and expected.receipt is not None:
        one, other = (r.retained_attention_mass_mean for r in (found.receipt, expected.receipt))
        assert np.isclose(one, other, rtol=0, atol=1e-5, equal_nan=True)
    assert np.array_equal(found.block_starts, expected.block_starts)
    for layer, wanted in zip(found.layers, expected.layers, strict=True):
        for name in (*_PARTS, *_SUMMARIES):
            a, b = getattr(layer, name), getattr(wanted, name)
            assert (a is None) == (b is None), name
            assert a is None or np.array_equal(bits(a), bits(b)), f"{name} of layer {layer.layer}"


def raises(kind: type[BaseException], call: Callable[[], Any], text: str = "") -> BaseException:
    """The error that the call ends with."""
    try:
        call()
    except kind as error:
        assert text in str(error), f"{error!r} does not say {text!r}"
        return error
    raise AssertionError(f"no {kind.__name__}")


# -- one shot --


def test_the_server_has_the_gpu_and_takes_its_memory() -> None:
    """Else nothing below says anything."""
    assert torch.cuda.is_available(), "no GPU"
    with Client(target()) as client:
        info = client.server_info()
        assert info.backend == "cuda"
        planes = info.capabilities.data_planes
        assert PLANES.DATA_PLANE_CUDA_IPC in planes and PLANES.DATA_PLANE_SHM in planes
        assert engine().device_uuid() in [device.uuid for device in info.devices]


def test_compress_is_that_of_the_host_road() -> None:
    """All element types and policies; torch in, torch on the same GPU out."""
    with clients() as (device, host):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            parts = sequence(dtype)
            for policy in POLICIES.values():
                found = device.compress(**parts, policy=policy, rope=ROPE)
                assert found.road == "cuda-ipc" and found.sent_bytes == 0
                assert found.backend == "cuda"
                pages = found.layers[0].key_pages
                assert pages.is_cuda and (found.layers[0].quantised or pages.dtype == dtype)
                assert_equal(found, host.compress(**on_host(parts), policy=policy, rope=ROPE))
        again = device.compress(**parts, policy=policy, rope=ROPE)  # the segment is used again
        assert_equal(again, found)
        assert len(device.regions()) == 2  # one segment of each client
        for region in device.regions():
            assert region.owned
            device.unregister_region(region.name)  # as after a restart: registered anew
        assert_equal(device.compress(**parts, policy=policy, rope=ROPE), found)


def test_plan_and_apply() -> None:
    """A plan made from tensors on the GPU, applied to them, moves what compress moves."""
    parts = sequence()
    with clients() as (device, host):
        expected = host.compress(**on_host(parts), policy=POLICIES["evict"])
        planned = device.plan(
            parts["token_ids"],
            keys=parts["keys"],
            values=parts["values"],
            queries=parts["queries"],
            policy=POLICIES["evict"],
        )
        assert planned.plan.hash == expected.plan.hash and planned.road == "cuda-ipc"
        applied = device.apply(planned, parts["keys"], parts["values"])
        for one, other in zip(applied.layers, expected.layers, strict=True):
            assert one.key_pages.is_cuda
            assert np.array_equal(bits(one.key_pages), bits(other.key_pages))
            assert np.array_equal(bits(one.value_pages), bits(other.value_pages))


def test_any_strides_and_any_mixture() -> None:
    """Views of other layouts, gradients, pools of pages, tensors of host and device in one call."""
    parts = sequence()
    keys, policy = parts["keys"], POLICIES["evict"]
    with clients() as (device, _):
        expected = device.compress(**parts, policy=policy)
        by_head = keys.transpose(1, 2).contiguous()  # [L, Hkv, T, D], as caches have it
        padded = torch.zeros(*keys.shape[:-1], 2 * DIM, dtype=keys.dtype, device="cuda")
        padded[..., :DIM] = keys
        for view in (
            by_head.transpose(1, 2),
            padded[..., :DIM],
            list(keys.clone().requires_grad_()),
            keys.cpu(),
        ):
            assert_equal(device.compress(**(parts | {"keys": view}), policy=policy), expected)
        page = 16
        pages = -(-TOKENS // page)
        table = np.random.default_rng(3).permutation(pages + 5)[:pages]
        pool = torch.zeros(LAYERS, pages + 5, 2, page, KV_HEADS, DIM, dtype=keys.dtype).cuda()
        for i, rows in enumerate((keys, parts["values"])):
            tail = rows.new_zeros(LAYERS, pages * page - TOKENS, KV_HEADS, DIM)
            whole = torch.cat([rows, tail], dim=1).view(LAYERS, pages, page, KV_HEADS, DIM)
            pool[:, torch.from_numpy(table).cuda(), i] = whole
        both = [
            dynsplit.AxisTensor(layer, ("page", "kv", "token", "head", "channel")) for layer in pool
        ]
        paged = parts | {"keys": both, "values": None}
        assert_equal(device.compress(**paged, policy=policy, block_table=table), expected)


def test_tensors_are_read_when_they_are_ready() -> None:
    """Computed on a side stream that is still busy when the call begins; both clients."""
    parts = sequence()
    policy = POLICIES["evict"]

    def late() -> dict[str, Any]:
        torch.cuda._sleep(SPIN)
        return parts | {name: parts[name] * 1 for name in ("keys", "values", "queries")}

    async def awaited(road: str) -> Compressed:
        options: dict[str, Any] = {"road": road, "engine": engine()}
        async with dynsplit.aio.Client(target(), **options) as client:
            with torch.cuda.stream(torch.cuda.Stream()):
                begun = client.compress(**late(), policy=policy)
            return await begun

    with clients() as (device, host):
        expected = host.compress(**on_host(parts), policy=policy)
        for road in ("cuda-ipc", "shm", "inline"):
            assert_equal(asyncio.run(awaited(road)), expected)
            with (
                Client(target(), road=road, engine=engine()) as client,
                torch.cuda.stream(torch.cuda.Stream()),
            ):
                assert_equal(client.compress(**late(), policy=policy), expected)
        with futures.ThreadPoolExecutor(4) as threads:

            def call(_: int) -> Compressed:
                with torch.cuda.stream(torch.cuda.Stream()):
                    return device.compress(**late(), policy=policy)

            for found in threads.map(call, range(8)):
                assert_equal(found, expected)


def test_nothing_travels_where_both_sides_are_regions() -> None:
    """Inputs made in a region, results written into one by the server's kernels."""
    parts = sequence()
    policy = POLICIES["per head, int8"]
    size = parts["keys"].nbytes
    with (
        clients() as (device, host),
        contextlib.closing(DeviceRegion(device, engine(), 2 * size)) as source,
        contextlib.closing(DeviceRegion(device, engine(), 2 * size)) as room,
        contextlib.closing(DeviceRegion(device, engine(), 4096)) as small,
    ):
        shape = (LAYERS, TOKENS, KV_HEADS, DIM)
        placed: dict[str, Any] = {"token_ids": parts["token_ids"], "queries": parts["queries"]}
        for i, name in enumerate(("keys", "values")):
            source.tensor(torch.bfloat16, *shape, offset_bytes=i * size).copy_(parts[name])
            layer = size // LAYERS
            placed[name] = [
                tensor_at(source.place.at(i * size + j * layer), "bfloat16", *shape[1:])
                for j in range(LAYERS)
            ]
        torch.cuda.current_stream().synchronize()
        found = device.compress(**placed, policy=policy, output=room)
        pages, begin = found.layers[2].key_pages, room.bytes_at(0, 1).data_ptr()
        assert pages.is_cuda and begin <= pages.data_ptr() < begin + 2 * size  # a view
        assert found.received_bytes == found.block_starts.nbytes
        expected = host.compress(**on_host(parts), policy=policy)
        assert_equal(found, expected)
        assert_equal(device.compress(**parts, policy=policy, output=room), expected)
        raises(
            errors.InvalidRequestError,
            lambda: device.compress(**parts, policy=policy, output=small),
            "output",
        )


# -- sessions --


def test_a_session_is_opened_selected_appended_fetched_and_read_in_place() -> None:
    """Everything of a session with its tensors on the GPU."""
    parts, more = sequence(), sequence(tokens=96)
    queries = parts["queries"][:, -1:]
    with clients() as (device, host):
        stored = device.open(
            parts["token_ids"],
            parts["keys"],
            parts["values"],
            num_query_heads=Q_HEADS,
            policy=INDEX,
            reserve_tokens=128,
            residence="device",
        )
        there = on_host(parts)
        other = host.open(
            there["token_ids"],
            there["keys"],
            there["values"],
            num_query_heads=Q_HEADS,
            policy=INDEX,
            reserve_tokens=128,
        )
        session = stored.session_id
        assert np.array_equal(stored.block_starts, other.block_starts)
        device.append(session, TOKENS, more["token_ids"], more["keys"], more["values"])
        there = on_host(more)
        host.append(other.session_id, TOKENS, there["token_ids"], there["keys"], there["values"])
        keys = torch.cat([parts["keys"], more["keys"]], dim=1)
        values = torch.cat([parts["values"], more["values"]], dim=1)
        chosen = device.select([dynsplit.Step(session, queries)])[0]
        same = host.select([dynsplit.Step(other.session_id, queries.cpu())])[0]
        assert chosen.tokens is not None and same.tokens is not None
        assert np.array_equal(chosen.tokens, same.tokens)

        fetched = device.fetch(session, like=keys)
        for layer, rows in enumerate(fetched.layers):
            assert rows.key_pages.is_cuda and torch.equal(rows.rows()[0], keys[layer])
            assert torch.equal(rows.rows()[1], values[layer])
        with contextlib.closing(DeviceRegion(device, engine(), 4 * keys.nbytes)) as room:
            placed = device.fetch(session, like=keys, output=room)
            assert placed.received_bytes == placed.block_starts.nbytes
            assert torch.equal(placed.layers[1].rows()[1], values[1])

        _gather_into_regions(device, session, queries, keys, values, chosen.tokens)
        with engine().map(device, session) as mapped:
            for layer in range(LAYERS):
                assert torch.equal(mapped.keys[layer][: keys.shape[1]], keys[layer])
                assert torch.equal(mapped.values[layer][: keys.shape[1]], values[layer])
            tokens = torch.from_numpy(chosen.tokens[1].copy()).cuda()
            _attend(queries[1, 0], mapped.keys[1], mapped.values[1], tokens)
        assert device.get(session).num_mappings == 0
        device.release(session)
        host.release(other.session_id)


def _gather_into_regions(
    client: Client, session: str, queries: Any, keys: Any, values: Any, chosen: Any
) -> None:
    """Queries, tokens and rows all in device memory."""
    count = chosen.shape[-1]
    rows = LAYERS * KV_HEADS * count * DIM * 2
    with contextlib.closing(DeviceRegion(client, engine(), 2 * rows + (1 << 20))) as room:
        ends = [rows, 2 * rows, 2 * rows + (256 << 10), 2 * rows + (512 << 10)]
        values_at, queries_at, tokens_at, held_at = (-(-end // 256) * 256 for end in ends)
        room.tensor(torch.bfloat16, *queries.shape, offset_bytes=queries_at).copy_(queries)
        torch.cuda.current_stream().synchronize()
        step = dynsplit.Step(
            session,
            tensor_at(room.place.at(queries_at), "bfloat16", *queries.shape),
            token_region=room.place.at(tokens_at),
            gather=dynsplit.Gather(
                keys=room.place,
                values=room.place.at(values_at),
                held=room.place.at(held_at),
            ),
        )
        found = client.select([step])[0]
        assert found.tokens is None and found.moved_rows == found.chosen_rows
        shape = (LAYERS, KV_HEADS, count)
        tokens = room.tensor(torch.int32, *shape, offset_bytes=tokens_at)
        assert np.array_equal(tokens.cpu().numpy(), chosen)
        held = room.tensor(torch.int32, *shape, offset_bytes=held_at).long()
        head = torch.arange(KV_HEADS, device="cuda")[:, None]
        for at, rests in ((0, keys), (values_at, values)):
            slots = room.tensor(torch.bfloat16, *shape, DIM, offset_bytes=at)
            for layer in range(LAYERS):
                assert torch.equal(slots[layer], rests[layer][held[layer], head])


def _attend(query: Any, keys: Any, values: Any, tokens: Any) -> None:
    """Attention over chosen rows where they lie, against torch's over a copy of them."""
    tail = keys[:0][None]
    found = engine().attend(query[None], [keys], [values], tokens[None], tail, tail)[0]
    head = torch.arange(KV_HEADS, device="cuda")[:, None]
    k, v = (part[tokens.long(), head].float() for part in (keys, values))  # [Hkv, n, D]
    q = query.float().view(KV_HEADS, -1, DIM)
    weights = torch.softmax(q @ k.transpose(1, 2) * DIM**-0.5, dim=-1)
    expected = (weights @ v).view(Q_HEADS, DIM)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


# -- errors and lifetimes --


def test_where_device_memory_cannot_be_shared_another_road_is_taken() -> None:
    """A server that does not take it; no memory; no library."""
    parts = sequence()
    policy = POLICIES["evict"]
    only_shm = start_server("--regions=shm")
    with Client(only_shm, engine=engine()) as client:
        found = client.compress(**parts, policy=policy)
        assert found.road == "shm" and found.layers[0].key_pages.is_cuda
    with Client(only_shm, engine=engine(), road="cuda-ipc") as client:
        raises(errors.UnsupportedError, lambda: client.compress(**parts, policy=policy))
    with Client(target(), engine=engine()) as client:  # "auto"
        assert client.compress(**parts, policy=policy).road == "cuda-ipc"
    with Client(target()) as client:  # without an engine
        assert client.compress(**parts, policy=policy).road == "shm"

    raises(EngineError, lambda: engine().allocate(1 << 50))
    raises(OSError, lambda: Engine("/nowhere/libdynsplit_engine.so"))
    allocate, Engine.allocate = Engine.allocate, _no_memory  # type: ignore[method-assign]
    try:
        with Client(target(), engine=engine()) as client:
            assert_equal(client.compress(**parts, policy=policy), found)
        with Client(target(), engine=engine(), road="cuda-ipc") as client:
            raises(EngineError, lambda: client.compress(**parts, policy=policy))
    finally:
        Engine.allocate = allocate  # type: ignore[method-assign]


def _no_memory(self: Engine, byte_size: int) -> Any:
    raise EngineError("out of memory")


def test_wrong_regions_are_refused() -> None:
    """Device, size, and memory that has been given back."""
    with Client(target()) as client:
        memory = engine().allocate(3 << 20)
        handle, uuid = memory.source()["cuda_ipc"]
        raises(
            errors.InvalidRequestError,
            lambda: client.register_region("x", 4096, cuda_ipc=(handle, bytes(16))),
            "device_uuid",
        )
        raises(
            errors.InvalidRequestError,
            lambda: client.register_region("x", 1 << 30, cuda_ipc=(handle, uuid)),
            "byte_size",
        )
        raises(
            errors.InvalidRequestError,
            lambda: client.register_region("x", 4096, cuda_ipc=(bytes(64), uuid)),
        )
        place = client.register_region("part", 4096, cuda_ipc=(handle, uuid), offset_bytes=8192)
        client.unregister_region("part", place.generation)
        memory.close()
        raises(ValueError, memory.source)
        with client.attach() as owner:
            gone = DeviceRegion(client, engine(), 4096, owner=owner)
        _eventually(lambda: not client.regions())
        gone.close()
        raises(errors.NotFoundError, lambda: DeviceRegion(client, engine(), 4096, owner=owner))


def test_memory_comes_back() -> None:
    """Segments of many sizes, then none; the device's memory as before."""
    policy = POLICIES["evict"]
    made: list[int] = []
    freed: list[int] = []
    allocate, give_back = Engine.allocate, Engine.give_back

    def counted(self: Engine, byte_size: int) -> Any:
        memory = allocate(self, byte_size)
        made.append(memory._address)
        return memory

    def counted_back(self: Engine, address: int, *, mapped: bool) -> None:
        with Client(target()) as watcher:  # the server has let go of it first
            assert len(watcher.regions()) <= len(made) - len(freed) - 1
        freed.append(address)
        give_back(self, address, mapped=mapped)

    Engine.allocate, Engine.give_back = counted, counted_back  # type: ignore[method-assign]
    try:
        with Client(target(), road="cuda-ipc", engine=engine()) as client:
            with futures.ThreadPoolExecutor(6) as threads:
                calls = [
                    threads.submit(client.compress, **sequence(tokens=300 + 200 * i), policy=policy)
                    for i in range(12)
                ]
                for call in calls:
                    assert call.result().road == "cuda-ipc"
            assert len(client.regions()) <= 4
    finally:
        Engine.allocate, Engine.give_back = allocate, give_back  # type: ignore[method-assign]
    assert made and sorted(made) == sorted(freed)
    with Client(target()) as client:
        assert not client.regions()


_KILLED = """
import os, signal, sys, torch, dynsplit
from dynsplit.engine import Engine
engine = Engine(sys.argv[2])
client = dynsplit.Client(sys.argv[1], road="cuda-ipc", engine=engine)
keys = torch.ones(1, 4096, 2, 64, device="cuda")
client.compress(None, keys, keys, policy=dynsplit.policy("knorm", kept_ratio=0.5))
assert len(client.regions()) == 1
print("shared", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_leaves_nothing() -> None:
    """The server unmaps what it shared, and works on."""
    library = os.environ.get("DYNSPLIT_ENGINE", "lib/libdynsplit_engine.so")
    command = [sys.executable, "-c", _KILLED, target(), library]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout == "shared\n" and ended.returncode == -signal.SIGKILL, ended.stderr[-600:]
    with clients() as (device, host):
        _eventually(lambda: not device.regions())
        parts = sequence()
        found = device.compress(**parts, policy=POLICIES["evict"])
        assert_equal(found, host.compress(**on_host(parts), policy=POLICIES["evict"]))


def _eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.05)


# -- transformers --


@functools.cache
def model() -> Any:
    """A random Llama on the GPU, in fp32."""
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        initializer_range=0.1,
    )
    made = transformers.LlamaForCausalLM(config).eval().cuda()
    made.generation_config.eos_token_id = None
    return made


def prompt() -> dict[str, Any]:
    """Two sequences."""
    ids = torch.randint(1, 64, (2, 1500), generator=torch.Generator().manual_seed(7)).cuda()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(**options: Any) -> Any:
    """Token ids [2, 24] that greedy search adds to the prompt."""
    inputs = prompt()
    found = model().generate(**inputs, max_new_tokens=24, do_sample=False, **options)
    return found[:, inputs["input_ids"].shape[1] :]


def assert_same_tokens(found: Any, expected: Any) -> None:
    """Equal up to where the plain model itself does not know: two logits within 1e-3."""
    for one, other, ids in zip(found, expected, prompt()["input_ids"], strict=True):
        differ = (one != other).nonzero()
        if not len(differ):
            continue
        first = int(differ[0])
        with torch.no_grad():
            logits = model()(torch.cat([ids, other[:first]])[None]).logits[0, -1]
        gap = (logits[other[first]] - logits[one[first]]).abs()
        assert gap < 1e-3, f"token {first}: logits differ by {float(gap):.2e}"


def test_generation_over_what_was_kept() -> None:
    """At full budget the tokens of the plain model, in both modes of positions."""
    import dynsplit.hf

    expected = generate()
    with Client(target(), engine=engine()) as client:
        for positions in ("original", "contiguous"):
            policy = dynsplit.policy(
                "dynsplit", kept_ratio=1.0, profile="smollm2", positions=positions
            )
            with dynsplit.hf.compress(model(), client, policy) as compression:
                assert_same_tokens(generate(), expected)
            assert [result.road for result in compression.results] == ["cuda-ipc"] * 2
        with dynsplit.hf.compress(model(), client, POLICIES["evict"]) as compression:
            generate()
        rows, _ = compression.results[0].layers[0].rows()
        assert rows.is_cuda and len(rows) == 375


def test_generation_with_a_session() -> None:
    """Read whole: the tokens of the plain model; exact and speculative."""
    import dynsplit.hf

    expected = generate()
    whole = dynsplit.index_policy(kept_ratio=1.0, profile="smollm2")
    with Client(target(), engine=engine()) as client:
        for speculative in (False, True):
            cache = dynsplit.hf.SessionCache(
                model(), client, whole, speculative=speculative, append_every=7
            )
            with cache:
                assert_same_tokens(generate(past_key_values=cache), expected)
                lengths = [client.get(name).shape.num_tokens for name in cache.session_ids]
                assert lengths == [1521] * 2
        with dynsplit.hf.SessionCache(model(), client, INDEX, speculative=True) as cache:
            generate(past_key_values=cache)
            assert 0 < cache.moved_rows < cache.chosen_rows


def main(names: list[str]) -> int:
    """Runs the tests whose names contain one of `names`, or all; a line each; 1 if one failed."""
    tests = {
        name: test
        for name, test in globals().items()
        if name.startswith("test_") and (not names or any(part in name for part in names))
    }
    failed, begin = 0, time.monotonic()
    for name, test in tests.items():
        started, verdict = time.monotonic(), "ok"
        try:
            test()
        except Exception as error:
            failed += 1
            verdict = f"FAILED {type(error).__name__}: {error}"[:110].replace("\n", " ")
            traceback.print_exc()
        print(f"{name[5:]:76} {time.monotonic() - started:5.1f} s  {verdict}", flush=True)
    kind = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    print(
        f"{len(tests) - failed} of {len(tests)} passed in {time.monotonic() - begin:.0f} s "
        f"({kind}, torch {torch.__version__})"
    )
    return 1 if failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

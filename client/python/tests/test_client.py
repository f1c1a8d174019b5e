# SPDX-License-Identifier: Apache-2.0
"""The client of everything but sessions: roads, errors, retries, fail-open, files, asyncio."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from conftest import Daemon
from fake_service import detail, refuse

import dynsplit
import dynsplit.aio
from dynsplit import (
    AxisTensor,
    Client,
    Compressed,
    Retry,
    base,
    container,
    errors,
    streams,
    tensors,
)
from dynsplit.shared import HostRegion, SharedMemory
from dynsplit.v1 import compression_pb2_grpc, memory_pb2, types_pb2

LAYERS, Q_HEADS, KV_HEADS, DIM, TOKENS = 3, 4, 2, 16, 320
POLICY = dynsplit.policy(
    "dynsplit", kept_ratio=0.25, profile="smollm2", num_recent_tokens=8, scope="layer"
)
_ROOT = Path(__file__).resolve().parents[3]


def _sequence(seed: int = 1, tokens: int = TOKENS) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    kv = random.standard_normal((2, LAYERS, tokens, KV_HEADS, DIM), np.float32)
    return {
        "token_ids": random.integers(0, 64, tokens, np.int32),
        "keys": kv[0],
        "values": kv[1],
        "queries": random.standard_normal((LAYERS, 8, Q_HEADS, DIM), np.float32),
    }


def _assert_equal(found: Compressed, expected: Compressed) -> None:
    assert found.plan.hash == expected.plan.hash
    assert found.receipt == expected.receipt
    np.testing.assert_array_equal(found.block_starts, expected.block_starts)
    for one, other in zip(found.layers, expected.layers, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        for a, b in zip(one.rows(), other.rows(), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _assert_rows_are_the_input(found: Compressed, sequence: dict[str, Any]) -> None:
    for layer in found.layers:
        for rows, name in zip(layer.rows(), ("keys", "values"), strict=True):
            np.testing.assert_array_equal(rows, sequence[name][layer.layer][layer.tokens[0]])


# -- results --


def test_compress_returns_kept_rows_plan_and_receipt(service: Client) -> None:
    sequence = _sequence()
    found = service.compress(**sequence, policy=POLICY)
    assert [layer.num_kept for layer in found.layers] == [80] * LAYERS
    assert found.layers[0].key_pages.shape == (5, 16, KV_HEADS, DIM)
    _assert_rows_are_the_input(found, sequence)
    assert found.receipt is not None and 0 < found.receipt.retained_attention_mass_mean < 1
    assert found.block_starts[0] == 0 and found.block_starts[-1] == TOKENS
    assert found.bytes_in == 2 * sequence["keys"].nbytes
    assert found.bytes_out == found.received_bytes - found.block_starts.nbytes - sum(
        layer.tokens.nbytes + 4 * len(layer.key_pages) for layer in found.layers
    )
    assert found.representation_salt and found.plan.policy.preset == "dynsplit"


def test_a_plan_applied_elsewhere_gives_the_same_bytes(service: Client) -> None:
    sequence = _sequence()
    expected = service.compress(**sequence, policy=POLICY)
    ids, keys, values, queries = sequence.values()
    planned = service.plan(ids, keys=keys, values=values, queries=queries, policy=POLICY)
    assert planned.plan.hash == expected.plan.hash and planned.layers[0].key_pages is None
    with pytest.raises(ValueError, match="no pages"):
        planned.layers[0].rows()
    applied = service.apply(planned, keys, values)
    for one, other in zip(applied.layers, expected.layers, strict=True):
        np.testing.assert_array_equal(one.key_pages, other.key_pages)
        np.testing.assert_array_equal(one.value_pages, other.value_pages)


@pytest.mark.parametrize("encoding", ["float8_e4m3", "int8"])
@pytest.mark.parametrize("granularity", ["head", "token_head"])
def test_quantised_pages_decode_to_the_rows(
    service: Client, encoding: str, granularity: str
) -> None:
    sequence = _sequence()
    policy = dynsplit.policy(
        "snapkv", kept_ratio=0.5, encoding=encoding, scale_granularity=granularity
    )
    found = service.compress(**sequence, policy=policy)
    layer = found.layers[1]
    keys, values = layer.decoded()
    head = np.arange(KV_HEADS)
    assert layer.quantised and layer.tokens.shape == (KV_HEADS, 160)
    step = 2**-4 if encoding == "float8_e4m3" else 1 / 127
    for rows, name in ((keys, "keys"), (values, "values")):
        exact = sequence[name][1][layer.tokens.T, head]
        assert np.abs(rows - exact).max() <= step * np.abs(exact).max()


def test_any_order_of_axes_and_any_kind_of_array(service: Client) -> None:
    sequence = _sequence()
    expected = service.compress(**sequence, policy=POLICY)
    by_head = {
        name: [np.ascontiguousarray(part.transpose(1, 0, 2)) for part in sequence[name]]
        for name in ("keys", "values", "queries")
    }
    views = {name: [part.transpose(1, 0, 2) for part in parts] for name, parts in by_head.items()}
    _assert_equal(service.compress(**(sequence | views), policy=POLICY), expected)
    padded = np.zeros((LAYERS, TOKENS, KV_HEADS, 2 * DIM), np.float32)
    padded[..., :DIM] = sequence["keys"]
    holes = sequence | {"keys": padded[..., :DIM]}
    _assert_equal(service.compress(**holes, policy=POLICY), expected)


def test_bfloat16_as_uint16_and_as_ml_dtypes(service: Client) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    sequence = _sequence()
    exact = {name: sequence[name].astype(ml_dtypes.bfloat16) for name in sequence if name[0] != "t"}
    bits = {name: part.view(np.uint16) for name, part in exact.items()}
    expected = service.compress(**(sequence | exact), policy=POLICY)
    _assert_equal(service.compress(**(sequence | bits), policy=POLICY, dtype="bfloat16"), expected)
    assert expected.layers[0].key_pages.dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match="uint16"):
        service.compress(**(sequence | bits), policy=POLICY)


def test_quantised_input_is_taken_with_its_scales(service: Client) -> None:
    sequence = _sequence()
    scales = np.abs(sequence["keys"]).max(-1) / 127  # [L, T, Hkv]
    codes = np.rint(sequence["keys"] / scales[..., None]).astype(np.int8)
    value_scales = np.abs(sequence["values"]).max(-1) / 127
    value_codes = np.rint(sequence["values"] / value_scales[..., None]).astype(np.int8)
    quantised = {"keys": codes, "key_scales": scales}
    quantised |= {"values": value_codes, "value_scales": value_scales}
    found = service.compress(**(sequence | quantised), policy=POLICY)
    layer = found.layers[2]
    keys, _ = layer.rows()
    np.testing.assert_array_equal(keys, codes[2][layer.tokens[0]])
    decoded, _ = layer.decoded()
    exact = sequence["keys"][2][layer.tokens[0]]
    assert np.abs(decoded - exact).max() <= scales.max() / 2 * 1.001


def test_anything_with_dlpack_will_do(service: Client) -> None:
    class Foreign:
        """As of another array library."""

        def __init__(self, array: npt.NDArray[np.float32]) -> None:
            self._array, self.shape = array, array.shape

        def __dlpack__(self, **options: Any) -> Any:
            return self._array.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self._array.__dlpack_device__()

    sequence = _sequence()
    foreign = {name: [Foreign(part) for part in sequence[name]] for name in ("keys", "values")}
    _assert_equal(
        service.compress(**(sequence | foreign), policy=POLICY),
        service.compress(**sequence, policy=POLICY),
    )


def test_torch_in_torch_out(service: Client) -> None:
    torch = pytest.importorskip("torch")
    sequence = _sequence()
    expected = service.compress(**sequence, policy=POLICY)
    as_torch = {name: torch.from_numpy(sequence[name]) for name in ("keys", "values", "queries")}
    found = service.compress(**(sequence | as_torch), policy=POLICY)
    assert isinstance(found.layers[0].key_pages, torch.Tensor)
    _assert_equal(found, expected)
    half = {name: part.to(torch.bfloat16) for name, part in as_torch.items()}
    rows, _ = service.compress(**(sequence | half), policy=POLICY).layers[0].rows()
    assert rows.dtype == torch.bfloat16


def test_calibration_measures_and_profiles_are_stored(service: Client) -> None:
    sequence = _sequence()
    ids = np.tile([5, 6, 7, 28, 8], 64).astype(np.int32)  # 28 is SmolLM2's comma
    queries = np.random.default_rng(2).standard_normal((LAYERS, TOKENS, Q_HEADS, DIM), np.float32)
    measured = service.calibrate(
        ids, sequence["keys"], queries, np.arange(TOKENS), profile="smollm2"
    )
    comma = next(weight for weight in measured.weights if weight.token_id == 28)
    assert comma.num_occurrences > 10
    measured.name = "measured-here"
    assert not service.put_profile(measured).replaced
    with pytest.raises(errors.ExistsError):
        service.put_profile(measured)
    assert service.put_profile(measured, replace=True).replaced
    assert service.profile("measured-here").weights == measured.weights
    assert "measured-here" in [entry.name for entry in service.profiles()]


def test_server_policies_and_memory_are_told(service: Client) -> None:
    info = service.server_info()
    assert info.backend == "cpu" and info.version
    assert {"dynsplit", "snapkv"} <= {entry.policy.preset for entry in service.policies()}
    assert service.healthy()
    shape = types_pb2.SequenceShape(
        num_layers=2, num_query_heads=4, num_kv_heads=2, num_tokens=100, head_dim=16
    )
    told = service.session_bytes(shape, dtype="float32", policy=dynsplit.index_policy())
    assert told.key_value == 2 * 2 * 2 * 100 * 16 * 4


def test_blocks_propose_as_many_candidates_as_a_policy_says(service: Client) -> None:
    shape = types_pb2.SequenceShape(
        num_layers=2, num_query_heads=4, num_kv_heads=2, num_tokens=100, head_dim=16
    )
    (index,) = (
        entry.policy for entry in service.policies() if entry.policy.preset == "dynsplit_index"
    )
    assert index.scoring.refinement_factor == 4
    refined = dynsplit.policy("dynsplit_index", scoring="block_bound", refinement_factor=3)
    assert service.session_bytes(shape, policy=refined).key_value > 0
    with pytest.raises(errors.InvalidRequestError) as refused:
        service.session_bytes(shape, policy=dynsplit.policy("quest", refinement_factor=17))
    assert refused.value.violations[0].field.endswith("scoring.refinement_factor")


def test_advice_is_a_policy_to_pass_on_or_a_no(daemon: Daemon) -> None:
    shape = types_pb2.SequenceShape(
        num_layers=32, num_query_heads=32, num_kv_heads=8, num_tokens=1 << 17, head_dim=128
    )
    known = [types_pb2.EVIDENCE_WINDOW_QUERIES]
    with Client(daemon.unix) as client:
        slow = client.advise(shape, link_bytes_per_second=1e8, evidence=known)
        assert slow.compress and slow.policy.preset == "dynsplit", slow.reason
        assert slow.compressed_seconds < slow.plain_seconds
        chosen = types_pb2.Policy.FromString(slow.policy.SerializeToString())
        chosen.segmentation.profile = "smollm2"
        assert client.compress(**_sequence(), policy=chosen).plan.policy.preset == "dynsplit"
        strict = client.advise(
            shape, link_bytes_per_second=1e8, evidence=known, max_expected_divergence=1e-3
        )
        assert strict.policy.budget.kept_ratio > slow.policy.budget.kept_ratio
        assert strict.expected_divergence <= 1e-3
        assert not client.advise(shape, link_bytes_per_second=1e15, evidence=known).compress
        with pytest.raises(errors.InvalidRequestError) as refused:
            client.advise(shape)
        assert refused.value.violations[0].field == "link_bytes_per_second"

    async def ask() -> Any:
        async with dynsplit.aio.Client(daemon.unix) as client:
            return await client.advise(shape, link_bytes_per_second=1e8, evidence=known)

    assert asyncio.run(ask()).policy == slow.policy


def test_a_floor_of_divergence_is_a_bound_of_the_error(service: Client) -> None:
    loose = service.compress(**_sequence(), policy=POLICY).receipt
    assert loose is not None and loose.expected_divergence > 0
    wanted = loose.expected_divergence / 2
    floor = types_pb2.Policy.FromString(POLICY.SerializeToString())
    floor.quality_floor.max_expected_divergence = wanted
    held = service.compress(**_sequence(), policy=floor)
    assert held.receipt is not None and held.receipt.expected_divergence <= wanted
    assert held.plan.policy.quality_floor.max_output_relative_error > 0


def test_what_is_kept_can_be_fetched(service: Client) -> None:
    sequence = _sequence()
    found = service.compress(
        **sequence,
        policy=POLICY,
        keep=dynsplit.session_options(reserve_tokens=10),
        session_policy=dynsplit.index_policy(profile="smollm2", shared_by_heads=True),
    )
    assert found.session is not None
    session = found.session.session_id
    whole = service.fetch(session)
    np.testing.assert_array_equal(
        np.stack([layer.rows()[0] for layer in whole.layers]), sequence["keys"]
    )
    part = service.fetch(session, layers=[1, 2], tokens={1: [[3, 70, 200]]})
    assert [layer.layer for layer in part.layers] == [1, 2]
    np.testing.assert_array_equal(part.layers[0].rows()[1], sequence["values"][1][[3, 70, 200]])
    assert part.layers[1].num_kept == TOKENS
    service.release(session)


# -- roads --


@pytest.mark.parametrize("tokens", [TOKENS, 3000])
def test_all_roads_give_the_same_bytes(daemon: Daemon, tokens: int) -> None:
    sequence = _sequence(tokens=tokens)
    found = {}
    for road, target in (
        ("inline", daemon.unix),
        ("unix", [daemon.tcp, daemon.unix]),
        ("tcp", [daemon.tcp, daemon.unix]),
        ("shm", daemon.unix),
        ("memfd", daemon.unix),
        ("auto", daemon.unix),
        ("auto", daemon.tcp),
    ):
        socket = daemon.region_socket if road == "memfd" else ""
        with Client(target, road=road, region_socket=socket) as client:
            found[road, str(target)] = client.compress(**sequence, policy=POLICY)
            again = client.compress(**sequence, policy=POLICY)  # the segment is used again
            _assert_equal(again, found[road, str(target)])
            regions = client.regions()
            assert len(regions) == (again.road in ("shm", "memfd"))
            assert all(region.owned for region in regions)
    with Client(daemon.unix) as client:
        assert not client.regions()  # nothing is left behind
    used = [entry.road for entry in found.values()]
    large = "shm" if tokens == 3000 else None
    assert used == [
        "inline over unix",
        "inline over unix",
        "inline over tcp",
        "shm",
        "memfd",
        large or "inline over unix",
        large or "inline over tcp",
    ]
    first, *others = found.values()
    for other in others:
        _assert_equal(other, first)
    sent = first.bytes_in + sequence["queries"].nbytes + 4 * tokens
    assert [entry.sent_bytes for entry in found.values()] == [
        0 if road in ("shm", "memfd") else sent for road in used
    ]


@pytest.mark.parametrize("road", ["inline", "shm"])
def test_results_may_go_into_a_region(daemon: Daemon, road: Any) -> None:
    sequence = _sequence()
    policy = dynsplit.policy("dynsplit", kept_ratio=0.4, profile="smollm2", encoding="int8")
    with Client(daemon.unix, road=road) as client:
        expected = client.compress(**sequence, policy=policy)
        with HostRegion(client, 1 << 20) as room, HostRegion(client, 4096) as small:
            found = client.compress(**sequence, policy=policy, output=room)
            assert np.shares_memory(found.layers[1].key_pages, room.array("u1", 1 << 20))
            assert found.received_bytes == expected.block_starts.nbytes
            _assert_equal(found, expected)
            for one, other in zip(found.layers, expected.layers, strict=True):
                np.testing.assert_array_equal(one.value_scales, other.value_scales)
            with pytest.raises(errors.InvalidRequestError, match="output"):
                client.compress(**sequence, policy=policy, output=small)


def test_a_segment_that_the_server_lost_is_registered_anew(daemon: Daemon) -> None:
    sequence = _sequence()
    with Client(daemon.unix, road="shm") as client:
        expected = client.compress(**sequence, policy=POLICY)
        for region in client.regions():
            client.unregister_region(region.name)
        _assert_equal(client.compress(**sequence, policy=POLICY), expected)


def test_memory_that_cannot_be_shared_costs_the_road_only(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = _sequence(tokens=3000)

    def elsewhere(self: SharedMemory, *, renew: bool) -> Any:  # as from another container
        return {"shm_key": "not-here"}

    monkeypatch.setattr(SharedMemory, "source", elsewhere)
    with Client(daemon.unix) as client:
        assert client.compress(**sequence, policy=POLICY).road == "inline over unix"
    with Client(daemon.unix, road="shm") as client, pytest.raises(errors.NotFoundError):
        client.compress(**sequence, policy=POLICY)
    with Client(daemon.unix, road="cuda-ipc") as client, pytest.raises(errors.UnsupportedError):
        client.compress(**sequence, policy=POLICY)


@pytest.mark.parametrize("road", ["inline", "shm"])
def test_threads_share_a_client(daemon: Daemon, road: Any) -> None:
    sequences = [_sequence(seed) for seed in range(12)]
    with Client(daemon.unix, road=road) as client, futures.ThreadPoolExecutor(6) as threads:
        expected = [client.compress(**sequence, policy=POLICY) for sequence in sequences]
        again = threads.map(lambda entry: client.compress(**entry, policy=POLICY), sequences)
        for one, other in zip(again, expected, strict=True):
            _assert_equal(one, other)


def test_addresses_are_chosen_by_road(tmp_path: Path) -> None:
    there = tmp_path / "there.sock"
    there.touch()
    both = ["10.0.0.1:8001", f"unix:{there}"]
    assert Client(both).target == f"unix:{there}"
    assert Client(both, road="tcp").target == "10.0.0.1:8001"
    assert Client(["unix:/nowhere.sock", "10.0.0.1:8001"]).target == "10.0.0.1:8001"
    with pytest.raises(ValueError, match="unix"):
        Client("10.0.0.1:8001", road="unix")


def test_sealed_memory_is_chosen_where_its_socket_is_named(daemon: Daemon) -> None:
    sequence = _sequence(tokens=3000)
    with Client(daemon.unix, region_socket=daemon.region_socket) as client:
        found = client.compress(**sequence, policy=POLICY)
        assert found.road == "memfd"
        assert [r.kind for r in client.regions()] == [memory_pb2.Region.KIND_MEMFD]
        for region in client.regions():  # as after a restart: passed and registered anew
            client.unregister_region(region.name)
        _assert_equal(client.compress(**sequence, policy=POLICY), found)
        with HostRegion(client, 1 << 20, region_socket=daemon.region_socket) as room:
            room.renew()
            _assert_equal(client.compress(**sequence, policy=POLICY, output=room), found)
    with Client(daemon.unix, region_socket="/nowhere.sock") as client:
        assert client.compress(**sequence, policy=POLICY).road == "shm"
    with (
        Client(daemon.unix, road="memfd", region_socket="/nowhere.sock") as client,
        pytest.raises(OSError, match="nowhere"),
    ):
        client.compress(**sequence, policy=POLICY)
    with pytest.raises(ValueError, match="region_socket"):
        Client(daemon.unix, road="memfd")
    with pytest.raises(errors.UnavailableError, match="nowhere"):
        SharedMemory(1, "/nowhere.sock").source()


def _eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_regions_go_with_their_owner(daemon: Daemon) -> None:
    with Client(daemon.unix) as client, HostRegion(client, 4096) as stays:
        with client.attach() as owner, client.attach() as other:
            assert owner.attached and len(owner.token) == 16 and owner.token != other.token
            goes = HostRegion(client, 4096, owner=owner)
            goes.renew()
            key = SharedMemory(4096)
            with pytest.raises(errors.ExistsError):
                client.register_region(goes.place.name, 4096, **key.source(), owner=other)
            key.close()
            assert len(client.regions()) == 2
        assert not owner.attached
        assert _eventually(lambda: len(client.regions()) == 1)
        assert client.regions()[0].name == stays.place.name
        goes.close()  # that it has gone is no error
        with pytest.raises(errors.NotFoundError):
            HostRegion(client, 4096, owner=owner)


def test_a_client_that_is_killed_leaves_no_region(daemon: Daemon) -> None:
    code = f"""
import numpy as np, os, dynsplit
client = dynsplit.Client({daemon.unix!r}, road="shm")
keys = np.ones((1, 64, 2, 16), np.float32)
client.compress(None, keys, keys, policy=dynsplit.policy("knorm", kept_ratio=0.5))
assert len(client.regions()) == 1
for name in os.listdir("/dev/shm"):
    if name == client._stage._idle[0].memory.key:
        os.unlink("/dev/shm/" + name)
print("shared", flush=True)
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "shared\n" and ended.returncode == -9, ended.stderr
    with Client(daemon.unix) as client:
        assert _eventually(lambda: not client.regions())


@pytest.mark.parametrize("channels", [2, 4])
def test_a_request_over_several_streams_is_the_same_request(
    daemon: Daemon, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_MIN_SHARD_BYTES", 64 << 10)
    made: list[int] = []
    conversation = streams.Conversation.__init__

    def counting(self: Any, begin: Any, inputs: Any, wire: Any, shards: int, *more: Any) -> None:
        made.append(shards)
        conversation(self, begin, inputs, wire, shards, *more)

    monkeypatch.setattr(streams.Conversation, "__init__", counting)
    sequence = _sequence(tokens=3000)
    policy = dynsplit.policy("dynsplit", kept_ratio=0.5, profile="smollm2")
    index = dynsplit.index_policy(profile="smollm2")
    options: dict[str, Any] = {"road": "inline", "chunk_bytes": 8192}

    def run_all(client: Any) -> list[Any]:
        ids, keys, values, queries = sequence.values()
        planned = client.plan(ids, keys=keys, queries=queries, policy=policy)
        stored = client.open(ids, keys, values, num_query_heads=Q_HEADS, policy=index)
        found = [
            client.compress(**sequence, policy=policy),
            planned,
            client.apply(planned, keys, values),
            client.fetch(stored.session_id),
        ]
        client.release(stored.session_id)
        return found

    with Client(daemon.unix, **options) as client:
        expected = run_all(client)
    assert set(made) == {1}
    made.clear()
    with Client([daemon.tcp], num_channels=channels, **options) as client:
        found = run_all(client)
        assert made == [channels] * 5
        with pytest.raises(errors.NotFoundError):
            client.compress(**sequence, policy="nothing")
        threads = futures.ThreadPoolExecutor(4)
        again = threads.map(lambda _: client.compress(**sequence, policy=policy), range(6))
        for one in again:
            _assert_equal(one, expected[0])

    async def run() -> list[Any]:
        async with dynsplit.aio.Client(daemon.tcp, num_channels=channels, **options) as client:
            calls = [client.compress(**sequence, policy=policy) for _ in range(4)]
            with pytest.raises(errors.NotFoundError):
                await client.compress(**sequence, policy="nothing")
            return list(await asyncio.gather(*calls))

    awaited = asyncio.run(run())
    for one, other in zip([*found, *awaited], [*expected, *([expected[0]] * 4)], strict=True):
        assert one.plan.hash == other.plan.hash
        for a, b in zip(one.layers, other.layers, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            if b.key_pages is not None:
                np.testing.assert_array_equal(a.key_pages, b.key_pages)
                np.testing.assert_array_equal(a.value_pages, b.value_pages)
        assert (one.sent_bytes, one.received_bytes) == (other.sent_bytes, other.received_bytes)


@pytest.mark.parametrize("channels", [1, 3])
def test_layers_are_delivered_as_they_come(
    daemon: Daemon, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_MIN_SHARD_BYTES", 64 << 10)
    sequence = _sequence(tokens=3000)
    seen: list[dynsplit.CompressedLayer] = []
    with Client(daemon.tcp, road="inline", num_channels=channels) as client:
        found = client.compress(**sequence, policy=POLICY, on_layer=seen.append)
        _, keys, values, _ = sequence.values()
        client.apply(found, keys, values, on_layer=seen.append)
        assert [layer.layer for layer in seen] == [0, 1, 2, 0, 1, 2]
        for layer, wanted in zip(seen, [*found.layers, *found.layers], strict=True):
            np.testing.assert_array_equal(layer.tokens, wanted.tokens)
            np.testing.assert_array_equal(layer.key_pages, wanted.key_pages)

        def refuses(layer: dynsplit.CompressedLayer) -> None:
            raise LookupError("not wanted")

        with pytest.raises(LookupError, match="not wanted"):
            client.compress(**sequence, policy=POLICY, on_layer=refuses)

    async def run() -> None:
        seen.clear()
        async with dynsplit.aio.Client(daemon.tcp, road="inline", num_channels=channels) as client:
            await client.compress(**sequence, policy=POLICY, on_layer=seen.append)
            with pytest.raises(LookupError, match="not wanted"):
                await client.compress(**sequence, policy=POLICY, on_layer=refuses)

    asyncio.run(run())
    assert [layer.layer for layer in seen] == [0, 1, 2]


def test_options_of_streams_are_kept(service: Client) -> None:
    with pytest.raises(ValueError, match="num_channels"):
        Client(service.target, num_channels=65)
    with pytest.raises(ValueError, match="chunk_bytes"):
        Client(service.target, chunk_bytes=4095)
    with Client(service.target, max_open_layers=9, chunk_bytes=4096) as client:
        _assert_equal(
            client.compress(**_sequence(), policy=POLICY),
            service.compress(**_sequence(), policy=POLICY),
        )
    with (
        Client(service.target, max_result_bytes=1000) as client,
        pytest.raises(errors.ExhaustedError, match="max_result_bytes"),
    ):
        client.compress(**_sequence(), policy=POLICY)


@pytest.mark.parametrize("road", ["inline", "shm"])
def test_pools_of_pages_and_packed_tensors_are_read_as_they_lie(daemon: Daemon, road: Any) -> None:
    sequence = _sequence()
    ids, keys, values, queries = sequence.values()
    page, spare = 16, 7
    table = np.random.default_rng(8).permutation(TOKENS // page + spare)[: TOKENS // page]
    pools = np.full((2, LAYERS, TOKENS // page + spare, page, KV_HEADS, DIM), 9.0, np.float32)
    for pool, rows in zip(pools, (keys, values), strict=True):
        pool[:, table] = rows.reshape(LAYERS, -1, page, KV_HEADS, DIM)
    paged = ("page", "token", "head", "channel")
    with Client(daemon.unix, road=road) as client:
        expected = client.compress(**sequence, policy=POLICY)
        arguments: dict[str, Any] = {"queries": queries, "policy": POLICY, "block_table": table}
        apart = [[AxisTensor(pool[i], paged) for i in range(LAYERS)] for pool in pools]
        _assert_equal(client.compress(ids, *apart, **arguments), expected)
        both = [AxisTensor(pools[:, i].copy(), ("kv", *paged)) for i in range(LAYERS)]
        _assert_equal(client.compress(ids, both, None, **arguments), expected)
        packed = np.stack([keys, values], axis=2)  # [L, T, 2, Hkv, D]
        rows = [AxisTensor(part, ("token", "kv", "head", "channel")) for part in packed]
        _assert_equal(client.compress(ids, rows, None, queries=queries, policy=POLICY), expected)
        planned = client.plan(ids, keys=apart[0], queries=queries, policy=POLICY, block_table=table)
        applied = client.apply(planned, both, None, block_table=table)
        np.testing.assert_array_equal(applied.layers[2].key_pages, expected.layers[2].key_pages)
        session = client.open(
            ids,
            both,
            None,
            num_query_heads=Q_HEADS,
            policy=dynsplit.index_policy(profile="smollm2"),
            block_table=table,
        ).session_id
        np.testing.assert_array_equal(client.fetch(session).layers[1].rows()[1], values[1])
        gathered = client.select([dynsplit.Step(session, queries[:, :1], gather=dynsplit.Gather())])
        assert gathered[0].moved[0].keys.dtype == np.float32
        client.release(session)
    with pytest.raises(ValueError, match="values"):
        service_free = Client(daemon.unix)
        service_free.compress(ids, both, values, **arguments)
    with pytest.raises(ValueError, match="num_tokens"):
        service_free.compress(None, both, None, queries=queries, block_table=table)
    with pytest.raises(ValueError, match="channel"):
        AxisTensor(keys[0], ("channel", "token", "head"))
    service_free.close()


# -- errors, retries, fail-open --


def test_errors_name_what_is_wrong(service: Client) -> None:
    sequence = _sequence()
    with pytest.raises(errors.InvalidRequestError) as wrong:
        service.compress(**sequence, policy=dynsplit.policy(kept_ratio=1.5, profile="smollm2"))
    assert any("kept_ratio" in entry.field for entry in wrong.value.violations)
    with pytest.raises(errors.NotFoundError) as unknown:
        service.compress(**sequence, policy="nothing-of-the-kind")
    assert unknown.value.resource == "nothing-of-the-kind"
    ids, keys, values, _ = sequence.values()
    with pytest.raises(errors.PreconditionError) as missing:
        service.compress(ids, keys, values, policy="snapkv")
    assert missing.value.reason == "EVIDENCE_MISSING"
    fallen = service.compress(
        ids,
        keys,
        values,
        policy=dynsplit.policy("dynsplit", allow_fallback=True, kept_ratio=0.5, profile="smollm2"),
    )
    assert fallen.plan.fallback_preset == "dynsplit_keys"
    with pytest.raises(ValueError, match="layers"):
        service.compress(ids, keys, values[:2])
    with pytest.raises(ValueError, match="none of"):
        dynsplit.policy(scope="planet")


class _Stuck(compression_pb2_grpc.CompressionServicer):
    """Takes a request and does not answer until it is over."""

    def __init__(self) -> None:
        self.begun, self.over = threading.Event(), threading.Event()

    def Compress(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:  # noqa: N802
        context.add_callback(self.over.set)
        next(requests)
        self.begun.set()
        self.over.wait(20)
        yield from ()


def test_a_deadline_is_kept(tmp_path: Path) -> None:
    stuck, address = _Stuck(), f"unix:{tmp_path}/stuck.sock"
    server = _serve(stuck, address)
    begin = time.monotonic()
    with Client(address, road="inline") as client, pytest.raises(errors.DeadlineError):
        client.compress(**_sequence(), policy=POLICY, timeout_seconds=0.3)
    assert 0.25 < time.monotonic() - begin < 5
    assert stuck.over.wait(5)  # the server was told
    server.stop(None)


class _Busy(compression_pb2_grpc.CompressionServicer):
    """Refuses some calls before it passes the others on."""

    def __init__(self, target: str, refusals: list[tuple[grpc.StatusCode, float | None]]) -> None:
        self.times: list[float] = []
        self._refusals = refusals
        self._next = compression_pb2_grpc.CompressionStub(grpc.insecure_channel(target))

    def Compress(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.times.append(time.monotonic())
        if len(self.times) <= len(self._refusals):
            next(requests)  # as admission does, which needs to know what to refuse
            code, delay = self._refusals[len(self.times) - 1]
            if delay is None:
                context.abort(code, "away")
            seconds = {"seconds": int(delay), "nanos": round(delay % 1 * 1e9)}
            refuse(context, code, "queue full", detail("RetryInfo", retry_delay=seconds))
        yield from self._next.Compress(requests)


def _serve(servicer: _Busy | _Stuck, address: str) -> grpc.Server:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    compression_pb2_grpc.add_CompressionServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    server.start()
    return server


_FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
_AWAY = grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("refusals", "options", "tries", "error"),
    [
        ([(_FULL, 0.2), (_AWAY, 0.1)], {}, 3, None),
        ([(_AWAY, None)], {}, 2, None),
        ([(_FULL, None)], {}, 1, errors.ExhaustedError),  # no hint: trying again is no use
        ([(_FULL, 0.01)] * 9, {}, 4, errors.ExhaustedError),
        ([(_FULL, 60.0)], {}, 1, errors.ExhaustedError),  # longer than anyone waits
        ([(_FULL, 2.0)], {"timeout_seconds": 1.0}, 1, errors.ExhaustedError),
        ([(_FULL, 0.1)], {"keep": dynsplit.session_options()}, 2, None),
        ([(_AWAY, None)], {"keep": dynsplit.session_options()}, 1, errors.UnavailableError),
    ],
)
def test_retries_are_bounded_and_follow_the_server(
    daemon: Daemon,
    tmp_path: Path,
    refusals: list[tuple[grpc.StatusCode, float | None]],
    options: dict[str, Any],
    tries: int,
    error: type[errors.DynSplitError] | None,
) -> None:
    for kind in ("sync", "async"):
        busy = _Busy(daemon.unix, refusals)
        address = f"unix:{tmp_path}/{kind}.sock"
        server = _serve(busy, address)

        def call(kind: str = kind, address: str = address) -> Compressed:
            arguments = _sequence() | options
            policies = {
                "policy": POLICY,
                "session_policy": dynsplit.index_policy(profile="smollm2"),
            }
            if kind == "sync":
                with Client(address, road="inline") as client:
                    return client.compress(**arguments, **policies)

            async def run() -> Compressed:
                async with dynsplit.aio.Client(address, road="inline") as client:
                    return await client.compress(**arguments, **policies)

            return asyncio.run(run())

        if error is None:
            assert call().layers[0].num_kept == 80
        else:
            with pytest.raises(error) as raised:
                call()
            assert raised.value.retry_after_seconds == refusals[0][1]
        assert len(busy.times) == tries
        for (_, delay), waited in zip(refusals, np.diff(busy.times), strict=False):
            assert waited >= (delay or 0.1)
        server.stop(None)


def test_passthrough_returns_the_callers_own_tensors(tmp_path: Path) -> None:
    sequence = _sequence()
    nowhere = f"unix:{tmp_path}/none.sock"
    with Client(nowhere, retry=Retry(attempts=1), on_error="passthrough") as client:
        with pytest.warns(dynsplit.PassthroughWarning, match="UNAVAILABLE") as seen:
            found = client.compress(**sequence, policy=POLICY)
        assert seen[0].filename == __file__
        with pytest.raises(errors.UnavailableError):
            client.compress(**sequence, policy=POLICY, on_error="raise")
        with pytest.raises(errors.UnavailableError):
            client.server_info()
    assert found.passed_through and isinstance(found.error, errors.UnavailableError)
    for layer in found.layers:
        keys, values = layer.rows()
        assert np.shares_memory(keys, sequence["keys"]) and keys.shape == (TOKENS, KV_HEADS, DIM)
        np.testing.assert_array_equal(values, sequence["values"][layer.layer])
    assert not found.representation_salt and not found.contiguous


def test_passthrough_does_not_hide_the_callers_mistakes(service: Client) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(errors.NotFoundError):
            service.compress(**_sequence(), policy="nothing", on_error="passthrough")


def test_a_broken_fetch_goes_on(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = _sequence()
    with Client(daemon.unix) as client:
        session = client.open(
            sequence["token_ids"],
            sequence["keys"],
            sequence["values"],
            num_query_heads=Q_HEADS,
            policy=dynsplit.index_policy(profile="smollm2"),
        ).session_id
        expected = client.fetch(session)
        take, calls = streams.Conversation.take, []

        def breaks(self: streams.Conversation, message: Any) -> None:
            if message.HasField("accepted"):
                calls.append(self._begin.target.resume.layer)
            if message.HasField("layer") and len(calls) == message.layer.plan.layer:
                raise errors.UnavailableError("connection lost", code="UNAVAILABLE")
            take(self, message)

        monkeypatch.setattr(streams.Conversation, "take", breaks)
        found = client.fetch(session)
        assert calls == [0, 0, 1]
        for one, other in zip(found.layers, expected.layers, strict=True):
            assert one.layer == other.layer
            np.testing.assert_array_equal(one.key_pages, other.key_pages)
            np.testing.assert_array_equal(one.value_pages, other.value_pages)


# -- asyncio --


@pytest.mark.parametrize("road", ["inline", "shm"])
def test_asyncio_runs_calls_side_by_side(daemon: Daemon, road: Any) -> None:
    sequences = [_sequence(seed) for seed in range(8)]
    with Client(daemon.unix) as client:
        expected = [client.compress(**sequence, policy=POLICY) for sequence in sequences]

    async def run() -> list[Compressed]:
        async with dynsplit.aio.Client(daemon.unix, road=road) as client:
            assert await client.healthy()
            calls = [client.compress(**sequence, policy=POLICY) for sequence in sequences]
            found = await asyncio.gather(*calls)
            stored = await client.open(
                sequences[0]["token_ids"],
                sequences[0]["keys"],
                sequences[0]["values"],
                num_query_heads=Q_HEADS,
                policy=dynsplit.index_policy(profile="smollm2", kept_ratio=0.25),
            )
            steps = [dynsplit.Step(stored.session_id, sequences[0]["queries"][:, :1])]
            chosen = (await client.select(steps))[0].tokens
            assert chosen is not None and chosen.shape == (LAYERS, KV_HEADS, 80)
            with pytest.raises(errors.NotFoundError):
                await client.get("nobody")
            await client.release(stored.session_id)
            return found

    for one, other in zip(asyncio.run(run()), expected, strict=True):
        _assert_equal(one, other)


def test_asyncio_has_owners_and_regions(daemon: Daemon) -> None:
    sequence = _sequence()

    async def run() -> None:
        async with dynsplit.aio.Client(daemon.unix) as client:
            expected = await client.compress(**sequence, policy=POLICY)
            with await client.attach() as owner:
                memories = [
                    SharedMemory(1 << 20),
                    SharedMemory(1 << 20, daemon.region_socket),
                ]
                for memory in memories:
                    async with dynsplit.aio.Region(client, memory, owner=owner) as room:
                        await room.renew()
                        assert [region.owned for region in await client.regions()] == [True]
                        found = await client.compress(**sequence, policy=POLICY, output=room)
                        _assert_equal(found, expected)
                    assert not await client.regions()
                async with dynsplit.aio.Region(client, SharedMemory(4096), owner=owner):
                    owner.close()
                    for _ in range(200):
                        if not await client.regions():
                            break
                        await asyncio.sleep(0.02)
                    assert not await client.regions() and not owner.attached
        async with dynsplit.aio.Client(f"{daemon.unix}.none", timeout_seconds=3) as nobody:
            with pytest.raises(errors.UnavailableError):
                await nobody.attach()

    asyncio.run(run())


def test_cancelling_a_task_cancels_its_call(tmp_path: Path) -> None:
    stuck, address = _Stuck(), f"unix:{tmp_path}/stuck.sock"
    server = _serve(stuck, address)

    async def run() -> None:
        async with dynsplit.aio.Client(address, road="inline") as client:
            task = asyncio.ensure_future(client.compress(**_sequence(), policy=POLICY))
            assert await asyncio.to_thread(stuck.begun.wait, 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert stuck.over.wait(5)
    server.stop(None)


# -- files --


def test_containers_survive_the_round_trip_and_no_flipped_bit(
    service: Client, tmp_path: Path
) -> None:
    sequence = _sequence()
    policy = dynsplit.policy("dynsplit", kept_ratio=0.3, profile="smollm2", encoding="int8")
    found = service.compress(**sequence, policy=policy)
    path = tmp_path / "x.dskv"
    found.save(path, token_ids=sequence["token_ids"], metadata={"model": "random"})
    loaded, file = dynsplit.load(path)
    assert loaded.plan == found.plan and loaded.receipt == found.receipt
    assert loaded.representation_salt == found.representation_salt
    assert dict(file.header.metadata) == {"model": "random"}
    np.testing.assert_array_equal(file.find("TOKEN_IDS"), sequence["token_ids"])
    for one, other in zip(loaded.layers, found.layers, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        for a, b in zip(one.decoded(), other.decoded(), strict=True):
            np.testing.assert_array_equal(a, b)
    good = path.read_bytes()
    random = np.random.default_rng(4)
    for position in [*range(64), *random.integers(64, len(good), 200)]:
        bad = bytearray(good)
        bad[position] ^= 1 << int(random.integers(8))
        path.write_bytes(bad)
        with pytest.raises((errors.DataLossError, ValueError)):
            container.read(path)
    for length in (0, 7, 31, 40, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises((errors.DataLossError, ValueError)):
            container.read(path)


def _cli() -> Path:
    beside = Path(os.environ.get("DYNSPLITD", _ROOT / "build/dev/server/dynsplitd"))
    return Path(os.environ.get("DYNSPLIT_CLI", beside.parents[1] / "client/cli/dynsplit"))


def test_files_are_those_of_the_command_line(daemon: Daemon, tmp_path: Path) -> None:
    if not _cli().exists():
        pytest.skip("no dynsplit command line: set DYNSPLIT_CLI")
    sample = _ROOT / "tests/data/sample/prose.safetensors"
    theirs, ours = tmp_path / "theirs.dskv", tmp_path / "ours.dskv"
    command = [_cli(), "compress", sample, "--target", daemon.unix, "--ratio", "0.2"]
    command += ["--profile", "smollm2", "--encoding", "float8-e4m3", "-o", theirs, "-q"]
    subprocess.run(command, check=True)
    loaded, file = dynsplit.load(theirs)
    captured = _Capture(sample)
    with Client(daemon.unix) as client:
        found = client.compress(
            captured.token_ids,
            captured.keys,
            captured.values,
            queries=captured.queries,
            policy=dynsplit.policy(kept_ratio=0.2, profile="smollm2", encoding="float8_e4m3"),
            rope=captured.rope,
        )
    _assert_equal(found, loaded)
    found.save(ours, token_ids=captured.token_ids, metadata=dict(file.header.metadata))
    assert ours.read_bytes() == theirs.read_bytes()


class _Capture:
    """A kv-capture/1 file."""

    def __init__(self, path: Path) -> None:
        import json

        from safetensors import safe_open

        with safe_open(path, "np") as file:
            model = json.loads(file.metadata()["dynsplit.model"])
            self.token_ids: npt.NDArray[np.int32] = file.get_tensor("token_ids")
            parts = [
                [file.get_tensor(f"layers.{i}.{name}") for i in range(len(model["layer_ids"]))]
                for name in ("key", "value", "query")
            ]
        self.keys, self.values, self.queries = parts
        self.rope = types_pb2.Rope(**model["rope"])


def test_strides_say_what_is_dense() -> None:
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for view, dense in (
        (base, True),
        (base.transpose(1, 0, 2), True),
        (base.transpose(2, 1, 0), False),  # the channel must be innermost
        (base[:, ::2], False),
        (base[::-1], False),
        (np.broadcast_to(base[:1], (5, 3, 4)), False),
    ):
        host = tensors.HostTensor(view, "float32")
        assert (host.dense_strides() is not None) == dense
        order = np.sort(host.flat_bytes().view(np.float32))
        np.testing.assert_array_equal(order, np.sort(view.reshape(-1)))


def test_the_readme_works(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every example but those of transformers, one after the other."""
    readme = (_ROOT / "client/python/README.md").read_text()
    blocks = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    blocks = [block for block in blocks if "dynsplit.hf" not in block]
    assert len(blocks) == 4
    monkeypatch.setenv("DYNSPLIT_TARGET", daemon.tcp)
    scope: dict[str, Any] = {}
    exec(blocks[0], scope)
    assert scope["keys"].shape == (409, 2, 64)
    assert capsys.readouterr().out.startswith("shm 8388608 ")
    for block in blocks[1:]:
        exec(block, scope)
    assert scope["chosen"].tokens.shape == (4, 2, 204)
    pages = scope["result"].layers[0].key_pages
    np.testing.assert_array_equal(pages, scope["results"][3].layers[0].key_pages)

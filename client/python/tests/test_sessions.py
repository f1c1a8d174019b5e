# SPDX-License-Identifier: Apache-2.0
"""The client of sessions: streams, selections, regions, errors."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fake_service import FakeService, serve

from dynsplit import errors, tensors
from dynsplit.sessions import Gather, SessionClient, Step, Stored, index_policy, tensor_at
from dynsplit.shared import HostRegion

LAYERS, Q_HEADS, KV_HEADS, DIM = 3, 4, 2, 16


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Random token ids, keys and values."""

    ids: npt.NDArray[np.int32]
    keys: list[npt.NDArray[np.float32]]
    values: list[npt.NDArray[np.float32]]


def _sequence(tokens: int, seed: int = 1) -> Sequence:
    random = np.random.default_rng(seed)
    kv = random.standard_normal((2, LAYERS, tokens, KV_HEADS, DIM), np.float32)
    return Sequence(random.integers(0, 64, tokens, np.int32), list(kv[0]), list(kv[1]))


def _open(client: SessionClient, sequence: Sequence, **options: Any) -> Stored:
    policy = index_policy(profile="smollm2", kept_ratio=0.25)
    return client.open(
        sequence.ids,
        sequence.keys,
        sequence.values,
        num_query_heads=Q_HEADS,
        policy=policy,
        **options,
    )


def _queries(seed: int = 5, layers: int = LAYERS) -> npt.NDArray[np.float32]:
    random = np.random.default_rng(seed)
    return random.standard_normal((layers, 1, Q_HEADS, DIM), np.float32)


def test_crc32c_has_its_check_value_and_continues() -> None:
    assert tensors.crc32c(b"123456789") == 0xE3069283
    assert tensors.crc32c(b"6789", tensors.crc32c(b"12345")) == 0xE3069283
    assert tensors.crc32c(b"") == 0


def test_what_is_opened_is_what_the_server_holds(fake: tuple[FakeService, SessionClient]) -> None:
    service, client = fake
    sequence = _sequence(333)  # many chunks: the stand-in takes 4096 bytes a piece
    stored = _open(client, sequence, reserve_tokens=40)
    held = service.sessions[stored.session_id]
    np.testing.assert_array_equal(np.stack(held.keys), np.stack(sequence.keys))
    np.testing.assert_array_equal(np.stack(held.values), np.stack(sequence.values))
    np.testing.assert_array_equal(stored.block_starts, [*range(0, 333, 16), 333])
    more = _sequence(40, seed=2)
    appended = client.append(stored.session_id, 333, more.ids, more.keys, more.values)
    assert appended.info.shape.num_tokens == 373
    np.testing.assert_array_equal(held.keys[1][333:], more.keys[1])
    np.testing.assert_array_equal(held.values[2][333:], more.values[2])


def test_select_chooses_within_the_budget(client: SessionClient) -> None:
    stored = _open(client, _sequence(320))
    chosen = client.select([Step(stored.session_id, _queries(), tokens_per_head=80)])[0]
    assert chosen.tokens is not None
    assert chosen.tokens.shape == (LAYERS, KV_HEADS, 80)
    assert (np.diff(chosen.tokens, axis=-1) > 0).all()
    assert np.isin(np.r_[0:4, 312:320], chosen.tokens[1, 1]).all()
    default = client.select([Step(stored.session_id, _queries())])[0]
    np.testing.assert_array_equal(default.tokens, chosen.tokens)
    part = client.select(
        [Step(stored.session_id, _queries()[1:], first_layer=1, with_scores=True)]
    )[0]
    np.testing.assert_array_equal(part.tokens, chosen.tokens[1:])
    assert len(part.scores) == LAYERS - 1 and part.scores[0].shape[0] == KV_HEADS


def test_slots_follow_the_chosen_tokens(client: SessionClient) -> None:
    sequence = _sequence(320)
    session = _open(client, sequence).session_id
    keys = np.full((LAYERS, KV_HEADS, 80, DIM), np.nan, np.float32)
    values = keys.copy()
    generation, total = 0, []
    for seed in (5, 5, 6):
        chosen = client.select(
            [Step(session, _queries(seed), tokens_per_head=80, gather=Gather(generation))]
        )[0]
        generation = chosen.generation
        total.append(chosen.moved_rows)
        head = np.arange(KV_HEADS)[:, None]
        for layer, rows in enumerate(chosen.moved):
            keys[layer][head, rows.slots] = rows.keys
            values[layer][head, rows.slots] = rows.values
        assert chosen.held is not None
        np.testing.assert_array_equal(np.sort(chosen.held, axis=-1), chosen.tokens)
        for layer in range(LAYERS):
            np.testing.assert_array_equal(
                keys[layer], sequence.keys[layer][chosen.held[layer], head]
            )
            np.testing.assert_array_equal(
                values[layer], sequence.values[layer][chosen.held[layer], head]
            )
    assert total[0] == LAYERS * KV_HEADS * 80 and total[1] == 0 and 0 < total[2] < total[0]


def test_regions_carry_queries_tokens_and_rows(client: SessionClient) -> None:
    sequence, tokens, count = _sequence(320), 320, 80
    row_bytes = LAYERS * KV_HEADS * count * DIM * 4
    layer_bytes = tokens * KV_HEADS * DIM * 4
    with (
        HostRegion(client, 2 * LAYERS * layer_bytes) as source,
        HostRegion(client, 2 * row_bytes + 65536) as slots,
    ):
        source.array(np.float32, 2, LAYERS, tokens, KV_HEADS, DIM)[:] = [
            sequence.keys,
            sequence.values,
        ]
        placed = [
            tensor_at(source.place.at(i * layer_bytes), "float32", tokens, KV_HEADS, DIM)
            for i in range(2 * LAYERS)
        ]
        session = client.open(
            sequence.ids,
            placed[:LAYERS],
            placed[LAYERS:],
            num_query_heads=Q_HEADS,
            policy=index_policy(profile="smollm2"),
        ).session_id
        inline = client.select([Step(session, _queries(), tokens_per_head=count)])[0]
        ends = np.cumsum([row_bytes, row_bytes, 16384, 16384])
        values_at, queries_at, tokens_at, held_at = (int(end) for end in ends)
        slots.array(np.float32, LAYERS, 1, Q_HEADS, DIM, offset_bytes=queries_at)[:] = _queries()
        found = client.select(
            [
                Step(
                    session,
                    tensor_at(slots.place.at(queries_at), "float32", LAYERS, 1, Q_HEADS, DIM),
                    tokens_per_head=count,
                    token_region=slots.place.at(tokens_at),
                    gather=Gather(
                        keys=slots.place,
                        values=slots.place.at(values_at),
                        held=slots.place.at(held_at),
                    ),
                )
            ]
        )[0]
        assert found.tokens is None and not found.moved
        shape = (LAYERS, KV_HEADS, count)
        np.testing.assert_array_equal(
            slots.array(np.int32, *shape, offset_bytes=tokens_at), inline.tokens
        )
        held = slots.array(np.int32, *shape, offset_bytes=held_at)
        rows = slots.array(np.float32, *shape, DIM, offset_bytes=values_at)
        head = np.arange(KV_HEADS)[:, None]
        for layer in range(LAYERS):
            np.testing.assert_array_equal(rows[layer], sequence.values[layer][held[layer], head])


def test_errors_carry_code_reason_and_fields(client: SessionClient) -> None:
    with pytest.raises(errors.NotFoundError) as unknown:
        client.get("nobody")
    assert (unknown.value.code, unknown.value.reason) == ("NOT_FOUND", "SESSION_UNKNOWN")
    session = _open(client, _sequence(64), reserve_tokens=8).session_id
    with pytest.raises(errors.InvalidRequestError) as wrong:
        client.select([Step(session, _queries(), tokens_per_head=65)])
    assert any("tokens_per_head" in entry.field for entry in wrong.value.violations)
    more = _sequence(8)
    with pytest.raises(errors.PreconditionError) as moved:
        client.append(session, 63, more.ids, more.keys, more.values)
    assert moved.value.reason == "APPEND_POSITION"
    assert client.release(session) > 0
    assert client.release(session) == 0
    with pytest.raises(errors.NotFoundError) as gone:
        client.renew(session)
    assert gone.value.reason == "SESSION_RELEASED"


def test_a_refused_stream_sends_no_chunks(fake: tuple[FakeService, SessionClient]) -> None:
    service, client = fake
    sequence = _sequence(32)
    with pytest.raises(errors.InvalidRequestError, match=r"shape\.num_query_heads") as refused:
        client.open(sequence.ids, sequence.keys, sequence.values, num_query_heads=3)
    assert refused.value.violations[0].field == "shape.num_query_heads"
    assert not service.sessions


def test_damaged_results_are_data_loss(tmp_path: Path) -> None:
    server = serve(FakeService(corrupt_results=True), f"unix:{tmp_path}/bad.sock")
    with SessionClient(f"unix:{tmp_path}/bad.sock") as client:
        with pytest.raises(errors.DataLossError, match="tensor 1 at offset 0"):
            _open(client, _sequence(64))
    server.stop(None)


def test_no_server_is_unavailable(tmp_path: Path) -> None:
    with SessionClient(f"unix:{tmp_path}/none.sock", timeout_seconds=5) as client:
        with pytest.raises(errors.UnavailableError):
            client.get("x")


def test_wrong_queries_are_refused_here() -> None:
    with pytest.raises(ValueError, match=re.escape("[num_layers, W, Hq, D]")):
        Step("s", _queries()[0]).to_proto()
    with pytest.raises(ValueError, match="float64"):
        Step("s", _queries().astype(np.float64)).to_proto()

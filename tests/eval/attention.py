# SPDX-License-Identifier: Apache-2.0
"""Decode attention behind one interface: over all of KV here, or over what a session chose.

Shapes: b sequences, L layers, Hq query heads, Hkv KV heads, G = Hq / Hkv, D head dimension, n rows
chosen a KV head, N steps between appends. The tail of a sequence is its newest tokens, which the
engine holds until it appends them; slot i of the tail is filled by the i-th step since the last
append. Each tail length is a graph of its own where steps run as CUDA graphs: lengths are arguments
by value.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as functional
from dynsplit.sessions import Gather, SessionClient, Step, Stored, index_policy
from dynsplit.tensors import RegionTensor
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from buffers import Buffers, Shared
from torch_llama import Shape

if TYPE_CHECKING:
    from dynsplit.engine import Engine, MappedSession

APPEND_EVERY = 32
_ALIGNMENT = 64  # elements: a sequence's part of a region begins at a multiple of 16 bytes


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


class Attention(Protocol):
    """What the decode loop needs of a backend."""

    tail: int
    """Tokens since the last append, this step's not included."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k, v [b, Hkv, D] and attends q [b, Hq, D]; [b, Hq, D]."""
        ...

    def end_step(self, token_ids: Tensor) -> None:
        """After the step's work has been enqueued; token_ids int64 [b] are its inputs."""
        ...

    def close(self) -> None:
        """Gives memory back."""
        ...


def over_rows(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [b, Hq, D] over keys, values [b, Hkv, n, D]; a group's heads are queries of one KV head."""
    batch, kv_heads = keys.shape[:2]
    grouped = q.view(batch, kv_heads, -1, q.shape[-1])
    return functional.scaled_dot_product_attention(grouped, keys, values).reshape(q.shape)


class FullAttention:
    """All of KV, in this process: the baseline."""

    def __init__(self, shape: Shape, batch: int, num_tokens: int, room: int, like: Tensor) -> None:
        """Room for num_tokens + room tokens a sequence, in the type and on the device of `like`."""
        self.tail = 0
        self.backend: SDPBackend | None = None  # None = torch's choice
        self._length, self._room = num_tokens, room
        size = (2, batch, shape.num_kv_heads, num_tokens + room, shape.head_dim)
        self._cache = [
            torch.empty(size, dtype=like.dtype, device=like.device) for _ in range(shape.num_layers)
        ]

    def load(self, sequence: int, layer: int, keys: Tensor, values: Tensor) -> None:
        """Sets a sequence's tokens, [T, Hkv, D] each."""
        self._cache[layer][0, sequence, :, : self._length] = keys.transpose(0, 1)
        self._cache[layer][1, sequence, :, : self._length] = values.transpose(0, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `Attention.attend`."""
        cache, end = self._cache[layer], self._length + self.tail
        cache[0, :, :, end], cache[1, :, :, end] = k, v
        rows = cache[0, :, :, : end + 1], cache[1, :, :, : end + 1]
        if self.backend is None:
            return over_rows(q, *rows)
        with sdpa_kernel(self.backend):
            return over_rows(q, *rows)

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens loaded, [b, Hkv, T, D]."""
        cache = self._cache[layer][:, :, :, : self._length]
        return cache[0], cache[1]

    def end_step(self, token_ids: Tensor) -> None:
        """Wraps at the end of the room: only speed runs go so far."""
        self.tail = (self.tail + 1) % self._room

    def close(self) -> None:
        """Frees the cache."""
        self._cache.clear()


@dataclasses.dataclass
class Times:
    """Host seconds of the service's calls, and what they moved."""

    select_seconds: float = 0.0
    select_device_seconds: float = 0.0
    append_seconds: float = 0.0
    num_selects: int = 0
    num_appends: int = 0
    moved_rows: int = 0
    chosen_rows: int = 0


@dataclasses.dataclass
class Options:
    """How a session is read."""

    budget: int | None = None  # tokens a KV head; None = all
    # One Select a layer, with its own queries (n * Hkv a multiple of 4: regions' alignment); else
    # one a step, a step ahead.
    exact: bool = False
    append_every: int = APPEND_EVERY
    # Select's queries are sqrt(1 - drift^2) of those it was primed with and drift of the step's
    # own; 1 = the step's own. Less than 1 gives random weights the likeness that a real model's
    # successive queries have.
    drift: float = 1.0


class SessionAttention:
    """Rows that Select chose, and the tail. Base of the two ways to reach the rows."""

    def __init__(
        self,
        client: SessionClient,
        buffers: Buffers,
        shape: Shape,
        sessions: Sequence[str],
        num_tokens: int,
        like: Tensor,
        options: Options,
        room: int,
    ) -> None:
        """Of sessions of equal length, opened with room for `room` more tokens."""
        self.tail = 0
        self.times = Times()
        self.shape, self.options = shape, options
        self._client, self._sessions = client, list(sessions)
        self.length = num_tokens
        self._pending: list[Tensor] = []
        self._primed: Tensor | None = None
        self._synchronize = torch.cuda.synchronize if like.is_cuda else lambda: None
        batch, heads, dim = len(sessions), shape.num_kv_heads, shape.head_dim
        self.max_rows = options.budget or num_tokens + room
        self.queries: Shared = buffers.allocate(
            like.dtype, batch, shape.num_layers, 1, shape.num_query_heads, dim
        )
        tail = (shape.num_layers, batch, options.append_every, heads, dim)
        self.tail_keys = buffers.allocate(like.dtype, *tail)
        self.tail_values = buffers.allocate(like.dtype, *tail)

    @property
    def num_rows(self) -> int:
        """n of the next selection."""
        return self.options.budget or self.length

    def prime(self, queries: Tensor) -> None:
        """Selects for the first step, by queries [b, L, Hq, D] (the prompt's last)."""
        self._primed = queries.clone()
        self.queries.tensor[:, :, 0] = queries
        self.select(0, self.shape.num_layers)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `Attention.attend`."""
        self.queries.tensor[:, layer, 0] = self._drifted(layer, q)
        self.tail_keys.tensor[layer, :, self.tail] = k
        self.tail_values.tensor[layer, :, self.tail] = v
        if self.options.exact:
            self.select(layer, 1)
        return self.read(layer, q)

    def _drifted(self, layer: int, q: Tensor) -> Tensor:
        drift = self.options.drift
        if drift >= 1.0:
            return q
        assert self._primed is not None
        return (1.0 - drift * drift) ** 0.5 * self._primed[:, layer] + drift * q

    def end_step(self, token_ids: Tensor) -> None:
        """Appends when the tail is full, and (speculatively) selects for the next step."""
        self._pending.append(token_ids.clone())
        self.tail += 1
        if self.tail == self.options.append_every:
            self._append()
        if not self.options.exact:
            self.select(0, self.shape.num_layers)

    def select(self, first_layer: int, num_layers: int) -> None:
        """One call for all sequences; the answer lies in shared memory when it returns."""
        self._synchronize()  # queries are read by another process
        begin = time.perf_counter()
        steps = [
            self.step(index, session, first_layer, num_layers)
            for index, session in enumerate(self._sessions)
        ]
        self.take(steps, self._client.select(steps))
        self.times.select_seconds += time.perf_counter() - begin
        self.times.num_selects += 1

    def _queries(self, index: int, first_layer: int, num_layers: int) -> RegionTensor:
        shape = self.shape
        return self.queries.part(
            (index, first_layer), num_layers, 1, shape.num_query_heads, shape.head_dim
        )

    def _append(self) -> None:
        self._synchronize()
        begin = time.perf_counter()
        shape, added = self.shape, self.options.append_every
        ids = torch.stack(self._pending, dim=1).to("cpu", torch.int32).numpy()
        rows = (added, shape.num_kv_heads, shape.head_dim)

        def append(index: int) -> None:
            keys, values = (
                [tail.part((layer, index), *rows) for layer in range(shape.num_layers)]
                for tail in (self.tail_keys, self.tail_values)
            )
            self._client.append(self._sessions[index], self.length, ids[index], keys, values)

        # Side by side: a call is mostly waiting.
        with ThreadPoolExecutor(len(self._sessions)) as pool:
            list(pool.map(append, range(len(self._sessions))))
        self.length += added
        self.tail = 0
        self._pending.clear()
        self.times.append_seconds += time.perf_counter() - begin
        self.times.num_appends += 1

    def close(self) -> None:
        """Nothing: buffers and sessions are the caller's."""

    # -- the two ways --

    def step(self, index: int, session: str, first_layer: int, num_layers: int) -> Step:
        """What to ask for."""
        raise NotImplementedError

    def take(self, steps: Sequence[Step], selections: Sequence[Any]) -> None:
        """What came back."""
        for selection in selections:
            self.times.moved_rows += selection.moved_rows
            self.times.chosen_rows += selection.chosen_rows

    def read(self, layer: int, q: Tensor) -> Tensor:
        """Attention over the chosen rows and tail + 1 rows of the tail."""
        raise NotImplementedError


class GatheredAttention(SessionAttention):
    """Rows that the service gathers into slots of ours: only those that are new move."""

    def __init__(
        self,
        client: SessionClient,
        buffers: Buffers,
        shape: Shape,
        sessions: Sequence[str],
        num_tokens: int,
        like: Tensor,
        options: Options,
        room: int,
        engine: Engine | None = None,
    ) -> None:
        """See `SessionAttention`; with `engine` its kernel attends, else torch."""
        super().__init__(client, buffers, shape, sessions, num_tokens, like, options, room)
        row_elements = shape.num_layers * shape.num_kv_heads * shape.head_dim
        slots = (len(sessions), _aligned(self.max_rows * row_elements))
        self._keys = buffers.allocate(like.dtype, *slots)
        self._values = buffers.allocate(like.dtype, *slots)
        rows = _aligned(shape.num_layers * shape.num_kv_heads * self.max_rows)
        self._held = buffers.allocate(torch.int32, len(sessions), rows)
        self._tokens = buffers.allocate(torch.int32, *self._held.tensor.shape)
        self._generations = [0] * len(sessions)
        self._engine = engine

    def step(self, index: int, session: str, first_layer: int, num_layers: int) -> Step:
        """As the base says. A session remembers one range of layers: exact steps move all rows."""
        heads, dim, rows = self.shape.num_kv_heads, self.shape.head_dim, self.num_rows
        first_row = first_layer * heads * rows
        return Step(
            session,
            self._queries(index, first_layer, num_layers),
            first_layer=first_layer,
            tokens_per_head=rows,
            token_region=self._tokens.at(index, first_row),
            gather=Gather(
                0 if self.options.exact else self._generations[index],
                keys=self._keys.at(index, first_row * dim),
                values=self._values.at(index, first_row * dim),
                held=self._held.at(index, first_row),
            ),
        )

    def take(self, steps: Sequence[Step], selections: Sequence[Any]) -> None:
        """As the base says."""
        super().take(steps, selections)
        self._generations = [selection.generation for selection in selections]
        for selection in selections:
            if selection.tokens_per_head != self.num_rows:
                raise ValueError(
                    f"budget {self.num_rows} was raised to {selection.tokens_per_head}"
                )

    def _slots(self, slots: Shared, layer: int) -> Tensor:
        """[b, Hkv, n, D]."""
        heads, dim, rows = self.shape.num_kv_heads, self.shape.head_dim, self.num_rows
        size = heads * rows * dim
        part = slots.tensor[:, layer * size : (layer + 1) * size]
        return part.unflatten(1, (heads, rows, dim))

    def read(self, layer: int, q: Tensor) -> Tensor:
        """As the base says."""
        keys, values = self._slots(self._keys, layer), self._slots(self._values, layer)
        tail_keys = self.tail_keys.tensor[layer, :, : self.tail + 1]
        tail_values = self.tail_values.tensor[layer, :, : self.tail + 1]
        if self._engine is not None:
            return self._engine.attend(
                q, keys.transpose(1, 2), values.transpose(1, 2), None, tail_keys, tail_values
            )
        joined = [
            torch.cat((rows, tail.transpose(1, 2)), dim=2)
            for rows, tail in ((keys, tail_keys), (values, tail_values))
        ]
        return over_rows(q, *joined)


class MappedAttention(SessionAttention):
    """Rows read where the service keeps them."""

    def __init__(
        self,
        client: SessionClient,
        buffers: Buffers,
        shape: Shape,
        sessions: Sequence[str],
        num_tokens: int,
        like: Tensor,
        options: Options,
        room: int,
        engine: Engine,
    ) -> None:
        """Maps the sessions; `close` unmaps them."""
        super().__init__(client, buffers, shape, sessions, num_tokens, like, options, room)
        self._engine = engine
        rows = _aligned(shape.num_layers * shape.num_kv_heads * self.max_rows)
        self._tokens = buffers.allocate(torch.int32, len(sessions), rows)
        self._requests: dict[tuple[int, int, int], Any] = {}
        self._mapped: list[MappedSession] = [engine.map(client, session) for session in sessions]

    def step(self, index: int, session: str, first_layer: int, num_layers: int) -> Step:
        """As the base says."""
        place = self._tokens.at(index, first_layer * self.shape.num_kv_heads * self.num_rows)
        return Step(
            session,
            self._queries(index, first_layer, num_layers),
            first_layer=first_layer,
            tokens_per_head=self.num_rows,
            token_region=place,
        )

    def select(self, first_layer: int, num_layers: int) -> None:
        """As the base says. Every step asks the same: queries and tokens lie where they lay."""
        self._synchronize()
        begin = time.perf_counter()
        asked = (first_layer, num_layers, self.num_rows)
        if asked not in self._requests:
            self._requests[asked] = self._client.select_request(
                [
                    self.step(index, session, first_layer, num_layers)
                    for index, session in enumerate(self._sessions)
                ]
            )
        answer = self._client.select_message(self._requests[asked])
        for chosen in answer.sequences:
            if chosen.tokens_per_head != self.num_rows:
                raise ValueError(f"budget {self.num_rows} was raised to {chosen.tokens_per_head}")
        self.times.select_seconds += time.perf_counter() - begin
        self.times.select_device_seconds += answer.device_seconds
        self.times.num_selects += 1

    def read(self, layer: int, q: Tensor) -> Tensor:
        """As the base says."""
        rows = self.shape.num_kv_heads * self.num_rows
        tokens = self._tokens.tensor[:, layer * rows : (layer + 1) * rows]
        return self._engine.attend(
            q,
            [mapped.keys[layer] for mapped in self._mapped],
            [mapped.values[layer] for mapped in self._mapped],
            tokens.unflatten(1, (self.shape.num_kv_heads, self.num_rows)),
            self.tail_keys.tensor[layer, :, : self.tail + 1],
            self.tail_values.tensor[layer, :, : self.tail + 1],
        )

    def close(self) -> None:
        """Unmaps."""
        while self._mapped:
            self._mapped.pop().close()


def open_session(
    client: SessionClient,
    shape: Shape,
    token_ids: Any,
    keys: Sequence[Any],
    values: Sequence[Any],
    *,
    residence: str,
    room: int,
    rest: str = "as_is",
) -> Stored:
    """Opens a session as the evaluation uses them: SmolLM2's delimiters, budgets by the step."""
    return client.open(
        token_ids,
        keys,
        values,
        num_query_heads=shape.num_query_heads,
        policy=index_policy(profile="smollm2", rest=rest),
        residence=residence,
        reserve_tokens=room,
        lease_seconds=3600,
    )


def unload(attention: Attention, *closers: Callable[[], None]) -> None:
    """Closes a backend, then what it stood on."""
    attention.close()
    for close in closers:
        close()

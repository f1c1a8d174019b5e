# SPDX-License-Identifier: Apache-2.0
"""What sessions read of a prompt: every token of the answer asks, in every layer, by its own query.

Readers are all methods at all shares, share by share. Queries and chosen tokens lie in shared
memory; a call of Select has one step of each session, and the calls of a layer run side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import torch
from dynsplit.session_calls import Step
from torch import Tensor

from buffers import Shared

from .service import Service

_ALIGNMENT = 64  # elements: what a step is told lies at a multiple of 256 bytes


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Where the tokens of a reader lie: positions x [groups, n], `stride` elements apart."""

    begin: int
    stride: int
    groups: int
    count: int


class Exchange:
    """Shared memory of queries and tokens; grows, and is used again for the next prompt."""

    def __init__(self, service: Service) -> None:
        """Of the service's kind of memory."""
        self._service = service
        self._parts: dict[str, Shared] = {}

    def part(self, name: str, dtype: torch.dtype, elements: int) -> Shared:
        """At least so many elements."""
        found = self._parts.get(name)
        if found is None or found.tensor.numel() < elements:
            found = self._parts[name] = self._service.buffers.allocate(dtype, 2 * elements)
        return found


class SessionReader:
    """Masks as sessions choose them, for `engine.continue_with`; M = shares x sessions."""

    def __init__(
        self,
        service: Service,
        pool: Executor,
        exchange: Exchange,
        sessions: Sequence[Sequence[str]],
        budgets: Sequence[int],
        size: tuple[int, int],
        probe: Tensor,
    ) -> None:
        """Prepares the requests.

        Args:
            service: holds the sessions.
            pool: runs the calls of a layer.
            exchange: shared memory.
            sessions: of one prompt; several rows of the same methods let a call ask for several
                shares.
            budgets: tokens a KV head, one for each share.
            size: positions A and tokens T.
            probe: any query [1, 1, Hq, D] of the first layer: how many tokens do steps choose?
        """
        self._service, self._pool = service, pool
        self._positions, self._num_tokens = size
        shape, copies = service.shape, len(sessions)
        self._num_sessions = len(sessions[0])
        readers = len(budgets) * self._num_sessions
        self._queries = exchange.part(
            "queries",
            service.dtype,
            readers * self._positions * shape.num_query_heads * shape.head_dim,
        )
        self._choices = self._probe(sessions[0], budgets, probe)
        total = self._choices[-1].begin + self._choices[-1].stride * self._positions
        self._chosen = exchange.part("tokens", torch.int32, total)
        self._requests = [
            self._request(sessions, budgets, range(first, min(first + copies, len(budgets))), place)
            for first in range(0, len(budgets), copies)
            for place in range(self._positions)
        ]

    def _probe(
        self, sessions: Sequence[str], budgets: Sequence[int], probe: Tensor
    ) -> list[_Choice]:
        """Budgets are raised where sinks and recent tokens need more."""
        choices, begin = [], 0
        for budget in budgets:
            steps = [Step(session, probe, tokens_per_head=budget) for session in sessions]
            for answer in self._service.client.select(steps):
                assert answer.tokens is not None
                groups, count = answer.tokens.shape[1:]
                stride = -(-groups * count // _ALIGNMENT) * _ALIGNMENT
                choices.append(_Choice(begin, stride, groups, count))
                begin += stride * self._positions
        return choices

    def _request(
        self,
        sessions: Sequence[Sequence[str]],
        budgets: Sequence[int],
        shares: range,
        position: int,
    ) -> tuple[list[int], Any]:
        """Readers, and the call that asks for them at one position."""
        shape = self._service.shape
        row = shape.num_query_heads * shape.head_dim
        readers, steps = [], []
        for copy, share in enumerate(shares):
            for number, session in enumerate(sessions[copy]):
                reader = share * self._num_sessions + number
                choice = self._choices[reader]
                query = self._queries.part(
                    ((reader * self._positions + position) * row,),
                    *(1, 1, shape.num_query_heads, shape.head_dim),
                )
                at = self._chosen.at(choice.begin + choice.stride * position)
                budget = budgets[share]
                readers.append(reader)
                steps.append(Step(session, query, tokens_per_head=budget, token_region=at))
        return readers, self._service.client.select_request(steps)

    def __call__(self, layer: int, queries: Tensor) -> Tensor:
        """Bool [M, Hkv, A, T] of queries [M, A, Hq, D]."""
        self._queries.tensor[: queries.numel()] = queries.reshape(-1)
        if queries.is_cuda:
            torch.cuda.current_stream().synchronize()
        dense: set[int] = set()

        def ask(entry: tuple[list[int], Any]) -> None:
            readers, request = entry
            for step in request.sequences:
                step.first_layer = layer
            answer = self._service.client.select_message(request)
            for reader, chosen in zip(readers, answer.sequences, strict=True):
                if chosen.dense_layers:
                    dense.add(reader)
                elif chosen.tokens_per_head != self._choices[reader].count:
                    raise ValueError(f"layer {layer} chose {chosen.tokens_per_head} tokens")

        list(self._pool.map(ask, self._requests))
        return self._masks(dense, queries.device)

    def _masks(self, dense: set[int], device: torch.device) -> Tensor:
        heads, size = self._service.shape.num_kv_heads, (self._positions, self._num_tokens)
        readers = len(self._choices)
        masks = torch.zeros(readers, size[0], heads, size[1], dtype=torch.bool, device=device)
        reader = 0
        while reader < readers:  # readers that chose equally many are scattered at once
            first = self._choices[reader]
            alike = reader + 1
            while alike < readers and self._like(first, self._choices[alike]):
                alike += 1
            shape = (alike - reader, self._positions, first.groups, first.count)
            strides = (first.stride * self._positions, first.stride, first.count, 1)
            tokens = self._chosen.tensor.as_strided(shape, strides, first.begin)
            if not dense.isdisjoint(range(reader, alike)):  # their rows were left alone
                tokens = tokens.clamp(0, size[1] - 1)
            wide = tokens.long().expand(-1, -1, heads, -1)
            masks[reader:alike].scatter_(-1, wide, True)
            reader = alike
        for number in dense:
            masks[number] = True
        return masks.transpose(1, 2)

    @staticmethod
    def _like(one: _Choice, other: _Choice) -> bool:
        return (one.groups, one.count) == (other.groups, other.count)

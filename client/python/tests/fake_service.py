# SPDX-License-Identifier: Apache-2.0
"""A small stand-in for dynsplitd's sessions, in this process: strict about the wire, naive inside.

Blocks are 16 tokens; K and V rest as they came. Chosen are the first 4 tokens, the last 32, the
open block, and the blocks whose min/max bound is highest, summed over the queries of a group.
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import numpy.typing as npt

from dynsplit import errors, tensors
from dynsplit.v1 import (
    compression_pb2,
    memory_pb2,
    memory_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    types_pb2,
)

BLOCK = 16
SINKS, RECENT = 4, 32


def refuse(context: grpc.ServicerContext, code: grpc.StatusCode, text: str, *details: Any) -> Any:
    """Ends the call with google.rpc details, as the server does."""
    status = errors.message_class("Status")(code=code.value[0], message=text)
    for detail in details:
        type_url = f"type.googleapis.com/{detail.DESCRIPTOR.full_name}"
        status.details.add(type_url=type_url, value=detail.SerializeToString())
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, text)


def detail(name: str, **fields: Any) -> Any:
    """A message of google.rpc."""
    return errors.message_class(name)(**fields)


@dataclasses.dataclass
class _Session:
    keys: list[npt.NDArray[Any]]  # [T, Hkv, D] a layer
    values: list[npt.NDArray[Any]]
    info: types_pb2.SessionInfo
    generation: int = 0
    held: npt.NDArray[np.int32] | None = None  # [L', Hkv, n]
    held_layers: tuple[int, int] = (0, 0)

    @property
    def num_tokens(self) -> int:
        return len(self.keys[0])


class FakeService(sessions_pb2_grpc.SessionsServicer, memory_pb2_grpc.MemoryServicer):
    """The servicer; `sessions` and `requests` are for tests to look at."""

    def __init__(self, max_chunk_bytes: int = 4096, corrupt_results: bool = False) -> None:
        self.sessions: dict[str, _Session] = {}
        self.regions: dict[str, tuple[int, npt.NDArray[np.uint8]]] = {}
        self.max_chunk_bytes = max_chunk_bytes
        self.corrupt_results = corrupt_results
        self._released: set[str] = set()
        self._numbers = itertools.count(1)

    # -- streams --

    def _receive(
        self, requests: Iterator[Any], begin: Any, context: grpc.ServicerContext
    ) -> dict[tuple[int, int], npt.NDArray[Any]]:
        """Tensors by (kind, layer or -1)."""
        parts: dict[int, bytearray] = {d.id: bytearray() for d in begin.tensors}
        done: set[int] = set()
        ended = False
        for message in requests:
            if message.HasField("end"):
                assert message.end.num_tensors == len(done), "number of tensors"
                ended = True
                continue
            assert not ended and message.tensor in parts and message.tensor not in done
            assert message.offset == len(parts[message.tensor]), "gap"
            assert 1 <= len(message.data) <= self.max_chunk_bytes, "size of chunk"
            assert tensors.crc32c(message.data) == message.crc32c, "checksum of chunk"
            parts[message.tensor] += message.data
            if message.last:
                assert tensors.crc32c(bytes(parts[message.tensor])) == message.tensor_crc32c
                done.add(message.tensor)
        assert ended, "no end"
        received = {}
        for descriptor in begin.tensors:
            dtype = tensors.numpy_dtype(descriptor.dtype)
            if descriptor.HasField("location"):
                data = self._place(descriptor.location.region, descriptor.byte_size).view(dtype)
            else:
                assert descriptor.id in done, "tensor is missing"
                data = np.frombuffer(bytes(parts[descriptor.id]), dtype)
            assert data.nbytes == descriptor.byte_size
            layer = descriptor.layer if descriptor.HasField("layer") else -1
            received[descriptor.kind, layer] = data.copy()
        return received

    def _accepted(self) -> Any:
        accepted = compression_pb2.Accepted(backend="fake", max_chunk_bytes=self.max_chunk_bytes)
        return compression_pb2.CompressResponse(accepted=accepted)

    def _stored(self, session: _Session) -> Iterator[Any]:
        tokens = session.num_tokens
        starts = np.append(np.arange(0, tokens, BLOCK), tokens).astype(np.int32)
        session.info.shape.num_tokens = tokens
        session.info.num_blocks = len(starts) - 1
        data, size = starts.tobytes(), 64
        descriptor = types_pb2.TensorDescriptor(
            id=1,
            kind=types_pb2.TENSOR_KIND_BLOCK_STARTS,
            dtype=types_pb2.DTYPE_INT32,
            byte_size=len(data),
        )
        yield compression_pb2.CompressResponse(
            sequence=compression_pb2.SequenceResult(
                num_blocks=len(starts) - 1, tensors=[descriptor]
            )
        )
        for offset in range(0, len(data), size):
            piece = data[offset : offset + size]
            last = offset + size >= len(data)
            yield compression_pb2.CompressResponse(
                tensor=1,
                offset=offset,
                crc32c=tensors.crc32c(piece) ^ self.corrupt_results,
                last=last,
                tensor_crc32c=tensors.crc32c(data) if last else 0,
                data=piece,
            )
        yield compression_pb2.CompressResponse(
            end=compression_pb2.CompressEnd(session=session.info)
        )

    @staticmethod
    def _layers(
        received: dict[tuple[int, int], npt.NDArray[Any]], kind: int, shape: Any, tokens: int
    ) -> list[npt.NDArray[Any]]:
        rows = (tokens, shape.num_kv_heads, shape.head_dim)
        return [received[kind, layer].reshape(rows) for layer in range(shape.num_layers)]

    def Open(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        begin = next(requests).begin
        shape = begin.shape
        if shape.num_query_heads % max(1, shape.num_kv_heads):
            violation = {"field": "shape.num_query_heads", "description": "is no multiple"}
            refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                "bad shape",
                detail("BadRequest", field_violations=[violation]),
            )
        yield self._accepted()
        received = self._receive(requests, begin, context)
        tokens = shape.num_tokens
        assert len(received[types_pb2.TENSOR_KIND_TOKEN_IDS, -1]) == tokens
        session_id = f"session-{next(self._numbers)}"
        info = types_pb2.SessionInfo(
            session_id=session_id,
            shape=shape,
            policy=begin.policy,
            options=begin.session,
            capacity_tokens=tokens + begin.session.reserve_tokens,
        )
        session = _Session(
            self._layers(received, types_pb2.TENSOR_KIND_KEY, shape, tokens),
            self._layers(received, types_pb2.TENSOR_KIND_VALUE, shape, tokens),
            info,
        )
        self.sessions[session_id] = session
        yield from self._stored(session)

    def Append(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        begin = next(requests).begin
        session = self._find(begin.target.session_id, context)
        if begin.target.position != session.num_tokens:
            violation = {"type": "APPEND_POSITION", "subject": "position", "description": "moved"}
            refuse(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                "position",
                detail("PreconditionFailure", violations=[violation]),
            )
        yield self._accepted()
        received = self._receive(requests, begin, context)
        added = len(received[types_pb2.TENSOR_KIND_TOKEN_IDS, -1])
        assert session.num_tokens + added <= session.info.capacity_tokens, "SESSION_FULL"
        shape = session.info.shape
        keys = self._layers(received, types_pb2.TENSOR_KIND_KEY, shape, added)
        values = self._layers(received, types_pb2.TENSOR_KIND_VALUE, shape, added)
        session.keys = [np.concatenate(pair) for pair in zip(session.keys, keys, strict=True)]
        session.values = [np.concatenate(pair) for pair in zip(session.values, values, strict=True)]
        yield from self._stored(session)

    # -- unary --

    def _find(self, session_id: str, context: grpc.ServicerContext) -> _Session:
        session = self.sessions.get(session_id)
        if session is None:
            gone = session_id in self._released
            refuse(
                context,
                grpc.StatusCode.NOT_FOUND,
                "no such session",
                detail("ErrorInfo", reason="SESSION_RELEASED" if gone else "SESSION_UNKNOWN"),
                detail("ResourceInfo", resource_type="session", resource_name=session_id),
            )
        assert session is not None
        return session

    def _place(self, region: Any, num_bytes: int) -> npt.NDArray[np.uint8]:
        generation, data = self.regions[region.name]
        assert generation == region.generation, "generation"
        assert region.offset_bytes + num_bytes <= len(data), "bounds"
        return data[region.offset_bytes : region.offset_bytes + num_bytes]

    def Select(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        response = sessions_pb2.SelectResponse()
        for step in request.sequences:
            self._step(step, response.sequences.add(), context)
        return response

    def _step(self, step: Any, answer: Any, context: grpc.ServicerContext) -> None:
        session = self._find(step.session_id, context)
        tokens, shape = session.num_tokens, session.info.shape
        budget = step.tokens_per_head or session.info.policy.budget.tokens_per_head
        budget = budget or max(1, int(tokens * session.info.policy.budget.kept_ratio))
        if not 1 <= budget <= tokens:
            violation = {"field": "sequences[0].tokens_per_head", "description": f"is {budget}"}
            refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                "bad budget",
                detail("BadRequest", field_violations=[violation]),
            )
        open_block = tokens // BLOCK * BLOCK
        suffix = min(max(0, tokens - RECENT), open_block)
        protected = min(SINKS, suffix) + tokens - suffix
        layers = step.num_layers or shape.num_layers - step.first_layer
        heads, dim = shape.num_kv_heads, shape.head_dim
        dtype = tensors.numpy_dtype(step.dtype)
        rows = (layers, step.num_queries, heads, shape.num_query_heads // heads, dim)
        num_bytes = int(np.prod(rows)) * dtype.itemsize
        raw: Any = step.query_data
        if step.HasField("query_region"):
            raw = self._place(step.query_region, num_bytes)
        queries = np.frombuffer(bytes(raw), dtype).reshape(rows).astype(np.float32)
        count = max(budget, protected)
        chosen = np.empty((layers, heads, count), np.int32)
        for layer in range(layers):
            keys = session.keys[step.first_layer + layer].astype(np.float32)
            scores = _scores(keys, queries[layer])
            answer.scores.extend([scores.tobytes()] * step.with_scores)
            for head in range(heads):
                chosen[layer, head] = _choose(scores[head], tokens, count, suffix)
        answer.num_tokens, answer.first_layer = tokens, step.first_layer
        answer.num_layers, answer.num_groups, answer.tokens_per_head = layers, heads, count
        answer.budget_raised_by_protection = count > budget
        if step.HasField("token_region"):
            self._place(step.token_region, chosen.nbytes)[:] = chosen.reshape(-1).view(np.uint8)
        else:
            answer.tokens = chosen.tobytes()
        if step.HasField("gather"):
            self._gather(session, step, chosen, answer)

    def _gather(self, session: _Session, step: Any, chosen: Any, answer: Any) -> None:
        layers, heads, count = chosen.shape
        held = session.held
        if (
            held is None
            or step.gather.generation != session.generation
            or session.held_layers != (step.first_layer, layers)
            or held.shape != chosen.shape
        ):
            held = np.full(chosen.shape, -1, np.int32)
        held = held.copy()
        moved: list[list[npt.NDArray[np.int64]]] = []
        for layer in range(layers):
            slots = []
            for head in range(heads):
                stale = np.flatnonzero(~np.isin(held[layer, head], chosen[layer, head]))
                fresh = np.setdiff1d(chosen[layer, head], held[layer, head])
                held[layer, head, stale] = fresh
                slots.append(stale)
            most = max(len(entry) for entry in slots)
            fill = [np.setdiff1d(np.arange(count), entry)[: most - len(entry)] for entry in slots]
            moved.append([np.sort(np.append(a, b)) for a, b in zip(slots, fill, strict=True)])
        session.held, session.held_layers = held, (step.first_layer, layers)
        session.generation = answer.generation = next(self._numbers)
        answer.chosen_rows = chosen.size
        answer.moved_rows = sum(len(entry) for layer in moved for entry in layer)
        self._place_rows(session, step, held, moved, answer)

    def _place_rows(self, session: _Session, step: Any, held: Any, moved: Any, answer: Any) -> None:
        layers, heads, count = held.shape
        dim = session.info.shape.head_dim
        if step.gather.HasField("held_region"):
            target = self._place(step.gather.held_region, held.nbytes)
            target[:] = held.reshape(-1).view(np.uint8)
        else:
            answer.held_tokens = held.tobytes()
        for layer in range(layers):
            index = step.first_layer + layer
            head = np.arange(heads)[:, None]
            slots = np.stack(moved[layer])
            rows = [
                store[index][held[layer][head, slots], head]
                for store in (session.keys, session.values)
            ]
            if step.gather.HasField("key_region"):
                for region, part in zip(
                    (step.gather.key_region, step.gather.value_region), rows, strict=True
                ):
                    size = layers * heads * count * dim * part.itemsize
                    slab = self._place(region, size).view(part.dtype)
                    slab.reshape(layers, heads, count, dim)[layer][head, slots] = part
            else:
                answer.moved.add(
                    num_rows=slots.shape[1],
                    slots=slots.astype(np.int32).tobytes(),
                    keys=rows[0].tobytes(),
                    values=rows[1].tobytes(),
                )

    def Get(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return self._find(request.session_id, context).info

    def Renew(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return self._find(request.session_id, context).info

    def Release(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if request.session_id in self._released:
            return sessions_pb2.ReleaseSessionResponse()
        session = self._find(request.session_id, context)
        del self.sessions[request.session_id]
        self._released.add(request.session_id)
        freed = sum(part.nbytes for part in (*session.keys, *session.values))
        return sessions_pb2.ReleaseSessionResponse(freed_bytes=freed)

    def Map(self, request: Any, context: grpc.ServicerContext) -> NoReturn:  # noqa: N802
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "no device memory")
        raise AssertionError

    def Register(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if not request.HasField("posix_shm"):
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "only posix_shm")
        with (Path("/dev/shm") / request.posix_shm.key).open("r+b") as file:
            data = mmap.mmap(file.fileno(), 0)
        begin = request.posix_shm.offset_bytes
        view = np.frombuffer(data, np.uint8)[begin : begin + request.byte_size]
        assert len(view) == request.byte_size, "object is smaller"
        generation = next(self._numbers)
        self.regions[request.name] = (generation, view)
        return memory_pb2.RegisterRegionResponse(generation=generation, lease_seconds_left=600)

    def Unregister(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        del self.regions[request.name]
        return memory_pb2.UnregisterRegionResponse()


def _scores(keys: Any, queries: Any) -> npt.NDArray[np.float32]:
    """[Hkv, B] of keys [T, Hkv, D] and queries [W, Hkv, G, D]."""
    starts = np.arange(0, len(keys), BLOCK)
    low, high = np.minimum.reduceat(keys, starts), np.maximum.reduceat(keys, starts)
    bound = np.maximum(
        np.einsum("whgd,bhd->whgbd", queries, low), np.einsum("whgd,bhd->whgbd", queries, high)
    )
    summed: npt.NDArray[np.float32] = bound.sum(-1).sum(2).mean(0).astype(np.float32)
    return summed


def _choose(scores: Any, tokens: int, count: int, suffix: int) -> npt.NDArray[np.int32]:
    order = np.argsort(-scores, kind="stable")
    ranked = np.concatenate([np.arange(b * BLOCK, min(b * BLOCK + BLOCK, tokens)) for b in order])
    always = np.r_[0 : min(SINKS, suffix), suffix:tokens]
    rest = ranked[~np.isin(ranked, always)][: count - len(always)]
    return np.sort(np.append(always, rest)).astype(np.int32)


def serve(service: FakeService, address: str) -> grpc.Server:
    """Starts it at `address`; the caller stops it."""
    server = grpc.server(
        futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)]
    )
    sessions_pb2_grpc.add_SessionsServicer_to_server(service, server)
    memory_pb2_grpc.add_MemoryServicer_to_server(service, server)
    server.add_insecure_port(address)
    server.start()
    return server

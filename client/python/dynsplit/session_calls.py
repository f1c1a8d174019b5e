# SPDX-License-Identifier: Apache-2.0
"""Operations of the service Sessions; `dynsplit.sessions` says what they are for.

Letters in shapes: T tokens, L layers, Hq query heads, Hkv KV heads, D head dimension, W queries a
layer, n tokens chosen per KV head, `groups` chosen sets a layer (1 or Hkv), B semantic blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dynsplit import streams, tensors
from dynsplit.calls import Context, SessionRows, Stream, Unary
from dynsplit.inputs import Tensors, inputs_of
from dynsplit.policies import as_policy
from dynsplit.tensors import RegionSlice, RegionTensor, Tensor, dtype_code, numpy_dtype
from dynsplit.v1 import (
    compression_pb2,
    info_pb2,
    sessions_pb2,
    types_pb2,
)

RESIDENCES = {
    "any": types_pb2.SessionOptions.RESIDENCE_UNSPECIFIED,
    "device": types_pb2.SessionOptions.RESIDENCE_DEVICE,
    "host": types_pb2.SessionOptions.RESIDENCE_HOST,
}
_ENCODED: dict[int, str] = {
    types_pb2.Encoding.FORMAT_FLOAT8_E4M3: "float8_e4m3fn",
    types_pb2.Encoding.FORMAT_INT8: "int8",
}


@dataclasses.dataclass(frozen=True)
class Gather:
    """Asks for the chosen rows, too: only those that the caller's slots do not hold yet.

    `keys` and `values` are places for [num_layers, Hkv, n, D] in the bits the session rests in,
    the scales' for float32 [num_layers, Hkv, n], `held` for int32 [num_layers, Hkv, n]. Without
    them rows come back in the answer (`Selection.moved`).
    """

    generation: int = 0
    keys: RegionSlice | None = None
    values: RegionSlice | None = None
    key_scales: RegionSlice | None = None
    value_scales: RegionSlice | None = None
    held: RegionSlice | None = None

    def to_proto(self) -> sessions_pb2.GatherRows:
        """As it travels."""
        rows = sessions_pb2.GatherRows(generation=self.generation)
        for name, place in (
            ("key_region", self.keys),
            ("value_region", self.values),
            ("key_scale_region", self.key_scales),
            ("value_scale_region", self.value_scales),
            ("held_region", self.held),
        ):
            if place is not None:
                getattr(rows, name).CopyFrom(place.to_proto())
        return rows


@dataclasses.dataclass(frozen=True)
class Step:
    """The step of one session.

    Attributes:
        session_id: as `open` returned it.
        queries: [num_layers, W, Hq, D], after RoPE; float32, float16 or bfloat16.
        first_layer: layer of queries[0].
        tokens_per_head: n; 0 = the policy's budget.
        token_region: where the chosen tokens go, int32 [num_layers, groups, n]; None = in the
            answer.
        with_pages: also the pages that hold chosen tokens.
        with_scores: also the blocks' scores.
        gather: also the rows.
    """

    session_id: str
    queries: Tensor
    first_layer: int = 0
    tokens_per_head: int = 0
    token_region: RegionSlice | None = None
    with_pages: bool = False
    with_scores: bool = False
    gather: Gather | None = None

    def to_proto(self) -> sessions_pb2.SequenceStep:
        """As it travels.

        Raises:
            ValueError: queries have another number of axes, or a type the wire has not.
        """
        if len(self.queries.shape) != 4:
            raise ValueError(
                f"queries are {tuple(self.queries.shape)}; must be [num_layers, W, Hq, D]"
            )
        queries = tensors.as_host(self.queries)
        step = sessions_pb2.SequenceStep(
            session_id=self.session_id,
            first_layer=self.first_layer,
            num_layers=self.queries.shape[0],
            num_queries=self.queries.shape[1],
            dtype=dtype_code(queries.dtype),
            tokens_per_head=self.tokens_per_head,
            with_pages=self.with_pages,
            with_scores=self.with_scores,
        )
        if isinstance(queries, RegionTensor):
            step.query_region.CopyFrom(queries.place.to_proto())
        else:
            step.query_data = queries.data.tobytes()
        if self.token_region is not None:
            step.token_region.CopyFrom(self.token_region.to_proto())
        if self.gather is not None:
            step.gather.CopyFrom(self.gather.to_proto())
        return step


@dataclasses.dataclass(frozen=True)
class MovedRows:
    """Rows of one layer that the caller's slots must take over; m the same for every head.

    keys[h, i] belongs into slot slots[h, i] of head h; values and scales likewise.
    """

    slots: npt.NDArray[np.int32]  # [Hkv, m]
    keys: npt.NDArray[Any]  # [Hkv, m, D]
    values: npt.NDArray[Any]  # [Hkv, m, D]
    key_scales: npt.NDArray[np.float32] | None  # [Hkv, m], for rows that rest as fp8 or int8
    value_scales: npt.NDArray[np.float32] | None


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a session should read.

    Attributes:
        num_tokens: length of the session when the choice was made.
        tokens_per_head: n, as raised by protection.
        budget_raised_by_protection: whether it was: sinks, recent tokens and the open block alone
            are more than the budget.
        tokens: int32 [num_layers, groups, n], ascending; rows of dense layers are -1. None where
            they went into a region.
        dense_layers: layers to be read whole.
        pages: int32, one array a layer (with_pages).
        scores: float32 [groups, B], one array a layer (with_scores).
        generation: of the rows, for the next step's Gather.
        moved_rows: rows that moved, over layers and heads.
        chosen_rows: rows chosen, over layers and heads.
        moved: one entry a layer (gather without regions).
        held: int32 [num_layers, Hkv, n], token of each slot (gather without regions).
    """

    num_tokens: int
    tokens_per_head: int
    tokens: npt.NDArray[np.int32] | None
    dense_layers: tuple[int, ...]
    pages: list[npt.NDArray[np.int32]]
    scores: list[npt.NDArray[np.float32]]
    generation: int
    moved_rows: int
    chosen_rows: int
    moved: list[MovedRows]
    held: npt.NDArray[np.int32] | None
    budget_raised_by_protection: bool = False


@dataclasses.dataclass(frozen=True)
class Stored:
    """What Open and Append leave behind."""

    info: types_pb2.SessionInfo
    block_starts: npt.NDArray[np.int32]  # [B + 1]; empty where the server does not send them

    @property
    def session_id(self) -> str:
        """Names the session in all calls."""
        return str(self.info.session_id)


def _array(data: bytes, dtype: Any, *shape: int) -> npt.NDArray[Any]:
    return np.frombuffer(data, dtype).reshape(shape)


def _rest_dtype(encoding: int, supplied: str) -> np.dtype[Any]:
    return numpy_dtype(dtype_code(_ENCODED.get(encoding, supplied)))


# -- growing --


def open(
    context: Context,
    token_ids: npt.ArrayLike,
    keys: Tensors,
    values: Tensors | None,
    *,
    num_query_heads: int,
    block_table: npt.ArrayLike | None = None,
    key_scales: Tensors | None = None,
    value_scales: Tensors | None = None,
    policy: types_pb2.Policy | str | None = None,
    residence: str = "any",
    reserve_tokens: int = 0,
    lease_seconds: int = 0,
    full_summaries: bool = False,
    rope: types_pb2.Rope | None = None,
    dtype: str | None = None,
    request_id: str = "",
    timeout_seconds: float | None = None,
) -> Stream[Stored]:
    """Streams a sequence in and keeps it.

    Args:
        context: of the client.
        token_ids: [T]; the segmentation reads them.
        keys: [T, Hkv, D] a layer, after RoPE, as in `compress`.
        values: [T, Hkv, D] a layer; None where `keys` holds both.
        num_query_heads: Hq.
        block_table: as in `compress`.
        key_scales: float32 [T, Hkv] a layer, for fp8 and int8 keys.
        value_scales: likewise.
        policy: see `index_policy`; None = the server's preset of sessions.
        residence: "device", "host" (pinned) or "any" (device where there is room).
        reserve_tokens: room for tokens appended later.
        lease_seconds: life without use; 0 = the server's default.
        full_summaries: block summaries in the keys' type instead of fp8.
        rope: rotation the keys carry; needed only where they are re-rotated later.
        dtype: what arrays of unsigned integers hold, such as "bfloat16".
        request_id: for logs; empty = the server makes one.
        timeout_seconds: deadline of this call; None = the client's.

    Returns:
        The session as it is, with its id, and the block starts.

    Raises:
        InvalidRequestError: shape, layout, policy or data; see `violations`.
        ExhaustedError: quota of sessions or bytes, or no memory, after all tries.
        UnsupportedError: a policy that sessions do not have.
        DynSplitError: as `compress`.
    """
    ids = np.ascontiguousarray(token_ids, np.int32)
    _, num_kv_heads, head_dim = tensors.sequence_axes(keys[0])
    begin = compression_pb2.Begin(
        request_id=request_id,
        tenant=context.tenant,
        shape=types_pb2.SequenceShape(
            num_layers=len(keys),
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            num_tokens=len(ids),
            head_dim=head_dim,
        ),
        rope=rope,
        policy=as_policy(policy),
        session=session_options(
            residence=residence,
            reserve_tokens=reserve_tokens,
            lease_seconds=lease_seconds,
            full_summaries=full_summaries,
        ),
    )
    parts = {
        "keys": keys,
        "key_scales": key_scales,
        "values": values,
        "value_scales": value_scales,
    }
    inputs = inputs_of(ids, parts, len(keys), dtype, block_table)
    types = {entry.kind: entry.tensor.dtype for entry in inputs}
    both = types.get(types_pb2.TENSOR_KIND_KEY_VALUE, "")
    key_dtype = types.get(types_pb2.TENSOR_KIND_KEY, both)
    value_dtype = types.get(types_pb2.TENSOR_KIND_VALUE, both)

    def finish(results: streams.Results) -> Stored:
        stored = _stored(results)
        encoding = stored.info.policy.encoding
        context.rows[stored.session_id] = SessionRows(
            num_kv_heads,
            head_dim,
            _rest_dtype(encoding.key, key_dtype),
            _rest_dtype(encoding.value, value_dtype),
        )
        return stored

    return Stream("Sessions", "Open", begin, inputs, finish, timeout_seconds=timeout_seconds)


def session_options(
    *,
    residence: str = "any",
    reserve_tokens: int = 0,
    lease_seconds: int = 0,
    full_summaries: bool = False,
) -> types_pb2.SessionOptions:
    """How a sequence rests in the service; arguments as in `open`."""
    return types_pb2.SessionOptions(
        lease_seconds=lease_seconds,
        residence=RESIDENCES[residence],
        reserve_tokens=reserve_tokens,
        summaries=(
            types_pb2.SessionOptions.SUMMARIES_AS_KEYS
            if full_summaries
            else types_pb2.SessionOptions.SUMMARIES_UNSPECIFIED
        ),
    )


def append(
    context: Context,
    session_id: str,
    position: int,
    token_ids: npt.ArrayLike,
    keys: Tensors,
    values: Tensors | None,
    *,
    block_table: npt.ArrayLike | None = None,
    key_scales: Tensors | None = None,
    value_scales: Tensors | None = None,
    dtype: str | None = None,
    request_id: str = "",
    timeout_seconds: float | None = None,
) -> Stream[Stored]:
    """Adds tokens behind the end, all or nothing.

    Args:
        context: of the client.
        session_id: the session.
        position: its present length; another one is refused (PreconditionError,
            APPEND_POSITION), so that no append is lost or made twice.
        token_ids: [N].
        keys: [N, Hkv, D] a layer, in the types the session was opened with.
        values: likewise.
        block_table: as in `compress`, for N tokens.
        key_scales: as in `open`.
        value_scales: as in `open`.
        dtype: what arrays of unsigned integers hold, such as "bfloat16".
        request_id: for logs; empty = the server makes one.
        timeout_seconds: deadline of this call; None = the client's.

    Raises:
        PreconditionError: APPEND_POSITION, or APPEND_RUNNING: another append has not ended.
        ExhaustedError: SESSION_FULL: beyond the tokens reserved.
        NotFoundError: no such session; see `reason`.
        DynSplitError: as `compress`.
    """
    ids = np.ascontiguousarray(token_ids, np.int32)
    begin = compression_pb2.Begin(
        request_id=request_id,
        tenant=context.tenant,
        target=compression_pb2.SessionTarget(session_id=session_id, position=position),
    )
    parts = {
        "keys": keys,
        "key_scales": key_scales,
        "values": values,
        "value_scales": value_scales,
    }
    inputs = inputs_of(ids, parts, len(keys), dtype, block_table)
    return Stream("Sessions", "Append", begin, inputs, _stored, timeout_seconds=timeout_seconds)


def _stored(results: streams.Results) -> Stored:
    starts = np.empty(0, np.int32)
    for descriptor in results.sequence.tensors if results.sequence else ():
        if descriptor.kind == types_pb2.TENSOR_KIND_BLOCK_STARTS:
            starts = results.tensors[descriptor.id].view(np.int32)
    return Stored(results.end.session, starts)


# -- reading --


def select(context: Context, steps: Sequence[Step]) -> Unary[list[Selection]]:
    """Chooses what the next step should read, for all given sessions at once.

    Args:
        context: of the client.
        steps: 1 to 1024, of different sessions; answered in that order.

    Raises:
        InvalidRequestError: layers, queries or budget; see `violations`.
        NotFoundError: no such session or region; see `reason`.
        ValueError: rows were asked for inline, of a session that another client opened.
    """

    def finish(response: sessions_pb2.SelectResponse) -> list[Selection]:
        pairs = zip(steps, response.sequences, strict=True)
        return [_selection(context, step, answer) for step, answer in pairs]

    return Unary("Sessions", "Select", select_request(context, steps), finish, repeatable=True)


def select_request(context: Context, steps: Sequence[Step]) -> sessions_pb2.SelectRequest:
    """The message of `select`."""
    return sessions_pb2.SelectRequest(
        tenant=context.tenant, sequences=[step.to_proto() for step in steps]
    )


def select_message(
    context: Context, request: sessions_pb2.SelectRequest
) -> Unary[sessions_pb2.SelectResponse]:
    """As `select`, message to message: for engines that keep one request and change fields.

    The answer also says the seconds that the server took. `select_request` makes the message.
    """
    return Unary("Sessions", "Select", request, lambda answer: answer, repeatable=True)


def _selection(context: Context, step: Step, answer: sessions_pb2.SequenceSelection) -> Selection:
    layers, count = answer.num_layers, answer.tokens_per_head
    tokens = held = None
    if step.token_region is None:
        tokens = _array(answer.tokens, np.int32, layers, answer.num_groups, count)
    moved: list[MovedRows] = []
    if answer.moved:
        rows = context.rows.get(step.session_id)
        if rows is None:
            raise ValueError(
                f"session {step.session_id} was opened elsewhere: its rows' types are not "
                "known; name regions in Gather"
            )
        moved = [_moved(rows, entry) for entry in answer.moved]
        held = _array(answer.held_tokens, np.int32, layers, rows.num_kv_heads, count)
    return Selection(
        num_tokens=answer.num_tokens,
        tokens_per_head=count,
        tokens=tokens,
        dense_layers=tuple(answer.dense_layers),
        pages=[_array(page, np.int32, -1) for page in answer.pages],
        scores=[_array(score, np.float32, answer.num_groups, -1) for score in answer.scores],
        generation=answer.generation,
        moved_rows=answer.moved_rows,
        chosen_rows=answer.chosen_rows,
        moved=moved,
        held=held,
        budget_raised_by_protection=answer.budget_raised_by_protection,
    )


def _moved(rows: SessionRows, entry: sessions_pb2.MovedRows) -> MovedRows:
    heads, count, dim = rows.num_kv_heads, entry.num_rows, rows.head_dim

    def scales(data: bytes) -> npt.NDArray[np.float32] | None:
        return _array(data, np.float32, heads, count) if data else None

    return MovedRows(
        slots=_array(entry.slots, np.int32, heads, count),
        keys=_array(entry.keys, rows.key_dtype, heads, count, dim),
        values=_array(entry.values, rows.value_dtype, heads, count, dim),
        key_scales=scales(entry.key_scales),
        value_scales=scales(entry.value_scales),
    )


# -- life --


def renew(
    context: Context, session_id: str, lease_seconds: int = 0
) -> Unary[types_pb2.SessionInfo]:
    """Extends the lease.

    Args:
        context: of the client.
        session_id: the session.
        lease_seconds: its length from now on, 1 to 86400; 0 = as it was.
    """
    request = sessions_pb2.RenewSessionRequest(
        session_id=session_id, tenant=context.tenant, lease_seconds=lease_seconds
    )
    return Unary("Sessions", "Renew", request, lambda info: info, repeatable=True)


def release(context: Context, session_id: str) -> Unary[int]:
    """Ends the session; returns the bytes given back (0 when it had been released before)."""
    request = sessions_pb2.ReleaseSessionRequest(session_id=session_id, tenant=context.tenant)

    def finish(response: sessions_pb2.ReleaseSessionResponse) -> int:
        context.rows.pop(session_id, None)
        return int(response.freed_bytes)

    return Unary("Sessions", "Release", request, finish, repeatable=True)


def get(context: Context, session_id: str) -> Unary[types_pb2.SessionInfo]:
    """State of the session; does not renew its lease."""
    request = sessions_pb2.GetSessionRequest(session_id=session_id, tenant=context.tenant)
    return Unary("Sessions", "Get", request, lambda info: info, repeatable=True)


def map(context: Context, session_id: str) -> Unary[sessions_pb2.SessionMapping]:
    """Where K and V lie, for a process of the same host (`dynsplit.engine` opens it).

    A mapped session is not demoted to host memory; each mapping is to be given back (`unmap`).

    Raises:
        UnsupportedError: there is no device memory to map.
    """
    request = sessions_pb2.MapSessionRequest(session_id=session_id, tenant=context.tenant)
    return Unary("Sessions", "Map", request, lambda mapping: mapping)


def unmap(context: Context, session_id: str) -> Unary[types_pb2.SessionInfo]:
    """Gives one mapping back; close the memory first."""
    request = sessions_pb2.UnmapSessionRequest(session_id=session_id, tenant=context.tenant)
    return Unary("Sessions", "Unmap", request, lambda info: info)


def session_bytes(
    context: Context,
    shape: types_pb2.SequenceShape,
    *,
    dtype: str = "bfloat16",
    options: types_pb2.SessionOptions | None = None,
    policy: types_pb2.Policy | str | None = None,
) -> Unary[types_pb2.SessionBytes]:
    """Memory that a session of that shape will hold, bytes; opens nothing.

    Args:
        context: of the client.
        shape: of the sequence.
        dtype: type of K and V.
        options: see `session_options`.
        policy: see `index_policy`; None = the server's preset of sessions.
    """
    request = info_pb2.AdviseRequest(
        shape=shape,
        dtype=dtype_code(dtype),
        session=options or types_pb2.SessionOptions(),
        session_policy=as_policy(policy),
    )
    return Unary(
        "Info", "Advise", request, lambda response: response.session_bytes, repeatable=True
    )

# SPDX-License-Identifier: Apache-2.0
"""Operations of the service Compression, and Sessions.Fetch, which returns what they return.

Letters in shapes: T tokens, L layers, Hq query heads, Hkv KV heads, D head dimension, W queries of
a layer, B semantic blocks. `keys`, `values` and `queries` are sequences of L tensors, or one tensor
whose first axis is L; each may be of numpy, of torch on any device, or in a region. Tensors that
are dense in another order of axes (such as [Hkv, T, D] transposed) travel as they lie; `AxisTensor`
names the axes of paged and packed ones.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dynsplit import errors, results, streams, tensors
from dynsplit.calls import Context, OnError, Stream
from dynsplit.inputs import Tensors, inputs_of
from dynsplit.policies import as_policy
from dynsplit.results import Compressed, CompressedLayer, Room
from dynsplit.tensors import Tensor
from dynsplit.v1 import compression_pb2, types_pb2

_MAX_QUERIES = 1024

Policy = types_pb2.Policy | str | None
OnLayer = Callable[[CompressedLayer], None]


def compress(
    context: Context,
    token_ids: npt.ArrayLike | None,
    keys: Tensors,
    values: Tensors | None,
    *,
    policy: Policy = None,
    queries: Tensors | None = None,
    num_query_heads: int | None = None,
    block_table: npt.ArrayLike | None = None,
    num_tokens: int | None = None,
    log_sum_exp: Tensors | None = None,
    accumulated_scores: Tensors | None = None,
    key_scales: Tensors | None = None,
    value_scales: Tensors | None = None,
    rope: types_pb2.Rope | None = None,
    shadow: bool = False,
    receipt: bool = True,
    keep: types_pb2.SessionOptions | None = None,
    session_policy: Policy = None,
    dtype: str | None = None,
    output: Room | None = None,
    on_layer: OnLayer | None = None,
    on_error: OnError | None = None,
    request_id: str = "",
    timeout_seconds: float | None = None,
) -> Stream[Compressed]:
    """Decides what to keep and moves it: plan, receipt and uniform pages.

    Args:
        context: of the client.
        token_ids: int32 [T]; None only where the segmentation does not read them.
        keys: [T, Hkv, D] a layer, after RoPE; float32, float16, bfloat16, or fp8 and int8 with
            scales.
        values: [T, Hkv, D] a layer; None where `keys` holds both (`AxisTensor`).
        policy: see `dynsplit.policy`, or a preset's name; None = "dynsplit" as the server has it.
        queries: [W, Hq, D] a layer, after RoPE, of the last W tokens (the last 1024 are sent where
            there are more): what scores by attention and the receipt are measured with.
        num_query_heads: Hq, where there are no queries to tell; default Hkv.
        block_table: int32 [ceil(T / page's slots)], physical page of each page of paged K and V
            (`AxisTensor`), the same for all layers.
        num_tokens: T, for paged K and V without token ids.
        log_sum_exp: float32 [W, Hq] a layer, of those queries over all keys (Scoring.lse_base).
        accumulated_scores: float32 [Hq, T] or [Hkv, T] a layer, attention received (H2O).
        key_scales: float32 [Hkv] or [T, Hkv] a layer, for fp8 and int8 keys.
        value_scales: likewise.
        rope: rotation the keys carry; needed for positions "contiguous".
        shadow: return the tensors as they came, and record what compression would have cost.
        receipt: measure what compression cost (a pass of the queries over K and V).
        keep: also keep the sequence as it came, as a session (`session_options()`).
        session_policy: of that session; see `index_policy`.
        dtype: what arrays of unsigned integers hold: "bfloat16" in uint16, "float8_e4m3fn" in
            uint8.
        output: where the layers' tensors go instead of into the stream, from its begin on: a
            `HostRegion` or `DeviceRegion` with room for them, in use until the result is not (its
            arrays are views). InvalidRequestError names the bytes needed where it is too small.
        on_layer: takes each layer as soon as all of it is here, in ascending order, while later
            ones are still computed; the result has them too. Called between reads of the stream:
            what takes long belongs elsewhere. What it raises ends the call.
        on_error: "passthrough": where the service is away (unavailable, overloaded, too slow,
            faulty), warn with PassthroughWarning and return the caller's K and V as the result,
            with `passed_through` and `error` set. Errors of the request are raised in any case.
            None = as the client was told.
        request_id: for logs; empty = the server makes one.
        timeout_seconds: deadline of the call with all its tries; None = the client's.

    Raises:
        InvalidRequestError: shape, layout, policy or data; see `violations`.
        PreconditionError: EVIDENCE_MISSING, QUALITY_FLOOR.
        NotFoundError: unknown preset, profile or region.
        ExhaustedError: queue full, or memory not available, after all tries.
        UnavailableError, DeadlineError, DataLossError, UnsupportedError: as their names say.
    """
    evidence = {
        "queries": queries,
        "log_sum_exp": log_sum_exp,
        "accumulated_scores": accumulated_scores,
        "keys": keys,
        "key_scales": key_scales,
        "values": values,
        "value_scales": value_scales,
    }
    sequence = _Sequence(token_ids, num_query_heads, num_tokens, block_table)
    begin, inputs = _request(context, sequence, evidence, dtype)
    _fill(begin, policy, rope, request_id)
    begin.shadow, begin.no_receipt = shadow, not receipt
    _place(begin, output)
    if keep is not None:
        begin.session.CopyFrom(keep)
        if session_policy is not None:
            begin.session_policy.CopyFrom(as_policy(session_policy))
    like = _kind_of(keys)

    def passthrough(error: errors.DynSplitError) -> Compressed:
        # Up are the client's _run and method, then the caller.
        warnings.warn(f"KV passed through: {error}", errors.PassthroughWarning, stacklevel=4)
        return _passed_through(begin.shape, keys, values, error)

    return Stream(
        "Compression",
        "Compress",
        begin,
        inputs,
        lambda done: results.assemble(done, like=like, rope=rope, output=output),
        repeatable=keep is None,
        passthrough=passthrough if (on_error or context.on_error) == "passthrough" else None,
        timeout_seconds=timeout_seconds,
        on_layer=results.delivery(on_layer, begin.shape, like, output),
    )


def plan(
    context: Context,
    token_ids: npt.ArrayLike | None,
    *,
    shape: types_pb2.SequenceShape | None = None,
    keys: Tensors | None = None,
    values: Tensors | None = None,
    queries: Tensors | None = None,
    num_query_heads: int | None = None,
    block_table: npt.ArrayLike | None = None,
    log_sum_exp: Tensors | None = None,
    accumulated_scores: Tensors | None = None,
    key_scales: Tensors | None = None,
    value_scales: Tensors | None = None,
    policy: Policy = None,
    rope: types_pb2.Rope | None = None,
    receipt: bool = True,
    dtype: str | None = None,
    request_id: str = "",
    timeout_seconds: float | None = None,
) -> Stream[Compressed]:
    """Decides only: the layers come back with `tokens` and without pages.

    Args:
        context: of the client.
        token_ids: int32 [T]; None only where the segmentation does not read them.
        shape: of the sequence; needed where there are no keys to tell.
        keys: needed where the scoring or the receipt reads them.
        values: not needed; where present they sharpen the receipt.
        queries: as in `compress`.
        num_query_heads: as in `compress`.
        block_table: as in `compress`.
        log_sum_exp: as in `compress`.
        accumulated_scores: as in `compress`.
        key_scales: as in `compress`.
        value_scales: as in `compress`.
        policy: as in `compress`.
        rope: as in `compress`.
        receipt: as in `compress`.
        dtype: as in `compress`.
        request_id: as in `compress`.
        timeout_seconds: as in `compress`.

    Raises:
        ValueError: neither keys nor shape.
        DynSplitError: as `compress`.
    """
    evidence = {
        "queries": queries,
        "log_sum_exp": log_sum_exp,
        "accumulated_scores": accumulated_scores,
        "keys": keys,
        "key_scales": key_scales,
        "values": values,
        "value_scales": value_scales,
    }
    sequence = _Sequence(token_ids, num_query_heads, None, block_table, shape)
    begin, inputs = _request(context, sequence, evidence, dtype)
    _fill(begin, policy, rope, request_id)
    begin.no_receipt = not receipt
    return Stream(
        "Compression",
        "Plan",
        begin,
        inputs,
        results.assemble,
        repeatable=True,
        timeout_seconds=timeout_seconds,
    )


def apply(
    context: Context,
    planned: Compressed,
    keys: Tensors,
    values: Tensors | None,
    *,
    queries: Tensors | None = None,
    block_table: npt.ArrayLike | None = None,
    key_scales: Tensors | None = None,
    value_scales: Tensors | None = None,
    rope: types_pb2.Rope | None = None,
    dtype: str | None = None,
    output: Room | None = None,
    on_layer: OnLayer | None = None,
    request_id: str = "",
    timeout_seconds: float | None = None,
) -> Stream[Compressed]:
    """Moves only, as a plan says: on this server or another, the same bytes.

    Args:
        context: of the client.
        planned: what `plan` (or `compress`) returned; its hash is checked (PreconditionError,
            PLAN_MISMATCH).
        keys: as in `compress`.
        values: as in `compress`.
        queries: for a receipt.
        block_table: as in `compress`.
        key_scales: as in `compress`.
        value_scales: as in `compress`.
        rope: as in `compress`.
        dtype: as in `compress`.
        output: as in `compress`.
        on_layer: as in `compress`.
        request_id: as in `compress`.
        timeout_seconds: as in `compress`.
    """
    evidence = {
        "queries": queries,
        "keys": keys,
        "key_scales": key_scales,
        "values": values,
        "value_scales": value_scales,
    }
    sequence = _Sequence(None, None, None, block_table, planned.plan.shape)
    begin, inputs = _request(context, sequence, evidence, dtype)
    _fill(begin, planned.plan.policy, rope, request_id)
    begin.plan.CopyFrom(planned.plan)
    _place(begin, output)
    starts = streams.Input.of(types_pb2.TENSOR_KIND_BLOCK_STARTS, None, planned.block_starts, None)
    inputs.insert(0, starts)
    for layer in planned.layers:
        at = next(i for i, entry in enumerate(inputs) if entry.layer == layer.layer)
        kind = types_pb2.TENSOR_KIND_KEPT_TOKENS
        inputs.insert(at, streams.Input.of(kind, layer.layer, layer.tokens, None))
    like = _kind_of(keys)
    return Stream(
        "Compression",
        "Apply",
        begin,
        inputs,
        lambda done: results.assemble(done, like=like, rope=rope, output=output),
        repeatable=True,
        timeout_seconds=timeout_seconds,
        on_layer=results.delivery(on_layer, begin.shape, like, output),
    )


def calibrate(
    context: Context,
    token_ids: npt.ArrayLike,
    keys: Tensors,
    queries: Tensors,
    query_positions: npt.ArrayLike,
    *,
    profile: str = "",
    options: compression_pb2.CalibrationOptions | None = None,
    dtype: str | None = None,
    request_id: str = "",
    timeout_seconds: float | None = None,
) -> Stream[compression_pb2.DelimiterProfile]:
    """Measures the importance of delimiters (arXiv 2602.03184, section 3); stores nothing.

    `Client.put_profile` stores what comes back, once it has a name of its own.

    Args:
        context: of the client.
        token_ids: int32 [T].
        keys: [T, Hkv, D] a layer, after RoPE.
        queries: [W, Hq, D] a layer, after RoPE.
        query_positions: int32 [W], ascending: the tokens that the queries belong to.
        profile: its token types are the candidates, unless `options` names some.
        options: proto CalibrationOptions.
        dtype: as in `compress`.
        request_id: as in `compress`.
        timeout_seconds: as in `compress`.
    """
    evidence = {"queries": queries, "keys": keys}
    sequence = _Sequence(token_ids, None, None, None)
    begin, inputs = _request(context, sequence, evidence, dtype, limit_queries=False)
    if profile:
        begin.policy.segmentation.profile = profile
    if options is not None:
        begin.calibration.CopyFrom(options)
    begin.request_id = request_id
    positions = np.ascontiguousarray(query_positions, np.int32)
    kind = types_pb2.TENSOR_KIND_QUERY_POSITIONS
    inputs.insert(1, streams.Input.of(kind, None, positions, None))
    return Stream(
        "Compression",
        "Calibrate",
        begin,
        inputs,
        lambda done: done.end.profile,
        repeatable=True,
        timeout_seconds=timeout_seconds,
    )


def fetch(
    context: Context,
    session_id: str,
    *,
    layers: Sequence[int] = (),
    tokens: Mapping[int, npt.ArrayLike] | None = None,
    policy: types_pb2.Policy | None = None,
    like: tensors.Array = None,
    output: Room | None = None,
    request_id: str = "",
    timeout_seconds: float | None = None,
) -> Stream[Compressed]:
    """Streams K and V of a session as uniform pages.

    A connection that breaks is taken up again after the last complete layer.

    Args:
        context: of the client.
        session_id: the session.
        layers: which, ascending; empty = all.
        tokens: int32 [groups, n] by layer: rows wanted, ascending, in as many groups as the
            session's scope has; layers without an entry come whole.
        policy: encoding, positions and page_size are read.
        like: a tensor whose kind and device the pages take; None = numpy.
        output: as in `compress`; a broken call is then begun anew.
        request_id: for logs.
        timeout_seconds: as in `compress`.
    """
    target = compression_pb2.SessionTarget(session_id=session_id, layers=layers)
    begin = compression_pb2.Begin(
        request_id=request_id, tenant=context.tenant, target=target, policy=policy
    )
    _place(begin, output)
    kind = types_pb2.TENSOR_KIND_KEPT_TOKENS
    inputs = [
        streams.Input.of(kind, layer, np.ascontiguousarray(rows, np.int32), None)
        for layer, rows in sorted((tokens or {}).items())
    ]

    def resume(broken: streams.Conversation) -> compression_pb2.Begin:
        last = broken.last_complete()
        again = compression_pb2.Begin()
        again.CopyFrom(begin)
        if last is not None:  # all of it is here: nothing more of that layer is wanted
            again.target.resume.layer = last.plan.layer
            again.target.resume.tensor_index = len(last.tensors)
        return again

    return Stream(
        "Sessions",
        "Fetch",
        begin,
        inputs,
        lambda done: results.assemble(done, shape=done.end.session.shape, like=like, output=output),
        repeatable=True,
        resume=resume if output is None else None,
        timeout_seconds=timeout_seconds,
    )


def _fill(
    begin: compression_pb2.Begin, policy: Policy, rope: types_pb2.Rope | None, request_id: str
) -> None:
    begin.request_id = request_id
    chosen = as_policy(policy)
    if chosen is not None:
        begin.policy.CopyFrom(chosen)
    if rope is not None:
        begin.rope.CopyFrom(rope)


def _place(begin: compression_pb2.Begin, output: Room | None) -> None:
    if output is not None:
        begin.output.region.CopyFrom(output.place.to_proto())


def _kind_of(tensor: Tensors) -> tensors.Array:
    first: Any = tensor[0]
    first = first.tensor if isinstance(first, tensors.AxisTensor) else first
    return first if tensors.is_torch(first) else None


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """What a call says of its sequence apart from the layers' tensors."""

    token_ids: npt.ArrayLike | None
    num_query_heads: int | None
    num_tokens: int | None
    block_table: npt.ArrayLike | None
    shape: types_pb2.SequenceShape | None = None

    def shape_of(self, given: Mapping[str, Any]) -> types_pb2.SequenceShape:
        """As it was given, or as the keys tell."""
        if self.shape is not None:
            return self.shape
        keys, query_heads = given.get("keys"), self.num_query_heads
        if keys is None:
            raise ValueError("without keys the shape must be given")
        if query_heads is None and "queries" in given:
            query_heads = given["queries"][0].shape[1]
        tokens, kv_heads, dim = tensors.sequence_axes(keys[0])
        if tokens is None and self.token_ids is not None:
            tokens = len(np.asarray(self.token_ids))
        tokens = self.num_tokens or tokens
        if tokens is None:
            raise ValueError(
                "paged keys do not tell the number of tokens: num_tokens must be given"
            )
        return types_pb2.SequenceShape(
            num_layers=len(keys),
            num_query_heads=query_heads or kv_heads,
            num_kv_heads=kv_heads,
            num_tokens=tokens,
            head_dim=dim,
        )


def _request(
    context: Context,
    sequence: _Sequence,
    evidence: Mapping[str, Tensors | None],
    dtype: str | None,
    limit_queries: bool = True,
) -> tuple[compression_pb2.Begin, list[streams.Input]]:
    """Begin with tenant and shape, and the tensors in the order of sending."""
    given: dict[str, Any] = {name: part for name, part in evidence.items() if part is not None}
    shape = sequence.shape_of(given)
    if limit_queries:
        for name in ("queries", "log_sum_exp"):
            if name in given:
                given[name] = [_last_rows(tensor) for tensor in given[name]]
    ids = sequence.token_ids
    inputs = inputs_of(
        None if ids is None else np.ascontiguousarray(ids, np.int32),
        given,
        shape.num_layers,
        dtype,
        sequence.block_table,
    )
    return compression_pb2.Begin(tenant=context.tenant, shape=shape), inputs


def _last_rows(tensor: Tensor) -> Tensor:
    if isinstance(tensor, tensors.RegionTensor) or len(tensor) <= _MAX_QUERIES:
        return tensor
    return tensor[-_MAX_QUERIES:]


def _passed_through(
    shape: types_pb2.SequenceShape, keys: Any, values: Any, error: errors.DynSplitError
) -> Compressed:
    """The caller's tensors as a result that keeps everything: one page of T slots a layer."""
    tokens = np.arange(shape.num_tokens, dtype=np.int32)[None]
    made = types_pb2.Plan(shape=shape)
    made.policy.transform = types_pb2.TRANSFORM_INDEX
    made.policy.positions = types_pb2.POSITIONS_ORIGINAL
    layers = []
    for layer in range(shape.num_layers):
        decision = made.layers.add(
            layer=layer, num_groups=1, num_kept_tokens=shape.num_tokens, dense=True
        )
        key, value = keys[layer], None if values is None else values[layer]
        elsewhere = isinstance(key, tensors.RegionTensor | tensors.AxisTensor)
        layers.append(
            CompressedLayer(
                layer=layer,
                plan=decision,
                receipt=None,
                tokens=tokens,
                key_pages=key if elsewhere else key[None],
                value_pages=value if elsewhere or value is None else value[None],
            )
        )
    return Compressed(
        layers=layers,
        plan=made,
        receipt=None,
        block_starts=np.array([0, shape.num_tokens], np.int32),
        open_block_begin=int(shape.num_tokens),
        backend="none",
        passed_through=True,
        error=error,
        road="none",
    )

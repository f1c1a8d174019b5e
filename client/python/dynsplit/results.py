# SPDX-License-Identifier: Apache-2.0
"""What compression returns: layers of kept tokens and pages, the plan, the receipt.

Letters in shapes: T tokens, Hkv KV heads, D head dimension, n tokens kept per KV head, B semantic
blocks, `groups` kept sets of a layer: 1, or Hkv. Arrays are numpy's, or torch's (on the device of
the keys) where the keys came as torch tensors. bfloat16 and fp8 are ml_dtypes' where that package
is installed, unsigned integers of the same width elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dynsplit import container, errors, streams, tensors
from dynsplit.v1 import compression_pb2, container_pb2, types_pb2

_QUANTISED = (types_pb2.DTYPE_FLOAT8_E4M3, types_pb2.DTYPE_FLOAT8_E5M2, types_pb2.DTYPE_INT8)


class Room(Protocol):
    """Memory registered as writable: `dynsplit.shared.Region` and its like."""

    @property
    def place(self) -> tensors.RegionSlice:
        """Where it begins."""
        ...

    def bytes_at(self, offset_bytes: int, byte_size: int) -> tensors.Array:
        """uint8 [byte_size], a view of numpy or torch."""
        ...


@dataclasses.dataclass(frozen=True)
class CompressedLayer:
    """One layer of a result.

    Attributes:
        layer: number within the request.
        plan: the decision (proto LayerPlan).
        receipt: what it cost on the supplied queries (proto LayerReceipt); None without one.
        tokens: int32 [groups, n], ascending original positions.
        key_pages: [pages, page_size, Hkv, D] in the bits the encoding says; slots past n are zero.
            Row j of head h is token tokens[h if groups > 1 else 0, j]. None where only a plan was
            asked for.
        value_pages: likewise.
        key_scales: float32 [Hkv] or [pages, page_size, Hkv], for fp8 and int8.
        value_scales: likewise.
        block_key_min: [B, Hkv, D], element-wise over the keys of a block (transform "index").
        block_key_max: likewise.
        block_key_mean: likewise.
    """

    layer: int
    plan: types_pb2.LayerPlan
    receipt: types_pb2.LayerReceipt | None
    tokens: npt.NDArray[np.int32]
    key_pages: tensors.Array = None
    value_pages: tensors.Array = None
    key_scales: tensors.Array = None
    value_scales: tensors.Array = None
    block_key_min: tensors.Array = None
    block_key_max: tensors.Array = None
    block_key_mean: tensors.Array = None

    @property
    def num_kept(self) -> int:
        """Tokens kept per KV head, n."""
        return int(self.tokens.shape[-1])

    @property
    def quantised(self) -> bool:
        """Whether `rows` are codes that the scales belong to."""
        return self.key_scales is not None or self.value_scales is not None

    def rows(self) -> tuple[tensors.Array, tensors.Array]:
        """K and V of the kept tokens, [n, Hkv, D] each, views of the pages; codes if quantised.

        Raises:
            ValueError: there are no pages (`Client.plan`).
        """
        if self.key_pages is None:
            raise ValueError("a plan has no pages")
        keys, values = (
            pages.reshape(-1, *pages.shape[2:])[: self.num_kept]
            for pages in (self.key_pages, self.value_pages)
        )
        return keys, values

    def decoded(self) -> tuple[tensors.Array, tensors.Array]:
        """As `rows`; quantised ones as float32, code times scale.

        Raises:
            ImportError: fp8 in numpy, and ml_dtypes is not installed.
            ValueError: there are no pages.
        """
        keys, values = self.rows()
        return self._decode(keys, self.key_scales), self._decode(values, self.value_scales)

    def _decode(self, rows: tensors.Array, scales: tensors.Array) -> tensors.Array:
        if scales is None:
            return rows
        if scales.ndim == 3:
            scales = scales.reshape(-1, scales.shape[-1])[: self.num_kept]
        if not tensors.is_torch(rows) and rows.dtype == np.uint8:
            raise ImportError("decoding fp8 in numpy needs the package ml_dtypes")
        exact = rows.float() if tensors.is_torch(rows) else rows.astype(np.float32)
        return exact * scales[..., None]


@dataclasses.dataclass(frozen=True)
class Compressed:
    """What compress, plan, apply and fetch return.

    Attributes:
        layers: ascending.
        plan: the whole decision with its hash (proto Plan).
        receipt: over all layers (proto Receipt); None where none was measured.
        block_starts: int32 [B + 1], first token of each semantic block, then T.
        open_block_begin: first token of the open block; T if none.
        representation_salt: append it to prefix-cache keys; empty where bytes are the input's.
        bytes_in: K and V as the server received them, bytes.
        bytes_out: pages, scales and summaries returned, bytes; with shadow, `shadow_bytes_out` is
            what compression would have returned.
        shadow_bytes_out: see above.
        seconds: per stage, in the server (proto StageSeconds).
        total_seconds: of the request, in the server.
        backend: "cpu" or "cuda"; "none" where the caller's tensors were passed through.
        session: the session as it is now (compress with keep, fetch); None otherwise.
        passed_through: the service was away, and `layers` are the caller's own K and V
            (on_error="passthrough"), all tokens kept.
        error: why, with passed_through.
        road: how the tensors travelled.
        sent_bytes: tensor bytes this client put into streams; those in shared memory do not count.
        received_bytes: tensor bytes that came in streams.
        rope: rotation that the keys carried, where it was given.
    """

    layers: list[CompressedLayer]
    plan: types_pb2.Plan
    receipt: types_pb2.Receipt | None
    block_starts: npt.NDArray[np.int32]
    open_block_begin: int = 0
    representation_salt: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    shadow_bytes_out: int = 0
    seconds: types_pb2.StageSeconds | None = None
    total_seconds: float = 0.0
    backend: str = ""
    session: types_pb2.SessionInfo | None = None
    passed_through: bool = False
    error: errors.DynSplitError | None = None
    road: str = ""
    sent_bytes: int = 0
    received_bytes: int = 0
    rope: types_pb2.Rope | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence before compression, T."""
        return int(self.plan.shape.num_tokens)

    @property
    def contiguous(self) -> bool:
        """Whether keys were re-rotated to positions 0..n-1, where the consumer then goes on."""
        return bool(self.plan.policy.positions == types_pb2.POSITIONS_CONTIGUOUS)

    def save(
        self,
        path: str | Path,
        *,
        token_ids: npt.ArrayLike | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Writes a container file (.dskv), as `dynsplit compress --output` does.

        Args:
            path: replaced atomically.
            token_ids: [T], so that the file can be read without the prompt.
            metadata: for people: "model", "text.title", ...

        Raises:
            OSError: it cannot be written.
        """
        header = container_pb2.ContainerHeader(
            shape=self.plan.shape,
            rope=self.rope,
            plan=self.plan,
            receipt=self.receipt,
            representation_salt=self.representation_salt,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            open_block_begin=self.open_block_begin,
            metadata=metadata or {},
        )
        container.write(path, header, list(self._sections(token_ids)))

    def _sections(self, token_ids: npt.ArrayLike | None) -> Any:
        kinds = types_pb2.TensorKind
        if token_ids is not None:
            yield container.section("TOKEN_IDS", None, np.ascontiguousarray(token_ids, np.int32))
        yield container.section("BLOCK_STARTS", None, self.block_starts)
        for layer in self.layers:
            yield container.section("KEPT_TOKENS", layer.layer, layer.tokens)
            if layer.key_pages is not None:
                table = np.arange(len(layer.key_pages), dtype=np.int32)
                yield container.section("PAGE_TABLE", layer.layer, table)
            for field, kind in _FIELDS.items():
                array = getattr(layer, field)
                if array is None:
                    continue
                part = container.section(kinds.Name(kind)[12:], layer.layer, array)
                if field.endswith("_scales"):
                    part.descriptor.scale_granularity = (
                        types_pb2.SCALE_GRANULARITY_HEAD
                        if array.ndim == 1
                        else types_pb2.SCALE_GRANULARITY_TOKEN_HEAD
                    )
                yield part


_FIELDS = {
    "key_pages": types_pb2.TENSOR_KIND_KEY_PAGES,
    "value_pages": types_pb2.TENSOR_KIND_VALUE_PAGES,
    "key_scales": types_pb2.TENSOR_KIND_KEY_PAGE_SCALES,
    "value_scales": types_pb2.TENSOR_KIND_VALUE_PAGE_SCALES,
    "block_key_min": types_pb2.TENSOR_KIND_BLOCK_KEY_MIN,
    "block_key_max": types_pb2.TENSOR_KIND_BLOCK_KEY_MAX,
    "block_key_mean": types_pb2.TENSOR_KIND_BLOCK_KEY_MEAN,
}


def dense_shape(
    descriptor: types_pb2.TensorDescriptor,
    shape: types_pb2.SequenceShape,
    plan: types_pb2.LayerPlan | None,
    page_size: int,
    num_blocks: int,
) -> tuple[int, ...]:
    """Shape of a result tensor: its dims, or the default of its kind.

    Raises:
        InternalError: the bytes are not of that shape.
    """
    kinds, heads, dim = types_pb2, shape.num_kv_heads, shape.head_dim
    size = tensors.dtype_bytes(descriptor.dtype)
    groups, kept = (plan.num_groups, plan.num_kept_tokens) if plan is not None else (0, 0)
    pages = -(-kept // max(1, page_size))
    if descriptor.dims:
        found = tuple(entry.size for entry in descriptor.dims)
    elif descriptor.kind == kinds.TENSOR_KIND_KEPT_TOKENS:
        found = (groups, kept)
    elif descriptor.kind in (kinds.TENSOR_KIND_KEY_PAGES, kinds.TENSOR_KIND_VALUE_PAGES):
        found = (pages, page_size, heads, dim)
    elif descriptor.kind in (
        kinds.TENSOR_KIND_KEY_PAGE_SCALES,
        kinds.TENSOR_KIND_VALUE_PAGE_SCALES,
    ):
        found = (heads,) if descriptor.byte_size == size * heads else (pages, page_size, heads)
    elif descriptor.kind in (
        kinds.TENSOR_KIND_BLOCK_KEY_MIN,
        kinds.TENSOR_KIND_BLOCK_KEY_MAX,
        kinds.TENSOR_KIND_BLOCK_KEY_MEAN,
    ):
        found = (num_blocks, heads, dim)
    else:
        found = (descriptor.byte_size // size,)
    if math.prod(found) * size != descriptor.byte_size:
        name = types_pb2.TensorKind.Name(descriptor.kind)
        raise errors.InternalError(
            f"{name} has {descriptor.byte_size} bytes, which is no {found}", code="INTERNAL"
        )
    return found


def assemble(
    results: streams.Results,
    *,
    shape: types_pb2.SequenceShape | None = None,
    like: tensors.Array = None,
    rope: types_pb2.Rope | None = None,
    output: Room | None = None,
) -> Compressed:
    """The result of a stream.

    Args:
        results: complete.
        shape: of the sequence; None = the plan's.
        like: kind and device of the arrays.
        rope: as it was sent.
        output: memory that the layers' tensors were written to, where they did not travel.

    Raises:
        InternalError: sizes contradict each other.
    """
    end = results.end
    plan = end.plan
    sequence = results.sequence or compression_pb2.SequenceResult()
    starts = np.empty(0, np.int32)
    for descriptor in sequence.tensors:
        if descriptor.kind == types_pb2.TENSOR_KIND_BLOCK_STARTS:
            starts = results.tensors[descriptor.id].view(np.int32)
    page_size = plan.policy.page_size or results.accepted.policy.page_size
    layers = [
        _layer(entry, results, (shape or plan.shape, page_size, sequence.num_blocks), like, output)
        for entry in results.layers
    ]
    return Compressed(
        layers=layers,
        plan=plan,
        receipt=end.receipt if end.HasField("receipt") else None,
        block_starts=starts,
        open_block_begin=sequence.open_block_begin,
        representation_salt=end.representation_salt,
        bytes_in=end.bytes_in,
        bytes_out=end.bytes_out,
        shadow_bytes_out=end.shadow_bytes_out,
        seconds=end.seconds,
        total_seconds=end.total_seconds,
        backend=end.backend,
        session=end.session if end.HasField("session") else None,
        road=results.road,
        sent_bytes=results.sent_bytes,
        received_bytes=results.received_bytes,
        rope=rope,
    )


def delivery(
    on_layer: Callable[[CompressedLayer], None] | None,
    shape: types_pb2.SequenceShape,
    like: tensors.Array,
    output: Room | None,
) -> Callable[[streams.Results, Any], None] | None:
    """`on_layer` as a stream calls it: each layer once, however many tries the call takes."""
    if on_layer is None:
        return None
    last = -1

    def deliver(results: streams.Results, entry: compression_pb2.LayerResult) -> None:
        nonlocal last
        if entry.plan.layer <= last:
            return
        last = entry.plan.layer
        blocks = results.sequence.num_blocks if results.sequence else 0
        geometry = (shape, results.accepted.policy.page_size, blocks)
        on_layer(_layer(entry, results, geometry, like, output))

    return deliver


def _layer(
    entry: compression_pb2.LayerResult,
    results: streams.Results,
    geometry: tuple[types_pb2.SequenceShape, int, int],
    like: tensors.Array,
    output: Room | None,
) -> CompressedLayer:
    shape, page_size, num_blocks = geometry
    found: dict[int, tuple[types_pb2.TensorDescriptor, tuple[int, ...]]] = {}
    for descriptor in entry.tensors:
        dims = dense_shape(descriptor, shape, entry.plan, page_size, num_blocks)
        found[descriptor.kind] = (descriptor, dims)

    def take(kind: int, like: tensors.Array) -> tensors.Array:
        if kind not in found:
            return None
        descriptor, dims = found[kind]
        if output is not None and descriptor.HasField("location"):
            size, offset = descriptor.byte_size, descriptor.location.region.offset_bytes
            data = output.bytes_at(offset, size)
            if tensors.is_torch(data) and kind != types_pb2.TENSOR_KIND_KEPT_TOKENS:
                like = data  # a view of the device's memory
        else:
            data = results.tensors[descriptor.id]
        return tensors.from_bytes(data, descriptor.dtype, dims, like)

    tokens = take(types_pb2.TENSOR_KIND_KEPT_TOKENS, None)
    if tokens is None:  # shadow, and layers that came whole
        tokens = np.arange(entry.plan.num_kept_tokens, dtype=np.int32)[None]
    return CompressedLayer(
        layer=entry.plan.layer,
        plan=entry.plan,
        receipt=entry.receipt if entry.HasField("receipt") else None,
        tokens=tokens,
        **{field: take(kind, like) for field, kind in _FIELDS.items()},
    )


def load(path: str | Path) -> tuple[Compressed, container.Container]:
    """Reads a container file of one compressed sequence, checking every checksum.

    Returns:
        The result as `Client.compress` gave it, in numpy, and the file with its token ids and
        metadata.

    Raises:
        OSError: it cannot be read.
        DataLossError: it is damaged.
        ValueError: it is no container.
    """
    file = container.read(path)
    header = file.header
    results = streams.Results(road="file")
    results.accepted = compression_pb2.Accepted(policy=header.plan.policy)
    results.sequence = compression_pb2.SequenceResult(
        num_blocks=header.plan.num_blocks, open_block_begin=header.open_block_begin
    )
    results.end = compression_pb2.CompressEnd(
        plan=header.plan,
        receipt=header.receipt if header.HasField("receipt") else None,
        representation_salt=header.representation_salt,
        bytes_in=header.bytes_in,
        bytes_out=header.bytes_out,
        backend="file",
    )
    receipts = {entry.layer: entry for entry in header.receipt.layers}
    for plan in header.plan.layers:
        results.layers.append(
            compression_pb2.LayerResult(plan=plan, receipt=receipts.get(plan.layer))
        )
    for entry, data in zip(header.tensors, file.sections, strict=True):
        tensor = entry.tensor
        results.tensors[tensor.id] = data
        if not tensor.HasField("layer"):
            results.sequence.tensors.append(tensor)
            continue
        for layer in results.layers:
            if layer.plan.layer == tensor.layer:
                layer.tensors.append(tensor)
    rope = header.rope if header.HasField("rope") else None
    return assemble(results, shape=header.shape, rope=rope), file

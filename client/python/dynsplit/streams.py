# SPDX-License-Identifier: Apache-2.0
"""One stream of compression.proto's grammar, from the client's side.

    client   begin ........ chunk* end
    server   accepted ..... [sequence chunk*] (layer chunk*)* end

Tensors in registered regions are announced in begin and send no chunks. `Conversation` knows the
grammar and does no input or output; `converse` drives it with a blocking call, `converse_async`
with one of grpc.aio. Chunks wait until the server has accepted the request, so that a refusal costs
no transfer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from dynsplit import errors, tensors
from dynsplit.v1 import compression_pb2, types_pb2

_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 4096, 3 << 20
_DATA_TAG = bytes([15 << 3 | 2])  # of CompressRequest.data
# What grpc.aio says where the server ended a call before it read anything (it drains, or has too
# many streams), and the write that failed was noticed before the status, which then is lost.
_CORE = "Internal error from Core"
_AXES = {name: types_pb2.Axis.Value(f"AXIS_{name.upper()}") for name in tensors.AXES}
_DENSE = ("token", "head", "channel")


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor to send: what it holds, of which layer (None: of the sequence), and its elements."""

    kind: types_pb2.TensorKind
    layer: int | None
    tensor: tensors.HostTensor | tensors.RegionTensor | tensors.DeviceTensor
    axes: tuple[str, ...] = ()
    """Names of the axes; empty = the default layout of the kind, row-major."""
    strides: tuple[int, ...] | None = None
    """Byte strides of `axes`; None = row-major."""

    @classmethod
    def of(
        cls,
        kind: types_pb2.TensorKind,
        layer: int | None,
        tensor: tensors.Tensor | tensors.AxisTensor,
        dtype: str | None,
    ) -> Input:
        """Takes any tensor; what cannot travel as it lies is copied into row-major order here.

        Raises:
            ValueError: a type that the wire has not.
        """
        axes: tuple[str, ...] = ()
        if isinstance(tensor, tensors.AxisTensor):
            axes, tensor = tensor.axes, tensor.tensor
        if tensors.is_device(tensor):
            return cls(kind, layer, tensors.DeviceTensor.of(tensor, dtype), axes)
        host = tensors.as_host(tensor, dtype)
        if isinstance(host, tensors.RegionTensor):
            return cls(kind, layer, host, axes)
        strides = host.dense_strides() if axes or host.data.ndim == len(_DENSE) else None
        if strides is None or host.data.flags.c_contiguous:
            dense = dataclasses.replace(host, data=np.ascontiguousarray(host.data))
            return cls(kind, layer, dense, axes)
        return cls(kind, layer, host, axes or _DENSE, strides)

    def on_host(self) -> Input:
        """The same with its elements in host memory, where they lie on a device."""
        if isinstance(self.tensor, tensors.DeviceTensor):
            return dataclasses.replace(self, tensor=self.tensor.to_host())
        return self

    def describe(self, tensor_id: int) -> types_pb2.TensorDescriptor:
        """Its entry in begin."""
        tensor = self.tensor
        descriptor = types_pb2.TensorDescriptor(
            id=tensor_id,
            kind=self.kind,
            layer=self.layer,
            dtype=tensors.dtype_code(tensor.dtype),
            byte_size=tensor.nbytes,
        )
        if self.axes:
            strides = self.strides or _row_major(tensor.shape, tensor.nbytes)
            for axis, size, stride in zip(self.axes, tensor.shape, strides, strict=True):
                descriptor.dims.add(axis=_AXES[axis], size=size, stride_bytes=stride)
        if isinstance(tensor, tensors.RegionTensor):
            descriptor.location.region.CopyFrom(tensor.place.to_proto())
        return descriptor


def _row_major(shape: tuple[int, ...], byte_size: int) -> tuple[int, ...]:
    strides = []
    for size in shape:
        byte_size //= size
        strides.append(byte_size)
    return tuple(strides)


def on_host(inputs: Sequence[Input]) -> list[Input]:
    """All of them in host memory (or in regions): what can travel in a stream."""
    return [entry.on_host() for entry in inputs]


@dataclasses.dataclass(frozen=True)
class Wire:
    """How streams travel; see the arguments of `dynsplit.Client`."""

    chunk_bytes: int = 2 << 20
    max_open_layers: int = 0
    max_result_bytes: int = 64 << 30

    def __post_init__(self) -> None:
        """Checks.

        Raises:
            ValueError: chunk_bytes is out of its range.
        """
        if not _MIN_CHUNK_BYTES <= self.chunk_bytes <= _MAX_CHUNK_BYTES:
            raise ValueError(
                f"chunk_bytes is {self.chunk_bytes}; must be in "
                f"[{_MIN_CHUNK_BYTES}, {_MAX_CHUNK_BYTES}]"
            )


@dataclasses.dataclass
class Results:
    """All that came back."""

    accepted: Any = None
    sequence: Any = None
    layers: list[Any] = dataclasses.field(default_factory=list)
    end: Any = None
    tensors: dict[int, npt.NDArray[np.uint8]] = dataclasses.field(default_factory=dict)
    """Bytes of each result tensor, by the id its descriptor gives."""
    sent_bytes: int = 0
    """Tensor bytes that went into chunks, in the call that succeeded."""
    received_bytes: int = 0
    road: str = "inline"
    """How the inputs travelled."""


def serialize(message: Any) -> bytes:
    """Of a stream's requests: chunks are bytes already."""
    return message if isinstance(message, bytes) else bytes(message.SerializeToString())


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _broken(what: str) -> errors.DynSplitError:
    return errors.InternalError(f"server broke the protocol: {what}", code="INTERNAL")


class Conversation:
    """One call: what to send, and what has come, checked; fed with one message at a time.

    It may go over several streams, its shards: whole tensors are spread over them, either way; the
    first one also carries everything else. `take` may be called by one thread a shard.
    """

    def __init__(
        self,
        begin: compression_pb2.Begin,
        inputs: Sequence[Input],
        wire: Wire | None = None,
        num_shards: int = 1,
        on_layer: Callable[[Results, Any], None] | None = None,
    ) -> None:
        """Of begin (complete but for `tensors`) and the tensors in the order of their sending.

        `on_layer` takes each LayerResult, in ascending order, once all of it is in the results.
        """
        self.results = Results()
        self.chunk_bytes = 0  # most bytes of a chunk; 0 until the request is accepted
        self._inputs, self._wire, self._num_shards = inputs, wire or Wire(), num_shards
        self._begin = compression_pb2.Begin()
        self._begin.CopyFrom(begin)
        self._begin.tensors.extend(entry.describe(i + 1) for i, entry in enumerate(inputs))
        self._begin.max_chunk_bytes = self._wire.chunk_bytes
        layers = begin.shape.num_layers
        if self._wire.max_open_layers and layers:
            self._begin.max_open_layers = min(self._wire.max_open_layers, layers)
        if num_shards > 1:
            self._begin.request_id = begin.request_id or uuid.uuid4().hex
            self._begin.num_shards = num_shards
            # Keys and values of as many layers as the shards bring side by side, and one more.
            if not self._begin.max_open_layers and layers:
                self._begin.max_open_layers = min(layers, 2 + (num_shards - 1) // 2)
        self._sent = _spread(inputs, num_shards)
        self._filled: dict[int, tuple[int, int]] = {}  # bytes so far and their checksum
        self._before: list[tuple[Any, list[npt.NDArray[np.uint8]]]] = []
        self._received_before = 0
        self._announced_bytes = 0
        self._on_layer, self._num_delivered = on_layer, 0
        self._delivery = threading.Lock()

    def carry_on(self, broken: Conversation) -> None:
        """Takes over the complete layers of a call that broke; begin.target.resume says so."""
        self._received_before = broken.received_bytes
        self._before = list(broken._before)
        for layer in broken.results.layers[: broken.complete_layers()]:
            parts = [broken.results.tensors[descriptor.id] for descriptor in layer.tensors]
            self._before.append((layer, parts))

    @property
    def received_bytes(self) -> int:
        """Tensor bytes that have come, calls before this one included."""
        return self._received_before + sum(filled for filled, _ in self._filled.values())

    def first(self, shard: int = 0) -> compression_pb2.CompressRequest:
        """The message that opens a stream."""
        begin = self._begin
        if shard > 0:
            begin = compression_pb2.Begin(
                request_id=begin.request_id,
                tenant=begin.tenant,
                shard_index=shard,
                num_shards=self._num_shards,
            )
        return compression_pb2.CompressRequest(begin=begin)

    def rest(self, shard: int = 0) -> Iterator[compression_pb2.CompressRequest | bytes]:
        """A stream's chunks, as they travel, and end; only after `chunk_bytes` is known."""
        for index in self._sent[shard]:
            tensor = self._inputs[index].tensor
            assert isinstance(tensor, tensors.HostTensor)
            yield from self._chunks(index + 1, tensor)
        end = compression_pb2.End(num_tensors=len(self._sent[shard]))
        yield compression_pb2.CompressRequest(end=end)

    def _chunks(self, tensor_id: int, tensor: tensors.HostTensor) -> Iterator[bytes]:
        data = tensor.flat_bytes().data
        crc = 0
        for offset in range(0, len(data), self.chunk_bytes):
            piece = data[offset : offset + self.chunk_bytes]
            crc = tensors.crc32c(piece, crc)
            last = offset + len(piece) == len(data)
            fields = compression_pb2.CompressRequest(
                tensor=tensor_id,
                offset=offset,
                crc32c=tensors.crc32c(piece),
                last=last,
                tensor_crc32c=crc if last else 0,
            )
            # What `data=piece` would serialise to, with one copy of the bytes instead of three.
            size = _varint(len(piece))
            yield b"".join((fields.SerializeToString(), _DATA_TAG, size, piece))

    def expects(self, message: compression_pb2.CompressResponse) -> bool:
        """Whether `take` has a place for it already: chunks may overtake what announces them."""
        return not message.tensor or message.tensor in self._filled

    def take(self, message: compression_pb2.CompressResponse) -> None:
        """The next message of the server.

        Raises:
            DataLossError: a checksum is wrong.
            InternalError: the message has no place here.
        """
        if message.HasField("accepted"):
            self.results.accepted = message.accepted
            limit = message.accepted.max_chunk_bytes or self._wire.chunk_bytes
            self.chunk_bytes = min(limit, self._wire.chunk_bytes)
        elif message.HasField("sequence"):
            self.results.sequence = message.sequence
            self._expect(message.sequence.tensors)
        elif message.HasField("layer"):
            if self._before and message.layer.plan.layer == self._before[-1][0].plan.layer:
                return  # announced again where the server goes on; all of it is here
            self._expect(message.layer.tensors)  # first: other shards look at what is announced
            self.results.layers.append(message.layer)
        elif message.HasField("end"):
            self.results.end = message.end
        elif message.tensor:
            self._take_chunk(message)  # anything else is of a later server, and passed over
        if self._on_layer is not None:
            with self._delivery:
                for layer in self.results.layers[self._num_delivered : self.complete_layers()]:
                    self._num_delivered += 1
                    self._on_layer(self.results, layer)

    def finish(self) -> Results:
        """The results, once the stream has ended.

        Raises:
            InternalError: something is missing.
        """
        if self.results.end is None:
            raise _broken("the stream ended without its last message")
        for tensor_id, (filled, _) in self._filled.items():
            if filled != len(self.results.tensors[tensor_id]):
                raise _broken(f"tensor {tensor_id} is incomplete")
        self.results.received_bytes = self.received_bytes
        self.results.sent_bytes = streamed_bytes(self._inputs)
        layers, number = [], max(self.results.tensors, default=0)
        for layer, parts in self._before:  # ids are those of their own call
            for descriptor, data in zip(layer.tensors, parts, strict=True):
                number += 1
                descriptor.id = number
                self.results.tensors[number] = data
            layers.append(layer)
        self.results.layers[:0] = layers
        return self.results

    def last_complete(self) -> Any:
        """The last layer of which everything has come, here or before; None if there is none."""
        number = self.complete_layers()
        if number:
            return self.results.layers[number - 1]
        return self._before[-1][0] if self._before else None

    def complete_layers(self) -> int:
        """Layers of this call of which everything has come."""
        for index, layer in enumerate(self.results.layers):
            for descriptor in layer.tensors:
                if descriptor.HasField("location"):
                    continue
                if self._filled[descriptor.id][0] != descriptor.byte_size:
                    return index
        return len(self.results.layers)

    def _expect(self, descriptors: Sequence[types_pb2.TensorDescriptor]) -> None:
        for descriptor in descriptors:
            if descriptor.HasField("location"):  # it lies in the caller's memory already
                continue
            self._announced_bytes += descriptor.byte_size
            if self._announced_bytes > self._wire.max_result_bytes:
                raise errors.ExhaustedError(
                    f"result is larger than max_result_bytes, {self._wire.max_result_bytes}",
                    code="RESOURCE_EXHAUSTED",
                )
            self.results.tensors[descriptor.id] = np.empty(descriptor.byte_size, np.uint8)
            self._filled[descriptor.id] = (0, 0)

    def _take_chunk(self, message: Any) -> None:
        if message.tensor not in self._filled:
            raise _broken(f"chunk of unknown tensor {message.tensor}")
        target = self.results.tensors[message.tensor]
        filled, crc = self._filled[message.tensor]
        end = filled + len(message.data)
        if message.offset != filled or end > len(target):
            raise _broken(f"chunk of tensor {message.tensor} at {message.offset}, not {filled}")
        where = f"tensor {message.tensor} at offset {filled}"
        if tensors.crc32c(message.data) != message.crc32c:
            raise errors.DataLossError(f"checksum mismatch in {where}", code="DATA_LOSS")
        target[filled:end] = np.frombuffer(message.data, np.uint8)
        crc = tensors.crc32c(message.data, crc)
        if message.last and crc != message.tensor_crc32c:
            raise errors.DataLossError(f"checksum mismatch up to {where}", code="DATA_LOSS")
        self._filled[message.tensor] = (end, crc)


def streamed_bytes(inputs: Sequence[Input]) -> int:
    """Tensor bytes that travel in chunks."""
    return sum(
        entry.tensor.nbytes for entry in inputs if isinstance(entry.tensor, tensors.HostTensor)
    )


def _spread(inputs: Sequence[Input], num_shards: int) -> list[list[int]]:
    """Which inputs each shard sends: in their order, each on the one with least bytes so far."""
    sent: list[list[int]] = [[] for _ in range(num_shards)]
    loads = [0] * num_shards
    for index, entry in enumerate(inputs):
        if isinstance(entry.tensor, tensors.HostTensor):
            least = loads.index(min(loads))
            sent[least].append(index)
            loads[least] += entry.tensor.nbytes
    return sent


def converse(
    methods: Sequence[Callable[..., Any]],
    conversation: Conversation,
    timeout_seconds: float | None,
) -> Results:
    """Runs one call from begin to end.

    Args:
        methods: the stubs' stream-stream method, one a shard.
        conversation: a fresh one; what has come until an error is in its `results`.
        timeout_seconds: deadline of the whole call; None = none.

    Raises:
        DynSplitError: as the method's .proto file says; DataLossError for damaged results.
    """
    answered = threading.Event()
    announced = threading.Condition()
    failures: list[Exception] = []
    over = False  # nothing more will be announced

    def requests(shard: int) -> Iterator[Any]:
        yield conversation.first(shard)
        answered.wait()
        if conversation.chunk_bytes:
            yield from conversation.rest(shard)

    calls = [method(requests(i), timeout=timeout_seconds) for i, method in enumerate(methods)]

    def placed(message: Any) -> bool:
        return over or conversation.expects(message)

    def listen(shard: int) -> None:
        nonlocal over
        try:
            for message in calls[shard]:
                if not conversation.expects(message):
                    with announced:
                        announced.wait_for(functools.partial(placed, message))
                conversation.take(message)
                if conversation.chunk_bytes:
                    answered.set()
                if not message.tensor:
                    with announced:
                        announced.notify_all()
        except grpc.RpcError as error:
            failures.append(errors.from_rpc_error(error))
        except Exception as error:  # also of `on_layer`
            failures.append(error)
        finally:
            if shard == 0 or failures:
                with announced:
                    over = True
                    announced.notify_all()
            if failures:  # the server ends all alike; one that broke it may not have heard of yet
                _cancel(calls)
                answered.set()

    others = [threading.Thread(target=listen, args=(i,)) for i in range(1, len(calls))]
    try:
        for thread in others:
            thread.start()
        listen(0)
        for thread in others:
            thread.join()
    finally:
        _cancel(calls)
        answered.set()
    if failures:
        raise failures[0] from None
    return conversation.finish()


def _cancel(calls: Sequence[Any]) -> None:
    for call in calls:
        call.cancel()  # no effect on one that has ended


async def converse_async(
    methods: Sequence[Callable[..., Any]],
    conversation: Conversation,
    timeout_seconds: float | None,
) -> Results:
    """As `converse`, with the stream-stream methods of stubs over grpc.aio channels."""
    answered = asyncio.Event()
    announced = asyncio.Condition()
    failures: list[Exception] = []
    over = False

    async def requests(shard: int) -> AsyncIterator[Any]:
        yield conversation.first(shard)
        await answered.wait()
        if conversation.chunk_bytes:
            for message in conversation.rest(shard):
                yield message

    calls = [method(requests(i), timeout=timeout_seconds) for i, method in enumerate(methods)]

    def placed(message: Any) -> bool:
        return over or conversation.expects(message)

    async def listen(shard: int) -> None:
        nonlocal over
        try:
            async for message in calls[shard]:
                if not conversation.expects(message):
                    async with announced:
                        await announced.wait_for(functools.partial(placed, message))
                conversation.take(message)
                if conversation.chunk_bytes:
                    answered.set()
                if not message.tensor:
                    async with announced:
                        announced.notify_all()
        except grpc.RpcError as error:
            failures.append(_failure_of(error))
        except Exception as error:  # also of `on_layer`
            failures.append(error)
        except asyncio.CancelledError:
            if not failures:  # else it is this call that was cancelled, not the task
                raise
        finally:
            if shard == 0 or failures:
                over = True
                async with announced:
                    announced.notify_all()
            if failures:
                _cancel(calls)
                answered.set()

    try:
        await asyncio.gather(*map(listen, range(len(calls))))
    finally:
        _cancel(calls)
        answered.set()
    if failures:
        raise failures[0] from None
    return conversation.finish()


def _failure_of(error: grpc.RpcError) -> errors.DynSplitError:
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == _CORE:
        return errors.UnavailableError("the call broke", code="UNAVAILABLE")
    return errors.from_rpc_error(error)

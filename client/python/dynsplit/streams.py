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
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from dynsplit import errors, tensors
from dynsplit.v1 import compression_pb2, types_pb2

_CHUNK_BYTES = 2 << 20
_DATA_TAG = bytes([15 << 3 | 2])  # of CompressRequest.data
# What grpc.aio says where the server ended a call before it read anything (it drains, or has too
# many streams), and the write that failed was noticed before the status, which then is lost.
_CORE = "Internal error from Core"
_AXES = (types_pb2.AXIS_TOKEN, types_pb2.AXIS_HEAD, types_pb2.AXIS_CHANNEL)


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor to send: what it holds, of which layer (None: of the sequence), and its elements."""

    kind: types_pb2.TensorKind
    layer: int | None
    tensor: tensors.HostTensor | tensors.RegionTensor | tensors.DeviceTensor
    strides: tuple[int, ...] | None = None
    """Byte strides of [token, head, channel], where the elements do not lie in that order."""

    @classmethod
    def of(
        cls,
        kind: types_pb2.TensorKind,
        layer: int | None,
        tensor: tensors.Tensor,
        dtype: str | None,
    ) -> Input:
        """Takes any tensor; what cannot travel as it lies is copied into row-major order here.

        Raises:
            ValueError: a type that the wire has not.
        """
        if tensors.is_device(tensor):
            return cls(kind, layer, tensors.DeviceTensor(tensor))
        host = tensors.as_host(tensor, dtype)
        if isinstance(host, tensors.RegionTensor):
            return cls(kind, layer, host)
        strides = host.dense_strides() if host.data.ndim == len(_AXES) else None
        if strides is None or host.data.flags.c_contiguous:
            return cls(kind, layer, dataclasses.replace(host, data=np.ascontiguousarray(host.data)))
        return cls(kind, layer, host, strides)

    def on_host(self) -> Input:
        """The same with its elements in host memory, where they lie on a device."""
        if isinstance(self.tensor, tensors.DeviceTensor):
            return Input.of(self.kind, self.layer, self.tensor.tensor.cpu(), None)
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
        for axis, size, stride in zip(_AXES, tensor.shape, self.strides or (), strict=False):
            descriptor.dims.add(axis=axis, size=size, stride_bytes=stride)
        if isinstance(tensor, tensors.RegionTensor):
            descriptor.location.region.CopyFrom(tensor.place.to_proto())
        return descriptor


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
    """Tensor bytes that went into chunks in the call that succeeded."""
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
    """One call: what to send, and what has come, checked; fed with one message at a time."""

    def __init__(self, begin: compression_pb2.Begin, inputs: Sequence[Input]) -> None:
        """Of begin (complete but for `tensors`) and the tensors in the order of their sending."""
        self.results = Results()
        self.chunk_bytes = 0  # most bytes of a chunk; 0 until the request is accepted
        self._inputs = inputs
        self._begin = compression_pb2.Begin()
        self._begin.CopyFrom(begin)
        self._begin.tensors.extend(entry.describe(i + 1) for i, entry in enumerate(inputs))
        self._filled: dict[int, tuple[int, int]] = {}  # bytes so far and their checksum
        self._before: list[tuple[Any, list[npt.NDArray[np.uint8]]]] = []

    def carry_on(self, broken: Conversation) -> None:
        """Takes over the complete layers of a call that broke; begin.target.resume says so."""
        self.results.received_bytes += broken.results.received_bytes
        self._before = list(broken._before)
        for layer in broken.results.layers[: broken.complete_layers()]:
            parts = [broken.results.tensors[descriptor.id] for descriptor in layer.tensors]
            self._before.append((layer, parts))

    def first(self) -> compression_pb2.CompressRequest:
        """The message that opens the stream."""
        return compression_pb2.CompressRequest(begin=self._begin)

    def rest(self) -> Iterator[compression_pb2.CompressRequest | bytes]:
        """Chunks, as they travel, and end; only after `chunk_bytes` is known."""
        num_sent = 0
        for index, entry in enumerate(self._inputs):
            if isinstance(entry.tensor, tensors.HostTensor):
                yield from self._chunks(index + 1, entry.tensor)
                num_sent += 1
        yield compression_pb2.CompressRequest(end=compression_pb2.End(num_tensors=num_sent))

    def _chunks(self, tensor_id: int, tensor: tensors.HostTensor) -> Iterator[bytes]:
        data = tensor.flat_bytes().data
        crc = 0
        for offset in range(0, len(data), self.chunk_bytes):
            piece = data[offset : offset + self.chunk_bytes]
            crc = tensors.crc32c(piece, crc)
            last = offset + len(piece) == len(data)
            self.results.sent_bytes += len(piece)
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

    def take(self, message: compression_pb2.CompressResponse) -> None:
        """The next message of the server.

        Raises:
            DataLossError: a checksum is wrong.
            InternalError: the message has no place here.
        """
        if message.HasField("accepted"):
            self.results.accepted = message.accepted
            self.chunk_bytes = min(message.accepted.max_chunk_bytes or _CHUNK_BYTES, _CHUNK_BYTES)
        elif message.HasField("sequence"):
            self.results.sequence = message.sequence
            self._expect(message.sequence.tensors)
        elif message.HasField("layer"):
            if self._before and message.layer.plan.layer == self._before[-1][0].plan.layer:
                return  # announced again where the server goes on; all of it is here
            self.results.layers.append(message.layer)
            self._expect(message.layer.tensors)
        elif message.HasField("end"):
            self.results.end = message.end
        elif message.tensor:
            self._take_chunk(message)  # anything else is of a later server, and passed over

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
        self.results.received_bytes += len(message.data)


def converse(
    method: Callable[..., Any], conversation: Conversation, timeout_seconds: float | None
) -> Results:
    """Runs one call from begin to end.

    Args:
        method: the stub's stream-stream method.
        conversation: a fresh one; what has come until an error is in its `results`.
        timeout_seconds: deadline of the whole call; None = none.

    Raises:
        DynSplitError: as the method's .proto file says; DataLossError for damaged results.
    """
    answered = threading.Event()

    def requests() -> Iterator[Any]:
        yield conversation.first()
        answered.wait()
        if conversation.chunk_bytes:
            yield from conversation.rest()

    call = method(requests(), timeout=timeout_seconds)
    try:
        for message in call:
            conversation.take(message)
            if conversation.chunk_bytes:
                answered.set()
    except grpc.RpcError as error:
        raise errors.from_rpc_error(error) from None
    finally:
        call.cancel()  # no effect on a call that has ended
        answered.set()
    return conversation.finish()


async def converse_async(
    method: Callable[..., Any], conversation: Conversation, timeout_seconds: float | None
) -> Results:
    """As `converse`, with the stream-stream method of a stub over a grpc.aio channel."""
    answered = asyncio.Event()

    async def requests() -> AsyncIterator[Any]:
        yield conversation.first()
        await answered.wait()
        if conversation.chunk_bytes:
            for message in conversation.rest():
                yield message

    call = method(requests(), timeout=timeout_seconds)
    try:
        async for message in call:
            conversation.take(message)
            if conversation.chunk_bytes:
                answered.set()
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.INTERNAL and error.details() == _CORE:
            raise errors.UnavailableError("the call broke", code="UNAVAILABLE") from None
        raise errors.from_rpc_error(error) from None
    finally:
        call.cancel()
        answered.set()
    return conversation.finish()

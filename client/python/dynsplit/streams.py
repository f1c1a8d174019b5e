# SPDX-License-Identifier: Apache-2.0
"""One stream of compression.proto's grammar, from the client's side.

    client   begin ........ chunk* end
    server   accepted ..... [sequence chunk*] (layer chunk*)* end

Tensors in registered regions are announced in begin and send no chunks.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from dynsplit import errors, tensors
from dynsplit.v1 import compression_pb2, types_pb2

_CHUNK_BYTES = 2 << 20


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor to send: what it holds, of which layer (None: of the sequence), and its elements."""

    kind: int
    layer: int | None
    tensor: tensors.Tensor

    def describe(self, tensor_id: int) -> types_pb2.TensorDescriptor:
        """Its entry in begin."""
        tensor = self.tensor
        dtype = str(tensor.dtype)
        descriptor = types_pb2.TensorDescriptor(
            id=tensor_id,
            kind=self.kind,
            layer=self.layer,
            dtype=tensors.dtype_code(dtype),
            byte_size=tensor.nbytes,
        )
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


class _Receiver:
    """Puts results together and checks them; fed with one message at a time."""

    def __init__(self) -> None:
        self.results = Results()
        self._filled: dict[int, tuple[int, int]] = {}  # bytes so far and their checksum

    def take(self, message: Any) -> None:
        if message.HasField("accepted"):
            self.results.accepted = message.accepted
        elif message.HasField("sequence"):
            self.results.sequence = message.sequence
            self._expect(message.sequence.tensors)
        elif message.HasField("layer"):
            self.results.layers.append(message.layer)
            self._expect(message.layer.tensors)
        elif message.HasField("end"):
            self.results.end = message.end
        else:
            self._take_chunk(message)

    def finish(self) -> Results:
        if self.results.end is None:
            raise _broken("the stream ended without its last message")
        for tensor_id, (filled, _) in self._filled.items():
            if filled != len(self.results.tensors[tensor_id]):
                raise _broken(f"tensor {tensor_id} is incomplete")
        return self.results

    def _expect(self, descriptors: Sequence[types_pb2.TensorDescriptor]) -> None:
        for descriptor in descriptors:
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


def _broken(what: str) -> errors.DynSplitError:
    return errors.DynSplitError(f"server broke the protocol: {what}", code="INTERNAL")


def _chunks(tensor_id: int, tensor: npt.NDArray[Any], chunk_bytes: int) -> Iterator[Any]:
    data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    crc = 0
    for offset in range(0, len(data), chunk_bytes):
        piece = data[offset : offset + chunk_bytes].tobytes()
        crc = tensors.crc32c(piece, crc)
        last = offset + len(piece) == len(data)
        yield compression_pb2.CompressRequest(
            tensor=tensor_id,
            offset=offset,
            crc32c=tensors.crc32c(piece),
            last=last,
            tensor_crc32c=crc if last else 0,
            data=piece,
        )


def converse(
    method: Callable[..., Any],
    begin: compression_pb2.Begin,
    inputs: Sequence[Input],
    timeout_seconds: float | None,
) -> Results:
    """Runs one call from begin to end.

    Chunks wait until the server has accepted the request, so that a refusal costs no transfer.

    Args:
        method: the stub's stream-stream method.
        begin: complete but for `tensors`.
        inputs: tensors in the order in which they are sent; layers ascending.
        timeout_seconds: deadline of the whole call; None = none.

    Raises:
        DynSplitError: as the method's .proto file says; DataLossError for damaged results.
    """
    begin.tensors.extend(entry.describe(index + 1) for index, entry in enumerate(inputs))
    accepted = threading.Event()
    chunk_bytes: list[int] = []  # set once accepted; empty when the call is over before that

    def requests() -> Iterator[Any]:
        yield compression_pb2.CompressRequest(begin=begin)
        accepted.wait()
        if not chunk_bytes:
            return
        num_sent = 0
        for index, entry in enumerate(inputs):
            if not isinstance(entry.tensor, tensors.RegionTensor):
                yield from _chunks(index + 1, entry.tensor, chunk_bytes[0])
                num_sent += 1
        yield compression_pb2.CompressRequest(end=compression_pb2.End(num_tensors=num_sent))

    call = method(requests(), timeout=timeout_seconds)
    receiver = _Receiver()
    try:
        for message in call:
            receiver.take(message)
            if message.HasField("accepted"):
                limit = message.accepted.max_chunk_bytes or _CHUNK_BYTES
                chunk_bytes.append(min(limit, _CHUNK_BYTES))
                accepted.set()
    except grpc.RpcError as error:
        raise errors.from_rpc_error(error) from None
    finally:
        call.cancel()  # no effect on a call that has ended
        accepted.set()
    return receiver.finish()

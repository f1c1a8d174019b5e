# SPDX-License-Identifier: Apache-2.0
"""How the tensors of a call reach the server: staged in memory that both map, or in the stream.

`Stage` decides and holds the memory, does no calls itself, and is used by both clients: it says
which segment to register, the client registers it. Thread-safe.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dynsplit import errors, tensors
from dynsplit.calls import Context, Road, Unary, is_local
from dynsplit.memory import Shareable, register_region
from dynsplit.shared import SharedMemory, region_name
from dynsplit.streams import Input
from dynsplit.tensors import DeviceTensor, HostTensor, RegionSlice, RegionTensor
from dynsplit.v1 import info_pb2

if TYPE_CHECKING:
    from dynsplit.engine import Engine

_ALIGNMENT = 256
_LEASE_SECONDS = 600
_RENEW_SECONDS = 200
_IDLE_SEGMENTS = 4
_MIN_SHARED_BYTES = 256 << 10  # below, "auto" does not bother

# Any of these among Capabilities.data_planes. Servers of version 0.1 do not tell of their region
# socket: whoever knows its path tries.
_PLANES = {
    "cuda-ipc": {info_pb2.Capabilities.DATA_PLANE_CUDA_IPC},
    "memfd": {info_pb2.Capabilities.DATA_PLANE_MEMFD, info_pb2.Capabilities.DATA_PLANE_SHM},
    "shm": {info_pb2.Capabilities.DATA_PLANE_SHM},
}
# What registering answers where memory cannot be shared with this server, now and later: another
# container, user or GPU, or a server that does not take it.
_NEVER = (
    errors.UnsupportedError,
    errors.NotFoundError,
    errors.PreconditionError,
    errors.InvalidRequestError,
)
# What says so for this call: no memory here, no room there, or nobody there.
_NOT_NOW = (OSError, MemoryError, errors.EngineError, *errors.AWAY)
CANNOT_SHARE = (*_NEVER, *_NOT_NOW)


class Segment:
    """Shared memory for one call at a time."""

    def __init__(self, kind: str, memory: Shareable) -> None:
        """Not registered yet."""
        self.kind, self.memory = kind, memory
        self.name = ""
        self._owner = b""
        self._place: RegionSlice | None = None
        self._registered_at = 0.0

    def registration(self, context: Context, owner: bytes) -> Unary[RegionSlice] | None:
        """The call that registers it for that owner or renews its lease; None while not due.

        May wait, for the region socket.

        Raises:
            OSError, PreconditionError: the memory cannot be passed to the server.
        """
        fresh = self._place is None or owner != self._owner
        if not fresh and time.monotonic() < self._registered_at + _RENEW_SECONDS:
            return None
        if fresh:
            self._place, self._owner, self.name = None, owner, region_name()
        try:
            source = self.memory.source(renew=not fresh)
        except errors.UnavailableError as error:
            raise OSError(str(error)) from error
        return register_region(
            context,
            self.name,
            self.memory.byte_size,
            lease_seconds=_LEASE_SECONDS,
            owner=owner,
            **source,
        )

    def registered(self, place: RegionSlice) -> None:
        """Takes what the server answered."""
        self._place, self._registered_at = place, time.monotonic()

    def lost_by(self, error: errors.DynSplitError) -> bool:
        """Whether the error says that the server knows the region no more, as after a restart.

        Then it will be registered anew.
        """
        if not isinstance(error, errors.NotFoundError) or error.resource != self.name:
            return False
        self._place = None
        return True

    @property
    def place(self) -> RegionSlice | None:
        """Where it begins; None before it is registered."""
        return self._place

    def fill(self, inputs: Sequence[Input]) -> list[Input]:
        """Copies the inputs in, and waits for that; returns them as tensors of the region."""
        assert self._place is not None
        staged, offset = [], 0
        streams: set[Any] = set()
        for entry in inputs:
            tensor = entry.tensor
            if isinstance(tensor, RegionTensor):
                staged.append(entry)
                continue
            room = self.memory.bytes_at(offset, tensor.nbytes)
            if not tensors.is_torch(room):
                entry = entry.on_host()
                tensor = entry.tensor
                assert isinstance(tensor, HostTensor)
                room[:] = tensor.flat_bytes()
            elif isinstance(tensor, HostTensor):
                _upload(room, tensor)
            else:
                _copy_on_device(room, tensor)
                streams.add(tensor.stream)
            moved = RegionTensor(self._place.at(offset), tensor.shape, tensor.dtype)
            staged.append(dataclasses.replace(entry, tensor=moved))
            offset += _aligned(tensor.nbytes)
        for stream in streams:
            stream.synchronize()
        return staged


def _upload(room: Any, tensor: HostTensor) -> None:
    import torch

    # From pageable memory: torch waits for the copy. A copy, as torch takes no read-only arrays.
    room.copy_(torch.from_numpy(tensor.flat_bytes().copy()))


def _copy_on_device(room: Any, tensor: DeviceTensor) -> None:
    """In the stream that the tensor is ready in; the caller waits for that stream."""
    import torch

    with torch.cuda.stream(tensor.stream):
        room.view(tensor.tensor.dtype).view(tensor.shape).copy_(tensor.tensor, non_blocking=True)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class Stage:
    """Chooses the road of each call, and keeps segments for the next one."""

    def __init__(
        self, road: Road, target: str, engine: Engine | None, region_socket: str = ""
    ) -> None:
        """`target` as connected to; `engine` makes device memory, where there is one."""
        self._road, self._engine, self._region_socket = road, engine, region_socket
        self._local = is_local(target)
        self._socket = "unix" if target.startswith("unix:") else "tcp"
        self._mu = threading.Lock()
        self._idle: list[Segment] = []
        self._impossible: set[str] = set()
        if road == "memfd" and not region_socket:
            raise ValueError("road 'memfd' needs region_socket")

    @property
    def inline(self) -> str:
        """Name of the road through the stream."""
        return f"inline over {self._socket}"

    @property
    def forced(self) -> bool:
        """Whether the caller asked for memory of one kind."""
        return self._road in _PLANES

    def needs_planes(self, inputs: Sequence[Input]) -> bool:
        """Whether the choice depends on what the server can do."""
        size = _bytes_of(inputs)
        if self.forced:
            return bool(size)
        return self._road == "auto" and self._local and size >= _MIN_SHARED_BYTES

    def choose(self, inputs: Sequence[Input], planes: Sequence[int]) -> list[str]:
        """Kinds of memory to stage the inputs in, best first; where none will do, the stream.

        Args:
            inputs: of the call, for which `needs_planes`.
            planes: Capabilities.data_planes of the server.

        Raises:
            UnsupportedError: the road asked for is none of the server's.
        """
        if self._road in _PLANES:
            if _PLANES[self._road].isdisjoint(planes):
                raise errors.UnsupportedError(
                    f"the server does not take road {self._road!r}", code="UNIMPLEMENTED"
                )
            return [self._road]
        on_device = any(isinstance(entry.tensor, DeviceTensor) for entry in inputs)
        usable = {
            "cuda-ipc": on_device and self._engine is not None,
            "memfd": bool(self._region_socket),
            "shm": True,
        }
        return [
            kind
            for kind, wanted in _PLANES.items()
            if usable[kind] and not wanted.isdisjoint(planes) and kind not in self._impossible
        ]

    def failed(self, kind: str, error: Exception, *, for_good: bool) -> None:
        """Notes that memory of that kind could not be shared, so that the next one is tried.

        Args:
            kind: of memory.
            error: why.
            for_good: errors that say so will say so again.

        Raises:
            Exception: the error, where the caller asked for that road.
        """
        if self.forced:
            raise error
        if for_good and isinstance(error, _NEVER):
            self._impossible.add(kind)

    def acquire(self, kind: str, inputs: Sequence[Input]) -> Segment:
        """A segment with room for the inputs.

        Raises:
            OSError, EngineError: there is no memory, or no engine library.
        """
        needed = sum(_aligned(size) for size in _sizes(inputs))
        with self._mu:
            fitting = [s for s in self._idle if s.kind == kind and s.memory.byte_size >= needed]
            if fitting:
                found = min(fitting, key=lambda s: s.memory.byte_size)
                self._idle.remove(found)
                return found
            if kind == "cuda-ipc" and self._engine is None:
                from dynsplit.engine import Engine

                self._engine = Engine()
        if kind == "cuda-ipc":
            assert self._engine is not None
            return Segment(kind, self._engine.allocate(needed))
        socket = self._region_socket if kind == "memfd" else ""
        return Segment(kind, SharedMemory(needed, socket))

    def release(self, segment: Segment) -> list[Segment]:
        """Takes it back once the call is over; returns those to be unregistered and closed."""
        with self._mu:
            self._idle.append(segment)
            surplus = self._idle[:-_IDLE_SEGMENTS]
            self._idle = self._idle[-_IDLE_SEGMENTS:]
        return surplus

    def close(self) -> list[Segment]:
        """Lets go of all memory; returns what is to be unregistered and closed."""
        with self._mu:
            idle, self._idle = self._idle, []
        return idle


def _sizes(inputs: Sequence[Input]) -> list[int]:
    return [e.tensor.nbytes for e in inputs if not isinstance(e.tensor, tensors.RegionTensor)]


def _bytes_of(inputs: Sequence[Input]) -> int:
    return sum(_sizes(inputs))

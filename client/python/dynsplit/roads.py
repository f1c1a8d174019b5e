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
from dynsplit.session_calls import register_region
from dynsplit.shared import SharedMemory
from dynsplit.streams import Input
from dynsplit.tensors import DeviceTensor, HostTensor, RegionSlice, RegionTensor
from dynsplit.v1 import info_pb2

if TYPE_CHECKING:
    from dynsplit.engine import DeviceMemory, Engine

_ALIGNMENT = 256
_LEASE_SECONDS = 600
_RENEW_SECONDS = 200
_IDLE_SEGMENTS = 4
_MIN_SHARED_BYTES = 256 << 10  # below, "auto" does not bother

# What says that memory cannot be shared with this server, for now and later.
CANNOT_SHARE = (errors.UnsupportedError, errors.NotFoundError, errors.PreconditionError)

_PLANES = {
    "cuda-ipc": info_pb2.Capabilities.DATA_PLANE_CUDA_IPC,
    "shm": info_pb2.Capabilities.DATA_PLANE_SHM,
}


class Segment:
    """Memory of one kind, for one call at a time."""

    def __init__(self, kind: str, byte_size: int, engine: Engine | None) -> None:
        """Allocates.

        Raises:
            OSError, EngineError: there is no memory.
        """
        self.kind, self._engine = kind, engine
        self._host: SharedMemory | None = None
        self._device: DeviceMemory | None = None
        self._place: RegionSlice | None = None
        self._registered_at = 0.0
        if kind == "shm":
            self._host = SharedMemory(byte_size)
            self.name, self.byte_size = self._host.key, self._host.byte_size
        else:
            assert engine is not None
            self._device = engine.allocate(byte_size)
            handle = self._device.handle or b""
            self.name = f"stage-{handle.hex()[:24]}-{id(self):x}"
            self.byte_size = byte_size

    def registration(self, context: Context) -> Unary[RegionSlice] | None:
        """The call that registers it or renews its lease; None while that is not due."""
        if self._place is not None and time.monotonic() < self._registered_at + _RENEW_SECONDS:
            return None
        where: dict[str, Any]
        if self._device is not None and self._engine is not None:
            where = {"cuda_ipc": (self._device.handle or b"", self._engine.device_uuid())}
        else:
            where = {"shm_key": self.name}
        return register_region(
            context, self.name, self.byte_size, lease_seconds=_LEASE_SECONDS, **where
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
        """Copies the inputs in; returns them as tensors of the region."""
        assert self._place is not None
        staged, offset = [], 0
        for entry in inputs:
            tensor = entry.tensor
            if isinstance(tensor, RegionTensor):
                staged.append(entry)
                continue
            if self._host is not None:
                entry = entry.on_host()
                host = entry.tensor
                assert isinstance(host, HostTensor)
                self._host.array("u1", host.nbytes, offset_bytes=offset)[:] = host.flat_bytes()
            else:
                self._fill_device(tensor, offset)
            moved = RegionTensor(self._place.at(offset), tensor.shape, tensor.dtype)
            staged.append(dataclasses.replace(entry, tensor=moved))
            offset += _aligned(tensor.nbytes)
        if self._device is not None:
            import torch

            torch.cuda.current_stream().synchronize()
        return staged

    def _fill_device(self, tensor: HostTensor | DeviceTensor, offset: int) -> None:
        import torch

        data = torch.as_tensor(self._device, device="cuda")[offset : offset + tensor.nbytes]
        if isinstance(tensor, HostTensor):
            data.copy_(torch.from_numpy(tensor.flat_bytes().copy()))
        else:
            data.view(tensor.tensor.dtype).view(tensor.shape).copy_(tensor.tensor)

    def close(self) -> None:
        """Gives the memory back; the server's mapping ends with its lease."""
        if self._host is not None:
            self._host.unlink()
        if self._device is not None:
            self._device.close()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class Stage:
    """Chooses the road of each call, and keeps segments for the next one."""

    def __init__(self, road: Road, target: str, engine: Engine | None) -> None:
        """`target` as connected to; `engine` binds CUDA IPC, where there is one."""
        self._road, self._engine = road, engine
        self._local = is_local(target)
        self._socket = "unix" if target.startswith("unix:") else "tcp"
        self._mu = threading.Lock()
        self._idle: list[Segment] = []
        self._impossible: set[str] = set()

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
        return self._road not in ("inline", "unix", "tcp") and bool(_bytes_of(inputs))

    def choose(self, inputs: Sequence[Input], planes: Sequence[int]) -> str | None:
        """Kind of memory to stage the inputs in; None = they travel in the stream.

        Args:
            inputs: of the call.
            planes: Capabilities.data_planes of the server.

        Raises:
            UnsupportedError: the road asked for is none of the server's.
        """
        if self._road in _PLANES:
            if _PLANES[self._road] not in planes:
                raise errors.UnsupportedError(
                    f"the server does not take road {self._road!r}", code="UNIMPLEMENTED"
                )
            return self._road
        if not self._local or _bytes_of(inputs) < _MIN_SHARED_BYTES:
            return None
        on_device = any(isinstance(entry.tensor, DeviceTensor) for entry in inputs)
        for kind in ("cuda-ipc", "shm"):
            if kind == "cuda-ipc" and (self._engine is None or not on_device):
                continue
            if _PLANES[kind] in planes and kind not in self._impossible:
                return kind
        return None

    def failed(self, kind: str) -> bool:
        """Notes that memory of that kind cannot be shared; whether another road may be taken."""
        if self.forced:
            return False
        self._impossible.add(kind)
        return True

    def acquire(self, kind: str, inputs: Sequence[Input]) -> Segment:
        """A segment with room for the inputs.

        Raises:
            OSError, EngineError: there is no memory.
        """
        needed = sum(_aligned(size) for size in _sizes(inputs))
        with self._mu:
            fitting = [s for s in self._idle if s.kind == kind and s.byte_size >= needed]
            if fitting:
                found = min(fitting, key=lambda s: s.byte_size)
                self._idle.remove(found)
                return found
        if kind == "cuda-ipc" and self._engine is None:
            from dynsplit.engine import Engine

            self._engine = Engine()
        return Segment(kind, needed, self._engine)

    def release(self, segment: Segment) -> None:
        """Takes it back once the call is over."""
        with self._mu:
            self._idle.append(segment)
            surplus = self._idle[:-_IDLE_SEGMENTS]
            self._idle = self._idle[-_IDLE_SEGMENTS:]
        for old in surplus:
            old.close()

    def close(self) -> list[RegionSlice]:
        """Gives all memory back; returns what is to be unregistered."""
        with self._mu:
            idle, self._idle = self._idle, []
        for segment in idle:
            segment.close()
        return [segment.place for segment in idle if segment.place is not None]


def _sizes(inputs: Sequence[Input]) -> list[int]:
    return [e.tensor.nbytes for e in inputs if not isinstance(e.tensor, tensors.RegionTensor)]


def _bytes_of(inputs: Sequence[Input]) -> int:
    return sum(_sizes(inputs))

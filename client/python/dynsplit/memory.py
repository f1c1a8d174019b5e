# SPDX-License-Identifier: Apache-2.0
"""Operations of the service Memory: memory shared with a server of the same host.

`dynsplit.shared` makes such memory and registers it; these are the calls beneath.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Protocol, Self, TypedDict

from dynsplit import tensors
from dynsplit.calls import Context, Unary
from dynsplit.tensors import RegionSlice
from dynsplit.v1 import memory_pb2


class Source(TypedDict, total=False):
    """What `register_region` finds memory by; exactly one."""

    shm_key: str
    memfd_token: bytes
    cuda_ipc: tuple[bytes, bytes]


class Shareable(Protocol):
    """Memory that a server of this host can map: `SharedMemory`, `DeviceMemory`."""

    @property
    def byte_size(self) -> int:
        """Bytes, > 0."""
        ...

    def source(self, *, renew: bool) -> Source:
        """Names it to the server; with `renew` as the last time, else as if for the first time.

        Raises:
            OSError, DynSplitError: it cannot be passed to the server.
        """
        ...

    def bytes_at(self, offset_bytes: int, byte_size: int) -> tensors.Array:
        """uint8 [byte_size], a view of the memory, of numpy or torch."""
        ...

    def close(self) -> None:
        """Gives it back; after the server has let go of it."""
        ...


def register_region(
    context: Context,
    name: str,
    byte_size: int,
    *,
    shm_key: str = "",
    memfd_token: bytes = b"",
    cuda_ipc: tuple[bytes, bytes] | None = None,
    offset_bytes: int = 0,
    writable: bool = False,
    lease_seconds: int = 0,
    owner: RegionOwner | bytes = b"",
) -> Unary[RegionSlice]:
    """Shares memory with the server, once for use by many calls; returns the region's begin.

    Registering the same object under the same name again renews its lease. `dynsplit.shared` and
    `dynsplit.engine` make memory and call this.

    Args:
        context: of the client.
        name: 1..64 characters of [A-Za-z0-9_.-]; one for all clients of the server.
        byte_size: bytes of the region, > 0; checked against the object.
        shm_key: name of a POSIX shared memory object, without '/'; or
        memfd_token: the 16 bytes that a sealed memfd was passed under (`SharedMemory.source`); or
        cuda_ipc: cudaIpcMemHandle_t (64 bytes) of a device allocation and the UUID of its
            device (16 bytes).
        offset_bytes: begin of the region in the object; of host memory a multiple of the page.
        writable: the server may write results into it.
        lease_seconds: life unless registered again, 1 to 86400; 0 = the server's default, 600.
        owner: what `attach` returned, or its token: the region goes with it. Empty = it lives by
            its lease alone.

    Raises:
        ValueError: not exactly one object.
        InvalidRequestError: name, size or offset; no such device.
        NotFoundError: no such object on the server's host, or the owner is gone.
        ExistsError: the name is in use for other memory.
        PreconditionError: memory of another user, or that cannot be written.
        ExhaustedError: the server's quota of regions.
        UnsupportedError: the server does not take this kind of memory.
    """
    if sum(map(bool, (shm_key, memfd_token, cuda_ipc))) != 1:
        raise ValueError("exactly one of shm_key, memfd_token and cuda_ipc must be given")
    request = memory_pb2.RegisterRegionRequest(
        name=name,
        byte_size=byte_size,
        writable=writable,
        lease_seconds=lease_seconds,
        owner=owner.token if isinstance(owner, RegionOwner) else owner,
    )
    if cuda_ipc is not None:
        request.cuda_ipc.handle, request.cuda_ipc.device_uuid = cuda_ipc
        request.cuda_ipc.offset_bytes = offset_bytes
    elif memfd_token:
        request.memfd.token = memfd_token
        request.memfd.offset_bytes = offset_bytes
    else:
        request.posix_shm.key = shm_key
        request.posix_shm.offset_bytes = offset_bytes
    return Unary(
        "Memory",
        "Register",
        request,
        lambda response: RegionSlice(name, response.generation),
        repeatable=True,
    )


def unregister_region(context: Context, name: str, generation: int = 0) -> Unary[None]:
    """Stops sharing: new calls do not find the region, those that use it end with it.

    Args:
        context: of the client.
        name: of the region.
        generation: of its place; 0 = whichever is registered.

    Raises:
        NotFoundError: there is none, or one of another generation.
    """
    request = memory_pb2.UnregisterRegionRequest(name=name, generation=generation)
    return Unary("Memory", "Unregister", request, lambda _: None)


def regions(context: Context) -> Unary[list[memory_pb2.Region]]:
    """All regions of the server, ascending names (proto Region); tells no generations."""
    return Unary(
        "Memory",
        "List",
        memory_pb2.ListRegionsRequest(),
        lambda response: list(response.regions),
        repeatable=True,
    )


class RegionOwner:
    """Binds regions to this process: when it is closed, or the process dies, they go at once.

    Made by `Client.attach`; holds a stream to the server open. A context manager, of either client.
    """

    def __init__(self, token: bytes, call: Any, let_go: Callable[[], None] = lambda: None) -> None:
        """Of a call of Attach that has been answered; `let_go` is called at the end."""
        self.token = token
        """16 bytes, for `register_region(owner=...)`; whoever knows them registers for it."""
        self._call, self._let_go = call, let_go

    @property
    def attached(self) -> bool:
        """False once the server, or the connection to it, is gone, and with it the regions."""
        return not self._call.done()

    def close(self) -> None:
        """Ends the stream; the server drops the regions."""
        self._call.cancel()
        self._let_go()

    def __enter__(self) -> Self:
        """The owner itself."""
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()


class OpenStream:
    """Requests of a blocking call that sends nothing and stays open until `end`."""

    def __init__(self) -> None:
        """Open."""
        self._over = threading.Event()

    def __iter__(self) -> Iterator[memory_pb2.AttachRequest]:
        """No requests, but not before the end."""
        self._over.wait()
        yield from ()

    def end(self) -> None:
        """Nothing comes any more."""
        self._over.set()

# SPDX-License-Identifier: Apache-2.0
"""Memory shared with a server of the same machine, so that tensors need not travel.

    with HostRegion(client, byte_size) as region:
        region.array(np.float32, T, Hkv, D)[:] = keys
        client.compress(ids, [tensor_at(region.place, "float32", T, Hkv, D)], ...)

`Region` registers memory of any kind: `SharedMemory` here, `dynsplit.engine.DeviceMemory` on a GPU.
`dynsplit.aio.Region` is the same for asyncio.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import secrets
import socket
import uuid
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from dynsplit import errors
from dynsplit.memory import RegionOwner, Shareable, Source
from dynsplit.tensors import Array, RegionSlice

if TYPE_CHECKING:
    from dynsplit.client import Client

_TOKEN_BYTES = 16
_ANSWER_SECONDS = 10.0
_MAX_ANSWER_BYTES = 256
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemory:
    """Host memory, mapped here and zero, that a server of this user and host can map too.

    POSIX shared memory of a random name that only this user can open; or, with a region socket,
    memory without a name (a memfd), sealed against resizing and passed to that one server.
    """

    def __init__(self, byte_size: int, region_socket: str = "") -> None:
        """Makes it.

        Args:
            byte_size: > 0; rounded up to whole pages.
            region_socket: path of the server's side socket (its option --region-socket).

        Raises:
            OSError: no shared memory to be had.
            ValueError: byte_size is not positive.
        """
        if byte_size < 1:
            raise ValueError(f"byte_size is {byte_size}; must be > 0")
        self.byte_size = math.ceil(byte_size / mmap.PAGESIZE) * mmap.PAGESIZE
        self.key = "" if region_socket else f"dynsplit-{uuid.uuid4().hex}"
        """Name of the object without '/'; empty where it has none."""
        self._region_socket, self._token = region_socket, b""
        self._file = self._create()
        path = self._path if self.key else None
        self._release = weakref.finalize(self, _give_back, self._file, path, os.getpid())
        try:
            # Not truncate: what cannot be had must fail here, not as a fault at some later write.
            os.posix_fallocate(self._file, 0, self.byte_size)
            self._memory = mmap.mmap(self._file, self.byte_size)
            if region_socket:
                fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            self.close()
            raise

    def _create(self) -> int:
        if self.key:
            return os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        return os.memfd_create("dynsplit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    @property
    def _path(self) -> Path:
        return Path("/dev/shm") / self.key

    def source(self, *, renew: bool = False) -> Source:
        """See `Shareable.source`; passes a sealed object over the socket, unless to renew.

        It must be registered within 30 seconds.

        Raises:
            UnavailableError: nobody listens at the socket, or answers.
            PreconditionError: the server refused it, in its words.
        """
        if self.key:
            return {"shm_key": self.key}
        if not (renew and self._token):
            token = secrets.token_bytes(_TOKEN_BYTES)
            _pass(self._region_socket, token, self._file)
            self._token = token
        return {"memfd_token": self._token}

    def array(self, dtype: npt.DTypeLike, *shape: int, offset_bytes: int = 0) -> npt.NDArray[Any]:
        """The memory from `offset_bytes` on, as an array of that type and shape."""
        count = math.prod(shape)
        return np.frombuffer(self._memory, dtype, count, offset_bytes).reshape(shape)

    def bytes_at(self, offset_bytes: int, byte_size: int) -> npt.NDArray[np.uint8]:
        """uint8 [byte_size], a view."""
        return self.array(np.uint8, byte_size, offset_bytes=offset_bytes)

    def close(self) -> None:
        """Takes the name away; arrays and the server's mapping stay until they are gone.

        Happens by itself where the object, or the interpreter, ends.
        """
        self._release()


def _give_back(file: int, path: Path | None, maker: int) -> None:
    os.close(file)
    if path is not None and os.getpid() == maker:  # not where a child of it ends
        path.unlink(missing_ok=True)


def _pass(path: str, token: bytes, file: int) -> None:
    """Passes the descriptor under the token, and waits for the server's word."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as side:
        side.settimeout(_ANSWER_SECONDS)
        try:
            side.connect(path)
            socket.send_fds(side, [token], [file])
            answer = side.recv(_MAX_ANSWER_BYTES)
        except OSError as error:
            raise errors.UnavailableError(
                f"region socket {path}: {error}", code="UNAVAILABLE"
            ) from error
    if not answer:
        raise errors.UnavailableError(f"no answer from {path}", code="UNAVAILABLE")
    if answer != b"ok":
        text = answer.decode(errors="replace")
        raise errors.PreconditionError(text, code="FAILED_PRECONDITION", reason="REGION_REFUSED")


def region_name() -> str:
    """A name that no other region has."""
    return f"py-{uuid.uuid4().hex}"


class Region:
    """Memory that is registered with the server, which may write into it.

    Closing it unregisters, then gives the memory back.
    """

    def __init__(
        self,
        client: Client,
        memory: Shareable,
        *,
        lease_seconds: int = 0,
        owner: RegionOwner | None = None,
    ) -> None:
        """Registers; takes the memory over.

        Args:
            client: whose server to share with; must outlive the region.
            memory: not shared yet.
            lease_seconds: as of `Client.register_region`; `renew` begins it again.
            owner: as of `Client.register_region`.

        Raises:
            DynSplitError: the server refused it, as of `Client.register_region`.
        """
        self._client, self.memory = client, memory
        self._terms: dict[str, Any] = {
            "writable": True,
            "lease_seconds": lease_seconds,
            "owner": owner or b"",
        }
        try:
            self.place: RegionSlice = client.register_region(
                region_name(), memory.byte_size, **memory.source(renew=False), **self._terms
            )
        except BaseException:
            memory.close()
            raise

    def renew(self) -> None:
        """Begins the lease again; before it has ended.

        Raises:
            NotFoundError: the owner is gone.
        """
        self.place = self._client.register_region(
            self.place.name,
            self.memory.byte_size,
            **self.memory.source(renew=True),
            **self._terms,
        )

    def bytes_at(self, offset_bytes: int, byte_size: int) -> Array:
        """uint8 [byte_size], a view of the memory."""
        return self.memory.bytes_at(offset_bytes, byte_size)

    def close(self) -> None:
        """Unregisters, then gives the memory back."""
        try:
            with contextlib.suppress(errors.NotFoundError):  # its lease or owner has ended
                self._client.unregister_region(self.place.name, self.place.generation)
        finally:
            self.memory.close()

    def __enter__(self) -> Self:
        """The region itself."""
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stops sharing."""
        self.close()


class HostRegion(Region):
    """Host memory, made here and registered with the server."""

    def __init__(
        self,
        client: Client,
        byte_size: int,
        lease_seconds: int = 0,
        *,
        region_socket: str = "",
        owner: RegionOwner | None = None,
    ) -> None:
        """Allocates and registers; the server may write into it.

        Args:
            client: whose server to share with; must outlive the region.
            byte_size: > 0, rounded up to whole pages.
            lease_seconds: see `Client.register_region`.
            region_socket: share sealed memory over that socket; see `SharedMemory`.
            owner: see `Client.register_region`.

        Raises:
            OSError: no shared memory to be had.
            DynSplitError: the server refused it.
        """
        made = SharedMemory(byte_size, region_socket)
        self._host = made
        super().__init__(client, made, lease_seconds=lease_seconds, owner=owner)

    def array(self, dtype: npt.DTypeLike, *shape: int, offset_bytes: int = 0) -> npt.NDArray[Any]:
        """The memory from `offset_bytes` on, as an array of that type and shape.

        Stays readable after `close`, until it is gone.
        """
        return self._host.array(dtype, *shape, offset_bytes=offset_bytes)

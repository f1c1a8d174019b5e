# SPDX-License-Identifier: Apache-2.0
"""Host memory shared with a server of the same machine."""

from __future__ import annotations

import math
import mmap
import os
import uuid
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from dynsplit.tensors import RegionSlice

if TYPE_CHECKING:
    from dynsplit.client import Client


class SharedMemory:
    """A POSIX shared memory object of a random name that only this user can open, mapped here."""

    def __init__(self, byte_size: int) -> None:
        """Makes it; zero, rounded up to whole pages.

        Raises:
            OSError: no shared memory to be had.
        """
        self.byte_size = math.ceil(byte_size / mmap.PAGESIZE) * mmap.PAGESIZE
        self.key = f"dynsplit-{uuid.uuid4().hex}"
        self._path = Path("/dev/shm") / self.key
        handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Not truncate: a full /dev/shm must fail here, not as a fault at some later write.
            os.posix_fallocate(handle, 0, self.byte_size)
            self._memory = mmap.mmap(handle, self.byte_size)
        except BaseException:
            self._path.unlink()
            raise
        finally:
            os.close(handle)

    def array(self, dtype: npt.DTypeLike, *shape: int, offset_bytes: int = 0) -> npt.NDArray[Any]:
        """The memory from `offset_bytes` on, as an array of that type and shape."""
        count = math.prod(shape)
        return np.frombuffer(self._memory, dtype, count, offset_bytes).reshape(shape)

    def unlink(self) -> None:
        """Takes the name away; arrays and the server's mapping stay until they are gone."""
        self._path.unlink(missing_ok=True)


class HostRegion:
    """POSIX shared memory, made here and registered with the server."""

    def __init__(self, client: Client, byte_size: int, lease_seconds: int = 0) -> None:
        """Allocates and registers; the server may write into it.

        Args:
            client: whose server to share with; must outlive the region.
            byte_size: > 0, rounded up to whole pages.
            lease_seconds: see `Client.register_region`.

        Raises:
            OSError: no shared memory to be had.
            DynSplitError: the server refused it.
        """
        self._client = client
        self._memory = SharedMemory(byte_size)
        key = self._memory.key
        try:
            self.place: RegionSlice = client.register_region(
                key,
                self._memory.byte_size,
                shm_key=key,
                writable=True,
                lease_seconds=lease_seconds,
            )
        except BaseException:
            self._memory.unlink()
            raise

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

    def array(self, dtype: npt.DTypeLike, *shape: int, offset_bytes: int = 0) -> npt.NDArray[Any]:
        """The memory from `offset_bytes` on, as an array of that type and shape."""
        return self._memory.array(dtype, *shape, offset_bytes=offset_bytes)

    def close(self) -> None:
        """Unregisters and unlinks; arrays of it stay readable until they are gone."""
        self._memory.unlink()
        self._client.unregister_region(self.place.name, self.place.generation)

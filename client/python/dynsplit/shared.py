# SPDX-License-Identifier: Apache-2.0
"""Host memory shared with a server of the same machine."""

from __future__ import annotations

import math
import mmap
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dynsplit.sessions import SessionClient
from dynsplit.tensors import RegionSlice


class HostRegion:
    """POSIX shared memory, made here and registered with the server."""

    def __init__(self, client: SessionClient, byte_size: int, lease_seconds: int = 0) -> None:
        """Allocates and registers; the server may write into it.

        Args:
            client: whose server to share with; must outlive the region.
            byte_size: > 0, rounded up to whole pages.
            lease_seconds: see `SessionClient.register_region`.

        Raises:
            OSError: no shared memory to be had.
            DynSplitError: the server refused it.
        """
        self._client = client
        self._size = math.ceil(byte_size / mmap.PAGESIZE) * mmap.PAGESIZE
        key = f"dynsplit-{uuid.uuid4().hex}"
        self._path = Path("/dev/shm") / key
        with self._path.open("x+b") as file:
            file.truncate(self._size)
            self._memory = mmap.mmap(file.fileno(), self._size)
        try:
            self.place: RegionSlice = client.register_region(
                key, self._size, shm_key=key, writable=True, lease_seconds=lease_seconds
            )
        except BaseException:
            self._path.unlink()
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
        count = math.prod(shape)
        return np.frombuffer(self._memory, dtype, count, offset_bytes).reshape(shape)

    def close(self) -> None:
        """Unregisters and unlinks; arrays of it stay readable until they are gone."""
        self._path.unlink(missing_ok=True)
        self._client.unregister_region(self.place.name, self.place.generation)

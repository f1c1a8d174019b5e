# SPDX-License-Identifier: Apache-2.0
"""Tensors that the engine shares with the service, on the host (CPU) or on the device (CUDA)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any, Protocol

import numpy as np
import torch
from dynsplit.errors import DynSplitError
from dynsplit.sessions import SessionClient, tensor_at
from dynsplit.shared import HostRegion
from dynsplit.tensors import RegionSlice, RegionTensor
from torch import Tensor

LEASE_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class Shared:
    """A dense tensor and the place where the service finds it."""

    tensor: Tensor
    place: RegionSlice

    def at(self, *index: int) -> RegionSlice:
        """Place of tensor[index]."""
        strides = self.tensor.stride()
        elements = sum(i * stride for i, stride in zip(index, strides, strict=False))
        return self.place.at(elements * self.tensor.element_size())

    def part(self, index: tuple[int, ...], *shape: int) -> RegionTensor:
        """The dense tensor of that shape that begins at tensor[index]."""
        return tensor_at(self.at(*index), str(self.tensor.dtype), *shape)


class Buffers(Protocol):
    """Where shared tensors come from."""

    def allocate(self, dtype: torch.dtype, *shape: int) -> Shared:
        """A new shared tensor; its contents are unspecified."""
        ...

    def close(self) -> None:
        """Gives everything back. Tensors must not be used any more."""
        ...


class _Regions:
    """Buffers of one region a tensor."""

    def __init__(self, client: SessionClient) -> None:
        self._client = client
        self._regions: list[Any] = []

    def allocate(self, dtype: torch.dtype, *shape: int) -> Shared:
        num_bytes = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
        region, data = self._new(num_bytes)
        self._regions.append(region)
        return Shared(data[:num_bytes].view(dtype).view(shape), region.place)

    def close(self) -> None:
        while self._regions:
            with contextlib.suppress(DynSplitError):  # a server that is gone has let go of it
                self._regions.pop().close()

    def _new(self, num_bytes: int) -> tuple[Any, Tensor]:
        raise NotImplementedError


class HostBuffers(_Regions):
    """POSIX shared memory."""

    def _new(self, num_bytes: int) -> tuple[Any, Tensor]:
        region = HostRegion(self._client, num_bytes, LEASE_SECONDS)
        return region, torch.from_numpy(region.array(np.uint8, num_bytes))


class DeviceBuffers(_Regions):
    """Device memory named by CUDA IPC handles."""

    def __init__(self, client: SessionClient, engine: Any) -> None:
        super().__init__(client)
        self._engine = engine

    def _new(self, num_bytes: int) -> tuple[Any, Tensor]:
        from dynsplit.engine import DeviceRegion

        region = DeviceRegion(self._client, self._engine, num_bytes, LEASE_SECONDS)
        return region, torch.as_tensor(region.memory, device="cuda")

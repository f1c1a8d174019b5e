# SPDX-License-Identifier: Apache-2.0
"""For inference engines in torch on the service's GPU: shared device memory, attention in place.

Bindings of libdynsplit_engine.so (cuda/engine/dynsplit_engine.h). Shapes: b sequences, Hq query
heads, Hkv KV heads, D head dimension, n chosen rows, M rows of the tail.

    engine = Engine("lib/libdynsplit_engine.so")
    client = dynsplit.Client(engine=engine)  # calls with torch tensors take the road "cuda-ipc"
    session = engine.map(client, session_id)
    out = engine.attend(q, [session.keys[layer]], [session.values[layer]], tokens, tail_k, tail_v)
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from dynsplit.client import Client
from dynsplit.errors import EngineError
from dynsplit.memory import RegionOwner, Source
from dynsplit.shared import Region
from dynsplit.v1 import sessions_pb2, types_pb2

__all__ = ["DeviceMemory", "DeviceRegion", "Engine", "EngineError", "MappedSession"]

_HANDLE_BYTES = 64
_UUID_BYTES = 16
_MAX_ITEMS = 1024  # of one call, workspace is for so many
# CUDA shares whole blocks of that size with the process that opens a handle.
_BLOCK_BYTES = 2 << 20

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_WIRE_DTYPES: dict[int, torch.dtype] = {
    types_pb2.DTYPE_FLOAT32: torch.float32,
    types_pb2.DTYPE_FLOAT16: torch.float16,
    types_pb2.DTYPE_BFLOAT16: torch.bfloat16,
}


class _Shape(ctypes.Structure):
    """dynsplit_attend_shape."""

    _fields_ = (
        ("num_query_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("query_dtype", ctypes.c_int32),
        ("key_dtype", ctypes.c_int32),
        ("value_dtype", ctypes.c_int32),
        ("token_groups", ctypes.c_int32),
        ("scales_per_head", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
    )


class _Rows(ctypes.Structure):
    """dynsplit_rows."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("token_stride_bytes", ctypes.c_int64),
        ("head_stride_bytes", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
    )


class _Item(ctypes.Structure):
    """dynsplit_attend_item."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("query_stride_bytes", ctypes.c_int64),
        ("keys", _Rows),
        ("values", _Rows),
        ("tokens", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("tail_keys", _Rows),
        ("tail_values", _Rows),
        ("num_tail_rows", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
    )


def _rows(tensor: torch.Tensor) -> _Rows:
    """Of [t, Hkv, D]; the last axis must be contiguous."""
    if tensor.stride(2) != 1:
        raise ValueError("the head dimension of rows must be contiguous")
    size = tensor.element_size()
    return _Rows(tensor.data_ptr(), tensor.stride(0) * size, tensor.stride(1) * size, None)


class DeviceMemory:
    """Bytes on the engine's device that do not belong to torch: ours, or another process's."""

    def __init__(self, engine: Engine, address: int, byte_size: int, handle: bytes | None) -> None:
        """Made by `Engine`; `handle` is that of our own allocation, None for a mapped one."""
        self._engine = engine
        self._address = address
        self.byte_size = byte_size
        self.handle = handle

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """As uint8 [byte_size]: torch.as_tensor(memory, device=...) is a view of it."""
        return {
            "shape": (self.byte_size,),
            "typestr": "|u1",
            "data": (self._address, False),
            "version": 3,
            "strides": None,
        }

    def source(self, *, renew: bool = False) -> Source:
        """Handle and device; see `dynsplit.memory.Shareable`.

        Raises:
            ValueError: it is another process's memory, or closed.
        """
        if self.handle is None or not self._address:
            raise ValueError("only memory made by Engine.allocate can be shared")
        return {"cuda_ipc": (self.handle, self._engine.device_uuid())}

    def bytes_at(self, offset_bytes: int, byte_size: int) -> torch.Tensor:
        """uint8 [byte_size], a view."""
        data = torch.as_tensor(self, device=self._engine.device)
        return data[offset_bytes : offset_bytes + byte_size]

    def tensor(self, dtype: torch.dtype, *shape: int, offset_bytes: int = 0) -> torch.Tensor:
        """The memory from `offset_bytes` on, as a tensor of that type and shape; a view."""
        size = math.prod(shape) * dtype.itemsize
        return self.bytes_at(offset_bytes, size).view(dtype).view(shape)

    def close(self) -> None:
        """Frees or unmaps, waiting for the device; tensors of it must not be used any more.

        Memory that a server has registered is to be unregistered first.
        """
        address, self._address = self._address, 0
        if address:
            self._engine.give_back(address, mapped=self.handle is None)


class SessionView:
    """K and V of a session where the service keeps them, by what `Client.map` answered.

    Attributes:
        keys: L tensors [capacity, Hkv, D], views of the service's memory; rows behind the session's
            length are unspecified. An append is visible once the call has returned.
        values: likewise.
    """

    def __init__(self, engine: Engine, mapping: sessions_pb2.SessionMapping) -> None:
        """Opens the memory.

        Raises:
            EngineError: it lies on another device, or CUDA refuses it.
            ValueError: K and V rest quantised.
        """
        if mapping.device_uuid != engine.device_uuid():
            raise EngineError("the session lies on another device")
        self._memory = engine.open(mapping.handle, mapping.byte_size)
        try:
            data = self._memory.bytes_at(0, mapping.byte_size)
            shape = mapping.session.shape
            size = (mapping.capacity_tokens, shape.num_kv_heads, shape.head_dim)
            self.keys, self.values = (
                [_view(data, offset, code, size, mapping.row_bytes) for offset in offsets]
                for offsets, code in (
                    (mapping.key_offset_bytes, mapping.key_dtype),
                    (mapping.value_offset_bytes, mapping.value_dtype),
                )
            )
        except BaseException:
            self._memory.close()
            raise

    def close(self) -> None:
        """Closes the memory; `Client.unmap` then lets the service know."""
        self.keys, self.values = [], []
        self._memory.close()


class MappedSession:
    """A mapping and its view, given back together; see `SessionView` for `keys` and `values`."""

    def __init__(self, engine: Engine, client: Client, session_id: str) -> None:
        """Maps; raises what `Client.map` and `SessionView` do."""
        self._client, self._session_id = client, session_id
        mapping = client.map(session_id)
        try:
            self._view = SessionView(engine, mapping)
        except BaseException:
            client.unmap(session_id)
            raise

    @property
    def keys(self) -> list[torch.Tensor]:
        """L tensors [capacity, Hkv, D]."""
        return self._view.keys

    @property
    def values(self) -> list[torch.Tensor]:
        """L tensors [capacity, Hkv, D]."""
        return self._view.values

    def close(self) -> None:
        """Unmaps here, then lets the service know."""
        self._view.close()
        self._client.unmap(self._session_id)

    def __enter__(self) -> Self:
        """The mapping itself."""
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Unmaps."""
        self.close()


def _view(
    data: torch.Tensor, offset_bytes: int, code: int, size: tuple[int, int, int], row_bytes: int
) -> torch.Tensor:
    """[capacity, Hkv, D] of rows that lie head by head."""
    if code not in _WIRE_DTYPES:
        raise ValueError("K and V rest quantised: they cannot be read in place from torch")
    capacity, heads, dim = size
    dtype = _WIRE_DTYPES[code]
    part = data[offset_bytes : offset_bytes + heads * capacity * row_bytes].view(dtype)
    return part.view(heads, capacity, row_bytes // dtype.itemsize)[:, :, :dim].transpose(0, 1)


class DeviceRegion(Region):
    """Device memory, made here and registered with the server."""

    def __init__(
        self,
        client: Client,
        engine: Engine,
        byte_size: int,
        lease_seconds: int = 0,
        *,
        owner: RegionOwner | None = None,
    ) -> None:
        """Allocates and registers; the server may write into it.

        Args:
            client: whose server to share with; must outlive the region.
            engine: on the server's GPU.
            byte_size: > 0.
            lease_seconds: see `Client.register_region`.
            owner: see `Client.register_region`.

        Raises:
            EngineError: no device memory to be had.
            DynSplitError: the server refused it.
        """
        self._device = engine.allocate(byte_size)
        super().__init__(client, self._device, lease_seconds=lease_seconds, owner=owner)

    def tensor(self, dtype: torch.dtype, *shape: int, offset_bytes: int = 0) -> torch.Tensor:
        """The memory from `offset_bytes` on, as a tensor of that type and shape.

        Not to be used after `close`.
        """
        return self._device.tensor(dtype, *shape, offset_bytes=offset_bytes)


class Engine:
    """The library, on one device of torch's.

    Methods may be called from several threads, but `attend` on one stream at a time: its calls
    share a workspace.
    """

    def __init__(
        self, path: str | Path | None = None, device: torch.device | str | int | None = None
    ) -> None:
        """Loads the library.

        Args:
            path: of libdynsplit_engine.so; None = the loader's search path.
            device: the GPU that memory is made and attended on; None = torch's current one.

        Raises:
            OSError: the library is not there.
            RuntimeError: torch has no such GPU.
        """
        torch.cuda.init()  # type: ignore[no-untyped-call]
        number = torch.cuda.current_device() if device is None else torch.device(device).index
        self.device = torch.device("cuda", number or 0)
        self._library = ctypes.CDLL(str(path or "libdynsplit_engine.so"))
        self._library.dynsplit_engine_error.restype = ctypes.c_char_p
        self._library.dynsplit_attend.argtypes = [
            ctypes.POINTER(_Shape),
            ctypes.POINTER(_Item),
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        self._workspaces: dict[tuple[int, ...], torch.Tensor] = {}
        self._uuid: bytes | None = None

    def _call(self, name: str, *arguments: Any) -> None:
        """A function of the library, which works on the calling thread's current device."""
        with torch.cuda.device(self.device):
            if getattr(self._library, name)(*arguments) != 0:
                raise EngineError(self._library.dynsplit_engine_error().decode())

    def device_uuid(self) -> bytes:
        """16 bytes, as the service names devices."""
        if self._uuid is None:
            uuid = (ctypes.c_ubyte * _UUID_BYTES)()
            self._call("dynsplit_device_uuid", uuid)
            self._uuid = bytes(uuid)
        return self._uuid

    def allocate(self, byte_size: int) -> DeviceMemory:
        """Device memory that other processes can map by its handle; > 0 bytes, not zeroed."""
        whole = math.ceil(byte_size / _BLOCK_BYTES) * _BLOCK_BYTES
        address, handle = ctypes.c_void_p(), (ctypes.c_ubyte * _HANDLE_BYTES)()
        self._call("dynsplit_allocate", ctypes.c_int64(whole), ctypes.byref(address), handle)
        return DeviceMemory(self, address.value or 0, byte_size, bytes(handle))

    def open(self, handle: bytes, byte_size: int) -> DeviceMemory:
        """Another process's allocation, from its begin; once at a time in this process."""
        address, raw = ctypes.c_void_p(), (ctypes.c_ubyte * _HANDLE_BYTES)(*handle)
        self._call("dynsplit_open_ipc", raw, ctypes.byref(address))
        return DeviceMemory(self, address.value or 0, byte_size, None)

    def give_back(self, address: int, *, mapped: bool) -> None:
        """Unmaps or frees; `DeviceMemory.close` calls it."""
        name = "dynsplit_close_ipc" if mapped else "dynsplit_free"
        self._call(name, ctypes.c_void_p(address))

    def map(self, client: Client, session_id: str) -> MappedSession:
        """K and V of a session that lies on this device."""
        return MappedSession(self, client, session_id)

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor | Sequence[torch.Tensor],
        values: torch.Tensor | Sequence[torch.Tensor],
        tokens: torch.Tensor | None,
        tail_keys: torch.Tensor,
        tail_values: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of one query a head over chosen rows and the tail, on torch's current stream.

        Can be captured into a graph, which then replays these addresses and row counts.

        Args:
            q: [b, Hq, D].
            keys: [t, Hkv, D] for each sequence, in any strides with D contiguous.
            values: likewise.
            tokens: int32 [b, groups, n], groups 1 or Hkv: rows that are read; None = all of keys.
            tail_keys: [b, M, Hkv, D], read whole; M may be 0.
            tail_values: likewise.

        Returns:
            [b, Hq, D], in the type of q.

        Raises:
            EngineError: the library refuses the shape.
            KeyError: a type that torch engines do not attend in.
        """
        batch, num_query_heads, dim = q.shape
        num_kv_heads = keys[0].shape[1]
        if tokens is not None and (tokens.dtype != torch.int32 or tokens.stride(2) != 1):
            raise ValueError("tokens must be int32 with a contiguous last axis")
        if tokens is not None and tokens.shape[1] > 1 and tokens.stride(1) != tokens.shape[2]:
            raise ValueError("tokens of one sequence must be contiguous")
        shape = _Shape(
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            head_dim=dim,
            query_dtype=_DTYPES[q.dtype],
            key_dtype=_DTYPES[keys[0].dtype],
            value_dtype=_DTYPES[values[0].dtype],
            token_groups=1 if tokens is None else tokens.shape[1],
            scales_per_head=0,
            softmax_scale=dim**-0.5,
        )
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        num_tail_rows = tail_keys.shape[1]
        items = (_Item * batch)()
        for index, item in enumerate(items):
            item.queries = q[index].data_ptr()
            item.query_stride_bytes = q.stride(1) * q.element_size()
            item.keys, item.values = _rows(keys[index]), _rows(values[index])
            item.tokens = None if tokens is None else tokens[index].data_ptr()
            item.num_tokens = keys[index].shape[0] if tokens is None else tokens.shape[2]
            item.num_tail_rows = num_tail_rows
            if num_tail_rows:
                item.tail_keys, item.tail_values = (
                    _rows(tail_keys[index]),
                    _rows(tail_values[index]),
                )
            item.output = out[index].data_ptr()
        workspace = self._workspace(shape)
        self._call(
            "dynsplit_attend",
            ctypes.byref(shape),
            items,
            batch,
            workspace.data_ptr(),
            workspace.nbytes,
            torch.cuda.current_stream(self.device).cuda_stream,
        )
        return out

    def _workspace(self, shape: _Shape) -> torch.Tensor:
        key = (shape.num_query_heads, shape.num_kv_heads, shape.head_dim)
        if key not in self._workspaces:
            if torch.cuda.is_current_stream_capturing():
                raise EngineError("the first call of a shape allocates: not inside a capture")
            num_bytes = ctypes.c_int64()
            self._call(
                "dynsplit_attend_workspace_bytes",
                ctypes.byref(shape),
                ctypes.c_int64(_MAX_ITEMS),
                ctypes.byref(num_bytes),
            )
            self._workspaces[key] = torch.empty(
                num_bytes.value, dtype=torch.uint8, device=self.device
            )
        return self._workspaces[key]

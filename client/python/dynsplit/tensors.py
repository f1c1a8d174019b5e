# SPDX-License-Identifier: Apache-2.0
"""Element types, checksums, and tensors: numpy's, torch's, and those in shared memory.

numpy has no bfloat16 and no fp8. Such tensors are arrays of ml_dtypes' types where that package is
installed, and elsewhere unsigned integers of the same width, for which calls take `dtype=`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dynsplit.v1 import types_pb2

# Name of the numpy element type (ml_dtypes names where numpy has none), its wire code, its bytes.
_DTYPES = (
    ("float32", types_pb2.DTYPE_FLOAT32, 4),
    ("float16", types_pb2.DTYPE_FLOAT16, 2),
    ("bfloat16", types_pb2.DTYPE_BFLOAT16, 2),
    ("float8_e4m3fn", types_pb2.DTYPE_FLOAT8_E4M3, 1),
    ("float8_e5m2", types_pb2.DTYPE_FLOAT8_E5M2, 1),
    ("int8", types_pb2.DTYPE_INT8, 1),
    ("int32", types_pb2.DTYPE_INT32, 4),
)
_CODE_OF_NAME: dict[str, types_pb2.DType] = {name: code for name, code, _ in _DTYPES}
_NAME_OF_CODE: dict[int, str] = {code: name for name, code, _ in _DTYPES}
_BYTES_OF_CODE: dict[int, int] = {code: size for _, code, size in _DTYPES}


def dtype_code(name: str) -> types_pb2.DType:
    """Wire code of an element type: "float32", "bfloat16" (also of ml_dtypes and torch), ...

    Raises:
        ValueError: the wire has no such type.
    """
    name = name.removeprefix("torch.")
    if name not in _CODE_OF_NAME:
        raise ValueError(f"element type is {name}; must be one of {', '.join(_CODE_OF_NAME)}")
    return _CODE_OF_NAME[name]


def dtype_bytes(code: int) -> int:
    """Bytes of one element."""
    return _BYTES_OF_CODE[code]


def numpy_dtype(code: int) -> np.dtype[Any]:
    """numpy's element type for a wire code.

    Types that numpy has not come from ml_dtypes where it is installed; elsewhere they are unsigned
    integers of the same width.
    """
    name = _NAME_OF_CODE[code]
    try:
        return np.dtype(name)
    except TypeError:
        pass
    try:
        import ml_dtypes

    except ImportError:
        return np.dtype(f"u{_BYTES_OF_CODE[code]}")
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


@dataclasses.dataclass(frozen=True)
class RegionSlice:
    """A place in a registered region; what lies there says how long it is."""

    name: str
    generation: int
    offset_bytes: int = 0

    def at(self, offset_bytes: int) -> RegionSlice:
        """The place so many bytes behind this one."""
        return dataclasses.replace(self, offset_bytes=self.offset_bytes + offset_bytes)

    def to_proto(self) -> types_pb2.RegionSlice:
        """As it travels."""
        return types_pb2.RegionSlice(
            name=self.name, generation=self.generation, offset_bytes=self.offset_bytes
        )


@dataclasses.dataclass(frozen=True)
class RegionTensor:
    """A dense row-major tensor in a registered region; its bytes do not travel."""

    place: RegionSlice
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * dtype_bytes(dtype_code(self.dtype))


def tensor_at(place: RegionSlice, dtype: str, *shape: int) -> RegionTensor:
    """A dense row-major tensor at a place of a region; stands wherever an array does.

    Raises:
        ValueError: the shape is empty, or the wire has no such type.
    """
    if math.prod(shape) <= 0:
        raise ValueError(f"shape is {shape}; every axis must be > 0")
    dtype_code(dtype)
    return RegionTensor(place, shape, dtype)


@dataclasses.dataclass(frozen=True)
class DeviceTensor:
    """A torch tensor on a GPU, and the stream that its elements are ready in."""

    tensor: Any
    stream: Any

    @classmethod
    def of(cls, tensor: Any, dtype: str | None) -> DeviceTensor:
        """In the calling thread's current stream of the tensor's device; `dtype` as `as_host`.

        Raises:
            ValueError: the wire has no such type.
        """
        import torch

        if dtype is not None and str(tensor.dtype) in ("torch.uint16", "torch.uint8"):
            tensor = tensor.view(getattr(torch, dtype.removeprefix("torch.")))
        dtype_code(str(tensor.dtype))
        return cls(tensor.detach(), torch.cuda.current_stream(tensor.device))

    def to_host(self) -> HostTensor:
        """A copy in host memory, row-major."""
        import torch

        with torch.cuda.stream(self.stream):
            return _from_torch(self.tensor.contiguous())

    @property
    def dtype(self) -> str:
        """Name of the element type."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:
        """As torch's."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return int(self.tensor.numel() * self.tensor.element_size())


Array = Any
"""numpy.ndarray, torch.Tensor (any device), or anything with `__dlpack__` or `__array__`."""

Tensor = Array | RegionTensor

AXES = ("token", "head", "channel", "kv", "page")


@dataclasses.dataclass(frozen=True)
class AxisTensor:
    """K, V or both in a layout of the engine's own: a tensor whose axes are named.

    Stands where a layer's keys do (or its values):

        AxisTensor(key_pool, ("page", "token", "head", "channel"))
        AxisTensor(pool, ("kv", "page", "token", "head", "channel"))  # both: values are None

    Attributes:
        tensor: of numpy, torch (any device) or in a region; all of it is what the server gets.
        axes: of each axis of `tensor` one of "token" (in a paged pool: slot of a page), "head",
            "channel" (the last), "kv" (K, then V) and "page" (physical page of a pool, which the
            call's `block_table` orders).
    """

    tensor: Tensor
    axes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks the names.

        Raises:
            ValueError: an unknown or repeated name, or not one an axis, or the channel not last.
        """
        unknown = set(self.axes) - set(AXES)
        if unknown or len(set(self.axes)) != len(self.axes) or self.axes[-1:] != ("channel",):
            raise ValueError(
                f"axes are {self.axes}; must be different ones of {AXES}, 'channel' last"
            )
        if len(self.tensor.shape) != len(self.axes):
            raise ValueError(f"{len(self.axes)} names for axes of {tuple(self.tensor.shape)}")

    @property
    def both(self) -> bool:
        """Whether it holds keys and values."""
        return "kv" in self.axes


@dataclasses.dataclass(frozen=True)
class HostTensor:
    """Elements in host memory; `data` may be of any numpy type as wide as `dtype`."""

    data: npt.NDArray[Any]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As numpy's."""
        return tuple(self.data.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return int(self.data.nbytes)

    def dense_strides(self) -> tuple[int, ...] | None:
        """Byte strides where the elements fill one piece of memory, the last axis innermost.

        None for anything else. The axes may be in any order: K of [heads, tokens, channels] seen as
        [tokens, heads, channels] can travel as it lies.
        """
        expected = self.data.itemsize
        axes = sorted(range(self.data.ndim), key=lambda a: (self.data.strides[a], -a))
        axes = [a for a in axes if self.data.shape[a] > 1]
        last = self.data.ndim - 1
        if self.data.size == 0 or (self.data.shape[last] > 1 and axes[0] != last):
            return None
        for axis in axes:
            if self.data.strides[axis] != expected:
                return None
            expected *= self.data.shape[axis]
        return tuple(self.data.strides)

    def flat_bytes(self) -> npt.NDArray[np.uint8]:
        """The elements in order of memory where `dense_strides` has some, else row-major; uint8."""
        if self.dense_strides() is None:
            return np.ascontiguousarray(self.data).reshape(-1).view(np.uint8)
        order = sorted(range(self.data.ndim), key=lambda a: (-self.data.strides[a], a))
        return self.data.transpose(order).reshape(-1).view(np.uint8)


def sequence_axes(tensor: Tensor | AxisTensor) -> tuple[int | None, int, int]:
    """T, Hkv and D of a layer's keys; T is None where they lie in a pool of pages.

    Raises:
        ValueError: not the three axes that keys have.
    """
    if isinstance(tensor, AxisTensor):
        size = dict(zip(tensor.axes, tensor.tensor.shape, strict=True))
        tokens = None if "page" in size else size["token"]
        return tokens, size["head"], size["channel"]
    if len(tensor.shape) != 3:
        raise ValueError(f"keys of a layer are {tuple(tensor.shape)}; must be [T, Hkv, D]")
    return tuple(tensor.shape)


def is_torch(tensor: Any) -> bool:
    """Whether it is a torch.Tensor, without importing torch."""
    return type(tensor).__module__.split(".")[0] == "torch"


def is_device(tensor: Any) -> bool:
    """Whether it is a torch.Tensor on a GPU."""
    return is_torch(tensor) and bool(tensor.is_cuda)


def as_host(tensor: Tensor, dtype: str | None = None) -> HostTensor | RegionTensor:
    """The tensor in host memory, without a copy where it lies there already.

    Args:
        tensor: of a type the wire has; tensors in regions pass through.
        dtype: what the bits are, for arrays of unsigned integers ("bfloat16" in uint16).

    Raises:
        ValueError: the wire has no such type, or `dtype` has another width.
    """
    if isinstance(tensor, RegionTensor):
        return tensor
    if is_torch(tensor):
        host = _from_torch(tensor)
    elif isinstance(tensor, np.ndarray) or not hasattr(tensor, "__dlpack__"):
        array = np.asarray(tensor)
        host = HostTensor(array, str(array.dtype))
    else:
        array = np.from_dlpack(tensor)
        host = HostTensor(array, str(array.dtype))
    if dtype is not None and host.dtype in ("uint16", "uint8"):
        host = HostTensor(host.data, dtype.removeprefix("torch."))
    if dtype_bytes(dtype_code(host.dtype)) != host.data.itemsize:
        raise ValueError(f"{host.dtype} does not fit elements of {host.data.itemsize} bytes")
    return host


def _from_torch(tensor: Any) -> HostTensor:
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    plain = tensor.detach().cpu()
    if name.startswith(("bfloat", "float8")):
        bits = torch.int16 if plain.element_size() == 2 else torch.uint8
        array = plain.view(bits).numpy()
        return HostTensor(array.view(numpy_dtype(dtype_code(name))), name)
    return HostTensor(plain.numpy(), name)


def from_bytes(data: Array, code: int, shape: tuple[int, ...], like: Any = None) -> Array:
    """An array over received bytes: of torch, on its device, where `like` is a tensor of it.

    Args:
        data: contiguous uint8 of numpy or torch; the array shares them (but for a copy to another
            device).
        code: wire code of the elements' type.
        shape: of the result.
        like: a tensor whose kind and device the result takes; None = numpy.
    """
    if like is None or not is_torch(like):
        host = data.cpu().numpy() if is_torch(data) else data
        return host.view(numpy_dtype(code)).reshape(shape)
    import torch

    dtype = getattr(torch, _NAME_OF_CODE[code])
    raw = data if is_torch(data) else torch.from_numpy(data)
    return raw.view(dtype).reshape(shape).to(like.device)


def to_torch(array: npt.NDArray[Any]) -> Any:
    """A copy of a received array as a torch tensor of its element type, on the CPU.

    Without ml_dtypes 16 bits are bfloat16 and 8 bits e4m3: what arrays of unsigned integers stand
    for here.
    """
    import torch

    name = str(array.dtype)
    name = {"uint16": "bfloat16", "uint8": "float8_e4m3fn"}.get(name, name)
    raw = torch.from_numpy(np.array(array).reshape(-1).view(np.uint8))
    return raw.view(getattr(torch, name)).view(array.shape)


@functools.cache
def _crc_function() -> Callable[[int, npt.NDArray[np.uint8]], int]:
    try:
        import google_crc32c

        if google_crc32c.implementation == "c":
            return lambda crc, data: int(google_crc32c.extend(crc, data))
    except ImportError:
        pass
    try:
        isal = ctypes.CDLL("libisal.so.2")
    except OSError as error:
        raise ImportError(
            "CRC32C needs the package google-crc32c with its C part, or libisal.so.2"
        ) from error
    crc32_iscsi = isal.crc32_iscsi
    crc32_iscsi.restype = ctypes.c_uint32
    crc32_iscsi.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]

    def extend(crc: int, data: npt.NDArray[np.uint8]) -> int:
        return int(crc32_iscsi(data.ctypes.data, len(data), crc ^ 0xFFFFFFFF)) ^ 0xFFFFFFFF

    return extend


def crc32c(data: Any, crc: int = 0) -> int:
    """CRC32C (Castagnoli) of A followed by `data`, where `crc` is that of A.

    Args:
        data: anything with the buffer interface, contiguous, at most 1 GiB.
        crc: checksum so far.

    Raises:
        ImportError: no library to compute it with.
    """
    view = memoryview(data)
    # An array, because the package takes no views: bytes are not copied for it.
    return _crc_function()(crc, np.frombuffer(view.cast("B"), np.uint8)) if view.nbytes else crc

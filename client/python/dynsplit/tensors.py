# SPDX-License-Identifier: Apache-2.0
"""Element types, checksums, and tensors that lie in memory shared with the server."""

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
_CODE_OF_NAME = {name: code for name, code, _ in _DTYPES}
_NAME_OF_CODE = {code: name for name, code, _ in _DTYPES}
_BYTES_OF_CODE = {code: size for _, code, size in _DTYPES}


def dtype_code(name: str) -> int:
    """Wire code of an element type: "float32", "bfloat16" (also of ml_dtypes and torch), ...

    Raises:
        ValueError: the wire has no such type.
    """
    name = name.removeprefix("torch.")
    if name not in _CODE_OF_NAME:
        raise ValueError(f"element type is {name}; must be one of {', '.join(_CODE_OF_NAME)}")
    return int(_CODE_OF_NAME[name])


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


Tensor = npt.NDArray[Any] | RegionTensor


@functools.cache
def _crc_function() -> Callable[[int, memoryview], int]:
    try:
        import google_crc32c

        if google_crc32c.implementation == "c":
            return lambda crc, data: int(google_crc32c.extend(crc, bytes(data)))
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

    def extend(crc: int, data: memoryview) -> int:
        array = np.frombuffer(data, np.uint8)
        return int(crc32_iscsi(array.ctypes.data, len(array), crc ^ 0xFFFFFFFF)) ^ 0xFFFFFFFF

    return extend


def crc32c(data: Any, crc: int = 0) -> int:
    """CRC32C (Castagnoli) of A followed by `data`, where `crc` is that of A.

    Args:
        data: anything with the buffer interface, contiguous, at most 1 GiB.
        crc: checksum so far.

    Raises:
        ImportError: no library to compute it with.
    """
    view = memoryview(data).cast("B")
    return _crc_function()(crc, view) if len(view) else crc

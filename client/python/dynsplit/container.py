# SPDX-License-Identifier: Apache-2.0
"""Container files (.dskv): the format that client/cpp/container.h draws, read and written.

`dynsplit.load` and `Compressed.save` are what most callers want; this is the file as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dynsplit import errors, tensors
from dynsplit.v1 import container_pb2, types_pb2

_MAGIC = b"\x89DSKV\r\n\x1a"
_VERSION = 1
_PREFIX = struct.Struct("<8sIIQI")  # magic, version, header bytes, file bytes, header's CRC32C
_PREFIX_BYTES = 32
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Section:
    """A tensor to write: its descriptor (id and location are not read) and its bytes."""

    descriptor: types_pb2.TensorDescriptor
    data: npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Container:
    """A file's contents.

    Attributes:
        header: proto ContainerHeader.
        sections: bytes of each entry of header.tensors, read-only views of the mapped file.
    """

    header: container_pb2.ContainerHeader
    sections: list[npt.NDArray[np.uint8]]

    def find(self, kind: str, layer: int | None = None) -> npt.NDArray[np.generic] | None:
        """The elements of a tensor, flat; None where there is none.

        Args:
            kind: as in types.proto, such as "TOKEN_IDS".
            layer: None = of the whole sequence.
        """
        code = types_pb2.TensorKind.Value(f"TENSOR_KIND_{kind}")
        for entry, data in zip(self.header.tensors, self.sections, strict=True):
            tensor = entry.tensor
            of = tensor.layer if tensor.HasField("layer") else None
            if tensor.kind == code and of == layer:
                return data.view(tensors.numpy_dtype(tensor.dtype))
        return None


def section(kind: str, layer: int | None, array: tensors.Array) -> Section:
    """A dense tensor as a section; `kind` as in types.proto, such as "KEY_PAGES"."""
    host = tensors.as_host(array)
    if isinstance(host, tensors.RegionTensor):
        raise ValueError("tensors in regions cannot be written: their bytes are not here")
    data = np.ascontiguousarray(host.data).reshape(-1).view(np.uint8)
    descriptor = types_pb2.TensorDescriptor(
        kind=types_pb2.TensorKind.Value(f"TENSOR_KIND_{kind}"),
        layer=layer,
        dtype=tensors.dtype_code(host.dtype),
        byte_size=data.nbytes,
    )
    return Section(descriptor, data)


def _lost(path: object, what: str) -> errors.DataLossError:
    return errors.DataLossError(f"{path}: container: {what}", code="DATA_LOSS")


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def read(path: str | Path) -> Container:
    """Maps a file and checks all of it, sections included.

    Raises:
        OSError: it cannot be read.
        DataLossError: a checksum or padding is wrong, or the file is cut.
        ValueError: it is no container of this version, or contradicts itself.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < len(_MAGIC) or file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{path}: not a container file")
        if size < _PREFIX_BYTES:
            raise _lost(path, "file is cut within its first 32 bytes")
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    prefix = data[:_PREFIX_BYTES].tobytes()
    if struct.unpack("<I", prefix[28:])[0] != tensors.crc32c(prefix[:28]):
        raise _lost(path, "first 32 bytes do not have their checksum")
    _, version, header_bytes, file_bytes, header_crc = _PREFIX.unpack(prefix[:28])
    if version != _VERSION:
        raise ValueError(f"{path}: version is {version}; this reader knows {_VERSION}")
    if file_bytes != size:
        raise _lost(path, f"file has {size} bytes; {file_bytes} were written")
    if header_bytes > min(size - _PREFIX_BYTES, _MAX_HEADER_BYTES):
        raise ValueError(f"{path}: header of {header_bytes} bytes is too large")
    packed = data[_PREFIX_BYTES : _PREFIX_BYTES + header_bytes].tobytes()
    if tensors.crc32c(packed) != header_crc:
        raise _lost(path, "header does not have its checksum")
    header = container_pb2.ContainerHeader.FromString(packed)
    return Container(header, _sections(path, header, data, _PREFIX_BYTES + header_bytes))


def _sections(
    path: str | Path,
    header: container_pb2.ContainerHeader,
    data: npt.NDArray[np.uint8],
    end: int,
) -> list[npt.NDArray[np.uint8]]:
    found, ids = [], set()
    for entry in header.tensors:
        name = types_pb2.TensorKind.Name(entry.tensor.kind)
        begin = _align(end)
        if entry.offset_bytes != begin or entry.tensor.byte_size < 1:
            raise ValueError(f"{path}: {name} begins at {entry.offset_bytes}; must be {begin}")
        if begin + entry.tensor.byte_size > len(data):
            raise ValueError(f"{path}: {name} ends beyond the file")
        if entry.tensor.id in ids:
            raise ValueError(f"{path}: tensor id {entry.tensor.id} occurs twice")
        ids.add(entry.tensor.id)
        if data[end:begin].any():
            raise _lost(path, f"padding before {name} is not zero")
        end = begin + entry.tensor.byte_size
        part = data[begin:end]
        if tensors.crc32c(part) != entry.crc32c:
            raise _lost(path, f"{name} does not have its checksum")
        found.append(part)
    if end != len(data):
        raise ValueError(f"{path}: {len(data) - end} bytes at the end belong to no tensor")
    return found


def write(
    path: str | Path, header: container_pb2.ContainerHeader, sections: Sequence[Section]
) -> None:
    """Replaces `path` atomically.

    Args:
        path: of the file.
        header: `tensors` is made from the sections; their ids are numbered from 1.
        sections: in the order of the file, none empty.

    Raises:
        OSError: it cannot be written.
        ValueError: a section is empty, or the header grows beyond 64 MiB.
    """
    made = container_pb2.ContainerHeader()
    made.CopyFrom(header)
    del made.tensors[:]
    for number, part in enumerate(sections, 1):
        if not len(part.data) or part.descriptor.byte_size != len(part.data):
            raise ValueError(f"section {number} has {len(part.data)} bytes")
        entry = made.tensors.add(crc32c=tensors.crc32c(part.data))
        entry.tensor.CopyFrom(part.descriptor)
        entry.tensor.id = number
        entry.tensor.ClearField("location")
    end = _place(made)
    packed = made.SerializeToString(deterministic=True)
    if len(packed) > _MAX_HEADER_BYTES:
        raise ValueError("the header is too large")
    prefix = _PREFIX.pack(_MAGIC, _VERSION, len(packed), end, tensors.crc32c(packed))
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent or ".", prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(prefix + struct.pack("<I", tensors.crc32c(prefix)) + packed)
            for part in sections:
                file.write(bytes(_align(file.tell()) - file.tell()))
                file.write(part.data.data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
        Path(temporary).replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def _place(header: container_pb2.ContainerHeader) -> int:
    """Sets the sections' offsets; returns the size of the file.

    Offsets are varints whose length depends on the header's: repeated until it stands still.
    """
    header_bytes, end = -1, 0
    while header_bytes != header.ByteSize():
        header_bytes = header.ByteSize()
        end = _PREFIX_BYTES + header_bytes
        for entry in header.tensors:
            entry.offset_bytes = _align(end)
            end = entry.offset_bytes + entry.tensor.byte_size
    return end

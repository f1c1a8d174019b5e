# SPDX-License-Identifier: Apache-2.0
"""The file of a capture: safetensors with a fixed set of tensors, `kv-capture/1`.

    8 bytes    header length n, little endian
    n bytes    JSON: __metadata__, then each tensor's dtype, shape and byte range; space padded
    rest       the tensors in header order, little endian, without gaps

The header is written here rather than by the safetensors library, which orders metadata at random:
equal captures are equal files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

FORMAT = "kv-capture/1"

_DTYPE_NAMES: dict[np.dtype[Any], str] = {
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
}


def write_tensors(
    path: Path, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]
) -> int:
    """Writes `tensors` in their given order, replacing `path` only once all is written.

    Returns:
        The file's size in bytes.

    Raises:
        KeyError: a tensor has a dtype other than BF16, F64, F32, I32, U8.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for tensor in tensors.values():
            stream.write(np.ascontiguousarray(tensor).tobytes())
    os.replace(partial, path)
    return 8 + len(encoded) + offset

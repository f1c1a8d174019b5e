# SPDX-License-Identifier: Apache-2.0
"""Reads `kv-capture/1` files for the judges. Needs numpy, ml_dtypes and safetensors only."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import safe_open


def _upcast(tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return tensor.astype(np.float32) if tensor.dtype == ml_dtypes.bfloat16 else tensor


@dataclasses.dataclass(frozen=True)
class LayerTensors:
    """One captured layer, exactly upcast to fp32; keys and queries after RoPE."""

    key: npt.NDArray[np.float32]  # [T, Hkv, D]
    value: npt.NDArray[np.float32]  # [T, Hkv, D]
    query: npt.NDArray[np.float32]  # [W, Hq, D]


class CaptureFile:
    """A capture whose layers are read on demand.

    Raises:
        ValueError: the file is of another format.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("dynsplit.format") != "kv-capture/1":
                raise ValueError(f"{path} is no kv-capture/1 file")
            self.model: dict[str, Any] = json.loads(metadata["dynsplit.model"])
            self.text: dict[str, str] = json.loads(metadata["dynsplit.text"])
            self.token_ids: npt.NDArray[np.int32] = file.get_tensor("token_ids")
            self.query_positions: npt.NDArray[np.int32] = file.get_tensor("query_positions")

    @property
    def layer_ids(self) -> list[int]:
        """Model layer of each captured slot."""
        ids: list[int] = self.model["layer_ids"]
        return ids

    def layer(self, slot: int) -> LayerTensors:
        """Reads the slot-th captured layer."""
        with safe_open(self.path, "np") as file:
            return LayerTensors(
                *(
                    _upcast(file.get_tensor(f"layers.{slot}.{name}"))
                    for name in ("key", "value", "query")
                )
            )

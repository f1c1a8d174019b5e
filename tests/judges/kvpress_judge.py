# SPDX-License-Identifier: Apache-2.0
"""Lets NVIDIA's kvpress judge the sample captures; writes tests/data/golden/kvpress.safetensors.

kvpress scores and prunes inside a transformers model. Here its presses run unchanged on captured
tensors: a stand-in attention module whose query projection hands back the captured queries, with
rotary tables that rotate by nothing (cos = 1, sin = 0), because they are rotated already.
Everything is fp32 on the CPU. Which tokens a press keeps is read off the values it returns: row t
of every value head holds the number t.

Tensors, for each kind and captured slot i, with T tokens, and r = share removed, in percent:

    {kind}.layers.{i}.{snapkv|knorm|keydiff}.score           F32 [Hkv, T]
    {kind}.layers.{i}.{snapkv|knorm|keydiff}.kept.r{r}       I32 [Hkv, n], ascending
    {kind}.layers.{i}.{chunkkv|streaming_llm}.kept.r{r}      I32 [n], ascending, shared by the heads

Needs torch, transformers and kvpress (0.5.5 was used), besides numpy, ml_dtypes, safetensors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from captures import CaptureFile
from safetensors.numpy import save_file

if TYPE_CHECKING:
    import torch

FORMAT = "kvpress-golden/1"
KINDS = ("prose", "code", "dialogue")
RATIOS = (0.5, 0.8, 0.9)  # share removed, kvpress' compression_ratio
WINDOW = 64
KERNEL = 5
CHUNK_LENGTH = 20
NUM_SINKS = 4

Golden = dict[str, npt.NDArray[Any]]


def repository_data() -> Path:
    """tests/data of this checkout."""
    return Path(__file__).resolve().parents[1] / "data"


def kept_name(press: str, ratio: float) -> str:
    """Last part of the name of a kept-index tensor."""
    return f"{press}.kept.r{round(100 * ratio)}"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what the judgement depends on; "absent" for what is not installed."""
    found = {"python": platform.python_version()}
    for package in ("kvpress", "torch", "transformers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


class LayerJudge:
    """Runs presses on one captured layer."""

    def __init__(self, capture: CaptureFile, slot: int) -> None:
        """Builds the stand-in module and its inputs.

        Raises:
            ValueError: the captured queries are not the last WINDOW positions.
        """
        import torch
        from torch import nn

        layer = capture.layer(slot)
        tokens, kv_heads, dim = layer.key.shape
        q_heads = layer.query.shape[1]
        expected = np.arange(tokens - WINDOW, tokens)
        if not np.array_equal(capture.query_positions, expected):
            raise ValueError(f"{capture.path} must hold the queries of its last {WINDOW} positions")

        self._keys = torch.from_numpy(layer.key).transpose(0, 1).unsqueeze(0).contiguous()
        index = torch.arange(tokens, dtype=torch.float32)
        self._values = index.view(1, 1, tokens, 1).expand(1, kv_heads, tokens, dim).contiguous()
        self._hidden = torch.zeros(1, tokens, q_heads * dim)
        self._hidden[0, -WINDOW:] = torch.from_numpy(layer.query.reshape(WINDOW, -1))
        self._kwargs = {
            "position_embeddings": (torch.ones(1, tokens, dim), torch.zeros(1, tokens, dim))
        }
        self._module = nn.Module()
        self._module.q_proj = nn.Identity()
        self._module.head_dim = dim
        self._module.layer_idx = slot
        self._module.config = SimpleNamespace(
            num_attention_heads=q_heads,
            num_key_value_heads=kv_heads,
            hidden_size=q_heads * dim,
            head_dim=dim,
        )

    def score(self, press: Any) -> npt.NDArray[np.float32]:
        """The press's own scores, [Hkv, T]."""
        import torch

        with torch.inference_mode():
            scores: torch.Tensor = press.score(
                self._module, self._hidden, self._keys, self._values, None, self._kwargs
            )
        if scores.shape != self._keys.shape[:3] or not torch.isfinite(scores).all():
            raise ValueError(f"{type(press).__name__} gave scores of shape {tuple(scores.shape)}")
        return np.ascontiguousarray(scores[0].float().numpy())

    def kept(self, press: Any) -> npt.NDArray[np.int32]:
        """Token indices the press keeps, ascending, [Hkv, n]."""
        import torch

        with torch.inference_mode():
            keys, values = press.compress(
                self._module, self._hidden, self._keys, self._values, None, self._kwargs
            )
            indices = values[0, :, :, 0].long()
            moved = torch.stack([self._keys[0, head, row] for head, row in enumerate(indices)])
        if not torch.equal(moved, keys[0]):
            raise ValueError(f"{type(press).__name__} moved keys and values differently")
        ordered = indices.sort(dim=-1).values
        return np.ascontiguousarray(ordered.numpy().astype(np.int32))


def _shared(kept: npt.NDArray[np.int32], press: str) -> npt.NDArray[np.int32]:
    if not (kept == kept[0]).all():
        raise ValueError(f"{press} kept different tokens in different heads")
    return np.ascontiguousarray(kept[0])


def judge_layer(capture: CaptureFile, slot: int) -> Golden:
    """All scores and kept indices of one layer, by the last parts of their names."""
    from kvpress import (
        ChunkKVPress,
        KeyDiffPress,
        KnormPress,
        SnapKVPress,
        StreamingLLMPress,
    )

    layer = LayerJudge(capture, slot)

    def snapkv(ratio: float) -> Any:
        return SnapKVPress(compression_ratio=ratio, window_size=WINDOW, kernel_size=KERNEL)

    found: Golden = {
        "snapkv.score": layer.score(snapkv(0.5)),
        "knorm.score": layer.score(KnormPress(compression_ratio=0.5)),
        "keydiff.score": layer.score(KeyDiffPress(compression_ratio=0.5)),
    }
    for ratio in RATIOS:
        per_head = {
            "snapkv": snapkv(ratio),
            "knorm": KnormPress(compression_ratio=ratio),
            "keydiff": KeyDiffPress(compression_ratio=ratio),
        }
        shared = {
            "chunkkv": ChunkKVPress(press=snapkv(ratio), chunk_length=CHUNK_LENGTH),
            "streaming_llm": StreamingLLMPress(compression_ratio=ratio, n_sink=NUM_SINKS),
        }
        for name, press in per_head.items():
            found[kept_name(name, ratio)] = layer.kept(press)
        for name, press in shared.items():
            found[kept_name(name, ratio)] = _shared(layer.kept(press), name)
    return found


def judge_sample(sample: Path) -> Golden:
    """Judges every layer of the three sample captures in `sample`."""
    found: Golden = {}
    for kind in KINDS:
        capture = CaptureFile(sample / f"{kind}.safetensors")
        for slot in range(len(capture.layer_ids)):
            for name, tensor in judge_layer(capture, slot).items():
                found[f"{kind}.layers.{slot}.{name}"] = tensor
            print(f"{kind}: layer {capture.layer_ids[slot]} judged")
    return found


def golden_metadata(sample: Path) -> dict[str, str]:
    """Metadata that ties a golden file to its inputs and tools."""
    parameters: Mapping[str, Any] = {
        "window_size": WINDOW,
        "kernel_size": KERNEL,
        "chunk_length": CHUNK_LENGTH,
        "n_sink": NUM_SINKS,
        "compression_ratios": RATIOS,
    }
    hashes = {kind: file_sha256(sample / f"{kind}.safetensors") for kind in KINDS}
    return {
        "dynsplit.format": FORMAT,
        "dynsplit.versions": json.dumps(versions()),
        "dynsplit.parameters": json.dumps(parameters),
        "dynsplit.sample_sha256": json.dumps(hashes),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    data = repository_data()
    parser = argparse.ArgumentParser(description="Records what kvpress makes of the samples.")
    parser.add_argument("--sample", type=Path, default=data / "sample", metavar="DIR")
    parser.add_argument("--out", type=Path, default=data / "golden/kvpress.safetensors")
    arguments = parser.parse_args(argv)
    print("versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    try:
        import kvpress  # noqa: F401 (the first import shows what is missing)
    except Exception:
        traceback.print_exc()
        print("error: kvpress cannot be imported, see above", file=sys.stderr)
        return 2
    try:
        found = judge_sample(arguments.sample)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        save_file(found, arguments.out, metadata=golden_metadata(arguments.sample))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {len(found)} tensors, {arguments.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

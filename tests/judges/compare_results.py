# SPDX-License-Identifier: Apache-2.0
"""Compares two results of the same request, safetensors written by `dynsplit compress`.

Usage: compare_results.py A B. Standard library only. Exits 1 unless
  * kept tokens differ in at most `MAX_DIFFERING` of the entries: backends may differ where two block
    scores tie within fp32 rounding;
  * every tensor of a layer whose kept tokens are equal is equal byte for byte;
  * receipts agree within `RECEIPT_TOLERANCE`.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

MAX_DIFFERING = 0.01
RECEIPT_TOLERANCE = 2e-3

Tensors = dict[str, bytes]


def read(path: str) -> tuple[dict[str, str], Tensors]:
    """Metadata and raw tensor bytes of a safetensors file."""
    data = Path(path).read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    body = memoryview(data)[8 + size :]
    return metadata, {n: bytes(body[slice(*t["data_offsets"])]) for n, t in header.items()}


def differing_tokens(a: bytes, b: bytes) -> int:
    """Entries of two int32 kept sets that are not in both."""
    sets = [set(struct.unpack(f"<{len(x) // 4}i", x)) for x in (a, b)]
    return len(sets[0] ^ sets[1])


def compare(a: str, b: str) -> str:
    """One line for people; raises AssertionError on a difference that must not be."""
    (meta_a, tensors_a), (meta_b, tensors_b) = read(a), read(b)
    assert tensors_a.keys() == tensors_b.keys(), "different tensors"
    layers = sorted({n.split(".")[1] for n in tensors_a if n.startswith("layers.")}, key=int)
    differing = total = equal_bytes = 0
    for layer in layers:
        prefix = f"layers.{layer}."
        kept = prefix + "kept_tokens"
        total += len(tensors_a[kept]) // 4
        if tensors_a[kept] != tensors_b[kept]:
            differing += max(1, differing_tokens(tensors_a[kept], tensors_b[kept]))
            continue
        for name in (n for n in tensors_a if n.startswith(prefix)):
            assert tensors_a[name] == tensors_b[name], f"{name} differs although its tokens are equal"
            equal_bytes += len(tensors_a[name])
    assert differing <= MAX_DIFFERING * total, f"{differing} of {total} kept tokens differ"
    receipts = [json.loads(m["dynsplit.receipt"]) for m in (meta_a, meta_b)]
    for key in ("retained_attention_mass_mean", "output_relative_error_mean"):
        values = [float(receipt.get(key) or math.nan) for receipt in receipts]
        if differing == 0 and not any(map(math.isnan, values)):
            assert abs(values[0] - values[1]) <= RECEIPT_TOLERANCE, f"{key}: {values}"
    return f"{differing} of {total} kept tokens differ, {equal_bytes} bytes equal"


if __name__ == "__main__":
    try:
        print(compare(sys.argv[1], sys.argv[2]))
    except AssertionError as error:
        sys.exit(f"{sys.argv[1]} against {sys.argv[2]}: {error}")

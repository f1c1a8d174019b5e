# SPDX-License-Identifier: Apache-2.0
"""Compares two sessions of the same capture, JSON written by `dynsplit session --json --with-tokens`.

Usage: compare_sessions.py A B. Standard library only. Exits 1 unless
  * chosen tokens differ in at most `MAX_DIFFERING` of the entries: backends may differ where two block
    scores tie within fp32 rounding;
  * memory, blocks and where they end are equal;
  * rows moved over all steps agree within `MAX_MOVED`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MAX_DIFFERING = 0.01
MAX_MOVED = 0.02


def compare(a: dict[str, Any], b: dict[str, Any]) -> str:
    """One line for people; raises AssertionError on a difference that must not be."""
    for key in ("shape", "policy", "num_blocks", "open_block_begin", "capacity_tokens"):
        assert a["session"][key] == b["session"][key], f"{key} differs"
    for key in ("key_value", "index"):
        assert a["session"]["bytes"][key] == b["session"]["bytes"][key], f"bytes of {key} differ"
    differing = total = 0
    for layer_a, layer_b in zip(a["layers"], b["layers"], strict=True):
        for set_a, set_b in zip(layer_a["tokens"], layer_b["tokens"], strict=True):
            total += len(set_a)
            differing += len(set(set_a) ^ set(set_b))
    assert total > 0 and differing <= MAX_DIFFERING * total, f"{differing} of {total} tokens differ"
    moved = [sum(x["moved_rows"]) for x in (a, b)]
    assert abs(moved[0] - moved[1]) <= MAX_MOVED * max(moved), f"rows moved: {moved[0]}, {moved[1]}"
    return f"{total} tokens, {differing} differ; {moved[0]} and {moved[1]} rows moved"


def main() -> int:
    try:
        print(compare(*(json.loads(Path(p).read_text()) for p in sys.argv[1:3])))
    except AssertionError as error:
        print(f"FAILED: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Rows of a summary.json of `./run bench` as a Markdown table.

usage: table.py summary.json [PREFIX...]      only rows whose names start with one of these
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = ("what", "value", "unit", "ceiling", "share", "target", "met", "peer", "times the peer")
RIGHT = {"value", "ceiling", "share", "peer", "times the peer"}


def figure(value: float | None) -> str:
    """Three to four digits, no exponent up to a million."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def cells(row: dict[str, Any]) -> list[str]:
    """The columns of HEAD."""
    peer, value = row["peer"], row["value"]
    better = None
    if peer is not None and peer > 0 and value > 0:
        better = value / peer if row["unit"].endswith("/s") else peer / value
    met = {None: "–", True: "yes", False: "**no**"}[row["met"]]
    share = "–" if row["share"] is None else f"{row['share']:.2f}"
    times = "–" if better is None else f"{better:.2f}"
    return [row["name"], figure(value), row["unit"], figure(row["ceiling"]), share, row["target"] or "–",
            met, figure(peer), times]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, its columns aligned for those who read it as text."""
    lines = [list(HEAD), *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]

    def text(line: list[str]) -> str:
        padded = (
            cell.rjust(width) if head in RIGHT else cell.ljust(width)
            for cell, width, head in zip(line, widths, HEAD, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(
        "-" * (width + 1) + (":" if head in RIGHT else "-") for width, head in zip(widths, HEAD, strict=True)
    ) + "|"
    return "\n".join([text(lines[0]), rule, *map(text, lines[1:])])


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    rows = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    prefixes = tuple(argv[1:]) or ("",)
    print(table([row for row in rows if row["name"].startswith(prefixes)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

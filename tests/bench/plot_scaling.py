#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the scaling rows of a summary.json: what a token costs as the work grows.

usage: plot_scaling.py summary.json OUT.png

A panel for each backend and sweep (tokens, layers); the band is 15 % around the sweep's median.
Needs matplotlib.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

NAME = re.compile(r"scaling/(?P<backend>\w+)/(?P<sweep>T|layers)=(?P<size>\d+)")
AXES = {"T": "tokens, one layer", "layers": "layers of 32K tokens"}
BAND = 0.15


def size_label(size: int) -> str:
    """8192 -> 8K."""
    return f"{size // 1024}K" if size >= 1024 else str(size)


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    sweeps: dict[tuple[str, str], list[tuple[int, float, float]]] = defaultdict(list)
    for row in json.loads(Path(argv[0]).read_text(encoding="utf-8")):
        match = NAME.fullmatch(row["name"])
        if match:
            key = (match["backend"], match["sweep"])
            sweeps[key].append((int(match["size"]), row["value"], row["ceiling"]))
    if not sweeps:
        print(f"plot_scaling: no scaling rows in {argv[0]}")
        return 0
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        print(f"plot_scaling: nothing drawn: {error}")
        return 1

    backends = sorted({backend for backend, _ in sweeps})
    figure, panels = pyplot.subplots(
        len(backends), 2, figsize=(10, 3.4 * len(backends)), squeeze=False, layout="constrained"
    )
    for line, backend in zip(panels, backends, strict=True):
        for panel, (sweep, axis) in zip(line, AXES.items(), strict=True):
            points = sorted(sweeps[backend, sweep])
            if not points:
                panel.set_visible(False)
                continue
            sizes, costs, medians = zip(*points, strict=True)
            median = medians[0]
            panel.axhspan((1 - BAND) * median, (1 + BAND) * median, color="tab:green", alpha=0.15,
                          label=f"median {median:{',.0f' if median >= 100 else '.3g'}} ns ± {BAND:.0%}")
            panel.plot(sizes, costs, marker="o", color="tab:blue")
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [size_label(size) for size in sizes])
            panel.minorticks_off()
            panel.set_ylim(0, 1.3 * max(*costs, (1 + BAND) * median))
            panel.set_xlabel(axis)
            panel.set_ylabel("ns per token and layer")
            panel.set_title(f"whole compress, {backend.upper()} backend")
            panel.grid(alpha=0.3)
            panel.legend(loc="lower right")
    figure.savefig(argv[1], dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

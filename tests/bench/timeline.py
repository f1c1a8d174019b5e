# SPDX-License-Identifier: Apache-2.0
"""Draws what `dynsplitd --trace FILE` wrote: one lane a step, one bar a layer, on one clock.

    python timeline.py FILE OUT.png [--request ID] [--from MS] [--to MS]

Bars of one lane that overlap in time lie in rows of their own, so that every lane shows how many
layers were in that step at a time. Needs matplotlib.
"""

import argparse
import heapq
import json
import sys
from collections import defaultdict

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = ["prepare", "receive", "h2d", "check", "score", "select", "gather", "receipt", "d2h", "send"]
LABELS = {
    "prepare": "prepare",
    "receive": "receive",
    "h2d": "host to device",
    "check": "finite check",
    "score": "score",
    "select": "select",
    "gather": "gather",
    "receipt": "receipt",
    "d2h": "device to host",
    "send": "send",
}
ROW_INCHES = 0.2
LANE_GAP_ROWS = 0.5


def read_spans(path, request):
    """Spans of `request` (None = of all), times in ms from the first begin."""
    with open(path, encoding="utf-8") as lines:
        spans = [json.loads(line) for line in lines if line.strip()]
    spans = [span for span in spans if request is None or span["request"] == request]
    if not spans:
        return []
    origin = min(span["begin_us"] for span in spans)
    for span in spans:
        span["begin"] = (span["begin_us"] - origin) / 1000
        span["end"] = (span["end_us"] - origin) / 1000
    return spans


def assign_rows(spans):
    """Gives each span the lowest row that is free when it begins; returns the number of rows."""
    free, busy, num_rows = [], [], 0
    for span in sorted(spans, key=lambda s: (s["begin"], s["end"])):
        while busy and busy[0][0] <= span["begin"]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            span["row"] = heapq.heappop(free)
        else:
            span["row"] = num_rows
            num_rows += 1
        heapq.heappush(busy, (span["end"], span["row"]))
    return num_rows


def union(spans):
    """Time covered by at least one of the spans, ms."""
    covered, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s["begin"]):
        covered += max(0.0, span["end"] - max(span["begin"], until))
        until = max(until, span["end"])
    return covered


def draw(spans, out, limits):
    """One picture of the spans."""
    lanes = defaultdict(list)
    for span in spans:
        lanes[span["what"]].append(span)
    steps = [step for step in STEPS if step in lanes] + sorted(set(lanes) - set(STEPS))
    begin, end = limits
    end = max(span["end"] for span in spans) if end is None else end
    colors = matplotlib.colormaps["tab10"].colors

    tops, num_rows, top = {}, {}, 0.0
    for step in steps:
        tops[step] = top
        num_rows[step] = assign_rows(lanes[step])
        top += num_rows[step] + LANE_GAP_ROWS
    figure, axes = plt.subplots(figsize=(13, 1.1 + ROW_INCHES * top), layout="constrained")
    width_of_digit = (end - begin) / 150
    for step in steps:
        for span in lanes[step]:
            layer = span["layer"]
            color = "0.6" if layer < 0 else colors[layer % len(colors)]
            length = span["end"] - span["begin"]
            # The edge keeps the shortest spans visible.
            axes.barh(tops[step] + span["row"] + 0.5, length, left=span["begin"], height=0.86,
                      color=color, edgecolor=color, linewidth=0.5)
            visible = min(span["end"], end) - max(span["begin"], begin)
            if layer >= 0 and visible > width_of_digit * (len(str(layer)) + 0.5):
                axes.text((max(span["begin"], begin) + min(span["end"], end)) / 2,
                          tops[step] + span["row"] + 0.52, str(layer), ha="center", va="center",
                          fontsize=6.5, color="white")
    boundaries = [tops[step] - LANE_GAP_ROWS / 2 for step in steps[1:]]
    axes.hlines(boundaries, begin, end, color="0.88", linewidth=0.6)
    centers, names = [], []
    duration = max(span["end"] for span in spans)
    for step in steps:
        centers.append(tops[step] + num_rows[step] / 2)
        separator = "\n" if num_rows[step] > 1 else "  "  # one row has room for one line
        names.append(f"{LABELS.get(step, step)}{separator}"
                     f"{union(lanes[step]) / duration:.1%} busy")
    axes.set_yticks(centers, names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(top, -LANE_GAP_ROWS)
    axes.set_xlim(begin, end)
    axes.set_xlabel("ms from the first byte")
    layers = {span["layer"] for span in spans if span["layer"] >= 0}
    requests = {span["request"] for span in spans}
    axes.set_title(f"{len(requests)} request{'s' if len(requests) > 1 else ''}, {len(layers)} layers "
                   "(number and colour: layer)", fontsize=9, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.savefig(out, dpi=140)


def main():
    """Reads the arguments; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("out")
    parser.add_argument("--request", help="only the spans of this request")
    parser.add_argument("--from", dest="begin", type=float, default=0.0, help="ms")
    parser.add_argument("--to", dest="end", type=float, help="ms")
    arguments = parser.parse_args()
    spans = read_spans(arguments.file, arguments.request)
    if not spans:
        print(f"{arguments.file} has no such spans", file=sys.stderr)
        return 1
    draw(spans, arguments.out, (arguments.begin, arguments.end))
    return 0


if __name__ == "__main__":
    sys.exit(main())

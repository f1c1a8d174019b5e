# SPDX-License-Identifier: Apache-2.0
"""Plots of summary.csv and receipts.csv. A few methods have a colour; the rest is grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import NullLocator, ScalarFormatter

from .cases import KINDS
from .summary import REFERENCE

matplotlib.use("Agg")

Row = dict[str, str]
_HIGHLIGHTED = 8
_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2")
_GREY = "#c8c8c8"
_LEAST_KL = 1e-4  # nats; less is drawn as this


def highlighted(rows: Sequence[Row], mode: str, groups: dict[tuple[str, str], str]) -> list[str]:
    """The reference, then the best others by average over the shares; ablations are not asked."""
    reference = REFERENCE[mode]
    averages: dict[str, list[float]] = {}
    for row in rows:
        named = (row["mode"], row["kind"], row["task"]) == (mode, "all", "average")
        if named and groups.get((mode, row["method"])) != "ablation":
            averages.setdefault(row["method"], []).append(float(row["score"]))
    best = sorted(averages, key=lambda name: -sum(averages[name]) / len(averages[name]))
    first = [reference] if reference in averages else []
    return (first + [name for name in best if name != reference])[:_HIGHLIGHTED]


def _draw(axis: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Average over share, a line a method; bands are intervals of the loss to the full cache."""
    lines: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        score, full = float(row["score"]), float(row["full_score"])
        band = (full + float(row["lo"]), full + float(row["hi"]))
        lines.setdefault(row["method"], []).append((100 * float(row["share"]), score, *band))
    for name in sorted(lines.keys() - set(names)):
        shares, scores, *_ = zip(*sorted(lines[name]), strict=True)
        axis.plot(shares, scores, color=_GREY, linewidth=0.8, zorder=1)
    for number, name in reversed(list(enumerate(names))):
        if name not in lines:
            continue
        shares, scores, low, high = zip(*sorted(lines[name]), strict=True)
        colour, ours = _COLOURS[number], number == 0
        axis.fill_between(
            shares, low, high, color=colour, alpha=0.18 if ours else 0.06, linewidth=0
        )
        axis.plot(
            *(shares, scores),
            color=colour,
            marker="o",
            markersize=5 if ours else 3.5,
            linewidth=2.6 if ours else 1.4,
            zorder=4 if ours else 3,
            label=name,
        )
    if rows:
        axis.axhline(float(rows[0]["full_score"]), color="black", linestyle=":", linewidth=1.2)
        ticks = sorted({100 * float(row["share"]) for row in rows})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", color="#eeeeee", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    line = matplotlib.lines.Line2D
    handles = [
        *handles[::-1],
        line([], [], color=_GREY),
        line([], [], color="black", linestyle=":"),
    ]
    labels = [*labels[::-1], "other methods", "full cache"]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 3}
    axis.legend(handles, labels, fontsize=8, frameon=False, **place)


def plot_scores(rows: Sequence[Row], groups: dict[tuple[str, str], str], path: Path) -> None:
    """One panel a mode, all kinds together."""
    modes = sorted({row["mode"] for row in rows})
    figure, axes = pyplot.subplots(1, len(modes), figsize=(6.4 * len(modes), 5), squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        chosen = _of(rows, mode, "all")
        _draw(axis, chosen, highlighted(rows, mode, groups))
        what = (
            "kept, the rest is dropped" if mode == "evict" else "read by a step, nothing is dropped"
        )
        axis.set(title=f"{mode}: {what}", xlabel="share of the tokens")
        _legend(axis)
    axes[0][0].set_ylabel("average score")
    _save(figure, path)


def plot_kinds(rows: Sequence[Row], groups: dict[tuple[str, str], str], path: Path) -> None:
    """One panel a kind of text and mode; the methods of `plot_scores`."""
    modes = sorted({row["mode"] for row in rows})
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    size = (3.6 * len(kinds), 3.4 * len(modes))
    figure, axes = pyplot.subplots(
        len(modes), len(kinds), figsize=size, squeeze=False, sharey="row"
    )
    for line, mode in zip(axes, modes, strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            _draw(axis, _of(rows, mode, kind), highlighted(rows, mode, groups))
            axis.set_title(f"{mode}, {kind}", fontsize=10)
        line[0].set_ylabel("average")
        handles, labels = line[0].get_legend_handles_labels()
        beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        line[-1].legend(handles[::-1], labels[::-1], fontsize=7, frameon=False, **beside)
    _save(figure, path)


def plot_receipts(rows: Sequence[Row], path: Path) -> None:
    """What receipts said against what was lost, a point a cell."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    says = (("attention mass lost", lambda row: 1 - float(row["mass"])),
            ("relative error of attention's output", lambda row: float(row["error"])))  # fmt: skip
    for axis, (label, value) in zip(axes, says, strict=True):
        for number, share in enumerate(sorted({row["share"] for row in rows}, key=float)):
            mine = [(value(r), max(_LEAST_KL, float(r["kl"]))) for r in rows if r["share"] == share]
            name = f"{100 * float(share):g} % kept"
            colour = _COLOURS[number % len(_COLOURS)]
            axis.scatter(*zip(*mine, strict=True), s=14, alpha=0.7, color=colour, label=name)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.grid(axis="y", which="both", color="#f2f2f2", zorder=0)
        axis.set_xlabel(f"{label}, as the receipt says")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("KL from the full cache, nats")
    axes[0].legend(frameon=False)
    _save(figure, path)


def _of(rows: Sequence[Row], mode: str, kind: str) -> list[Row]:
    return [r for r in rows if (r["mode"], r["kind"], r["task"]) == (mode, kind, "average")]


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Quality curves for the server, from what evaluate.py measured.

    curves.py FOLDER OUT --run TEXT     FOLDER/receipts.csv -> OUT/presets.csv and OUT/receipts.csv
    curves.py FOLDER OUT --check        how well OUT tells the divergences of FOLDER (needs torch)

OUT is server/pipeline/quality, which is compiled into dynsplitd (Info.Advise, Receipt and the
quality floor read it). Use a run of the tuning split: what is reported on the held-out split must
not be learnt from it.

presets.csv   of each preset, by kept share: receipt and divergence, mean over cases, made monotone
receipts.csv  divergence by what a receipt says, over the cells (method, share, kind) of all methods

Monotone by isotonic regression, so that interpolation is safe: more tokens are never worse, and a
worse receipt never means less loss. Divergences are averaged as they are, not their logarithms: the
mean is what is to be expected, and few bad cases make most of it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

# Presets of the server that drop tokens; variants of them measured beside are no presets.
PRESETS = (
    "chunkkv",
    "dynsplit",
    "dynsplit_keys",
    "fixed_window",
    "h2o",
    "keydiff",
    "knorm",
    "sentencekv",
    "snapkv",
    "streamingllm",
    "tova",
)
MODEL = "SmolLM2-135M-Instruct"
_GROUPS = 24  # of cells of about equal receipts
_FIGURES = ("mass", "error", "kl")

Array = npt.NDArray[np.float64]
Row = dict[str, str]


def isotonic(values: Sequence[float], weights: Sequence[float]) -> Array:
    """The never-falling sequence closest to `values` in weighted squares.

    By pooling of adjacent violators.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for value, weight in zip(values, weights, strict=True):
        pool = (float(value), float(weight), 1)
        while pools and pools[-1][0] > pool[0]:
            mean, other, members = pools.pop()
            total = other + pool[1]
            pool = ((mean * other + pool[0] * pool[1]) / total, total, members + pool[2])
        pools.append(pool)
    return np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools])


def preset_curve(rows: Iterable[Row]) -> list[tuple[float, float, float, float]]:
    """(kept share, mass, error, divergence) by ascending share; ends in the full cache's."""
    found: dict[float, list[tuple[float, list[float]]]] = {}
    for row in rows:
        figures = [float(row[name]) for name in _FIGURES]
        found.setdefault(float(row["share"]), []).append((float(row["n"]), figures))
    shares = sorted(share for share in found if share < 1)
    weights = [sum(n for n, _ in found[share]) for share in shares]
    means = []
    for share in shares:
        numbers = [n for n, _ in found[share]]
        means.append(np.average([f for _, f in found[share]], axis=0, weights=numbers))
    columns = []
    for place, sign in enumerate((1, -1, -1)):
        column = [sign * mean[place] for mean in means]
        columns.append(sign * isotonic(column, weights))
    mass, error, divergence = columns
    points = [
        (share, min(float(m), 1.0), max(float(e), 0.0), max(float(d), 0.0))
        for share, m, e, d in zip(shares, mass, error, divergence, strict=True)
    ]
    return [*points, (1.0, 1.0, 0.0, 0.0)]


def loss_curve(
    values: Sequence[float], divergences: Sequence[float], weights: Sequence[float]
) -> list[tuple[float, float]]:
    """(value, divergence), strictly ascending in both and above 0, over cells of all methods.

    Cells of about equal value are averaged first, so that a single one does not make a step.
    """
    order = np.argsort(values, kind="stable")
    x, y, w = (np.asarray(a, np.float64)[order] for a in (values, divergences, weights))
    groups = np.array_split(np.arange(len(x)), min(_GROUPS, len(x)))
    total = [float(w[g].sum()) for g in groups]
    centre = [float(np.average(x[g], weights=w[g])) for g in groups]
    level = isotonic([float(np.average(y[g], weights=w[g])) for g in groups], total)
    points: list[tuple[float, float]] = []
    for value in np.unique(level[level > 0]):
        pooled = np.flatnonzero(level == value)
        middle = float(np.average([centre[i] for i in pooled], weights=[total[i] for i in pooled]))
        if middle > (points[-1][0] if points else 0.0):
            points.append((middle, float(value)))
    return points


def _write(path: Path, run: str, header: str, rows: Iterable[Sequence[object]]) -> None:
    lines = ["# SPDX-License-Identifier: Apache-2.0", f"# model: {MODEL}", f"# {run}"]
    lines += ["# Written by tests/eval/curves.py from receipts.csv of that run.", header]
    for name, *numbers in rows:
        lines.append(",".join([str(name), *(f"{number:.6g}" for number in numbers)]))
    path.write_text("\n".join(lines) + "\n")


def write_curves(rows: Sequence[Row], out: Path, run: str) -> None:
    """Both files.

    Raises:
        ValueError: there is no cell of a preset.
    """
    presets: list[Sequence[object]] = []
    for preset in PRESETS:
        own = [row for row in rows if row["method"] == preset]
        if own:
            presets += [(preset, *point) for point in preset_curve(own)]
    if not presets:
        raise ValueError("receipts.csv has no cell of a preset")
    kl = [float(row["kl"]) for row in rows]
    weights = [float(row["n"]) for row in rows]
    error = [float(row["error"]) for row in rows]
    lost = [1 - float(row["mass"]) for row in rows]
    receipts = [("error", *point) for point in loss_curve(error, kl, weights)]
    receipts += [("lost_mass", *point) for point in loss_curve(lost, kl, weights)]
    _write(out / "presets.csv", run, "preset,kept_ratio,mass,error,divergence", presets)
    _write(out / "receipts.csv", run, "figure,value,divergence", receipts)


def read(path: Path) -> list[Row]:
    """Rows of a CSV file that may have comments."""
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def expected(rows: Iterable[Row], presets: Sequence[Row]) -> list[float]:
    """Receipt.expected_divergence of cells: by their error, on the curve of their preset.

    Methods that are no presets are variants of dynsplit.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in presets:
        found.setdefault(row["preset"], []).append((float(row["error"]), float(row["divergence"])))
    told = []
    for row in rows:
        errors, divergences = np.array(sorted(found.get(row["method"], found["dynsplit"]))).T
        told.append(float(np.interp(float(row["error"]), errors, divergences)))
    return told


def check(rows: Sequence[Row], presets: Sequence[Row]) -> None:
    """Prints what the curves are worth on cells that they were not made of."""
    from accuracy.metrics import rank_correlation

    told, kl = expected(rows, presets), [float(row["kl"]) for row in rows]
    for name, value in (
        ("expected divergence", told),
        ("output error", [float(row["error"]) for row in rows]),
        ("lost attention mass", [1 - float(row["mass"]) for row in rows]),
        ("share of the tokens dropped", [1 - float(row["share"]) for row in rows]),
    ):
        found = rank_correlation(value, kl)
        print(f"rank correlation of {name} with KL, {len(kl)} cells: {found:.3f}")
    print(f"mean expected divergence {np.mean(told):.3f}, mean KL {np.mean(kl):.3f} nats")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="results of evaluate.py")
    parser.add_argument("out", type=Path, help="server/pipeline/quality")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--run", help="one line: size, split, cases of the run")
    mode.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    rows = read(arguments.folder / "receipts.csv")
    if arguments.check:
        check(rows, read(arguments.out / "presets.csv"))
    else:
        write_curves(rows, arguments.out, arguments.run)
    return 0


if __name__ == "__main__":
    sys.exit(main())

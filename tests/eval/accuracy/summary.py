# SPDX-License-Identifier: Apache-2.0
"""From measured cases to the tables that are kept.

summary.csv      a cell a method, mode, share, kind ("all": every kind) and task; lo and hi: 95 %
                 bootstrap interval of score - full_score, paired by case
comparisons.csv  dynsplit (evict) and dynsplit_index (index) less every other method, kind "all",
                 paired by case
receipts.csv     what receipts said, and the true divergence, a cell a method, share and kind

Scores, higher is better: share of right answers (passkey, multikey, variables, qa), share of right
tokens (line), "kl" = -divergence from the full cache's next tokens in nats, "nll" = -negative
log-likelihood of the true continuation (-log of its perplexity), "average" = mean over the tasks of
right and wrong.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import metrics
from .cases import ACCURACY_TASKS

SUMMARY = ("method", "mode", "share", "kind", "task", "n", "score", "full_score", "lo", "hi")
COMPARISONS = ("mode", "share", "task", "method", "other", "n", "difference", "lo", "hi")
RECEIPTS = ("method", "share", "kind", "n", "mass", "error", "kl")
REFERENCE = {"evict": "dynsplit", "index": "dynsplit_index"}
TASKS = (*ACCURACY_TASKS, "kl", "nll")

Cell = tuple[str, str, float, str]  # method, mode, share, kind
Pairs = dict[str, tuple[float, float]]  # by case: score, full score


def task_scores(task: str, score: dict[str, float]) -> dict[str, float]:
    """Scores of a case by the name of the task that they count for."""
    if task == "text":
        return {"kl": -score["kl"], "nll": -score["nll"]}
    return {task: score["tokens" if task == "line" else "exact"]}


def load(folder: Path, config: str) -> list[dict[str, Any]]:
    """Measured cases of one configuration."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [case for case in found if case.get("config") == config]


def cells(measured: Iterable[dict[str, Any]]) -> dict[Cell, dict[str, Pairs]]:
    """By cell and task, the scores of every case."""
    found: dict[Cell, dict[str, Pairs]] = {}
    for case in measured:
        full = task_scores(case["task"], case["full"])
        for row in case["rows"]:
            for task, score in task_scores(case["task"], row).items():
                for kind in (case["kind"], "all"):
                    cell = (row["method"], row["mode"], row["share"], kind)
                    tasks = found.setdefault(cell, {})
                    tasks.setdefault(task, {})[case["case"]] = (score, full[task])
    return found


def _seed(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def _groups(tasks: dict[str, Pairs], task: str) -> list[Pairs]:
    """Cases of a task; "average" has a group for each task of right and wrong."""
    names = ACCURACY_TASKS if task == "average" else (task,)
    return [tasks[name] for name in names if name in tasks]


def _means(groups: Sequence[Pairs], side: int) -> float:
    return float(np.mean([np.mean([pair[side] for pair in group.values()]) for group in groups]))


def summary(found: dict[Cell, dict[str, Pairs]]) -> list[dict[str, Any]]:
    """Rows of summary.csv."""
    rows = []
    for cell in sorted(found):
        for task in (*TASKS, "average"):
            groups = _groups(found[cell], task)
            if not groups:
                continue
            lost = [np.array([a - b for a, b in group.values()]) for group in groups]
            low, high = metrics.interval(lost, _seed(cell[3], task))
            n = sum(len(group) for group in groups)
            numbers = (n, _means(groups, 0), _means(groups, 1), low, high)
            rows.append(dict(zip(SUMMARY, (*cell, task, *numbers), strict=True)))
    return rows


def comparisons(found: dict[Cell, dict[str, Pairs]]) -> list[dict[str, Any]]:
    """Rows of comparisons.csv."""
    rows = []
    for other, mode, share, kind in sorted(found):
        method = REFERENCE[mode]
        ours = found.get((method, mode, share, kind))
        if kind != "all" or other == method or ours is None:
            continue
        theirs = found[other, mode, share, kind]
        for task in (*TASKS, "average"):
            pairs = list(zip(_groups(ours, task), _groups(theirs, task), strict=True))
            gains = [
                np.array([a[case][0] - b[case][0] for case in a if case in b]) for a, b in pairs
            ]
            gains = [gain for gain in gains if len(gain)]
            if not gains:
                continue
            low, high = metrics.interval(gains, _seed(kind, task))
            mean = float(np.mean([gain.mean() for gain in gains]))
            numbers = (sum(map(len, gains)), mean, low, high)
            names = (mode, share, task, method, other)
            rows.append(dict(zip(COMPARISONS, (*names, *numbers), strict=True)))
    return rows


def receipts(measured: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of receipts.csv; divergence over the answers of all tasks."""
    found: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for case in measured:
        for row in case["rows"]:
            if row["mass"] is not None:
                cell = (row["method"], row["share"], case["kind"])
                found.setdefault(cell, []).append(row)
    rows = []
    for cell, members in sorted(found.items()):
        means = [float(np.mean([m[name] for m in members])) for name in ("mass", "error", "kl")]
        rows.append(dict(zip(RECEIPTS, (*cell, len(members), *means), strict=True)))
    return rows


def write(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """A CSV; numbers with six digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            values = [row[column] for column in columns]
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])

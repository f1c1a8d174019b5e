# SPDX-License-Identifier: Apache-2.0
"""From measured cases to the tables that are kept.

summary.csv      a cell a method, mode, share, kind ("all": every kind) and task; lo and hi: 95 %
                 bootstrap interval of score - full_score, paired by case
comparisons.csv  dynsplit (evict) and dynsplit_index (index) less every other method, kind "all",
                 paired by case
receipts.csv     what receipts said, and the true divergence, a cell a method, share and kind
failures.csv     methods that failed, in how many cases, and the first error

Scores, higher is better: share of right answers (passkey, multikey, variables, qa), share of right
tokens (line), "kl" = -divergence from the full cache's next tokens in nats, "nll" = -negative
log-likelihood of the true continuation (-log of its perplexity).

"average" = mean over the tasks of right and wrong. A task that the model cannot do with the full
cache says nothing of a method: cases of one kind, task and prompt length count in the average only
where the full cache scores at least COUNTED = 0.2 over them. That looks at the full cache alone,
and was fixed before any method was measured. "relative" = average of the method / average of the
full cache, in the same cases.
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
FAILURES = ("method", "mode", "cases", "shares", "error")
RECEIPTS = ("method", "share", "kind", "n", "mass", "error", "kl")
RUN = "run.json"  # {"config", "methods", "cases"}: what the last run was asked for
REFERENCE = {"evict": "dynsplit", "index": "dynsplit_index"}
TASKS = (*ACCURACY_TASKS, "kl", "nll")
COUNTED = 0.2
_IN_AVERAGE = "average of "  # and a task: its cases that count

Cell = tuple[str, str, float, str]  # method, mode, share, kind
Pairs = dict[str, tuple[float, float]]  # by case: score, full score


def task_scores(task: str, score: dict[str, float]) -> dict[str, float]:
    """Scores of a case by the name of the task that they count for."""
    if task == "text":
        return {"kl": -score["kl"], "nll": -score["nll"]}
    return {task: score["tokens" if task == "line" else "exact"]}


def load(folder: Path) -> list[dict[str, Any]]:
    """Measured cases of the run that RUN describes."""
    run = json.loads((folder / RUN).read_text())
    paths = [folder / "cases" / f"{name}.json" for name in run["cases"]]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [case for case in found if case.get("config") == run["config"]]


def full_scores(case: dict[str, Any], mode: str) -> dict[str, float]:
    """Of the full cache, over the tokens that the mode is measured on."""
    name = "full_index" if mode == "index" else "full"
    return task_scores(case["task"], case.get(name, case["full"]))


def counted(measured: Iterable[dict[str, Any]], mode: str) -> set[str]:
    """Names of cases, without their number, that the full cache can do."""
    found: dict[str, list[float]] = {}
    for case in measured:
        if case["task"] in ACCURACY_TASKS:
            score = full_scores(case, mode)[case["task"]]
            found.setdefault(_stratum(case), []).append(score)
    return {stratum for stratum, scores in found.items() if np.mean(scores) >= COUNTED}


def _stratum(case: dict[str, Any]) -> str:
    return str(case["case"]).rpartition("-")[0]  # kind, task and length


def cells(measured: Sequence[dict[str, Any]]) -> dict[Cell, dict[str, Pairs]]:
    """By cell and task, the scores of every case."""
    counts = {mode: counted(measured, mode) for mode in REFERENCE}
    found: dict[Cell, dict[str, Pairs]] = {}
    for case in measured:
        full = {mode: full_scores(case, mode) for mode in REFERENCE}
        for row in case["rows"]:
            mode = row["mode"]
            for task, score in task_scores(case["task"], row).items():
                for kind in (case["kind"], "all"):
                    tasks = found.setdefault((row["method"], mode, row["share"], kind), {})
                    pair = (score, full[mode][task])
                    tasks.setdefault(task, {})[case["case"]] = pair
                    if _stratum(case) in counts[mode]:
                        tasks.setdefault(_IN_AVERAGE + task, {})[case["case"]] = pair
    return found


def _seed(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def _groups(tasks: dict[str, Pairs], task: str) -> dict[str, Pairs]:
    """Cases of a task; "average" has a group for each task of right and wrong."""
    if task == "average":
        return {name: tasks[name] for t in ACCURACY_TASKS if (name := _IN_AVERAGE + t) in tasks}
    return {task: tasks[task]} if task in tasks else {}


def _means(groups: Iterable[Pairs], side: int) -> float:
    return float(np.mean([np.mean([pair[side] for pair in group.values()]) for group in groups]))


def summary(found: dict[Cell, dict[str, Pairs]]) -> list[dict[str, Any]]:
    """Rows of summary.csv."""
    rows = []
    for cell in sorted(found):
        for task in (*TASKS, "average"):
            groups = _groups(found[cell], task).values()
            if not groups:
                continue
            lost = [np.array([a - b for a, b in group.values()]) for group in groups]
            low, high = metrics.interval(lost, _seed(cell[3], task))
            n = sum(len(group) for group in groups)
            mean, full = _means(groups, 0), _means(groups, 1)
            rows.append(dict(zip(SUMMARY, (*cell, task, n, mean, full, low, high), strict=True)))
            if task == "average" and full > 0:
                relative = (n, mean / full, 1.0, low / full, high / full)
                rows.append(dict(zip(SUMMARY, (*cell, "relative", *relative), strict=True)))
    return rows


def comparisons(found: dict[Cell, dict[str, Pairs]]) -> list[dict[str, Any]]:
    """Rows of comparisons.csv."""
    rows = []
    for other, mode, share, kind in sorted(found):
        method = REFERENCE[mode]
        ours = found.get((method, mode, share, kind))
        if kind != "all" or other == method or ours is None:
            continue
        for task in (*TASKS, "average"):
            gains = _gains(_groups(ours, task), _groups(found[other, mode, share, kind], task))
            if not gains:
                continue
            low, high = metrics.interval(gains, _seed(kind, task))
            mean = float(np.mean([gain.mean() for gain in gains]))
            numbers = (sum(map(len, gains)), mean, low, high)
            names = (mode, share, task, method, other)
            rows.append(dict(zip(COMPARISONS, (*names, *numbers), strict=True)))
    return rows


def _gains(ours: dict[str, Pairs], theirs: dict[str, Pairs]) -> list[metrics.Array]:
    """Differences of score by group, of the cases that both have."""
    found = []
    for task in sorted(ours.keys() & theirs.keys()):
        a, b = ours[task], theirs[task]
        found.append(np.array([a[case][0] - b[case][0] for case in a if case in b]))
    return [gain for gain in found if len(gain)]


def failures(measured: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of failures.csv."""
    found: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for case in measured:
        for entry in case.get("failures", ()):
            found.setdefault((entry["method"], entry["mode"]), []).append((case["case"], entry))
    rows = []
    for (method, mode), entries in sorted(found.items()):
        shares = sorted({entry["share"] for _, entry in entries if entry["share"] is not None})
        names = len({name for name, _ in entries})
        asked = " ".join(map(str, shares)) or "all"
        values = (method, mode, names, asked, entries[0][1]["error"])
        rows.append(dict(zip(FAILURES, values, strict=True)))
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


def tables(measured: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of every CSV, by its name."""
    found = cells(measured)
    return {
        "summary": summary(found),
        "comparisons": comparisons(found),
        "receipts": receipts(measured),
        "failures": failures(measured),
    }


def write_all(folder: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """Every CSV."""
    columns = {
        "summary": SUMMARY,
        "comparisons": COMPARISONS,
        "receipts": RECEIPTS,
        "failures": FAILURES,
    }
    for name, rows in found.items():
        write(folder / f"{name}.csv", columns[name], rows)


def write(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """A CSV; numbers with six digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            values = [row[column] for column in columns]
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])

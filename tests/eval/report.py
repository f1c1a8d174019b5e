#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of evaluate.py's results.

    report.py FOLDER [--recount]     writes report.md and PNGs into FOLDER

Reads the CSVs and run.json. --recount writes the CSVs anew from FOLDER/cases first: after a run
elsewhere, or a change of what is counted.


Plots need matplotlib; without it there are tables only.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from accuracy.cases import KINDS
from accuracy.metrics import rank_correlation
from accuracy.summary import COUNTED, REFERENCE, RUN, TASKS, load, tables, write_all

Row = dict[str, str]


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _number(text: str) -> str:
    return f"{float(text):.3f}"


def _share(text: str) -> str:
    share = float(text)
    return f"{share:g} tokens" if share > 1 else f"{100 * share:g} %"


def _scores(rows: list[Row], mode: str, share: str) -> list[str]:
    """Methods by their average, tasks side by side; the first line is the full cache."""
    cells = {
        (row["method"], row["task"]): row
        for row in rows
        if (row["mode"], row["share"], row["kind"]) == (mode, share, "all")
    }
    tasks = [t for t in ("average", "relative", *TASKS) if any(task == t for _, task in cells)]

    def key(method: str) -> float:
        return -float(cells.get((method, "average"), cells[method, tasks[-1]])["score"])

    table = []
    for method in sorted({method for method, _ in cells}, key=key):
        found = [cells.get((method, task)) for task in tasks]
        table.append([method, *(_number(row["score"]) if row else "" for row in found)])
    any_row = {task: row for (_, task), row in cells.items()}
    full = ["*full cache*", *(_number(any_row[task]["full_score"]) for task in tasks)]
    counts = ["*cases*", *(any_row[task]["n"] for task in tasks)]
    title = f"### {mode}, {_share(share)} {'kept' if mode == 'evict' else 'read'}"
    return [title, "", *_markdown(["method", *tasks], [full, *table, counts])]


def _comparisons(rows: list[Row]) -> list[str]:
    table = []
    for row in rows:
        if row["task"] != "average":
            continue
        low, high = float(row["lo"]), float(row["hi"])
        verdict = "better" if low > 0 else "worse" if high < 0 else "open"
        names = [row[column] for column in ("mode", "share", "method", "other")]
        table.append([*names, _interval(row), verdict])
    if not table:
        return []
    header = ["mode", "share", "method", "less", "average, 95 %, paired", ""]
    return ["### Against the others", "", *_markdown(header, table)]


def _by_kind(rows: list[Row], mode: str, share: str) -> list[str]:
    """Average of every method in every kind of text."""
    cells = {
        (row["method"], row["kind"]): row
        for row in rows
        if (row["mode"], row["share"], row["task"]) == (mode, share, "average")
    }
    kinds = [kind for kind in (*KINDS, "all") if any(own == kind for _, own in cells)]
    if not kinds:
        return []

    def line(name: str, column: str, found: list[Row | None]) -> list[str]:
        return [name, *(_number(row[column]) if row else "" for row in found)]

    methods = sorted(
        {method for method, _ in cells},
        key=lambda method: -float(cells.get((method, "all"), {"score": "0"})["score"]),
    )
    table = [line(m, "score", [cells.get((m, kind)) for kind in kinds]) for m in methods]
    any_row = {kind: row for (_, kind), row in cells.items()}
    full = line("*full cache*", "full_score", [any_row[kind] for kind in kinds])
    title = f"### Averages by kind: {mode}, {_share(share)}"
    return [title, "", *_markdown(["method", *kinds], [full, *table])]


def _ablations(
    rows: list[Row], comparisons: list[Row], groups: dict[tuple[str, str], str]
) -> list[str]:
    """What each part of the method is worth: the reference's average less the ablation's."""
    lines: list[str] = []
    for mode, reference in REFERENCE.items():
        mine = [row for row in comparisons if row["mode"] == mode and row["task"] == "average"]
        mine = [row for row in mine if groups.get((mode, row["other"])) == "ablation"]
        if not mine:
            continue
        shares = sorted({row["share"] for row in mine}, key=float)
        cells = {(row["other"], row["share"]): row for row in mine}
        own = {
            row["share"]: row
            for row in rows
            if (row["mode"], row["method"]) == (mode, reference)
            and (row["kind"], row["task"]) == ("all", "average")
        }
        table = [[f"*{reference}*", *(_number(own[share]["score"]) for share in shares)]]
        for other in dict.fromkeys(row["other"] for row in mine):
            found = [cells.get((other, share)) for share in shares]
            table.append([other, *(_interval(row) if row else "" for row in found)])
        header = [f"{reference} less", *(map(_share, shares))]
        lines += [f"### Ablations: {mode}", "", *_markdown(header, table)]
    return lines


def _interval(row: Row) -> str:
    low, high = float(row["lo"]), float(row["hi"])
    return f"{float(row['difference']):+.3f} [{low:+.3f}, {high:+.3f}]"


def _failures(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    columns = list(rows[0])
    return ["### Failed", "", *_markdown(columns, [[row[c] for c in columns] for row in rows])]


def _receipts(rows: list[Row]) -> list[str]:
    kl = [float(row["kl"]) for row in rows]
    mass = rank_correlation([-float(row["mass"]) for row in rows], kl)
    error = rank_correlation([float(row["error"]) for row in rows], kl)
    header = ["receipt", f"rank correlation with KL, {len(rows)} cells"]
    table = [["1 - retained mass", f"{mass:.3f}"], ["output error", f"{error:.3f}"]]
    return ["### Does the receipt predict loss?", "", *_markdown(header, table)]


def main() -> int:
    """Command line."""
    folder = Path(sys.argv[1])
    if "--recount" in sys.argv[2:]:
        write_all(folder, tables(load(folder)))
    rows, receipts = _read(folder / "summary.csv"), _read(folder / "receipts.csv")
    comparisons = _read(folder / "comparisons.csv")
    described = json.loads((folder / RUN).read_text())["methods"]
    groups = {(method["mode"], method["name"]): method["group"] for method in described}
    lines = ["## Accuracy through the service", ""]
    lines += [
        "Averages are over the tasks of right and wrong, without cases of a kind, task and length "
        f"of which the full cache does less than {COUNTED}.",
        "",
    ]
    kinds = []
    for mode in sorted({row["mode"] for row in rows}):
        shares = sorted({row["share"] for row in rows if row["mode"] == mode}, key=float)
        for share in shares:
            lines += _scores(rows, mode, share)
            kinds += _by_kind(rows, mode, share)
    lines += _comparisons(comparisons) + _ablations(rows, comparisons, groups) + kinds
    if receipts:
        lines += _receipts(receipts)
    lines += _failures(_read(folder / "failures.csv"))
    (folder / "report.md").write_text("\n".join(lines))
    try:
        from accuracy import plots
    except ImportError:
        return 0
    plots.plot_scores(rows, groups, folder / "scores.png")
    plots.plot_kinds(rows, groups, folder / "kinds.png")
    if receipts:
        plots.plot_receipts(receipts, folder / "receipts.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

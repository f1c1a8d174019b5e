#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of evaluate.py's results: report.py FOLDER writes report.md and PNGs there.

Plots need matplotlib; without it there are tables only.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from accuracy.metrics import rank_correlation  # noqa: E402
from accuracy.summary import TASKS  # noqa: E402

Row = dict[str, str]


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _number(text: str) -> str:
    return f"{float(text):.3f}"


def _scores(rows: list[Row], mode: str, share: str) -> list[str]:
    """Methods by their average, tasks side by side; the first line is the full cache."""
    cells = {
        (row["method"], row["task"]): row
        for row in rows
        if (row["mode"], row["share"], row["kind"]) == (mode, share, "all")
    }
    tasks = [t for t in ("average", *TASKS) if any(task == t for _, task in cells)]

    def key(method: str) -> float:
        return -float(cells.get((method, "average"), cells[method, tasks[-1]])["score"])

    table = []
    for method in sorted({method for method, _ in cells}, key=key):
        found = [cells.get((method, task)) for task in tasks]
        table.append([method, *(_number(row["score"]) if row else "" for row in found)])
    any_row = {task: row for (_, task), row in cells.items()}
    full = ["*full cache*", *(_number(any_row[task]["full_score"]) for task in tasks)]
    counts = ["*cases*", *(any_row[task]["n"] for task in tasks)]
    title = f"### {mode}, {100 * float(share):g} % {'kept' if mode == 'evict' else 'read'}"
    return [title, "", *_markdown(["method", *tasks], [full, *table, counts])]


def _comparisons(rows: list[Row]) -> list[str]:
    table = []
    for row in rows:
        if row["task"] != "average":
            continue
        low, high = float(row["lo"]), float(row["hi"])
        verdict = "better" if low > 0 else "worse" if high < 0 else "open"
        interval = f"{float(row['difference']):+.3f} [{low:+.3f}, {high:+.3f}]"
        table.append([row["mode"], row["share"], row["method"], row["other"], interval, verdict])
    if not table:
        return []
    header = ["mode", "share", "method", "less", "average, 95 %, paired", ""]
    return ["### Against the others", "", *_markdown(header, table)]


def _receipts(rows: list[Row]) -> list[str]:
    kl = [float(row["kl"]) for row in rows]
    mass = rank_correlation([-float(row["mass"]) for row in rows], kl)
    error = rank_correlation([float(row["error"]) for row in rows], kl)
    header = ["receipt", f"rank correlation with KL, {len(rows)} cells"]
    table = [["1 - retained mass", f"{mass:.3f}"], ["output error", f"{error:.3f}"]]
    return ["### Does the receipt predict loss?", "", *_markdown(header, table)]


def _plot_scores(rows: list[Row], path: Path) -> None:
    from matplotlib import pyplot

    modes = sorted({row["mode"] for row in rows})
    figure, axes = pyplot.subplots(1, len(modes), figsize=(7 * len(modes), 5), squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        chosen = [r for r in rows if (r["mode"], r["kind"], r["task"]) == (mode, "all", "average")]
        for method in sorted({row["method"] for row in chosen}):
            own = [row for row in chosen if row["method"] == method]
            mine = sorted((float(row["share"]), float(row["score"])) for row in own)
            width = 3 if method in ("dynsplit", "dynsplit_index") else 1
            axis.plot(*zip(*mine, strict=True), marker="o", linewidth=width, label=method)
        if chosen:
            axis.axhline(float(chosen[0]["full_score"]), color="black", linestyle=":", label="full")
        axis.set(xscale="log", title=mode, xlabel="share of the tokens", ylabel="average score")
        axis.legend(fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_receipts(rows: list[Row], path: Path) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for share in sorted({row["share"] for row in rows}, key=float):
        mine = [(1 - float(r["mass"]), float(r["kl"])) for r in rows if r["share"] == share]
        axis.scatter(*zip(*mine, strict=True), s=10, label=f"{100 * float(share):g} % kept")
    axis.set(xlabel="attention mass lost, as the receipt says", ylabel="KL, nats", yscale="symlog")
    axis.set_yscale("symlog", linthresh=1e-2)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    """Command line."""
    folder = Path(sys.argv[1])
    rows, receipts = _read(folder / "summary.csv"), _read(folder / "receipts.csv")
    lines = ["## Accuracy through the service", ""]
    for mode in sorted({row["mode"] for row in rows}):
        shares = sorted({row["share"] for row in rows if row["mode"] == mode}, key=float)
        for share in shares:
            lines += _scores(rows, mode, share)
    lines += _comparisons(_read(folder / "comparisons.csv"))
    if receipts:
        lines += _receipts(receipts)
    (folder / "report.md").write_text("\n".join(lines))
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        return 0
    _plot_scores(rows, folder / "scores.png")
    if receipts:
        _plot_receipts(receipts, folder / "receipts.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

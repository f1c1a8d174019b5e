# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of curves.py on numbers whose answers are known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import curves

Row = dict[str, str]


def _row(method: str, share: float, figures: tuple[float, float, float], n: int = 1) -> Row:
    mass, error, kl = (str(figure) for figure in figures)
    return {
        "method": method,
        "share": str(share),
        "kind": "prose",
        "n": str(n),
        "mass": mass,
        "error": error,
        "kl": kl,
    }


def test_isotonic_pools_what_falls_by_weight() -> None:
    assert list(curves.isotonic([1, 2, 3], [1, 1, 1])) == [1, 2, 3]
    assert list(curves.isotonic([3, 1], [1, 3])) == [1.5, 1.5]
    assert list(curves.isotonic([1, 5, 3, 4, 2], [1, 1, 1, 1, 1])) == [1, 3.5, 3.5, 3.5, 3.5]
    assert list(curves.isotonic([], [])) == []


def test_isotonic_is_the_closest_rising_sequence() -> None:
    """Against every rising sequence on a grid."""
    values, weights = np.array([2.0, 0.0, 3.0, 1.0]), np.array([1.0, 2.0, 1.0, 2.0])
    found = curves.isotonic(values, weights)
    grid = np.linspace(0, 3, 31)
    best = min(
        float((weights * (np.array([a, b, c, d]) - values) ** 2).sum())
        for i, a in enumerate(grid)
        for j, b in enumerate(grid[i:], i)
        for k, c in enumerate(grid[j:], j)
        for d in grid[k:]
    )
    assert (np.diff(found) >= 0).all()
    assert (weights * (found - values) ** 2).sum() <= best + 1e-9


def test_preset_curve_averages_kinds_by_cases_and_ends_in_the_full_cache() -> None:
    rows = [
        _row("p", 0.5, (0.9, 0.1, 0.2), n=1),
        _row("p", 0.5, (0.6, 0.4, 0.8), n=3),
        _row("p", 0.1, (0.5, 0.6, 2.0)),
    ]
    low, high, full = curves.preset_curve(rows)
    assert low == pytest.approx((0.1, 0.5, 0.6, 2.0))
    assert high == pytest.approx((0.5, 0.675, 0.325, 0.65))
    assert full == (1.0, 1.0, 0.0, 0.0)


def test_preset_curve_is_monotone_where_measurements_are_not() -> None:
    rows = [
        _row("p", 0.1, (0.6, 0.4, 1.0)),
        _row("p", 0.2, (0.5, 0.5, 1.2)),
        _row("p", 0.5, (0.9, 0.2, 0.3)),
    ]
    points = np.array(curves.preset_curve(rows))
    assert (np.diff(points[:, 1]) >= 0).all()
    assert (np.diff(points[:, 2:], axis=0) <= 0).all()
    assert points[0, 1:] == pytest.approx([0.55, 0.45, 1.1])


def test_loss_curve_rises_and_holds_the_mean() -> None:
    random = np.random.default_rng(4)
    value = random.uniform(0.01, 1, 400)
    divergence = 2 * value * random.uniform(0.5, 1.5, 400)  # mean 2 x
    points = np.array(curves.loss_curve(value, divergence, np.ones(400)))
    assert len(points) > 10
    assert (np.diff(points, axis=0) > 0).all() and (points > 0).all()
    assert np.interp(0.5, *points.T) == pytest.approx(1.0, rel=0.15)


def test_loss_curve_without_relation_is_one_level() -> None:
    points = curves.loss_curve([0.1, 0.2, 0.3, 0.4], [4, 3, 2, 1], [1, 1, 1, 1])
    assert points == [pytest.approx((0.25, 2.5))]


def test_expected_divergence_is_read_off_the_own_curve() -> None:
    presets = [
        {"preset": preset, "kept_ratio": ratio, "mass": "0", "error": error, "divergence": kl}
        for preset, ratio, error, kl in (
            ("dynsplit", "0.1", "0.5", "1"),
            ("dynsplit", "1", "0", "0"),
            ("snapkv", "0.1", "0.5", "3"),
            ("snapkv", "1", "0", "0"),
        )
    ]
    rows = [_row(method, 0.2, (0, 0.25, 0)) for method in ("dynsplit", "snapkv", "fixed8")]
    assert curves.expected(rows, presets) == [0.5, 1.5, 0.5]


def test_files_have_the_presets_alone_and_all_cells(tmp_path: Path) -> None:
    rows = [
        _row(method, share, (share, 1 - share, 2 - 2 * share))
        for method in ("dynsplit", "fixed8")
        for share in (0.1, 0.5)
    ]
    curves.write_curves(rows, tmp_path, "of a test")
    presets = curves.read(tmp_path / "presets.csv")
    assert [(r["preset"], r["kept_ratio"]) for r in presets] == [
        ("dynsplit", "0.1"),
        ("dynsplit", "0.5"),
        ("dynsplit", "1"),
    ]
    text = (tmp_path / "receipts.csv").read_text()
    assert "# of a test\n" in text and f"# model: {curves.MODEL}\n" in text
    assert text.splitlines()[-4:] == [
        "error,0.5,1",
        "error,0.9,1.8",
        "lost_mass,0.5,1",
        "lost_mass,0.9,1.8",
    ]
    with pytest.raises(ValueError, match="no cell of a preset"):
        curves.write_curves([_row("fixed8", 0.1, (0.5, 0.5, 1))], tmp_path, "")

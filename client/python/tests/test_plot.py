# SPDX-License-Identifier: Apache-2.0
"""Pictures: drawn from results, with what the results say in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dynsplit

pytest.importorskip("matplotlib")

from dynsplit import plot


@pytest.fixture
def result(service: dynsplit.Client) -> dynsplit.Compressed:
    """Of random tensors."""
    random = np.random.default_rng(1)
    kv = random.standard_normal((2, 2, 200, 2, 16), np.float32)
    queries = random.standard_normal((2, 8, 4, 16), np.float32)
    policy = dynsplit.policy("snapkv", kept_ratio=0.5)
    ids = random.integers(0, 64, 200)
    return service.compress(ids, kv[0], kv[1], queries=queries, policy=policy)


def test_every_picture_is_written(result: dynsplit.Compressed, tmp_path: Path) -> None:
    texts = [f"w{i} " if i % 9 else "\n$%\t" for i in range(200)]
    written = plot.save_all(result, tmp_path / "plots", texts)
    names = [path.stem for path in written]
    assert names == ["boundaries", "block_lengths", "budget", "receipt"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_pictures_show_the_numbers(result: dynsplit.Compressed) -> None:
    share = plot.kept_share(result)
    assert share.sum() == pytest.approx(100) and share.max() <= 1 + 1e-9
    bars = plot.budget(result).axes[0].patches
    assert [bar.get_height() for bar in bars] == [200, 200, 100, 100]
    lines = plot.receipt(result).axes[0].lines
    assert result.receipt is not None
    assert np.mean(lines[0].get_ydata()) == pytest.approx(
        result.receipt.retained_attention_mass_mean
    )
    drawn = plot.boundaries(result, ["x"] * 200, begin=10, end=60).axes[0]
    assert len(drawn.texts) == 50
    with pytest.raises(ValueError, match="199 texts"):
        plot.boundaries(result, ["x"] * 199)

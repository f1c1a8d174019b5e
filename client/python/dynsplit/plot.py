# SPDX-License-Identifier: Apache-2.0
"""Pictures of a result: where the text was cut, how long blocks are, what was kept, what it cost.

Needs matplotlib (`pip install dynsplit[plot]`). Each function returns a figure, which the caller
shows or saves; `save_all` writes all of them. Results may come from a call or from `dynsplit.load`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynsplit.results import Compressed

_KEPT, _GONE, _EDGE, _LINE = "#2f7d4f", "#b9b4ab", "#c2452d", "#2b5c8a"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'dynsplit[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def kept_share(result: Compressed) -> npt.NDArray[np.float64]:
    """Share of layers and KV heads that kept each token, float64 [T], each in [0, 1]."""
    share = np.zeros(result.num_tokens)
    for layer in result.layers:
        for group in layer.tokens:
            share[group] += 1 / (len(layer.tokens) * len(result.layers))
    return share


def boundaries(
    result: Compressed,
    token_texts: Sequence[str] | None = None,
    *,
    begin: int = 0,
    end: int | None = None,
    columns: int = 120,
) -> Any:
    """Where the context was cut, and how much of each token was kept.

    Args:
        result: of compress, plan, apply or a file.
        token_texts: T texts, one a token: drawn line by line, tokens shaded by `kept_share`, a bar
            before the first token of each block. None: a strip of the same without text.
        begin: first token shown.
        end: behind the last token shown; None = 600 tokens with texts, all without.
        columns: characters of a line.

    Raises:
        ValueError: not one text a token.
        ImportError: there is no matplotlib.
    """
    if token_texts is not None and len(token_texts) != result.num_tokens:
        raise ValueError(f"{len(token_texts)} texts for {result.num_tokens} tokens")
    if end is None:
        end = result.num_tokens if token_texts is None else min(result.num_tokens, begin + 600)
    share, starts = kept_share(result), set(result.block_starts.tolist())
    if token_texts is None:
        return _strip(share, result.block_starts, begin, end)
    places, line, column = [], 0, 0
    for token in range(begin, end):
        text = token_texts[token].replace("\n", "⏎").replace("\t", " ")
        if column and column + len(text) > columns:
            line, column = line + 1, 0
        places.append((token, line, column, text))
        column += len(text)
    size = 12 * 72 / columns / 0.62  # points; a monospace letter is 0.6 of its size wide
    figure, axes = _figure(12, 1.8 * size / 72 * (line + 1) + 0.6)
    axes.set(xlim=(0, columns), ylim=(line + 1, 0), title=f"tokens {begin:,} to {end:,}")
    axes.axis("off")
    from matplotlib.patches import Rectangle

    for token, row, left, text in places:
        shade = Rectangle((left, row), len(text), 1, color=_KEPT, alpha=0.55 * share[token], lw=0)
        axes.add_patch(shade)
        if token in starts:
            axes.plot([left, left], [row + 0.1, row + 0.9], color=_EDGE, lw=1.5)
        axes.text(left, row + 0.75, text, family="monospace", fontsize=size, parse_math=False)
    return figure


def _strip(
    share: npt.NDArray[np.float64], starts: npt.NDArray[np.int32], begin: int, end: int
) -> Any:
    figure, axes = _figure(12, 2.2)
    axes.fill_between(range(begin, end), share[begin:end], step="mid", color=_KEPT)
    inside = starts[(starts >= begin) & (starts < end)]
    axes.vlines(inside, 1.0, 1.08, color=_EDGE, lw=0.6)
    axes.set(xlim=(begin, end), ylim=(0, 1.1), xlabel="token")
    axes.set_ylabel("share of heads that kept it")
    return figure


def block_lengths(result: Compressed) -> Any:
    """Histogram of the semantic blocks' lengths, tokens."""
    figure, axes = _figure(6, 3.5)
    lengths = np.diff(result.block_starts)
    axes.hist(lengths, bins=np.arange(0.5, lengths.max() + 1.5), color=_LINE)
    axes.axvline(lengths.mean(), color=_EDGE, lw=1, label=f"mean {lengths.mean():.1f}")
    axes.set(xlabel="tokens of a block", ylabel="blocks", title=f"{len(lengths):,} blocks")
    axes.legend()
    return figure


def budget(result: Compressed) -> Any:
    """Tokens kept per KV head in each layer, of all tokens."""
    figure, axes = _figure(6, 3.5)
    numbers = [layer.layer for layer in result.layers]
    axes.bar(numbers, [result.num_tokens] * len(numbers), color=_GONE, label="dropped")
    axes.bar(numbers, [layer.num_kept for layer in result.layers], color=_KEPT, label="kept")
    axes.set(xlabel="layer", ylabel="tokens per KV head")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


def receipt(result: Compressed) -> Any:
    """Retained attention mass and error of the attention's output, layer by layer.

    Raises:
        ValueError: the result has no receipt (no queries, or receipt=False).
    """
    entries = [layer.receipt for layer in result.layers if layer.receipt is not None]
    if not entries:
        raise ValueError("the result has no receipt: send queries")
    figure, axes = _figure(6, 3.5)
    numbers = [entry.layer for entry in entries]
    for name, color, label in (
        ("retained_attention_mass_mean", _KEPT, "attention mass kept, mean"),
        ("retained_attention_mass_min", _GONE, "attention mass kept, worst head"),
        ("output_relative_error_mean", _EDGE, "error of the output, mean"),
    ):
        shares = [getattr(entry, name) for entry in entries]
        axes.plot(numbers, shares, "o-", ms=3, color=color, label=label)
    axes.set(xlabel="layer", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    return figure


def save_all(
    result: Compressed, folder: str | Path, token_texts: Sequence[str] | None = None
) -> list[Path]:
    """Writes every picture that the result has as PNG; returns the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "boundaries": boundaries(result, token_texts),
        "block_lengths": block_lengths(result),
        "budget": budget(result),
    }
    if any(layer.receipt is not None for layer in result.layers):
        figures["receipt"] = receipt(result)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    return [folder / f"{name}.png" for name in figures]

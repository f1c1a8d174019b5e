# SPDX-License-Identifier: Apache-2.0
"""Numbers of logits, and statistics of numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

RESAMPLES = 2000
Array = npt.NDArray[np.float64]


def score_logits(logits: Tensor, full: Tensor, answer: Sequence[int]) -> list[dict[str, float]]:
    """What each reader's logits [M, A, vocab] are worth beside those of the full cache [A, vocab].

    Returns:
        For each reader: "exact", every token of the answer is the likeliest one (which is when
        greedy decoding says the answer); "tokens", the share of such tokens; "nll", mean negative
        log-likelihood of the answer's tokens, nats; "kl", mean divergence of the full cache's
        distribution from the reader's, nats.
    """
    wanted = torch.tensor(answer, device=logits.device)
    found = logits.log_softmax(dim=-1)
    reference = full.log_softmax(dim=-1)
    right = logits.argmax(dim=-1) == wanted
    nll = -found.gather(-1, wanted.expand(len(logits), -1)[..., None])[..., 0].mean(dim=-1)
    kl = (reference.exp() * (reference - found)).sum(dim=-1).mean(dim=-1)
    columns = (right.all(dim=-1), right.double().mean(dim=-1), nll, kl)
    table = torch.stack([column.double() for column in columns], dim=-1).tolist()
    return [dict(zip(("exact", "tokens", "nll", "kl"), row, strict=True)) for row in table]


@functools.lru_cache(maxsize=256)
def _draws(num_values: int, seed: int, resamples: int) -> Array:
    """How often each value is drawn, [resamples, num_values]."""
    random = np.random.default_rng([seed, num_values])
    even = np.full(num_values, 1.0 / num_values)
    return random.multinomial(num_values, even, size=resamples).astype(np.float64)


def interval(groups: Sequence[Array], seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over groups of their means; cases are resampled in each.

    Paired where the values are differences of one case's two scores.
    """
    means = np.zeros(resamples)
    for number, values in enumerate(groups):
        drawn = _draws(len(values), seed + number, resamples)
        means += drawn @ values / (len(values) * len(groups))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def ranks(values: Sequence[float]) -> Array:
    """Ranks from 1; ties share their mean."""
    array = np.asarray(values, np.float64)
    below = (array[None] < array[:, None]).sum(axis=1)
    same = (array[None] == array[:, None]).sum(axis=1)
    return np.asarray(below + (same + 1) / 2, np.float64)


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's; NaN for fewer than three pairs or where one side is constant."""
    if len(left) < 3:
        return float("nan")
    a, b = ranks(left), ranks(right)
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])

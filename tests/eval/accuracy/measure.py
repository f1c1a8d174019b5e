# SPDX-License-Identifier: Apache-2.0
"""All methods and shares on one case."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_llama import TorchLlama

from . import metrics
from .cases import Case
from .engine import Prefill, continue_with, prefill, readers_at_once
from .methods import Method
from .presses import Judge
from .service import Kept, Service, Session, select


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every case is measured with."""

    model: TorchLlama
    tokenizer: Any
    service: Service
    methods: Sequence[Method]
    shares: Sequence[float]


def _keep(bench: Bench, judge: Judge, past: Prefill, method: Method, share: float) -> Kept:
    if method.group != "kvpress":
        return bench.service.evict(past, method, share)
    mask = judge.kept(method.name.removeprefix("kvpress_"), share)
    return Kept(mask, float(mask.float().mean()))


def _evicted(bench: Bench, past: Prefill, case: Case, full: Tensor) -> list[dict[str, Any]]:
    inputs = [case.prompt[-1], *case.answer[:-1]]
    judge = Judge(bench.model, past, bench.tokenizer)
    jobs = [(m, share) for m in bench.methods if m.mode == "evict" for share in bench.shares]
    model = bench.model
    device = torch.device(model.device).type
    at_once = readers_at_once(model.shape, device, past.num_tokens, len(inputs))
    rows = []
    for begin in range(0, len(jobs), at_once):
        some = jobs[begin : begin + at_once]
        kept = [_keep(bench, judge, past, *job) for job in some]
        masks = torch.stack([entry.mask for entry in kept])  # [M, L, Hkv, T]
        reader = _reader_of(masks)
        logits = continue_with(model, past, inputs, len(some), reader)
        scores = metrics.score_logits(logits, full, case.answer)
        for (method, share), entry, score in zip(some, kept, scores, strict=True):
            receipt = {"mass": entry.mass, "error": entry.error, "kept": entry.share}
            rows.append({"method": method.name, "mode": "evict", "share": share} | receipt | score)
    return rows


def _reader_of(masks: Tensor) -> Callable[[int, Tensor], Tensor]:
    return lambda layer, _queries: masks[:, layer, :, None]


def _indexed(bench: Bench, past: Prefill, case: Case, full: Tensor) -> list[dict[str, Any]]:
    """Every token of the answer chooses what it reads, in every layer, by its own query."""
    inputs = [case.prompt[-1], *case.answer[:-1]]
    methods = [method for method in bench.methods if method.mode == "index"]
    rows = []
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(bench.service.open(past, method)) for method in methods]
        for share in bench.shares:
            budget = max(1, int(past.num_tokens * share))
            reader = _SessionReader(bench, sessions, budget)
            logits = continue_with(bench.model, past, inputs, len(sessions), reader)
            scores = metrics.score_logits(logits, full, case.answer)
            for method, score in zip(methods, scores, strict=True):
                row = {"method": method.name, "mode": "index", "share": share}
                rows.append(row | {"mass": None, "error": None, "kept": 1.0} | score)
    return rows


class _SessionReader:
    """Masks as the sessions choose them; one session a reader."""

    def __init__(self, bench: Bench, sessions: Sequence[Session], budget: int) -> None:
        self._bench, self._sessions, self._budget = bench, sessions, budget

    def __call__(self, layer: int, queries: Tensor) -> Tensor:
        host = queries.cpu().contiguous()
        calls = [
            [
                session.step(layer, query, self._budget)
                for session, query in zip(self._sessions, host[:, position], strict=True)
            ]
            for position in range(host.shape[1])
        ]
        tokens = self._sessions[0].num_tokens
        client, shape = self._bench.service.client, self._bench.model.shape
        masks = select(client, calls, shape, tokens)  # [A, M, Hkv, T]
        return masks.permute(1, 2, 0, 3).to(queries.device)


def measure(bench: Bench, case: Case) -> dict[str, Any]:
    """The case's scores with the full cache, and one row a method and share."""
    past = prefill(bench.model, case.prompt[:-1])
    bench.service.load(past)
    inputs = [case.prompt[-1], *case.answer[:-1]]
    full = continue_with(bench.model, past, inputs, 1, None)
    rows = _evicted(bench, past, case, full[0])
    if any(method.mode == "index" for method in bench.methods):
        rows += _indexed(bench, past, case, full[0])
    return {
        "case": case.name,
        "kind": case.kind,
        "task": case.task,
        "tokens": past.num_tokens,
        "depth": case.depth,
        "full": metrics.score_logits(full, full[0], case.answer)[0],
        "rows": rows,
    }

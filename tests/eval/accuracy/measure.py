# SPDX-License-Identifier: Apache-2.0
"""All methods and shares on one case. A method that fails is noted, and the others go on."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from dynsplit.errors import DynSplitError, UnavailableError
from torch import Tensor

from torch_llama import TorchLlama

from . import metrics
from .cases import Case
from .engine import Prefill, continue_with, prefill, readers_at_once
from .index import Exchange, SessionReader
from .methods import Method, budget_of
from .presses import Judge
from .service import Kept, Service

_SELECTS_AT_ONCE = 8
# What a method may fail with; a service that is away is no method's fault.
_FAILURES = (DynSplitError, RuntimeError, ValueError, AssertionError, ImportError)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How cases are measured.

    Attributes:
        shares: of the tokens, kept or read.
        index_positions: of an answer whose right tokens are counted ("text", "line"), so many are
            measured in mode "index"; answers that are right or wrong are measured whole.
        check_one_in: of the compressions, every n-th is checked row by row.
        memory_bytes: for the attention of readers side by side.
        session_bytes: of K and V that this process may keep in sessions at a time.
    """

    shares: tuple[float, ...]
    index_positions: int = 8
    check_one_in: int = 4
    memory_bytes: int = 1 << 30
    session_bytes: int = 4 << 30


class Bench:
    """What every case is measured with; `close` ends its threads."""

    def __init__(
        self,
        model: TorchLlama,
        tokenizer: Any,
        service: Service,
        methods: Sequence[Method],
        settings: Settings,
    ) -> None:
        """Of a model and a service that hold the same prompts."""
        self.model, self.tokenizer, self.service = model, tokenizer, service
        self.methods, self.settings = methods, settings
        self.compressions = ThreadPoolExecutor(service.calls_at_once)
        self.selects = ThreadPoolExecutor(_SELECTS_AT_ONCE)
        self.exchange = Exchange(service)

    def close(self) -> None:
        """Ends the threads."""
        self.compressions.shutdown()
        self.selects.shutdown()

    def of(self, mode: str) -> list[Method]:
        """Methods of a mode."""
        return [method for method in self.methods if method.mode == mode]


class _Notes:
    """Failures and times of one case."""

    def __init__(self) -> None:
        self.failures: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}

    def failed(self, method: Method, share: float | None, error: BaseException) -> None:
        """Notes it; raises it where it is not the method's fault."""
        if isinstance(error, UnavailableError) or not isinstance(error, _FAILURES):
            raise error
        text = f"{type(error).__name__}: {error}"[:300]
        self.failures.append(
            {"method": method.name, "mode": method.mode, "share": share, "error": text}
        )

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the wall time of a part."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def _row(method: Method, share: float, kept: Kept, score: dict[str, float]) -> dict[str, Any]:
    numbers = {"mass": kept.mass, "error": kept.error, "kept": kept.share, **score}
    row: dict[str, Any] = {"method": method.name, "mode": method.mode, "share": share}
    return row | {name: value and float(f"{value:.7g}") for name, value in numbers.items()}


def _is_checked(bench: Bench, case: Case, method: Method, share: float) -> bool:
    """A fixed part of the compressions, another one in every case."""
    number = zlib.crc32(f"{case.name}/{method.name}/{share}".encode())
    return number % bench.settings.check_one_in == 0


@dataclasses.dataclass(frozen=True)
class _Done:
    """A method at a share whose mask is there, as number `number` of all."""

    number: int
    method: Method
    share: float
    kept: Kept


def _kept(bench: Bench, past: Prefill, case: Case, masks: Tensor, notes: _Notes) -> list[_Done]:
    """Fills masks [jobs, L, Hkv, T]; the jobs that succeeded.

    The service compresses while the presses run here.
    """
    jobs = [(method, share) for method in bench.of("evict") for share in bench.settings.shares]
    calls = {
        number: bench.compressions.submit(
            bench.service.evict, *job, masks[number], _is_checked(bench, case, *job)
        )
        for number, job in enumerate(jobs)
        if job[0].group != "kvpress"
    }
    judge = Judge(bench.model, past, bench.tokenizer)
    found = []
    with notes.timed("presses"):
        for number, (method, share) in enumerate(jobs):
            if number in calls:
                continue
            try:
                mask = judge.kept(
                    method.name.removeprefix("kvpress_"),
                    share if share <= 1 else share / past.num_tokens,
                )
            except _FAILURES as error:
                notes.failed(method, share, error)
                continue
            masks[number] = mask
            found.append(_Done(number, method, share, Kept(float(mask.float().mean()))))
    with notes.timed("compressions"):
        for number, call in calls.items():
            method, share = jobs[number]
            failure = call.exception()
            if failure is None:
                found.append(_Done(number, method, share, call.result()))
            else:
                notes.failed(method, share, failure)
    return sorted(found, key=lambda entry: entry.number)


def _evicted(
    bench: Bench, past: Prefill, case: Case, full: Tensor, notes: _Notes
) -> list[dict[str, Any]]:
    inputs = [case.prompt[-1], *case.answer[:-1]]
    shape = bench.model.shape
    num_jobs = len(bench.of("evict")) * len(bench.settings.shares)
    size = (num_jobs, shape.num_layers, shape.num_kv_heads, past.num_tokens)
    masks = torch.empty(size, dtype=torch.bool, device=bench.model.device)
    done = _kept(bench, past, case, masks, notes)
    at_once = readers_at_once(shape, bench.settings.memory_bytes, past.num_tokens, len(inputs))
    rows: list[dict[str, Any]] = []
    with notes.timed("continuations"):
        while len(rows) < len(done):
            some = done[len(rows) : len(rows) + at_once]
            chosen = masks[[entry.number for entry in some]]
            try:
                logits = continue_with(bench.model, past, inputs, len(some), _reader_of(chosen))
                scores = metrics.score_logits(logits, full, case.answer)
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                at_once //= 2
                continue
            rows += [
                _row(entry.method, entry.share, entry.kept, score)
                for entry, score in zip(some, scores, strict=True)
            ]
    return rows


def _reader_of(masks: Tensor) -> Callable[[int, Tensor], Tensor]:
    return lambda layer, _queries: masks[:, layer, :, None]


def _index_answer(bench: Bench, case: Case) -> tuple[int, ...]:
    return case.answer if case.exact else case.answer[: bench.settings.index_positions]


def _read(
    bench: Bench, past: Prefill, case: Case, full: Tensor, methods: Sequence[Method]
) -> list[dict[str, Any]]:
    """Rows of some methods of mode "index".

    With room for it, a method has several sessions, so that one call asks for several shares.
    """
    answer = _index_answer(bench, case)
    inputs = [case.prompt[-1], *answer[:-1]]
    shares = bench.settings.shares
    budgets = [budget_of(share, past.num_tokens) for share in shares]
    service, size = bench.service, (len(inputs), past.num_tokens)
    room = readers_at_once(bench.model.shape, bench.settings.memory_bytes, size[1], size[0])
    at_once = max(1, room // len(methods))  # shares
    probe = past.queries[0][-1:].cpu()[None]
    rows = []
    with contextlib.ExitStack() as stack:
        sessions = []
        copies = _sessions_at_once(bench, past) // len(methods)
        for _ in range(max(1, min(copies, len(shares)))):
            sessions.append([_opened(service, method, stack) for method in methods])
        for first in range(0, len(shares), at_once):
            some = range(first, min(first + at_once, len(shares)))
            asked = [budgets[share] for share in some]
            reader = SessionReader(
                service, bench.selects, bench.exchange, sessions, asked, size, probe
            )
            jobs = [(method, shares[share]) for share in some for method in methods]
            logits = continue_with(bench.model, past, inputs, len(jobs), reader)
            scores = metrics.score_logits(logits, full[: len(answer)], answer)
            rows += [_row(*job, Kept(1.0), score) for job, score in zip(jobs, scores, strict=True)]
    return rows


def _sessions_at_once(bench: Bench, past: Prefill) -> int:
    element_bytes = past.keys[0].element_size()
    each = bench.model.shape.kv_bytes(past.num_tokens, element_bytes)
    return max(1, bench.settings.session_bytes // each)


def _opened(service: Service, method: Method, stack: contextlib.ExitStack) -> str:
    session = service.open(method)
    stack.callback(service.client.release, session)
    return session


def _indexed(
    bench: Bench, past: Prefill, case: Case, full: Tensor, notes: _Notes
) -> list[dict[str, Any]]:
    """As many methods side by side as have room; where they fail, one by one, to know which."""
    methods, rows = bench.of("index"), []
    at_once = _sessions_at_once(bench, past)
    with notes.timed("index"):
        for begin in range(0, len(methods), at_once):
            some = methods[begin : begin + at_once]
            try:
                rows += _read(bench, past, case, full, some)
                continue
            except _FAILURES as error:
                if isinstance(error, UnavailableError):
                    raise
            for method in some:
                try:
                    rows += _read(bench, past, case, full, [method])
                except _FAILURES as error:
                    notes.failed(method, None, error)
    return rows


@torch.inference_mode()
def measure(bench: Bench, case: Case) -> dict[str, Any]:
    """The case's scores with the full cache, and one row a method and share.

    "full_index" is "full" over the part of the answer that mode "index" is measured on; "failures"
    tells what is missing from "rows"; "seconds" are wall times.
    """
    notes = _Notes()
    with notes.timed("prefill"):
        received = any(method.needs_received for method in bench.methods)
        past = prefill(bench.model, case.prompt[:-1], received)
        bench.service.load(past)
        inputs = [case.prompt[-1], *case.answer[:-1]]
        full = continue_with(bench.model, past, inputs, 1, None)
    rows = _evicted(bench, past, case, full[0], notes) if bench.of("evict") else []
    if bench.of("index"):
        rows += _indexed(bench, past, case, full[0], notes)
    answer = _index_answer(bench, case)
    part = full[:, : len(answer)]
    return {
        "case": case.name,
        "kind": case.kind,
        "task": case.task,
        "tokens": past.num_tokens,
        "depth": case.depth,
        "full": metrics.score_logits(full, full[0], case.answer)[0],
        "full_index": metrics.score_logits(part, part[0], answer)[0],
        "rows": rows,
        "failures": notes.failures,
        "seconds": notes.seconds,
    }

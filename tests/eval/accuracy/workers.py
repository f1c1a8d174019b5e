# SPDX-License-Identifier: Apache-2.0
"""Processes that measure cases side by side, each with a model and a client of its own.

Python computes, launches and waits in one process for one case; several of them keep the service
and the device busy.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.util
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from dynsplit.capture.llama import LlamaModel
from dynsplit.capture.tokenizer import GgufTokenizer
from dynsplit.client import Client
from dynsplit.v1 import compression_pb2
from gguf import GGUFReader

from buffers import DeviceBuffers, HostBuffers
from torch_llama import TorchLlama

from . import measure
from .cases import Case
from .engine import prefill
from .methods import Method
from .service import Service

# 512 positions behind the prompt for answers and expected attention, 2.3 K for kvzip's repeats.
_ROOM_BEHIND = 2560
_GRACE_SECONDS = 3.0  # behind the time limit, for what is under way
_DEVICE_SHARE = 0.9  # of the device's memory, for all processes together
_FIXED_BYTES = 2 << 30  # of a process, not torch's: context, shared buffers
_SESSION_SHARE = 0.7  # of the server's memory, for K and V of sessions
_COPIES = 2  # of memory_bytes: what the estimate leaves out


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a process needs to begin; travels between processes.

    Attributes:
        targets: addresses of dynsplitd; processes take turns.
        model_file: GGUF.
        device: "cpu" or "cuda".
        dtype: name of torch's.
        engine: libdynsplit_engine.so; None = memory is shared on the host.
        max_tokens: of a prompt.
        num_workers: processes.
        server_bytes: of the device, for dynsplitd.
        calls_at_once: compressions of one process in flight.
        settings: of the measurement.
    """

    targets: tuple[str, ...]
    model_file: Path
    device: str
    dtype: str
    engine: Path | None
    max_tokens: int
    num_workers: int
    server_bytes: int
    calls_at_once: int
    settings: measure.Settings


class Worker:
    """Model, client and shared memory of one process."""

    def __init__(self, setup: Setup, number: int = 0) -> None:
        """Loads the model and shares memory; `number` tells the processes apart."""
        dtype = getattr(torch, setup.dtype)
        if setup.num_workers > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // setup.num_workers))
        self._settings = setup.settings
        if setup.device == "cuda":
            sessions = int(setup.server_bytes * _SESSION_SHARE) // setup.num_workers
            self._settings = dataclasses.replace(
                self._settings, memory_bytes=_memory_of(setup), session_bytes=sessions
            )
        reader = GGUFReader(setup.model_file)
        self._tokenizer = GgufTokenizer(reader)
        room = setup.max_tokens + _ROOM_BEHIND
        self._model = TorchLlama.from_numpy(LlamaModel(reader), setup.device, dtype, room)
        engine = None
        if setup.engine is not None:
            from dynsplit.engine import Engine

            engine = Engine(setup.engine)
        target = setup.targets[number % len(setup.targets)]
        self.client = Client(target, stream_timeout_seconds=120, engine=engine)
        client = self.client
        self._buffers = HostBuffers(client) if engine is None else DeviceBuffers(client, engine)
        self._service = Service(
            *(client, self._buffers, self._model.shape, dtype, setup.max_tokens),
            calls_at_once=setup.calls_at_once,
        )
        self._bench: measure.Bench | None = None

    def calibrate(self, token_ids: Sequence[int]) -> bytes:
        """Delimiter weights that the service measures on a text; a DelimiterProfile."""
        self._service.load(prefill(self._model, token_ids, with_received=False))
        profile: compression_pb2.DelimiterProfile = self._service.calibrate()
        return bytes(profile.SerializeToString())

    def measure(self, case: Case, methods: Sequence[Method]) -> dict[str, Any]:
        """As measure.measure."""
        if self._bench is None or self._bench.methods != methods:
            if self._bench is not None:
                self._bench.close()
            self._bench = measure.Bench(
                self._model, self._tokenizer, self._service, methods, self._settings
            )
        return measure.measure(self._bench, case)

    def close(self) -> None:
        """Gives the memory back."""
        if self._bench is not None:
            self._bench.close()
        self._buffers.close()
        self.client.close()


def _memory_of(setup: Setup) -> int:
    """Bytes for attention in this process; also the most that torch may take here."""
    _, total = torch.cuda.mem_get_info()
    share = (total * _DEVICE_SHARE - setup.server_bytes) / setup.num_workers
    own = share - _FIXED_BYTES
    if own < _FIXED_BYTES / 2:
        raise ValueError(f"{setup.num_workers} processes have {share / 2**30:.1f} GiB each")
    torch.cuda.set_per_process_memory_fraction(own / total)
    return int(own) // _COPIES


_worker: Worker | None = None


def _begin(setup: Setup, numbers: Any) -> None:
    global _worker
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # shared memory outlives what is killed
    with numbers.get_lock():
        number = numbers.value
        numbers.value += 1
    _worker = Worker(setup, number)
    multiprocessing.util.Finalize(None, _worker.close, exitpriority=10)


def _call(name: str, *arguments: Any) -> Any:
    assert _worker is not None
    return getattr(_worker, name)(*arguments)


class Workers:
    """So many processes."""

    def __init__(self, setup: Setup) -> None:
        """They begin with their first call, which raises what the beginning of one fails with."""
        self._num = setup.num_workers
        context = multiprocessing.get_context("spawn")
        numbers = context.Value("i", 0)
        self._pool = ProcessPoolExecutor(self._num, context, _begin, (setup, numbers))

    def submit(self, name: str, *arguments: Any) -> Future[Any]:
        """Calls a method of some worker."""
        return self._pool.submit(_call, name, *arguments)

    def measured(
        self, cases: Sequence[Case], methods: Sequence[Method], seconds: float
    ) -> Iterator[tuple[Case, dict[str, Any]]]:
        """Results as they come, until all are there or time is up; 0 seconds = no limit.

        No case is begun that would probably end too late; one that does end too late is dropped.
        """
        clock = _Clock(seconds)
        waiting = iter(cases)
        running: dict[Future[Any], Case] = {}
        begun: dict[Future[Any], float] = {}
        while True:
            while len(running) < self._num and clock.has_time():
                case = next(waiting, None)
                if case is None:
                    break
                begin = time.monotonic()
                future = self.submit("measure", case, methods)
                running[future], begun[future] = case, begin
            if not running:
                return
            done, _ = wait(running, clock.left(), FIRST_COMPLETED)
            if not done:
                return
            for future in done:
                clock.note(time.monotonic() - begun.pop(future))
                yield running.pop(future), future.result()

    def close(self) -> None:
        """Ends the processes; what they are at is dropped."""
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + _GRACE_SECONDS
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in processes:
            if process.is_alive():
                process.terminate()


class _Clock:
    """Whether there is time for another case."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds if seconds else None
        self._usual = 0.0

    def note(self, seconds: float) -> None:
        """A case took so long."""
        self._usual = 0.7 * self._usual + 0.3 * seconds if self._usual else seconds

    def has_time(self) -> bool:
        """Whether a usual case would end in time."""
        return self._end is None or time.monotonic() + self._usual < self._end

    def left(self) -> float | None:
        """Seconds to wait for what is under way."""
        if self._end is None:
            return None
        return max(0.0, self._end - time.monotonic()) + _GRACE_SECONDS

# SPDX-License-Identifier: Apache-2.0
"""What every mode of the evaluation stands on: the service, the device, the texts, the clock."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from dynsplit.capture import sources
from dynsplit.sessions import SessionClient
from torch import Tensor

from attention import Attention
from buffers import Buffers, DeviceBuffers, HostBuffers
from torch_llama import TorchLlama

if TYPE_CHECKING:
    from dynsplit.capture.llama import LlamaModel
    from dynsplit.engine import Engine


@dataclasses.dataclass
class Context:
    """The run: arguments, connection, and what is loaded on demand."""

    arguments: argparse.Namespace
    client: SessionClient
    engine: Engine | None

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return str(self.arguments.device)

    @property
    def on_gpu(self) -> bool:
        """Whether the engine computes on a GPU, beside the service."""
        return self.device == "cuda"

    def buffers(self) -> Buffers:
        """New buffers shared with the service."""
        if self.engine is not None:
            return DeviceBuffers(self.client, self.engine)
        return HostBuffers(self.client)

    @functools.cached_property
    def smollm2(self) -> LlamaModel:
        """The real model, fp32 in numpy."""
        from dynsplit.capture.llama import LlamaModel
        from gguf import GGUFReader

        return LlamaModel(GGUFReader(sources.model_file(self.arguments.cache)))


class DecodeLoop:
    """Greedy decoding of b sequences side by side; as CUDA graphs, one a tail length, if asked."""

    def __init__(
        self, model: TorchLlama, attention: Attention, first: Tensor, position: int, graphs: bool
    ) -> None:
        """Begins with tokens `first` (int64 [b]) at `position`."""
        self._model, self._attention, self._graphs_on = model, attention, graphs
        self.tokens = first.clone()
        self._inputs = first.clone()
        self._positions = torch.full_like(first, position)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if graphs else None
        self._stream = torch.cuda.Stream() if graphs else None
        self.logits: Tensor | None = None

    def _compute(self) -> None:
        self._inputs.copy_(self.tokens)
        hidden = self._model.hidden_states(self.tokens, self._positions, self._attention.attend)
        self.logits = self._model.logits(hidden)
        self.tokens.copy_(self.logits.argmax(dim=-1))
        self._positions += 1

    def _captured(self) -> torch.cuda.CUDAGraph:
        tail = self._attention.tail
        if tail not in self._graphs:
            if not self._graphs:  # libraries allocate in their first call, which no graph may hold
                saved = self.tokens.clone(), self._positions.clone()
                torch.cuda.synchronize()
                with torch.cuda.stream(self._stream):
                    self._compute()
                torch.cuda.synchronize()
                self.tokens.copy_(saved[0])
                self._positions.copy_(saved[1])
            self._graphs[tail] = self._capture()
        return self._graphs[tail]

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; torch.cuda.graph would empty the allocator's cache every time."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._compute()
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return graph

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every sequence."""
        if self._graphs_on:
            self._captured().replay()
        else:
            self._compute()
        self._attention.end_step(self._inputs)

    def run(self, steps: int) -> float:
        """That many steps; returns seconds a step, all of the service's calls included."""
        synchronize = torch.cuda.synchronize if self.tokens.is_cuda else lambda: None
        synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize()
        return (time.perf_counter() - begin) / steps


def device_seconds(work: Callable[[], Any], repeats: int = 20, inner: int = 10) -> float:
    """Median device seconds of `work`, as a CUDA graph of `inner` copies."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            work()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / inner)
    return statistics.median(times)


def wall_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median host seconds of `work`, which must itself wait for its end."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def read_rate() -> float:
    """Bytes a second that a plain reduction reads from device memory."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")  # 4 GiB
    return data.nbytes / device_seconds(lambda: data.sum(), repeats=5, inner=2)


class PeakMemory:
    """Highest device memory in use by all processes together, sampled in the background (NVML)."""

    class _Memory(ctypes.Structure):
        _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong),
                    ("used", ctypes.c_ulonglong))  # fmt: skip

    def __init__(self, enabled: bool) -> None:
        """Disabled, it stays at 0 bytes."""
        self.peak_bytes = 0
        self._nvml: Any = None
        self._device = ctypes.c_void_p()
        if enabled:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
            found = self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetHandleByUUID(
                uuid, ctypes.byref(self._device)
            )
            if found != 0:  # a container may hide UUIDs: then there is one device to see
                found = self._nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device))
            if found != 0:
                raise OSError("NVML does not know the device")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def now(self) -> int:
        """Bytes in use."""
        if self._nvml is None:
            return 0
        memory = self._Memory()
        if self._nvml.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(memory)) != 0:
            raise OSError("NVML does not tell the device's memory")
        return int(memory.used)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak_bytes = max(self.peak_bytes, self.now())

    def __enter__(self) -> Self:
        """Begins to watch."""
        if self._nvml is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Looks a last time."""
        self.peak_bytes = max(self.peak_bytes, self.now())
        if self._nvml is not None:
            self._stop.set()
            self._thread.join()


def default_cache() -> Path:
    """Where the model and the texts lie."""
    return sources.cache_dir()

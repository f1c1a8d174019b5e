# SPDX-License-Identifier: Apache-2.0
"""Asks the running service which tokens of a prompt are kept.

K, V and queries of a prompt are put into shared memory once and named in every call; what the
service returns comes back in shared memory too. Calls may run side by side, one a room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from dynsplit.client import Client
from dynsplit.results import Compressed
from dynsplit.tensors import RegionSlice, RegionTensor, to_torch
from dynsplit.v1 import compression_pb2
from torch import Tensor

from buffers import Buffers, Shared
from torch_llama import Shape

from .engine import WINDOW, Prefill
from .methods import Method

_SPARE_ROWS = 512  # of a room: pages are whole, and so may be the last one of every layer


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a compression kept.

    Attributes:
        share: kept rows over all rows.
        mass: retained attention mass, mean; None where there is no receipt.
        error: relative error of attention's output, mean; likewise.
        checked: the returned rows were compared with the prompt's own, and were these.
    """

    share: float
    mass: float | None = None
    error: float | None = None
    checked: bool = False


class Mismatch(RuntimeError):
    """The service returned other rows than those it says it kept."""


class _Room:
    """Shared memory for results, as `Client.compress(output=)` takes it."""

    def __init__(self, shared: Shared) -> None:
        self._bytes = shared.tensor
        self.place: RegionSlice = shared.place

    def bytes_at(self, offset_bytes: int, byte_size: int) -> Any:
        """Bytes of the room: torch's on the device, numpy's on the host."""
        part = self._bytes[offset_bytes : offset_bytes + byte_size]
        return part if part.is_cuda else part.numpy()


@dataclasses.dataclass
class _Loaded:
    """The prompt that lies in the shared memory."""

    past: Prefill
    token_ids: npt.NDArray[np.int32]
    keys: list[RegionTensor]
    values: list[RegionTensor]
    queries: list[RegionTensor]
    received: list[RegionTensor] | None


class Service:
    """One client with the memory that it shares; for prompts up to `max_tokens`."""

    def __init__(
        self,
        client: Client,
        buffers: Buffers,
        shape: Shape,
        dtype: torch.dtype,
        max_tokens: int,
        calls_at_once: int = 2,
    ) -> None:
        """Shares the memory; `calls_at_once` compressions have room."""
        self.client, self.buffers, self.shape, self.dtype = client, buffers, shape, dtype
        self.max_tokens, self.calls_at_once = max_tokens, calls_at_once
        layers, heads = shape.num_layers, shape.num_query_heads
        rows = (layers, max_tokens, shape.num_kv_heads, shape.head_dim)
        self._kv = buffers.allocate(dtype, 2, *rows)
        self._queries = buffers.allocate(dtype, layers, WINDOW, heads, shape.head_dim)
        self._received = buffers.allocate(torch.float32, layers, heads * max_tokens)
        size = shape.kv_bytes(max_tokens + _SPARE_ROWS, dtype.itemsize)
        self._rooms: queue.SimpleQueue[_Room] = queue.SimpleQueue()
        for _ in range(calls_at_once):
            self._rooms.put(_Room(buffers.allocate(torch.uint8, size)))
        self._loaded: _Loaded | None = None
        self._streams = threading.local()

    def load(self, past: Prefill) -> None:
        """Puts a prompt where the service finds it."""
        tokens, shape = past.num_tokens, self.shape
        if tokens > self.max_tokens:
            raise ValueError(f"the prompt has {tokens} tokens, room is for {self.max_tokens}")
        for layer in range(shape.num_layers):
            self._kv.tensor[0, layer, :tokens] = past.keys[layer]
            self._kv.tensor[1, layer, :tokens] = past.values[layer]
            self._queries.tensor[layer, : min(WINDOW, tokens)] = past.queries[layer][-WINDOW:]
            if past.received:
                received = past.received[layer].reshape(-1)
                self._received.tensor[layer, : len(received)] = received
        layers = range(shape.num_layers)
        rows = (tokens, shape.num_kv_heads, shape.head_dim)
        window = (min(WINDOW, tokens), shape.num_query_heads, shape.head_dim)
        sums = (shape.num_query_heads, tokens)
        self._loaded = _Loaded(
            past,
            past.token_ids.int().cpu().numpy(),  # waits for the device, the copies included
            [self._kv.part((0, layer), *rows) for layer in layers],
            [self._kv.part((1, layer), *rows) for layer in layers],
            [self._queries.part((layer,), *window) for layer in layers],
            [self._received.part((layer,), *sums) for layer in layers] if past.received else None,
        )

    def _prompt(self) -> _Loaded:
        if self._loaded is None:
            raise ValueError("no prompt is loaded")
        return self._loaded

    @torch.inference_mode()
    def evict(self, method: Method, share: float, mask: Tensor, check: bool = True) -> Kept:
        """Compresses the loaded prompt.

        Args:
            method: of mode "evict".
            share: of the tokens.
            mask: bool [L, Hkv, T], on the engine's device; set to what was kept.
            check: compare the rows that came with the prompt's own.

        Raises:
            Mismatch: they are others.
            DynSplitError: the service refused.
        """
        prompt = self._prompt()
        room = self._rooms.get()
        try:
            result = self.client.compress(
                prompt.token_ids,
                prompt.keys,
                prompt.values,
                queries=prompt.queries,
                accumulated_scores=prompt.received if method.needs_received else None,
                policy=method.policy(share),
                output=room,
            )
            with self._stream(mask):
                mask.zero_()
                for layers, tokens in self._tokens(result, mask.device):
                    mask[layers.start : layers.stop].scatter_(-1, tokens, True)
                    if check:
                        self._compare(result, layers, tokens, f"{method.name} at {share}")
        finally:
            self._rooms.put(room)
        receipt = result.receipt
        kept_rows = sum(layer.num_kept for layer in result.layers)
        return Kept(
            kept_rows / (self.shape.num_layers * mask.shape[-1]),
            receipt.retained_attention_mass_mean if receipt else None,
            receipt.output_relative_error_mean if receipt else None,
            check,
        )

    @contextlib.contextmanager
    def _stream(self, like: Tensor) -> Iterator[None]:
        """The calling thread's own stream of the device; waits for it at the end."""
        if not like.is_cuda:
            yield
            return
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams.own):
            yield
        self._streams.own.synchronize()

    def _tokens(self, result: Compressed, device: torch.device) -> Iterator[tuple[range, Tensor]]:
        """Runs of layers that kept equally many, with their tokens: int64 [layers, Hkv, n]."""
        heads = self.shape.num_kv_heads
        for _, members in itertools.groupby(result.layers, lambda layer: layer.tokens.shape):
            run = list(members)
            tokens = torch.stack([_as_torch(layer.tokens).to(device) for layer in run]).long()
            yield range(run[0].layer, run[-1].layer + 1), tokens.expand(-1, heads, -1)

    def _compare(self, result: Compressed, layers: range, tokens: Tensor, name: str) -> None:
        """All layers in a few operations of the device: rows by their number among all rows."""
        device, heads = tokens.device, self.shape.num_kv_heads
        head = torch.arange(heads, device=device)[:, None]
        layer = torch.arange(layers.start, layers.stop, device=device)[:, None, None]
        places = ((layer * self.max_tokens + tokens) * heads + head).transpose(1, 2).flatten()
        pairs = [result.layers[number].rows() for number in layers]
        for kind, own in enumerate(self._kv.tensor.flatten(1, 3)):
            found = [_as_torch(pair[kind]).reshape(-1, self.shape.head_dim) for pair in pairs]
            if not torch.equal(own[places], torch.cat(found).to(device)):
                raise Mismatch(f"{name}: other {('keys', 'values')[kind]} than the prompt's")

    def open(self, method: Method) -> str:
        """Stores the loaded prompt as a session; returns its name."""
        prompt = self._prompt()
        return self.client.open(
            prompt.token_ids,
            prompt.keys,
            prompt.values,
            num_query_heads=self.shape.num_query_heads,
            policy=method.policy(1.0),
        ).session_id

    def calibrate(self) -> compression_pb2.DelimiterProfile:
        """Delimiter weights measured on the loaded prompt."""
        prompt = self._prompt()
        queries = [part.cpu() for part in prompt.past.queries]
        positions = range(prompt.past.num_tokens)
        return self.client.calibrate(prompt.token_ids, prompt.keys, queries, positions)


def _as_torch(rows: Any) -> Tensor:
    return rows if isinstance(rows, Tensor) else to_torch(rows)

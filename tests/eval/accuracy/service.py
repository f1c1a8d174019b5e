# SPDX-License-Identifier: Apache-2.0
"""Asks the running service which tokens of a prompt are read.

K, V and queries of a prompt are put into shared memory once and named in every call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from dynsplit.client import Client
from dynsplit.session_calls import Step
from dynsplit.shared import HostRegion
from dynsplit.tensors import RegionTensor, to_torch
from dynsplit.v1 import compression_pb2
from torch import Tensor

from buffers import Buffers, Shared
from torch_llama import Shape

from .engine import WINDOW, Prefill
from .methods import Method

_CALLS = ThreadPoolExecutor(8)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a compression kept.

    Attributes:
        mask: bool [L, Hkv, T].
        share: kept rows over all rows.
        mass: retained attention mass, mean; None where there is no receipt.
        error: relative error of attention's output, mean; likewise.
    """

    mask: Tensor
    share: float
    mass: float | None = None
    error: float | None = None


class Mismatch(RuntimeError):
    """The service returned other rows than those it says it kept."""


def mask_of(tokens: Tensor, num_kv_heads: int, num_tokens: int) -> Tensor:
    """Bool [..., Hkv, T] of token numbers [..., groups, n], groups 1 or Hkv."""
    mask = torch.zeros((*tokens.shape[:-1], num_tokens), dtype=torch.bool, device=tokens.device)
    mask.scatter_(-1, tokens.long(), True)
    return mask.expand(*tokens.shape[:-2], num_kv_heads, num_tokens)


class Service:
    """One client with the memory that it shares; for prompts up to `max_tokens`."""

    def __init__(
        self, client: Client, buffers: Buffers, shape: Shape, dtype: torch.dtype, max_tokens: int
    ) -> None:
        """Registers the memory."""
        self.client, self._shape, self._max_tokens = client, shape, max_tokens
        layers, heads = shape.num_layers, shape.num_query_heads
        rows = (layers, max_tokens, shape.num_kv_heads, shape.head_dim)
        self._kv = buffers.allocate(dtype, 2, *rows)
        self._queries = buffers.allocate(dtype, layers, WINDOW, heads, shape.head_dim)
        self._received = buffers.allocate(torch.float32, layers, heads * max_tokens)
        page = self._kv.tensor.element_size() * 2 * layers * shape.num_kv_heads * shape.head_dim
        # Pages are whole, and so may be the last one of every layer.
        self._output = HostRegion(client, page * (max_tokens + 512), 3600)

    def close(self) -> None:
        """Gives the memory back that is not the buffers'."""
        self._output.close()

    def load(self, past: Prefill) -> None:
        """Puts a prompt where the service finds it."""
        tokens = past.num_tokens
        if tokens > self._max_tokens:
            raise ValueError(f"the prompt has {tokens} tokens, room is for {self._max_tokens}")
        for layer in range(self._shape.num_layers):
            self._kv.tensor[0, layer, :tokens] = past.keys[layer]
            self._kv.tensor[1, layer, :tokens] = past.values[layer]
            self._queries.tensor[layer] = past.queries[layer][-WINDOW:]
            received = past.received[layer].reshape(-1)
            self._received.tensor[layer, : len(received)] = received
        if self._kv.tensor.is_cuda:
            torch.cuda.synchronize()

    def _rows(self, kind: int, tokens: int) -> list[RegionTensor]:
        row = (self._shape.num_kv_heads, self._shape.head_dim)
        layers = range(self._shape.num_layers)
        return [self._kv.part((kind, layer), tokens, *row) for layer in layers]

    @staticmethod
    def _each_layer(shared: Shared, num_layers: int, *shape: int) -> list[RegionTensor]:
        return [shared.part((layer,), *shape) for layer in range(num_layers)]

    def evict(self, past: Prefill, method: Method, share: float) -> Kept:
        """Compresses the loaded prompt, and checks that the rows that came are the prompt's own.

        Raises:
            Mismatch: they are not.
        """
        shape, tokens = self._shape, past.num_tokens
        window = (min(WINDOW, tokens), shape.num_query_heads, shape.head_dim)
        received = None
        if method.needs_received:
            size = (shape.num_query_heads, tokens)
            received = self._each_layer(self._received, shape.num_layers, *size)
        result = self.client.compress(
            past.token_ids.int().cpu().numpy(),
            self._rows(0, tokens),
            self._rows(1, tokens),
            queries=self._each_layer(self._queries, shape.num_layers, *window),
            accumulated_scores=received,
            policy=method.policy(share),
            output=self._output,
        )
        masks = []
        for layer in result.layers:
            kept = torch.from_numpy(layer.tokens.copy()).to(past.keys[0].device)
            masks.append(mask_of(kept, shape.num_kv_heads, tokens))
            heads = torch.arange(shape.num_kv_heads, device=kept.device)
            rows = kept.expand(shape.num_kv_heads, -1).T.long()  # [n, Hkv]
            for returned, own in zip(layer.rows(), (past.keys, past.values), strict=True):
                expected = own[layer.layer][rows, heads]
                found = to_torch(returned).to(expected.device)
                if not torch.equal(found, expected):
                    raise Mismatch(f"{method.name} at {share}: layer {layer.layer}")
        mask = torch.stack(masks)
        receipt = result.receipt
        return Kept(
            mask,
            float(mask.float().mean()),
            receipt.retained_attention_mass_mean if receipt else None,
            receipt.output_relative_error_mean if receipt else None,
        )

    def open(self, past: Prefill, method: Method) -> Session:
        """Stores the loaded prompt as a session."""
        session = self.client.open(
            past.token_ids.int().cpu().numpy(),
            self._rows(0, past.num_tokens),
            self._rows(1, past.num_tokens),
            num_query_heads=self._shape.num_query_heads,
            policy=method.policy(1.0),
        ).session_id
        return Session(self.client, session, self._shape, past.num_tokens)

    def calibrate(self, past: Prefill) -> compression_pb2.DelimiterProfile:
        """Delimiter weights measured on a prompt."""
        queries = [part.cpu().numpy() for part in past.queries]
        return self.client.calibrate(
            past.token_ids.int().cpu().numpy(),
            self._rows(0, past.num_tokens),
            queries,
            range(past.num_tokens),
        )


class Session:
    """A prompt at rest; a context manager that releases it."""

    def __init__(self, client: Client, session_id: str, shape: Shape, num_tokens: int) -> None:
        """Of an open session."""
        self.session_id, self.num_tokens = session_id, num_tokens
        self._client, self._shape = client, shape

    def __enter__(self) -> Session:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Releases."""
        self._client.release(self.session_id)

    def step(self, layer: int, query: Tensor, budget: int) -> Step:
        """What one query [Hq, D] of a layer asks."""
        return Step(self.session_id, query[None, None], first_layer=layer, tokens_per_head=budget)


def select(
    client: Client, calls: Sequence[Sequence[Step]], shape: Shape, num_tokens: int
) -> Tensor:
    """Bool [calls, steps, Hkv, T]: what each step reads. Calls run side by side.

    A call has at most one step of a session.
    """

    def chosen(steps: Sequence[Step]) -> Tensor:
        masks = []
        for selection in client.select(steps):
            if selection.dense_layers:
                masks.append(torch.ones(shape.num_kv_heads, num_tokens, dtype=torch.bool))
                continue
            tokens = torch.from_numpy(selection.tokens[0].copy())
            masks.append(mask_of(tokens, shape.num_kv_heads, num_tokens))
        return torch.stack(masks)

    return torch.stack(list(_CALLS.map(chosen, calls)))

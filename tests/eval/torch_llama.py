# SPDX-License-Identifier: Apache-2.0
"""A Llama in torch whose attention is the caller's: the engine of the decode evaluation.

Rows are whatever is computed side by side: the tokens of one prompt, or one token of each sequence.
Shapes: N rows, Hq query heads, Hkv KV heads, D head dimension, E embedding width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor

if TYPE_CHECKING:
    from dynsplit.capture.llama import LlamaModel

# (layer, queries [N, Hq, D], keys [N, Hkv, D], values [N, Hkv, D]) -> [N, Hq, D]; queries and keys
# are after RoPE.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    num_layers: int
    embedding_dim: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float
    rms_epsilon: float

    @property
    def matrix_parameters(self) -> int:
        """Parameters that a step reads whole: all matrices but the embedding."""
        attention = 2 * self.head_dim * (self.num_query_heads + self.num_kv_heads)
        layer = self.embedding_dim * (attention + 3 * self.ffn_dim)
        return self.num_layers * layer + self.vocab_size * self.embedding_dim

    def kv_bytes(self, num_tokens: int, element_bytes: int) -> int:
        """Bytes of the keys and values of so many tokens, all layers."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return num_tokens * per_token * element_bytes


LLAMA_8B = Shape(32, 4096, 32, 8, 128, 14336, 128256, 500000.0, 1e-5)  # Llama-3.1-8B's
TINY = Shape(3, 128, 8, 2, 32, 256, 49152, 10000.0, 1e-5)


@dataclasses.dataclass(frozen=True)
class _Layer:
    attn_norm: Tensor
    qkv: Tensor
    out: Tensor
    ffn_norm: Tensor
    gate_up: Tensor
    down: Tensor


class TorchLlama:
    """Weights on one device, in one type; immutable."""

    def __init__(
        self,
        shape: Shape,
        embedding: Tensor,
        layers: list[_Layer],
        output_norm: Tensor,
        output: Tensor,
        max_positions: int,
    ) -> None:
        """Of weights as they are; see `random` and `from_numpy`."""
        self.shape = shape
        self.device, self.dtype = embedding.device, embedding.dtype
        self._embedding, self._layers = embedding, layers
        self._output_norm, self._output = output_norm, output
        self._exact_output: Tensor | None = None
        exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        positions = torch.arange(max_positions, dtype=torch.float64)
        angle = positions[:, None] * shape.rope_theta**-exponent
        # Of whole rows: the halves turn by the same angle, the first against the second.
        self._cos = torch.cat((angle.cos(), angle.cos()), -1).to(self.device, torch.float32)
        self._sin = torch.cat((-angle.sin(), angle.sin()), -1).to(self.device, torch.float32)

    @classmethod
    def random(
        cls, shape: Shape, device: str, dtype: torch.dtype, max_positions: int
    ) -> TorchLlama:
        """Random weights, scaled so that activations keep their size through all layers."""
        generator = torch.Generator(device).manual_seed(7)

        def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            weight = torch.empty(rows, columns, device=device, dtype=dtype)
            return weight.normal_(0, scale * columns**-0.5, generator=generator)

        def ones() -> Tensor:
            return torch.ones(shape.embedding_dim, device=device, dtype=dtype)

        width, heads = shape.embedding_dim, shape.num_query_heads * shape.head_dim
        residual = (2 * shape.num_layers) ** -0.5
        layers = [
            _Layer(
                attn_norm=ones(),
                qkv=matrix(heads + 2 * shape.num_kv_heads * shape.head_dim, width),
                out=matrix(width, heads, residual),
                ffn_norm=ones(),
                gate_up=matrix(2 * shape.ffn_dim, width),
                down=matrix(width, shape.ffn_dim, residual),
            )
            for _ in range(shape.num_layers)
        ]
        embedding = matrix(shape.vocab_size, width, width**0.5)
        output = matrix(shape.vocab_size, width)
        return cls(shape, embedding, layers, ones(), output, max_positions)

    @classmethod
    def from_numpy(
        cls, model: LlamaModel, device: str, dtype: torch.dtype, max_positions: int
    ) -> TorchLlama:
        """The weights of the capture tool's model."""
        import numpy as np

        def load(*parts: object) -> Tensor:
            joined = np.concatenate([np.asarray(part, np.float32) for part in parts])
            return torch.from_numpy(joined).to(device, dtype)

        config = model.config
        shape = Shape(
            config.num_layers,
            config.embedding_dim,
            config.num_query_heads,
            config.num_kv_heads,
            config.head_dim,
            model.layers[0].gate.shape[0],
            config.vocab_size,
            config.rope_theta,
            config.rms_epsilon,
        )
        layers = [
            _Layer(
                attn_norm=load(layer.attn_norm),
                qkv=load(layer.wq, layer.wk, layer.wv),
                out=load(layer.wo),
                ffn_norm=load(layer.ffn_norm),
                gate_up=load(layer.gate, layer.up),
                down=load(layer.down),
            )
            for layer in model.layers
        ]
        embedding, output = load(model.embedding), load(model.output)
        return cls(shape, embedding, layers, load(model.output_norm), output, max_positions)

    def hidden_states(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Runs every layer over N rows.

        Args:
            token_ids: int64 [N].
            positions: int64 [N].
            attend: stores keys and values, and attends.

        Returns:
            [N, E], after the output norm.
        """
        shape = self.shape
        heads = (shape.num_query_heads, shape.num_kv_heads, shape.num_kv_heads)
        rotation = self._cos[positions][:, None], self._sin[positions][:, None]
        num_turned = shape.num_query_heads + shape.num_kv_heads
        x = functional.embedding(token_ids, self._embedding)
        for index, layer in enumerate(self._layers):
            h = self._norm(x, layer.attn_norm)
            fused = functional.linear(h, layer.qkv).view(len(x), sum(heads), shape.head_dim)
            turned = _rotate(fused[:, :num_turned], *rotation)
            q, k = turned.split(heads[:2], dim=1)
            mixed = attend(index, q, k, fused[:, num_turned:])
            x = torch.addmm(x, mixed.reshape(len(x), -1), layer.out.t())
            h = self._norm(x, layer.ffn_norm)
            gate, up = functional.linear(h, layer.gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, functional.silu(gate) * up, layer.down.t())
        return self._norm(x, self._output_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [N, vocab] of [N, E]."""
        return functional.linear(hidden, self._output)

    def exact_logits(self, hidden: Tensor) -> Tensor:
        """As `logits`, in fp32 whatever the weights' type: for what compares distributions."""
        if self._exact_output is None:
            self._exact_output = self._output.float()
        return functional.linear(hidden.float(), self._exact_output)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, D] of RoPE at positions [N], both halves alike; fp32."""
        half = self.shape.head_dim // 2
        sine = self._sin[positions][:, half:]
        return self._cos[positions], torch.cat((sine, sine), -1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.shape.rms_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout, in fp32, rounded once."""
    exact = x.float()
    low, high = exact.chunk(2, dim=-1)
    return torch.addcmul(exact * cos, torch.cat((high, low), dim=-1), sin).to(x.dtype)


def attend_prompt(
    keep: Callable[[int, Tensor, Tensor, Tensor], None],
) -> Attend:
    """Causal attention among the rows of one prompt; `keep` sees every layer's q, k and v."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep(layer, q, k, v)
        query, key, value = (part.transpose(0, 1)[None] for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return mixed[0].transpose(0, 1)

    return attend

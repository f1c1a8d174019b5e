# SPDX-License-Identifier: Apache-2.0
"""A Llama forward pass in numpy fp32, read from a GGUF file and made to be observed.

Shapes use T tokens, Hq query heads, Hkv key-value heads, D head dimension, E embedding width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gguf import dequantize

from dynsplit.capture import CaptureError

if TYPE_CHECKING:
    from gguf import GGUFReader

Array = npt.NDArray[np.float32]

# Called once a layer, in order: (layer index, queries [T, Hq, D], keys [T, Hkv, D], values
# [T, Hkv, D]); queries and keys are after RoPE. The arrays are not reused afterwards.
LayerObserver = Callable[[int, Array, Array, Array], None]

# Replaces attention: (layer index, queries [T, Hq, D], keys [T, Hkv, D], values [T, Hkv, D]) of the
# tokens at hand -> [T, Hq * D]; queries and keys are after RoPE.
Attention = Callable[[int, Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """What of the model's shape matters outside of it."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    embedding_dim: int
    context_length: int
    vocab_size: int
    rope_theta: float
    rotary_dim: int
    rms_epsilon: float

    @classmethod
    def from_gguf(cls, reader: GGUFReader) -> LlamaConfig:
        """Reads the `llama.*` fields.

        Raises:
            CaptureError: the file is no plain Llama model (RoPE scaling counts as not plain).
        """

        def read(key: str) -> Any:
            field = reader.get_field(key)
            if field is None:
                raise CaptureError(f"the GGUF file has no field {key}")
            return field.contents()

        if read("general.architecture") != "llama":
            raise CaptureError("only the llama architecture is supported")
        if any(name.startswith("llama.rope.scaling") for name in reader.fields):
            raise CaptureError("RoPE scaling is not supported")
        heads, width = read("llama.attention.head_count"), read("llama.embedding_length")
        config = cls(
            num_layers=read("llama.block_count"),
            num_query_heads=heads,
            num_kv_heads=read("llama.attention.head_count_kv"),
            head_dim=width // heads,
            embedding_dim=width,
            context_length=read("llama.context_length"),
            vocab_size=read("llama.vocab_size"),
            rope_theta=float(read("llama.rope.freq_base")),
            rotary_dim=read("llama.rope.dimension_count"),
            rms_epsilon=float(read("llama.attention.layer_norm_rms_epsilon")),
        )
        if config.rotary_dim != config.head_dim or config.num_query_heads % config.num_kv_heads:
            raise CaptureError("partial RoPE and uneven head groups are not supported")
        return config


@dataclasses.dataclass(frozen=True)
class LlamaLayer:
    """Weights of one layer; matrices are [out, in]."""

    attn_norm: Array
    wq: Array
    wk: Array
    wv: Array
    wo: Array
    ffn_norm: Array
    gate: Array
    up: Array
    down: Array


def halves_from_pairs(weight: Array, num_heads: int) -> Array:
    """Undoes the row order that GGUF conversion gives to query and key projections.

    GGUF stores each head's rows so that rotated pairs are neighbours (2c, 2c+1). The original
    layout, which the captures use, pairs row c with row c + D/2.

    Args:
        weight: [num_heads * D, in].
        num_heads: heads in `weight`.
    """
    rows, width = weight.shape
    by_pair = weight.reshape(num_heads, rows // num_heads // 2, 2, width)
    return np.ascontiguousarray(by_pair.transpose(0, 2, 1, 3).reshape(rows, width))


def rope_tables(num_tokens: int, rotary_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines of every position, each [T, rotary_dim / 2]; computed in fp64."""
    frequency = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    angle = np.arange(num_tokens, dtype=np.float64)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Applies RoPE to [T, H, D] in the half-split layout (channel c turns with c + D/2)."""
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)


def causal_attention(q: Array, k: Array, v: Array, block_size: int = 256) -> Array:
    """Causal attention with grouped heads, one block of queries at a time.

    The largest temporary is [Hq / Hkv * block_size, T], so memory grows with T, not with T * T.

    Args:
        q: [T, Hq, D].
        k: [T, Hkv, D].
        v: [T, Hkv, D].
        block_size: queries in a block.

    Returns:
        [T, Hq * D].
    """
    tokens, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    scale = np.float32(1.0 / np.sqrt(dim))
    out = np.empty((tokens, kv_heads, group, dim), np.float32)
    grouped = q.reshape(tokens, kv_heads, group, dim) * scale
    for head in range(kv_heads):
        keys_t, values = np.ascontiguousarray(k[:, head].T), np.ascontiguousarray(v[:, head])
        for start in range(0, tokens, block_size):
            end = min(start + block_size, tokens)
            rows = grouped[start:end, head].reshape(-1, dim)
            weights = rows @ keys_t[:, :end]
            blocked = weights.reshape(end - start, group, end)
            future = np.triu(np.ones((end - start, end - start), bool), k=1)
            np.copyto(blocked[:, :, start:], -np.inf, where=future[:, None, :])
            weights -= weights.max(axis=1, keepdims=True)
            np.exp(weights, out=weights)
            total = weights.sum(axis=1, keepdims=True)
            out[start:end, head] = (weights @ values[:end] / total).reshape(-1, group, dim)
    return out.reshape(tokens, q_heads * dim)


def silu(x: Array) -> Array:
    """x / (1 + exp(-x)), element by element."""
    with np.errstate(over="ignore"):  # exp overflows to infinity, and the quotient to zero.
        divisor: Array = np.float32(1.0) + np.exp(-x)
    result: Array = x / divisor
    return result


class LlamaModel:
    """The model with its weights in fp32; immutable after construction."""

    def __init__(self, reader: GGUFReader) -> None:
        """Dequantizes every tensor (about 4 bytes a parameter).

        Raises:
            CaptureError: a tensor is missing or the model is not a plain Llama.
        """
        self.config = LlamaConfig.from_gguf(reader)
        tensors = {tensor.name: tensor for tensor in reader.tensors}

        def load(name: str) -> Array:
            if name not in tensors:
                raise CaptureError(f"the GGUF file has no tensor {name}")
            tensor = tensors[name]
            return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

        self.embedding = load("token_embd.weight")
        tied = "output.weight" not in tensors
        self.output = self.embedding if tied else load("output.weight")
        self.output_norm = load("output_norm.weight")
        self.layers = [
            LlamaLayer(
                attn_norm=load(f"blk.{i}.attn_norm.weight"),
                wq=halves_from_pairs(load(f"blk.{i}.attn_q.weight"), self.config.num_query_heads),
                wk=halves_from_pairs(load(f"blk.{i}.attn_k.weight"), self.config.num_kv_heads),
                wv=load(f"blk.{i}.attn_v.weight"),
                wo=load(f"blk.{i}.attn_output.weight"),
                ffn_norm=load(f"blk.{i}.ffn_norm.weight"),
                gate=load(f"blk.{i}.ffn_gate.weight"),
                up=load(f"blk.{i}.ffn_up.weight"),
                down=load(f"blk.{i}.ffn_down.weight"),
            )
            for i in range(self.config.num_layers)
        ]

    def hidden_states(
        self,
        token_ids: npt.NDArray[np.int32],
        observe: LayerObserver | None = None,
        first_position: int = 0,
        attend: Attention | None = None,
    ) -> Array:
        """Runs every layer over one sequence, or over its newest tokens.

        Args:
            token_ids: [T], positions first_position..first_position+T-1.
            observe: called once a layer with its queries, keys and values.
            first_position: position of token_ids[0].
            attend: attention over these tokens and all before them; None where there are none
                before.

        Returns:
            Final hidden states after the output norm, [T, E].
        """
        config, tokens = self.config, len(token_ids)
        cos, sin = rope_tables(first_position + tokens, config.rotary_dim, config.rope_theta)
        cos, sin = cos[first_position:], sin[first_position:]
        x: Array = self.embedding[token_ids]
        for index, layer in enumerate(self.layers):
            h = self._rms_norm(x, layer.attn_norm)
            q = rotate((h @ layer.wq.T).reshape(tokens, -1, config.head_dim), cos, sin)
            k = rotate((h @ layer.wk.T).reshape(tokens, -1, config.head_dim), cos, sin)
            v = (h @ layer.wv.T).reshape(tokens, -1, config.head_dim)
            if observe is not None:
                observe(index, q, k, v)
            mixed = causal_attention(q, k, v) if attend is None else attend(index, q, k, v)
            x += mixed @ layer.wo.T
            h = self._rms_norm(x, layer.ffn_norm)
            x += (silu(h @ layer.gate.T) * (h @ layer.up.T)) @ layer.down.T
        return self._rms_norm(x, self.output_norm)

    def logits(self, hidden: Array) -> Array:
        """Next-token logits [N, vocab] of final hidden states [N, E]."""
        scores: Array = hidden @ self.output.T
        return scores

    def perplexity(
        self, hidden: Array, token_ids: npt.NDArray[np.int32], block_size: int = 256
    ) -> float:
        """exp of the mean next-token cross entropy (nats) over positions 1..T-1.

        Args:
            hidden: [T, E] from `hidden_states` of the same tokens; T >= 2.
            token_ids: [T].
            block_size: positions whose logits are held at once.
        """
        loss, last = 0.0, len(token_ids) - 1
        for start in range(0, last, block_size):
            end = min(start + block_size, last)
            scores = self.logits(hidden[start:end])
            top = scores.max(axis=1)
            log_total = np.log(np.exp(scores - top[:, None]).sum(axis=1, dtype=np.float64)) + top
            targets = token_ids[start + 1 : end + 1]
            loss += float((log_total - scores[np.arange(end - start), targets]).sum())
        return float(np.exp(loss / last))

    def _rms_norm(self, x: Array, weight: Array) -> Array:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        root: Array = np.sqrt(mean_square + np.float32(self.config.rms_epsilon))
        normalised: Array = x / root * weight
        return normalised

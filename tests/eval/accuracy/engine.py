# SPDX-License-Identifier: Apache-2.0
"""Prefill of a prompt, and continuations that read only some of its tokens.

A continuation attends to the prompt's own K and V under a mask: what a cache of the kept rows
gives, without a copy of the rows for each method (that the service returns those very rows is
checked where they come back). Shapes: T tokens of the prompt, L layers, Hq query heads, Hkv KV
heads, G = Hq / Hkv, D head dimension, M readers side by side, A inputs of the continuation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from torch_llama import Shape, TorchLlama, attend_prompt

WINDOW = 64  # queries of the prompt's end that the service is given
_QUERY_ROWS = 512  # of a prefill, side by side
# Of a pair of query and key (logits, weights and their copies), and of a token of the vocabulary.
_ATTENTION_BYTES, _VOCABULARY_BYTES = 18, 24


@dataclasses.dataclass
class Prefill:
    """What a prompt leaves behind, layer by layer.

    Attributes:
        token_ids: int64 [T].
        keys: [T, Hkv, D] a layer, after RoPE.
        values: likewise.
        queries: [T, Hq, D] a layer, after RoPE.
        received: fp32 [Hq, T] a layer, sum of the attention each token received; or empty.
    """

    token_ids: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor]
    received: list[Tensor]

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)


def _received(q: Tensor, k: Tensor) -> Tensor:
    """Attention that each token received of all queries, [Hq, T]."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    keys = k.permute(1, 2, 0)[:, None]  # [Hkv, 1, D, T]
    received = torch.zeros(kv_heads, heads // kv_heads, tokens, device=q.device)
    for begin in range(0, tokens, _QUERY_ROWS):
        end = min(begin + _QUERY_ROWS, tokens)
        rows = q[begin:end].view(end - begin, kv_heads, -1, dim).permute(1, 2, 0, 3)
        logits = (rows * dim**-0.5) @ keys[..., :end]
        future = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device).triu(1)
        logits[..., begin:].masked_fill_(future, float("-inf"))
        received[..., :end] += logits.softmax(dim=-1, dtype=torch.float32).sum(dim=-2)
    return received.view(heads, tokens)


@torch.inference_mode()
def prefill(model: TorchLlama, token_ids: Sequence[int], with_received: bool = True) -> Prefill:
    """Runs a prompt; `received` stays empty where it is not asked for."""
    tokens = torch.tensor(token_ids, device=model.device, dtype=torch.int64)
    found = Prefill(tokens, [], [], [], [])

    def keep(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        found.keys.append(k.contiguous())
        found.values.append(v.contiguous())
        found.queries.append(q.contiguous())
        if with_received:
            found.received.append(_received(q, k))

    positions = torch.arange(len(tokens), device=model.device)
    model.hidden_states(tokens, positions, attend_prompt(keep))
    return found


# (layer, queries [M, A, Hq, D]) -> bool [M, Hkv, 1 or A, T]: which tokens of the prompt are read.
Reader = Callable[[int, Tensor], Tensor]


def read_masked(
    q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """Attention of new rows over the prompt's tokens that a mask shows, and over themselves.

    Args:
        q: [M, A, Hq, D]; causal among the A rows.
        k: [M, A, Hkv, D].
        v: likewise.
        past: keys and values of the prompt, [T, Hkv, D] each.
        mask: bool [M, Hkv, 1 or A, T]; None = all.

    Returns:
        [M, A, Hq, D].
    """
    readers, new, _, dim = q.shape
    kv_heads = k.shape[2]
    num_past = past[0].shape[0]
    rows = q.view(readers, new, kv_heads, -1, dim).permute(2, 0, 3, 1, 4)  # [Hkv, M, G, A, D]
    groups = rows.shape[2]
    keys, values = (part.permute(1, 0, 2) for part in past)  # [Hkv, T, D]
    flat = rows.reshape(kv_heads, -1, dim)
    logits = torch.empty(
        (kv_heads, readers, groups, new, num_past + new), dtype=torch.float32, device=q.device
    )
    logits[..., :num_past] = (flat @ keys.transpose(1, 2)).view(*logits.shape[:-1], num_past)
    own_keys = k.permute(2, 0, 3, 1)[:, :, None]  # [Hkv, M, 1, D, A]
    logits[..., num_past:] = rows @ own_keys
    if mask is not None:
        hidden = ~mask.permute(1, 0, 2, 3)[:, :, None]  # [Hkv, M, 1, 1 or A, T]
        logits[..., :num_past].masked_fill_(hidden, float("-inf"))
    future = torch.ones(new, new, dtype=torch.bool, device=q.device).triu(1)
    logits[..., num_past:].masked_fill_(future, float("-inf"))
    weights = logits.mul_(dim**-0.5).softmax(dim=-1).to(v.dtype)
    mixed = weights[..., :num_past].reshape(kv_heads, -1, num_past) @ values
    mixed = mixed.view(kv_heads, readers, groups, new, dim)
    mixed = mixed + weights[..., num_past:] @ v.permute(2, 0, 1, 3)[:, :, None]
    return mixed.permute(1, 3, 0, 2, 4).reshape(q.shape)


def attend_whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last N tokens [N, Hq, D] over all T tokens [T, Hkv, D], causal."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    query, key, value = (part.transpose(0, 1)[None] for part in (q, keys, values))
    mask = causal_lower_right(len(q), len(k))
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return mixed[0].transpose(0, 1)


def readers_at_once(shape: Shape, memory_bytes: int, num_past: int, num_new: int) -> int:
    """How many readers fit the memory: attention of one layer, or logits, with their copies."""
    attention = shape.num_query_heads * (num_past + num_new) * _ATTENTION_BYTES
    scores = shape.vocab_size * _VOCABULARY_BYTES
    return max(1, memory_bytes // (num_new * max(attention, scores)))


@torch.inference_mode()
def continue_with(
    model: TorchLlama, past: Prefill, inputs: Sequence[int], num_readers: int, reader: Reader | None
) -> Tensor:
    """Logits fp32 [M, A, vocab] of `inputs` behind the prompt, for each of M readers.

    Args:
        model: of the prefill.
        past: the prompt.
        inputs: A token ids, at positions T ...
        num_readers: M.
        reader: None = every token is read.
    """
    new = len(inputs)
    tokens = torch.tensor(inputs, device=model.device, dtype=torch.int64).repeat(num_readers)
    positions = torch.arange(new, device=model.device) + past.num_tokens

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [part.reshape(num_readers, new, *part.shape[1:]) for part in (q, k, v)]
        mask = reader(layer, parts[0]) if reader is not None else None
        kept = past.keys[layer], past.values[layer]
        return read_masked(parts[0], parts[1], parts[2], kept, mask).reshape(q.shape)

    hidden = model.hidden_states(tokens, positions.repeat(num_readers), attend)
    return model.exact_logits(hidden).view(num_readers, new, -1)

# SPDX-License-Identifier: Apache-2.0
"""The cost of choosing among unequal blocks: V2F against handling each head's blocks one by one.

All ways begin with the same block summaries and the queries of one step (all layers, one sequence)
and end with token indices; each is timed whole, host and device, from its first call to the moment
the indices are complete on the device.
    naive        torch; blocks scored for all heads at once (the same code as vectorised), then per
                 layer and head, serially: sort the blocks, cumulate their lengths, build the ragged
                 list of their tokens, cut it at the budget; in the end pad the lists to a rectangle
    vectorised   torch; the same scores; sort, cumulative lengths and the tokens of all layers and
                 heads in a few batched operations
    service      one Select call over the socket: ScoreBlocks and SelectBlocks, fp8 summaries
Selection overhead is what is left without scoring for the two torch ways; the service is reported
whole (wall) and by its own device time, both with scoring.
"""

from __future__ import annotations

from typing import Any

import torch
from dynsplit.sessions import Step
from torch import Tensor

from attention import open_session
from runtime import Context, wall_seconds
from texts import long_ids
from torch_llama import LLAMA_8B, TINY, Shape

SINKS, RECENT = 4, 32


def summarise(keys: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Minima and maxima [Hkv, B, D] of keys [T, Hkv, D] over blocks."""
    lengths = starts.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=keys.device), lengths)
    index = owner[:, None, None].expand(keys.shape)
    shape = (len(lengths), *keys.shape[1:])
    low = torch.empty(shape, dtype=keys.dtype, device=keys.device)
    low.scatter_reduce_(0, index, keys, "amin", include_self=False)
    high = torch.empty_like(low).scatter_reduce_(0, index, keys, "amax", include_self=False)
    return low.transpose(0, 1).contiguous(), high.transpose(0, 1).contiguous()


def score(queries: Tensor, low: Tensor, high: Tensor, lengths: Tensor) -> Tensor:
    """Block scores [L, Hkv, B] of queries [L, Hq, D] and summaries [L, Hkv, B, D].

    Per query head a softmax over blocks weighted by their length, summed over the group.
    """
    layers, kv_heads, _, dim = low.shape
    grouped = queries.view(layers, kv_heads, -1, dim)
    positive, negative = grouped.clamp_min(0), grouped.clamp_max(0)
    raw = positive @ high.transpose(-1, -2) + negative @ low.transpose(-1, -2)
    logits = raw.float() * dim**-0.5 + lengths.log()
    return (logits.softmax(-1) / lengths).sum(dim=2)


def protect(scores: Tensor, starts: Tensor, num_tokens: int) -> Tensor:
    """Scores by which blocks with sinks or recent tokens come first, whole, in both ways."""
    first, last = starts[:-1], starts[1:]
    kept = (first < SINKS) | (last > num_tokens - RECENT)
    return scores.masked_fill(kept, float("inf"))


def choose_naive(scores: Tensor, starts: Tensor, budget: int) -> Tensor:
    """[L, Hkv, n] by a serial loop over layers and heads, padded where a list is short."""
    layers, heads, _ = scores.shape
    lists: list[Tensor] = []
    for layer in range(layers):
        for head in range(heads):
            order = scores[layer, head].sort(descending=True, stable=True).indices
            begins, ends = starts[:-1][order], starts[1:][order]
            covered = (ends - begins).cumsum(0)
            count = int((covered < budget).sum()) + 1
            lengths = (ends - begins)[:count]
            shift = begins[:count] - (covered[:count] - lengths)
            ragged = torch.repeat_interleave(shift, lengths)
            ragged += torch.arange(len(ragged), device=scores.device)
            lists.append(ragged[:budget].sort().values)
    padded = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)
    return padded.view(layers, heads, -1)


def choose_vectorised(scores: Tensor, starts: Tensor, budget: int) -> Tensor:
    """[L, Hkv, n] for all layers and heads at once (V2F)."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    lengths = starts.diff()[order]
    covered = lengths.cumsum(-1)
    slots = torch.arange(budget, device=scores.device).expand(*scores.shape[:2], budget)
    rank = torch.searchsorted(covered, slots.contiguous(), right=True)
    before = covered.gather(-1, rank) - lengths.gather(-1, rank)
    tokens = starts[:-1][order.gather(-1, rank)] + slots - before
    return tokens.sort(dim=-1).values


def _shared_tokens(found: Tensor, expected: Tensor) -> float:
    """Share of `expected` that `found` holds too, per head on average."""
    size = int(expected.max()) + 1
    marks = torch.zeros(*expected.shape[:2], size, dtype=torch.bool, device=expected.device)
    marks.scatter_(-1, expected.long(), True)
    inside = found.long().clamp(max=size - 1)
    return float(marks.gather(-1, inside).float().mean())


def _point(context: Context, shape: Shape, tokens: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if context.on_gpu else torch.float32
    synchronize = torch.cuda.synchronize if context.on_gpu else lambda: None
    heads, dim, budget = shape.num_kv_heads, shape.head_dim, int(tokens * context.arguments.ratio)
    buffers = context.buffers()
    session = ""
    try:
        pool = buffers.allocate(dtype, 2, tokens + shape.num_layers, heads, dim)
        pool.tensor.normal_()
        queries = buffers.allocate(dtype, shape.num_layers, 1, shape.num_query_heads, dim)
        queries.tensor.normal_()
        chosen = buffers.allocate(torch.int32, shape.num_layers, heads, budget)
        synchronize()
        layers = range(shape.num_layers)
        stored = open_session(
            context.client,
            shape,
            long_ids(tokens, context.arguments.cache),
            *(
                [pool.part((kind, layer), tokens, heads, dim) for layer in layers]
                for kind in (0, 1)
            ),
            residence="any",
            room=0,
        )
        session = stored.session_id
        starts = torch.from_numpy(stored.block_starts.copy()).to(context.device, torch.int64)
        lengths = starts.diff().float()
        summaries = [summarise(pool.tensor[0, layer : layer + tokens], starts) for layer in layers]
        low, high = (torch.stack([entry[kind] for entry in summaries]) for kind in (0, 1))
        step = Step(
            session,
            queries.part((0,), shape.num_layers, 1, shape.num_query_heads, dim),
            tokens_per_head=budget,
            token_region=chosen.place,
        )
        request = context.client.select_request([step])
        answers: list[Any] = []
        results: dict[str, Tensor] = {}

        def scored() -> Tensor:
            scores = score(queries.tensor[:, 0], low, high, lengths)
            return protect(scores, starts, tokens)

        def timed(name: str, work: Any, repeats: int) -> float:
            def whole() -> None:
                results[name] = work()
                synchronize()

            whole()
            return wall_seconds(whole, repeats)

        def ask() -> Tensor:
            answers.append(context.client.select_message(request))
            return chosen.tensor

        with torch.inference_mode():
            scoring = timed("scores", scored, 10)
            naive = timed("naive", lambda: choose_naive(scored(), starts, budget), 3)
            vectorised = timed(
                "vectorised", lambda: choose_vectorised(scored(), starts, budget), 10
            )
            service = timed("service", ask, 30)
        if not torch.equal(results["naive"], results["vectorised"]):
            raise AssertionError("naive and vectorised selections differ")
        device = sorted(answer.device_seconds for answer in answers)[len(answers) // 2]
        return {
            "tokens": tokens,
            "blocks": len(starts) - 1,
            "budget": budget,
            "score_seconds": scoring,
            "naive_seconds": naive,
            "vectorised_seconds": vectorised,
            "service_seconds": service,
            "service_device_seconds": device,
            "naive_over_vectorised_selection": (naive - scoring) / max(1e-9, vectorised - scoring),
            "naive_over_service": naive / service,
            "tokens_shared_with_service": _shared_tokens(results["service"], results["naive"]),
        }
    finally:
        if session:
            context.client.release(session)
        buffers.close()


def run(context: Context) -> dict[str, Any]:
    """One length, or two on a GPU."""
    arguments = context.arguments
    shape = TINY if arguments.tiny else LLAMA_8B
    return {"rows": [_point(context, shape, arguments.tokens)], "layers": shape.num_layers}


def table(result: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [
        f"selection of one step, {result['layers']} layers, one sequence; ms, host and device "
        "together, scoring included",
        f"{'T':>7} {'blocks':>6} {'n':>6} {'naive':>9} {'vector.':>8} {'service':>8} "
        f"{'(device)':>8} | {'scoring':>8} {'naive/vector. w/o scoring':>25} {'naive/service':>13} "
        f"{'same':>5}",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['tokens']:7} {row['blocks']:6} {row['budget']:6} "
            f"{row['naive_seconds'] * 1e3:9.2f} {row['vectorised_seconds'] * 1e3:8.2f} "
            f"{row['service_seconds'] * 1e3:8.2f} {row['service_device_seconds'] * 1e3:8.2f} | "
            f"{row['score_seconds'] * 1e3:8.2f} {row['naive_over_vectorised_selection']:25.1f} "
            f"{row['naive_over_service']:13.1f} {row['tokens_shared_with_service']:5.1%}"
        )
    return lines

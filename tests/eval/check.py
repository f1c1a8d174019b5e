# SPDX-License-Identifier: Apache-2.0
"""Same tokens: reading all tokens through a session must not change what the model says.

SmolLM2-135M over real texts. Each way of reading is fed the tokens of the plain run, so that every
step is judged on its own; where no step differs, free-running greedy tokens are equal, too. In fp32
no step may differ. In bf16, where logits of 16 and more are 1/8 apart, a step may differ if the
plain run's two best logits are at most two such steps (0.25) apart; those are counted as ties.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention import (
    Attention,
    FullAttention,
    GatheredAttention,
    MappedAttention,
    Options,
    SessionAttention,
    open_session,
)
from runtime import Context, DecodeLoop
from texts import text_ids
from torch_llama import TorchLlama, attend_prompt

TIE_GAP = {torch.float32: 0.0, torch.bfloat16: 0.25}
SMALL_BUDGET = 0.1  # of the tokens: not judged, shows what a real model's steps have in common


@dataclasses.dataclass
class _Prompt:
    ids: np.ndarray
    keys: list[Tensor]  # [T, Hkv, D] a layer
    values: list[Tensor]
    queries: Tensor  # [L, Hq, D], the last token's
    first: Tensor  # int64 [1]


@torch.inference_mode()
def _prefill(model: TorchLlama, ids: np.ndarray) -> _Prompt:
    keys: list[Tensor] = []
    values: list[Tensor] = []
    queries: list[Tensor] = []

    def keep(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        queries.append(q[-1].clone())
        keys.append(k.contiguous())
        values.append(v.contiguous())

    tokens = torch.from_numpy(ids).to(model.device, torch.int64)
    positions = torch.arange(len(ids), device=model.device)
    hidden = model.hidden_states(tokens, positions, attend_prompt(keep))
    first = model.logits(hidden[-1:]).argmax(dim=-1)
    return _Prompt(ids, keys, values, torch.stack(queries), first)


def _plain(model: TorchLlama, prompt: _Prompt, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs (int64 [1]) and logits (fp32 [vocab]) of every step."""
    attention = FullAttention(model.shape, 1, len(prompt.ids), steps, prompt.keys[0])
    for layer, (keys, values) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
        attention.load(0, layer, keys, values)
    loop = DecodeLoop(model, attention, prompt.first, len(prompt.ids), graphs=False)
    inputs, logits = [], []
    for _ in range(steps):
        inputs.append(loop.tokens.clone())
        loop.step()
        assert loop.logits is not None
        logits.append(loop.logits[0].float())
    return inputs, logits


def _compare(
    model: TorchLlama,
    prompt: _Prompt,
    attention: Attention,
    inputs: list[Tensor],
    expected: list[Tensor],
) -> dict[str, Any]:
    loop = DecodeLoop(model, attention, prompt.first, len(prompt.ids), graphs=False)
    equal = ties = wrong = 0
    difference = 0.0
    for token, reference in zip(inputs, expected, strict=True):
        loop.tokens.copy_(token)
        loop.step()
        assert loop.logits is not None
        found = loop.logits[0].float()
        difference = max(difference, float((found - reference).abs().max()))
        if int(found.argmax()) == int(reference.argmax()):
            equal += 1
            continue
        best = reference.topk(2).values
        if float(best[0] - best[1]) <= TIE_GAP[model.dtype]:
            ties += 1
        else:
            wrong += 1
    return {"equal": equal, "ties": ties, "wrong": wrong, "max_logit_difference": difference}


def _ways(context: Context) -> dict[str, tuple[str, Callable[..., SessionAttention]]]:
    """Residence and backend by name."""
    engine = context.engine
    if engine is None:
        return {"gathered": ("any", GatheredAttention)}
    return {
        "resident": ("device", lambda *args: MappedAttention(*args, engine)),
        "offloaded": ("host", lambda *args: GatheredAttention(*args, engine)),
    }


def _run_way(
    context: Context,
    model: TorchLlama,
    prompt: _Prompt,
    plain: tuple[list[Tensor], list[Tensor]],
    way: str,
    options: Options,
) -> dict[str, Any]:
    residence, backend = _ways(context)[way]
    steps = len(plain[0])
    buffers = context.buffers()
    rows = prompt.keys[0].shape
    shared = buffers.allocate(model.dtype, 2, model.shape.num_layers, *rows)
    shared.tensor.copy_(torch.stack([torch.stack(prompt.keys), torch.stack(prompt.values)]))
    if shared.tensor.is_cuda:
        torch.cuda.synchronize()
    layers = range(model.shape.num_layers)
    session = open_session(
        context.client,
        model.shape,
        prompt.ids,
        *([shared.part((kind, layer), *rows) for layer in layers] for kind in range(2)),
        residence=residence,
        room=steps + options.append_every,
    ).session_id
    attention = backend(
        context.client,
        buffers,
        model.shape,
        [session],
        len(prompt.ids),
        prompt.keys[0],
        options,
        steps + options.append_every,
    )
    try:
        if not options.exact:
            attention.prime(prompt.queries[None])
        result = _compare(model, prompt, attention, *plain)
        times = attention.times
        result["moved_share"] = times.moved_rows / max(1, times.chosen_rows)
        return result
    finally:
        attention.close()
        context.client.release(session)
        buffers.close()


def _readings(context: Context, with_small: bool) -> Iterator[tuple[str, Options]]:
    """Ways and options: all tokens, speculatively and exactly; and few of them."""
    tokens = context.arguments.check_tokens
    for way in _ways(context):
        yield way, Options()
        yield way, Options(exact=True)
        if with_small:
            yield way, Options(budget=max(64, int(SMALL_BUDGET * tokens)))


def run(context: Context) -> dict[str, Any]:
    """All texts, ways and types; `passed` says whether every judged step agreed."""
    arguments = context.arguments
    types = [torch.float32, torch.bfloat16] if context.on_gpu else [torch.float32]
    rows = []
    for dtype in types:
        model = TorchLlama.from_numpy(context.smollm2, context.device, dtype, 8192)
        for kind in arguments.texts.split(","):
            prompt = _prefill(model, text_ids(kind, arguments.cache)[: arguments.check_tokens])
            plain = _plain(model, prompt, arguments.check_steps)
            for way, options in _readings(context, with_small=dtype == types[-1]):
                row = {
                    "text": kind,
                    "dtype": str(dtype).removeprefix("torch."),
                    "way": way,
                    "mode": "exact" if options.exact else "speculative",
                    "budget": str(options.budget or "all"),
                }
                rows.append(row | _run_way(context, model, prompt, plain, way, options))
    judged = [row for row in rows if row["budget"] == "all"]
    return {"rows": rows, "passed": all(row["wrong"] == 0 for row in judged)}


def table(result: dict[str, Any]) -> list[str]:
    """For people: texts summed up."""
    lines = [
        "same tokens (SmolLM2-135M, each step fed the plain run's token; sums over the texts)",
        f"{'type':9} {'way':10} {'mode':12} {'budget':>6} {'texts':>5} {'equal':>5} {'ties':>4} "
        f"{'wrong':>5} {'max dlogit':>10} {'moved':>6}",
    ]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        key = tuple(row[name] for name in ("dtype", "way", "mode", "budget"))
        groups.setdefault(key, []).append(row)
    for (dtype, way, mode, budget), rows in groups.items():
        counts = " ".join(
            f"{sum(row[name] for row in rows):{width}}"
            for name, width in (("equal", 5), ("ties", 4), ("wrong", 5))
        )
        lines.append(
            f"{dtype:9} {way:10} {mode:12} {budget:>6} {len(rows):5} {counts} "
            f"{max(row['max_logit_difference'] for row in rows):10.2e} "
            f"{sum(row['moved_share'] for row in rows) / len(rows):6.1%}"
        )
    lines.append("passed" if result["passed"] else "FAILED: steps differ with all tokens read")
    return lines

# SPDX-License-Identifier: Apache-2.0
"""Which tokens the presses of kvpress keep of a prompt; they run unchanged on a stand-in module.

A press sees an attention module whose query projection hands back the prompt's own queries before
RoPE (turned back from those after it), and the model's rotary tables.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from typing import Any

import torch
from torch import Tensor

from torch_llama import TorchLlama

from .engine import Prefill, attend_whole

CHUNK_LENGTH = 20
_REPEAT = "\n\nRepeat the previous context exactly."
_REPEAT_ON = "\n\nRepeat the part of the previous context exactly, starting with"


def available() -> str:
    """Empty if presses can run here; otherwise why not."""
    try:
        _press("snapkv", 0.5)
    except ImportError as error:
        return f"{error}"
    return ""


def _kvpress() -> None:
    """Makes kvpress.presses.* importable without the package's own imports (data sets)."""
    if "kvpress" in sys.modules:
        return
    spec = importlib.util.find_spec("kvpress")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("kvpress is not installed")
    package = types.ModuleType("kvpress")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["kvpress"] = package


def _press(name: str, removed: float) -> Any:
    _kvpress()
    from kvpress.presses.chunkkv_press import ChunkKVPress
    from kvpress.presses.expected_attention_press import ExpectedAttentionPress
    from kvpress.presses.keydiff_press import KeyDiffPress
    from kvpress.presses.kvzip_press import KVzipPress
    from kvpress.presses.snapkv_press import SnapKVPress

    logging.getLogger("kvpress").setLevel(logging.ERROR)
    if name == "chunkkv":
        return ChunkKVPress(SnapKVPress(removed), chunk_length=CHUNK_LENGTH)
    classes = {
        "snapkv": SnapKVPress,
        "expected_attention": ExpectedAttentionPress,
        "keydiff": KeyDiffPress,
        "kvzip": KVzipPress,
    }
    return classes[name](compression_ratio=removed)


class Judge:
    """Runs presses on one prompt; each scores it once, whatever the shares."""

    def __init__(self, model: TorchLlama, past: Prefill, tokenizer: Any) -> None:
        """Of a prefill; `tokenizer` is needed by kvzip."""
        self._model, self._past, self._tokenizer = model, past, tokenizer
        self._scores: dict[str, Tensor] = {}
        shape = model.shape
        self._config = types.SimpleNamespace(
            num_attention_heads=shape.num_query_heads,
            num_key_value_heads=shape.num_kv_heads,
            num_hidden_layers=shape.num_layers,
            hidden_size=shape.embedding_dim,
            head_dim=shape.head_dim,
            _attn_implementation="sdpa",
        )

    @torch.inference_mode()
    def kept(self, name: str, share: float) -> Tensor:
        """Bool [L, Hkv, T]."""
        removed = 1.0 - share
        shape, tokens = self._model.shape, self._past.num_tokens
        size = (shape.num_layers, shape.num_kv_heads, tokens)
        if removed <= 0:
            return torch.ones(size, dtype=torch.bool, device=self._model.device)
        press = _press(name, removed)
        if name == "kvzip":
            return self._pruned(press)
        if name == "chunkkv":
            return self._chunks(removed)
        from kvpress.utils import compute_n_kept

        # As ScorerPress.compress: the highest scores of every head.
        scores = self._scored(name, press)
        best = scores.topk(compute_n_kept(tokens, removed), dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)

    def _scored(self, name: str, press: Any) -> Tensor:
        """[L, Hkv, T]."""
        if name not in self._scores:
            layers = range(self._model.shape.num_layers)
            found = [press.score(*self._arguments(layer))[0] for layer in layers]
            self._scores[name] = torch.stack(found)
        return self._scores[name]

    def _chunks(self, removed: float) -> Tensor:
        """ChunkKV over SnapKV's scores, on the host: the press loops over its chunks."""
        from kvpress.presses.chunkkv_press import ChunkKVPress
        from kvpress.presses.scorer_press import ScorerPress

        class Given(ScorerPress):  # type: ignore[misc]
            """A press that was asked before."""

            def score(self, module: Any, *_: Any) -> Tensor:
                scores: Tensor = module.scores
                return scores

        press = ChunkKVPress(Given(removed), chunk_length=CHUNK_LENGTH)
        scores = self._scored("snapkv", _press("snapkv", removed)).cpu()
        mask = torch.zeros_like(scores, dtype=torch.bool)
        # Row t of every head holds the number t: what comes back are the kept tokens.
        number = torch.arange(scores.shape[-1]).view(1, 1, -1, 1).expand(1, scores.shape[1], -1, 1)
        for own, kept in zip(scores, mask, strict=True):
            module = types.SimpleNamespace(head_dim=1, scores=own[None])
            moved, _ = press.compress(module, None, number, number, None, {})
            kept.scatter_(-1, moved[0, :, :, 0], True)
        return mask.to(self._model.device)

    def _module(self, layer: int) -> Any:
        def rotary(_like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = self._model.rotation(positions[0])
            return cos[None], sin[None]

        return types.SimpleNamespace(
            q_proj=torch.nn.Identity(),
            head_dim=self._model.shape.head_dim,
            layer_idx=layer,
            config=self._config,
            rotary_emb=rotary,
        )

    def _arguments(self, layer: int) -> tuple[Any, ...]:
        past = self._past
        positions = torch.arange(past.num_tokens, device=self._model.device)
        hidden = self._before_rope(past.queries[layer], positions)
        keys, values = (
            part[layer].float().transpose(0, 1)[None] for part in (past.keys, past.values)
        )
        return self._module(layer), hidden, keys, values, None, self._tables(positions)

    def _tables(self, positions: Tensor) -> dict[str, Any]:
        cos, sin = self._model.rotation(positions)
        return {"position_embeddings": (cos[None], sin[None])}

    def _before_rope(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [1, N, Hq * D] that project to those queries [N, Hq, D] before RoPE."""
        cos, sin = (part[:, None] for part in self._model.rotation(positions))
        exact = queries.float()
        low, high = exact.chunk(2, dim=-1)
        return (exact * cos - torch.cat((-high, low), -1) * sin).reshape(1, len(queries), -1)

    def _pruned(self, press: Any) -> Tensor:
        """The press's own global choice, of scores that it gave once."""
        shape, device = self._model.shape, self._model.device
        if "kvzip" not in self._scores:
            self._scores["kvzip"] = self._repetition_scores(press)
        press.score_val = self._scores["kvzip"].clone()
        modules = [self._module(layer) for layer in range(shape.num_layers)]
        layers = [types.SimpleNamespace(self_attn=module) for module in modules]
        press.compress_post(types.SimpleNamespace(model=types.SimpleNamespace(layers=layers)))
        size = (shape.num_layers, shape.num_kv_heads, self._past.num_tokens)
        masks = torch.ones(size, dtype=torch.bool)
        for mask, module in zip(masks, modules, strict=True):
            _, heads, positions = module.masked_key_indices
            mask[heads, positions] = False
        return masks.to(device)

    def _repetition_scores(self, press: Any) -> Tensor:
        """[L, 1, Hkv, T]: the model repeats its context; scores are the press's own."""
        past, shape, device = self._past, self._model.shape, self._model.device
        tokens = past.num_tokens
        size = (shape.num_layers, 1, shape.num_kv_heads, tokens)
        press.score_val = torch.zeros(size, device=device)
        press.context_length, press.prefix_length, press.start_idx = tokens, 0, 0
        suffix = self._tokenizer.encode("\n")
        for begin in range(0, tokens, press.chunk_size):
            chunk = past.token_ids[begin : begin + press.chunk_size]
            prompt = self._tokenizer.encode(_REPEAT_ON if begin else _REPEAT)
            before = past.token_ids[max(0, begin - 8) : begin]
            words = torch.tensor(prompt, device=device), before, torch.tensor(suffix, device=device)
            press.start_idx, press.end_idx = begin, begin + len(chunk)
            self._repeat(press, torch.cat((*words, chunk)))
        scores: Tensor = press.score_val
        return scores

    def _repeat(self, press: Any, ids: Tensor) -> None:
        past = self._past
        positions = torch.arange(len(ids), device=ids.device) + past.num_tokens

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys = torch.cat((past.keys[layer], k))
            values = torch.cat((past.values[layer], v))
            hidden = self._before_rope(q, positions)
            parts = (part.float().transpose(0, 1)[None] for part in (keys, values))
            press.score_kvzip(self._module(layer), hidden, *parts, None, self._tables(positions))
            return attend_whole(q, keys, values)

        self._model.hidden_states(ids, positions, attend)

# SPDX-License-Identifier: Apache-2.0
"""Runs the model over one text and keeps what a capture holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from dynsplit.capture import CaptureError
from dynsplit.capture.container import FORMAT
from dynsplit.capture.llama import Array, LlamaConfig, LlamaModel
from dynsplit.capture.sources import MODEL_NAME, MODEL_WEIGHTS, TextSource
from dynsplit.capture.tokenizer import GgufTokenizer


@dataclasses.dataclass(frozen=True)
class Capture:
    """Tensors and metadata in the form `container.write_tensors` takes."""

    tensors: dict[str, npt.NDArray[Any]]
    metadata: dict[str, str]
    perplexity: float


def _model_json(config: LlamaConfig, layer_ids: Sequence[int]) -> str:
    return json.dumps(
        {
            "name": MODEL_NAME,
            "total_layers": config.num_layers,
            "layer_ids": list(layer_ids),
            "num_query_heads": config.num_query_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rope": {
                "theta": config.rope_theta,
                "rotary_dim": config.rotary_dim,
                "interleaved": False,
            },
            "vocab_size": config.vocab_size,
            "weights": MODEL_WEIGHTS,
        }
    )


def _text_json(source: TextSource) -> str:
    return json.dumps(
        {
            "kind": source.kind,
            "title": source.title,
            "source": source.source,
            "licence": source.licence,
        }
    )


def _token_tensors(
    tokenizer: GgufTokenizer, token_ids: npt.NDArray[np.int32]
) -> dict[str, npt.NDArray[Any]]:
    pieces = [tokenizer.token_bytes(int(token)) for token in token_ids]
    offsets = np.zeros(len(pieces) + 1, np.int32)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    return {
        "token_ids": token_ids,
        "token_bytes": np.frombuffer(b"".join(pieces), np.uint8),
        "token_offsets": offsets,
    }


def record(
    model: LlamaModel,
    tokenizer: GgufTokenizer,
    source: TextSource,
    text: str,
    num_tokens: int,
    layer_ids: Sequence[int],
    num_queries: int | None,
    on_layer: Callable[[], None],
) -> Capture:
    """Captures the first `num_tokens` tokens of `text`.

    Args:
        model: the model to run.
        tokenizer: its tokenizer.
        source: what `text` is; copied into the metadata.
        text: the text, long enough for `num_tokens`.
        num_tokens: T, 2 .. the model's context length.
        layer_ids: model layers to keep, ascending.
        num_queries: W, the last positions whose queries are kept, at most T; None keeps all.
        on_layer: called after each model layer, for progress.

    Raises:
        CaptureError: the text is too short, or an argument is out of range.
    """
    limit = model.config.context_length
    if not 2 <= num_tokens <= limit:
        raise CaptureError(f"--tokens is {num_tokens}, must be 2..{limit}")
    window = num_tokens if num_queries is None else num_queries
    if not 1 <= window <= num_tokens:
        raise CaptureError(f"--queries is {window}, must be 1..{num_tokens}")
    ids = np.array(tokenizer.encode(text), np.int32)
    if len(ids) < num_tokens:
        raise CaptureError(f"the {source.kind} text has {len(ids)} tokens, not {num_tokens}")
    ids = ids[:num_tokens]

    tensors = _token_tensors(tokenizer, ids)
    tensors["query_positions"] = np.arange(num_tokens - window, num_tokens, dtype=np.int32)
    slot_of_layer = {layer: slot for slot, layer in enumerate(layer_ids)}

    def keep(layer: int, q: Array, k: Array, v: Array) -> None:
        slot = slot_of_layer.get(layer)
        if slot is not None:
            tensors[f"layers.{slot}.key"] = k.astype(ml_dtypes.bfloat16)
            tensors[f"layers.{slot}.value"] = v.astype(ml_dtypes.bfloat16)
            tensors[f"layers.{slot}.query"] = q[-window:].astype(ml_dtypes.bfloat16)
        on_layer()

    hidden = model.hidden_states(ids, keep)
    perplexity = model.perplexity(hidden, ids)
    metadata = {
        "dynsplit.format": FORMAT,
        "dynsplit.model": _model_json(model.config, layer_ids),
        "dynsplit.text": _text_json(source),
        "dynsplit.perplexity": f"{perplexity:.3f}",
    }
    return Capture(tensors=tensors, metadata=metadata, perplexity=perplexity)

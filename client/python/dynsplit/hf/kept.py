# SPDX-License-Identifier: Apache-2.0
"""One-shot compression of the prefill cache, and generation over what was kept.

Shapes: B sequences, Hq query heads, Hkv KV heads, T prompt tokens, n kept, D head dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from dynsplit.calls import OnError
from dynsplit.client import Client
from dynsplit.hf.hook import (
    Attend,
    ModelHook,
    causal_mask,
    check_unpadded,
    query_length_of,
    rope_of,
)
from dynsplit.results import Compressed
from dynsplit.tensors import is_torch, to_torch
from dynsplit.v1 import types_pb2

_SHIFT = "_dynsplit_shift"  # attribute of a cache: positions that contiguous keys have moved down


class KeptLayer(DynamicLayer):
    """Rows that were kept, and those generated since.

    It says the length of the sequence as the model counts it, tokens that are gone included; the
    rows it holds are the newest ones of the mask.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, num_dropped: int) -> None:
        """Of [B, Hkv, n, D]; `num_dropped` = T - n."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.num_dropped = keys, values, num_dropped

    def get_seq_length(self) -> int:
        """T and what came after it."""
        return int(self.keys.shape[-2]) + self.num_dropped

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Rows with the query's own, and the place of the first one if they ended at the end."""
        return int(self.keys.shape[-2]) + query_length_of(query_length), self.num_dropped


class Compression(ModelHook):
    """What `compress` yields.

    Attributes:
        results: of the last prompt, one `Compressed` a sequence of its batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        client: Client,
        policy: types_pb2.Policy | str | None,
        num_queries: int,
        on_error: OnError | None,
    ) -> None:
        """See `compress`."""
        super().__init__(model)
        self.results: list[Compressed] = []
        self._client, self._policy, self._on_error = client, policy, on_error
        self._num_queries = num_queries
        self._rope = rope_of(model)
        self._queries: dict[int, torch.Tensor] | None = None  # by layer, while a prompt is computed

    def before(self, kwargs: dict[str, Any]) -> None:
        """A prompt begins, or positions of contiguous keys are counted on."""
        cache = kwargs.get("past_key_values")
        length = cache.get_seq_length() if cache is not None else 0
        self._queries = None
        if length == 0:
            if kwargs.get("use_cache") is not False:
                check_unpadded(kwargs)
                self._queries = {}
            return
        shift = getattr(cache, _SHIFT, 0)
        if not shift:
            return
        ids = kwargs.get("input_ids")
        new = kwargs["inputs_embeds"] if ids is None else ids
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(length, length + new.shape[1], device=new.device)[None]
        kwargs["position_ids"] = positions - shift

    def attend(
        self,
        inner: Attend,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Remembers a prompt's last queries; makes masks fit layers that keep more than others."""
        if self._queries is not None:
            layer: Any = module.layer_idx
            self._queries[layer] = query[:, :, -self._num_queries :].detach()
        elif mask is not None and mask.shape[-1] != key.shape[2]:
            mask = causal_mask(query, key.shape[2], mask)
        return inner(module, query, key, value, mask, **kwargs)

    def after(self, kwargs: dict[str, Any], output: Any) -> None:
        """Compresses the prompt's cache in place."""
        queries, self._queries = self._queries, None
        cache = getattr(output, "past_key_values", None)
        if not queries or not isinstance(cache, Cache):
            return
        layers = [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
        if not layers or cache.layers[layers[0]].keys.shape[-2] < 2:
            return
        self.results = self._compress(cache, layers, queries, kwargs.get("input_ids"))
        if any(result.contiguous for result in self.results):
            _note_shift(cache, layers, self.results)
        for slot, layer in enumerate(layers):
            cache.layers[layer] = _kept(slot, self.results, cache.layers[layer].keys)

    def _compress(
        self,
        cache: Cache,
        layers: list[int],
        queries: dict[int, torch.Tensor],
        token_ids: torch.Tensor | None,
    ) -> list[Compressed]:
        found = []
        for sequence in range(cache.layers[layers[0]].keys.shape[0]):
            found.append(
                self._client.compress(
                    None if token_ids is None else token_ids[sequence].cpu().numpy(),
                    # Views: rows travel head by head, as the cache has them.
                    [cache.layers[i].keys[sequence].transpose(0, 1) for i in layers],
                    [cache.layers[i].values[sequence].transpose(0, 1) for i in layers],
                    queries=[queries[i][sequence].transpose(0, 1) for i in layers],
                    policy=self._policy,
                    rope=self._rope,
                    on_error=self._on_error,
                )
            )
        return found


def _note_shift(cache: Cache, layers: list[int], results: list[Compressed]) -> None:
    """Positions go on at n: all layers of all sequences must have one n."""
    kept = {layer.num_kept for result in results for layer in result.layers}
    if len(kept) != 1 or len(layers) != len(cache.layers):
        raise ValueError(
            "contiguous positions need the same number of kept tokens in every layer; layers kept "
            f"{sorted(kept)} of them"
        )
    setattr(cache, _SHIFT, results[0].num_tokens - kept.pop())


def _kept(slot: int, results: Sequence[Compressed], like: torch.Tensor) -> KeptLayer:
    counts = {result.layers[slot].num_kept for result in results}
    if len(counts) != 1:
        raise ValueError(
            f"the batch's sequences kept {sorted(counts)} tokens: a policy with a quality floor "
            "takes one sequence at a time"
        )
    rows = [
        [part if is_torch(part) else to_torch(part) for part in result.layers[slot].decoded()]
        for result in results
    ]
    keys, values = (
        torch.stack([row[part].transpose(0, 1) for row in rows]).to(like.device, like.dtype)
        for part in range(2)
    )
    return KeptLayer(keys, values, results[0].num_tokens - counts.pop())


def cache_of(results: Sequence[Compressed], model: PreTrainedModel) -> DynamicCache:
    """A cache of what was kept, for a decode side that did not compute the prompt.

    Prompt and first token go into `generate` as they are: the cache says that the prompt is done.

        cache = cache_of([dynsplit.load("prompt.dskv")[0]], model)
        model.generate(prompt_and_first_token, past_key_values=cache)

    Args:
        results: one a sequence of the batch, all of one length and with original positions; arrays
            of numpy or of torch.
        model: whose type and device the cache takes.

    Raises:
        ValueError: contiguous positions (there the kept tokens are a prompt of their own), or
            another number of layers than the model has, or sequences that do not go together.
    """
    if any(result.contiguous for result in results):
        raise ValueError("keys are at contiguous positions: feed the kept tokens as the prompt")
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if {len(result.layers) for result in results} != {num_layers}:
        raise ValueError(f"the model has {num_layers} layers, the results others")
    if len({result.num_tokens for result in results}) != 1:
        raise ValueError("the sequences are of different lengths")
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    cache = DynamicCache()
    cache.layers = [_kept(slot, results, like) for slot in range(num_layers)]
    return cache


@contextlib.contextmanager
def compress(
    model: PreTrainedModel,
    client: Client,
    policy: types_pb2.Policy | str | None = None,
    *,
    num_queries: int = 64,
    on_error: OnError | None = None,
) -> Iterator[Compression]:
    """While open, caches of prompts go through the service, and generation goes on over the rest.

    Works for `model.generate` and for forwards with `use_cache`. With original positions the next
    token's position is T, with contiguous ones it is n; both are set here, so the context must stay
    open as long as its caches are used. Layers of sliding-window attention stay as they are. With a
    kept ratio of 1 generation is that of the plain model.

    Args:
        model: a causal language model of transformers 5.x.
        client: of the service.
        policy: see `dynsplit.policy`; None = the server's default.
        num_queries: last queries of the prompt that are sent as evidence.
        on_error: "passthrough": where the service is away, warn and go on with the full cache.

    Yields:
        Has the `results` of the last prompt: plan, receipt, bytes.

    Raises:
        RuntimeError: the model is in such a context already.
        ValueError: (in the forward) padded prompts; layers that kept different numbers of tokens
            where positions are contiguous, or sequences of a batch in any case.
        DynSplitError: (in the forward) as `Client.compress`.
    """
    hook = Compression(model, client, policy, num_queries, on_error)
    hook.install()
    try:
        yield hook
    finally:
        hook.remove()

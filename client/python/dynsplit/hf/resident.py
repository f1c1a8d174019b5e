# SPDX-License-Identifier: Apache-2.0
"""A cache whose prompt rests in the service; each step reads the rows that a session chooses.

Shapes: B sequences, L layers, Hq query heads, Hkv KV heads, n rows chosen a KV head, D head
dimension. The tail is what has been generated since the last append; the model holds it here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from dynsplit import errors, tensors
from dynsplit.calls import OnError
from dynsplit.client import Client
from dynsplit.hf.hook import Attend, ModelHook, causal_mask, check_unpadded, query_length_of
from dynsplit.session_calls import Gather, Selection, Step
from dynsplit.v1 import types_pb2

_MAX_QUERIES = 64  # of a step
_MESSAGE_BYTES = 4 << 20  # of an answer, where the server does not say
_ROW_FACT_BYTES = 24  # of a row beside its elements: scales, slot, token
_PROTECTED_TOKENS = 256  # by which sinks, recent tokens and the open block may raise a budget


class ResidentLayer(CacheLayerMixin):
    """The tail of one layer, and how many tokens lie before it in the sessions."""

    is_sliding = False

    def __init__(self) -> None:
        """Empty."""
        super().__init__()
        self.num_stored = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes type and device of [B, Hkv, t, D]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds to the tail; returns the tail."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def store(self) -> None:
        """The tail lies in the sessions now."""
        self.num_stored += int(self.keys.shape[-2])
        self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()

    def get_seq_length(self) -> int:
        """Tokens in the sessions and in the tail."""
        return self.num_stored + (int(self.keys.shape[-2]) if self.is_initialized else 0)

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """As if all rows were here; `SessionCache` makes the masks of chosen rows itself."""
        return self.get_seq_length() + query_length_of(query_length), 0

    def get_max_length(self) -> int:
        """No limit: what the sessions have no room for stays in the tail."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier 5.x

    def reset(self) -> None:
        """Refused: what lies in the sessions does not come back."""
        raise ValueError("a SessionCache is for one prompt; make a new one")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refused: sessions cannot be exchanged between beams."""
        raise ValueError("a SessionCache cannot follow beams; use num_beams=1")


class SessionCache(Cache):
    """`past_key_values` of one `generate`, or of several turns of one conversation.

    A context manager: sessions are opened after the prompt and released at the end.

        with SessionCache(model, client, index_policy(kept_ratio=0.1)) as cache:
            model.generate(**inputs, past_key_values=cache)

    Attributes:
        session_ids: one a sequence of the batch, once the prompt has been computed.
        chosen_rows: rows read so far, over layers, heads and steps.
        moved_rows: of them, those that had to be moved here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        client: Client,
        policy: types_pb2.Policy | str | None = None,
        *,
        tokens_per_head: int = 0,
        speculative: bool = False,
        append_every: int = 32,
        reserve_tokens: int = 1024,
        residence: str = "any",
        on_error: OnError = "raise",
    ) -> None:
        """Opens nothing yet.

        Args:
            model: a causal language model of transformers 5.x; in use only within the context.
            client: of the service.
            policy: see `dynsplit.index_policy`; without dense layers. None = the server's default.
            tokens_per_head: budget of a step; 0 = the policy's.
            speculative: choose rows of all layers in one call a step, by the queries of the step
                before, moving only rows that it did not read (all rows, in several calls, where
                those of all layers are more than one message of the server may hold); otherwise
                each layer chooses by its own queries, in a call of its own.
            append_every: tokens generated between appends; they are always read.
            reserve_tokens: room for generated tokens in the sessions; more stay here and are read.
            residence: see `Client.open`.
            on_error: "passthrough": where the service is away when the prompt has been computed,
                warn, keep K and V here and read all of them.

        Raises:
            ValueError: a policy with dense layers.
        """
        if isinstance(policy, types_pb2.Policy) and policy.protection.dense_layers:
            raise ValueError("a SessionCache cannot read dense layers")
        config = model.config.get_text_config(decoder=True)
        super().__init__(layers=[ResidentLayer() for _ in range(config.num_hidden_layers)])
        self._client, self._policy = client, policy
        self._options = {"residence": residence, "reserve_tokens": reserve_tokens}
        self._tokens_per_head, self._speculative = tokens_per_head, speculative
        self._append_every, self._on_error = append_every, on_error
        self._hook = _Reader(model, self)
        self._capacity = 0
        self._layers_a_call = config.num_hidden_layers
        self._ids: list[torch.Tensor] = []  # of the tail, [B, t] each
        self._queries: dict[int, torch.Tensor] = {}  # by layer, [B, Hq, W, D], of this forward
        self._slots: list[_Slots] = []  # by sequence: rows read in the next step (speculative)
        self.session_ids: list[str] = []
        self.chosen_rows = self.moved_rows = 0

    def __enter__(self) -> Self:
        """The cache itself; the model reads through it from now on."""
        self._hook.install()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Releases the sessions."""
        self._hook.remove()
        for session in self.session_ids:
            with contextlib.suppress(errors.DynSplitError):  # their leases end anyhow
                self._client.release(session)
        self.session_ids = []

    def begin(self, token_ids: torch.Tensor | None) -> None:
        """A forward over those tokens begins."""
        if token_ids is None:
            raise ValueError("a SessionCache needs input_ids")
        self._ids.append(token_ids.detach())
        self._queries = {}

    def rows_for(self, layer: int, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rows of the sessions for a layer's queries: two of [B, Hkv, n, D]; None = none stored."""
        self._queries[layer] = query[:, :, -_MAX_QUERIES:].detach()
        if not self.session_ids:
            return None
        if self._speculative:
            slots = self._slots
            parts = [(entry.keys[layer], entry.values[layer]) for entry in slots]
        else:
            parts = []
            for selection in self._select(layer, [self._queries[layer]], None):
                fresh = _Slots.of(selection, query)
                parts.append((fresh.keys[0], fresh.values[0]))
        keys, values = (torch.stack([row[part] for row in parts]) for part in range(2))
        return keys, values

    def end(self) -> None:
        """The forward is over: the prompt is stored, or the tail if it is long enough."""
        if self.get_seq_length() == 0:
            return
        if not self.session_ids:
            if self._capacity == 0:
                self._open()
        else:
            tail = int(self.layers[0].keys.shape[-2])
            if tail >= self._append_every and self.get_seq_length() <= self._capacity:
                self._append()
        if self._speculative and self.session_ids:
            self._read_ahead()

    def _open(self) -> None:
        ids = torch.cat(self._ids, dim=1).cpu().numpy()
        opened = []
        self._capacity = -1  # tried
        try:
            for sequence, tokens in enumerate(ids):
                stored = self._client.open(
                    tokens,
                    [layer.keys[sequence].transpose(0, 1) for layer in self.layers],
                    [layer.values[sequence].transpose(0, 1) for layer in self.layers],
                    num_query_heads=self._hook.config.num_attention_heads,
                    policy=self._policy,
                    **self._options,  # type: ignore[arg-type]
                )
                opened.append(stored.session_id)
                self._capacity = stored.info.capacity_tokens
                self._fit(stored.info)
        except errors.AWAY as error:
            for session in opened:
                with contextlib.suppress(errors.DynSplitError):
                    self._client.release(session)
            self._capacity = -1
            if self._on_error == "raise":
                raise
            warnings.warn(f"KV kept here: {error}", errors.PassthroughWarning, stacklevel=2)
            return
        self.session_ids = opened
        self._stored()

    def _append(self) -> None:
        ids = torch.cat(self._ids, dim=1).cpu().numpy()
        for sequence, session in enumerate(self.session_ids):
            self._client.append(
                session,
                self.layers[0].num_stored,
                ids[sequence],
                [layer.keys[sequence].transpose(0, 1) for layer in self.layers],
                [layer.values[sequence].transpose(0, 1) for layer in self.layers],
            )
        self._stored()

    def _stored(self) -> None:
        self._ids = []
        for layer in self.layers:
            layer.store()

    def _fit(self, info: types_pb2.SessionInfo) -> None:
        """Sets how many layers' rows go into one answer, whose size the server limits."""
        limit = self._client.server_info().limits.max_message_bytes or _MESSAGE_BYTES
        budget, tokens = info.policy.budget, info.capacity_tokens
        chosen = self._tokens_per_head or budget.tokens_per_head
        chosen = chosen or math.ceil(tokens * budget.kept_ratio)
        rows = info.shape.num_kv_heads * min(tokens, chosen + _PROTECTED_TOKENS)
        row_bytes = 2 * info.shape.head_dim * self.layers[0].keys.element_size() + _ROW_FACT_BYTES
        self._layers_a_call = max(1, limit // (rows * row_bytes))

    def _select(
        self, first_layer: int, queries: list[torch.Tensor], generations: list[int] | None
    ) -> list[Selection]:
        """Of layers from `first_layer` on; queries [B, Hq, W, D] each; a selection a session."""
        stacked = torch.stack(queries).permute(1, 0, 3, 2, 4)  # [B, layers, W, Hq, D]
        count, most = len(queries), self._layers_a_call
        steps = [
            Step(
                session,
                stacked[sequence, begin : begin + most].contiguous(),
                first_layer=first_layer + begin,
                tokens_per_head=self._tokens_per_head,
                # The server remembers the rows of a session's last call: of all layers, or of none.
                gather=Gather(generations[sequence] if generations and count <= most else 0),
            )
            for sequence, session in enumerate(self.session_ids)
            for begin in range(0, count, most)
        ]
        together, answers = max(1, most // count), []
        for begin in range(0, len(steps), together):
            answers += self._client.select(steps[begin : begin + together])
        pieces = -(-count // most)
        selections = [_join(answers[i : i + pieces]) for i in range(0, len(answers), pieces)]
        self.chosen_rows += sum(selection.chosen_rows for selection in selections)
        self.moved_rows += sum(selection.moved_rows for selection in selections)
        return selections

    def _read_ahead(self) -> None:
        queries = [self._queries[layer][:, :, -1:] for layer in range(len(self.layers))]
        generations = [entry.generation for entry in self._slots]
        selections = self._select(0, queries, generations or None)
        if not self._slots:
            self._slots = [_Slots.of(selection, queries[0]) for selection in selections]
            return
        for sequence, selection in enumerate(selections):
            if selection.tokens_per_head == self._slots[sequence].keys[0].shape[1]:
                self._slots[sequence].take(selection)
            else:  # of another length all rows have moved
                self._slots[sequence] = _Slots.of(selection, queries[0])


def _join(parts: list[Selection]) -> Selection:
    """Consecutive layers of one session as one selection."""
    if len(parts) == 1:
        return parts[0]
    return dataclasses.replace(
        parts[0],
        tokens=None,
        generation=0,
        moved_rows=sum(part.moved_rows for part in parts),
        chosen_rows=sum(part.chosen_rows for part in parts),
        moved=[rows for part in parts for rows in part.moved],
        held=np.concatenate([part.held for part in parts if part.held is not None]),
    )


class _Slots:
    """Rows of one session, [Hkv, n, D] a layer, slot by slot."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.keys, self.values, self.generation = keys, values, 0

    @classmethod
    def of(cls, selection: Selection, like: torch.Tensor) -> _Slots:
        """Of a selection in which all rows move; in ascending order of their tokens."""
        assert selection.held is not None
        shape = (*selection.held.shape[1:], like.shape[-1])
        layers = len(selection.held)
        slots = cls(
            *([like.new_empty(shape) for _ in range(layers)] for _ in range(2)),
        )
        slots.take(selection)
        return slots

    def take(self, selection: Selection) -> None:
        """Takes moved rows over."""
        self.generation = selection.generation
        for layer, rows in enumerate(selection.moved):
            head = torch.arange(len(rows.slots))[:, None]
            at = head, torch.from_numpy(rows.slots.astype(np.int64))
            for target, data, scales in (
                (self.keys[layer], rows.keys, rows.key_scales),
                (self.values[layer], rows.values, rows.value_scales),
            ):
                exact = tensors.to_torch(data)
                if scales is not None:  # they rest quantised
                    exact = exact.float() * tensors.to_torch(scales)[..., None]
                target[at] = exact.to(target.device, target.dtype)


class _Reader(ModelHook):
    """Puts the chosen rows before the tail in every attention call of the cache's forwards."""

    def __init__(self, model: PreTrainedModel, cache: SessionCache) -> None:
        super().__init__(model)
        self._cache = cache
        self._active = False

    def before(self, kwargs: dict[str, Any]) -> None:
        """Only forwards with the cache are its own."""
        self._active = kwargs.get("past_key_values") is self._cache
        if self._active:
            check_unpadded(kwargs)
            self._cache.begin(kwargs.get("input_ids"))

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
        """Over chosen rows and the tail."""
        if self._active:
            layer: Any = module.layer_idx
            rows = self._cache.rows_for(layer, query)
            if rows is not None:
                key = torch.cat([rows[0], key], dim=-2)
                value = torch.cat([rows[1], value], dim=-2)
                mask = causal_mask(query, key.shape[2], mask)
        return inner(module, query, key, value, mask, **kwargs)

    def after(self, kwargs: dict[str, Any], output: Any) -> None:
        """Stores what has become long enough."""
        if self._active:
            self._active = False
            self._cache.end()

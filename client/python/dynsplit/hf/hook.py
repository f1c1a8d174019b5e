# SPDX-License-Identifier: Apache-2.0
"""Forwards and attention calls of one model, seen and changed from outside.

While a hook is installed, the model's attention function is one of ours around the one it had, and
the model's forward is announced before and after. Attention functions are found by name in the
model's configuration, which is why the name is what changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynsplit.v1 import types_pb2

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

_PREFIX = "dynsplit_"
_installed: dict[int, ModelHook] = {}  # by identity of the modules' configuration


class ModelHook:
    """Base of what `compress` and `SessionCache` do to a model. One at a time on a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Installs nothing yet."""
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self._handles: list[Any] = []
        self._implementation = ""

    def install(self) -> None:
        """Begins to see calls.

        Raises:
            RuntimeError: the model has a hook already.
        """
        if id(self.config) in _installed:
            raise RuntimeError("the model is in another dynsplit context already")
        self._implementation = self.config._attn_implementation or "sdpa"
        self.config._attn_implementation = _interposed(self._implementation)
        _installed[id(self.config)] = self
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """The model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if _installed.pop(id(self.config), None) is not None:
            self.config._attn_implementation = self._implementation

    def before(self, kwargs: dict[str, Any]) -> None:
        """Before a forward; may change its arguments. `input_ids` is among them by name."""
        raise NotImplementedError

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
        """A layer's attention: query [B, Hq, q, D], key and value [B, Hkv, t, D] as the cache gave.

        Returns what `inner`, the model's own function, returns.
        """
        raise NotImplementedError

    def after(self, kwargs: dict[str, Any], output: Any) -> None:
        """After a forward."""
        raise NotImplementedError

    def _before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:  # only the first can be positional without ambiguity
            kwargs = {"input_ids": args[0], **kwargs}
        self.before(kwargs)
        return args[1:], kwargs

    def _after(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.after(kwargs, output)


def _interposed(implementation: str) -> str:
    """Name under which our function around that implementation is registered."""
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attention(
            module: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            inner = _function_of(implementation, module)
            hook = _installed.get(id(getattr(module, "config", None)))
            if hook is None:
                return inner(module, query, key, value, attention_mask, **kwargs)
            return hook.attend(inner, module, query, key, value, attention_mask, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register(name, attention)
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            masks = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, masks)
    return name


def _function_of(implementation: str, module: torch.nn.Module) -> Attend:
    if implementation == "eager":  # each modelling file has its own
        found: Attend = sys.modules[type(module).__module__].eager_attention_forward
        return found
    function: Attend = ALL_ATTENTION_FUNCTIONS[implementation]
    return function


def causal_mask(
    query: torch.Tensor, num_rows: int, like: torch.Tensor | None
) -> torch.Tensor | None:
    """Mask of queries that are the newest rows: all older rows are seen, newer ones not.

    Args:
        query: [B, Hq, q, D].
        num_rows: t >= q.
        like: a mask whose kind (bool, or added to logits) the result takes; None = bool.

    Returns:
        [1, 1, q, t]; None where nothing is hidden.
    """
    length = query.shape[2]
    if length == 1:
        return None
    seen = torch.ones(length, num_rows, dtype=torch.bool, device=query.device)
    seen = seen.tril(num_rows - length)[None, None]
    if like is None or like.dtype == torch.bool:
        return seen
    hidden = torch.finfo(like.dtype).min
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, hidden)


def query_length_of(given: int | torch.Tensor) -> int:
    """The argument of a layer's `get_mask_sizes`: earlier 5.x give the queries' positions."""
    return int(given.shape[0]) if isinstance(given, torch.Tensor) else given


def check_unpadded(kwargs: dict[str, Any]) -> None:
    """Refuses prompts with padding.

    Raises:
        ValueError: the attention mask hides tokens.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask.all()):
        raise ValueError("prompts are padded: compress prompts of one length at a time")


def rope_of(model: PreTrainedModel) -> types_pb2.Rope | None:
    """The rotation the model's keys carry, with the very frequencies it uses; None if not found."""
    for module in model.get_decoder().modules():
        frequencies = getattr(module, "inv_freq", None)
        if isinstance(frequencies, torch.Tensor) and frequencies.ndim == 1:
            parameters = model.config.get_text_config(decoder=True).rope_parameters
            return types_pb2.Rope(
                theta=float((parameters or {}).get("rope_theta") or 10000.0),
                rotary_dim=2 * len(frequencies),
                scaling=types_pb2.Rope.SCALING_TABLE,
                inverse_frequencies=frequencies.double().tolist(),
            )
    return None

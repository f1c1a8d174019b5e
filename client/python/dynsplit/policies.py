# SPDX-License-Identifier: Apache-2.0
"""Policies in words: the five choices of types.proto, each by its name there in lower case.

    policy("dynsplit", kept_ratio=0.2, profile="smollm2", positions="contiguous")
    policy("snapkv", tokens_per_head=512, encoding="float8_e4m3")

Whatever is left out is the preset's, or the server's default. `Client.policies()` lists presets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynsplit.v1 import types_pb2


def policy(
    preset: str = "",
    *,
    kept_ratio: float | None = None,
    tokens_per_head: int | None = None,
    output_bytes: int | None = None,
    budget: str | None = None,
    whole_blocks: bool | None = None,
    segmentation: str | None = None,
    block_size: int | None = None,
    max_deviation: int | None = None,
    balance: float | None = None,
    profile: str | None = None,
    scoring: str | None = None,
    num_window_queries: int | None = None,
    pooling_kernel: int | None = None,
    pooling: str | None = None,
    block_reduction: str | None = None,
    query_reduction: str | None = None,
    lse_base: str | None = None,
    softmax_scale: float | None = None,
    refinement_factor: int | None = None,
    transform: str | None = None,
    encoding: str | None = None,
    key_encoding: str | None = None,
    value_encoding: str | None = None,
    scale_granularity: str | None = None,
    num_sink_tokens: int | None = None,
    num_recent_tokens: int | None = None,
    pinned: Sequence[tuple[int, int]] = (),
    dense_layers: Sequence[int] = (),
    scope: str | None = None,
    positions: str | None = None,
    min_retained_attention_mass: float | None = None,
    max_output_relative_error: float | None = None,
    max_expected_divergence: float | None = None,
    max_kept_ratio: float | None = None,
    allow_fallback: bool = False,
    page_size: int | None = None,
) -> types_pb2.Policy:
    """A policy; ranges and defaults are those of types.proto, and checked by the server.

    Args:
        preset: row of `Client.policies()`, such as "dynsplit" or "snapkv".
        kept_ratio: target, share of the tokens in (0, 1]; or
        tokens_per_head: target, tokens per KV head; or
        output_bytes: target, bytes of all pages with scales.
        budget: how layers and heads share it: "uniform", "pyramid", "ada", "head_roles".
        whole_blocks: the target counts whole blocks.
        segmentation: "none", "fixed", "delimiter_set", "dynamic".
        block_size: base block size, tokens.
        max_deviation: dynamic: largest deviation from it, tokens.
        balance: dynamic: weight of delimiters against closeness to the ideal end, in [0, 1].
        profile: delimiter profile of the tokenizer.
        scoring: "window_queries", "accumulated", "recency", "key_norm", "key_difference",
            "block_bound", "block_mean_key".
        num_window_queries: queries used of those supplied.
        pooling_kernel: smoothing over tokens, odd; 1 = none.
        pooling: "average" or "max".
        block_reduction: token scores to block score: "mean", "sum", "max".
        query_reduction: attention of the window's queries to token score: "mean" or
            "root_mean_square".
        lse_base: base of supplied log-sum-exp: "e" or "2".
        softmax_scale: multiplies q.k; default 1 / sqrt(D).
        refinement_factor: sessions: candidates that blocks propose for every token chosen by its
            own q.k, in [1, 16]; 1 = blocks decide.
        transform: "evict" or "index" (nothing dropped).
        encoding: bits of K and V: "as_is", "float8_e4m3", "int8"; or apart:
        key_encoding: bits of K.
        value_encoding: bits of V.
        scale_granularity: of quantised output: "head" or "token_head".
        num_sink_tokens: first tokens, kept in any case.
        num_recent_tokens: last tokens, kept in any case.
        pinned: spans [begin, end) kept in any case, ascending.
        dense_layers: layers returned whole, ascending.
        scope: what shares one kept set: "global", "layer", "layer_head".
        positions: "original", or "contiguous": keys re-rotated to 0..n-1 (needs `rope`).
        min_retained_attention_mass: quality floor in [0, 1].
        max_output_relative_error: quality floor.
        max_expected_divergence: quality floor, nats a token (proto QualityFloor).
        max_kept_ratio: refuse rather than keep more for the floor's sake.
        allow_fallback: take the preset's fallback where evidence is missing.
        page_size: slots of an output page: 16, 32, 64 or 128.

    Raises:
        ValueError: a word that the choice has not, or more than one target.
    """
    result = types_pb2.Policy(preset=preset, allow_fallback=allow_fallback)
    cut, score, target = types_pb2.Segmentation, types_pb2.Scoring, types_pb2.Budget
    bits = types_pb2.Encoding
    if sum(given is not None for given in (kept_ratio, tokens_per_head, output_bytes)) > 1:
        raise ValueError("more than one of kept_ratio, tokens_per_head and output_bytes")
    for part, fields in (
        (
            "segmentation",
            {
                "method": _code(cut.Method, "METHOD", segmentation),
                "block_size": block_size,
                "max_deviation": max_deviation,
                "balance": balance,
                "profile": profile,
            },
        ),
        (
            "scoring",
            {
                "method": _code(score.Method, "METHOD", scoring),
                "num_window_queries": num_window_queries,
                "pooling_kernel": pooling_kernel,
                "pooling": _code(score.Pooling, "POOLING", pooling),
                "block_reduction": _code(score.BlockReduction, "BLOCK_REDUCTION", block_reduction),
                "query_reduction": _code(score.QueryReduction, "QUERY_REDUCTION", query_reduction),
                "lse_base": _code(score.LseBase, "LSE_BASE", lse_base),
                "softmax_scale": softmax_scale,
                "refinement_factor": refinement_factor,
            },
        ),
        (
            "budget",
            {
                "kept_ratio": kept_ratio,
                "tokens_per_head": tokens_per_head,
                "bytes": output_bytes,
                "method": _code(target.Method, "METHOD", budget),
                "whole_blocks": whole_blocks,
            },
        ),
        (
            "encoding",
            {
                "key": _code(bits.Format, "FORMAT", key_encoding or encoding),
                "value": _code(bits.Format, "FORMAT", value_encoding or encoding),
                "scale_granularity": _code(
                    types_pb2.ScaleGranularity, "SCALE_GRANULARITY", scale_granularity
                ),
            },
        ),
        (
            "protection",
            {"num_sink_tokens": num_sink_tokens, "num_recent_tokens": num_recent_tokens},
        ),
        (
            "quality_floor",
            {
                "min_retained_attention_mass": min_retained_attention_mass,
                "max_output_relative_error": max_output_relative_error,
                "max_expected_divergence": max_expected_divergence,
                "max_kept_ratio": max_kept_ratio,
            },
        ),
    ):
        _set(getattr(result, part), fields)
    for begin, end in pinned:
        result.protection.pinned.add(begin=begin, end=end)
    result.protection.dense_layers.extend(dense_layers)
    whole: dict[str, Any] = {
        "transform": _code(types_pb2.Transform, "TRANSFORM", transform),
        "scope": _code(types_pb2.Scope, "SCOPE", scope),
        "positions": _code(types_pb2.Positions, "POSITIONS", positions),
        "page_size": page_size,
    }
    _set(result, whole)
    return result


def _set(message: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if value is not None:
            setattr(message, name, value)


def _code(enum: Any, prefix: str, word: str | None) -> Any:
    if word is None:
        return None
    name = f"{prefix}_{word.upper().replace('-', '_')}"
    if name not in enum.keys() or name.endswith("_UNSPECIFIED"):
        known = [key.removeprefix(prefix + "_").lower() for key in enum.keys()[1:]]
        raise ValueError(f"{word!r} is none of {', '.join(known)}")
    return enum.Value(name)


def as_policy(given: types_pb2.Policy | str | None) -> types_pb2.Policy | None:
    """A preset's name as a policy; policies and None as they are."""
    return policy(given) if isinstance(given, str) else given


def index_policy(
    *,
    profile: str = "",
    tokens_per_head: int = 0,
    kept_ratio: float = 0.0,
    shared_by_heads: bool = False,
    num_sink_tokens: int | None = None,
    num_recent_tokens: int | None = None,
    dense_layers: Sequence[int] = (),
    rest: str = "as_is",
) -> types_pb2.Policy:
    """A policy of sessions; what is left out is the server's default.

    Args:
        profile: delimiter profile of the tokenizer.
        tokens_per_head: budget of a step, tokens per KV head; or
        kept_ratio: budget of a step, share of the tokens in (0, 1].
        shared_by_heads: one chosen set a layer instead of one a KV head.
        num_sink_tokens: first tokens, always chosen.
        num_recent_tokens: last tokens, always chosen.
        dense_layers: layers read whole, ascending.
        rest: bits in which K and V rest: "as_is", "float8" or "int8".

    Raises:
        ValueError: unknown `rest`.
    """
    return policy(
        "dynsplit_index",
        profile=profile or None,
        tokens_per_head=tokens_per_head or None,
        kept_ratio=None if tokens_per_head else kept_ratio or None,
        scope="layer" if shared_by_heads else None,
        num_sink_tokens=num_sink_tokens,
        num_recent_tokens=num_recent_tokens,
        dense_layers=dense_layers,
        encoding={"as_is": None, "float8": "float8_e4m3"}.get(rest, rest),
    )

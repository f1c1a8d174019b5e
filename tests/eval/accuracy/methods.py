# SPDX-License-Identifier: Apache-2.0
"""What is compared: rows of a table, each a policy of the service or a press of kvpress."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from dynsplit import policy
from dynsplit.client import Client
from dynsplit.v1 import compression_pb2, types_pb2

FIXED = (8, 16, 32, 64)
PRESSES = ("snapkv", "chunkkv", "expected_attention", "keydiff", "kvzip")
_UNIFORM = "eval-uniform"


@dataclasses.dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        name: unique within its mode.
        mode: "evict" or "index".
        group: "preset", "rigid", "ablation", "kvpress" or "grid".
        choices: arguments of `dynsplit.policy`; empty for presses.
        needs_received: the policy ranks by the attention that tokens received.
    """

    name: str
    mode: str
    group: str
    choices: dict[str, Any] = dataclasses.field(default_factory=dict)
    needs_received: bool = False

    def policy(self, share: float) -> types_pb2.Policy:
        """The policy at that share of the tokens, or so many of them where it is above 1."""
        if share > 1:
            return policy(**self.choices, tokens_per_head=int(share))
        return policy(**self.choices, kept_ratio=share)


def budget_of(share: float, num_tokens: int) -> int:
    """Tokens that a share of so many is; above 1 it is a number of tokens itself."""
    return min(num_tokens, int(share)) if share > 1 else max(1, int(num_tokens * share))


def weights_profile(kind: str) -> str:
    """Name of the delimiter profile measured on a kind of text."""
    return f"eval-{kind}"


def put_profiles(client: Client, measured: dict[str, compression_pb2.DelimiterProfile]) -> None:
    """Stores what the ablations name: all weights alike, and each kind's own weights."""
    uniform = client.profile("")
    uniform.name, uniform.description = _UNIFORM, "every delimiter weighs the same"
    for entry in uniform.weights:
        entry.weight = 1.0
    client.put_profile(uniform, replace=True)
    for kind, profile in measured.items():
        profile.name = weights_profile(kind)
        client.put_profile(profile, replace=True)


def _cuts(mode: str, base: str) -> list[Method]:
    """Rigid splittings and ablations of where to cut, everything else as in `base`."""
    tag = "" if mode == "evict" else "index_"

    def row(name: str, group: str, **choices: Any) -> Method:
        return Method(tag + name, mode, group, {"preset": base, **choices})

    rigid = [row(f"fixed{n}", "rigid", segmentation="fixed", block_size=n) for n in FIXED]
    rigid.append(row("delimiters", "rigid", segmentation="delimiter_set"))
    size = 20 if mode == "evict" else 14
    return [
        *rigid,
        row("no_length_control", "ablation", balance=1.0, block_size=64),
        row("no_delimiters", "ablation", segmentation="fixed", block_size=size),
        row("no_weights", "ablation", profile=_UNIFORM),
    ]


_PAPER = {"segmentation": "dynamic", "block_size": 14, "max_deviation": 6, "balance": 0.6}
# One choice of dynsplit less at a time; "first_completion" is what stood before tuning.
_EVICT_ABLATIONS: dict[str, dict[str, Any]] = {
    "first_completion": {
        **_PAPER,
        "num_window_queries": 64,
        "query_reduction": "mean",
        "pooling_kernel": 5,
        "scope": "layer",
    },
    "narrow_deviation": _PAPER,
    "mean_of_queries": {"query_reduction": "mean"},
    "window_64": {"num_window_queries": 64},
    "one_set_a_layer": {"scope": "layer"},
    "max_of_block": {"block_reduction": "max"},
}
_INDEX_ABLATIONS: dict[str, dict[str, Any]] = {
    "index_unrefined": {"refinement_factor": 1},
    "index_bound": {"scoring": "block_bound", "refinement_factor": 4},
    "index_bound_unrefined": {"scoring": "block_bound", "refinement_factor": 1},
    "index_first_completion": {**_PAPER, "scoring": "block_bound", "refinement_factor": 1},
}


def table(client: Client, kinds: tuple[str, ...], presses: tuple[str, ...]) -> list[Method]:
    """Every row: the server's presets, rigid splittings, ablations, and presses."""
    found = []
    for preset in client.policies():
        name = preset.policy.preset
        mode = "index" if preset.policy.transform == types_pb2.TRANSFORM_INDEX else "evict"
        received = preset.required_evidence == types_pb2.EVIDENCE_ACCUMULATED_SCORES
        found.append(Method(name, mode, "preset", {"preset": name}, received))
    for mode, base in (("evict", "dynsplit"), ("index", "dynsplit_index")):
        found += _cuts(mode, base)
        rows = _EVICT_ABLATIONS if mode == "evict" else _INDEX_ABLATIONS
        found += [Method(n, mode, "ablation", {"preset": base, **c}) for n, c in rows.items()]
    for kind in kinds:
        choices = {"preset": "dynsplit", "profile": weights_profile(kind)}
        found.append(Method(f"weights_of_{kind}", "evict", "ablation", choices))
    found += [Method(f"kvpress_{name}", "evict", "kvpress") for name in presses]
    return found


def grid(path: Path) -> list[Method]:
    """Rows of a JSON file, [{"name", "mode", "choices"}, ...]: variations to measure by the way.

    Choices are arguments of `dynsplit.policy`; "kept_ratio" is the share's.

    Raises:
        ValueError: a row is none, or a choice is unknown.
    """
    found = []
    for row in json.loads(path.read_text()):
        unknown = set(row) - {"name", "mode", "choices"}
        choices = row.get("choices")
        if unknown or row.get("mode") not in ("evict", "index") or not isinstance(choices, dict):
            raise ValueError(f"{path}: {row} is no row of name, mode (evict, index) and choices")
        ranked = choices.get("scoring") == "accumulated" or choices.get("preset") == "h2o"
        method = Method(row["name"], row["mode"], "grid", choices, ranked)
        try:
            method.policy(0.5)
        except TypeError as error:
            raise ValueError(f"{path}: {row['name']}: {error}") from error
        found.append(method)
    return found

# SPDX-License-Identifier: Apache-2.0
"""Resident sessions: KV that stays in the service, and the choice of tokens at each decode step.

with dynsplit.Client("unix:/run/dynsplitd.sock") as client:
    policy = index_policy(profile="smollm2", kept_ratio=0.1)
    stored = client.open(token_ids, keys, values, num_query_heads=32, policy=policy)
    chosen = client.select([Step(stored.session_id, queries)])[0].tokens
"""

from dynsplit.client import Client as SessionClient
from dynsplit.policies import index_policy
from dynsplit.session_calls import (
    RESIDENCES,
    Gather,
    MovedRows,
    Selection,
    Step,
    Stored,
    session_options,
)
from dynsplit.tensors import tensor_at

__all__ = [
    "RESIDENCES",
    "Gather",
    "MovedRows",
    "Selection",
    "SessionClient",
    "Step",
    "Stored",
    "index_policy",
    "session_options",
    "tensor_at",
]

# SPDX-License-Identifier: Apache-2.0
"""Python side of DynSplit-KV.

    import dynsplit

    with dynsplit.Client() as client:
        result = client.compress(token_ids, keys, values, queries=queries,
                                 policy=dynsplit.policy(kept_ratio=0.2, profile="smollm2"))

`Client` blocks, `dynsplit.aio.Client` is the same for asyncio. `dynsplit.sessions` keeps KV in the
service and asks, at each decode step, which tokens to read. `dynsplit.hf` compresses inside
transformers' `generate`. `dynsplit.engine` lets a torch process share device memory with the
service and read sessions in place. `dynsplit.plot` draws results. `dynsplit.capture` records the
keys, values and queries of a real language model, which the project's tests, benchmarks and
calibration run on. `dynsplit.errors` lists what calls fail with.
"""

from dynsplit.calls import Retry, Road
from dynsplit.client import Client
from dynsplit.errors import DynSplitError, PassthroughWarning
from dynsplit.policies import index_policy, policy
from dynsplit.results import Compressed, CompressedLayer, load
from dynsplit.session_calls import Gather, Step, session_options
from dynsplit.tensors import AxisTensor, tensor_at
from dynsplit.v1.types_pb2 import Rope, SequenceShape

__version__ = "0.1.0"

__all__ = [
    "AxisTensor",
    "Client",
    "Compressed",
    "CompressedLayer",
    "DynSplitError",
    "Gather",
    "PassthroughWarning",
    "Retry",
    "Road",
    "Rope",
    "SequenceShape",
    "Step",
    "index_policy",
    "load",
    "policy",
    "session_options",
    "tensor_at",
]

# SPDX-License-Identifier: Apache-2.0
"""Python side of DynSplit-KV.

`dynsplit.sessions` keeps KV in the service and asks, at each decode step, which tokens to read;
`dynsplit.engine` lets a torch process share device memory with the service and read sessions in
place; `dynsplit.capture` records the keys, values and queries of a real language model, which the
project's tests, benchmarks and calibration run on. `dynsplit.errors` lists what calls fail with.
"""

__version__ = "0.1.0"

# SPDX-License-Identifier: Apache-2.0
"""Python side of DynSplit-KV.

`dynsplit.capture` records the keys, values and queries of a real language model, which the
project's tests, benchmarks and calibration run on.
"""

__version__ = "0.1.0"

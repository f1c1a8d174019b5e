# SPDX-License-Identifier: Apache-2.0
"""The tensors of a request, from the arguments of calls to the order of their sending."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dynsplit.streams import Input
from dynsplit.tensors import Array, AxisTensor, Tensor
from dynsplit.v1 import types_pb2

Tensors = Sequence[Tensor | AxisTensor] | Array
"""L tensors, one a layer, or one tensor whose first axis is L."""

# Tensors of a layer by argument, in the order of sending: what scoring waits for first.
_KINDS = {
    "queries": types_pb2.TENSOR_KIND_QUERIES,
    "log_sum_exp": types_pb2.TENSOR_KIND_LOG_SUM_EXP,
    "accumulated_scores": types_pb2.TENSOR_KIND_ACCUMULATED_SCORES,
    "keys": types_pb2.TENSOR_KIND_KEY,
    "key_scales": types_pb2.TENSOR_KIND_KEY_SCALES,
    "values": types_pb2.TENSOR_KIND_VALUE,
    "value_scales": types_pb2.TENSOR_KIND_VALUE_SCALES,
}
_TYPED = ("keys", "values", "queries")  # what `dtype` is for


def inputs_of(
    token_ids: npt.NDArray[np.int32] | None,
    parts: Mapping[str, Tensors | None],
    num_layers: int,
    dtype: str | None,
    block_table: npt.ArrayLike | None = None,
) -> list[Input]:
    """Tensors of the sequence, then those of layer 0, 1, ...

    Args:
        token_ids: [T].
        parts: by argument's name; None = not given.
        num_layers: L.
        dtype: what arrays of unsigned integers hold, in keys, values and queries.
        block_table: int32, physical page of each page of paged keys and values.

    Raises:
        ValueError: a part has another number of layers; keys that hold values come with values; a
            type that the wire has not.
    """
    given: dict[str, Any] = {name: part for name, part in parts.items() if part is not None}
    for name, part in given.items():
        if len(part) != num_layers:
            raise ValueError(f"{name} has {len(part)} layers, not {num_layers}")
    inputs = []
    if token_ids is not None:
        inputs.append(Input.of(types_pb2.TENSOR_KIND_TOKEN_IDS, None, token_ids, None))
    if block_table is not None:
        table = np.ascontiguousarray(block_table, np.int32)
        inputs.append(Input.of(types_pb2.TENSOR_KIND_BLOCK_TABLE, None, table, None))
    for layer in range(num_layers):
        for name, kind in _KINDS.items():
            if name not in given:
                continue
            tensor = given[name][layer]
            if isinstance(tensor, AxisTensor) and tensor.both:
                if name != "keys" or "values" in given:
                    raise ValueError("keys with an axis 'kv' hold the values too: values is None")
                kind = types_pb2.TENSOR_KIND_KEY_VALUE
            inputs.append(Input.of(kind, layer, tensor, dtype if name in _TYPED else None))
    return inputs

# SPDX-License-Identifier: Apache-2.0
"""Store a weight once where two are the transpose of each other: a tied embedding and its output layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitfold.passes.values import constant, drop_initializer, emit

__all__ = ["tie_transposed"]

_LEAST_BYTES = 65536


def tie_transposed(model: ir.Model) -> int:
    """Replace a float matrix that is the transpose of another one by a Transpose of it; return how many were
    replaced.

    The runtime folds the Transpose when it opens the model, as it did with the original's.
    """
    by_shape: dict[tuple[int, ...], list[ir.Value]] = {}
    for value in model.graph.initializers.values():
        tensor = constant(value)
        if tensor is not None and len(tensor.shape) == 2 and _is_large_float(tensor):
            by_shape.setdefault(tuple(tensor.shape.numpy()), []).append(value)
    tied = 0
    for shape, values in by_shape.items():
        if shape[0] < shape[1]:  # the table has more rows than columns: it stays, its transpose goes
            for value in values:
                source = next((v for v in by_shape.get(shape[::-1], []) if _is_transpose(v, value)), None)
                if source is not None and not value.is_graph_output():
                    _tie(value, source)
                    tied += 1
    return tied


def _is_large_float(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype.is_floating_point() and tensor.nbytes >= _LEAST_BYTES


def _is_transpose(one: ir.Value, other: ir.Value) -> bool:
    first, second = constant(one), constant(other)
    if first is None or second is None or first.dtype != second.dtype:
        return False
    a, b = first.numpy(), second.numpy()
    return bool(np.array_equal(a[:, 0], b[0])) and bool(np.array_equal(a.T, b))


def _tie(value: ir.Value, source: ir.Value) -> None:
    for use in list(value.uses()):
        turned = emit(
            use.node,
            "Transpose",
            [source],
            attributes={"perm": [1, 0]},
            names=[f"{value.name}_tied"],
            like=value,
        )
        use.node.replace_input_with(use.idx, turned)
    drop_initializer(value)

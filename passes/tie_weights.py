# SPDX-License-Identifier: Apache-2.0
"""Store a weight once where two are the transpose of each other: a tied embedding and its output layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitfold.passes.base import Findings
from splitfold.passes.identity import display_layer
from splitfold.passes.values import constant, drop_initializer, emit

__all__ = ["tie_transposed"]

_LEAST_BYTES = 65536


def tie_transposed(model: ir.Model, findings: Findings | None = None) -> int:
    """Replace a float matrix that is the transpose of another one by a Transpose of it; return how many were
    replaced, and record in `findings` what is one but for a few elements.

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
                alike = [v for v in by_shape.get(shape[::-1], []) if _starts_as_transpose(v, value)]
                source = next((v for v in alike if _is_transpose(v, value)), None)
                if source is not None and not value.is_graph_output():
                    _tie(value, source)
                    tied += 1
                elif source is None and alike and findings is not None:
                    _record(value, alike[0], findings)
    return tied


def _record(value: ir.Value, source: ir.Value, findings: Findings) -> None:
    readers = [use.node for use in value.uses()]
    if readers:
        reason = f"'{value.name}' starts as the transpose of '{source.name}', and differs from it further on"
        findings.miss(display_layer(readers[0]), "weight stored once with its transpose", reason)


def _is_large_float(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype.is_floating_point() and tensor.nbytes >= _LEAST_BYTES


def _starts_as_transpose(one: ir.Value, other: ir.Value) -> bool:
    first, second = constant(one), constant(other)
    if first is None or second is None or first.dtype != second.dtype:
        return False
    return bool(np.array_equal(first.numpy()[:, 0], second.numpy()[0]))


def _is_transpose(one: ir.Value, other: ir.Value) -> bool:
    first, second = constant(one), constant(other)
    return first is not None and second is not None and np.array_equal(first.numpy().T, second.numpy())


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

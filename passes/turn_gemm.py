# SPDX-License-Identifier: Apache-2.0
"""Turn Gemm so that its constant weight is [K, N] (transB = 0) with alpha = beta = 1: the layout that the
kernels want."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitfold.passes.values import add_initializer, constant, float_attribute, int_attribute
from splitfold.runtime.feeds import Array

__all__ = ["turn_gemms"]


def turn_gemms(model: ir.Model) -> int:
    """Fold transB, alpha and beta into constant operands; return how many Gemms changed. A shared weight is
    turned once."""
    turned: dict[tuple[ir.Value, bool, float], ir.Value] = {}
    return sum(
        _turn(node, turned)
        for graph in model.graphs()
        for node in graph
        if node.op_type == "Gemm" and node.domain == ""
    )


def _turn(node: ir.Node, turned: dict[tuple[ir.Value, bool, float], ir.Value]) -> bool:
    weight = node.inputs[1]
    tensor = constant(weight)
    if weight is None or tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return False
    transposed, alpha = bool(int_attribute(node, "transB", 0)), float_attribute(node, "alpha", 1.0)
    changed = transposed or alpha != 1.0
    if changed:
        key = (weight, transposed, alpha)
        if key not in turned:
            turned[key] = _added(weight, _turned(np.asarray(tensor.numpy()), transposed, alpha))
        node.replace_input_with(1, turned[key])
        node.attributes.pop("transB", None)
        node.attributes.pop("alpha", None)
    return _fold_beta(node) or changed


def _turned(weight: Array, transposed: bool, alpha: float) -> Array:
    result = weight.T if transposed else weight
    return np.ascontiguousarray(result if alpha == 1.0 else (result * alpha).astype(weight.dtype))


def _fold_beta(node: ir.Node) -> bool:
    beta = float_attribute(node, "beta", 1.0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:  # there is nothing to scale
        return node.attributes.pop("beta", None) is not None
    tensor = constant(bias)
    if beta == 1.0 or tensor is None or not tensor.dtype.is_floating_point():
        return False
    array = np.asarray(tensor.numpy())
    node.replace_input_with(2, _added(bias, (array * beta).astype(array.dtype)))
    node.attributes.pop("beta", None)
    return True


def _added(like: ir.Value, array: Array) -> ir.Value:
    """Add `array` to the graph that holds `like`, which may be one around the Gemm's."""
    if like.graph is None:
        raise ValueError(f"{like.name} is in no graph")
    return add_initializer(like.graph, f"{like.name}_turned", array)

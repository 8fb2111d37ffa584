# SPDX-License-Identifier: Apache-2.0
"""Turn Gemm so that its constant weight is [K, N] (transB = 0) with alpha = beta = 1: the layout that the
kernels want."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitfold.passes.base import Findings
from splitfold.passes.identity import display_layer
from splitfold.passes.values import add_initializer, constant, float_attribute, int_attribute
from splitfold.runtime.feeds import Array

__all__ = ["turn_gemms"]

_PATTERN = "Gemm turned to [K, N]"


def turn_gemms(model: ir.Model, findings: Findings | None = None) -> int:
    """Fold transB, alpha and beta into constant operands; return how many Gemms changed, and record in
    `findings` what keeps others from it. A shared weight is turned once."""
    turned: dict[tuple[ir.Value, bool, float], ir.Value] = {}
    nodes = [node for graph in model.graphs() for node in graph]
    gemms = [node for node in nodes if (node.domain, node.op_type) == ("", "Gemm")]
    count = sum(_turn(node, turned) for node in gemms)
    if findings is not None:
        for node in gemms:
            if (obstacle := _obstacle(node)) is not None:
                findings.miss(display_layer(node), _PATTERN, obstacle)
    return count


def _obstacle(node: ir.Node) -> str | None:
    """Return why the Gemm is still turned or scaled, or None where it is not."""
    if int_attribute(node, "transA", 0):
        return "its input is transposed (transA), which no constant can take up"
    beta = float_attribute(node, "beta", 1.0) != 1.0
    if not (int_attribute(node, "transB", 0) or float_attribute(node, "alpha", 1.0) != 1.0 or beta):
        return None
    tensor = constant(node.inputs[1])
    if tensor is None:
        return "its weight is computed, not constant"
    if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return f"its weight is {tensor.dtype.name}, not float32 or float64"
    return "its bias is scaled (beta) and computed, not constant"


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

# SPDX-License-Identifier: Apache-2.0
"""Fold BatchNormalization into the Conv, Gemm or MatMul before it.

In inference BN(y) = a y + c per channel, with a = gamma / sqrt(var + eps) and c = beta - a mean; so BN(x W +
b) = x (W a) + (a b + c).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitfold.passes.base import Findings
from splitfold.passes.identity import display_layer, inherit
from splitfold.passes.values import (
    add_initializer,
    constant,
    emit,
    float_attribute,
    int_attribute,
    replace_value,
    sole_consumer,
)
from splitfold.runtime.feeds import Array

__all__ = ["fold_batchnorm"]

_LAYERS = ("Conv", "Gemm", "MatMul")
_PATTERN = "BatchNormalization folded into the layer before it"


def fold_batchnorm(model: ir.Model, findings: Findings | None = None) -> int:
    """Fold where the layer's output feeds only the BatchNormalization and all parameters are constant; return
    how many, and record in `findings` why the others stay."""
    count = 0
    for graph in model.graphs():
        for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
            obstacle = _obstacle(norm)
            if obstacle is None:
                _fold(norm)
                count += 1
            elif findings is not None:
                findings.miss(display_layer(norm), _PATTERN, obstacle)
    return count


def _fold(norm: ir.Node) -> None:
    layer = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    if layer is None:
        raise ValueError(f"{norm.name} follows no layer")
    scale, shift = _affine(norm)
    weight, bias = layer.inputs[1], layer.inputs[2] if len(layer.inputs) > 2 else None
    array = _array(weight)
    old = np.zeros_like(scale) if bias is None else _array(bias).astype(np.float64)
    _set_parameters(layer, norm, _scaled(layer, array, scale), (scale * old + shift).astype(array.dtype))


def _obstacle(norm: ir.Node) -> str | None:
    """Return why the norm is not folded, or None."""
    layer = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    if layer is None or layer.domain != "" or layer.op_type not in _LAYERS:
        made = "an input of the model" if layer is None else f"made by a {layer.op_type}"
        return f"what it reads is {made}, not by a Conv, Gemm or MatMul"
    if sole_consumer(layer.outputs[0]) is not norm:
        return f"the output of the {layer.op_type} has other readers too, which want it without the norm"
    if layer.graph is not norm.graph:
        return f"the {layer.op_type} stands in another graph"
    if int_attribute(norm, "training_mode", 0) or any(o.uses() for o in norm.outputs[1:]):
        return "it is in training mode"
    if any(constant(value) is None for value in (*norm.inputs[1:5], *layer.inputs[1:]) if value is not None):
        return f"a parameter of it or of the {layer.op_type} is computed, not constant"
    return _shape_obstacle(layer)


def _shape_obstacle(layer: ir.Node) -> str | None:
    weight = constant(layer.inputs[1])
    if weight is None or weight.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return f"the weight of the {layer.op_type} is not float32 or float64"
    if layer.op_type == "Gemm":
        plain = float_attribute(layer, "alpha", 1.0) == 1.0 and float_attribute(layer, "beta", 1.0) == 1.0
        bias = constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
        if plain and (bias is None or len(bias.shape) == 1):
            return None
        return "the Gemm is scaled, or its bias is no vector"
    # a MatMul's channels are its last axis, the norm's are axis 1: the same only in rank 2
    rank = layer.outputs[0].shape
    if layer.op_type == "Conv" or (len(weight.shape) == 2 and rank is not None and len(rank) == 2):
        return None
    return "its channels are axis 1, those of the MatMul are the last: the same only in rank 2"


def _affine(norm: ir.Node) -> tuple[Array, Array]:
    gamma, beta, mean, var = (_array(value).astype(np.float64) for value in norm.inputs[1:5])
    scale = gamma / np.sqrt(var + float_attribute(norm, "epsilon", 1e-5))
    return scale, beta - scale * mean


def _scaled(layer: ir.Node, weight: Array, scale: Array) -> Array:
    if layer.op_type == "Conv" or (layer.op_type == "Gemm" and int_attribute(layer, "transB", 0)):
        return (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(weight.dtype)
    return (weight * scale).astype(weight.dtype)


def _set_parameters(layer: ir.Node, norm: ir.Node, weight: Array, bias: Array) -> None:
    graph = layer.graph
    if graph is None or layer.inputs[1] is None:
        raise ValueError(f"{layer.name} is in no graph")
    layer.replace_input_with(1, add_initializer(graph, f"{layer.inputs[1].name}_bn", weight))
    shift = add_initializer(graph, f"{layer.outputs[0].name}_bias", bias)
    inherit([layer], [norm])
    result = layer.outputs[0]
    if layer.op_type == "MatMul":
        result = emit(norm, "Add", [result, shift], like=layer.outputs[0], origins=[layer])
    elif len(layer.inputs) > 2:
        layer.replace_input_with(2, shift)
    else:
        layer.resize_inputs(3)
        layer.replace_input_with(2, shift)
    replace_value(norm.outputs[0], result)
    graph.remove(norm, safe=True)


def _array(value: ir.Value | None) -> Array:
    tensor = constant(value)
    if tensor is None:
        raise ValueError("not a constant")
    return np.asarray(tensor.numpy())

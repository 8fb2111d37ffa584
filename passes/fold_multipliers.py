# SPDX-License-Identifier: Apache-2.0
"""Fold a multiplication by a number into the weights of the layer before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.carriers import weight_graph
from splitfold.passes.identity import display_layer
from splitfold.passes.integer_linear import following_bias
from splitfold.passes.layers import Layer, LayerKind, find_layers
from splitfold.passes.values import (
    add_initializer,
    constant,
    drop_initializer,
    drop_unused,
    rename,
    replace_value,
    sole_consumer,
)
from splitfold.runtime.feeds import Array

__all__ = ["FoldMultipliersPass"]

_PASSED = {"Add", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""A bias, and operators that only move elements: a factor passes them."""


@dataclass(frozen=True)
class FoldMultipliersPass(LayerPass):
    """Let a layer compute what is multiplied by a constant number afterwards. Exact but for rounding.

    PyTorch's attention multiplies query and key by d^-1/4 each; both go into the projections' weights and
    biases. Quantizers with a scale for each channel or block see the same codes.

    Before::

        q = Mul(Transpose(Reshape(Add(MatMul(x, W), b))), c)

    After::

        q = Transpose(Reshape(Add(MatMul(x, c W), c b)))
    """

    name: ClassVar[str] = "fold-multipliers"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "a Mul or Div of a layer's output by a constant number"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        layers = {layer.output: layer for layer in find_layers(model)[0]}
        self.check_patterns(layer.name for layer in layers.values())
        before = len(findings.applied)
        for node in [node for graph in model.graphs() for node in graph]:
            step = _factor(node)
            path = _path(step[0], layers) if step is not None else ""
            if step is not None and isinstance(path, list):
                self._fold(node, step[1], layers[path[-1]], path, findings)
            elif isinstance(path, str) and path:
                findings.miss(display_layer(node), "Mul behind a layer", path)
        return len(findings.applied) > before

    def _fold(
        self, node: ir.Node, factor: float, layer: Layer, path: list[ir.Value], findings: Findings
    ) -> None:
        reason = self.unwanted(*layer.addresses) or _obstacle(layer, factor)
        if reason is not None:
            findings.skip(layer.name, reason)
            return
        _scale(layer.current(), factor)
        for value in path:
            rename(value, f"{value.name}_scaled")
        replace_value(node.outputs[0], path[0])
        drop_unused([node])
        findings.apply(layer.name, f"weights times {factor:.6g}: the {node.op_type} behind it is gone")


def _factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Return what a Mul or Div multiplies by a constant number, and that number."""
    if node.domain != "" or node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    for position in (1, 0) if node.op_type == "Mul" else (1,):
        tensor, value = constant(node.inputs[position]), node.inputs[1 - position]
        if tensor is None or value is None or tensor.size != 1 or constant(value) is not None:
            continue
        number = float(tensor.numpy().reshape(-1)[0])
        widens = value.shape is None or len(tensor.shape) > len(value.shape)
        if tensor.dtype is ir.DataType.FLOAT and not widens and np.isfinite(number) and number != 0:
            return value, number if node.op_type == "Mul" else 1 / number
    return None


def _path(value: ir.Value, layers: Mapping[ir.Value, Layer]) -> list[ir.Value] | str:
    """Return the values from `value` back to the output of the layer that computes it, through its bias and
    operators that move elements; else why the factor cannot go there, empty where no layer does."""
    path: list[ir.Value] = []
    current: ir.Value | None = value
    while current is not None:
        path.append(current)
        made = current.producer()
        if current not in layers and (made is None or made.domain != "" or made.op_type not in _PASSED):
            return ""
        if sole_consumer(current) is None:
            return f"'{current.name}' has other readers too"
        if current in layers or made is None:
            return path
        current = made.inputs[0] if made.op_type != "Add" else _before_bias(made, layers)
    return ""


def _before_bias(add: ir.Node, layers: Mapping[ir.Value, Layer]) -> ir.Value | None:
    """Return the layer's output that the Add gives its bias, or None."""
    value = next((value for value in add.inputs if value is not None and value in layers), None)
    return value if value is not None and following_bias(layers[value]) is add else None


def _obstacle(layer: Layer, factor: float) -> str | None:
    if layer.kind is LayerKind.EMBEDDING:
        return "an embedding's table stays as it is: others may read it"
    if layer.weight.dtype is not ir.DataType.FLOAT:
        return f"the weight is {layer.weight.dtype}, not FLOAT"
    if layer.bias is not None and constant(layer.bias) is None:
        return "its bias is computed"
    largest = float(np.abs(layer.weight_array()).max(initial=0.0)) * abs(factor)
    if not np.finfo(np.float32).tiny < largest < np.finfo(np.float32).max / 2 and largest:
        return "its weights would leave the range of float32"
    return None


def _scale(layer: Layer, factor: float) -> None:
    """Multiply weight and bias; those that others read are left to them."""
    after = following_bias(layer) if layer.is_linear else None
    held = [(layer.node, layer.weight)]
    if layer.bias is not None:
        held.append((layer.node, layer.bias))
    elif after is not None:
        bias = next(value for value in after.inputs if value is not None and constant(value) is not None)
        held.append((after, bias))
    for node, value in held:
        tensor = constant(value)
        if tensor is None:
            raise ValueError(f"'{value.name}' is no constant")
        scaled: Array = (np.asarray(tensor.numpy(), np.float64) * factor).astype(np.float32)
        made = add_initializer(weight_graph(layer), f"{value.name}_scaled", scaled)
        node.replace_input_with(next(i for i, it in enumerate(node.inputs) if it is value), made)
        drop_initializer(value)

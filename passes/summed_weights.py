# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight is a sum of constant parts with disjoint supports, as `split-layers{form=weight}`
leaves them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.identity import display_layer
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.values import constant
from splitfold.runtime.feeds import Array

__all__ = ["SummedLayer", "summed_layers"]


@dataclass(frozen=True, eq=False)
class SummedLayer:
    """A layer and the parts of its weight.

    Attributes:
        layer: as it is with its weight whole; `layer.weight` is in no graph.
        total: the node that adds the parts up.
        index: part of each weight, uint8 in the weight's shape, from 0 without gaps. A weight of zero is in
            the part nearest to zero.
    """

    layer: Layer
    total: ir.Node
    index: Array


def summed_layers(model: ir.Model) -> list[SummedLayer]:
    """Return the layers of all graphs whose weight is such a sum, in order."""
    return [
        found
        for graph in model.graphs()
        for node in graph
        if (found := _summed(node, graph is not model.graph)) is not None
    ]


def _summed(node: ir.Node, in_subgraph: bool) -> SummedLayer | None:
    kinds = {kind.value: kind for kind in LayerKind}
    if node.domain not in ("", "ai.onnx") or node.op_type not in kinds:
        return None
    kind = kinds[node.op_type]
    at = 0 if kind is LayerKind.EMBEDDING else 1
    weight, data = node.inputs[at], node.inputs[1 - at]
    total = weight.producer() if weight is not None else None
    if weight is None or data is None or total is None or total.op_type != "Sum":
        return None
    parts = [_array(value) for value in total.inputs]
    held = [part for part in parts if part is not None]
    if len(held) < len(parts) or len({part.shape for part in held}) > 1 or held[0].ndim < 2:
        return None
    filled = [part != 0 for part in held]
    if np.sum(filled, axis=0, dtype=np.uint8).max(initial=0) > 1:
        return None
    whole = np.sum(held, axis=0, dtype=held[0].dtype)
    value = ir.Value(
        name=weight.name, const_value=ir.tensor(whole), shape=ir.Shape(whole.shape), type=weight.type
    )
    bias = node.inputs[2] if len(node.inputs) > 2 and kind is not LayerKind.EMBEDDING else None
    layer = Layer(node, display_layer(node), kind, data, value, bias, in_subgraph)
    return SummedLayer(layer, total, _index(held, filled))


def _array(value: ir.Value | None) -> Array | None:
    tensor = constant(value)
    if tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    return np.asarray(tensor.numpy())


def _index(parts: list[Array], filled: list[Array]) -> Array:
    used = [at for at, mask in enumerate(filled) if mask.any()]
    nearest = [float(np.abs(parts[at][filled[at]]).min()) for at in used]
    index = np.full(parts[0].shape, int(np.argmin(nearest)) if used else 0, np.uint8)
    for number, at in enumerate(used):
        index[filled[at]] = number
    return index

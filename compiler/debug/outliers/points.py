# SPDX-License-Identifier: Apache-2.0
"""Where outliers are looked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.compiler.inspection import weighted_nodes
from splitfold.passes.attention import find_attention
from splitfold.passes.identity import display_layer
from splitfold.passes.values import constant, sole_consumer

__all__ = ["AttentionPoint", "LayerPoint", "attention_points", "layer_points"]

_NORMS = {"GroupNormalization", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
_REACH = 4
"""Operators from a product to the layer's output: scale, bias, a cast."""
_ON = {"Add", "Cast", "Mul", "Sum"}


@dataclass(frozen=True)
class LayerPoint:
    """A value of the main graph."""

    layer: str
    value: str
    what: str


@dataclass(frozen=True)
class AttentionPoint:
    """The probabilities of a block, [batch..., heads, queries, keys]."""

    layer: str
    value: str
    causal: bool


def layer_points(model: ir.Model) -> tuple[LayerPoint, ...]:
    """Return the float outputs of layers with weights and the inputs of norms, each value once."""
    points: dict[str, LayerPoint] = {}
    for point in _points(model):
        points.setdefault(point.value, point)
    return tuple(points.values())


def _points(model: ir.Model) -> Iterator[LayerPoint]:
    weighted = {node for node, _ in weighted_nodes(model) if node.graph is model.graph}
    for node in model.graph:
        if node in weighted and node.op_type != "Gather":
            value = _output(node)
            if value.name and _is_float(value):
                yield LayerPoint(display_layer(node), value.name, "output")
        elif node.op_type in _NORMS and (read := _computed(node.inputs[0])) is not None:
            yield LayerPoint(display_layer(node), read.name or "", "norm input")


def _computed(value: ir.Value | None) -> ir.Value | None:
    """Return a float that the graph computes, or None."""
    return value if value is not None and value.producer() is not None and _is_float(value) else None


def _output(node: ir.Node) -> ir.Value:
    """Return the layer's output: with the constants that are added or multiplied behind the product."""
    value = node.outputs[0]
    for _ in range(_REACH):
        reader = sole_consumer(value)
        if reader is None or reader.op_type not in _ON or reader.domain != "":
            break
        others = [operand for operand in reader.inputs if operand is not value]
        if any(constant(operand) is None for operand in others):
            break
        value = reader.outputs[0]
    return value


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def attention_points(
    model: ir.Model,
) -> tuple[tuple[AttentionPoint, ...], tuple[tuple[str, str], ...]]:
    """Return the probabilities of each attention block, clipped where it clips, and the blocks that hide
    theirs."""
    points, unseen = [], []
    for block in find_attention(model).blocks:
        p = block.probabilities
        if p is None:
            unseen.append((block.name, f"{block.form.value} keeps its probabilities to itself"))
        elif block.node.graph is not model.graph:
            unseen.append((block.name, "it stands in a subgraph"))
        elif p.axis is not None and p.softmax.shape is not None and p.axis != len(p.softmax.shape) - 1:
            unseen.append((block.name, "its softmax is not over the last axis"))
        else:
            shown = p.read if p.clipping is not None else p.guarded
            points.append(AttentionPoint(block.name, shown.name or "", block.causal))
    return tuple(points), tuple(unseen)

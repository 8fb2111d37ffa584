# SPDX-License-Identifier: Apache-2.0
"""Root mean square norms written out (arXiv:1910.07467, eq. 4): x / sqrt(mean(x^2) + epsilon) * weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from splitfold.passes.shape_rules import axes_of
from splitfold.passes.symbolic_shapes import SymbolicShapes
from splitfold.passes.values import constant, int_attribute, sole_consumer

__all__ = ["RootMeanSquare", "follow", "mean_squares"]


@dataclass
class RootMeanSquare:
    """What is found of a norm on the way from the mean of the squares to the product with the weight.

    Attributes:
        x: what is normalized.
        nodes: from the square to the product with the weight.
        epsilon: what is added to the mean.
        weight: what the norm is multiplied with.
    """

    x: ir.Value
    nodes: list[ir.Node] = field(default_factory=list)
    epsilon: float = 0.0
    weight: ir.Value | None = None


def mean_squares(graph: ir.Graph | ir.Function) -> Iterator[RootMeanSquare]:
    """Yield the beginning of a norm, a ReduceMean of a square, for each one in `graph`."""
    for mean in graph:
        square = mean.inputs[0].producer() if _is(mean, "ReduceMean") and mean.inputs[0] is not None else None
        x = square.inputs[0] if square is not None and square.inputs else None
        if square is None or x is None:
            continue
        power = _is(square, "Pow") and _number(square.inputs[1]) == 2.0
        if power or (_is(square, "Mul") and square.inputs[1] is x):
            yield RootMeanSquare(x, [square, mean])


def follow(norm: RootMeanSquare, shapes: SymbolicShapes) -> str | None:
    """Complete `norm` by what is computed of its mean; return why it is no norm, or None."""
    mean = norm.nodes[-1]
    rank = shapes.rank(norm.x)
    if (
        rank is None
        or axes_of(mean, shapes) not in ((-1,), (rank - 1,))
        or not int_attribute(mean, "keepdims", 1)
    ):
        return "its mean is not known to be that of the last axis, which stays"
    if norm.nodes[0].outputs[0].is_graph_output() or len(norm.nodes[0].outputs[0].uses()) != 1:
        return "its squares are read elsewhere too"
    if _is_centred(norm.x):
        return "what it normalizes is centred: a LayerNormalization"
    add = sole_consumer(mean.outputs[0])
    epsilon = _other_number(add, mean.outputs[0]) if add is not None and _is(add, "Add") else None
    if add is None or epsilon is None:
        return "no number alone is added to the mean of its squares"
    norm.nodes.append(add)
    norm.epsilon = epsilon
    if not _divide(norm):
        return "what it normalizes is not divided by the root alone"
    return _weigh(norm, shapes)


def _divide(norm: RootMeanSquare) -> bool:
    """Follow x / Sqrt(v), x * Reciprocal(Sqrt(v)), x * (1 / Sqrt(v)) or x * Pow(v, -0.5)."""
    sum_ = norm.nodes[-1].outputs[0]
    root = sole_consumer(sum_)
    if root is None:
        return False
    norm.nodes.append(root)
    inverse = root
    if _is(root, "Sqrt"):
        node = sole_consumer(root.outputs[0])
        if node is None or not node.inputs:
            return False
        norm.nodes.append(node)
        if _is(node, "Div") and tuple(node.inputs) == (norm.x, root.outputs[0]):
            return True
        over_one = _is(node, "Div") and node.inputs[1] is root.outputs[0] and _number(node.inputs[0]) == 1.0
        if not over_one and not _is(node, "Reciprocal"):
            return False
        inverse = node
    elif not _is(root, "Pow") or root.inputs[0] is not sum_ or _number(root.inputs[1]) != -0.5:
        return False
    product = sole_consumer(inverse.outputs[0])
    if product is None or not _is(product, "Mul"):
        return False
    norm.nodes.append(product)
    return set(product.inputs) == {norm.x, inverse.outputs[0]}


def _weigh(norm: RootMeanSquare, shapes: SymbolicShapes) -> str | None:
    normal = norm.nodes[-1].outputs[0]
    product = sole_consumer(normal)
    if product is None or not _is(product, "Mul"):
        return "it is not multiplied with a weight, or read before that"
    weight = product.inputs[1] if product.inputs[0] is normal else product.inputs[0]
    shape, own = shapes.of(weight), shapes.of(norm.x)
    if weight is None or shape is None or own is None or len(shape) != 1:
        return "what it is multiplied with is not one weight a channel"
    if shape[0] is None or shape[0].known is None or shape[0] != own[-1]:
        return "its weight is not known to have as many elements as it has channels"
    if norm.x.dtype is not ir.DataType.FLOAT or weight.dtype is not ir.DataType.FLOAT:
        return "it is not computed in float32"
    norm.nodes.append(product)
    norm.weight = weight
    return None


def _is_centred(value: ir.Value) -> bool:
    node = value.producer()
    if node is None or not _is(node, "Sub"):
        return False
    mean = node.inputs[1].producer() if node.inputs[1] is not None else None
    return mean is not None and _is(mean, "ReduceMean") and mean.inputs[0] is node.inputs[0]


def _other_number(node: ir.Node, value: ir.Value) -> float | None:
    left, right = node.inputs
    return _number(right if left is value else left)


def _number(value: ir.Value | None) -> float | None:
    tensor = constant(value)
    if tensor is None or tensor.size != 1 or len(tensor.shape) > 1:
        return None
    return float(tensor.numpy().reshape(-1)[0])


def _is(node: ir.Node, op_type: str) -> bool:
    return node.domain == "" and node.op_type == op_type

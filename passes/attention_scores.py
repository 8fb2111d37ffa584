# SPDX-License-Identifier: Apache-2.0
"""From the logits of a softmax back to the product of queries and keys, past scale, mask and bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir

from splitfold.passes.attention_axes import Product, axis_map, product_of
from splitfold.passes.symbolic_shapes import SymbolicShapes
from splitfold.passes.values import constant

__all__ = ["MOVING", "ScorePath", "is_stored", "trace_scores"]

MOVING = {
    "Cast", "DequantizeLinear", "Dropout", "Expand", "Flatten", "Identity", "QuantizeLinear", "Reshape",
    "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators that move elements, or change no more than their type."""
_BOUNDING = {"Clip", "Max", "Min"}
_CARRYING = {"Cast", "Concat", "DequantizeLinear", "Identity", "Mul", "Reshape", "Sub", "Sum", "Transpose"}
_STEPS = 40
"""Operators between product and softmax, at most."""


@dataclass(frozen=True, eq=False)
class ScorePath:
    """What stands between the product and the softmax.

    Attributes:
        product: of queries and keys.
        key: which of its operands holds the keys: 0 or 1.
        scale: product of all scalar factors; None where another factor is in it.
        softcap: see `Attention.softcap`.
        added: (value, whether it is the condition of a Where, whether that blocks where it holds), from the
            softmax back.
        steps: operators between.
    """

    product: Product
    key: int
    scale: float | None = 1.0
    softcap: float | None = None
    added: tuple[tuple[ir.Value, bool, bool], ...] = ()
    steps: int = 0


def is_stored(value: ir.Value | None, depth: int = 6) -> bool:
    """Return whether `value` is a constant, or made of constants by operators that carry a stored weight."""
    if value is None or constant(value) is not None:
        return value is not None
    producer = value.producer()
    return (
        depth > 0
        and producer is not None
        and producer.op_type in _CARRYING
        and all(is_stored(operand, depth - 1) for operand in producer.inputs if operand is not None)
    )


def trace_scores(logits: ir.Value, axis: int, shapes: SymbolicShapes) -> ScorePath | str:
    """Return the way from the product to `logits`, whose softmax runs along `axis`; a text says why there is
    none."""
    return _trace(logits, axis, shapes, _STEPS)


def _trace(value: ir.Value, axis: int, shapes: SymbolicShapes, left: int) -> ScorePath | str:
    node = value.producer()
    if node is None:
        return f"its logits come from '{value.name}', which no node computes"
    if left == 0:
        return "no product of queries and keys is near its logits"
    found = product_of(node, shapes)
    if found is not None:
        return _from_product(found, axis)
    step = _STEP.get(node.op_type) if node.domain == "" else None
    if step is None:
        return f"its logits come from {node.op_type}, not from a product of queries and keys"
    path = step(node, axis, shapes, left - 1)
    return path if isinstance(path, str) else replace(path, steps=path.steps + 1)


def _from_product(found: Product, axis: int) -> ScorePath | str:
    if any(is_stored(operand) for operand in found.operands):
        return "its logits come from a layer with a constant weight: a classifier, a router or a pooling"
    if axis not in found.out:
        return "its axis is no axis of one operand of the product before it"
    return ScorePath(found, found.out.index(axis), found.factor)


def _move(node: ir.Node, axis: int, shapes: SymbolicShapes, left: int) -> ScorePath | str:
    source, mapped = node.inputs[0], axis_map(node, shapes)
    if source is None or mapped is None or len(mapped) <= axis or len(mapped[axis]) != 1:
        return f"its axis is lost in a {node.op_type} before it"
    return _trace(source, mapped[axis][0], shapes, left)


def _scale(node: ir.Node, axis: int, shapes: SymbolicShapes, left: int) -> ScorePath | str:
    for position in (0, 1) if node.op_type == "Mul" else (0,):
        other = node.inputs[1 - position]
        number = shapes.scalar(other)
        path = _aligned(node, position, axis, shapes, left)
        if isinstance(path, str) or (number is None and _depends(other, path.product)):
            continue
        if number is None or path.scale is None or number == 0:
            return replace(path, scale=None, softcap=None)
        factor = number if node.op_type == "Mul" else 1 / number
        softcap = path.softcap * factor if path.softcap is not None else None
        return replace(path, scale=path.scale * factor, softcap=softcap)
    return f"no operand of a {node.op_type} before it comes from a product of queries and keys"


def _aligned(node: ir.Node, position: int, axis: int, shapes: SymbolicShapes, left: int) -> ScorePath | str:
    """Go on with one operand of an elementwise operator, which is broadcast from the right."""
    source, mapped = node.inputs[position], axis_map(node, shapes, position)
    if source is None or mapped is None or len(mapped) <= axis or len(mapped[axis]) != 1:
        return "its axis is lost in a broadcast before it"
    return _trace(source, mapped[axis][0], shapes, left)


def _depends(value: ir.Value | None, product: Product) -> bool:
    producer = value.producer() if value is not None else None
    return producer is product.node


def _add(node: ir.Node, axis: int, shapes: SymbolicShapes, left: int) -> ScorePath | str:
    paths = {
        position: _aligned(node, position, axis, shapes, left) for position in range(min(2, len(node.inputs)))
    }
    reached = {position: path for position, path in paths.items() if isinstance(path, ScorePath)}
    if node.op_type == "Sub":
        reached.pop(1, None)
    if not reached:
        return next(path for path in paths.values() if isinstance(path, str))
    position = min(reached, key=lambda at: (reached[at].steps, at))
    other = node.inputs[1 - position]
    if other is None or _is_own_maximum(other, node.inputs[position]):
        return reached[position]
    return replace(reached[position], added=((other, False, False), *reached[position].added))


def _is_own_maximum(value: ir.Value, logits: ir.Value | None) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "ReduceMax" and producer.inputs[0] is logits


def _where(node: ir.Node, axis: int, shapes: SymbolicShapes, left: int) -> ScorePath | str:
    condition = node.inputs[0]
    reason = "no branch of a Where before it comes from a product of queries and keys"
    for position in (1, 2):
        path = _aligned(node, position, axis, shapes, left)
        if isinstance(path, ScorePath) and condition is not None:
            return replace(path, added=((condition, True, position == 2), *path.added))
        reason = path if isinstance(path, str) and "layer with" in path else reason
    return reason


def _tanh(node: ir.Node, axis: int, shapes: SymbolicShapes, left: int) -> ScorePath | str:
    source = node.inputs[0]
    path = _trace(source, axis, shapes, left) if source is not None else "a Tanh before it reads nothing"
    if isinstance(path, str):
        return path
    return replace(path, softcap=1.0)  # the factor that follows is the cap


def _bound(node: ir.Node, axis: int, shapes: SymbolicShapes, left: int) -> ScorePath | str:
    if any(constant(value) is None for value in node.inputs[1:] if value is not None):
        return f"its logits come from a {node.op_type} of two computed values"
    return _aligned(node, 0, axis, shapes, left)


_STEP: dict[str, Callable[[ir.Node, int, SymbolicShapes, int], ScorePath | str]] = {
    **dict.fromkeys(MOVING, _move),
    **dict.fromkeys(_BOUNDING, _bound),
    "Add": _add,
    "Div": _scale,
    "Mul": _scale,
    "Sub": _add,
    "Tanh": _tanh,
    "Where": _where,
}

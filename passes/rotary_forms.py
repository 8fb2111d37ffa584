# SPDX-License-Identifier: Apache-2.0
"""Rotary positions written out in halves: x cos + [-x2, x1] sin (arXiv:2104.09864, the form of GPT-NeoX)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.shape_rules import axes_of
from splitfold.passes.symbolic_shapes import SymbolicShapes
from splitfold.passes.values import constant, int_attribute, sole_consumer

__all__ = ["Rotation", "Table", "rotations", "table_of", "turned_part", "whole_of"]

_FUNCTIONS = ("Cos", "Sin")


@dataclass(frozen=True)
class Rotation:
    """Add(Mul(x, cosines), Mul(Concat(Neg(second half of x), first half of x), sines)).

    Attributes:
        add: the node that gives the result.
        half_turn: the Concat.
        straight: operands of the first Mul: x and the cosines, in either order.
        sines: what the Concat is multiplied with.
    """

    add: ir.Node
    half_turn: ir.Node
    straight: tuple[ir.Value, ir.Value]
    sines: ir.Value


@dataclass(frozen=True)
class Table:
    """Cosines or sines [batch, 1, positions, size] whose two halves are equal, as both are made of `half`.

    Attributes:
        half: [batch, positions, size / 2].
        join: the Concat that puts `half` beside itself.
        functions: Cos, Sin and Mul by one number that are computed of it, in order.
    """

    half: ir.Value
    join: ir.Node
    functions: tuple[ir.Node, ...]


def rotations(graph: ir.Graph | ir.Function) -> Iterator[Rotation]:
    """Yield each sum in `graph` that turns halves, whatever it takes them from and multiplies them with."""
    for add in graph:
        products = [_made_by(value, "Mul") for value in add.inputs] if _is(add, "Add") else []
        if len(products) != 2:
            continue
        for one, other in (products, products[::-1]):
            found = _rotation(add, one, other)
            if found is not None:
                yield found
                break


def _rotation(add: ir.Node, one: ir.Node | None, other: ir.Node | None) -> Rotation | None:
    if one is None or other is None:
        return None
    x, cosines = one.inputs
    for turned, sines in (other.inputs, other.inputs[::-1]):
        join = _made_by(turned, "Concat")
        if join is None or len(join.inputs) != 2 or _made_by(join.inputs[0], "Neg") is None:
            continue
        if x is not None and cosines is not None and sines is not None:
            return Rotation(add, join, (x, cosines), sines)
    return None


def turned_part(rotation: Rotation, shapes: SymbolicShapes) -> tuple[ir.Value, ir.Value] | None:
    """Return (x, cosines) where the two halves of x, the second one negated and before the first, are what is
    multiplied with the sines; else None."""
    negated, plain = rotation.half_turn.inputs
    negation = _made_by(negated, "Neg")
    second = _cut(negation.inputs[0], shapes) if negation is not None else None
    first = _cut(plain, shapes)
    if first is None or second is None or first[0] is not second[0]:
        return None
    shape = shapes.of(first[0])
    size = _last(first[0], shapes)
    along = shape is not None and int_attribute(rotation.half_turn, "axis", 0) in (-1, len(shape) - 1)
    if not along or size is None or size % 2:
        return None
    if first[1:] != (0, size // 2) or second[1:] != (size // 2, size):
        return None
    one, other = rotation.straight
    if first[0] not in (one, other):
        return None
    return (one, other) if first[0] is one else (other, one)


def table_of(value: ir.Value, shapes: SymbolicShapes) -> Table | None:
    """Return how a table [batch, 1, positions, size] is made, or None where nothing shows that its halves are
    equal."""
    functions: list[ir.Node] = []
    raised = 0
    node = value.producer()
    while node is not None and not _is(node, "Concat"):
        following = node.inputs[0] if node.inputs else None
        if _is(node, "Unsqueeze") and axes_of(node, shapes) in ((1,), (-3,)):
            raised += 1
        elif _is(node, "Mul") and (factor := _factor_at(node)) is not None:
            following = node.inputs[1 - factor]
            functions.append(node)
        elif node.domain == "" and node.op_type in _FUNCTIONS:
            functions.append(node)
        else:
            return None
        node = following.producer() if following is not None else None
    if node is None or raised != 1 or len(node.inputs) != 2 or node.inputs[0] is not node.inputs[1]:
        return None
    half = node.inputs[0]
    if half is None or shapes.rank(half) != 3 or int_attribute(node, "axis", 0) not in (-1, 2):
        return None
    return Table(half, node, tuple(reversed(functions)))


def whole_of(rotation: Rotation, x: ir.Value, shapes: SymbolicShapes) -> tuple[ir.Node, ir.Value] | None:
    """Return (Concat, whole) where only the first part x of `whole` is turned, and the Concat puts the rest
    behind it again; else None."""
    join = sole_consumer(rotation.add.outputs[0])
    cut = _cut(x, shapes)
    if join is None or cut is None or not _is(join, "Concat") or len(join.inputs) != 2:
        return None
    rest = _cut(join.inputs[1], shapes)
    size, rank = _last(cut[0], shapes), shapes.rank(cut[0])
    if rest is None or rank is None or int_attribute(join, "axis", 0) not in (-1, rank - 1):
        return None
    fits = cut[1] == 0 and rest == (cut[0], cut[2], size) and join.inputs[0] is rotation.add.outputs[0]
    return (join, cut[0]) if fits else None


def _factor_at(node: ir.Node) -> int | None:
    """Return which operand of a Mul is one number, or None."""
    for position, value in enumerate(node.inputs):
        tensor = constant(value)
        if tensor is not None and tensor.size == 1 and len(tensor.shape) <= 1:
            return position
    return None


def _cut(value: ir.Value | None, shapes: SymbolicShapes) -> tuple[ir.Value, int, int] | None:
    """Return (source, start, end) where `value` is those elements of the last axis of its source."""
    node = value.producer() if value is not None else None
    source = node.inputs[0] if node is not None and node.inputs else None
    if node is None or source is None or (size := _last(source, shapes)) is None:
        return None
    axis = (shapes.rank(source) or 0) - 1
    if _is(node, "Slice"):
        bounds = _bounds(node, axis, shapes)
        if bounds is None:
            return None
        start, end = (min(max(it + size if it < 0 else it, 0), size) for it in bounds)
        return source, start, end
    if not _is(node, "Split") or int_attribute(node, "axis", 0) not in (-1, axis):
        return None
    sizes = [_last(output, shapes) for output in node.outputs]
    if None in sizes or value is None:
        return None
    known = [it for it in sizes if it is not None]
    at = next(index for index, output in enumerate(node.outputs) if output is value)
    return source, sum(known[:at]), sum(known[: at + 1])


def _bounds(node: ir.Node, axis: int, shapes: SymbolicShapes) -> tuple[int, int] | None:
    """Return start and end of a Slice of `axis` alone, by steps of one."""
    numbers = [shapes.scalar(value) for value in node.inputs[1:] if value is not None]
    if len(numbers) != len(node.inputs) - 1 or not 3 <= len(numbers) <= 4:
        return None
    found = [int(number) for number in numbers if number is not None]
    if len(found) != len(numbers) or found[2] not in (-1, axis) or found[3:] not in ([], [1]):
        return None
    return found[0], found[1]


def _last(value: ir.Value, shapes: SymbolicShapes) -> int | None:
    shape = shapes.of(value)
    return shape[-1].known if shape and shape[-1] is not None else None


def _is(node: ir.Node, op_type: str) -> bool:
    return node.domain == "" and node.op_type == op_type


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and _is(node, op_type) else None

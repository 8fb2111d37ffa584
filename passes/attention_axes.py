# SPDX-License-Identifier: Apache-2.0
"""Following axes through operators that move elements, and products of two activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.dims import ONE, Dim, Shape, group_axes, product
from splitfold.passes.shape_rules import axes_of
from splitfold.passes.symbolic_shapes import SymbolicShapes
from splitfold.passes.values import float_attribute, int_attribute, ints_attribute

__all__ = ["Atom", "AxisMap", "Product", "axis_map", "moved_atoms", "product_of"]

AxisMap = list[tuple[int, ...]]
"""By output axis, the axes of the input that it is made from."""


@dataclass(frozen=True, eq=False)
class Product:
    """A product of two matrices, or of two stacks of them.

    Attributes:
        node: MatMul, FusedMatMul or Einsum.
        operands: left and right.
        summed: by operand, the axis that is summed over.
        own: by operand, the axis that only it has.
        out: by operand, where its own axis stands in the output.
        factor: that the product is multiplied with.
    """

    node: ir.Node
    operands: tuple[ir.Value, ir.Value]
    summed: tuple[int, int]
    own: tuple[int, int]
    out: tuple[int, int]
    factor: float = 1.0


def product_of(node: ir.Node | None, shapes: SymbolicShapes) -> Product | None:
    """Return the product that `node` computes, or None."""
    if node is None or len(node.inputs) < 2:
        return None
    left, right = node.inputs[0], node.inputs[1]
    if left is None or right is None:
        return None
    if node.op_type == "Einsum" and node.domain == "" and len(node.inputs) == 2:
        return _einsum(node, left, right)
    if (node.domain, node.op_type) not in (("", "MatMul"), ("com.microsoft", "FusedMatMul")):
        return None
    ranks = (shapes.rank(left), shapes.rank(right))
    if ranks[0] is None or ranks[1] is None or min(ranks[0], ranks[1]) < 2:
        return None
    turned = (int_attribute(node, "transA", 0), int_attribute(node, "transB", 0))
    rank = max(ranks[0], ranks[1])
    summed = (ranks[0] - (2 if turned[0] else 1), ranks[1] - (1 if turned[1] else 2))
    own = (ranks[0] - (1 if turned[0] else 2), ranks[1] - (2 if turned[1] else 1))
    return Product(
        node, (left, right), summed, own, (rank - 2, rank - 1), float_attribute(node, "alpha", 1.0)
    )


def _einsum(node: ir.Node, left: ir.Value, right: ir.Value) -> Product | None:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    if "->" not in equation or "." in equation:
        return None
    inputs, output = equation.split("->")
    a, b = inputs.split(",")
    summed = [letter for letter in a if letter in b and letter not in output]
    own_a = [letter for letter in a if letter not in b and letter in output]
    own_b = [letter for letter in b if letter not in a and letter in output]
    if not len(summed) == len(own_a) == len(own_b) == 1:
        return None
    return Product(
        node,
        (left, right),
        (a.index(summed[0]), b.index(summed[0])),
        (a.index(own_a[0]), b.index(own_b[0])),
        (output.index(own_a[0]), output.index(own_b[0])),
    )


def axis_map(node: ir.Node, shapes: SymbolicShapes, position: int = 0) -> AxisMap | None:
    """Return which axes of input `position` the axes of the first output are made from, of an operator that
    moves elements or works on each alone; None where it cannot be told."""
    shape, out = shapes.of(node.inputs[position]), shapes.of(node.outputs[0])
    if shape is None:
        return None
    rank = len(shape)
    if node.op_type == "Transpose":
        return [(axis,) for axis in ints_attribute(node, "perm") or reversed(range(rank))]
    if node.op_type in ("Squeeze", "Unsqueeze"):
        axes = axes_of(node, shapes)
        return None if axes is None else _squeezed(rank, axes, node.op_type == "Unsqueeze")
    if out is None:
        return None
    if node.op_type in ("Reshape", "Flatten"):
        return _reshaped(shape, out)
    return [(axis - len(out) + rank,) if axis >= len(out) - rank else () for axis in range(len(out))]


def _squeezed(rank: int, axes: tuple[int, ...], adds: bool) -> AxisMap:
    if not adds:
        gone = {axis % rank for axis in axes}
        return [(axis,) for axis in range(rank) if axis not in gone]
    made = rank + len(axes)
    new = {axis % made for axis in axes}
    old = iter(range(rank))
    return [() if axis in new else (next(old),) for axis in range(made)]


def _reshaped(before: Shape, after: Shape) -> AxisMap | None:
    groups = group_axes(before, after)
    if groups is None:
        return _same_ends(before, after)
    found: AxisMap = [() for _ in after]
    for ins, outs in groups:
        real_in = [axis for axis in ins if before[axis] != ONE]
        real_out = [axis for axis in outs if after[axis] != ONE]
        for axis in real_out or outs:
            found[axis] = tuple(real_in or ins)
    return found


def _same_ends(before: Shape, after: Shape) -> AxisMap | None:
    """Match axes from the right as long as their sizes agree: enough where only the batch is unknown."""
    found: AxisMap = [tuple(range(len(before))) for _ in after]
    for back in range(1, min(len(before), len(after)) + 1):
        if before[-back] is None or before[-back] != after[-back]:
            break
        found[-back] = (len(before) - back,)
    return found if found and len(found[-1]) == 1 else None


Atom = tuple[str, Dim | None]
"""A part of an axis: the name of what it counts, and its size."""


def moved_atoms(
    node: ir.Node, atoms: Sequence[tuple[Atom, ...]], shapes: SymbolicShapes
) -> list[tuple[Atom, ...]] | None:
    """Return the parts of each output axis, given those of each input axis: a Reshape may put several into
    one axis, or cut one that it had put together. None where it cannot be told."""
    before, after = shapes.of(node.inputs[0]), shapes.of(node.outputs[0])
    if node.op_type not in ("Reshape", "Flatten"):
        mapped = axis_map(node, shapes)
        if mapped is None:
            return None
        return [tuple(atom for source in sources for atom in atoms[source]) for sources in mapped]
    if before is None or after is None:
        return None
    groups = group_axes(before, after)
    if groups is None:
        mapped = _same_ends(before, after)
        if mapped is None or any(len(sources) > 1 for sources in mapped[1:]):
            return None
        return [tuple(atom for source in sources for atom in atoms[source]) for sources in mapped]
    found: list[tuple[Atom, ...]] = [() for _ in after]
    for ins, outs in groups:
        queue = [atom for axis in ins for atom in atoms[axis] if atom[1] != ONE]
        for axis in outs:
            taken = _take(queue, after[axis])
            if taken is None:
                return None
            found[axis] = taken
    return found


def _take(queue: list[Atom], size: Dim | None) -> tuple[Atom, ...] | None:
    """Take parts off the front of `queue` that make up `size` together, cutting the last if need be."""
    taken: list[Atom] = []
    while product(dim for _, dim in taken) != size:
        if size is None or not queue:
            return None
        name, dim = queue.pop(0)
        rest = size.over(product(held for _, held in taken) or ONE)
        if dim is None or rest is None:
            return None
        if (after := dim.over(rest)) is not None and after != ONE:
            taken.append((f"{name}'", rest))
            queue.insert(0, (f"{name}''", after))
        else:
            taken.append((name, dim))
    return tuple(taken)

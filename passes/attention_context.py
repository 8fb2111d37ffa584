# SPDX-License-Identifier: Apache-2.0
"""From a softmax to the product with the values, and on to where the heads are merged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from splitfold.passes.attention_axes import Atom, Product, axis_map, moved_atoms, product_of
from splitfold.passes.attention_block import Clipping
from splitfold.passes.attention_scores import MOVING, is_stored
from splitfold.passes.dims import ONE
from splitfold.passes.symbolic_shapes import SymbolicShapes
from splitfold.passes.values import constant, float_attribute, sole_consumer

__all__ = ["ContextPath", "Heads", "gate_behind", "heads_of", "trace_context"]

_STEPS = 12
_ONE = 1 + 1e-6
"""Up to rounding, the largest number that needs no clipping."""


@dataclass(frozen=True, eq=False)
class ContextPath:
    """What stands between the softmax and the product.

    Attributes:
        product: of probabilities and values.
        side: which of its operands holds the probabilities: 0 or 1.
        guarded: see `Probabilities`.
        clipping: see `Probabilities`.
    """

    product: Product
    side: int
    guarded: ir.Value
    clipping: Clipping | None = None


@dataclass(frozen=True)
class _At:
    """Where the walk stands: a value that is ``slope * p + offset``, clipped or not."""

    value: ir.Value
    axis: int
    guarded: ir.Value
    slope: float = 1.0
    offset: float = 0.0
    clipping: Clipping | None = None


def trace_context(softmax: ir.Value, axis: int, shapes: SymbolicShapes) -> ContextPath | str:
    """Return the way from a softmax along `axis` to the product that sums over it; a text says why there is
    none."""
    pending = [_At(softmax, axis, softmax)]
    reason = "nothing reads it"
    for _ in range(_STEPS):
        following: list[_At] = []
        for at in pending:
            for use in at.value.uses():
                found = product_of(use.node, shapes)
                if found is not None:
                    path = _arrive(found, use.idx, at)
                    if isinstance(path, ContextPath):
                        return path
                    reason = path
                elif (step := _step(use.node, use.idx, at, shapes)) is not None:
                    following.append(step)
                elif use.node.op_type != "IsNaN":
                    reason = f"it is read by {use.node.op_type}, not by a product with values"
        if not following:
            break
        pending = following
    if softmax.is_graph_output() and not softmax.uses():
        return "it is an output of the model: a classifier's probabilities"
    return reason


def _arrive(found: Product, side: int, at: _At) -> ContextPath | str:
    if found.summed[side] != at.axis:
        return "the product after it does not sum over its axis"
    if is_stored(found.operands[1 - side]):
        return "the product after it has a constant weight: it mixes no values of the input"
    return ContextPath(found, side, at.guarded, at.clipping)


def _step(node: ir.Node, position: int, at: _At, shapes: SymbolicShapes) -> _At | None:
    """Return where the walk stands after `node`, which reads it at `position`; None where it may not pass."""
    if node.domain != "" or not node.outputs:
        return None
    if node.op_type == "Where" and _guards(node, at.value):
        return replace(at, value=node.outputs[0], guarded=node.outputs[0])
    affine = _affine(node, position, at, shapes)
    if affine is not None:
        return affine
    if node.op_type not in MOVING or position != 0:
        return None
    mapped = axis_map(node, shapes)
    places = [i for i, sources in enumerate(mapped or ()) if sources == (at.axis,)]
    return replace(at, value=node.outputs[0], axis=places[0]) if places else None


def _guards(node: ir.Node, value: ir.Value) -> bool:
    """Whether a Where replaces NaN in `value`, as rows with no key have it."""
    condition = node.inputs[0].producer() if node.inputs[0] is not None else None
    return (
        condition is not None
        and condition.op_type == "IsNaN"
        and condition.inputs[0] is value
        and node.inputs[2] is value
    )


def _affine(node: ir.Node, position: int, at: _At, shapes: SymbolicShapes) -> _At | None:
    """Return where the walk stands after a scaling, a shift or a clip to [0, 1]."""
    out = node.outputs[0]
    if node.op_type == "HardSigmoid":
        slope, offset = float_attribute(node, "alpha", 0.2), float_attribute(node, "beta", 0.5)
        return _clipped(at, out, slope * at.slope, slope * at.offset + offset)
    if node.op_type == "Relu" and at.slope + at.offset > _ONE:
        return None
    if node.op_type == "Relu" or (node.op_type == "Clip" and position == 0 and _to_unit(node, shapes)):
        return _clipped(at, out, at.slope, at.offset)
    if node.op_type not in ("Add", "Div", "Mul", "Sub") or len(node.inputs) != 2:
        return None
    if shapes.rank(at.value) != shapes.rank(out):
        return None
    number = shapes.scalar(node.inputs[1 - position])
    if number is None:
        # a mask of heads or positions
        return replace(at, value=out, clipping=at.clipping) if node.op_type == "Mul" else None
    if position == 1 and node.op_type in ("Div", "Sub"):
        return None
    if node.op_type in ("Mul", "Div"):
        factor = number if node.op_type == "Mul" else 1 / number if number else 0.0
        return replace(at, value=out, slope=at.slope * factor, offset=at.offset * factor)
    return replace(at, value=out, offset=at.offset + (number if node.op_type == "Add" else -number))


def _to_unit(node: ir.Node, shapes: SymbolicShapes) -> bool:
    bounds = [shapes.scalar(value) for value in node.inputs[1:]]
    return bounds == [0.0, 1.0]


def _clipped(at: _At, out: ir.Value, slope: float, offset: float) -> _At:
    clipping = Clipping(offset, slope + offset)
    return _At(out, at.axis, at.guarded, clipping=clipping)


@dataclass(frozen=True, eq=False)
class Heads:
    """What happens to the context after the product.

    Attributes:
        axes: of the context, those that are merged with the channels of a head.
        count: how many heads they count; None where a size is unknown, or heads are never merged.
        merged: the value with the heads side by side, or None.
        gate: what the context is multiplied with before, or None.
    """

    axes: tuple[int, ...] = ()
    count: int | None = None
    merged: ir.Value | None = None
    gate: ir.Value | None = None


def heads_of(context: ir.Value, size_axis: int, shapes: SymbolicShapes) -> Heads:
    """Follow the context to where its channels, on axis `size_axis`, are put beside those of other heads."""
    shape = shapes.of(context)
    if shape is None:
        return Heads()
    atoms: list[tuple[Atom, ...]] | None = [((str(axis), dim),) for axis, dim in enumerate(shape)]
    value, gate = context, None
    for _ in range(_STEPS):
        node = _onward(value)
        if node is None or atoms is None:
            break
        if node.op_type == "Mul":
            other = node.inputs[1 if node.inputs[0] is value else 0]
            gate = other if constant(other) is None else gate
        elif node.op_type not in MOVING:
            break
        else:
            atoms = moved_atoms(node, atoms, shapes)
        value = node.outputs[0]
        joined = _joined(atoms, str(size_axis)) if atoms is not None else None
        if joined:
            return _merged(joined, value, gate or gate_behind(value))
    rank = shapes.rank(value)
    between = [dim for axis, dim in enumerate(shape[1:], 1) if axis != size_axis]
    if rank is not None and rank < len(shape) and ONE in between:  # an axis of one head is gone
        return Heads((), 1, value, gate or gate_behind(value))
    return Heads(gate=gate)


def gate_behind(merged: ir.Value) -> ir.Value | None:
    """Return what merged heads are multiplied with where they are taken apart again for it."""
    apart = _onward(merged)
    if apart is None or apart.op_type != "Reshape":
        return None
    product = _onward(apart.outputs[0])
    if product is None or product.op_type != "Mul":
        return None
    other = product.inputs[1 if product.inputs[0] is apart.outputs[0] else 0]
    return other if constant(other) is None else None


def _onward(value: ir.Value) -> ir.Node | None:
    """Return the one node that goes on with `value`, leaving aside those that read its shape."""
    readers = {use.node for use in value.uses() if use.node.op_type != "Shape"}
    if len(readers) == 1:
        return next(iter(readers))
    return sole_consumer(value)


def _joined(atoms: list[tuple[Atom, ...]], size: str) -> tuple[Atom, ...]:
    """Return the parts that stand before the channels of a head in their axis."""
    for parts in atoms:
        names = [name for name, _ in parts]
        if size in names:
            return tuple(part for part in parts[: names.index(size)] if part[1] != ONE)
    return ()


def _merged(parts: tuple[Atom, ...], value: ir.Value, gate: ir.Value | None) -> Heads:
    axes = tuple(int(name) for name, _ in parts if name.isdigit())
    count = 1
    for _, dim in parts:
        if dim is None or dim.known is None:
            return Heads(axes, None, value, gate)
        count *= dim.known
    return Heads(axes if len(axes) == len(parts) else (), count, value, gate)

# SPDX-License-Identifier: Apache-2.0
"""Where queries, keys and values come from: projections, the attention's input, rotary positions, repeated
heads, a cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from splitfold.passes.attention_block import Operand, Rotary
from splitfold.passes.attention_scores import MOVING, is_stored
from splitfold.passes.dims import Dim, product
from splitfold.passes.symbolic_shapes import SymbolicShapes
from splitfold.passes.values import constant

__all__ = ["is_cross", "operand_of", "scale_before"]

_WEIGHT_AT = {
    "Conv": 1, "ConvInteger": 1, "DynamicQuantizeMatMul": 1, "Einsum": 1, "FusedConv": 1, "FusedGemm": 1,
    "FusedMatMul": 1, "Gemm": 1, "MatMul": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1, "MatMulNBits": 1,
    "QGemm": 3, "QLinearConv": 3, "QLinearMatMul": 3,
}  # fmt: skip
"""Operators with a stored weight, and which input it is."""
_FIRST_ONLY = MOVING | {"Gather", "GatherElements", "GatherND", "Pad", "Slice", "Split", "Tile", "Trilu"}
"""Operators whose other inputs say where elements go, not what they are."""
_SHAPES = {"ConstantOfShape", "NonZero", "Range", "Shape", "Size"}
_FUSED_ROTARY = "RotaryEmbedding"
_CARRIES = {
    "Cast", "DequantizeLinear", "DynamicQuantizeLinear", "Gather", "Identity", "QuantizeLinear", "Reshape",
    "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


@dataclass
class _Cone:
    """What was met on the way back from an operand."""

    nodes: list[ir.Node] = field(default_factory=list)
    projections: list[ir.Node] = field(default_factory=list)
    inputs: list[ir.Value] = field(default_factory=list)


def operand_of(value: ir.Value, shapes: SymbolicShapes) -> Operand:
    """Return what is known of an operand of the two products."""
    cone = _cone_of(value)
    fed = list(dict.fromkeys(v for node in cone.projections if (v := _fed(node)) is not None))
    roots = list(dict.fromkeys(_root(v) for v in fed)) or cone.inputs
    live = _live(cone)
    return Operand(
        value,
        tuple(cone.projections),
        fed[0] if len(fed) == 1 else None,
        roots[0] if len(roots) == 1 else None,
        _repeats(live, shapes),
        _rotary(cone, live, shapes),
        next(iter(cone.inputs), None) if cone.projections else None,
    )


def _cone_of(value: ir.Value) -> _Cone:
    """Walk back over data (not over shapes and indices) to layers with weights and to graph inputs."""
    cone = _Cone()
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        here = pending.pop()
        node = here.producer()
        if here in seen or constant(here) is not None or _is_scale(here):
            continue
        seen.add(here)
        if node is None:
            if here.is_graph_input() and here.dtype is not None and here.dtype.is_floating_point():
                cone.inputs.append(here)
        elif _is_projection(node):
            if node not in cone.projections:
                cone.projections.append(node)
        elif node.op_type not in _SHAPES:
            cone.nodes.append(node)
            pending.extend(reversed(_data_inputs(node)))
    return cone


def _is_scale(value: ir.Value) -> bool:
    """Whether `value` is a scale or zero point that DynamicQuantizeLinear computes."""
    node = value.producer()
    return node is not None and node.op_type == "DynamicQuantizeLinear" and node.outputs[0] is not value


def _data_inputs(node: ir.Node) -> list[ir.Value]:
    if node.op_type in _FIRST_ONLY:
        return [value for value in node.inputs[:1] if value is not None]
    if node.op_type == "Where":
        return [value for value in node.inputs[1:] if value is not None]
    return [value for value in node.inputs if value is not None]


def _is_projection(node: ir.Node) -> bool:
    at = _WEIGHT_AT.get(node.op_type)
    if at is None or at >= len(node.inputs) or not is_stored(node.inputs[at]):
        return False
    weight = node.inputs[at]
    tensor = constant(weight)
    return tensor is None or sum(size > 1 for size in tensor.shape.numpy()) > 1


def _fed(node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def _root(value: ir.Value) -> ir.Value:
    """Return what `value` was before it was moved or quantized."""
    producer = value.producer()
    while producer is not None and producer.op_type in _CARRIES and producer.inputs:
        source = producer.inputs[0]
        if source is None or constant(source) is not None:  # a table that is looked up
            break
        value, producer = source, source.producer()
    return value


def is_cross(query: Operand, key: Operand) -> bool | None:
    """Return whether keys come from elsewhere than queries: neither from the same value, nor from one that
    was made of it (as where keys are pooled first)."""
    if query.root is None or key.root is None:
        return None
    if query.root is key.root:
        return False
    seen: set[ir.Node] = set()
    pending = [key.root.producer()]
    while pending:
        node = pending.pop()
        if node is None or node in seen or node.op_type in _SHAPES:
            continue
        if query.root in node.inputs:
            return False
        seen.add(node)
        pending.extend(value.producer() for value in node.inputs if value is not None)
    return True


def scale_before(value: ir.Value, shapes: SymbolicShapes) -> float | None:
    """Return the product of the scalar factors of an operand of the scores, up to the first operator that
    does more than move elements; None where such a factor is not known."""
    scale = 1.0
    node = value.producer()
    while node is not None and node.domain == "":
        if node.op_type in MOVING:
            value_before = node.inputs[0]
        elif node.op_type in ("Mul", "Div") and (side := _scalar_side(node, shapes)) is not None:
            number = shapes.scalar(node.inputs[side])
            if number is None or number == 0:
                return None
            scale *= number if node.op_type == "Mul" else 1 / number
            value_before = node.inputs[1 - side]
        else:
            break
        node = value_before.producer() if value_before is not None else None
    return scale


def _scalar_side(node: ir.Node, shapes: SymbolicShapes) -> int | None:
    for side in (1, 0) if node.op_type == "Mul" else (1,):
        shape = shapes.of(node.inputs[side])
        if shape is not None and all(dim == Dim(1) for dim in shape):
            return side
    return None


def _live(cone: _Cone) -> set[ir.Node]:
    """Return the nodes of a cone that carry what a projection computes."""
    carriers = {output for node in cone.projections for output in node.outputs}
    live: set[ir.Node] = set()
    changed = True
    while changed:
        changed = False
        for node in cone.nodes:
            if node not in live and any(value in carriers for value in _data_inputs(node)):
                live.add(node)
                carriers.update(node.outputs)
                changed = True
    return live


def _repeats(live: Iterable[ir.Node], shapes: SymbolicShapes) -> int:
    """Return by how much elements are repeated along other axes than that of channels: heads of keys and
    values, in grouped-query attention."""
    total = 1
    for node in live:
        if not _may_repeat(node):
            continue
        before, after = shapes.of(node.inputs[0]), shapes.of(node.outputs[0])
        size, grown = product((before or (None,))[:-1]), product((after or (None,))[:-1])
        ratio = grown.over(size) if size is not None and grown is not None else None
        if ratio is not None and ratio.known is not None:
            total *= ratio.known
    return total


def _may_repeat(node: ir.Node) -> bool:
    if node.op_type == "Gather":
        return constant(node.inputs[1]) is not None
    return node.op_type in ("Expand", "Tile") or (
        node.op_type == "Concat" and len(set(node.inputs)) == 1 and len(node.inputs) > 1
    )


# Rotary positions


def _rotary(cone: _Cone, live: Iterable[ir.Node], shapes: SymbolicShapes) -> Rotary | None:
    """Return the two tables that a rotation multiplies channels with: operands of Mul that do not come from
    the projection and differ from position to position."""
    carrying = set(live)
    for node in cone.nodes:
        if node.op_type == _FUSED_ROTARY:
            tables = node.inputs[2:4] if node.domain else node.inputs[1:3]
            return Rotary(tables[0], tables[1])
    factors: list[ir.Value] = []
    for node in cone.nodes:
        if node.op_type == "Mul" and node in carrying:
            factors += [v for v in node.inputs if v is not None and _is_table(v, cone, carrying, shapes)]
    roots = {_table_root(value): value for value in reversed(factors)}
    if len(roots) < 2:
        return None
    named = {_kind(root): value for root, value in roots.items()}
    return Rotary(named.get("Cos"), named.get("Sin"))


def _is_table(value: ir.Value, cone: _Cone, live: set[ir.Node], shapes: SymbolicShapes) -> bool:
    producer = value.producer()
    if producer is not None and (producer in live or producer in cone.projections):
        return False
    shape = shapes.of(value)
    return shape is not None and sum(dim != Dim(1) for dim in shape) >= 2


def _table_root(value: ir.Value) -> ir.Value:
    """Return the value that a table is cut and moved from: the output of Cos or Sin, or a constant."""
    producer = value.producer()
    while producer is not None and producer.op_type in _FIRST_ONLY | {"Mul"}:
        following = producer.inputs[0]
        if producer.op_type == "Mul" and constant(following) is not None and len(producer.inputs) > 1:
            following = producer.inputs[1]
        if following is None:
            break
        value, producer = following, following.producer()
    return value


def _kind(root: ir.Value) -> str:
    """Return Cos or Sin: by the operator, or by the first row of a constant table, which is 1 or 0."""
    producer, tensor = root.producer(), constant(root)
    if tensor is None:
        return producer.op_type if producer is not None else ""
    array = np.asarray(tensor.numpy())
    rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
    return "Cos" if np.allclose(rows[0], 1) else "Sin" if np.allclose(rows[0], 0) else ""

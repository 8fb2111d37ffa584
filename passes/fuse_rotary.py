# SPDX-License-Identifier: Apache-2.0
"""Rotary positions written out, as ONNX's operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.identity import display_layer
from splitfold.passes.later_operators import make_available
from splitfold.passes.rotary_forms import Rotation, Table, rotations, table_of, turned_part, whole_of
from splitfold.passes.symbolic_shapes import SymbolicShapes, symbolic_shapes
from splitfold.passes.values import drop_computed, emit, replace_value

__all__ = ["FuseRotaryPass"]

_OPERATOR, _OPSET = "RotaryEmbedding", 23
"""The operator is there from this version on."""
_Halves = dict[tuple[ir.Value, tuple[ir.Node, ...]], ir.Value]


@dataclass(frozen=True)
class FuseRotaryPass(LayerPass):
    """Write rotary positions as one RotaryEmbedding of ONNX opset 23. Exact but for rounding.

    Halves are neither cut out nor joined, and cosines and sines are computed of half as many angles.

    Before::

        c, s = Unsqueeze(Cos(Concat(f, f))), Unsqueeze(Sin(Concat(f, f)))
        y = x * c + Concat(-x[..., d/2:], x[..., :d/2]) * s

    After::

        y = RotaryEmbedding(x, Cos(f), Sin(f))
    """

    name: ClassVar[str] = "fuse-rotary"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "a sum that turns the halves of each head by position"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        found = self._found(model)
        self.check_patterns(display_layer(it.add) for it, _ in found)
        reason = ""
        if any(isinstance(parts, _Parts) for _, parts in found):
            reason = make_available(model, _OPERATOR, _OPSET, context.target)
            found = self._found(model)  # of the raised model
        halves: _Halves = {}
        made: dict[ir.Value, ir.Value] = {}
        changed = False
        for rotation, parts in found:
            layer = display_layer(rotation.add)
            if isinstance(parts, str) or reason:
                findings.skip(layer, parts if isinstance(parts, str) else reason)
                continue
            _fuse(rotation, parts, halves, made)
            findings.apply(layer, "rotary positions as one operator")
            changed = True
        return changed

    def _found(self, model: ir.Model) -> list[tuple[Rotation, _Parts | str]]:
        """Return each rotation with what the operator reads, or with the reason why it stays."""
        places = [it for graph in model.graphs() for it in rotations(graph)]
        shapes = symbolic_shapes(model) if places else SymbolicShapes()
        return [(it, self.unwanted(display_layer(it.add)) or _parts(it, shapes)) for it in places]


@dataclass(frozen=True)
class _Parts:
    """What the operator reads, the node whose place it takes, and how many elements of a head it turns (0:
    all)."""

    x: ir.Value
    cosines: Table
    sines: Table
    last: ir.Node
    size: int


def _parts(rotation: Rotation, shapes: SymbolicShapes) -> _Parts | str:
    found = turned_part(rotation, shapes)
    if found is None:
        return "it does not turn the two halves of what it multiplies with its cosines"
    x, straight = found
    shape = shapes.of(x)
    if shape is None or len(shape) != 4 or x.dtype is not ir.DataType.FLOAT:
        return "what it turns is not float32 [batch, heads, positions, size]"
    cosines, sines = table_of(straight, shapes), table_of(rotation.sines, shapes)
    if cosines is None or sines is None:
        return "nothing shows that the halves of its cosines and of its sines are equal"
    size = (shape[-1].known if shape[-1] is not None else None) or 0
    for table in (cosines, sines):
        half = shapes.of(table.half)
        if half is None or half[0] is None or half[1] is None or half[:2] != (shape[0], shape[2]):
            return "its cosines and sines are not known to have the batch and the positions of what it turns"
        if half[2] is None or half[2].known != size // 2 or not size:
            return "its cosines and sines do not have the size of its heads"
    whole = whole_of(rotation, x, shapes)
    if whole is not None:
        return _Parts(whole[1], cosines, sines, whole[0], size)
    return _Parts(x, cosines, sines, rotation.add, 0)


def _fuse(rotation: Rotation, parts: _Parts, halves: _Halves, made: dict[ir.Value, ir.Value]) -> None:
    """Put the operator in the place of `parts.last`; `made` is what took the place of values before."""
    last = parts.last.outputs[0]
    cosines, sines = (_half(table, halves, made) for table in (parts.cosines, parts.sines))
    turned = emit(
        parts.last,
        _OPERATOR,
        [made.get(parts.x, parts.x), cosines, sines],
        origins=_between(rotation, parts),
        attributes={"rotary_embedding_dim": parts.size or None},
        names=[f"{last.name}_rotary"],
        like=last,
    )
    made[last] = turned
    replace_value(last, turned)
    drop_computed(last)


def _half(table: Table, halves: _Halves, made: dict[ir.Value, ir.Value]) -> ir.Value:
    """Return the table's half [batch, positions, size / 2], computed once for all that read it."""
    key = (table.half, table.functions)
    if key not in halves:
        value = made.get(table.half, table.half)
        for node in table.functions:
            inputs: Sequence[ir.Value | None] = [
                it if it is not None and it.is_initializer() else value for it in node.inputs
            ]
            value = emit(
                table.join, node.op_type, inputs, origins=[node],
                names=[f"{node.outputs[0].name}_half"], like=table.half,
            )  # fmt: skip
        halves[key] = value
    return halves[key]


def _between(rotation: Rotation, parts: _Parts) -> list[ir.Node]:
    """Return the nodes that the operator takes the place of: from the last one back to what it reads."""
    nodes = [rotation.add, rotation.half_turn]
    read = [value for node in (*nodes, parts.last) for value in node.inputs if value is not None]
    makers = [value.producer() for value in read if value is not parts.x]
    return [*nodes, *(node for node in makers if node is not None)]

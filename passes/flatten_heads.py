# SPDX-License-Identifier: Apache-2.0
"""Attention operators that read and write their heads side by side, so that nothing is turned around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.dims import Dim, Shape, declare_shape
from splitfold.passes.identity import display_layer, layers_of, stamp
from splitfold.passes.symbolic_shapes import SymbolicShapes, symbolic_shapes
from splitfold.passes.values import (
    drop_computed,
    emit,
    int_attribute,
    ints_attribute,
    replace_value,
    sole_consumer,
)

__all__ = ["FlattenHeadsPass"]

_OPERANDS = ("queries", "keys", "values")
_TURN = (0, 2, 1, 3)


@dataclass(frozen=True)
class FlattenHeadsPass(LayerPass):
    """Let ONNX's Attention, and RotaryEmbedding before it, work on [batch, positions, heads * size], not on
    [batch, heads, positions, size]. Exact, up to the order of sums.

    The caches of keys and values keep their four axes.

    Before::

        q4, k4, v4 = (Transpose(Reshape(x), [0, 2, 1, 3]) for x in (q, k, v))
        q5, k5 = RotaryEmbedding(q4), RotaryEmbedding(k4)
        c, keys, values = Attention(q5, k5, v4, mask, past_keys, past_values)
        y = Reshape(Transpose(c, [0, 2, 1, 3]))

    After::

        q3, k3 = RotaryEmbedding(q, num_heads=h), RotaryEmbedding(k, num_heads=g)
        y, keys, values = Attention(q3, k3, v, mask, past_keys, past_values, q_num_heads=h, kv_num_heads=g)
    """

    name: ClassVar[str] = "flatten-heads"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "an Attention operator whose heads are an axis of their own"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        shapes = symbolic_shapes(model)
        nodes = [node for node in model.graph.all_nodes() if _has_head_axis(node, shapes)]
        self.check_patterns(map(display_layer, nodes))
        for node in nodes:
            name = display_layer(node)
            found = self.unwanted(name) or _flat(node, shapes)
            if isinstance(found, str):
                findings.skip(name, found)
                continue
            _flatten(node, found)
            heads = found.operands[0].heads
            findings.apply(name, f"{heads} head{'' if heads == 1 else 's'} side by side")
        return bool(findings.applied)


@dataclass(frozen=True)
class _Operand:
    """Queries, keys or values with their heads side by side, [batch, positions, heads * size].

    Attributes:
        flat: them, before rotary positions.
        shape: its sizes.
        heads: how many.
        size: of each head.
        rotary: the RotaryEmbedding behind them, or None.
        moved: the Transpose and the Reshape that gave heads an axis.
    """

    flat: ir.Value
    shape: Shape
    heads: int
    size: Dim
    rotary: ir.Node | None
    moved: tuple[ir.Node, ...]


@dataclass(frozen=True)
class _Flat:
    """What an operator becomes.

    Attributes:
        operands: queries, keys and values.
        turn, merge: the Transpose and the Reshape behind it.
        shape: of what it writes, [batch, positions, heads * size].
        keep: whether the Reshape makes another shape, and stays.
    """

    operands: tuple[_Operand, ...]
    turn: ir.Node
    merge: ir.Node
    shape: Shape
    keep: bool


def _has_head_axis(node: ir.Node, shapes: SymbolicShapes) -> bool:
    operator = (node.domain, node.op_type) == ("", "Attention")
    return operator and bool(node.inputs) and shapes.rank(node.inputs[0]) == 4


def _flat(node: ir.Node, shapes: SymbolicShapes) -> _Flat | str:
    """Return what the operator reads and writes with heads side by side, or why it cannot."""
    operands = [
        _operand(value, node, name, shapes) for name, value in zip(_OPERANDS, node.inputs[:3], strict=True)
    ]
    found = [operand for operand in operands if isinstance(operand, _Operand)]
    reason = next((operand for operand in operands if isinstance(operand, str)), None)
    if reason is not None:
        return reason
    query, key, value = found
    if key.heads != value.heads or query.heads % key.heads or query.size != key.size:
        return (
            f"{query.heads} heads of queries of {query.size}, {key.heads} of keys of {key.size} and "
            f"{value.heads} of values do not fit each other"
        )
    turn = sole_consumer(node.outputs[0])
    if turn is None or not _is_turn(turn):
        return "its heads are not merged by a Transpose and a Reshape that alone read them"
    merge = sole_consumer(turn.outputs[0])
    if merge is None or not _is(merge, "Reshape") or merge.inputs[0] is not turn.outputs[0]:
        return "its heads are not merged by a Transpose and a Reshape that alone read them"
    shape = (*query.shape[:2], value.size * Dim(query.heads))
    if shapes.of(merge.outputs[0]) != shape and not _same_target(merge, shapes):
        return "the Reshape behind it does not put its heads side by side, or sizes are unknown"
    return _Flat(tuple(found), turn, merge, shape, shapes.of(merge.outputs[0]) != shape)


def _same_target(merge: ir.Node, shapes: SymbolicShapes) -> bool:
    """Whether a Reshape of [batch, positions, heads, size] does the same to [batch, positions, channels]:
    it copies no size but the first two."""
    target = shapes.content(merge.inputs[1])
    known = target is not None and None not in target
    return known and Dim(0) not in (target or ())[2:] and int_attribute(merge, "allowzero", 0) == 0


def _operand(value: ir.Value | None, node: ir.Node, name: str, shapes: SymbolicShapes) -> _Operand | str:
    made = value.producer() if value is not None else None
    rotary = made if _is(made, "RotaryEmbedding") else None
    turned = rotary.inputs[0] if rotary is not None else value
    turn = turned.producer() if turned is not None else None
    split = turn.inputs[0].producer() if _is_turn(turn) and turn is not None and turn.inputs[0] else None
    if value is None or turned is None or turn is None or split is None or not _is(split, "Reshape"):
        return f"its {name} are not split into heads by a Reshape and a Transpose"
    if not _only_for(value, node) or (rotary is not None and not _only_for(turned, rotary)):
        return f"its {name} with an axis of heads are read elsewhere too"
    flat, parted = shapes.of(split.inputs[0]), shapes.of(split.outputs[0])
    if split.inputs[0] is None or flat is None or parted is None or None in (*flat, *parted):
        return f"sizes of its {name} are unknown"
    heads, size = parted[2], parted[3]
    if heads is None or size is None or heads.known is None:
        return f"nobody knows how many heads its {name} have"
    if len(flat) != 3 or flat != (*parted[:2], heads * size):
        return f"its {name} are no heads side by side before they are split"
    return _Operand(split.inputs[0], flat, heads.known, size, rotary, (turn, split))


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.domain == "" and node.op_type == op_type


def _is_turn(node: ir.Node | None) -> bool:
    return node is not None and _is(node, "Transpose") and ints_attribute(node, "perm") == _TURN


def _only_for(value: ir.Value, reader: ir.Node) -> bool:
    return not value.is_graph_output() and all(use.node is reader for use in value.uses())


def _flatten(node: ir.Node, found: _Flat) -> None:
    query, key, _ = found.operands
    merged = found.turn.outputs[0] if found.keep else found.merge.outputs[0]
    old = (merged, *node.outputs[1:])
    made = emit(
        node,
        "Attention",
        [*map(_turned, found.operands), *node.inputs[3:]],
        attributes={**node.attributes, "q_num_heads": query.heads, "kv_num_heads": key.heads},
        names=[f"{output.name}_flat" for output in old],
    )
    whole = made.producer()
    if whole is None:
        raise ValueError(f"{display_layer(node)}: nothing was made")
    moved = [found.turn, *(step for operand in found.operands for step in operand.moved)]
    names = {name for step in (*moved, found.merge) for name in layers_of(step)}
    for before, after in zip(old, whole.outputs, strict=True):
        after.type, after.shape = before.type, before.shape
    if found.keep:
        declare_shape(made, found.shape)
        found.merge.replace_input_with(0, made)
    else:
        replace_value(merged, made)
    for before, after in zip(old[1:], whole.outputs[1:], strict=True):
        replace_value(before, after)
    for before in old:
        drop_computed(before)
    _inherit_lost(whole, names)


def _turned(operand: _Operand) -> ir.Value:
    """Return an operand with rotary positions, where it has them, heads side by side."""
    rotary = operand.rotary
    if rotary is None:
        return operand.flat
    return emit(
        rotary,
        "RotaryEmbedding",
        [operand.flat, *rotary.inputs[1:]],
        attributes={**rotary.attributes, "num_heads": operand.heads},
        names=[f"{rotary.outputs[0].name}_flat"],
        like=operand.flat,
    )


def _inherit_lost(node: ir.Node, names: set[str]) -> None:
    """Let `node` bear those of `names` that no other node bears any more."""
    others: Sequence[ir.Node] = list(node.graph) if node.graph is not None else []
    stamp(node, names - {name for other in others for name in layers_of(other)})

# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache of keys and values, as ONNX's operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.attention import find_attention
from splitfold.passes.attention_block import Attention, AttentionForm, Operand, TermKind
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.dims import Dim
from splitfold.passes.later_operators import make_available
from splitfold.passes.symbolic_shapes import SymbolicShapes, symbolic_shapes
from splitfold.passes.values import (
    drop_computed,
    emit,
    int_attribute,
    ints_attribute,
    replace_value,
)

__all__ = ["FuseCachedAttentionPass"]

_OPSET = 23
_OPERATOR = "Attention"
"""The operator is there from this version on."""
_REPEATING = ("Reshape", "Expand", "Unsqueeze")
"""How heads of keys and values are repeated for groups, from the product back."""


@dataclass(frozen=True)
class FuseCachedAttentionPass(LayerPass):
    """Write attention whose keys and values are a cache's and new ones as one Attention of ONNX opset 23.
    Exact but for rounding.

    Keys and values are neither turned nor repeated for groups of heads, which at a step of one token is most
    of what attention takes.

    Before::

        keys, values = Concat(past_keys, k), Concat(past_values, v)
        p = Softmax(scale * q Transpose(Expand(keys)) + mask)
        y = p Expand(values)

    After::

        y, keys, values = Attention(q, k, v, mask, past_keys, past_values, scale=scale)
    """

    name: ClassVar[str] = "fuse-cached-attention"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "an attention block that is written out, over a cache"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        found = self._found(model)
        self.check_patterns(block.name for block, _ in found)
        reason = ""
        if any(isinstance(parts, _Parts) for _, parts in found):
            reason = make_available(model, _OPERATOR, _OPSET, context.target)
            found = self._found(model)  # of the raised model
        changed = False
        for block, parts in found:
            if isinstance(parts, str) or reason:
                findings.skip(block.name, parts if isinstance(parts, str) else reason)
                continue
            _fuse(block, parts)
            findings.apply(block.name, f"one Attention of {parts.heads} heads over its cache")
            changed = True
        return changed

    def _found(self, model: ir.Model) -> list[tuple[Attention, _Parts | str]]:
        """Return each written-out block with the operator's inputs, or with the reason why it stays."""
        blocks = [it for it in find_attention(model).blocks if it.form is AttentionForm.DECOMPOSED]
        shapes = symbolic_shapes(model) if blocks else SymbolicShapes()
        return [(block, self.unwanted(block.name) or _parts(block, shapes)) for block in blocks]


@dataclass(frozen=True)
class _Parts:
    """What the operator reads, and the two Concats whose place its further outputs take."""

    heads: int
    inputs: Sequence[ir.Value | None]
    keys: ir.Node
    values: ir.Node


def _parts(block: Attention, shapes: SymbolicShapes) -> _Parts | str:
    keys = _joined(block.key, ("Transpose",), block, shapes)
    values = _joined(block.value, (), block, shapes)
    if isinstance(keys, str) or isinstance(values, str):
        return keys if isinstance(keys, str) else str(values)
    if (reason := _obstacle(block)) is not None:
        return reason
    query = block.query.value
    count = _heads(block, shapes)
    if shapes.rank(query) != 4 or count is None:
        return "its queries are not [batch, heads, positions, size], or nobody knows how many heads there are"
    masks = [term.value for term in block.terms]
    if masks and not _fits(masks[0], block, shapes):
        return "its mask does not have the shape [batch, heads, queries, keys]"
    mask = masks[0] if masks else None
    (past_keys, new_keys), (past_values, new_values) = keys.inputs, values.inputs
    inputs = [query, new_keys, new_values, mask, past_keys, past_values]
    return _Parts(count, inputs, keys, values)


def _heads(block: Attention, shapes: SymbolicShapes) -> int | None:
    """Return how many heads the context [batch, heads, positions, size] has; None where it is another."""
    shape = shapes.of(block.context)
    return shape[1].known if shape is not None and len(shape) == 4 and shape[1] is not None else None


def _obstacle(block: Attention) -> str | None:
    p = block.probabilities
    if p is None or p.clipping is not None:
        return "its softmax is clipped"
    if p.guarded is not p.softmax:
        return "a guard against NaN stands behind its softmax"
    if p.softmax.is_graph_output() or (block.scores is not None and block.scores.is_graph_output()):
        return "its probabilities or scores are outputs of the model"
    if block.scale is None:
        return "its scale is computed"
    if block.softcap is not None:
        return "its scores are capped"
    if len(block.terms) > 1 or any(term.kind is not TermKind.MASK for term in block.terms):
        return "more than a mask is added to its scores"
    if block.terms and block.terms[0].value.dtype is not ir.DataType.FLOAT:
        return "its mask is not added but chosen by a Where"
    return None


def _joined(
    operand: Operand, turn: tuple[str, ...], block: Attention, shapes: SymbolicShapes
) -> ir.Node | str:
    """Return how an operand is made of its cache: a Concat [past, new] of [batch, heads, positions, size],
    each head repeated for the queries' heads of its group, and what is in `turn`; or why it is none."""
    other = "its keys and values are not those of a cache with new ones behind them, heads repeated at most"
    nodes: list[ir.Node] = []
    value: ir.Value | None = operand.value
    while value is not None and (node := value.producer()) is not None and node.domain == "":
        nodes.append(node)
        if node.op_type == "Concat" or len(nodes) > len(turn) + len(_REPEATING) or not node.inputs:
            break
        value = node.inputs[0]
    kinds = tuple(node.op_type for node in nodes)
    if kinds not in ((*turn, "Concat"), (*turn, *_REPEATING, "Concat")):
        return other
    join = nodes[-1]
    along = int_attribute(join, "axis", 0) in (2, -2) and len(join.inputs) == 2
    turned = all(ints_attribute(node, "perm") == (0, 1, 3, 2) for node in nodes[: len(turn)])
    if not along or not turned or not _is_cache(join.inputs[0]):
        return other
    if len(kinds) > len(turn) + 1 and not _by_groups(nodes[len(turn) :], block, shapes):
        return other
    reader = nodes[-2] if len(nodes) > 1 else block.context.producer()
    if {use.node for use in join.outputs[0].uses()} != {reader}:
        return "its cache with the new positions is also read elsewhere"
    return join


def _is_cache(value: ir.Value | None) -> bool:
    return value is not None and value.is_graph_input() and not value.is_initializer()


def _by_groups(nodes: Sequence[ir.Node], block: Attention, shapes: SymbolicShapes) -> bool:
    """Whether each head is repeated next to itself, [batch, heads, 1, ...] to [batch, heads, repeats, ...];
    `nodes` are the Reshape, the Expand, the Unsqueeze and the Concat."""
    flat, grown, deep, joined = (shapes.of(node.outputs[0]) for node in nodes)
    if flat is None or grown is None or deep is None or joined is None:
        return False
    kept, count = joined[1].known if joined[1] is not None else None, _heads(block, shapes)
    if not count or not kept or count % kept or (len(flat), len(grown), len(deep)) != (4, 5, 5):
        return False
    groups = (Dim(kept), Dim(count // kept))
    return deep[1:3] == (Dim(kept), Dim(1)) and grown[1:3] == groups and flat[1] == Dim(count)


def _fits(mask: ir.Value, block: Attention, shapes: SymbolicShapes) -> bool:
    """Whether a mask broadcasts to [batch, heads, queries, keys] without stretching its positions."""
    shape = shapes.of(mask)
    if shape is None or len(shape) != 4:
        return False
    heads = shape[1] in (Dim(1), Dim(_heads(block, shapes) or 0))
    return heads and shape[-2:] == (block.layout.query_length, block.layout.key_length)


def _fuse(block: Attention, parts: _Parts) -> None:
    last = block.context.producer()
    if last is None or block.scale is None:
        raise ValueError(f"{block.name}: nothing makes its output")
    keys, values = parts.keys.outputs[0], parts.values.outputs[0]
    made = emit(
        last,
        "Attention",
        parts.inputs,
        origins=_between(last, parts.inputs),
        attributes={"scale": float(block.scale)},
        names=[f"{block.context.name}_fused", f"{keys.name}_fused", f"{values.name}_fused"],
        like=block.context,
    )
    node = made.producer()
    if node is None:
        raise ValueError(f"{block.name}: nothing was made")
    replace_value(block.context, made)
    for before, after in ((keys, node.outputs[1]), (values, node.outputs[2])):
        after.shape, after.type = before.shape, before.type
        replace_value(before, after)
    for value in (block.context, keys, values):
        drop_computed(value)


def _between(last: ir.Node, inputs: Sequence[ir.Value | None]) -> list[ir.Node]:
    """Return the nodes that the operator takes the place of: from `last` back to its inputs."""
    found: list[ir.Node] = []
    pending: list[ir.Node | None] = [last]
    while pending:
        node = pending.pop()
        if node is None or node in found:
            continue
        found.append(node)
        data = node.inputs[:1] if node.op_type in (*_REPEATING, "Transpose") else node.inputs
        pending += [value.producer() for value in data if value is not None and value not in inputs]
    return found

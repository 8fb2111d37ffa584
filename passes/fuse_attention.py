# SPDX-License-Identifier: Apache-2.0
"""Attention written out, as ONNX's operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.attention import find_attention
from splitfold.passes.attention_block import Attention, AttentionForm, TermKind
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.dims import Dim, Shape, product
from splitfold.passes.identity import layers_of, stamp
from splitfold.passes.later_operators import make_available
from splitfold.passes.symbolic_shapes import SymbolicShapes, symbolic_shapes
from splitfold.passes.values import drop_computed, emit, ints_attribute, replace_value

__all__ = ["FuseAttentionPass"]

_OPSET = 23
_OPERATOR = "Attention"
"""The operator is there from this version on."""


@dataclass(frozen=True)
class FuseAttentionPass(LayerPass):
    """Write softmax(scale q k^T + mask) v, heads split and merged, as one Attention of ONNX opset 23. Exact
    but for rounding.

    Heads are neither moved forth nor back, and scores stay in the kernel's blocks.

    Before::

        p = Softmax(scale * Transpose(Reshape(q)) Transpose(Reshape(k))^T + mask)
        y = Reshape(Transpose(p Transpose(Reshape(v))))

    After::

        y = Attention(q, k, v, mask, q_num_heads=h, kv_num_heads=h, scale=scale)
    """

    name: ClassVar[str] = "fuse-attention"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "an attention block that is written out"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        blocks = _blocks(model)
        self.check_patterns(block.name for block in blocks)
        if not any(isinstance(found, list) for _, found in self._found(model, blocks)):
            self._skip(model, blocks, findings)
            return False
        if reason := make_available(model, _OPERATOR, _OPSET, context.target):
            for block in blocks:
                findings.skip(block.name, reason)
            return False
        blocks = _blocks(model)  # of the raised model
        self._skip(model, blocks, findings)
        for block, found in list(self._found(model, blocks)):
            if isinstance(found, list):
                _fuse(block, found)
                findings.apply(block.name, f"one Attention of {block.layout.count} heads")
        return True

    def _found(
        self, model: ir.Model, blocks: Sequence[Attention]
    ) -> Iterator[tuple[Attention, list[ir.Value | None] | str]]:
        """Yield each block with the operator's inputs, or with the reason why it stays."""
        shapes = symbolic_shapes(model) if blocks else SymbolicShapes()
        for block in blocks:
            yield block, self.unwanted(block.name) or _inputs(block, shapes)

    def _skip(self, model: ir.Model, blocks: Sequence[Attention], findings: Findings) -> None:
        for block, found in self._found(model, blocks):
            if isinstance(found, str):
                findings.skip(block.name, found)


def _blocks(model: ir.Model) -> list[Attention]:
    return [it for it in find_attention(model).blocks if it.form is AttentionForm.DECOMPOSED]


def _inputs(block: Attention, shapes: SymbolicShapes) -> list[ir.Value | None] | str:
    """Return queries, keys and values with their heads side by side, [batch, positions, channels], and the
    mask; or why there are none."""
    reason = _obstacle(block)
    if reason is not None:
        return reason
    count = block.layout.count
    if count is None or block.merged is None:
        return "its heads are never merged, or nobody knows how many there are"
    found: list[ir.Value | None] = []
    for name, operand in (("queries", block.query), ("keys", block.key), ("values", block.value)):
        whole = _side_by_side(operand.value, count, shapes)
        if whole is None:
            return f"its {name} are not split into heads by a Reshape and a Transpose"
        found.append(whole)
    if not _only_moves(block.context, block.merged):
        return "more than moving stands between its context and its merged heads"
    rank = shapes.rank(block.merged)
    if rank != 3:
        return f"its merged heads have rank {rank}, not 3"
    mask = [term.value for term in block.terms]
    if mask:
        shape = shapes.of(mask[0])
        if not _fits(shape, block):
            return "its mask does not have the shape [batch, heads, queries, keys]"
        found.append(mask[0])
    return found


def _obstacle(block: Attention) -> str | None:
    p = block.probabilities
    if p is None or p.clipping is not None:
        return "its softmax is clipped"
    if p.guarded is not p.softmax:
        return "a guard against NaN stands behind its softmax"
    if p.softmax.is_graph_output() or block.context.is_graph_output():
        return "its probabilities or its context are outputs of the model"
    if block.scale is None:
        return "its scale is computed"
    if block.softcap is not None:
        return "its scores are capped"
    if block.gate is not None:
        return "its context is gated before its heads are merged"
    if any(operand.repeats != 1 for operand in (block.query, block.key, block.value)):
        return "its keys and values are repeated for groups of heads"
    if len(block.terms) > 1:
        return "several terms are added to its scores"
    if any(term.kind is not TermKind.MASK for term in block.terms):
        return "what is added to its scores depends on positions or contents"
    if block.terms and block.terms[0].value.dtype is not ir.DataType.FLOAT:
        return "its mask is not added but chosen by a Where"
    return None


def _side_by_side(value: ir.Value, count: int, shapes: SymbolicShapes) -> ir.Value | None:
    """Return [batch, positions, heads * size] of an operand with its heads before the positions: [batch,
    heads, positions, size], or keys turned already."""
    turn = value.producer()
    turned = turn.inputs[0] if turn is not None and turn.inputs else None
    split = turned.producer() if turned is not None else None
    if turn is None or split is None or (turn.op_type, split.op_type) != ("Transpose", "Reshape"):
        return None
    whole, parted = shapes.of(split.inputs[0]), shapes.of(split.outputs[0])
    if ints_attribute(turn, "perm") not in ((0, 2, 1, 3), (0, 2, 3, 1)) or whole is None or parted is None:
        return None
    if len(whole) != 3 or len(parted) != 4 or None in (*whole, *parted):
        return None
    same = whole[:2] == parted[:2] and whole[2] == product(parted[2:]) and parted[2] == Dim(count)
    return split.inputs[0] if same else None


def _only_moves(context: ir.Value, merged: ir.Value) -> bool:
    """Whether Reshapes and Transposes alone make `merged` from the context: no scale, no quantizer."""
    value: ir.Value | None = merged
    while value is not None and value is not context:
        made = value.producer()
        if made is None or made.domain != "" or made.op_type not in ("Reshape", "Transpose"):
            return False
        value = made.inputs[0]
    return value is context


def _fits(shape: Shape | None, block: Attention) -> bool:
    """Whether a mask broadcasts to [batch, heads, queries, keys] without stretching its positions."""
    if shape is None or not 2 <= len(shape) <= 4:
        return False
    return shape[-2:] == (block.layout.query_length, block.layout.key_length)


def _fuse(block: Attention, inputs: list[ir.Value | None]) -> None:
    merged, count = block.merged, block.layout.count
    if merged is None or count is None or block.scale is None:
        raise ValueError(f"{block.name} has no merged heads")
    last = merged.producer()
    if last is None:
        raise ValueError(f"{block.name}: nothing makes its output")
    made = emit(
        last,
        "Attention",
        inputs,
        origins=[block.node],
        attributes={"q_num_heads": count, "kv_num_heads": count, "scale": float(block.scale)},
        names=[f"{merged.name}_fused"],
        like=merged,
    )
    names = {name for node in _between(last, inputs) for name in layers_of(node)}
    replace_value(merged, made)
    drop_computed(merged)
    node = made.producer()
    if node is not None and node.graph is not None:  # a name that others bear stays theirs
        stamp(node, names - {name for other in node.graph for name in layers_of(other)})


def _between(last: ir.Node, inputs: Sequence[ir.Value | None]) -> list[ir.Node]:
    """Return the nodes that the operator takes the place of: from `last` back to its inputs."""
    found: list[ir.Node] = []
    pending: list[ir.Node] = [last]
    while pending:
        node = pending.pop()
        if node not in found:
            found.append(node)
            read = (
                node.inputs[:1] if node.op_type == "Reshape" else node.inputs
            )  # not what it takes its target from
            made = [value.producer() for value in read if value is not None and value not in inputs]
            pending += [maker for maker in made if maker is not None]
    return found

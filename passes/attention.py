# SPDX-License-Identifier: Apache-2.0
"""Finding attention in any graph, by structure: a softmax between two products of activations, or one fused
operator."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from splitfold.passes.attention_block import (
    Attention,
    AttentionForm,
    AttentionMiss,
    AttentionReport,
    HeadLayout,
    Operand,
    Probabilities,
    ScoreTerm,
)
from splitfold.passes.attention_context import ContextPath, Heads, heads_of, trace_context
from splitfold.passes.attention_fused import fused_attention
from splitfold.passes.attention_masks import additive_terms, condition_term
from splitfold.passes.attention_operands import is_cross, operand_of, scale_before
from splitfold.passes.attention_scores import ScorePath, trace_scores
from splitfold.passes.dims import ONE, Dim, Shape
from splitfold.passes.identity import display_layer
from splitfold.passes.symbolic_shapes import SymbolicShapes, symbolic_shapes
from splitfold.passes.values import int_attribute

__all__ = ["find_attention"]

_FUSED_ELSEWHERE = {
    "DecoderAttention", "LongformerAttention", "PackedAttention", "PackedMultiHeadAttention",
    "PagedAttention", "RelativePositionBias", "SparseAttention",
}  # fmt: skip


def find_attention(model: ir.Model) -> AttentionReport:
    """Return every attention block of all graphs of a canonical model, in order, and why each other softmax
    is none.

    A block is recognised by what it computes: softmax(scale q k^T + terms) v, whatever the exporter and the
    names; or by a fused operator. The model stays as it is.
    """
    shapes = symbolic_shapes(model)
    blocks: list[Attention] = []
    misses: list[AttentionMiss] = []
    for node in model.graph.all_nodes():
        if (fused := fused_attention(node, shapes)) is not None:
            blocks.append(fused)
        elif node.domain == "com.microsoft" and node.op_type in _FUSED_ELSEWHERE:
            misses.append(AttentionMiss(display_layer(node), f"{node.op_type} is not read into"))
        elif (found := _softmax(node, shapes)) is not None:
            block = _decomposed(node, *found, shapes)
            if isinstance(block, str):
                misses.append(AttentionMiss(display_layer(node), block))
            else:
                blocks.append(block)
    return AttentionReport(tuple(blocks), tuple(misses))


def _softmax(node: ir.Node, shapes: SymbolicShapes) -> tuple[ir.Value, int] | None:
    """Return the logits and the axis of a softmax that ends in `node`, or None."""
    if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "Softmax":
        rank = shapes.rank(node.inputs[0])
        axis = int_attribute(node, "axis", -1)
        return node.inputs[0], axis if rank is None else axis % rank
    return _written_out(node, shapes) if node.op_type == "Div" else None


def _written_out(node: ir.Node, shapes: SymbolicShapes) -> tuple[ir.Value, int] | None:
    """Return the same of exp(x) / sum(exp(x))."""
    powers, total = node.inputs[0], node.inputs[1]
    exp = powers.producer() if powers is not None else None
    summed = total.producer() if total is not None else None
    if exp is None or exp.op_type != "Exp" or summed is None or summed.op_type != "ReduceSum":
        return None
    axes = shapes.content(summed.inputs[1]) if len(summed.inputs) > 1 else None
    rank = shapes.rank(powers)
    if summed.inputs[0] is not powers or exp.inputs[0] is None or rank is None or not axes or len(axes) != 1:
        return None
    axis = axes[0]
    return (exp.inputs[0], (axis.known or 0) % rank) if isinstance(axis, Dim) else None


def _decomposed(node: ir.Node, logits: ir.Value, axis: int, shapes: SymbolicShapes) -> Attention | str:
    rank = shapes.rank(logits)
    if rank is None:
        return "the rank of its logits is unknown"
    back = trace_scores(logits, axis, shapes)
    if isinstance(back, str):
        return back
    forth = trace_context(node.outputs[0], axis, shapes)
    if isinstance(forth, str):
        return forth
    query, key = (operand_of(back.product.operands[at], shapes) for at in (1 - back.key, back.key))
    value = operand_of(forth.product.operands[1 - forth.side], shapes)
    context = forth.product.node.outputs[0]
    size = forth.product.out[1 - forth.side]
    heads = heads_of(context, size, shapes)
    terms = tuple(_terms(back, rank - axis, shapes, (query, key)))
    return Attention(
        name=display_layer(node),
        form=AttentionForm.DECOMPOSED,
        node=node,
        query=query,
        key=key,
        value=value,
        context=context,
        layout=_layout(back, forth, heads, (query, key, value), shapes),
        scores=back.product.node.outputs[0],
        probabilities=Probabilities(
            logits,
            node.outputs[0],
            forth.guarded,
            forth.product.operands[forth.side],
            axis,
            forth.clipping,
        ),
        merged=heads.merged,
        gate=heads.gate,
        scale=_scale(back, shapes),
        softcap=back.softcap,
        terms=terms,
        causal=any(term.causal for term in terms),
        cross=is_cross(query, key),
    )


def _scale(back: ScorePath, shapes: SymbolicShapes) -> float | None:
    total = back.scale
    for operand in back.product.operands:
        before = scale_before(operand, shapes)
        total = None if total is None or before is None else total * before
    return total


def _terms(
    back: ScorePath, key_from_right: int, shapes: SymbolicShapes, operands: tuple[Operand, ...]
) -> Iterator[ScoreTerm]:
    projections = {node for operand in operands for node in operand.projections}
    for value, is_condition, blocks in reversed(back.added):
        if is_condition:
            yield condition_term(value, blocks=blocks, key_from_right=key_from_right, shapes=shapes)
        else:
            yield from additive_terms(value, key_from_right, shapes, projections)


def _layout(
    back: ScorePath,
    forth: ContextPath,
    heads: Heads,
    operands: tuple[Operand, Operand, Operand],
    shapes: SymbolicShapes,
) -> HeadLayout:
    scores, context = back.product, forth.product
    own = {at: shapes.of(scores.operands[at]) for at in (0, 1)}
    values = shapes.of(context.operands[1 - forth.side])
    whole = shapes.of(context.node.outputs[0])
    count = heads.count if heads.merged is not None else _unmerged(whole)
    repeats = operands[1].repeats * _shared(heads, own[back.key], whole)
    return HeadLayout(
        rank=len(whole or ()),
        heads=heads.axes,
        query=context.out[forth.side],
        size=context.out[1 - forth.side],
        count=count,
        kv_count=count // repeats if count is not None and count % repeats == 0 else None,
        key_size=_known(own[0], scores.summed[0]),
        value_size=_known(values, context.own[1 - forth.side]),
        query_length=_size(own[1 - back.key], scores.own[1 - back.key]),
        key_length=_size(own[back.key], scores.own[back.key]),
    )


def _unmerged(context: Shape | None) -> int | None:
    """Return the number of heads of a context whose heads are never merged: one, unless an axis between batch
    and positions counts them."""
    if context is None or len(context) > 4:
        return None
    if len(context) < 4:
        return 1
    return context[1].known if context[1] is not None else None


def _shared(heads: Heads, keys: Shape | None, context: Shape | None) -> int:
    """Return how many heads share keys that are broadcast along the axes of heads."""
    total = 1
    for axis in heads.axes if keys is not None and context is not None else ():
        at = axis - len(context or ()) + len(keys or ())
        here, there = (context or ())[axis], (keys or ())[at] if at >= 0 else ONE
        if there == ONE and here is not None and here.known is not None:
            total *= here.known
    return total


def _size(shape: Shape | None, axis: int) -> Dim | None:
    return shape[axis] if shape is not None and axis < len(shape) else None


def _known(shape: Shape | None, axis: int) -> int | None:
    dim = _size(shape, axis)
    return dim.known if dim is not None else None

# SPDX-License-Identifier: Apache-2.0
"""Attention as one operator: that of ONNX opset 23, and those of the runtime."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.attention_block import (
    Attention,
    AttentionForm,
    HeadLayout,
    Operand,
    Rotary,
    ScoreTerm,
    TermKind,
)
from splitfold.passes.attention_context import gate_behind, heads_of
from splitfold.passes.attention_masks import additive_terms, condition_term
from splitfold.passes.attention_operands import is_cross, operand_of, scale_before
from splitfold.passes.dims import Dim
from splitfold.passes.identity import display_layer
from splitfold.passes.symbolic_shapes import SymbolicShapes
from splitfold.passes.values import float_attribute, int_attribute, ints_attribute

__all__ = ["fused_attention"]


@dataclass(frozen=True)
class _Signature:
    """Positions of the inputs of an operator, and names of its attributes."""

    form: AttentionForm
    masks: tuple[int, ...] = ()
    biases: tuple[int, ...] = ()
    past: tuple[int, ...] = ()
    tables: tuple[int, ...] = ()
    heads: str = "num_heads"
    kv_heads: str = "num_heads"
    causal: str = "unidirectional"
    always_causal: bool = False


_SIGNATURES = {
    ("", "Attention"): _Signature(
        AttentionForm.ONNX, masks=(3,), past=(4, 5), heads="q_num_heads", kv_heads="kv_num_heads",
        causal="is_causal",
    ),
    ("com.microsoft", "Attention"): _Signature(AttentionForm.PACKED, masks=(3,), biases=(5,), past=(4,)),
    ("com.microsoft", "QAttention"): _Signature(AttentionForm.QUANTIZED, masks=(5,), past=(8,)),
    ("com.microsoft", "MultiHeadAttention"): _Signature(
        AttentionForm.MULTI_HEAD, masks=(4,), biases=(5,), past=(6, 7)
    ),
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): _Signature(
        AttentionForm.DECODER, masks=(3,), biases=(4,), past=(5, 6), always_causal=True
    ),
    ("com.microsoft", "GroupQueryAttention"): _Signature(
        AttentionForm.GROUPED, biases=(10,), past=(3, 4), tables=(7, 8), kv_heads="kv_num_heads",
        always_causal=True,
    ),
}  # fmt: skip
_PACKED = (AttentionForm.PACKED, AttentionForm.QUANTIZED)


def fused_attention(node: ir.Node, shapes: SymbolicShapes) -> Attention | None:
    """Return the block that `node` computes by itself, or None where it is no attention operator."""
    signature = _SIGNATURES.get((node.domain, node.op_type))
    if signature is None or node.inputs[0] is None:
        return None
    query, key, value = _operands(node, signature, shapes)
    layout = _layout(node, signature, (query, key, value), shapes)
    context = node.outputs[0]
    heads = heads_of(context, layout.size, shapes) if layout.heads else None
    terms = tuple(_terms(node, signature, (query, key), shapes))
    return Attention(
        name=display_layer(node),
        form=signature.form,
        node=node,
        query=query,
        key=key,
        value=value,
        context=context,
        layout=layout,
        merged=heads.merged if heads is not None else context,
        gate=heads.gate if heads is not None else gate_behind(context),
        scale=_scale(node, layout, (query, key), shapes),
        softcap=float_attribute(node, "softcap", 0.0) or None,
        terms=terms,
        causal=signature.always_causal
        or bool(int_attribute(node, signature.causal, 0))
        or any(term.causal for term in terms),
        cross=False if signature.form in _PACKED else is_cross(query, key),
    )


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if position < len(node.inputs) else None


def _operands(
    node: ir.Node, signature: _Signature, shapes: SymbolicShapes
) -> tuple[Operand, Operand, Operand]:
    first = node.inputs[0]
    if first is None:
        raise ValueError(f"{node.name}: input missing")
    if signature.form in _PACKED:
        own = Operand(first, (node,), first, first, past=_past(node, signature))
        return own, own, own
    values = [_input(node, position) or first for position in range(3)]  # absent: packed into the first
    query, key, value = (operand_of(found, shapes) for found in values)
    rotary = _rotary(node, signature)
    past = _past(node, signature)
    return (
        Operand(query.value, query.projections, query.input, query.root, 1, rotary or query.rotary),
        Operand(key.value, key.projections, key.input, key.root, key.repeats, rotary or key.rotary, past),
        Operand(value.value, value.projections, value.input, value.root, value.repeats, None, past),
    )


def _past(node: ir.Node, signature: _Signature) -> ir.Value | None:
    return next((v for at in signature.past if (v := _input(node, at)) is not None), None)


def _rotary(node: ir.Node, signature: _Signature) -> Rotary | None:
    if not int_attribute(node, "do_rotary", 0):
        return None
    tables = [_input(node, position) for position in signature.tables] or [None, None]
    return Rotary(tables[0], tables[1])


def _scale(
    node: ir.Node, layout: HeadLayout, operands: tuple[Operand, Operand], shapes: SymbolicShapes
) -> float | None:
    given = float_attribute(node, "scale", 0.0)
    total: float | None = given or (1 / math.sqrt(layout.key_size) if layout.key_size else None)
    for operand in operands:
        before = scale_before(operand.value, shapes)
        total = None if total is None or before is None else total * before
    return total


def _terms(
    node: ir.Node, signature: _Signature, operands: tuple[Operand, Operand], shapes: SymbolicShapes
) -> Iterator[ScoreTerm]:
    masks = [value for at in signature.masks if (value := _input(node, at)) is not None]
    projections = {layer for operand in operands for layer in operand.projections}
    for mask in masks:
        if signature.form is not AttentionForm.ONNX:
            yield ScoreTerm(mask, TermKind.MASK)
        elif mask.dtype is ir.DataType.BOOL:
            yield condition_term(mask, blocks=False, key_from_right=1, shapes=shapes)
        else:
            yield from additive_terms(mask, 1, shapes, projections)
    for at in signature.biases:
        if (bias := _input(node, at)) is not None:
            yield from additive_terms(bias, 1, shapes, projections)


def _layout(
    node: ir.Node, signature: _Signature, operands: tuple[Operand, Operand, Operand], shapes: SymbolicShapes
) -> HeadLayout:
    query, key, value = (shapes.of(operand.value) for operand in operands)
    count = int_attribute(node, signature.heads, 0) or None
    kv_count = int_attribute(node, signature.kv_heads, 0) or count
    if query is not None and len(query) == 4:
        count = query[1].known if query[1] is not None else None
        kv_count = key[1].known if key is not None and len(key) == 4 and key[1] is not None else count
        lengths = (query[2], key[2] if key is not None and len(key) == 4 else None)
        kv_count = kv_count // operands[1].repeats if kv_count else None
        sizes = [shape[3].known if shape and shape[3] is not None else None for shape in (query, value)]
        heads: tuple[int, ...] = (1,)
        places = (4, 2, 3)
    else:
        widths = _widths(node, signature, query, value)
        sizes = [width // count if width and count else None for width in widths]
        if kv_count and count and value is not None and len(value) == 3 and signature.form not in _PACKED:
            width = value[2].known if value[2] is not None else None
            sizes[1] = width // kv_count if width and value is not query else sizes[1]
        lengths = (query[1] if query else None, key[1] if key is not None and len(key) > 1 else None)
        heads, places = (), (3, 1, 2)
    return HeadLayout(
        places[0], heads, places[1], places[2], count, kv_count, sizes[0], sizes[1], lengths[0], lengths[1]
    )


def _widths(
    node: ir.Node, signature: _Signature, query: tuple[Dim | None, ...] | None, value: object
) -> list[int | None]:
    """Return the channels of all heads together, of queries and of values."""
    if signature.form in _PACKED:
        sizes = ints_attribute(node, "qkv_hidden_sizes")
        if sizes:
            return [sizes[0], sizes[2]]
        weight = node.inputs[1]
        total = weight.shape[1] if weight is not None and weight.shape is not None else None
        return [total // 3 if isinstance(total, int) else None] * 2
    width = query[-1].known if query and query[-1] is not None else None
    return [width, width]

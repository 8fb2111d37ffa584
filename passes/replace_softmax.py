# SPDX-License-Identifier: Apache-2.0
"""Attention with another function in the place of its softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.attention import find_attention
from splitfold.passes.attention_axes import Product, product_of
from splitfold.passes.attention_block import Attention, Probabilities, TermKind
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.dims import ONE
from splitfold.passes.softmax_forms import (
    Replacement,
    Writer,
    linear_context,
    relu_weights,
    softplus_weights,
)
from splitfold.passes.substitution import (
    SHAPE_OPSET,
    candidate_blocks,
    let_read,
    opset_of,
    place_behind,
    readers,
    written_for,
)
from splitfold.passes.symbolic_shapes import SymbolicShapes, symbolic_shapes
from splitfold.passes.values import drop_unused, take_place

__all__ = ["ReplaceSoftmaxPass", "Replacement"]


@dataclass(frozen=True)
class ReplaceSoftmaxPass(LayerPass):
    """Write attention with softplus, ReLU, or linear in its length, in the place of its softmax.

    Another function, to be trained from the start: there is no start that keeps what a softmax computed.
    Masks are kept; rows with no key give zeros, nothing divides 0 by 0, and no power overflows. The block is
    none that passes on attention know afterwards: gate it before.

    Args:
        by: what stands in the softmax's place: softplus (LSSA, LSSAR), relu, or linear.
        power: of softplus: what re-weighted rows are raised to, 15 in the paper; 0 leaves re-weighting out.
        free: of softplus: how many first queries are re-weighted without subtracting 1, 3 in the paper.
        floor: of linear: least sum of weights that is divided by; 100 in L2ViT.

    Before::

        y = MatMul(Softmax(scores), v)

    After::

        y = MatMul(Relu(scores) / N, v)
    """

    name: ClassVar[str] = "replace-softmax"
    contract: ClassVar[Contract] = Contract.SEMANTIC
    takes: ClassVar[str] = "attention that is written out with MatMul"
    by: Replacement = Replacement.RELU
    power: int = 15
    free: int = 3
    floor: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 64:
            raise ValueError(f"power is {self.power}; it may be 0 to 64.")
        if self.free < 0:
            raise ValueError(f"free is {self.free}; it is a number of queries.")
        if not self.floor > 0:
            raise ValueError(f"floor is {self.floor:g}; it lies above 0, or 0 would be divided by 0.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        shapes = symbolic_shapes(model)
        blocks = candidate_blocks(
            self, find_attention(model), findings, lambda block: self._reason_against(block, shapes)
        )
        for block in blocks:
            with written_for(block, shapes):
                self._replace(block, shapes)
            findings.apply(block.name, f"softmax replaced by {self.by.value}")
        return bool(blocks)

    def _replace(self, block: Attention, shapes: SymbolicShapes) -> None:
        found = block.probabilities
        scores, product = _products(block, shapes)
        if found is None or scores is None or product is None:
            raise ValueError(f"{block.name}: its products are not written out")
        old = block.context if self.by is Replacement.LINEAR else found.guarded
        last = old.producer()
        if last is None:
            raise ValueError(f"{block.name}: no node computes '{old.name}'")
        those = readers(old)
        with place_behind(last) as before:
            write = Writer(before, block, shapes)
            if self.by is Replacement.LINEAR:
                made = linear_context(write, scores, product.operands[1], self.floor)
            elif self.by is Replacement.RELU:
                made = relu_weights(write, found.logits)
            else:
                made = softplus_weights(write, scores, self.power, self.free)
        let_read(those, made)
        take_place(old, made)
        _drop(last)

    def _reason_against(self, block: Attention, shapes: SymbolicShapes) -> str | None:
        if block.probabilities is None:
            return (
                f"its softmax is inside {block.form.value}: export the model with attention written out "
                "(torch: an opset below 23), before the runtime's optimizer fuses it"
            )
        scores, product = _products(block, shapes)
        if scores is None or product is None:
            return "its products are not MatMul of queries and keys, and of probabilities and values"
        if block.probabilities.clipping is not None:
            return "its softmax is clipped: a model is trained with one of both"
        if block.context.dtype is not ir.DataType.FLOAT:
            return f"its context is {block.context.dtype}, not FLOAT"
        if (opset := opset_of(block)) < SHAPE_OPSET:
            return f"opset {opset} has no Shape of some axes ({SHAPE_OPSET} has)"
        return self._reason_against_terms(block, block.probabilities, shapes)

    def _reason_against_terms(
        self, block: Attention, found: Probabilities, shapes: SymbolicShapes
    ) -> str | None:
        for kind in (TermKind.POSITION_BIAS, TermKind.CONTENT_BIAS):
            if block.terms_of(kind) and self.by is not Replacement.RELU:
                return f"its scores have a {kind.value}, which {self.by.value} has no place for: use by=relu"
        if block.softcap is not None and self.by is not Replacement.RELU:
            return f"its scores are capped, which {self.by.value} has no place for: use by=relu"
        ranks = {shapes.rank(value) for value in (block.scores, found.logits, found.read)}
        if len(ranks) > 1 and self.by is not Replacement.RELU:
            return "its heads are folded into the batch for one of its products only: use by=relu"
        for term in block.terms_of(TermKind.MASK):
            shape = shapes.of(term.value)
            if shape is None or not shape or (shape[-1] == ONE and block.layout.key_length != ONE):
                return f"its mask '{term.value.name}' does not say for each key whether it is seen"
        return None


def _products(block: Attention, shapes: SymbolicShapes) -> tuple[Product | None, Product | None]:
    """Return both products, where they are MatMul in the usual order, else None."""
    first = product_of(block.scores.producer() if block.scores is not None else None, shapes)
    second = product_of(block.context.producer(), shapes)
    if first is None or second is None or {first.node.op_type, second.node.op_type} != {"MatMul"}:
        return None, None
    usual = first.operands[0] is block.query.value and second.operands[1] is block.value.value
    return (first, second) if usual else (None, None)


def _drop(node: ir.Node) -> None:
    """Remove a node that nobody reads, and what only it read."""
    pending = [node]
    while pending:
        here = pending.pop()
        if here.graph is None or any(value.uses() or value.is_graph_output() for value in here.outputs):
            continue
        makers = [value.producer() for value in here.inputs if value is not None]
        drop_unused([here])
        pending.extend(maker for maker in makers if maker is not None)

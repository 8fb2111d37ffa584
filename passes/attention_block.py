# SPDX-License-Identifier: Apache-2.0
"""What an attention block is: its values, their axes, and what acts on its scores."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import onnx_ir as ir

from splitfold.passes.dims import Dim

__all__ = [
    "Attention",
    "AttentionForm",
    "AttentionMiss",
    "AttentionReport",
    "Clipping",
    "HeadLayout",
    "Operand",
    "Probabilities",
    "Rotary",
    "ScoreTerm",
    "TermKind",
]


class AttentionForm(enum.Enum):
    """How a block is written."""

    DECOMPOSED = "decomposed"
    """Two products and a softmax."""
    ONNX = "Attention"
    """The operator of ONNX opset 23."""
    PACKED = "com.microsoft::Attention"
    """The runtime's operator that holds the projections too."""
    MULTI_HEAD = "com.microsoft::MultiHeadAttention"
    DECODER = "com.microsoft::DecoderMaskedMultiHeadAttention"
    GROUPED = "com.microsoft::GroupQueryAttention"
    QUANTIZED = "com.microsoft::QAttention"


class TermKind(enum.Enum):
    """What is added to scores, or replaces some of them."""

    MASK = "mask"
    """Blocks positions: 0, or a number so low that the softmax makes it 0."""
    POSITION_BIAS = "position bias"
    """Depends on positions alone: relative positions, ALiBi."""
    CONTENT_BIAS = "content bias"
    """Depends on the activations too: the relative scores of DeBERTa and of Transformer-XL."""


@dataclass(frozen=True, eq=False)
class ScoreTerm:
    """One term of the logits.

    Attributes:
        value: what is added; of a Where, its condition.
        kind: what it is for.
        causal: whether it blocks every key after the query.
        blocks: of a condition, whether it blocks where it holds (True) or where it does not (False); None of
            what is added.
    """

    value: ir.Value
    kind: TermKind
    causal: bool = False
    blocks: bool | None = None


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary positions of an operand (Su et al., 2021).

    Attributes:
        cos, sin: what the channels are multiplied with; None where the exporter wrote another form.
    """

    cos: ir.Value | None
    sin: ir.Value | None


@dataclass(frozen=True, eq=False)
class Operand:
    """Queries, keys or values.

    Attributes:
        value: what the product reads.
        projections: the layers with weights that it comes from.
        input: what these layers read, the attention's own input; None where they read several values, or
            there are none.
        root: the same without operators that only move or quantize it: queries, keys and values of
            self-attention have one root; None likewise.
        repeats: by how much the heads of grouped-query attention are repeated on the way.
        rotary: its rotary positions, or None.
        past: the cache that is put before it, a graph input, or None.
    """

    value: ir.Value
    projections: tuple[ir.Node, ...] = ()
    input: ir.Value | None = None
    root: ir.Value | None = None
    repeats: int = 1
    rotary: Rotary | None = None
    past: ir.Value | None = None


@dataclass(frozen=True)
class HeadLayout:
    """Axes of the context, as the product of probabilities and values gives it, and its heads.

    Attributes:
        rank: number of axes of the context; 0 where it is unknown.
        heads: the axes that count heads: several where the heads of a group have an axis of their own; none
            where heads are folded into the batch, or there is one.
        query: the axis of query positions.
        size: the axis of channels of a head.
        count: number of heads; None where it cannot be told.
        kv_count: number of heads of keys and values: fewer in grouped-query attention.
        key_size: channels of a head of queries and keys.
        value_size: channels of a head of values.
        query_length, key_length: positions; one that changes at run time is a `Dim` with symbols.
    """

    rank: int
    heads: tuple[int, ...]
    query: int
    size: int
    count: int | None
    kv_count: int | None
    key_size: int | None
    value_size: int | None
    query_length: Dim | None
    key_length: Dim | None


@dataclass(frozen=True)
class Clipping:
    """Clipped softmax: clip((zeta - gamma) p + gamma, 0, 1)."""

    gamma: float
    zeta: float


@dataclass(frozen=True, eq=False)
class Probabilities:
    """The softmax of a decomposed block.

    Attributes:
        logits: its input.
        softmax: its output.
        guarded: the softmax after the exporter's guard against rows with no key (NaN becomes 0); the softmax
            itself where there is none.
        read: what the second product reads: after clipping, moves and the like.
        axis: of the softmax, counted from 0; None where the rank is unknown (then it is the last).
        clipping: clipped softmax, or None.
    """

    logits: ir.Value
    softmax: ir.Value
    guarded: ir.Value
    read: ir.Value
    axis: int | None
    clipping: Clipping | None


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention block.

    Attributes:
        name: user-facing name of the layer that it stands in.
        form: how it is written.
        node: the softmax of a decomposed block (its last node), or the fused operator.
        query, key, value: its operands.
        scores: the product of queries and keys; None in a fused block.
        probabilities: its softmax; None in a fused block.
        context: the product of probabilities and values, or the output of the fused operator.
        merged: the context with its heads side by side in one axis; None where they never are.
        gate: what the context is multiplied with before its heads are merged, or None.
        scale: of the scores; None where it is no constant number.
        softcap: c of c tanh(scores / c), or None.
        terms: what acts on the scores, in order from the product.
        layout: axes and heads.
        causal: whether no query sees a later key.
        cross: whether keys come from elsewhere than queries; None where that cannot be told.
    """

    name: str
    form: AttentionForm
    node: ir.Node
    query: Operand
    key: Operand
    value: Operand
    context: ir.Value
    layout: HeadLayout
    scores: ir.Value | None = None
    probabilities: Probabilities | None = None
    merged: ir.Value | None = None
    gate: ir.Value | None = None
    scale: float | None = None
    softcap: float | None = None
    terms: tuple[ScoreTerm, ...] = ()
    causal: bool = False
    cross: bool | None = None

    @property
    def is_grouped(self) -> bool:
        """Whether several heads of queries share keys and values."""
        return self.layout.count != self.layout.kv_count

    @property
    def is_rotary(self) -> bool:
        """Whether queries have rotary positions."""
        return self.query.rotary is not None

    def terms_of(self, kind: TermKind) -> tuple[ScoreTerm, ...]:
        """Return the terms of one kind."""
        return tuple(term for term in self.terms if term.kind is kind)

    def __str__(self) -> str:
        return ", ".join(filter(None, [self.form.value, *_facts(self)]))


def _facts(block: Attention) -> list[str]:
    layout = block.layout
    heads = f"{layout.count or '?'} head{'' if layout.count == 1 else 's'}"
    if block.is_grouped:
        heads += f" ({layout.kv_count or '?'} of keys and values)"
    size = f" of {layout.value_size}" if layout.value_size else ""
    flags = {
        "cross": bool(block.cross),
        "causal": block.causal,
        "mask": any(not term.causal for term in block.terms_of(TermKind.MASK)),
        "rotary": block.is_rotary,
        "gated": block.gate is not None,
        "clipped": block.probabilities is not None and block.probabilities.clipping is not None,
    }
    biases = [kind.value for kind in (TermKind.POSITION_BIAS, TermKind.CONTENT_BIAS) if block.terms_of(kind)]
    return [heads + size, *(word for word, holds in flags.items() if holds), *biases]


@dataclass(frozen=True)
class AttentionMiss:
    """A softmax that is no attention, or none that was understood.

    Attributes:
        name: user-facing name of the layer that it stands in.
        reason: why not.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class AttentionReport:
    """The attention blocks of a model in order, and the softmaxes that are none."""

    blocks: tuple[Attention, ...] = ()
    misses: tuple[AttentionMiss, ...] = field(default=())

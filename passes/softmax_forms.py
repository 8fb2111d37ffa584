# SPDX-License-Identifier: Apache-2.0
"""What can stand in the place of a softmax in attention, as operators that never divide 0 by 0."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.attention_axes import Product
from splitfold.passes.attention_block import Attention, TermKind
from splitfold.passes.dims import ONE, Dim
from splitfold.passes.substitution import opset_of
from splitfold.passes.symbolic_shapes import SymbolicShapes
from splitfold.passes.values import add_initializer, emit
from splitfold.runtime.feeds import Array

__all__ = ["Replacement", "Writer", "linear_context", "relu_weights", "softplus_weights", "visible_keys"]

_BLOCKED = -50.0
"""What a mask adds where it blocks is lower."""
_NORM = 1e-12
"""Least length that a query or key is divided by."""
_AXES_OPSET = 18
"""From which on reductions read their axes from an input; ReduceSum does from 13 on."""
_SUM = 1e-20
"""Least sum that a row is divided by: rows of zeros stay zeros."""


class Replacement(enum.Enum):
    """What stands in the place of the softmax."""

    SOFTPLUS = "softplus"
    """Length-scaled softplus attention with re-weighting, LSSA and LSSAR (arXiv 2501.13428)."""
    RELU = "relu"
    """ReLU over the number of keys (Wortsman et al., 2023)."""
    LINEAR = "linear"
    """ReLU of queries and keys instead, re-associated where the mask allows (Katharopoulos et al., 2020;
    L2ViT, 2025)."""


@dataclass(frozen=True)
class Writer:
    """Emits the operators of one block before its second product."""

    before: ir.Node
    block: Attention
    shapes: SymbolicShapes

    def __call__(self, op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        """Emit an operator and return what it computes, with its shape where that can be told."""
        dtype = attributes.pop("dtype", ir.DataType.FLOAT)
        made = emit(
            self.before,
            op_type,
            list(inputs),
            attributes=attributes,
            names=[f"{self.block.context.name}.{op_type.lower()}"],
            dtype=dtype,  # type: ignore[arg-type]
        )
        node = made.producer()
        if node is not None:
            self.shapes.visit(node)
        return made

    def number(self, value: float) -> ir.Value:
        """Return a constant of one float32 number."""
        return self.constant("number", np.array(value, np.float32))

    def axes(self, *axes: int) -> ir.Value:
        """Return a constant of axes."""
        return self.constant("axes", np.array(axes, np.int64))

    def constant(self, name: str, array: Array) -> ir.Value:
        """Return a constant."""
        graph = self.before.graph
        if graph is None:
            raise ValueError(f"{self.before.name} is in no graph")
        return add_initializer(graph, f"{self.block.context.name}.{name}", array)

    def sum(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the sum along an axis, which is kept."""
        return self("ReduceSum", value, self.axes(axis), keepdims=1)

    def reduce(self, op_type: str, value: ir.Value, axis: int) -> ir.Value:
        """Return a reduction along an axis, which is kept."""
        if opset_of(self.block) < _AXES_OPSET:
            return self(op_type, value, axes=(axis,), keepdims=1)
        return self(op_type, value, self.axes(axis), keepdims=1)

    def share(self, value: ir.Value, least: float = _SUM) -> ir.Value:
        """Return rows over their sums; rows of zeros stay."""
        return self("Div", value, self("Max", self.sum(value, -1), self.number(least)))


def visible_keys(write: Writer) -> ir.Value | None:
    """Return 1 where a query may see a key and 0 elsewhere, float32 of a shape that is broadcast against
    scores; None where there is no mask."""
    total: ir.Value | None = None
    for term in write.block.terms_of(TermKind.MASK):
        if term.blocks is None:
            keep = write("Greater", term.value, write.number(_BLOCKED), dtype=ir.DataType.BOOL)
        elif term.blocks:
            keep = write("Not", term.value, dtype=ir.DataType.BOOL)
        else:
            keep = term.value
        mask = write("Cast", keep, to=int(ir.DataType.FLOAT))
        total = mask if total is None else write("Mul", total, mask)
    return total


def _number_of_keys(write: Writer, mask: ir.Value | None) -> ir.Value:
    """Return how many keys each query sees, at least 1: [..., queries or 1, 1], or a single number."""
    if mask is not None:
        return write("Max", write.sum(mask, -1), write.number(1.0))
    keys = write.block.layout.key_length
    if keys is not None and keys.known is not None:
        return write.number(float(keys.known))
    scores = write.block.scores
    if scores is None:
        raise ValueError(f"{write.block.name}: its scores are not written out")
    size = write("Shape", scores, start=-1, dtype=ir.DataType.INT64)
    return write("Cast", size, to=int(ir.DataType.FLOAT))


def relu_weights(write: Writer, logits: ir.Value) -> ir.Value:
    """Return ReLU(logits) / N, with N the number of keys that a query sees; blocked ones are 0, as what a
    mask adds there is low."""
    return write("Div", write("Relu", logits), _number_of_keys(write, visible_keys(write)))


def softplus_weights(write: Writer, scores: Product, power: int, free: int) -> ir.Value:
    """Return LSSA's weights: softplus(ln d ln N cos(q, k)) over its sum, then, with `power`, re-weighted:
    relu(N a - 1)^power over its sum, the first `free` queries without the - 1.

    What is raised to a power is divided by its row's largest first, which the last division undoes: nothing
    overflows.
    """
    mask = visible_keys(write)
    keys = _number_of_keys(write, mask)
    size = write.block.layout.key_size or 1
    sides = [_normalised(write, scores.operands[at], scores.summed[at]) for at in (0, 1)]
    scale = write("Mul", write("Log", keys), write.number(math.log(size)))
    grown = write("Softplus", write("Mul", write("MatMul", *sides), scale))
    shares = write.share(grown if mask is None else write("Mul", grown, mask))
    if not power:
        return shares
    over = write("Relu", write("Sub", write("Mul", shares, keys), _offset(write, free)))
    top = write("Max", write.reduce("ReduceMax", over, -1), write.number(_SUM))
    return write.share(write("Pow", write("Div", over, top), write.number(float(power))))


def _normalised(write: Writer, value: ir.Value, axis: int) -> ir.Value:
    length = write.reduce("ReduceL2", value, axis)
    return write("Div", value, write("Max", length, write.number(_NORM)))


def _offset(write: Writer, free: int) -> ir.Value:
    """Return 0 for the first `free` queries and 1 for the others, [queries, 1]."""
    queries = write.block.layout.query_length
    if queries is not None and queries.known is not None:
        return write.constant("offset", (np.arange(queries.known) >= free).astype(np.float32)[:, None])
    scores = write.block.scores
    if scores is None:
        raise ValueError(f"{write.block.name}: its scores are not written out")
    size = write("Shape", scores, start=-2, end=-1, dtype=ir.DataType.INT64)
    count = write("Squeeze", size, dtype=ir.DataType.INT64)
    ends = [write.constant(f"range{number}", np.array(number, np.int64)) for number in (0, 1)]
    places = write("Range", ends[0], count, ends[1], dtype=ir.DataType.INT64)
    least = write.constant("free", np.array(free, np.int64))
    late = write("GreaterOrEqual", places, least, dtype=ir.DataType.BOOL)
    return write("Unsqueeze", write("Cast", late, to=int(ir.DataType.FLOAT)), write.axes(1))


def linear_context(write: Writer, scores: Product, values: ir.Value, floor: float) -> ir.Value:
    """Return relu(q) relu(k)^T v over the sum of its weights, at least `floor`.

    It is computed as relu(q) (relu(k)^T v), in time linear in the length, unless a mask differs from query to
    query, as a causal one does.
    """
    query, key = (write("Relu", operand) for operand in scores.operands)
    mask = visible_keys(write)
    if mask is not None and not _is_of_keys(mask, write.shapes):
        weights = write("Mul", write("MatMul", query, key), mask)
        total = write.sum(weights, -1)
        return write("Div", write("MatMul", weights, values), write("Max", total, write.number(floor)))
    if mask is not None:
        key = write("Mul", key, mask)  # [..., size, keys] with [..., 1, keys]
    total = write("MatMul", query, write.sum(key, -1))
    whole = write("MatMul", query, write("MatMul", key, values))
    return write("Div", whole, write("Max", total, write.number(floor)))


def _is_of_keys(mask: ir.Value, shapes: SymbolicShapes) -> bool:
    """Whether a mask is the same for all queries."""
    shape = shapes.of(mask)
    return shape is not None and (len(shape) < 2 or shape[-2] == ONE) and Dim(0) not in shape

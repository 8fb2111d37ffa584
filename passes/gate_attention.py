# SPDX-License-Identifier: Apache-2.0
"""Gated attention: each head can be shut by a gate that reads the attention's own input."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.attention import find_attention
from splitfold.passes.attention_block import Attention, AttentionForm
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.dims import Dim, Shape, product
from splitfold.passes.gate_forms import Gate, GateKind, emit_gate
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
from splitfold.passes.values import add_initializer, emit, take_place

__all__ = ["GateAttentionPass", "GateKind"]

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_SEPARATE = (
    "give a model whose projections are layers of their own (torch: exported with attention written out, "
    "before the runtime's optimizer fuses it)"
)


@dataclass(frozen=True)
class GateAttentionPass(LayerPass):
    """Multiply each head's context with a gate, sigmoid(G(x)), of the attention's own input x.

    Bondarenko et al., "Quantizable Transformers", 2023, equation 5: a head that wants to do nothing shuts its
    gate, and needs no outliers for it. The gate stands behind the operators of attention, which stay as they
    are: fused blocks can be gated, and gated blocks fused. It is another function, to be trained; with `keep`
    it starts as the identity: with ``init=0.5`` bit for bit, else up to rounding.

    Args:
        kind: what the gate of a head reads: its own slice of x (linear, mlp), or all of x (all-heads).
        init: how far open each gate starts, between 0 and 1.
        keep: divide gates by `init`, for a model that was trained without; false is for training from
            scratch, as in the paper's main experiments.
        hidden: width of the hidden layer of mlp.
        seed: of the weights of that layer.

    Before::

        y = MatMul(context, W)

    After::

        gate = Sigmoid(x G + b) / init
        y = MatMul(Reshape(Reshape(context) * gate), W)
    """

    name: ClassVar[str] = "gate-attention"
    contract: ClassVar[Contract] = Contract.SEMANTIC
    takes: ClassVar[str] = "attention whose heads are merged, written out or fused"
    kind: GateKind = GateKind.ALL_HEADS
    init: float = 0.5
    keep: bool = True
    hidden: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.init < 1:
            raise ValueError(f"init is {self.init:g}; it lies between 0 and 1.")
        if self.hidden < 1:
            raise ValueError(f"hidden is {self.hidden}; it is 1 or more.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it is 0 or more.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        shapes = symbolic_shapes(model)
        blocks = candidate_blocks(
            self, find_attention(model), findings, lambda block: self._reason_against(block, shapes)
        )
        names = _distinct([block.name for block in blocks])
        for block, name in zip(blocks, names, strict=True):
            gate = self._gate(block, shapes)
            with written_for(block, shapes):
                _apply(block, gate, shapes, name)
            count = sum(array.size for array in gate.weights().values())
            findings.apply(block.name, f"gated ({self.kind.value}): {gate.heads} heads, {count} weights")
        return bool(blocks)

    def _gate(self, block: Attention, shapes: SymbolicShapes) -> Gate:
        width = _width(block, shapes)
        heads = block.layout.count
        if width is None or heads is None:
            raise ValueError(f"{block.name}: its input or its heads are unknown")
        return Gate(self.kind, heads, width, self.init, self.keep, self.hidden, self.seed)

    def _reason_against(self, block: Attention, shapes: SymbolicShapes) -> str | None:
        if block.gate is not None:
            return "gated already"
        x, heads = block.query.input, block.layout.count
        if x is None:
            return f"its queries come from {_origin(block)}, so its own input cannot be told: {_SEPARATE}"
        if heads is None or block.merged is None:
            return f"its heads cannot be told apart, or are never merged: {_SEPARATE}"
        if any("Conv" in node.op_type for node in block.query.projections):
            return f"its queries come from a convolution of '{x.name}', whose channels are not its last axis"
        width = _width(block, shapes)
        if width is None:
            return f"the width of its input '{x.name}' is unknown"
        if x.dtype not in _DTYPES:
            return f"its input '{x.name}' is {x.dtype}, not FLOAT"
        if self.kind.is_per_head and width % heads:
            return f"its input is {width} wide, which {heads} heads do not divide: use kind=all-heads"
        merged = shapes.of(block.merged)
        size = block.layout.value_size
        if merged is None or size is None or merged[-1] != Dim(heads * size):
            return f"its merged heads are not {heads} times {size or '?'} channels side by side: {_SEPARATE}"
        lead = (shapes.of(x) or (None,))[:-1]
        rows = product(lead)
        if not _are_aligned(lead, merged[:-1]) and (rows is None or rows != product(merged[:-1])):
            return f"its input '{x.name}' and its context count positions differently"
        opset = opset_of(block)
        return f"opset {opset} has no Shape of some axes ({SHAPE_OPSET} has)" if opset < SHAPE_OPSET else None


def _distinct(names: list[str]) -> list[str]:
    """Return the names with a number behind those that came before: equal weights of one name would become
    one, and be trained as one."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        found.append(f"{name}.{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def _origin(block: Attention) -> str:
    if block.form is not AttentionForm.DECOMPOSED and not block.query.projections:
        return f"outside of one {block.form.value}"
    count = len(block.query.projections)
    return "no layer with weights" if not count else f"{count} layers that read different values"


def _width(block: Attention, shapes: SymbolicShapes) -> int | None:
    shape = shapes.of(block.query.input)
    last = shape[-1] if shape else None
    return last.known if last is not None else None


def _are_aligned(left: Shape, right: Shape) -> bool:
    """Whether positions have the same axes; sizes that change from call to call may have two names."""
    return len(left) == len(right) and all(
        a is not None and b is not None and (a == b or bool(a.symbols and b.symbols))
        for a, b in zip(left, right, strict=True)
    )


def _reshaped_like(opened: ir.Value, value: ir.Value, before: ir.Node, name: str) -> ir.Value:
    """Return the gate with the leading axes of `value`, where x has the same positions in fewer axes."""
    graph = before.graph
    if graph is None:
        raise ValueError(f"{before.name} is in no graph")
    one = add_initializer(graph, f"{name}.gate.one", np.array([1], np.int64))
    shape = emit(
        before,
        "Shape",
        [value],
        attributes={"start": 0, "end": -1},
        names=[f"{name}.gate.shape"],
        dtype=ir.DataType.INT64,
    )
    target = emit(
        before,
        "Concat",
        [shape, one],
        attributes={"axis": 0},
        names=[f"{name}.gate.target"],
        dtype=ir.DataType.INT64,
    )
    return emit(before, "Reshape", [opened, target], names=[f"{name}.gate.reshaped"], dtype=opened.dtype)


def _apply(block: Attention, gate: Gate, shapes: SymbolicShapes, name: str) -> None:
    """Take merged heads apart for the gate and merge them again, which copies nothing: so the operators that
    merged them stay together, as fusions look for them."""
    x, merged, size = block.query.input, block.merged, block.layout.value_size
    producer = merged.producer() if merged is not None else None
    if x is None or merged is None or producer is None or size is None or producer.graph is None:
        raise ValueError(f"{block.name}: its input or its merged heads are unknown")
    those = readers(merged)
    with place_behind(producer) as before:
        joined = _gated(block, gate, shapes, name, before)
    let_read(those, joined)
    take_place(merged, joined)


def _gated(block: Attention, gate: Gate, shapes: SymbolicShapes, name: str, before: ir.Node) -> ir.Value:
    x, merged, size, graph = block.query.input, block.merged, block.layout.value_size, before.graph
    if x is None or merged is None or size is None or graph is None:
        raise ValueError(f"{block.name}: its input or its merged heads are unknown")
    keep = [0] * ((shapes.rank(merged) or 1) - 1)
    target = np.array([*keep, gate.heads, size], np.int64)
    back = np.array([*keep, gate.heads * size], np.int64)
    apart = emit(
        before,
        "Reshape",
        [merged, add_initializer(graph, f"{name}.gate.heads", target)],
        names=[f"{name}.heads"],
        dtype=merged.dtype,
    )
    opened = emit_gate(gate, x, shapes.rank(x) or 0, before, name)
    if not _are_aligned((shapes.of(x) or ())[:-1], (shapes.of(merged) or ())[:-1]):
        opened = _reshaped_like(opened, apart, before, name)
    product = emit(before, "Mul", [apart, opened], names=[f"{name}.gated"], dtype=merged.dtype)
    return emit(
        before,
        "Reshape",
        [product, add_initializer(graph, f"{name}.gate.joined", back)],
        names=[f"{merged.name}_gated"],
        like=merged,
    )

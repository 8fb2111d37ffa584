# SPDX-License-Identifier: Apache-2.0
"""Weights of 4 bits in blocks, computed in int8: for calls of many rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.activation_codes import DynamicCodes
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.carriers import Int8Weight, multiply_dynamic
from splitfold.passes.identity import display_layer
from splitfold.passes.later_operators import make_available
from splitfold.passes.symbolic_shapes import SymbolicShapes, symbolic_shapes
from splitfold.passes.values import add_initializer, constant, drop_unused, emit, int_attribute, replace_value
from splitfold.runtime.feeds import Array
from splitfold.runtime.target import Carrier

__all__ = ["WidenBlocksPass"]

_BLOCKED = 21
"""Opset from which DequantizeLinear takes 4 bits and blocks."""
_MIDDLE = 8
"""Zero point where MatMulNBits names none."""
_LEVELS = 127


@dataclass(frozen=True)
class WidenBlocksPass(LayerPass):
    """Compute 4-bit MatMulNBits as dynamic int8, its weight rounded once more, to 8 bits a column.

    At many rows an int8 product is faster, at one row the smaller weight. The stored codes, scales and zero
    points stay what they are, byte for byte, so that a model for prompts and one for single tokens can share
    them in one file; the runtime folds the arithmetic on them into int8 when it opens the model. A layer that
    computes one row (the head of a model that returns the last token's logits) stays.

    Before::

        y = MatMulNBits(x, codes, scales, zero_points)

    After::

        W = QuantizeLinear(Transpose(DequantizeLinear(codes, scales / column_scales, zero_points)), 1)
        q, s, z = DynamicQuantizeLinear(x)
        y = Cast(MatMulInteger(q, W, z)) * (s * column_scales)
    """

    name: ClassVar[str] = "widen-blocks"
    contract: ClassVar[Contract] = Contract.LOSSY
    takes: ClassVar[str] = "MatMulNBits with constant 4-bit weights"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        reason = self._obstacle(model, context)
        shapes, codes = symbolic_shapes(model), DynamicCodes()
        nodes = [node for node in model.graph.all_nodes() if _is_blocks(node)]
        self.check_patterns(map(display_layer, nodes))
        for node in nodes:
            name = display_layer(node)
            found = self.unwanted(name) or reason or _stored(node, shapes)
            if isinstance(found, str):
                findings.skip(name, found)
            else:
                weight = _widen(node, found, codes)
                findings.apply(name, "4-bit blocks in dynamic int8", weight=weight)
        return bool(findings.applied)

    def _obstacle(self, model: ir.Model, context: Context) -> str:
        """Return why no layer can be rewritten; otherwise raise the model's opset where it is needed."""
        if not context.target.carries(Carrier.DYNAMIC_INT8):
            return f"target {context.target.name} has no dynamic int8 kernels"
        shapes = symbolic_shapes(model)
        nodes = [node for node in model.graph.all_nodes() if _is_blocks(node)]
        wanted = [node for node in nodes if not self.unwanted(display_layer(node))]
        if all(isinstance(_stored(node, shapes), str) for node in wanted):
            return ""
        return make_available(model, "DequantizeLinear in blocks", _BLOCKED, context.target)


@dataclass(frozen=True)
class _Stored:
    """What a MatMulNBits reads.

    Attributes:
        data, bias: its input, and its bias [N] or None.
        codes: uint8 [N, blocks, block / 2], two codes a byte, the first in the low half.
        scales: float32 [N, blocks].
        zeros: uint8 [N, blocks], of 0 to 15.
        block: elements of a block.
        name: of the codes.
    """

    data: ir.Value
    bias: ir.Value | None
    codes: Array
    scales: Array
    zeros: Array
    block: int
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, [N, K]."""
        rows, blocks = self.scales.shape
        return rows, blocks * self.block

    def column_scales(self) -> Array:
        """Return the int8 step of each output column, float32 [N]."""
        halves = self.codes.reshape(*self.scales.shape, -1)
        high, low = halves >> 4, halves & 15
        most = np.maximum(high.max(-1), low.max(-1)).astype(np.float32) - self.zeros
        least = np.minimum(high.min(-1), low.min(-1)).astype(np.float32) - self.zeros
        peaks = (np.maximum(np.abs(most), np.abs(least)) * np.abs(self.scales)).max(-1)
        return np.asarray(np.where(peaks > 0, peaks / _LEVELS, 1), np.float32)


def _is_blocks(node: ir.Node) -> bool:
    operator = (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits")
    return operator and int_attribute(node, "bits", 4) == 4


def _stored(node: ir.Node, shapes: SymbolicShapes) -> _Stored | str:
    """Return what the node reads, or why it stays."""
    shape = shapes.of(node.inputs[0])
    if shape is not None and len(shape) > 2 and shape[-2] is not None and shape[-2].known == 1:
        return "it computes one row of each sequence, which 4 bits serve best"
    inputs = [*node.inputs, *[None] * (6 - len(node.inputs))]
    held = [constant(value) for value in inputs[1:4]]
    codes, scales, zeros = (None if each is None else each.numpy() for each in held)
    block, columns = int_attribute(node, "block_size", 0), int_attribute(node, "K", 0)
    rows, data = int_attribute(node, "N", 0), inputs[0]
    if data is None or codes is None or scales is None or (inputs[3] is not None and zeros is None):
        return "its weight, scales or zero points are no constants"
    if columns % block:
        return f"its {columns} inputs are no multiple of its blocks of {block}"
    if scales.dtype != np.float32 or (zeros is not None and zeros.dtype != np.uint8):
        return f"its scales are {scales.dtype}, its zero points {None if zeros is None else zeros.dtype}"
    if inputs[4] is not None:
        return "its inputs are ordered by a list of their blocks"
    blocks = columns // block
    unpacked = np.full((rows, blocks), _MIDDLE, np.uint8) if zeros is None else _unpacked(zeros, rows, blocks)
    steps = scales.reshape(rows, blocks)
    name = (inputs[1].name if inputs[1] is not None else None) or "weight"
    return _Stored(data, inputs[5], codes, steps, unpacked, block, name)


def _unpacked(packed: Array, rows: int, count: int) -> Array:
    halves = packed.reshape(rows, -1)
    return np.stack([halves & 15, halves >> 4], axis=-1).reshape(rows, -1)[:, :count]


def _packed(codes: Array) -> Array:
    """Return two codes a byte, rows not padded, as ONNX stores 4 bits."""
    flat = codes.reshape(-1)
    whole = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    return np.asarray(whole[::2] | whole[1::2] << 4, np.uint8)


def _widen(node: ir.Node, stored: _Stored, codes: DynamicCodes) -> str:
    """Put the int8 product in the place of `node`, and return the name of its codes."""
    weight = _int8(node, stored)
    result = multiply_dynamic(node, node.outputs[0], codes.before(node, stored.data), weight)
    if stored.bias is not None:
        result = emit(node, "Add", [result, stored.bias], names=[f"{result.name}_biased"], like=result)
    replace_value(node.outputs[0], result)
    drop_unused([node])
    return weight.name


def _int8(node: ir.Node, stored: _Stored) -> Int8Weight:
    """Emit the int8 weight [K, N], from the codes as they are."""
    graph = node.graph
    if graph is None:
        raise ValueError(f"{display_layer(node)} is in no graph")
    base, steps = stored.name, stored.column_scales()
    half = ir.DataType.UINT4
    held = add_initializer(
        graph, f"{base}_codes", ir.PackedTensor(stored.codes.reshape(-1), half, shape=ir.Shape(stored.shape))
    )
    scales = add_initializer(graph, f"{base}_scales", stored.scales)
    shape = ir.Shape(stored.scales.shape)
    zeros = ir.PackedTensor(_packed(stored.zeros), half, shape=shape)
    origins = add_initializer(graph, f"{base}_origins", zeros)
    columns = add_initializer(graph, f"{base}_column_scales", steps)
    middle = add_initializer(graph, f"{base}_column_zeros", np.zeros(steps.shape, np.int8))
    inverse = add_initializer(graph, f"{base}_column_levels", (1 / steps)[:, None])
    unit = add_initializer(graph, "int8_unit", np.array(1, np.float32))
    zero = add_initializer(graph, "int8_zero", np.array(0, np.int8))
    # a scale a column in QuantizeLinear would do the same, a hundred times slower
    levels = emit(node, "Mul", [scales, inverse], names=[f"{base}_levels"], like=scales)
    back = emit(
        node,
        "DequantizeLinear",
        [held, levels, origins],
        attributes={"axis": 1, "block_size": stored.block},
        names=[f"{base}_float"],
        dtype=ir.DataType.FLOAT,
    )
    turned = emit(
        node, "Transpose", [back], attributes={"perm": [1, 0]}, names=[f"{base}_turned"], dtype=back.dtype
    )
    codes = emit(node, "QuantizeLinear", [turned, unit, zero], names=[f"{base}_int8"], dtype=ir.DataType.INT8)
    back.shape, turned.shape, codes.shape = (
        ir.Shape(stored.shape),
        ir.Shape(stored.shape[::-1]),
        ir.Shape(stored.shape[::-1]),
    )
    return Int8Weight(codes, columns, middle, held.name or "")

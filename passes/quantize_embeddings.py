# SPDX-License-Identifier: Apache-2.0
"""Embedding tables in 8 or 4 bits, dequantized after the gather, not before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import pack_codes, quantize_blocks, quantize_rows
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.layers import Layer, LayerKind, find_layers
from splitfold.passes.values import add_initializer, drop_unused, emit, replace_value
from splitfold.runtime.target import Carrier

__all__ = ["QuantizeEmbeddingsPass"]


@dataclass(frozen=True)
class QuantizeEmbeddingsPass(LayerPass):
    """Hold the tables that Gather reads row by row in int8 (a scale a row) or 4 bits (a scale and zero point
    a block of a row).

    Args:
        bits: 8 or 4.
        block: columns that share a scale, of 4 bits.
        min_bytes: smaller tables are left as they are: they cost an operator and save nothing.

    Before::

        y = Gather(table, ids)

    After::

        y = Cast(Gather(table_int8, ids)) * Gather(row_scales, ids)                          # 8 bits
        y = com.microsoft::GatherBlockQuantized(table_uint4, ids, scales, zero_points)       # 4 bits
    """

    name: ClassVar[str] = "quantize-embeddings"
    contract: ClassVar[Contract] = Contract.LOSSY
    takes: ClassVar[str] = "constant tables that a Gather reads row by row"
    bits: int = 8
    block: int = 32
    min_bytes: int = 65536

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}; it may be 8 or 4.")
        if self.block not in (16, 32, 64, 128, 256):
            raise ValueError(f"block is {self.block}; it may be 16, 32, 64, 128 or 256.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        layers = [layer for layer in find_layers(model)[0] if layer.kind is LayerKind.EMBEDDING]
        self.check_patterns(layer.name for layer in layers)
        changed = False
        for layer in layers:
            reason = self.unwanted(layer.name) or self._structural_reason(layer, context)
            if reason is not None:
                findings.skip(layer.name, reason)
                continue
            output, weight = self._carry(layer)
            replace_value(layer.output, output)
            drop_unused([layer.node])
            findings.apply(layer.name, f"table in {self.bits} bits", weight=weight)
            changed = True
        return changed

    def _structural_reason(self, layer: Layer, context: Context) -> str | None:
        carrier = Carrier.GATHER_ROWS if self.bits == 8 else Carrier.GATHER_BLOCKS
        if not context.target.carries(carrier):
            return f"target {context.target.name} does not carry {carrier.value}"
        if layer.weight.dtype is not ir.DataType.FLOAT:
            return f"the table is {layer.weight.dtype}, not FLOAT"
        size = layer.weight.const_value.nbytes if layer.weight.const_value is not None else 0
        if size < self.min_bytes:
            return f"the table has {size} bytes, fewer than min-bytes={self.min_bytes}"
        others = [use.node for use in layer.weight.uses() if use.node.op_type != "Gather"]
        if others or layer.weight.is_graph_output():
            reader = others[0].name if others else "a graph output"
            return f"the table is also read by {reader}, which keeps the float copy: the file would grow"
        columns = layer.weight_array().shape[1]
        return (
            f"its {columns} columns are no multiple of block = {self.block}"
            if self.bits == 4 and columns % self.block
            else None
        )

    def _carry(self, layer: Layer) -> tuple[ir.Value, str]:
        return _rows(layer) if self.bits == 8 else _blocks(layer, self.block)


def _rows(layer: Layer) -> tuple[ir.Value, str]:
    graph = layer.weight.graph or layer.node.graph
    if graph is None:
        raise ValueError(f"{layer.name} is in no graph")
    codes, scales = quantize_rows(layer.weight_array())
    table = add_initializer(graph, f"{layer.weight.name}_int8", codes)
    steps = add_initializer(graph, f"{layer.weight.name}_row_scales", scales)
    base, out = layer.output.name, layer.output
    rows = emit(
        layer.node, "Gather", [table, layer.input], names=[f"{base}_codes"], like=out, dtype=ir.DataType.INT8
    )
    scale = emit(
        layer.node, "Gather", [steps, layer.input], names=[f"{base}_row_scale"], dtype=ir.DataType.FLOAT
    )
    if layer.input.shape is not None:
        scale.shape = ir.Shape([*layer.input.shape, 1])
    real = emit(
        layer.node,
        "Cast",
        [rows],
        attributes={"to": ir.DataType.FLOAT.value},
        names=[f"{base}_cast"],
        like=out,
    )
    return emit(layer.node, "Mul", [real, scale], names=[f"{base}_scaled"], like=out), table.name or ""


def _blocks(layer: Layer, block: int) -> tuple[ir.Value, str]:
    graph = layer.weight.graph or layer.node.graph
    if graph is None:
        raise ValueError(f"{layer.name} is in no graph")
    q = quantize_blocks(layer.weight_array(), bits=4, block=block, symmetric=False)
    packed = pack_codes(q.codes.reshape(q.codes.shape[0], -1), 4)
    table = add_initializer(graph, f"{layer.weight.name}_uint4", packed)
    scales = add_initializer(graph, f"{layer.weight.name}_scales", q.scales)
    zeros = add_initializer(
        graph, f"{layer.weight.name}_zero_points", pack_codes(np.asarray(q.zero_points), 4)
    )
    value = emit(
        layer.node,
        "GatherBlockQuantized",
        [table, layer.input, scales, zeros],
        domain="com.microsoft",
        attributes={"bits": 4, "block_size": block, "gather_axis": 0, "quantize_axis": 1},
        names=[f"{layer.output.name}_int4"],
        like=layer.output,
    )
    return value, table.name or ""

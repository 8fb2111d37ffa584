# SPDX-License-Identifier: Apache-2.0
"""Constants behind Q/DQ: codes of constant floats, moved constant codes, and small constants that no integer
kernel reads."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from splitfold.passes.fold_constants import evaluate, replace_by_constants
from splitfold.passes.identity import display_layer, inherit
from splitfold.passes.quantizer_moves import is_mover
from splitfold.passes.quantizers import DEQUANTIZE, QUANTIZE, grid_of
from splitfold.passes.values import constant, drop_initializer

__all__ = ["fold_quantized"]

_FLOAT_READERS = {
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
}
"""Operators that the runtime has no integer kernel for, whose parameters it would dequantize at each call."""
_SMALL_BYTES = 64 * 1024
"""A dequantized constant may be this large: four times its codes."""
_CODES = {ir.DataType.INT8, ir.DataType.UINT8}


def fold_quantized(model: ir.Model, wanted: Callable[[ir.Node], bool]) -> list[tuple[str, str]]:
    """Replace what Q, DQ and movers make of constants in the main graph, evaluated by the runtime; return
    (layer, what was done)."""
    nodes = [node for node in model.graph if _folds(node) and wanted(node)]
    results = evaluate(model, nodes) if nodes else {}
    done = [node for node in nodes if all(output.name in results for output in node.outputs if output.uses())]
    told = [(display_layer(node), f"{node.op_type} of a constant is a constant") for node in done]
    for node in done:
        inherit([use.node for output in node.outputs for use in output.uses()], [node])
    sources = [value for node in done for value in node.inputs]
    replace_by_constants(model.graph, set(done), results)
    for value in sources:
        drop_initializer(value)
    return told


def _folds(node: ir.Node) -> bool:
    """Whether all inputs are constant and the result takes no more room, or little."""
    if any(value is not None and constant(value) is None for value in node.inputs):
        return False
    if any(output.is_graph_output() for output in node.outputs):
        return False
    if node.op_type == QUANTIZE:
        grid = grid_of(node, QUANTIZE)
        return grid is not None and grid.kind in _CODES
    if node.op_type == DEQUANTIZE:
        return grid_of(node, DEQUANTIZE) is not None and _is_small(node) and _is_read_in_float(node)
    data = constant(node.inputs[0]) if node.inputs else None
    return is_mover(node) and data is not None and data.dtype in _CODES and _keeps_size(node)


def _is_small(node: ir.Node) -> bool:
    data = constant(node.inputs[0])
    return data is not None and data.dtype.bitwidth >= 8 and 4 * data.size <= _SMALL_BYTES


def _is_read_in_float(node: ir.Node) -> bool:
    uses = list(node.outputs[0].uses())
    return bool(uses) and all(
        use.node.domain == "" and use.node.op_type in _FLOAT_READERS and use.node.graph is node.graph
        for use in uses
    )


def _keeps_size(node: ir.Node) -> bool:
    """Whether the moved constant takes the place of the one that it is made from."""
    data = node.inputs[0]
    alone = data is not None and all(use.node is node for use in data.uses())
    return alone and node.op_type not in ("Gather", "Concat")

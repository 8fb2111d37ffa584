# SPDX-License-Identifier: Apache-2.0
"""Q and DQ nodes that can go: pairs that undo each other, twins, and those read for their shape only."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import onnx_ir as ir

from splitfold.passes.base import Findings
from splitfold.passes.identity import display_layer, inherit
from splitfold.passes.provenance import stand_for, stands_for
from splitfold.passes.quantizers import DEQUANTIZE, QUANTIZE, Grid, dequantized_by, grid_of
from splitfold.passes.values import drop_unused

__all__ = ["cancel", "measure_codes", "merge_twins"]

_PAIR = "Q(DQ(x)) is x"


def cancel(node: ir.Node, findings: Findings) -> str:
    """Let the readers of the Q `node` read the codes that a DQ of the same grid made its input from; return
    what was done, or nothing."""
    found, grid = dequantized_by(node.inputs[0]), grid_of(node, QUANTIZE)
    result = node.outputs[0]
    if found is None or grid is None or result.is_graph_output():
        return ""
    before, other = found
    codes = before.inputs[0]
    if codes is None or before.graph is not node.graph:
        return ""
    if other != grid or not grid.returns_codes:
        findings.miss(display_layer(node), _PAIR, _difference(other, grid))
        return ""
    _take_over(codes, result, [node, before])
    drop_unused([node, before])
    return "Q of what a DQ of the same grid made is gone"


def _take_over(codes: ir.Value, result: ir.Value, gone: list[ir.Node]) -> None:
    """Let `codes` be read in the place of `result`; the layers of the nodes that go are kept."""
    source = codes.producer()
    inherit([source] if source is not None else [use.node for use in result.uses()], gone)
    result.replace_all_uses_with(codes)


def _difference(one: Grid, other: Grid) -> str:
    if one == other:
        return f"codes of {one.kind.name} with scales of {one.scale_kind.name} may not come back as they were"
    if one.kind is not other.kind:
        return f"it makes {other.kind.name} of {one.kind.name}: it requantizes"
    if one.axis is not None or other.axis is not None:
        return "one scale stands against several: it requantizes"
    if one.scales == other.scales:
        return "its zero point is not that of the DQ before it: it requantizes"
    steps = [_scalar(grid) for grid in (one, other)]
    return f"its scale is {steps[1]:.6g}, that of the DQ before it {steps[0]:.6g}: it requantizes"


def _scalar(grid: Grid) -> float:
    return float(np.frombuffer(grid.scales, grid.scale_kind.numpy())[0])


def measure_codes(node: ir.Node) -> str:
    """Let a Shape or Size read what was quantized or dequantized, which has the same; return what was done,
    or nothing."""
    value = node.inputs[0]
    source = value.producer() if value is not None else None
    kinds = (QUANTIZE, DEQUANTIZE)
    if source is None or source.op_type not in kinds or source.graph is not node.graph:
        return ""
    while source is not None and source.op_type in kinds and source.graph is node.graph:
        inherit([node], [source])
        node.replace_input_with(0, source.inputs[0])
        following = source.inputs[0].producer() if source.inputs[0] is not None else None
        drop_unused([source])
        source = following
    return f"{node.op_type} of the value before Q/DQ"


def merge_twins(model: ir.Model, wanted: Callable[[ir.Node], bool]) -> list[tuple[str, str]]:
    """Let a value that is quantized (or dequantized) twice in one way be so once; return (layer, what was
    done)."""
    done: list[tuple[str, str]] = []
    for graph in model.graphs():
        first: dict[Hashable, ir.Node] = {}
        for node in list(graph):
            key = _key(node)
            if key is None or not wanted(node):
                continue
            kept = first.setdefault(key, node)
            if kept is not node and not any(output.is_graph_output() for output in node.outputs):
                done.append((display_layer(node), f"{node.op_type} of one value twice is one"))
                _merge(kept, node)
    return done


def _key(node: ir.Node) -> Hashable | None:
    """Return what nodes have in common that compute the same, or None for other nodes."""
    if node.op_type == "DynamicQuantizeLinear" and node.domain == "":
        return (node.op_type, node.inputs[0])
    grid = grid_of(node, QUANTIZE) or grid_of(node, DEQUANTIZE)
    saturate = node.attributes.get("saturate")
    return None if grid is None else (node.op_type, node.inputs[0], grid, saturate and saturate.as_int())


def _merge(kept: ir.Node, node: ir.Node) -> None:
    inherit([kept], [node])
    for one, other in zip(kept.outputs, node.outputs, strict=True):
        if stands_for(one) is None and (name := stands_for(other)) is not None:
            stand_for(one, name)
        other.replace_all_uses_with(one)
    drop_unused([node])

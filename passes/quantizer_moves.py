# SPDX-License-Identifier: Apache-2.0
"""Letting an operator that moves elements work on codes: its DequantizeLinear goes behind it, or the
QuantizeLinear behind it goes before it.

Both work element by element, so that order changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitfold.passes.identity import inherit
from splitfold.passes.provenance import mark_new, stand_for, stands_for
from splitfold.passes.quantizers import DEQUANTIZE, QUANTIZE, Grid, dequantized_by, grid_of
from splitfold.passes.values import drop_unused, emit, ints_attribute, replace_value

__all__ = ["hoist", "is_mover", "sink"]

_KEEPING = {"Flatten", "Identity", "Reshape", "Split", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators whose outputs hold every element of the first input once."""
_MOVERS = {*_KEEPING, "Concat", "Gather", "Slice"}


def is_mover(node: ir.Node) -> bool:
    """Whether `node` only moves elements of its data inputs."""
    return node.domain == "" and node.op_type in _MOVERS and node.graph is not None


def _data_inputs(node: ir.Node) -> list[ir.Value | None]:
    return list(node.inputs) if node.op_type == "Concat" else [node.inputs[0]]


def sink(node: ir.Node) -> str:
    """Let the mover `node` read codes, and dequantize what it gives; return what was done, or nothing.

    It is done where nobody else reads the dequantized input, or where its result is quantized on the same
    grid at once.
    """
    found = [dequantized_by(value) for value in _data_inputs(node)]
    sources = [item[0] for item in found if item is not None]
    grids = {item[1] for item in found if item is not None}
    if len(sources) < len(found) or len(grids) != 1:
        return ""
    grid = next(iter(grids))
    moved = _moved_axis(node, grid)
    if not grid.is_whole or moved == -1 or any(source.graph is not node.graph for source in sources):
        return ""
    back = _quantized_again(node.outputs, grid)
    if not back and not _only_reader(node, sources):
        return ""
    codes = _on_codes(node, [source.inputs[0] for source in sources], grid)
    for output, code in zip(node.outputs, codes, strict=True):
        if output.uses() or output.is_graph_output():
            parameters = sources[0].inputs[1:]
            attributes = {**sources[0].attributes, **({} if moved is None else {"axis": moved})}
            names = [f"{output.name}_dequantized"]
            float_side = emit(
                node,
                DEQUANTIZE,
                [code, *parameters],
                domain=grid.domain,
                attributes=attributes,
                names=names,
                like=output,
                origins=sources,
            )
            replace_value(output, float_side)
    drop_unused([node, *sources])
    return f"{node.op_type} works on codes"


def _moved_axis(node: ir.Node, grid: Grid) -> int | None:
    """Return the axis of the scales behind `node`, None where there is one scale, -1 where they do not fit
    there."""
    if grid.axis is None:
        return None
    perm = ints_attribute(node, "perm") if node.op_type == "Transpose" else None
    return perm.index(grid.axis) if perm is not None and not grid.block else -1


def _only_reader(node: ir.Node, sources: Sequence[ir.Node]) -> bool:
    outputs = [source.outputs[0] for source in sources]
    alone = all(use.node is node for output in outputs for use in output.uses())
    readers = [use.node for output in node.outputs for use in output.uses()]
    return alone and not any(output.is_graph_output() for output in outputs) and _all_in(node.graph, readers)


def _all_in(graph: ir.Graph | ir.Function | None, nodes: Sequence[ir.Node]) -> bool:
    """Whether no subgraph reads: ONNX Runtime aborts on some chains of Q/DQ that end in one."""
    return all(node.graph is graph for node in nodes)


def _quantized_again(outputs: Sequence[ir.Value], grid: Grid) -> list[ir.Node]:
    """Return the Q nodes that read `outputs`, where nothing but Q nodes of `grid` does; else none."""
    uses = [use for output in outputs for use in output.uses()]
    fits = all(use.idx == 0 and grid_of(use.node, QUANTIZE) == grid for use in uses)
    inside = _all_in(outputs[0].graph, [use.node for use in uses])
    out = any(output.is_graph_output() or not output.uses() for output in outputs)
    return [use.node for use in uses] if fits and inside and not out else []


def _on_codes(node: ir.Node, codes: Sequence[ir.Value | None], grid: Grid) -> tuple[ir.Value, ...]:
    """Emit the mover on `codes`, and return its outputs."""
    rest = [] if node.op_type == "Concat" else list(node.inputs[1:])
    first = emit(
        node,
        node.op_type,
        [*codes, *rest],
        attributes=dict(node.attributes),
        names=[f"{output.name}_codes" for output in node.outputs],
        origins=[source for value in codes if value is not None and (source := value.producer()) is not None],
    )
    made = first.producer()
    if made is None:
        raise ValueError(f"{node.name}: nothing was emitted")
    for old, new in zip(node.outputs, made.outputs, strict=True):
        new.shape, new.type = old.shape, ir.TensorType(grid.kind)
        mark_new(new)
    return tuple(made.outputs)


def hoist(node: ir.Node) -> str:
    """Let the mover `node`, whose results are all quantized on one grid, move codes; return what was done, or
    nothing."""
    uses = [use for output in node.outputs for use in output.uses()]
    grid = grid_of(uses[0].node, QUANTIZE) if uses else None
    if grid is None or grid.axis is not None or not grid.is_whole:
        return ""
    readers = _quantized_again(node.outputs, grid)
    if not readers or not _worth_hoisting(node, grid):
        return ""
    sources = _data_inputs(node)
    codes = [_quantized(node, readers, value, grid) for value in sources]
    results = _on_codes(node, codes, grid)
    for output, code in zip(node.outputs, results, strict=True):
        for use in list(output.uses()):
            _let_stand(use.node.outputs[0], stands_for(output))
            use.node.outputs[0].replace_all_uses_with(code, replace_graph_outputs=False)
    producer = results[0].producer()
    inherit([] if producer is None else [producer], readers)
    drop_unused([*readers, node])
    return f"quantized before the {node.op_type}"


def _worth_hoisting(node: ir.Node, grid: Grid) -> bool:
    """Whether nothing is quantized that was not before; of a Concat, whether some input has codes already,
    and none has codes of another grid, which one kernel of the runtime joins."""
    readers = [use.node for output in node.outputs for use in output.uses()]
    if any(reader.outputs[0].is_graph_output() for reader in readers):
        return False
    if node.op_type != "Concat":
        return node.op_type in _KEEPING
    found = [dequantized_by(value) for value in node.inputs]
    return any(found) and all(item is None or item[1] == grid for item in found)


def _quantized(
    node: ir.Node, readers: Sequence[ir.Node], value: ir.Value | None, grid: Grid
) -> ir.Value | None:
    """Emit the Q of `readers` on `value`, before the mover `node`."""
    if value is None:
        return None
    return emit(
        node,
        QUANTIZE,
        [value, *readers[0].inputs[1:]],
        domain=grid.domain,
        attributes=dict(readers[0].attributes),
        names=[f"{value.name}_quantized"],
        like=value,
        dtype=grid.kind,
        origins=readers,
    )


def _let_stand(codes: ir.Value, original: str | None) -> None:
    """Let what is dequantized from `codes` stand for `original`, which nothing else does any more."""
    for use in codes.uses():
        output = use.node.outputs[0]
        if original is not None and use.node.op_type == DEQUANTIZE and stands_for(output) is None:
            stand_for(output, original)

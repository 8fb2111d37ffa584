# SPDX-License-Identifier: Apache-2.0
"""What passes that put another function in the place of attention have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import onnx_ir as ir

from splitfold.passes.attention_block import Attention, AttentionReport
from splitfold.passes.base import Findings, LayerPass
from splitfold.passes.dims import declare_shape
from splitfold.passes.identity import LAYERS_KEY
from splitfold.passes.symbolic_shapes import SymbolicShapes
from splitfold.passes.values import emit, take_place

__all__ = [
    "SHAPE_OPSET",
    "candidate_blocks",
    "insert_after",
    "let_read",
    "opset_of",
    "place_behind",
    "readers",
    "written_for",
]

SHAPE_OPSET = 15
"""From which on Shape can give some axes alone."""
_PATTERN = "attention"


def candidate_blocks(
    step: LayerPass,
    report: AttentionReport,
    findings: Findings,
    reason_against: Callable[[Attention], str | None],
) -> list[Attention]:
    """Return the blocks that `step` may take up, and record why it takes up none of the others.

    Args:
        step: the pass, for the user's patterns.
        report: what `find_attention` found.
        findings: where skipped blocks, and softmaxes that are no attention, go.
        reason_against: why the pass cannot take up a block, or None.

    Raises:
        SpecError: a pattern of the user matches no block.
    """
    step.check_patterns(block.name for block in report.blocks)
    for miss in report.misses:
        findings.miss(miss.name, _PATTERN, miss.reason)
    kept = []
    for block in report.blocks:
        reason = step.unwanted(block.name) or reason_against(block)
        if reason is None:
            kept.append(block)
        else:
            findings.skip(block.name, reason)
    return kept


def opset_of(block: Attention) -> int:
    """Return the version of the standard operators that a block is written in."""
    graph = block.node.graph
    imports = graph.opset_imports if isinstance(graph, ir.Graph) else {}
    return int(imports.get("", imports.get("ai.onnx", 0)))


@contextlib.contextmanager
def place_behind(node: ir.Node) -> Iterator[ir.Node]:
    """Give the node before which what is made of the outputs of `node` can be emitted: the one that follows
    it; at the end of a graph one that is there only for as long.

    Raises:
        ValueError: `node` is in no graph.
    """
    graph = node.graph
    if graph is None:
        raise ValueError(f"'{node.name}' is in no graph")
    nodes = list(graph)
    at = nodes.index(node) + 1
    if at < len(nodes):
        yield nodes[at]
        return
    place = ir.node("Identity", [node.outputs[0]])
    graph.append(place)
    yield place
    graph.remove(place, safe=True)


def readers(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Return who reads `value`, and at which input: to be asked before what takes its place is made of it."""
    return [(use.node, use.idx) for use in value.uses()]


@contextlib.contextmanager
def written_for(block: Attention, shapes: SymbolicShapes) -> Iterator[None]:
    """Let the nodes that are made inside of it belong to the layer of `block` alone, and declare the shapes
    of what they compute."""
    graph = block.node.graph
    before = set(graph or ())
    yield
    layers = block.node.metadata_props.get(LAYERS_KEY)
    for node in [node for node in graph or () if node not in before]:
        if layers is not None:
            node.metadata_props[LAYERS_KEY] = layers
        shapes.visit(node)
        for output in node.outputs:
            if output.shape is None and (shape := shapes.of(output)) is not None:
                declare_shape(output, shape)


def let_read(those: Iterable[tuple[ir.Node, int]], value: ir.Value) -> None:
    """Let `those` readers of another value read `value`."""
    for node, position in those:
        node.replace_input_with(position, value)


def insert_after(value: ir.Value, op_type: str, attributes: Mapping[str, object], name: str) -> ir.Value:
    """Emit an operator of one input behind `value`, in whose place its output is read from then on.

    Raises:
        ValueError: no node computes `value`.
    """
    producer = value.producer()
    if producer is None:
        raise ValueError(f"'{value.name}' is computed by no node")
    before_it = readers(value)
    with place_behind(producer) as before:
        made = emit(before, op_type, [value], attributes=attributes, names=[name], like=value)
    let_read(before_it, made)
    take_place(value, made)
    return made

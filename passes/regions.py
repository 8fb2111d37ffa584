# SPDX-License-Identifier: Apache-2.0
"""Integer regions: which values are quantized for everyone (around convolutions), and which only on the way
into one layer.

A convolution runs in integers only if its output is quantized too, so the values of a convolutional region
are quantized for all who read them, residual Add included. The input of a linear layer is quantized on the
edge into that layer alone: a residual Add that read the quantized value would carry its error on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import onnx_ir as ir

from splitfold.passes.layers import Layer
from splitfold.passes.values import constant, sole_consumer

__all__ = ["missed_points", "moved_into_subgraph", "output_point", "region_values"]

_COMPUTING = {"Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat"}
"""Operators with integer kernels that give their output a grid of its own."""
_PASSING = {
    "MaxPool",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "DepthToSpace",
    "SpaceToDepth",
    "Slice",
    "Gather",
}
"""Operators that move elements: their output has the grid of their input."""


def output_point(layer: Layer) -> ir.Value:
    """Return the value at which a convolution's output is quantized: after a Relu or Clip at zero, which the
    grid absorbs."""
    return _after_activation(layer.node)


def _after_activation(node: ir.Node) -> ir.Value:
    follower = sole_consumer(node.outputs[0])
    if follower is None or follower.graph is not node.graph or not _absorbed(follower):
        return node.outputs[0]
    return follower.outputs[0]


def _moves(node: ir.Node) -> bool:
    return node.domain == "" and (node.op_type in _PASSING or _pads_with_zero(node))


def _pads_with_zero(node: ir.Node) -> bool:
    """Return whether the node is a Pad whose new elements are zero, which every grid holds exactly."""
    mode = node.attributes.get("mode")
    if node.op_type != "Pad" or (mode is not None and mode.as_string() != "constant"):
        return False
    value = node.inputs[2] if len(node.inputs) > 2 else None
    held = constant(value)
    return value is None or (held is not None and not held.numpy().any())


def moved_into_subgraph(value: ir.Value) -> bool:
    """Return whether a subgraph reads a moving operator's output that comes from `value` by moving alone.

    ONNX Runtime aborts the process where it finds DequantizeLinear, Reshape (or the like) and such a reader
    in a row: seen up to 1.31.1.
    """
    movers = [use.node for use in value.uses() if _moves(use.node)]
    return any(_read_in_subgraph(mover) or moved_into_subgraph(mover.outputs[0]) for mover in movers)


def _read_in_subgraph(node: ir.Node) -> bool:
    return any(use.node.graph is not node.graph for use in node.outputs[0].uses())


def _absorbed(node: ir.Node) -> bool:
    if node.op_type == "Relu":
        return True
    if node.op_type != "Clip" or len(node.inputs) < 2:
        return False
    low = constant(node.inputs[1])
    return low is not None and float(low.numpy()) == 0.0


def region_values(
    nodes: Iterable[ir.Node],
    convolutions: Collection[Layer],
    anchors: Collection[ir.Node],
    holdable: Callable[[ir.Value], bool],
) -> dict[ir.Value, ir.Value]:
    """Return the values of the integer regions, each with the value whose grid it has (itself, or the source
    of a moving operator).

    Args:
        nodes: of the main graph, topologically sorted.
        convolutions: the layers that are carried in integers with both sides quantized.
        anchors: nodes of all layers that read quantized inputs.
        holdable: whether an 8-bit grid can hold a value.
    """
    region = {point: point for point in map(output_point, convolutions)}
    joined: list[ir.Value] = []
    for node in nodes:
        source = _grid_source(node, region, holdable)
        point = _point(node)
        if source is not None and point is not None and point not in region:
            region[point] = source
            joined.append(point)
    return _without_unwanted(region, joined, set(anchors))


def _point(node: ir.Node) -> ir.Value | None:
    computes = node.domain == "" and node.op_type in _COMPUTING
    if len(node.outputs) != 1 or not (computes or _moves(node)):
        return None
    return _after_activation(node) if node.op_type == "Add" else node.outputs[0]


def _grid_source(
    node: ir.Node, region: dict[ir.Value, ir.Value], holdable: Callable[[ir.Value], bool]
) -> ir.Value | None:
    first = node.inputs[0] if node.inputs else None
    point = _point(node)
    if first is None or point is None or first not in region or moved_into_subgraph(point):
        return None
    if _moves(node):
        return region[first]
    inside = all(value is not None and value in region for value in node.inputs)
    return point if inside and holdable(point) else None


def _without_unwanted(
    region: dict[ir.Value, ir.Value], joined: list[ir.Value], anchors: set[ir.Node]
) -> dict[ir.Value, ir.Value]:
    """Drop joined values that lead to no integer layer: they would be rounded for nothing."""
    candidates = set(joined)
    kept = {value: source for value, source in region.items() if value not in candidates}
    for value in reversed(joined):
        readers = [use.node for use in value.uses()]
        if any(node in anchors or _point(node) in kept for node in readers):
            kept[value] = region[value]
    return kept


def missed_points(
    nodes: Iterable[ir.Node],
    convolutions: Iterable[Layer],
    anchors: Collection[ir.Node],
    region: Mapping[ir.Value, ir.Value],
) -> Iterator[tuple[ir.Node, str]]:
    """Yield (node, reason) of each operator that reads a value of `region` and has an integer kernel, and yet
    computes in float, and of each activation that a convolution's grid does not absorb.

    Args:
        nodes: of the main graph.
        convolutions: the layers around which the regions are.
        anchors: nodes of all layers that read quantized inputs.
        region: what `region_values` returned.
    """
    for layer in convolutions:
        yield from _unabsorbed(layer)
    for node in nodes:
        point = _point(node)
        if (
            point is not None
            and point not in region
            and any(value in region for value in node.inputs if value)
        ):
            yield node, _miss(node, point, region, anchors)


def _unabsorbed(layer: Layer) -> Iterator[tuple[ir.Node, str]]:
    if output_point(layer) is not layer.output:
        return
    for node in (use.node for use in layer.output.uses()):
        if _absorbed(node):
            yield (
                node,
                f"the output of the {layer.kind.value} has other readers too, which want it without it",
            )
        elif node.op_type == "Clip":
            yield node, "its lower bound is not zero, so that the grid does not imply it"


def _miss(
    node: ir.Node, point: ir.Value, region: Mapping[ir.Value, ir.Value], anchors: Collection[ir.Node]
) -> str:
    outside = [value.name for value in node.inputs if value is not None and value not in region]
    if moved_into_subgraph(point):
        return "a subgraph reads its output through a Reshape or the like, which crashes the runtime in int8"
    if outside and not _moves(node):
        return f"its operand '{outside[0]}' is not quantized"
    if not _leads_on(point, anchors):
        return "no integer layer reads its result: it would be rounded for nothing"
    return f"calibration found no 8-bit grid for '{point.name}'"


def _leads_on(value: ir.Value, anchors: Collection[ir.Node]) -> bool:
    """Whether a layer with a quantized input reads `value`, at once or through what has integer kernels."""
    layers, pending, seen = set(anchors), [value], {value}
    while pending:
        for node in [use.node for use in pending.pop().uses()]:
            if node in layers:
                return True
            point = _point(node)
            if point is not None and point not in seen:
                seen.add(point)
                pending.append(point)
    return False

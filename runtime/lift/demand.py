# SPDX-License-Identifier: Apache-2.0
"""In which order the nodes of a graph run, and which of its values are wanted on the host: those that become
shapes, axes and bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.lift.row import Row

__all__ = ["running_order", "wanted_on_host"]


def running_order(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes of `graph` in an order in which each comes after what it reads; a graph in order stays
    as it is. (The runtime takes any order.)

    Raises:
        UnsupportedError: nodes read each other's outputs in a circle.
    """
    order: dict[ir.Node, None] = {}
    for start in graph:
        stack, waiting = [start], set()
        while stack:
            node = stack[-1]
            missing = [other for other in _read(node, graph) if other not in order]
            if node in order or not missing:
                order[stack.pop()] = None
            elif node in waiting:
                raise UnsupportedError(f"node '{node.name}' is computed from its own output.")
            else:
                waiting.add(node)
                stack += missing
    return list(order)


def _read(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the nodes of `graph` whose outputs `node`, or a subgraph of it, reads."""
    values = list(node.inputs)
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            values += [value for other in inner.all_nodes() for value in other.inputs]
            values.extend(inner.outputs)
    for value in values:
        producer = None if value is None else value.producer()
        if producer is not None and producer.graph is graph and producer is not node:
            yield producer


def wanted_on_host(nodes: Sequence[ir.Node], find: Callable[[ir.Node], Row | None]) -> set[ir.Value]:
    """Return the values that one of `nodes` reads on the host, or that such a value is computed from.

    The nodes stand in the order in which they run.
    """
    wanted: set[ir.Value] = set()
    for node in reversed(nodes):
        row = find(node)
        if row is None:
            continue
        passes = row.on_host is not None and any(output in wanted for output in node.outputs)
        for position, value in enumerate(node.inputs):
            if value is not None and (passes or row.on_the_host(position)):
                wanted.add(value)
    return wanted

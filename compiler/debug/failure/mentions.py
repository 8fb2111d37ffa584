# SPDX-License-Identifier: Apache-2.0
"""Nodes that a message or an exception points at."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator

import onnx_ir as ir

from splitfold.passes.identity import layers_of

__all__ = ["mentioned_node", "node_of_exception"]

_NODE_NAMES = (
    re.compile(r"Name: ?'([^']+)'"),
    re.compile(r"Node ?\(([^)]+)\)"),
    re.compile(r"In Node, \(\"([^\"]+)\""),
    re.compile(r"node with name '([^']+)'"),
    re.compile(r"Error in Node:(\S+)"),
    re.compile(r"\b[Nn]ame: (\S+) OpType"),
    re.compile(r"in node \(([^)]+)\)"),
)
"""How ONNX Runtime and the ONNX checker name a node."""
_QUOTED = re.compile(r"'([^']+)'")
_WORD = re.compile(r"[^\s'\"(),]*[\d./:_-][^\s'\"(),]*")
"""Text without quotes that can be a name: an ordinary word, such as ``index``, proves nothing."""


def mentioned_node(model: ir.Model, message: str) -> ir.Node | None:
    """Return the node of `model` that `message` names, by its name, layer or output; or None."""
    nodes = list(model.graph.all_nodes())
    by_name = {node.name: node for node in nodes if node.name}
    for pattern in _NODE_NAMES:
        for name in pattern.findall(message):
            if name in by_name:
                return by_name[name]
    words = {word.rstrip(".:;") for word in _WORD.findall(message)} | set(_QUOTED.findall(message))
    layers = {layer: node for node in reversed(nodes) for layer in layers_of(node)}
    values = {value.name: node for node in nodes for value in node.outputs if value.name}
    for known in (layers, by_name, values):
        if found := [name for name in known if name in words]:
            return known[max(found, key=len)]
    return None


def node_of_exception(error: BaseException) -> ir.Node | None:
    """Return the node that the code which raised `error` was working on: the innermost local variable of its
    frames that is a node, a layer of one, or a value; or None."""
    for frame in reversed(list(_frames(error.__traceback__))):
        found = [node for value in reversed(frame.f_locals.values()) if (node := _node(value)) is not None]
        if found:
            return found[0]
    return None


def _frames(trace: types.TracebackType | None) -> Iterator[types.FrameType]:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _node(value: object) -> ir.Node | None:
    if isinstance(value, ir.Node):
        return value
    if isinstance(value, ir.Value):
        return value.producer() or next((use.node for use in value.uses()), None)
    held = getattr(value, "node", None)
    return held if isinstance(held, ir.Node) else None

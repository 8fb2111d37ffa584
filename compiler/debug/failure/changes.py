# SPDX-License-Identifier: Apache-2.0
"""Which nodes a pass changed: two models that share names and tensors, compared node by node."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["Changes", "find_changes"]

_Key = tuple[str, ...]


@dataclass(frozen=True)
class Changes:
    """Nodes that differ between the model before and after a pass, in order; subgraphs included.

    Attributes:
        made: nodes of the model after that are new, or have another operator, attribute or constant.
        lost: nodes of the model before, whose outputs nobody computes any more.
        rewired: nodes of the model after that only read other values than before.
        retyped: nodes of the model after of whose outputs only types or shapes differ.
    """

    made: tuple[ir.Node, ...]
    lost: tuple[ir.Node, ...]
    rewired: tuple[ir.Node, ...]
    retyped: tuple[ir.Node, ...]

    @property
    def all(self) -> tuple[ir.Node, ...]:
        """All of them, the most telling first: a lost node knows its layer, a new one may have it from its
        neighbours only."""
        return (*self.lost, *self.made, *self.rewired, *self.retyped)

    def lost_before(self, node: ir.Node) -> ir.Node | None:
        """Return the lost node that the outputs of `node`, a rewired one, were computed from."""
        return next((other for other in self.lost if _key(node) in map(_key, other.successors())), None)


def find_changes(before: ir.Model, after: ir.Model) -> Changes:
    """Return what differs; tensors are compared by identity: `before` must be a clone of what became `after`.

    Nodes are told apart by the names of their outputs.
    """
    was = {_key(node): node for node in before.graph.all_nodes()}
    now = {_key(node): node for node in after.graph.all_nodes()}
    kept = {key: (was[key], node) for key, node in now.items() if key in was}
    made = [node for key, node in now.items() if key not in was or _text(was[key]) != _text(node)]
    same = [pair for pair in kept.values() if _text(pair[0]) == _text(pair[1])]
    return Changes(
        tuple(made),
        tuple(node for key, node in was.items() if key not in now),
        tuple(new for old, new in same if _reads(old) != _reads(new)),
        tuple(new for old, new in same if _reads(old) == _reads(new) and _types(old) != _types(new)),
    )


def _key(node: ir.Node) -> _Key:
    return tuple(value.name or "" for value in node.outputs)


def _text(node: ir.Node) -> str:
    tensors = [None if value is None else value.const_value for value in node.inputs]
    held = [0 if tensor is None else id(tensor) for tensor in tensors]
    attributes = sorted((name, _attribute(attribute)) for name, attribute in node.attributes.items())
    return f"{node.domain}::{node.op_type} {held} {attributes}"


def _attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "graph"  # its nodes are compared themselves
    if attribute.type is ir.AttributeType.TENSOR:
        return str(id(attribute.as_tensor()))
    return repr(attribute.value)


def _reads(node: ir.Node) -> list[str | None]:
    return [None if value is None or value.const_value is not None else value.name for value in node.inputs]


def _types(node: ir.Node) -> list[str]:
    return [f"{value.type} {value.shape}" for value in node.outputs]

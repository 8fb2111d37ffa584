# SPDX-License-Identifier: Apache-2.0
"""Stable identity: every node carries the names of the user's layers that it comes from, through every
rewrite.

The names stand in the node's metadata under `splitfold.layers` (a JSON list), also in the exported file. A
layer is the user's module path where the exporter recorded it (``encoder.layer.3.attention.self.query``),
else the node's own name.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable

import onnx_ir as ir

__all__ = [
    "LAYERS_KEY",
    "display_layer",
    "inherit",
    "inherit_missing",
    "layers_of",
    "mark_call",
    "name_layers",
    "stamp",
]

LAYERS_KEY = "splitfold.layers"
_CALL_KEY = "splitfold.call"
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_EXPORTER = "_empty_nn_module_stack"
"""What torch.export writes where it lost the module."""
_PATH_NAME = re.compile(r"^/(?P<path>.+)/(?P<op>[A-Za-z]+)(?P<suffix>_\d+)?$")
_WEIGHTED = {"Conv", "ConvTranspose", "Gather", "Gemm", "MatMul"}


def layers_of(node: ir.Node) -> tuple[str, ...]:
    """Return the user-facing names of the layers that `node` comes from, sorted; empty before `name_layers`
    ran."""
    text = node.metadata_props.get(LAYERS_KEY)
    return tuple(json.loads(text)) if text else ()


def display_layer(node: ir.Node) -> str:
    """Return one user-facing name for `node`, for messages: its layers, else its own name."""
    return "+".join(layers_of(node)) or node.name or node.op_type


def stamp(node: ir.Node, layers: Iterable[str]) -> None:
    """Record that `node` comes from `layers`, besides those that it already names."""
    names = sorted({*layers_of(node), *layers})
    if names:
        node.metadata_props[LAYERS_KEY] = json.dumps(names)


def inherit(nodes: Iterable[ir.Node], origins: Iterable[ir.Node]) -> None:
    """Record on each of `nodes` the layers of all `origins`: call it wherever a rewrite makes nodes."""
    layers = [layer for origin in origins for layer in layers_of(origin)]
    for node in nodes:
        stamp(node, layers)


def mark_call(node: ir.Node) -> None:
    """Record the name of a function call in its metadata, which the nodes of its body take over when it is
    inlined."""
    node.metadata_props[_CALL_KEY] = node.name or node.op_type


def name_layers(model: ir.Model) -> bool:
    """Give every node that has none its layer name; return whether any was given.

    Nodes of one module share its path. Where a module holds several layers with weights of their own, these
    are told apart by a suffix.
    """
    nodes = [node for graph in model.graphs() for node in graph if not layers_of(node)]
    names = {node: _user_name(node) for node in nodes}
    weighted = Counter(name for node, name in names.items() if _has_weight(node))
    seen: Counter[str] = Counter()
    for node, name in names.items():
        if _has_weight(node) and weighted[name] > 1:
            seen[name] += 1
            name = f"{name}.{seen[name] - 1}"
        stamp(node, [name])
    for graph in model.graphs():
        for node in graph:
            node.metadata_props.pop(_CALL_KEY, None)
    return bool(nodes)


def _has_weight(node: ir.Node) -> bool:
    return node.op_type in _WEIGHTED and any(
        value is not None and value.const_value is not None and len(value.shape or ()) > 1
        for value in node.inputs[:2]
    )


def _user_name(node: ir.Node) -> str:
    scope = _torch_scope(node)
    if scope:
        return scope
    call = node.metadata_props.get(_CALL_KEY)
    name = node.name or (node.outputs[0].name if node.outputs else None) or node.op_type
    match = _PATH_NAME.match(name)
    if match is None:
        return f"{call}.{name}" if call else name
    return _module_path(match["path"]) + (match["suffix"] or "" if match["op"] == node.op_type else "")


def _module_path(scopes: str) -> str:
    """Return ``layer1.0.conv1`` for ``layer1/layer1.0/conv1``: a container's items repeat its name."""
    parts: list[str] = []
    for part in scopes.split("/"):
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def _torch_scope(node: ir.Node) -> str:
    text = node.metadata_props.get(_SCOPES_KEY)
    if not text:
        return ""
    try:
        scopes = [str(scope) for scope in ast.literal_eval(text)]
    except (ValueError, SyntaxError):
        return ""
    # the last entry is the operator's own name in the trace
    modules = [scope for scope in scopes[:-1] if scope and not scope.startswith(_EXPORTER)]
    return modules[-1] if modules else (scopes[-1] if scopes else "")


def inherit_missing(model: ir.Model) -> list[ir.Node]:
    """Give nodes that have no layer those of the nearest nodes that do (consumers first); return the nodes
    still without."""
    pending = [node for graph in model.graphs() for node in graph if not layers_of(node)]
    while pending:
        left = [node for node in pending if not _inherit_from_neighbours(node)]
        if len(left) == len(pending):
            return left
        pending = left
    return []


def _inherit_from_neighbours(node: ir.Node) -> bool:
    for neighbours in (node.successors(), node.predecessors()):
        if named := [other for other in neighbours if layers_of(other)]:
            inherit([node], named[:1])
            return True
    return False

# SPDX-License-Identifier: Apache-2.0
"""A cheap fingerprint of a model's structure, so that `modified` is told truthfully."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import onnx_ir as ir

__all__ = ["fingerprint"]


def fingerprint(model: ir.Model) -> str:
    """Return a digest over operators, names, edges, attributes, metadata, types and *which* tensors the initializers hold.

    Tensors are compared by identity: call it twice in one process, never across two.
    """
    digest = hashlib.sha256()
    for part in _parts(model):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _parts(model: ir.Model) -> Iterator[str]:
    yield repr(sorted(model.opset_imports.items()))
    yield repr(sorted(str(key) for key in model.functions))
    for graph in model.graphs():
        yield from _graph_parts(graph)


def _graph_parts(graph: ir.Graph) -> Iterator[str]:
    yield "|".join(_value_text(value) for value in (*graph.inputs, *graph.outputs))
    for name, value in sorted(graph.initializers.items()):
        yield f"{name}:{id(value.const_value)}"
    for node in graph:
        inputs = ",".join(value.name or "" if value is not None else "" for value in node.inputs)
        outputs = ",".join(_value_text(value) for value in node.outputs)
        yield f"{node.domain}::{node.op_type}({inputs})->({outputs}) {node.name} {sorted(node.metadata_props.items())}"
        for name, attribute in sorted(node.attributes.items()):
            yield f"{name}={_attribute_text(attribute)}"


def _value_text(value: ir.Value) -> str:
    return f"{value.name}:{value.type}:{value.shape}"


def _attribute_text(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return repr(attribute)
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "graph"
    if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        return str(id(attribute.value))
    return repr(attribute.value)

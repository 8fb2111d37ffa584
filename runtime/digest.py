# SPDX-License-Identifier: Apache-2.0
"""Digests of models in memory: of the structure (cheap, for telling whether a pass changed anything) and of
the content (for replay)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from splitfold.runtime.feeds import Feeds

__all__ = ["content_digest", "feeds_digest", "structure_digest", "tensor_digest"]


def structure_digest(model: ir.Model) -> str:
    """Return a digest over operators, names, edges, attributes, metadata, types and *which* tensors are held.

    Tensors are compared by identity: call it twice in one process, never across two.
    """
    return _digest(_parts(model, lambda tensor: str(id(tensor)), metadata=True))


def content_digest(model: ir.Model) -> str:
    """Return a digest over operators, names, edges, attributes, types and the bytes of all tensors; metadata
    does not count."""
    return _digest(_parts(model, tensor_digest, metadata=False))


def feeds_digest(feeds: Feeds) -> str:
    """Return a digest over names, dtypes, shapes and bytes."""
    texts = (
        f"{name}:{a.dtype}:{a.shape}:{hashlib.sha256(_bytes(a)).hexdigest()}"
        for name, a in sorted(feeds.items())
    )
    return _digest(texts)


def _bytes(array: np.ndarray) -> bytes:
    return repr(array.tolist()).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes()


def _digest(parts: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def tensor_digest(tensor: ir.TensorProtocol | None) -> str:
    """Return a text that tells a tensor from any other: dtype, shape and a digest of its bytes."""
    if tensor is None:
        return "none"
    if tensor.dtype == ir.DataType.STRING:
        return repr(tensor.numpy().tolist())
    return f"{tensor.dtype}{tensor.shape}{hashlib.sha256(tensor.tobytes()).hexdigest()}"


TensorText = Callable[[ir.TensorProtocol | None], str]


def _parts(model: ir.Model, tensor_text: TensorText, *, metadata: bool) -> Iterator[str]:
    yield repr(sorted(model.opset_imports.items()))
    yield repr(sorted(str(key) for key in model.functions))
    for function in model.functions.values():
        yield from _node_parts(function, tensor_text, metadata)
    for graph in model.graphs():
        yield "|".join(_value_text(value) for value in (*graph.inputs, *graph.outputs))
        for name, value in sorted(graph.initializers.items()):
            yield f"{name}:{tensor_text(value.const_value)}"
        yield from _node_parts(graph, tensor_text, metadata)


def _node_parts(graph: ir.Graph | ir.Function, tensor_text: TensorText, metadata: bool) -> Iterator[str]:
    for node in graph:
        inputs = ",".join(value.name or "" if value is not None else "" for value in node.inputs)
        outputs = ",".join(_value_text(value) for value in node.outputs)
        yield f"{node.domain}::{node.op_type}({inputs})->({outputs}) {node.name}"
        if metadata:
            yield repr(sorted(node.metadata_props.items()))
        for name, attribute in sorted(node.attributes.items()):
            yield f"{name}={_attribute_text(attribute, tensor_text)}"


def _value_text(value: ir.Value) -> str:
    return f"{value.name}:{value.type}:{value.shape}"


def _attribute_text(attribute: ir.Attr, tensor_text: TensorText) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "graph"
    if attribute.type is ir.AttributeType.TENSOR:
        return tensor_text(attribute.as_tensor())
    if attribute.type is ir.AttributeType.TENSORS:
        return ";".join(tensor_text(tensor) for tensor in attribute.as_tensors())
    if attribute.type is ir.AttributeType.FLOAT:
        return repr(_stored(attribute.as_float()))
    if attribute.type is ir.AttributeType.FLOATS:
        return repr(tuple(_stored(value) for value in attribute.as_floats()))
    return repr(attribute.value)


def _stored(value: float) -> float:
    """Return the float32 that a file holds, which a model that was never in one need not."""
    return float(np.float32(value))

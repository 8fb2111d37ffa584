# SPDX-License-Identifier: Apache-2.0
"""The compact text of a model and of a pass record: made to be read and compared, never parsed.

One line a node: outputs with their types, operator, attributes, inputs, and after ``@`` the layers it comes
from. Weights are dtype and shape; shapes and the like (int64, bool) of up to four elements are shown by
value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from splitfold.passes.identity import layers_of
from splitfold.passes.pipeline import PassRecord

__all__ = [
    "render_attribute",
    "render_dtype",
    "render_model",
    "render_operator",
    "render_record",
    "render_shape",
    "render_type",
]

_SHOWN = 4
_LONG = 32
_INTEGERS = (ir.DataType.INT64, ir.DataType.BOOL)


def render_model(model: ir.Model) -> str:
    """Return the text of a model: opsets, then the main graph."""
    opsets = ", ".join(
        f"{domain or 'onnx'} {version}" for domain, version in sorted(model.opset_imports.items())
    )
    functions = [f"function {function.domain}::{function.name}" for function in model.functions.values()]
    return "\n".join([f"opset {opsets}", *functions, *_graph_lines(model.graph, "")])


def render_record(record: PassRecord) -> str:
    """Return what a pass applied, skipped (with the reasons) and noted."""
    lines = [f"applied {layer}: {what}" for layer, what in record.applied]
    lines += [f"skipped {layer}: {reason}" for layer, reason in record.skipped]
    return "\n".join(lines + [f"note {note}" for note in record.notes])


def _graph_lines(graph: ir.Graph, margin: str) -> Iterator[str]:
    yield f"{margin}graph ({_values(graph.inputs)}) => ({_values(graph.outputs)})"
    for value in graph.initializers.values():
        yield f"{margin}  {_typed(value)}{_content(value)}"
    for node in graph:
        yield from _node_lines(node, f"{margin}  ")


def _node_lines(node: ir.Node, margin: str) -> Iterator[str]:
    plain = {name: attribute for name, attribute in node.attributes.items() if not _graphs(attribute)}
    attributes = ", ".join(
        f"{name}={render_attribute(attribute)}" for name, attribute in sorted(plain.items())
    )
    inputs = ", ".join(_name(value) for value in node.inputs)
    layers = f"  @ {', '.join(layers_of(node))}" if layers_of(node) else ""
    text = f"{render_operator(node)}<{attributes}>" if attributes else render_operator(node)
    yield f"{margin}{_values(node.outputs)} = {text}({inputs}){layers}"
    for name, attribute in sorted(node.attributes.items()):
        for graph in _graphs(attribute):
            yield f"{margin}  {name}:"
            yield from _graph_lines(graph, f"{margin}    ")


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.is_ref():
        return []
    if attribute.type is ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type is ir.AttributeType.GRAPHS else []


def render_operator(node: ir.Node) -> str:
    """Return the operator with its domain, where that is not ONNX's own: ``com.microsoft::MatMulNBits``."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def render_attribute(attribute: ir.Attr) -> str:
    """Return the value of an attribute; a tensor is dtype and shape, a long list is cut, a graph its size."""
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if graphs := _graphs(attribute):
        return f"graph of {sum(len(graph) for graph in graphs)} nodes"
    if attribute.type is ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{render_dtype(tensor.dtype)}{render_shape(tensor.shape)}"
    if attribute.type is ir.AttributeType.FLOAT:
        return f"{attribute.as_float():.6g}"
    value = attribute.value
    if isinstance(value, tuple | list) and len(value) > _LONG:
        items = ",".join(str(item) for item in value[:_SHOWN])
        return f"[{items},... {len(value)} in all]"
    return str(value).replace(" ", "").replace("(", "[").replace(",)", "]").replace(")", "]")


def _values(values: Iterable[ir.Value]) -> str:
    return ", ".join(_typed(value) for value in values)


def _name(value: ir.Value | None) -> str:
    return "_" if value is None or not value.name else value.name


def _typed(value: ir.Value) -> str:
    return f"{_name(value)}: {render_type(value)}" if value.type is not None and value.name else _name(value)


def render_type(value: ir.Value) -> str:
    """Return dtype and shape of a value, such as ``float[batch,384]``; ``?`` for what is not known."""
    if value.type is None:
        return "?"
    if not isinstance(value.type, ir.TensorType):
        return str(value.type)
    shape = "[?]" if value.shape is None else render_shape(value.shape)
    return f"{render_dtype(value.type.dtype)}{shape}"


def render_dtype(dtype: ir.DataType) -> str:
    """Return the name of an element type, such as ``float`` (32 bits) or ``uint8``."""
    return dtype.name.lower()


def render_shape(shape: ir.ShapeProtocol) -> str:
    """Return a shape such as ``[batch,384]``; an empty text for a scalar."""
    dims = [str(dim) if isinstance(dim, int) else str(dim.value or "?") for dim in shape]
    return f"[{','.join(dims)}]" if dims else ""


def _content(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is None or tensor.dtype not in _INTEGERS or tensor.size > _SHOWN:
        return ""
    return f" = {str(tensor.numpy().tolist()).replace(' ', '')}"

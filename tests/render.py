# SPDX-License-Identifier: Apache-2.0
"""The compact text of a model on the after side of a pass page: made to be read and compared, never parsed.

One line a node: outputs with their types, operator, attributes, inputs, and after ``@`` the layers it comes
from. Weights are dtype and shape; shapes and the like (int64, bool) of up to four elements are shown by
value. What was measured is not: it differs between machines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir as ir

from splitfold.passes.identity import layers_of
from splitfold.passes.pipeline import PassRecord

__all__ = ["render_model", "render_record"]

_SHOWN = 4
_INTEGERS = (ir.DataType.INT64, ir.DataType.BOOL)
_MEASURED = re.compile(r"-?\d+\.\d dB")


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
    return _MEASURED.sub("... dB", "\n".join(lines + [f"note {note}" for note in record.notes]))


def _graph_lines(graph: ir.Graph, margin: str) -> Iterator[str]:
    yield f"{margin}graph ({_values(graph.inputs)}) => ({_values(graph.outputs)})"
    for value in graph.initializers.values():
        yield f"{margin}  {_typed(value)}{_content(value)}"
    for node in graph:
        yield from _node_lines(node, f"{margin}  ")


def _node_lines(node: ir.Node, margin: str) -> Iterator[str]:
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    plain = {name: attribute for name, attribute in node.attributes.items() if not _graphs(attribute)}
    attributes = ", ".join(f"{name}={_attribute(attribute)}" for name, attribute in sorted(plain.items()))
    inputs = ", ".join(_name(value) for value in node.inputs)
    layers = f"  @ {', '.join(layers_of(node))}" if layers_of(node) else ""
    text = f"{operator}<{attributes}>" if attributes else operator
    yield f"{margin}{_values(node.outputs)} = {text}({inputs}){layers}"
    for name, attribute in sorted(node.attributes.items()):
        for graph in _graphs(attribute):
            yield f"{margin}  {name}:"
            yield from _graph_lines(graph, f"{margin}    ")


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type is ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type is ir.AttributeType.GRAPHS else []


def _attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type is ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{_dtype(tensor.dtype)}{_shape(tensor.shape)}"
    if attribute.type is ir.AttributeType.FLOAT:
        return f"{attribute.as_float():.6g}"
    return str(attribute.value).replace(" ", "").replace("(", "[").replace(",)", "]").replace(")", "]")


def _values(values: object) -> str:
    assert isinstance(values, tuple | list) or hasattr(values, "__iter__")
    return ", ".join(_typed(value) for value in values)


def _name(value: ir.Value | None) -> str:
    return "_" if value is None or not value.name else value.name


def _typed(value: ir.Value) -> str:
    if value.type is None or not value.name:
        return _name(value)
    if not isinstance(value.type, ir.TensorType):
        return f"{_name(value)}: {value.type}"
    shape = "[?]" if value.shape is None else _shape(value.shape)
    return f"{_name(value)}: {_dtype(value.type.dtype)}{shape}"


def _dtype(dtype: ir.DataType) -> str:
    return dtype.name.lower()


def _shape(shape: ir.ShapeProtocol) -> str:
    dims = [str(dim) if isinstance(dim, int) else str(dim.value or "?") for dim in shape]
    return f"[{','.join(dims)}]" if dims else ""


def _content(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is None or tensor.dtype not in _INTEGERS or tensor.size > _SHOWN:
        return ""
    return f" = {str(tensor.numpy().tolist()).replace(' ', '')}"

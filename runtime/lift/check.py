# SPDX-License-Identifier: Apache-2.0
"""What cannot be lifted is refused by name before anything is built."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.lift.constants import constant_of
from splitfold.runtime.lift.dtypes import STORED, TORCH, integer_range, is_carried
from splitfold.runtime.lift.row import Row
from splitfold.runtime.lift.table import NEWEST_OPSET, find_row, operator_name

__all__ = ["attributes_of", "check_liftable", "graphs_of", "refusals"]


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Return the attributes of a node as Python values: a tensor of one element is a pair of number and torch
    type, a graph is the graph itself.

    Raises:
        UnsupportedError: an attribute of another kind.
    """
    return {name: _python(attribute) for name, attribute in node.attributes.items()}


def _python(attribute: ir.Attr) -> Any:
    kind = ir.AttributeType
    if attribute.type is kind.STRING:
        return attribute.as_string()
    if attribute.type is kind.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.size != 1 or tensor.dtype not in TORCH:
            raise UnsupportedError(f"its attribute '{attribute.name}' is not one number")
        return tensor.numpy().reshape(-1).tolist()[0], TORCH[tensor.dtype]
    if attribute.type in (kind.INTS, kind.FLOATS, kind.STRINGS):
        return tuple(attribute.value)
    if attribute.type in (kind.INT, kind.FLOAT, kind.GRAPH):
        return attribute.value
    raise UnsupportedError(f"its attribute '{attribute.name}' is of kind {attribute.type.name}")


def graphs_of(graph: ir.Graph) -> Iterator[ir.Graph]:
    """Yield `graph` and all graphs inside of it."""
    yield graph
    yield from graph.subgraphs()


def refusals(model: ir.Model) -> dict[ir.Node, str]:
    """Return why nodes of `model`, also those of subgraphs, cannot be lifted: nodes with a reason."""
    found = {}
    for graph in graphs_of(model.graph):
        for node in graph:
            if problem := _problem(node, model.opset_imports):
                found[node] = problem
    return found


def _problem(node: ir.Node, opsets: Mapping[str, int]) -> str | None:
    try:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            tensor = constant_of(node.outputs[0])
            carried = tensor is not None and is_carried(tensor.dtype)
            return None if carried else "it holds no tensor of a type that torch has"
        row = find_row(node, opsets)
        if row is None:
            return "there is no row for it in the operator table"
        for position, value in enumerate(node.inputs):
            if value is not None and (reason := _unread(row, position, value)):
                return reason
        if row.gives_codes is not None and (kind := row.gives_codes(node)) is not ir.DataType.UNDEFINED:
            integer_range(kind)
        return row.problem(node, attributes_of(node))
    except UnsupportedError as error:
        return str(error)


def _unread(row: Row, position: int, value: ir.Value) -> str | None:
    """Return why an input cannot be read, or None."""
    tensor = constant_of(value)
    kind = value.dtype if tensor is None else tensor.dtype
    if tensor is not None and not is_carried(tensor.dtype):
        return f"its input '{value.name}' is {tensor.dtype.name}, which torch has not"
    converts = row.passes_codes or position in row.codes or position in row.fixed
    if kind in STORED and not converts:
        return f"its input '{value.name}' is {kind.name}, with which torch does not compute"
    return None


def check_liftable(model: ir.Model) -> None:
    """Raise if something of `model` cannot be lifted.

    Raises:
        UnsupportedError: which node (and layer), which operator, and why; further operators without a row.
    """
    version = model.opset_imports.get("", 0)
    if version > NEWEST_OPSET:
        raise UnsupportedError(
            f"the model is of opset {version}; lifting knows operators up to opset {NEWEST_OPSET}."
        )
    for value in model.graph.inputs:
        if not is_carried(value.dtype):
            kind = value.dtype.name if value.dtype is not None else "untyped"
            raise UnsupportedError(f"cannot lift the input '{value.name}': torch has no {kind} tensors.")
    found = refusals(model)
    if found:
        node, reason = next(iter(found.items()))
        others = sorted({operator_name(other) for other in found} - {operator_name(node)})
        more = f" Also refused: {', '.join(others)}." if others else ""
        raise UnsupportedError(f"cannot lift {_described(node)}: {reason}.{more}")


def _described(node: ir.Node) -> str:
    text = node.metadata_props.get("splitfold.layers")
    layers = "+".join(json.loads(text)) if text else ""
    title = f"node '{node.name or node.outputs[0].name}' ({operator_name(node)})"
    return f"{title} of layer '{layers}'" if layers and layers != node.name else title

# SPDX-License-Identifier: Apache-2.0
"""Fold nodes whose inputs are all constant, evaluated by the runtime itself, so that the values are those it
would compute."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import onnx_ir as ir

from splitfold.passes.base import Findings
from splitfold.passes.identity import display_layer
from splitfold.passes.values import constant
from splitfold.runtime.errors import SessionError
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["evaluate", "fold_constants", "replace_by_constants"]

logger = logging.getLogger(__name__)

_RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Dropout",
}
_QUANTIZED = {"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"}
_PATTERN = "constant folded"
_SMALL_BYTES = 64 * 1024
"""A folded result may be this large even where its inputs are smaller (ConstantOfShape, Expand, Range)."""


def fold_constants(model: ir.Model, findings: Findings | None = None) -> int:
    """Replace constant subexpressions of the main graph by initializers; return the number of nodes folded.

    Left alone: random operators, Q/DQ, operators with subgraphs, results that are graph outputs, results that
    would be larger than both their inputs and 64 KiB, and what the runtime cannot compute; these two are
    recorded in `findings`.
    """
    nodes = _foldable(model.graph)
    results = evaluate(model, nodes) if nodes else {}
    obstacles = {node: _obstacle(node, results) for node in nodes}
    accepted = {node for node, obstacle in obstacles.items() if obstacle is None}
    for node, obstacle in obstacles.items():
        if obstacle is not None and findings is not None:
            findings.miss(display_layer(node), _PATTERN, f"{node.op_type}: {obstacle}")
    replace_by_constants(model.graph, accepted, results)
    return len(accepted)


def _foldable(graph: ir.Graph) -> list[ir.Node]:
    known: set[ir.Value] = set()
    nodes = []
    for node in graph:
        if _may_fold(node) and all(v is None or v in known or constant(v) is not None for v in node.inputs):
            nodes.append(node)
            known.update(node.outputs)
    return nodes


def _may_fold(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in _RANDOM | _QUANTIZED:
        return False
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return False
    return not any(output.is_graph_output() for output in node.outputs) and bool(node.outputs)


def evaluate(model: ir.Model, nodes: list[ir.Node]) -> dict[str, np.ndarray]:
    """Return all outputs of `nodes`, of the main graph, by name, as the runtime computes them from constants
    and from each other; where they do not run together, of those that run alone."""
    try:
        return _run(model, nodes)
    except SessionError as error:
        logger.info("constants are folded one by one: %s", error)
    found: dict[str, np.ndarray] = {}
    for node in nodes:
        if all(value is None or constant(value) is not None for value in node.inputs):
            with contextlib.suppress(SessionError):
                found |= _run(model, [node])
    return found


def _run(model: ir.Model, nodes: list[ir.Node]) -> dict[str, np.ndarray]:
    part = ir.Model(_part(model.graph, nodes), ir_version=model.ir_version)
    return dict(Session(part, Target.cpu(), threads=1, optimization=Optimization.OFF).run({}))


def _part(graph: ir.Graph, nodes: list[ir.Node]) -> ir.Graph:
    """Return a copy of `nodes` as a graph of its own, all their outputs being its outputs."""
    chosen = set(nodes)
    values = {
        value: ir.Value(name=value.name, const_value=value.const_value, type=value.type, shape=value.shape)
        for node in nodes
        for value in node.inputs
        if value is not None and constant(value) is not None
    }
    copies = []
    for node in graph:
        if node in chosen:
            copy = ir.node(
                node.op_type,
                [None if v is None else values[v] for v in node.inputs],
                overload=node.overload,
                domain=node.domain,
                name=node.name,
                num_outputs=len(node.outputs),
            )
            copy.attributes.update(node.attributes)
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name = old.name
                values[old] = new
            copies.append(copy)
    outputs = [values[output] for node in nodes for output in node.outputs if output.name]
    initializers = [
        value for value in values.values() if value.const_value is not None and value.producer() is None
    ]
    return ir.Graph(
        [],
        outputs,
        nodes=copies,
        initializers=initializers,
        opset_imports=dict(graph.opset_imports),
        name="constants",
    )


def _obstacle(node: ir.Node, results: dict[str, np.ndarray]) -> str | None:
    """Return why a constant node stays, or None."""
    outputs = [results.get(output.name or "") for output in node.outputs if output.name]
    if any(array is None for array in outputs):
        return "the runtime cannot compute it by itself"
    if not all(isinstance(array, np.ndarray) and array.dtype.kind in "fiub" for array in outputs):
        return "its result is no tensor of numbers"
    made = sum(array.nbytes for array in outputs if array is not None)
    read = sum(tensor.nbytes for value in node.inputs if (tensor := constant(value)) is not None)
    if made <= max(read, _SMALL_BYTES):
        return None
    return f"its result has {made} bytes, more than what it is made from: the file would grow"


def replace_by_constants(graph: ir.Graph, accepted: set[ir.Node], results: dict[str, np.ndarray]) -> None:
    """Remove the nodes `accepted`, and let initializers hold what they computed, as `results` says by
    name."""
    for node in [node for node in graph if node in accepted]:
        for output in node.outputs:
            if output.uses():
                value = ir.Value(name=output.name, type=output.type, shape=output.shape)
                value.const_value = ir.tensor(
                    np.array(results[output.name or ""], order="C"), name=output.name
                )
                value.type, value.shape = (
                    ir.TensorType(value.const_value.dtype),
                    ir.Shape(value.const_value.shape.numpy()),
                )
                output.name = f"{output.name}_folded"
                output.replace_all_uses_with(value)
                graph.register_initializer(value)
    graph.remove([node for node in graph if node in accepted], safe=True)

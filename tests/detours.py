# SPDX-License-Identifier: Apache-2.0
"""Work around the arithmetic, as exporters leave it, put into any model: factors, turns, guards and computed
targets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Made", "Make", "constant_of", "detour", "node_of", "with_detours"]

_LOWEST = float(np.finfo(np.float32).min)


Made = tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]
"""Nodes and constants of a detour, and the name of its end."""
Make = Callable[[np.random.Generator, str, int], Made]
"""Makes the detour of a value of a name and rank."""


def with_detours(model: onnx.ModelProto, seed: int, make: Make) -> onnx.ModelProto:
    """Return a copy with two in three of its values going a detour before they are read. Shapes stay."""
    rng = np.random.default_rng(seed)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    ranks = _ranks(model)
    nodes: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        nodes.append(node)
        for value in node.output:
            if value in ranks and rng.random() < 0.67:
                made, constants, end = make(rng, value, ranks[value])
                nodes += made
                graph.initializer.extend(constants)
                renamed[value] = end
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(copy, full_check=True)
    return copy


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Return the ranks of floats that nodes of the main graph compute from layers and norms."""
    inferred = onnx.shape_inference.infer_shapes(model)
    known = {
        info.name: len(info.type.tensor_type.shape.dim)
        for info in (*inferred.graph.value_info, *inferred.graph.output)
        if info.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    wanted = ("MatMul", "Gemm", "Conv", "LayerNormalization", "Relu", "Add")
    made = [value for node in model.graph.node if node.op_type in wanted for value in node.output]
    return {value: known[value] for value in made if known.get(value, 0) > 1}


def detour(rng: np.random.Generator, value: str, rank: int) -> Made:
    """Return a multiplication by a number, Transposes that undo each other (one in two with axes joined), a
    Reshape to its own shape, or a masked softmax with a guard."""
    kind = int(rng.integers(4))
    if kind == 0:
        return _factor(rng, value)
    if kind == 1:
        return _turns(rng, value, rank)
    return _reshape(value) if kind == 2 else _guard(value)


def _node(op: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return node_of(op, inputs, [output], **attributes)


def node_of(op: str, inputs: list[str], outputs: list[str], **attributes: object) -> onnx.NodeProto:
    """Return a node, named after its first output."""
    return helper.make_node(op, inputs, outputs, name=f"{outputs[0]}_node", **attributes)


def constant_of(name: str, array: object, dtype: type = np.float32) -> onnx.TensorProto:
    """Return an initializer."""
    return numpy_helper.from_array(np.array(array, dtype), name)


def _factor(rng: np.random.Generator, value: str) -> Made:
    op = str(rng.choice(["Mul", "Div"]))
    number = constant_of(f"{value}_number", rng.uniform(0.3, 3))
    return [_node(op, [value, number.name], f"{value}_times")], [number], f"{value}_times"


def _turns(rng: np.random.Generator, value: str, rank: int) -> Made:
    perm = [0, *(1 + rng.permutation(rank - 1)).tolist()]
    back = np.argsort(perm).tolist()
    there = _node("Transpose", [value], f"{value}_there", perm=perm)
    return [there, _node("Transpose", [f"{value}_there"], f"{value}_back", perm=back)], [], f"{value}_back"


def _reshape(value: str) -> Made:
    shape = _node("Shape", [value], f"{value}_shape")
    return [shape, _node("Reshape", [value, f"{value}_shape"], f"{value}_same")], [], f"{value}_same"


def _guard(value: str) -> Made:
    """softmax(value + mask), where the mask hides nothing."""
    low, zero = constant_of(f"{value}_low", _LOWEST), constant_of(f"{value}_zero", 0)
    yes = constant_of(f"{value}_yes", True, np.bool_)
    nodes = [
        _node("Where", [yes.name, zero.name, low.name], f"{value}_mask"),
        _node("Add", [value, f"{value}_mask"], f"{value}_masked"),
        _node("Softmax", [f"{value}_masked"], f"{value}_p", axis=-1),
        _node("IsNaN", [f"{value}_p"], f"{value}_nan"),
        _node("Where", [f"{value}_nan", zero.name, f"{value}_p"], f"{value}_guarded"),
    ]
    return nodes, [low, zero, yes], f"{value}_guarded"

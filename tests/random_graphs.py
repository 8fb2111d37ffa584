# SPDX-License-Identifier: Apache-2.0
"""Seeded random models of what passes rewrite, with shared weights, dynamic batch and subgraphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from splitfold.runtime.feeds import Array

__all__ = ["random_model"]

_OPSET = 20


def random_model(seed: int, *, steps: int = 10) -> ir.Model:
    """Return a valid model of about `steps` operators, the same for the same seed; node names are unique."""
    graph = _Graph(np.random.default_rng(seed))
    for _ in range(steps):
        graph.grow()
    return ir.from_proto(graph.model(f"random_{seed}"))


class _Graph:
    """A model under construction: values by name with their shapes, the batch (first) axis left out."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        features, channels, size = int(rng.choice([16, 32, 7])), self._size(), int(rng.integers(5, 9))
        starts = [(features,), (int(rng.integers(2, 6)), features), (channels, size, size)]
        chosen = rng.permutation(3)[: int(rng.integers(1, 4))]
        self.inputs = {f"x{index}": starts[index] for index in sorted(chosen)}
        self.shapes.update(self.inputs)
        self.ids = int(rng.integers(2, 6)) if rng.random() < 0.4 else 0
        for _ in range(int(rng.integers(1, 3)) if self.ids else 0):
            rows = int(rng.integers(10, 40))
            self.add("Gather", [self.weight((rows, features)), "ids"], (self.ids, features))

    def _size(self) -> int:
        return int(self.rng.integers(2, 20))

    def weight(self, shape: tuple[int, ...], *, positive: bool = False) -> str:
        """Return an initializer; one in three times one of this shape that is there already: it is shared."""
        same = [
            name
            for name, array in self.weights.items()
            if array.shape == shape and name.startswith("v") == positive and array.dtype == np.float32
        ]
        if same and self.rng.random() < 0.33:
            return str(self.rng.choice(same))
        array = self.rng.standard_normal(shape) / math.sqrt(max(1, shape[0]))
        values = np.abs(array) + 0.5 if positive else array
        return self.constant(values.astype(np.float32), "v" if positive else "w")

    def constant(self, array: Array, prefix: str = "c") -> str:
        name = f"{prefix}{len(self.weights)}"
        self.weights[name] = array
        return name

    def add(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [f"t{len(self.nodes)}"], name=name, **attributes))
        result = f"t{len(self.nodes) - 1}"
        self.shapes[result] = shape
        return result

    def grow(self) -> None:
        recent = list(self.shapes)[-4:]
        value = str(self.rng.choice(recent))
        shape = self.shapes[value]
        choices: list[Callable[[_Graph, str, tuple[int, ...]], object]] = [*_ANY, *_BY_RANK[len(shape)]]
        choices[int(self.rng.integers(len(choices)))](self, value, shape)

    def model(self, name: str) -> onnx.ModelProto:
        read = {name for node in self.nodes for name in node.input}
        outputs = [value for value in self.shapes if value not in read and value not in self.inputs] or [
            list(self.shapes)[-1]
        ]
        if outputs[-1] in self.inputs:
            outputs = [self.add("Relu", [outputs[-1]], self.shapes[outputs[-1]])]
        graph = helper.make_graph(
            self.nodes,
            name,
            [*map(self._info, self.inputs), *self._ids()],
            [self._info(value) for value in outputs],
            [numpy_helper.from_array(array, key) for key, array in self.weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model

    def _ids(self) -> list[onnx.ValueInfoProto]:
        """Return the input that embeddings are indexed with, if there are any."""
        return (
            [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", self.ids])] if self.ids else []
        )

    def _info(self, value: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", *self.shapes[value]])


def _unary(graph: _Graph, value: str, shape: tuple[int, ...]) -> None:
    graph.add(
        str(graph.rng.choice(["Relu", "Tanh", "Identity", "Identity", "Dropout", "Sigmoid"])), [value], shape
    )


def _add(graph: _Graph, value: str, shape: tuple[int, ...]) -> None:
    others = [name for name, other in graph.shapes.items() if other == shape]
    other = str(graph.rng.choice(others)) if graph.rng.random() < 0.7 else graph.weight(shape[-1:])
    graph.add("Add", [value, other], shape)


def _concat(graph: _Graph, value: str, shape: tuple[int, ...]) -> None:
    others = [name for name, other in graph.shapes.items() if other[1:] == shape[1:]]
    other = str(graph.rng.choice(others))
    joined = (shape[0] + graph.shapes[other][0], *shape[1:])
    graph.add("Concat", [value, other], joined, axis=1)


def _reshape(graph: _Graph, value: str, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    to = (size,) if len(shape) > 1 else next(((size // d, d) for d in (2, 3, 5) if size % d == 0), (1, size))
    if graph.rng.random() < 0.5:
        target = graph.constant(np.array([0, *to], np.int64))
    else:
        target = f"s{len(graph.nodes)}"
        graph.nodes.append(
            helper.make_node("Constant", [], [target], name=f"shape_{len(graph.nodes)}", value_ints=[0, *to])
        )
    graph.add("Reshape", [value, target], to)


def _matmul(graph: _Graph, value: str, shape: tuple[int, ...]) -> None:
    columns = graph._size() if graph.rng.random() < 0.6 else shape[-1]
    graph.add("MatMul", [value, graph.weight((shape[-1], columns))], (*shape[:-1], columns))


def _gemm(graph: _Graph, value: str, shape: tuple[int, ...]) -> None:
    columns, turned = graph._size(), bool(graph.rng.integers(2))
    weight = graph.weight((columns, shape[0]) if turned else (shape[0], columns))
    bias = [graph.weight((columns,))] if graph.rng.random() < 0.7 else []
    scales = {"alpha": 0.5, "beta": 2.0} if graph.rng.random() < 0.3 else {}
    graph.add("Gemm", [value, weight, *bias], (columns,), transB=int(turned), **scales)


def _norm(graph: _Graph, value: str, shape: tuple[int, ...]) -> None:
    parameters = [graph.weight(shape[:1]), graph.weight(shape[:1]), graph.weight(shape[:1])]
    graph.add("BatchNormalization", [value, *parameters, graph.weight(shape[:1], positive=True)], shape)


def _layer_norm(graph: _Graph, value: str, shape: tuple[int, ...]) -> None:
    graph.add("LayerNormalization", [value, graph.weight(shape[-1:]), graph.weight(shape[-1:])], shape)


def _conv(graph: _Graph, value: str, shape: tuple[int, ...]) -> None:
    channels, side = graph._size(), int(graph.rng.choice([1, 3]))
    groups = shape[0] if graph.rng.random() < 0.25 else 1
    channels = shape[0] if groups > 1 else channels
    inputs = [value, graph.weight((channels, shape[0] // groups, side, side))]
    inputs += [graph.weight((channels,))] if graph.rng.random() < 0.5 else []
    result = graph.add("Conv", inputs, (channels, *shape[1:]), group=groups, pads=[side // 2] * 4)
    if graph.rng.random() < 0.6:
        _norm(graph, result, graph.shapes[result])


def _pool(graph: _Graph, value: str, shape: tuple[int, ...]) -> None:
    if min(shape[1:]) < 4:
        graph.add("GlobalAveragePool", [value], (shape[0], 1, 1))
    else:
        kind = str(graph.rng.choice(["MaxPool", "AveragePool"]))
        graph.add(
            kind, [value], (shape[0], *(size // 2 for size in shape[1:])), kernel_shape=[2, 2], strides=[2, 2]
        )


def _if(graph: _Graph, value: str, shape: tuple[int, ...]) -> None:
    at = len(graph.nodes)
    total = graph.add("ReduceSum", [next(iter(graph.inputs))], (), keepdims=0)  # no rounding may flip it
    flag = graph.add("Less", [total, graph.constant(np.array(0, np.float32))], ())
    del graph.shapes[total], graph.shapes[flag]
    weight = graph.weight((shape[-1], shape[-1]))
    shared = helper.make_node("MatMul", [value, weight], [f"then_{at}_a"], name=f"inner_{at}")
    then = [shared, helper.make_node("Identity", [f"then_{at}_a"], [f"then_{at}"], name=f"copy_{at}")]
    other = [helper.make_node("Tanh", [value], [f"else_{at}"], name=f"other_{at}")]
    outputs = [
        [helper.make_tensor_value_info(f"{side}_{at}", TensorProto.FLOAT, ["batch", *shape])]
        for side in ("then", "else")
    ]
    graph.add(
        "If",
        [flag],
        shape,
        then_branch=helper.make_graph(then, f"then_{at}", [], outputs[0]),
        else_branch=helper.make_graph(other, f"else_{at}", [], outputs[1]),
    )


_ANY = [_unary, _add, _concat, _reshape, _if]
_BY_RANK = {
    1: [_matmul, _matmul, _gemm, _gemm, _norm, _layer_norm],
    2: [_matmul, _matmul, _matmul, _norm, _layer_norm],
    3: [_conv, _conv, _conv, _pool, _norm, _layer_norm],
}

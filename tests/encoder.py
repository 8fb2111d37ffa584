# SPDX-License-Identifier: Apache-2.0
"""A seeded transformer encoder of a few layers, made with onnx helpers: its layers are named as torch names
them (``encoder.layer.1.output.dense``)."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from splitfold.runtime.feeds import Array, Feeds

__all__ = ["WIDTH", "encoder", "token_batches"]

WIDTH = 16
_HEADS = 2
_INNER = 32
_VOCABULARY = 50


class _Graph:
    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def weight(self, name: str, *shape: int, scale: float | None = None, offset: float = 0.0) -> str:
        size = scale if scale is not None else 1 / np.sqrt(shape[0])
        values = offset + size * self._random.standard_normal(shape)
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def constant(self, name: str, values: Array) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def node(
        self, operator: str, inputs: list[str], path: str, output: str = "", **attributes: object
    ) -> str:
        made = output or f"{path.replace('/', '.')}.{operator}"
        self.nodes.append(
            helper.make_node(operator, inputs, [made], name=f"/{path}/{operator}", **attributes)
        )
        return made

    def dense(self, value: str, path: str, rows: int, columns: int) -> str:
        name = path.replace("/", ".")
        product = self.node("MatMul", [value, self.weight(f"{name}.weight", rows, columns)], path)
        return self.node("Add", [product, self.weight(f"{name}.bias", columns, scale=0.3)], path)

    def norm(self, value: str, path: str, output: str = "") -> str:
        name = path.replace("/", ".")
        gamma = self.weight(f"{name}.weight", WIDTH, scale=0.1, offset=1.0)
        beta = self.weight(f"{name}.bias", WIDTH, scale=0.1)
        return self.node("LayerNormalization", [value, gamma, beta], path, output, axis=-1, epsilon=1e-5)


def encoder(*, seed: int = 0, layers: int = 3) -> onnx.ModelProto:
    """Return a post-norm encoder from ids [batch, time] to y [batch, time, 16]."""
    graph = _Graph(seed)
    table = graph.weight("embeddings.weight", _VOCABULARY, WIDTH, scale=1.0)
    graph.constant("heads", np.array([0, 0, _HEADS, WIDTH // _HEADS], np.int64))
    graph.constant("joined", np.array([0, 0, WIDTH], np.int64))
    graph.constant("scale", np.float32(np.sqrt(WIDTH / _HEADS)).reshape(()))
    graph.constant("leak", np.float32(0.1).reshape(()))
    words = graph.node("Gather", [table, "ids"], "embeddings/word_embeddings", axis=0)
    state = graph.norm(words, "embeddings/LayerNorm")
    for index in range(layers):
        state = _layer(graph, state, f"encoder/layer.{index}", "y" if index == layers - 1 else "")
    made = helper.make_graph(
        graph.nodes,
        "encoder",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "time"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "time", WIDTH])],
        graph.weights,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _layer(graph: _Graph, state: str, path: str, output: str) -> str:
    mixed = _attention(graph, state, f"{path}/attention/self")
    projected = graph.dense(mixed, f"{path}/attention/output/dense", WIDTH, WIDTH)
    added = graph.node("Add", [projected, state], f"{path}/attention/output")
    first = graph.norm(added, f"{path}/attention/output/LayerNorm")
    inner = graph.dense(first, f"{path}/intermediate/dense", WIDTH, _INNER)
    active = graph.node("Gelu", [inner], f"{path}/intermediate/intermediate_act_fn")
    leak = graph.node("Mul", [inner, "leak"], f"{path}/intermediate/gate")
    gated = graph.node("Sub", [active, leak], f"{path}/intermediate/gate")
    narrow = graph.dense(gated, f"{path}/output/dense", _INNER, WIDTH)
    again = graph.node("Add", [narrow, first], f"{path}/output")
    return graph.norm(again, f"{path}/output/LayerNorm", output)


def _attention(graph: _Graph, state: str, path: str) -> str:
    query, key, value = (
        graph.node(
            "Transpose",
            [
                graph.node(
                    "Reshape", [graph.dense(state, f"{path}/{part}", WIDTH, WIDTH), "heads"], f"{path}/{part}"
                )
            ],
            f"{path}/{part}",
            perm=perm,
        )
        for part, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
    )
    scores = graph.node(
        "Div", [graph.node("MatMul", [query, key], f"{path}/scores"), "scale"], f"{path}/scale"
    )
    mixed = graph.node(
        "MatMul", [graph.node("Softmax", [scores], f"{path}/softmax", axis=-1), value], f"{path}/mix"
    )
    turned = graph.node("Transpose", [mixed], f"{path}/join", perm=[0, 2, 1, 3])
    return graph.node("Reshape", [turned, "joined"], f"{path}/join")


def token_batches(count: int = 2, *, seed: int = 1) -> list[Feeds]:
    """Return batches of 4 rows of 6 tokens."""
    random = np.random.default_rng(seed)
    return [{"ids": random.integers(0, _VOCABULARY, (4, 6))} for _ in range(count)]

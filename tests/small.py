# SPDX-License-Identifier: Apache-2.0
"""Tiny models for tests of the compiler and the command line, made without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 32


def initializer(name: str, *shape: int, seed: int = 0, scale: float = 1.0) -> TensorProto:
    values = np.random.default_rng(seed).standard_normal(shape) * scale / np.sqrt(shape[0])
    return numpy_helper.from_array(values.astype(np.float32), name)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[TensorProto],
    *,
    batch: str | int = "batch",
    opset: int = 20,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """Return a model from x [batch, 32] to y [batch, 8]."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 8])],
        weights,
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def mlp(*, batch: str | int = "batch", seed: int = 0) -> onnx.ModelProto:
    """Return y = relu(x W1 + b1) W2, whose layers are named ``encoder.up`` and ``encoder.down``."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="/encoder/up/MatMul"),
        helper.make_node("Add", ["h", "b1"], ["hb"], name="/encoder/up/Add"),
        helper.make_node("Relu", ["hb"], ["r"], name="/encoder/act/Relu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="/encoder/down/MatMul"),
    ]
    weights = [
        initializer("w1", WIDTH, 64, seed=seed),
        initializer("b1", 64, seed=seed + 1),
        initializer("w2", 64, 8, seed=seed + 2),
    ]
    return model_of(nodes, weights, batch=batch)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def samples(count: int = 24, *, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path

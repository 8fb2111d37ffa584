# SPDX-License-Identifier: Apache-2.0
"""Models for the tests of drift: each with a copy that is wrong in a known place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from small import initializer

from splitfold.passes.provenance import VALUES_KEY

Feeds = dict[str, np.ndarray]
WIDTH, HIDDEN, LOWEST = 32, 64, float(np.finfo(np.float32).min)


def model(
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[TensorProto],
    inputs: dict[str, tuple[int, list[str | int]]],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "drifting",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def tower(layers: int = 3, width: int = WIDTH, outputs: Sequence[str] = ()) -> onnx.ModelProto:
    """Return x -> (MatMul, Add, Relu) a layer, named ``block.0`` and so on; values are m0, a0, r0, m1, ..."""
    nodes, weights, data = [], [], "x"
    for index in range(layers):
        name = f"/block.{index}"
        nodes += [
            helper.make_node("MatMul", [data, f"w{index}"], [f"m{index}"], name=f"{name}/MatMul"),
            helper.make_node("Add", [f"m{index}", f"b{index}"], [f"a{index}"], name=f"{name}/Add"),
            helper.make_node("Relu", [f"a{index}"], [f"r{index}"], name=f"{name}/Relu"),
        ]
        weights += [
            initializer(f"w{index}", width, width, seed=index, scale=1.4),
            initializer(f"b{index}", width, seed=100 + index),
        ]
        data = f"r{index}"
    return model(nodes, weights, {"x": (TensorProto.FLOAT, ["n", width])}, outputs or [data])


def rows(count: int = 16, width: int = WIDTH, seed: int = 0) -> Feeds:
    return {"x": np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)}


def node(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(item for item in proto.graph.node if item.name == name)


def changed(proto: onnx.ModelProto, name: str, factor: float) -> onnx.ModelProto:
    """Return a copy in which the initializer `name` is `factor` times what it was."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for tensor in made.graph.initializer:
        if tensor.name == name:
            array = (numpy_helper.to_array(tensor) * factor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, name))
    return made


def copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    return made


def attention(layers: int = 3) -> onnx.ModelProto:
    """Return a masked attention stack: ``x`` [batch, tokens, 32], ``attention_mask`` [batch, tokens]."""
    scalars = {"zero": 0.0, "lowest": LOWEST, "scale": WIDTH**-0.5}
    weights = [numpy_helper.from_array(np.array(v, np.float32), name) for name, v in scalars.items()]
    weights.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.BOOL, name="/mask/Cast"),
        helper.make_node("Where", ["kept", "zero", "lowest"], ["bias_row"], name="/mask/Where"),
        helper.make_node("Unsqueeze", ["bias_row", "axis"], ["mask"], name="/mask/Unsqueeze"),
    ]
    data = "x"
    for index in range(layers):
        made, data = _attention_layer(index, data)
        nodes += made
        weights += [
            initializer(f"{which}w{index}", WIDTH, WIDTH, seed=10 * index + ord(which), scale=2.0)
            for which in "qkvo"
        ]
    inputs = {
        "x": (TensorProto.FLOAT, ["batch", "tokens", WIDTH]),
        "attention_mask": (TensorProto.INT64, ["batch", "tokens"]),
    }
    return model(nodes, weights, inputs, [data])


def _attention_layer(index: int, data: str) -> tuple[list[onnx.NodeProto], str]:
    i, name = index, f"/layer.{index}"
    nodes = [
        helper.make_node("MatMul", [data, f"{w}w{i}"], [f"{w}{i}"], name=f"{name}/{w}/MatMul") for w in "qkv"
    ]
    nodes += [
        helper.make_node("Transpose", [f"k{i}"], [f"kt{i}"], perm=[0, 2, 1], name=f"{name}/Transpose"),
        helper.make_node("MatMul", [f"q{i}", f"kt{i}"], [f"raw{i}"], name=f"{name}/scores/MatMul"),
        helper.make_node("Mul", [f"raw{i}", "scale"], [f"scores{i}"], name=f"{name}/scores/Mul"),
        helper.make_node("Add", [f"scores{i}", "mask"], [f"masked{i}"], name=f"{name}/scores/Add"),
        helper.make_node("Softmax", [f"masked{i}"], [f"p{i}"], name=f"{name}/softmax/Softmax"),
        helper.make_node("MatMul", [f"p{i}", f"v{i}"], [f"c{i}"], name=f"{name}/context/MatMul"),
        helper.make_node("MatMul", [f"c{i}", f"ow{i}"], [f"o{i}"], name=f"{name}/output/MatMul"),
        helper.make_node("Add", [f"o{i}", data], [f"y{i}"], name=f"{name}/residual/Add"),
    ]
    return nodes, f"y{i}"


def tokens(seed: int = 0, batch: int = 4, length: int = 8) -> Feeds:
    """Return feeds of `attention`; the second half of every other row is padding."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int64)
    mask[::2, length // 2 :] = 0
    return {
        "x": rng.standard_normal((batch, length, WIDTH)).astype(np.float32),
        "attention_mask": mask,
    }


def quantized_by_onnxruntime(source: Path, result: Path, batches: Sequence[Feeds]) -> Path:
    """Write what `onnxruntime.quantization.quantize_static` makes of a model with its defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> Feeds | None:
            return next(self._left, None)

    quantize_static(str(source), str(result), Reader())
    return result


def round_trip() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return a model, and one whose value ``h`` goes through a grid: read before it, after it, and after
    another DequantizeLinear of the same codes that does not say what it stands for."""
    weights = [initializer("w", WIDTH, WIDTH, seed=1)]
    inputs = {"x": (TensorProto.FLOAT, ["n", WIDTH])}
    reads = (("Sigmoid", "h", "before"), ("Relu", "h", "after"), ("Neg", "h", "beside"))
    tail = [helper.make_node(op, [data], [made], name=f"/{made}/{op}") for op, data, made in reads]
    outputs = [made for _, _, made in reads]
    reference = model(
        [helper.make_node("MatMul", ["x", "w"], ["h"], name="/dense/MatMul"), *tail], weights, inputs, outputs
    )
    actual = changed(reference, "w", 1.01)
    del actual.graph.node[1:]
    stands = helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["grid"], name="/dense/DQ")
    stands.metadata_props.add(key=VALUES_KEY, value=json.dumps(["h"]))
    actual.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", ["h", "step", "zero"], ["codes"], name="/dense/Q"),
            stands,
            helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["other"], name="/dense/DQ2"),
        ]
    )
    for (op, _, made), data in zip(reads, ("h", "grid", "other"), strict=True):
        actual.graph.node.append(helper.make_node(op, [data], [made], name=f"/{made}/{op}"))
    actual.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(0.05, np.float32), "step"),
            numpy_helper.from_array(np.array(0, np.int8), "zero"),
        ]
    )
    return reference, actual

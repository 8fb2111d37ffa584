# SPDX-License-Identifier: Apache-2.0
"""What passes record of patterns that nearly fitted: the place, and the reason that is true there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from encoder import encoder, token_batches
from onnx import TensorProto, helper, numpy_helper
from small import WIDTH, initializer, model_of, samples

from splitfold.passes.base import Context
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.calibration import Calibration

Missed = list[tuple[str, str, str]]


def _missed(model: onnx.ModelProto, pipeline: str, calibration: object = None) -> Missed:
    context = Context(calibration=None if calibration is None else Calibration.of(calibration))
    made = ir.from_proto(model)
    return [item for record in Pipeline.parse(pipeline).run(made, context) for item in record.missed]


def _vectors(size: int, *names: str) -> list[onnx.TensorProto]:
    rng = np.random.default_rng(0)
    return [numpy_helper.from_array(rng.uniform(0.5, 1.5, size).astype(np.float32), name) for name in names]


_BN = ("gamma", "beta", "mean", "var")


def _batch_norm(before: Sequence[onnx.NodeProto], **attributes: object) -> onnx.ModelProto:
    norm = helper.make_node(
        "BatchNormalization", ["h", *_BN], ["n"], name="/bn/BatchNormalization", **attributes
    )
    nodes = [*before, norm]
    return model_of(nodes, [initializer("w", WIDTH, 8), *_vectors(8, *_BN)])


def _fc(output: str = "h") -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", "w"], [output], name="/fc/MatMul")


def test_a_batch_norm_behind_a_shared_output_stays() -> None:
    model = _batch_norm([_fc()])
    model.graph.node.append(helper.make_node("Add", ["h", "n"], ["y"], name="/sum/Add"))
    (found,) = _missed(model, "canonicalize")
    assert found[0] == "bn"
    assert found[1] == "BatchNormalization folded into the layer before it"
    assert found[2] == "the output of the MatMul has other readers too, which want it without the norm"


def test_a_batch_norm_behind_something_else_stays() -> None:
    relu = helper.make_node("Relu", ["p"], ["h"], name="/act/Relu")
    model = _batch_norm([_fc("p"), relu])
    model.graph.node.append(helper.make_node("Tanh", ["n"], ["y"], name="/out/Tanh"))
    (found,) = _missed(model, "canonicalize")
    assert found[2] == "what it reads is made by a Relu, not by a Conv, Gemm or MatMul"


def test_a_folded_batch_norm_is_no_miss() -> None:
    model = _batch_norm([_fc()])
    model.graph.node.append(helper.make_node("Tanh", ["n"], ["y"], name="/out/Tanh"))
    assert _missed(model, "canonicalize") == []


def test_a_gemm_that_cannot_be_turned_says_why() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], name="/turn/Transpose", perm=[1, 0]),
        helper.make_node("Gemm", ["t", "w"], ["y"], name="/fc/Gemm", transA=1),
    ]
    found = _missed(model_of(nodes, [initializer("w", WIDTH, 8)]), "canonicalize")
    assert (
        "fc",
        "Gemm turned to [K, N]",
        "its input is transposed (transA), which no constant can take up",
    ) in (found)


def test_a_large_constant_is_not_folded() -> None:
    shape = numpy_helper.from_array(np.array([WIDTH, 5000]), "shape")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["big"], name="/big/ConstantOfShape"),
        helper.make_node("MatMul", ["x", "big"], ["wide"], name="/wide/MatMul"),
        helper.make_node("ReduceMax", ["wide", "axis"], ["m"], name="/max/ReduceMax"),
        _fc(),
        helper.make_node("Add", ["h", "m"], ["y"], name="/sum/Add"),
    ]
    axis = numpy_helper.from_array(np.array([-1]), "axis")
    found = _missed(model_of(nodes, [shape, axis, initializer("w", WIDTH, 8)]), "canonicalize")
    reason = (
        "ConstantOfShape: its result has 640000 bytes, more than what it is made from: the file would grow"
    )
    assert ("big", "constant folded", reason) in found


_INTEGER = "canonicalize,quantize-activations{form=integer}"


def test_a_bias_that_is_no_vector_is_not_taken_along() -> None:
    bias = initializer("b", 1, 8)
    nodes = [_fc(), helper.make_node("Add", ["h", "b"], ["y"], name="/fc/Add")]
    found = _missed(model_of(nodes, [initializer("w", WIDTH, 8), bias]), _INTEGER, [{"x": samples()}])
    pattern = "bias taken along by the integer kernel"
    assert found == [("fc", pattern, "what is added is FLOAT [1, 8], not FLOAT [8]")]


def test_a_bias_is_not_taken_from_a_shared_output() -> None:
    nodes = [
        _fc(),
        helper.make_node("Add", ["h", "b"], ["hb"], name="/fc/Add"),
        helper.make_node("Mul", ["h", "hb"], ["y"], name="/gate/Mul"),
    ]
    model = model_of(nodes, [initializer("w", WIDTH, 8), initializer("b", 8)])
    (found,) = _missed(model, _INTEGER, [{"x": samples()}])
    assert found[2] == "its output has other readers too, which want it without the bias"


def test_a_bias_that_is_taken_along_is_no_miss() -> None:
    nodes = [_fc(), helper.make_node("Add", ["h", "b"], ["y"], name="/fc/Add")]
    model = model_of(nodes, [initializer("w", WIDTH, 8), initializer("b", 8)])
    assert _missed(model, _INTEGER, [{"x": samples()}]) == []


def _convolutions(nodes: list[onnx.NodeProto], extra: Sequence[onnx.TensorProto] = ()) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        [*(initializer(f"k{at}", 4, 4, 1, 1, seed=at) for at in range(2)), *extra],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _conv(at: int, source: str, target: str) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, f"k{at}"], [target], name=f"/c{at}/Conv", kernel_shape=[1, 1])


_IMAGE = [{"x": np.random.default_rng(3).standard_normal((1, 4, 6, 6)).astype(np.float32)}]
_QDQ = "canonicalize,quantize-activations"


def test_an_add_with_a_float_operand_stays_out_of_the_region() -> None:
    nodes = [
        _conv(0, "x", "a"),
        helper.make_node("Sigmoid", ["x"], ["s"], name="/gate/Sigmoid"),
        helper.make_node("Add", ["a", "s"], ["b"], name="/sum/Add"),
        _conv(1, "b", "y"),
    ]
    (found,) = _missed(_convolutions(nodes), _QDQ, _IMAGE)
    assert found == ("sum", "integer region", "its operand 's' is not quantized")


def test_a_result_that_nobody_needs_in_integers_stays_float() -> None:
    nodes = [
        _conv(0, "x", "a"),
        _conv(1, "x", "b"),
        helper.make_node("Add", ["a", "b"], ["s"], name="/sum/Add"),
        helper.make_node("Sigmoid", ["s"], ["y"], name="/gate/Sigmoid"),
    ]
    (found,) = _missed(_convolutions(nodes), _QDQ, _IMAGE)
    assert found[2] == "no integer layer reads its result: it would be rounded for nothing"


@pytest.mark.parametrize(
    ("low", "reason"),
    [(0.0, None), (-1.0, "its lower bound is not zero, so that the grid does not imply it")],
)
def test_an_activation_that_a_grid_does_not_imply_is_told(low: float, reason: str | None) -> None:
    bounds = [numpy_helper.from_array(np.float32(value), name) for name, value in (("lo", low), ("hi", 6.0))]
    nodes = [
        _conv(0, "x", "a"),
        helper.make_node("Clip", ["a", "lo", "hi"], ["b"], name="/act/Clip"),
        _conv(1, "b", "y"),
    ]
    found = _missed(_convolutions(nodes, bounds), _QDQ, _IMAGE)
    assert found == ([] if reason is None else [("act", "integer region", reason)])


def test_scales_that_nothing_absorbs_say_which_operator_is_in_the_way() -> None:
    found = _missed(encoder(layers=1), "canonicalize,fold-scales{min-gain=-100}", token_batches(3))
    group = "+".join(f"encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value"))
    pattern = "scales folded into what makes its input"
    reasons = {layer: reason for layer, name, reason in found if name == pattern}
    assert reasons[group] == (
        "LayerNormalization does not pass a scale on (at 'encoder.layer.0.attention.output.LayerNorm', "
        "LayerNormalization)"
    )
    assert reasons["encoder.layer.0.output.dense"].startswith("Gelu does not pass a scale on")


def test_a_matrix_that_is_nearly_a_transpose_is_told() -> None:
    table = np.random.default_rng(0).standard_normal((512, WIDTH)).astype(np.float32)
    turned = np.ascontiguousarray(table.T)
    turned[3, 7] += 1
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="/embed/Gather"),
        helper.make_node("MatMul", ["e", "turned"], ["scores"], name="/head/MatMul"),
        helper.make_node("ReduceMax", ["scores", "axis"], ["m"], name="/max/ReduceMax"),
        _fc(),
        helper.make_node("Add", ["h", "m"], ["y"], name="/sum/Add"),
    ]
    held = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(turned, "turned")]
    held += [numpy_helper.from_array(np.array([-1]), "axis"), initializer("w", WIDTH, 8)]
    model = model_of(nodes, held)
    model.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"]))
    (found,) = _missed(model, "canonicalize,legalize")
    assert found[:2] == ("head", "weight stored once with its transpose")
    assert "differs from it further on" in found[2]

# SPDX-License-Identifier: Apache-2.0
"""Activations cut into chunks: exact, each chunk on its own grid, and what mixes channels left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from seeded import feeds_for, parse_graph
from small import mlp, samples

from splitfold.compiler import compile
from splitfold.compiler.debug.drift.measurement import drift
from splitfold.compiler.tolerance import Tolerance
from splitfold.passes.base import Context
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.chunks import even_sizes
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Session

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
LOUD = "net (float[32,24] x) => (float[32,8] y) <float[24,8] W = seeded> { y = MatMul(x, W) }"
GRAPHS = {
    "matmul": LOUD,
    "gemm": (
        "net (float[b,7] x) => (float[b,4] y) <float[7,4] W = seeded, float[4] c = seeded> "
        "{ y = Gemm(x, W, c) }"
    ),
    "conv": (
        "net (float[2,5,7,7] x) => (float[2,6,5,5] y) <float[6,5,3,3] W = seeded, float[6] c = seeded> "
        "{ y = Conv(x, W, c) }"
    ),
    "grouped": (
        "net (float[2,8,7,7] x) => (float[2,12,5,5] y) <float[12,2,3,3] W = seeded, float[12] c = seeded> "
        "{ y = Conv<group = 4>(x, W, c) }"
    ),
    "depthwise": (
        "net (float[2,5,9] x) => (float[2,5,7] y) <float[5,1,3] W = seeded> { y = Conv<group = 5>(x, W) }"
    ),
    "concatenated": (
        "net (float[2,3,6,6] x, float[2,4,6,6] u) => (float[2,6,4,4] y) <float[6,7,3,3] W = seeded> "
        "{ j = Concat<axis = 1>(x, u) y = Conv(j, W) }"
    ),
}


def graph(text: str) -> ir.Model:
    model = ir.from_proto(parse_graph(HEAD + text))
    CanonicalizePass()(model)
    return model


def cut(model: ir.Model, options: str = "") -> PassRecord:
    return Pipeline.parse(f"split-activations{{{options}}}" if options else "split-activations").run(model)[0]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("options", ["parts=2", "parts=3", "parts=16", "parts=3,at=outputs"])
@pytest.mark.parametrize("kind", GRAPHS)
def test_chunks_compute_the_same(kind: str, options: str) -> None:
    model = graph(GRAPHS[kind])
    feeds = feeds_for(model)
    before = Session(model).run(feeds)["y"]
    record = cut(model, options)
    assert record.modified == (kind not in ("matmul", "gemm") or "outputs" not in options)
    after = Session(model).run(feeds)["y"]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    assert not cut(model, options).modified


@pytest.mark.parametrize(
    ("channels", "parts", "sizes"), [(7, 3, [3, 2, 2]), (6, 3, [2, 2, 2]), (2, 3, [1, 1])]
)
def test_chunks_are_as_equal_as_can_be(channels: int, parts: int, sizes: list[int]) -> None:
    assert even_sizes(channels, parts) == sizes


def test_the_operands_of_a_concat_are_the_chunks() -> None:
    model = graph(GRAPHS["concatenated"])
    cut(model)
    assert operators(model) == ["Conv", "Conv", "Add"]


def test_the_multiply_adds_stay() -> None:
    model = graph(LOUD)
    before = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value)
    cut(model)
    weights = [value for name, value in model.graph.initializers.items() if name.startswith("W")]
    assert sum(value.const_value.size for value in weights if value.const_value) == before


def loud(seed: int) -> Array:
    """Return activations whose last third is a hundred times louder."""
    x = np.random.default_rng(seed).standard_normal((32, 24)).astype(np.float32)
    x[:, 16:] *= 100
    return x


def test_each_chunk_has_the_grid_of_its_own_range() -> None:
    model = graph(LOUD)
    cut(model)
    x = loud(0)
    Pipeline.parse("quantize-activations").run(model, Context(calibration=Calibration.of([{"x": x}])))
    for number, columns in enumerate((x[:, :8], x[:, 8:16], x[:, 16:]), start=1):
        held = model.graph.initializers[f"x_chunk{number}_scale"].const_value
        assert held is not None
        low, high = min(columns.min(), 0), max(columns.max(), 0)
        assert float(held.numpy()) == pytest.approx((high - low) / 255, rel=1e-6)


@pytest.mark.parametrize(
    "step", ["quantize-activations", "quantize-activations{form=integer}", "quantize-dynamic"]
)
def test_loud_channels_cost_their_own_chunk_only(step: str) -> None:
    source = parse_graph(HEAD + LOUD)
    weight = graph(LOUD).graph.initializers["W"].const_value
    assert weight is not None
    quiet = weight.numpy().copy()
    quiet[16:] /= 100  # all channels matter alike
    noise = []
    for steps in (step, f"split-activations,{step}"):
        model = ir.from_proto(source)
        model.graph.initializers["W"].const_value = ir.tensor(quiet)
        artifact = compile(
            model, pipeline=steps, calibration=[{"x": loud(0)}], tolerance=Tolerance(cosine=0.1)
        )
        assert not artifact.manifest["put_back"]
        y = artifact.session().run({"x": loud(1)})["y"]
        noise.append(float(np.square(y - loud(1) @ quiet).sum()))
    assert noise[1] < noise[0] / 2


# Activation functions


def test_functions_outputs_and_layers_meet() -> None:
    model = graph(
        "net (float[2,3,8,8] x) => (float[2,4,4,4] y) <float[6,3,3,3] A = seeded, float[6] a = seeded, "
        "float[4,6,3,3] B = seeded> { [first] h = Conv(x, A, a) [act] r = Relu(h) [second] y = Conv(r, B) }"
    )
    feeds = feeds_for(model)
    before = Session(model).run(feeds)["y"]
    for options in ("at=outputs,only=[first]", "at=functions", "only=[second]"):
        assert cut(model, options).modified
    assert operators(model) == ["Conv"] * 3 + ["Relu"] * 3 + ["Conv"] * 3 + ["Add"] * 2
    np.testing.assert_allclose(Session(model).run(feeds)["y"], before, rtol=1e-4, atol=1e-4)
    feeds = feeds_for(model)
    Pipeline.parse("quantize-activations").run(model, Context(calibration=Calibration.of([feeds])))
    scales = [
        name for name in model.graph.initializers if name.startswith("r_chunk") and name.endswith("_scale")
    ]
    assert len(scales) == 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("h = MatMul(x, W) y = Softmax<axis = -1>(h)", "Softmax mixes the channel axis"),
        ("h = MatMul(x, W) y = Softmax(h)", "Softmax mixes the channel axis"),
        ("h = MatMul(x, W) y = LpNormalization<axis = -1, p = 2>(h)", "LpNormalization mixes channels"),
    ],
)
def test_what_mixes_the_channels_is_refused(body: str, reason: str) -> None:
    model = graph(f"net (float[2,5,6] x) => (float[2,5,4] y) <float[6,4] W = seeded> {{ {body} }}")
    record = cut(model, "at=functions")
    assert not record.modified
    assert record.skipped[0][1].startswith(reason)


def test_a_softmax_over_the_pixels_of_a_convolution_may_be_cut() -> None:
    model = graph(
        "net (float[2,3,6,6] x) => (float[2,4,4,4] y) <float[4,3,3,3] W = seeded> "
        "{ h = Conv(x, W) y = Softmax<axis = 3>(h) }"
    )
    feeds = feeds_for(model)
    before = Session(model).run(feeds)["y"]
    assert cut(model, "at=functions").modified
    np.testing.assert_allclose(Session(model).run(feeds)["y"], before, rtol=1e-5)


def test_the_channel_axis_is_that_of_the_layer_beside_it() -> None:
    """Axis 1 of [batch, tokens, channels] is not that of the channels."""
    model = graph(
        "net (float[2,5,6] x) => (float[2,5,8] y) <float[6,8] W = seeded> { h = MatMul(x, W) y = Tanh(h) }"
    )
    cut(model, "at=functions")
    (made,) = [node for node in model.graph if node.op_type == "Split"]
    assert made.attributes["axis"].as_int() == -1


@pytest.mark.parametrize("body", ["y = Relu(x)", "h = Abs(x) y = Relu(h)"])
def test_a_function_without_a_layer_beside_it_is_left_alone(body: str) -> None:
    record = cut(graph(f"net (float[2,5,6] x) => (float[2,5,6] y) {{ {body} }}"), "at=functions")
    assert record.skipped[0][1].startswith("no convolution or linear layer next to it")


# Left alone, and told of


def test_an_old_opset_is_left_alone() -> None:
    text = GRAPHS["matmul"]
    model = ir.from_proto(parse_graph('<ir_version: 7, opset_import: ["" : 12]>\n' + text))
    record = cut(model)
    assert record.skipped[0][1].startswith("opset 12 has no Split by sizes")


def test_drift_names_the_layer() -> None:
    made = compile(mlp(), pipeline="split-activations,quantize-activations", calibration=[{"x": samples()}])
    points = drift(mlp(), made, [{"x": samples()}]).by_layer()
    assert {"encoder.up", "encoder.down"} <= set(points)

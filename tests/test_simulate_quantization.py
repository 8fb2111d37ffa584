# SPDX-License-Identifier: Apache-2.0
"""Simulated bit widths: bit for bit the grids they stand for, on the runtime as deployed, and said to be no
more than that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph

from splitfold.compiler import Tolerance, compile
from splitfold.compiler.debug.explain.explanation import explain
from splitfold.passes.base import Context, Findings
from splitfold.passes.canonicalize import name_all
from splitfold.passes.errors import SpecError
from splitfold.passes.fake_bits import FakeInputs, LayerBits, SeenGrids, fake_weight, simulate_layer
from splitfold.passes.gptq import Ranges
from splitfold.passes.layers import Layer, find_layers
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.ranges import ActivationStats, Calibrator, activation_range
from splitfold.passes.shapes import infer_shapes
from splitfold.passes.values import forget_names
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import CalibrationError
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Optimization, Session, optimized_graph
from splitfold.runtime.target import Target

RNG = np.random.default_rng(5)

DENSE = """net (float[batch,16] x) => (float[batch,8] y)
    <float[16,8] W = seeded>
    { [dense] y = MatMul(x, W) }"""
PERCEPTRON = """net (float[batch,16] x) => (float[batch,8] y)
    <float[16,16] W1 = seeded, float[16] b1 = seeded, float[16,8] W2 = seeded, float[8] b2 = seeded>
    { [first] h = Gemm(x, W1, b1)
      [second] g = Gemm(h, W2, b2)
      [act] y = Relu(g) }"""
CONVOLUTIONS = """net (float[1,4,9,9] x) => (float[1,4,9,9] y)
    <float[4,4,3,3] W1 = seeded, float[4] b1 = seeded, float[4,2,3,3] W2 = seeded, float[4,4,1,1] W3 = seeded>
    { [first] a = Conv<pads=[1,1,1,1]>(x, W1, b1)
      [act] r = Relu(a)
      [second] b = Conv<pads=[1,1,1,1], group=2>(r, W2)
      [third] y = Conv(b, W3) }"""
ATTENTION = """net (float[batch,5,8] x) => (float[batch,5,8] y)
    <float[8,8] Wq = seeded, float[8,8] Wk = seeded>
    { [query] q = MatMul(x, Wq)
      [key] k = MatMul(x, Wk)
      [turn] t = Transpose<perm=[0,2,1]>(k)
      [scores] s = MatMul(q, t)
      [softmax] p = Softmax(s)
      [mix] y = MatMul(p, x) }"""


def model_of(text: str, opset: int = 20) -> ir.Model:
    model = ir.from_proto(parse_graph(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}'))
    name_all(model, Findings())
    infer_shapes(model)
    return model


def feeds_of(model: ir.Model, rows: int = 64) -> dict[str, Array]:
    shape = [size if isinstance(size, int) else rows for size in model.graph.inputs[0].shape or ()]
    return {"x": (3 * RNG.standard_normal(shape)).astype(np.float32)}


def simulated(model: ir.Model, options: str, feeds: dict[str, Array]) -> PassRecord:
    context = Context(calibration=Calibration.of([feeds]))
    return Pipeline.parse(f"simulate-quantization{{{options}}}").run(model, context)[0]


def round_trip(x: Array, low: float, high: float, bits: int) -> Array:
    """The grid from its definition, in float64 but for the scale."""
    low, high, top = min(low, 0.0), max(high, 0.0), 2**bits - 1
    scale = np.float32((high - low) / top)
    zero = np.rint(-low / ((high - low) / top))
    codes = np.clip(np.rint((x.astype(np.float32) / scale).astype(np.float64)) + zero, 0, top)
    return ((codes - zero).astype(np.float32) * scale).astype(np.float32)


# Arithmetic


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("optimization", list(Optimization))
def test_the_input_is_on_its_grid_bit_for_bit(bits: int, optimization: Optimization) -> None:
    """Calibrated on less than it meets, so that the ends clip, with ties among the values."""
    model = model_of(DENSE)
    seen = feeds_of(model)
    simulated(model, f"weights=none,activations={bits}", seen)
    low, high = float(seen["x"].min()), float(seen["x"].max())
    step = np.float32((high - min(low, 0)) / (2**bits - 1))
    met = (2.5 * RNG.standard_normal((4000, 16)) * max(-low, high) / 3).astype(np.float32)
    met[:2000] = np.rint(met[:2000] / step * 2).astype(np.float32) * (step / 2)
    name = model.graph[-1].inputs[0]
    assert name is not None
    found = Session(model, optimization=optimization, taps=[name.name or ""]).run(
        {"x": met}, [name.name or ""]
    )
    expected = round_trip(met, low, high, bits)
    np.testing.assert_array_equal(found[name.name or ""], expected)
    assert len(np.unique(expected)) == 2**bits


def test_a_weight_by_hand() -> None:
    """Columns [-1, 0.4, 2] (step 1, zero point 1) and [0, 1.6, 3] (step 1, zero point 0) at 2 bits."""
    model = model_of(
        "net (float[1,3] x) => (float[1,2] y) <float[3,2] W = seeded> { [dense] y = MatMul(x, W) }"
    )
    model.graph.initializers["W"].const_value = ir.tensor(
        np.array([[-1, 0], [0.4, 1.6], [2, 3]], np.float32), name="W"
    )
    np.testing.assert_array_equal(fake_weight(layers_of(model)["dense"], 2), [[-1, 0], [0, 2], [2, 3]])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("text", [DENSE, CONVOLUTIONS])
def test_weights_come_back_from_a_grid_for_each_output_channel(bits: int, text: str) -> None:
    for layer in layers_of(model_of(text)).values():
        weight = np.moveaxis(layer.weight_array(), layer.channel_axis, 0)
        found = np.moveaxis(fake_weight(layer, bits), layer.channel_axis, 0)
        for row, back in zip(weight, found, strict=True):
            np.testing.assert_allclose(
                back, round_trip(row, row.min(), row.max(), bits), rtol=1e-6, atol=1e-7
            )
        searched = np.moveaxis(fake_weight(layer, bits, Ranges.SEARCHED), layer.channel_axis, 0)
        axes = tuple(range(1, weight.ndim))
        assert (np.square(searched - weight).sum(axes) <= np.square(found - weight).sum(axes)).all()


def layers_of(model: ir.Model) -> dict[str, Layer]:
    return {layer.name: layer for layer in find_layers(model)[0]}


# On the runtime as deployed


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("text", [PERCEPTRON, CONVOLUTIONS, ATTENTION])
def test_the_runtime_computes_what_was_written(text: str, bits: int) -> None:
    """With the codes clipped between the two operators it makes int8 layers of float weights."""
    model = model_of(text)
    feeds = feeds_of(model)
    simulated(model, f"weights={bits},activations={bits},products=true", feeds)
    plain = Session(model, optimization=Optimization.OFF).run(feeds)["y"]
    deployed = Session(model, optimization=Optimization.ALL).run(feeds)["y"]
    scale = np.abs(plain).max()
    assert np.quantile(np.abs(deployed - plain), 0.95) < 1e-5 * scale  # a tie may fall to either side
    operators = {node.op_type for node in optimized_graph(model, Target.cpu()).graph}
    assert not operators & Target.cpu().low_bit_kernels


def test_two_layers_by_numpy() -> None:
    model = model_of(PERCEPTRON)
    feeds = feeds_of(model)
    weights = {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value
    }
    h = Session(model).run(feeds, ["h"])["h"]
    simulated(model, "weights=4,activations=5", feeds)

    def columns(w: Array) -> Array:
        return np.stack([round_trip(c, c.min(), c.max(), 4) for c in w.T], 1)

    x = feeds["x"]
    first = round_trip(x, x.min(), x.max(), 5) @ columns(weights["W1"]) + weights["b1"]
    second = round_trip(first, h.min(), h.max(), 5) @ columns(weights["W2"]) + weights["b2"]
    found = Session(model).run(feeds)["y"]
    assert np.quantile(np.abs(found - np.maximum(second, 0)), 0.95) < 1e-4


def test_compile_leaves_a_simulation_as_it_is_and_claims_no_kernel() -> None:
    model = model_of(PERCEPTRON)
    feeds = feeds_of(model)
    artifact = compile(
        model,
        calibration=[feeds],
        pipeline="simulate-quantization{weights=4,activations=4}",
        tolerance=Tolerance(cosine=None),
        reproducers=None,
    )
    assert artifact.manifest["realised"] == {}
    assert not artifact.manifest["put_back"]
    (explained,) = explain(artifact).find("first")
    assert explained.reason == "simulate-quantization: Gemm simulated as W4A4"
    names = [value.name or "" for value in artifact.model.graph.initializers.values()]
    assert {"W1_4bit", "W2_4bit"} <= set(names)
    assert all(
        artifact.model.graph.initializers[name].dtype is ir.DataType.FLOAT for name in ("W1_4bit", "W2_4bit")
    )


# Layers


def test_each_layer_may_have_bits_of_its_own(tmp_path: Path) -> None:
    """What an allocation of bits emits: readers of one value share a round trip where their bits agree."""
    model = model_of(ATTENTION)
    forget_names(model)
    stats = {"x": ActivationStats(-4.0, 4.0, -4.0, 4.0, 1.0, True, 10)}
    inputs = FakeInputs(SeenGrids(stats))
    plan = {"query": LayerBits(3, 5), "key": LayerBits(None, 5)}
    for name, bits in plan.items():
        simulate_layer(layers_of(model)[name], bits, inputs)
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 1
    assert sorted(model.graph.initializers)[:2] == ["Wk", "Wq_3bit"]
    simulate_layer(layers_of(model)["key"], LayerBits(6, None), inputs)
    assert "Wk_6bit" in model.graph.initializers
    Session(model).run(feeds_of(model))


def test_layers_that_share_a_weight_still_share_it() -> None:
    model = model_of(
        "net (float[batch,8] x) => (float[batch,8] y) <float[8,8] W = seeded>"
        " { [first] h = MatMul(x, W) [second] y = MatMul(h, W) }"
    )
    record = simulated(model, "weights=4,activations=none", feeds_of(model))
    assert list(model.graph.initializers) == ["W_4bit"]
    assert any("1 weights are still stored in float32 (256 bytes)" in note for note in record.notes)
    assert any(f"{(64 * 4 + 8 * 36) / 64:.2f} bits a weight" in note for note in record.notes)


def test_a_layer_is_simulated_once_also_after_it_was_saved(tmp_path: Path) -> None:
    model = model_of(PERCEPTRON)
    feeds = feeds_of(model)
    simulated(model, "weights=4,activations=6", feeds)
    ir.save(model, tmp_path / "model.onnx")
    again = simulated(ir.load(tmp_path / "model.onnx"), "weights=3", feeds)
    assert not again.modified
    assert dict(again.skipped) == dict.fromkeys(
        ("first", "second"), "already simulated, as W4A6: left as it is"
    )


def test_products_are_named_and_can_be_excluded() -> None:
    model = model_of(ATTENTION)
    record = simulated(model, "weights=none,products=true,only=[scores,mix],exclude=[mix]", feeds_of(model))
    assert [layer for layer, _ in record.applied] == ["scores"]
    assert dict(record.skipped)["mix"] == "excluded by option"
    with pytest.raises(SpecError, match="no layer matches 'scores'"):
        simulated(model_of(ATTENTION), "only=[scores]", feeds_of(model))


RESIDUAL = """
net (float[2,16] x, float[2,16] mask) => (float[2,16] y)
<float[16,16] W = seeded, float[16] scale = seeded, float[16] bias = seeded>
{
  [layer] h = MatMul(x, W)
  [residual] r = Add(h, x)
  [norm] n = LayerNormalization(r, scale, bias)
  [shift] moved = Add(n, bias)
  [masked] scores = Add(moved, mask)
  [softmax] y = Softmax(scores)
}
"""


def test_the_residual_stream_passes_grids_and_a_mask_does_not() -> None:
    model = model_of(RESIDUAL)
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((2, 16)).astype(np.float32) for name in ("x", "mask")}
    params = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
    seen = Session(model).run(feeds, ["h", "r"])
    record = simulated(model, "weights=none,activations=4,residuals=true", feeds)
    assert [layer for layer, _ in record.applied] == ["layer", "residual", "norm"]

    def ends(values: Array, like: Array) -> Array:
        return round_trip(values, like.min(), like.max(), 4)

    x = ends(feeds["x"], feeds["x"])
    r = ends(ends(x @ params["W"], seen["h"]) + x, seen["r"])
    normed = (r - r.mean(-1, keepdims=True)) / np.sqrt(r.var(-1, keepdims=True) + 1e-5)
    scores = normed * params["scale"] + 2 * params["bias"] + feeds["mask"]
    wanted = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(Session(model).run(feeds)["y"], wanted, atol=1e-5)


def test_layers_quantized_for_real_are_left_alone() -> None:
    model = model_of(PERCEPTRON)
    feeds = feeds_of(model)
    context = Context(calibration=Calibration.of([feeds]))
    Pipeline.parse("quantize-activations{exclude=[second]}").run(model, context)
    record = simulated(model, "weights=4", feeds)
    assert [layer for layer, _ in record.applied] == ["second"]
    assert dict(record.skipped)["first"] == "already quantized: left as it is"


# Options and bad input


def test_widths_in_text() -> None:
    step = Pipeline.parse("simulate-quantization{weights=none,activations=3}").steps[0]
    assert str(step) == "simulate-quantization{weights=none,activations=3}"
    for options, words in (
        ("weights=9", "weights is 9; it may be 2 to 8, or none"),
        ("activations=1", "activations is 1; it may be 2 to 8, or none"),
        ("weights=none,activations=none", "nothing would be simulated"),
        ("activations=none,products=true", "products=true needs a width"),
        ("activations=none,residuals=true", "residuals=true needs a width"),
        ("weights=four", "weights=four is not"),
    ):
        with pytest.raises(SpecError, match=words):
            Pipeline.parse(f"simulate-quantization{{{options}}}")


def test_data_are_needed_for_activations_alone() -> None:
    with pytest.raises(CalibrationError, match="simulate-quantization needs calibration data"):
        Pipeline.parse("simulate-quantization").run(model_of(DENSE))
    (record,) = Pipeline.parse("simulate-quantization{activations=none}").run(model_of(DENSE))
    assert [layer for layer, _ in record.applied] == ["dense"]


def test_an_old_opset_is_refused_with_the_reason() -> None:
    model = model_of(DENSE, opset=10)
    record = simulated(model, "weights=4", feeds_of(model))
    assert dict(record.skipped)["dense"] == "opset 10 has no Clip with ends as inputs (11 has)"


# Ranges for few bits


def stats_of(values: Array) -> ActivationStats:
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, bins=2048, range=(low, high))
    return ActivationStats(low, high, low, high, 1.0, True, values.size, counts)


def test_percentile_search_takes_the_best_of_three_pairs() -> None:
    """RepQ-ViT's rule on the values themselves, to a bin of the histogram."""
    chosen = set()
    for tail in (4.0, 12.0, 40.0):
        values = np.concatenate([RNG.standard_normal(200_000), RNG.uniform(-tail, tail, 300)])
        for bits in (3, 4, 6, 8):
            pairs = [np.quantile(values, (1 - p, p)) for p in (0.999, 0.9999, 0.99999)]
            errors = [np.square(round_trip(values, *pair, bits) - values).sum() for pair in pairs]
            low, high = activation_range(stats_of(values), Calibrator.PERCENTILE_SEARCH, bits=bits)
            least = int(np.argmin(errors))
            chosen.add(least)
            bin_width = np.ptp(values) / 2048
            np.testing.assert_allclose((low, high), pairs[least], atol=2.5 * bin_width)
    assert chosen == {0, 1, 2}


def test_fewer_bits_want_a_smaller_range() -> None:
    stats = stats_of(RNG.standard_normal(200_000))
    widths = [np.diff(activation_range(stats, Calibrator.MSE, bits=bits))[0] for bits in (2, 4, 8)]
    assert widths[0] < widths[1] < widths[2]
    entropy = [np.diff(activation_range(stats, Calibrator.ENTROPY, bits=bits))[0] for bits in (4, 8)]
    assert entropy[0] < entropy[1]

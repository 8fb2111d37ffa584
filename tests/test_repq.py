# SPDX-License-Identifier: Apache-2.0
"""RepQ's reparameterisation: the identities of its paper, and codes before equal codes after."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph

from splitfold.passes.base import Context, Findings
from splitfold.passes.canonicalize import name_all
from splitfold.passes.channel_clip import ChannelClip, clipped_ends
from splitfold.passes.errors import SpecError
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.repq import folded_range, reparameterise
from splitfold.passes.shapes import infer_shapes
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.session import Optimization, Session

RNG = np.random.default_rng(11)

TAILS = {
    "gemm": "y = Gemm (n, W, c)",
    "bias behind": "h = MatMul (n, W)\n y = Add (h, c)",
    "no bias": "h = MatMul (n, W)\n a = Mul (h, h)\n y = Add (a, c)",
    "an output": "y = MatMul (n, W)",
    "two readers": "a = MatMul (n, W)\n b = MatMul (n, V)\n d = Add (b, c)\n y = Mul (a, d)",
}


def model_of(tail: str, beta: str = ", beta") -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, 16] x) => (float[batch, 6] y)
    <float[16] gamma = seeded(0.1, 9), float[16] beta = seeded, float[16,6] W = seeded,
     float[16,6] V = seeded, float[6] c = seeded>
    {{ n = LayerNormalization (x, gamma{beta})
      {tail} }}"""
    model = ir.from_proto(parse_graph(text))
    name_all(model, Findings())
    infer_shapes(model)
    return model


def test_the_identity_by_hand() -> None:
    """Channels in [0, 15] and [-2, 1] at 4 bits: s = (1, 0.2), z = (0, 10); s~ = 0.6, z~ = 5."""
    found = reparameterise(np.array([0.0, -2.0]), np.array([15.0, 1.0]), 4)
    assert found.scale == pytest.approx(0.6)
    assert found.zero_point == 5
    np.testing.assert_allclose(found.ratio, [1 / 0.6, 0.2 / 0.6], rtol=1e-6)
    np.testing.assert_allclose(found.shift, [0.6 * 5, 0.6 * (5 - 10)], rtol=1e-6)


def test_every_code_is_the_code_of_its_own_channel() -> None:
    x = RNG.standard_normal((2000, 24)) * RNG.uniform(0.01, 30, 24) + RNG.uniform(-5, 5, 24)
    low, high = np.minimum(x.min(0), 0), np.maximum(x.max(0), 0)
    for bits in (4, 6, 8):
        top = 2**bits - 1
        scales = (high - low) / top
        own = np.clip(np.rint(x / scales - low / scales), 0, top)
        found = reparameterise(low, high, bits)
        moved = x / found.ratio.astype(np.float64) - found.shift
        codes = np.clip(np.rint(moved / found.scale + found.zero_point), 0, top)
        assert (own == codes).mean() > 0.9995  # float32 ratios move a few ties


def test_a_constant_channel_keeps_the_ratio_positive() -> None:
    found = reparameterise(np.array([0.0, -1.0]), np.array([0.0, 1.0]), 8)
    assert (found.ratio > 0).all()
    assert np.isfinite(found.shift).all()


@pytest.mark.parametrize("tail", TAILS)
def test_folding_is_exact(tail: str) -> None:
    model = model_of(TAILS[tail])
    feeds = {"x": RNG.standard_normal((64, 16)).astype(np.float32)}
    before = Session(model, optimization=Optimization.OFF).run(feeds)
    record = Pipeline.parse("fold-scales{method=repq}").run(
        model, Context(calibration=Calibration.of([feeds]))
    )[0]
    assert record.applied
    after = Session(model, optimization=Optimization.OFF).run(feeds)
    assert list(after) == list(before)
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-4, atol=2e-4)


def test_one_grid_gives_the_codes_of_the_channel_grids() -> None:
    """Codes before, with a grid for each channel, equal codes after, with the tensor's own min-max grid."""
    model = model_of(TAILS["gemm"])
    feeds = {"x": RNG.standard_normal((500, 16)).astype(np.float32)}
    n = Session(model, optimization=Optimization.OFF).run(feeds, ["n"])["n"].astype(np.float64)
    low, high = np.minimum(n.min(0), 0), np.maximum(n.max(0), 0)
    scales = (high - low) / 15
    own = np.clip(np.rint(n / scales - low / scales), 0, 15)
    Pipeline.parse("fold-scales{method=repq,bits=4}").run(model, Context(calibration=Calibration.of([feeds])))
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    name = norm.outputs[0].name or ""
    moved = Session(model, optimization=Optimization.OFF).run(feeds, [name])[name].astype(np.float64)
    found = reparameterise(low, high, 4)
    codes = np.clip(np.rint(moved / found.scale) + found.zero_point, 0, 15)
    assert (own == codes).mean() > 0.999


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_the_simulation_afterwards_takes_the_tensor_grid_of_the_fold(bits: int) -> None:
    """Min-max calibration finds s~ and z~, and the codes are those of the channels' own grids."""
    model = model_of(TAILS["gemm"])
    feeds = {"x": RNG.standard_normal((500, 16)).astype(np.float32)}
    n = Session(model, optimization=Optimization.OFF).run(feeds, ["n"])["n"].astype(np.float64)
    found = reparameterise(n.min(0), n.max(0), bits)
    own = np.rint((n - np.minimum(n.min(0), 0)) * (2**bits - 1) / np.ptp(np.r_[n, np.zeros((1, 16))], axis=0))
    Pipeline.parse(
        f"fold-scales{{method=repq,bits={bits}}},simulate-quantization{{weights=none,activations={bits}}}"
    ).run(model, Context(calibration=Calibration.of([feeds])))
    codes = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    scale, zero = (value.const_value.numpy() for value in codes.inputs[1:] if value and value.const_value)
    assert float(scale) == pytest.approx(found.scale, rel=1e-5)
    assert int(zero) == found.zero_point
    name = codes.outputs[0].name or ""
    seen = Session(model, optimization=Optimization.OFF).run(feeds, [name])[name]
    assert (own == seen).mean() > 0.999  # float32 moves a few ties


def test_static_int8_afterwards_takes_the_tensor_grid_of_the_fold() -> None:
    model = model_of(TAILS["gemm"])
    feeds = {"x": RNG.standard_normal((500, 16)).astype(np.float32)}
    n = Session(model, optimization=Optimization.OFF).run(feeds, ["n"])["n"]
    found = reparameterise(n.min(0), n.max(0), 8)
    Pipeline.parse("fold-scales{method=repq},quantize-activations").run(
        model, Context(calibration=Calibration.of([feeds]))
    )
    codes = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    scale, zero = (value.const_value.numpy() for value in codes.inputs[1:] if value and value.const_value)
    assert float(scale) == pytest.approx(found.scale, rel=1e-5)
    assert int(zero) == found.zero_point


@pytest.mark.parametrize(
    ("tail", "beta", "reason"),
    [
        (TAILS["gemm"], "", "no beta"),
        ("r = Relu (n)\n y = MatMul (r, W)", ", beta", "stands between"),
        ("h = MatMul (n, W)\n s = Softmax (n)\n g = MatMul (s, V)\n y = Add (h, g)", ", beta", "Softmax"),
    ],
)
def test_what_cannot_hold_a_shift_is_skipped_with_the_reason(tail: str, beta: str, reason: str) -> None:
    model = model_of(tail, beta)
    feeds = {"x": RNG.standard_normal((64, 16)).astype(np.float32)}
    record = Pipeline.parse("fold-scales{method=repq}").run(
        model, Context(calibration=Calibration.of([feeds]))
    )[0]
    assert not record.modified
    assert any(reason in text for _, text in record.skipped)


# Clipped channels


def outlying(count: int = 2000) -> dict[str, np.ndarray]:
    """Inputs whose norm has rare outliers in every channel."""
    x = RNG.standard_normal((count, 16)).astype(np.float32)
    x[::40, RNG.integers(0, 16, -(-count // 40))] *= 8
    return {"x": x}


def test_percentiles_by_hand() -> None:
    rows = np.stack([np.arange(2001) - 500.0, np.linspace(1, 2, 2001)], axis=1).astype(np.float32)
    low, high = clipped_ends(rows, (rows.min(0), rows.max(0)), [], 4, ChannelClip.PERCENTILE)
    np.testing.assert_allclose(low, [-499.0, 0.0])  # of 2001 elements the 2nd lowest; zero is held
    np.testing.assert_allclose(high, [1499.0, 1.9995], rtol=1e-6)


def test_search_takes_the_ends_of_least_output_error() -> None:
    rows = outlying()["x"]
    weights = [
        RNG.standard_normal((16, 6)).astype(np.float32),
        RNG.standard_normal((16, 3)).astype(np.float32),
    ]
    ends = rows.min(0), rows.max(0)
    found = clipped_ends(rows, ends, weights, 4, ChannelClip.SEARCH)

    def error(low: np.ndarray, high: np.ndarray) -> float:
        scale = (high - low) / 15
        held = np.clip(np.rint((rows - low) / scale), 0, 15) * scale + low
        return sum(float(np.square((held - rows) @ weight).sum()) for weight in weights)

    mean, deviation = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
    tried = [
        error(np.maximum(mean - k * deviation, ends[0]), np.minimum(mean + k * deviation, ends[1]))
        for k in (2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.5, 5, 6)
    ]
    assert error(*found) == pytest.approx(min([*tried, error(*ends)]), rel=1e-6)
    assert error(*found) < 0.8 * error(*ends)


def test_search_does_not_clip_where_it_would_cost() -> None:
    rows = RNG.choice([-1.0, 1.0], (500, 8)).astype(np.float32)
    rows[::100] *= 3.45  # of 1.05 deviations: between 3 and 3.5 of them
    wide = rows.min(0), rows.max(0)
    found = clipped_ends(rows, wide, [1e3 * np.eye(8, dtype=np.float32)], 8, ChannelClip.SEARCH)
    np.testing.assert_array_equal(found, np.array(wide, np.float64))


@pytest.mark.parametrize("clip", ["percentile", "search"])
@pytest.mark.parametrize("tail", TAILS)
def test_folding_clipped_channels_is_exact(tail: str, clip: str) -> None:
    model, feeds = model_of(TAILS[tail]), outlying()
    before = Session(model, optimization=Optimization.OFF).run(feeds)
    record = Pipeline.parse(f"fold-scales{{method=repq,bits=4,clip={clip}}}").run(
        model, Context(calibration=Calibration.of([feeds]))
    )[0]
    assert "clipped to" in record.applied[0][1]
    after = Session(model, optimization=Optimization.OFF).run(feeds)
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-4, atol=4e-4)


@pytest.mark.parametrize("clip", [ChannelClip.PERCENTILE, ChannelClip.SEARCH])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_afterwards_are_those_of_the_clipped_channels(bits: int, clip: ChannelClip) -> None:
    model, feeds = model_of(TAILS["gemm"]), outlying()
    n = Session(model, optimization=Optimization.OFF).run(feeds, ["n"])["n"]
    weight = model.graph.initializers["W"].const_value
    assert weight is not None
    low, high = clipped_ends(n[::4], (n.min(0), n.max(0)), [weight.numpy()], bits, clip)
    assert (high < n.max(0)).any() or bits == 8
    top = 2**bits - 1
    own = np.clip(np.rint((n.astype(np.float64) - low) / ((high - low) / top)), 0, top)
    Pipeline.parse(
        f"fold-scales{{method=repq,bits={bits},clip={clip.value}}},"
        f"simulate-quantization{{weights=none,activations={bits},calibrator=mse}}"
    ).run(model, Context(calibration=Calibration.of([feeds])))
    node = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    found = reparameterise(low, high, bits)
    scale, zero = (value.const_value.numpy() for value in node.inputs[1:] if value and value.const_value)
    assert float(scale) == pytest.approx(found.scale, rel=1e-6)
    assert int(zero) == found.zero_point
    name = node.outputs[0].name or ""
    seen = Session(model, optimization=Optimization.OFF).run(feeds, [name])[name]
    assert (own == np.clip(seen, 0, top)).mean() > 0.999  # float32 moves a few ties


def test_static_int8_takes_the_clipped_grid() -> None:
    model, feeds = model_of(TAILS["gemm"]), outlying()
    n = Session(model, optimization=Optimization.OFF).run(feeds, ["n"])["n"]
    found = reparameterise(*clipped_ends(n[::4], (n.min(0), n.max(0)), [], 8, ChannelClip.PERCENTILE), 8)
    Pipeline.parse("fold-scales{method=repq,clip=percentile},quantize-activations").run(
        model, Context(calibration=Calibration.of([feeds]))
    )
    node = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    scale, zero = (value.const_value.numpy() for value in node.inputs[1:] if value and value.const_value)
    assert float(scale) == pytest.approx(found.scale, rel=1e-6)
    assert int(zero) == found.zero_point


def test_scaling_once_more_forgets_the_grid() -> None:
    model, feeds = model_of(TAILS["gemm"]), outlying()
    context = Context(calibration=Calibration.of([feeds]))
    Pipeline.parse("fold-scales{method=repq,bits=4,clip=percentile}").run(model, context)
    layer = next(node for node in model.graph if node.op_type == "Gemm")
    assert folded_range(layer) is not None
    Pipeline.parse("fold-scales{min-gain=-100}").run(model, context)
    assert folded_range(layer) is None


def test_clip_is_an_option_of_repq_alone() -> None:
    with pytest.raises(SpecError, match="clip is no option of method=dgq"):
        Pipeline.parse("fold-scales{method=dgq,clip=search}")

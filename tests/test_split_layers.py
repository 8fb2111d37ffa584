# SPDX-License-Identifier: Apache-2.0
"""Layers written as parts: exact, each weight in one part, and every tool tells of them as the layer."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from seeded import feeds_for, parse_graph
from small import mlp, samples

from splitfold.compiler import compile
from splitfold.compiler.tolerance import Tolerance
from splitfold.passes.affine import dequantize_blocks, quantize_blocks
from splitfold.passes.base import Context
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import SpecError
from splitfold.passes.layers import find_layers
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.split_weight import Partition, SplitBy, SplitScope, split_parts
from splitfold.passes.summed_weights import summed_layers
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import CalibrationError
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Session

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
LAYERS = {
    "matmul": "net (float[b,12] x) => (float[b,7] y) <float[12,7] W = seeded> { y = MatMul(x, W) }",
    "gemm": (
        "net (float[b,12] x) => (float[b,2] y) <float[12,2] W = seeded, float[2] c = seeded> "
        "{ y = Gemm(x, W, c) }"
    ),
    "conv": (
        "net (float[1,4,7,7] x) => (float[1,6,5,5] y) <float[6,2,3,3] W = seeded, float[6] c = seeded> "
        "{ y = Conv<group = 2>(x, W, c) }"
    ),
    "depthwise": (
        "net (float[1,4,7,7] x) => (float[1,4,5,5] y) <float[4,1,3,3] W = seeded> "
        "{ y = Conv<group = 4>(x, W) }"
    ),
    "signal": "net (float[1,4,9] x) => (float[1,5,7] y) <float[5,4,3] W = seeded> { y = Conv(x, W) }",
    "table": "net (int64[b,3] x) => (float[b,3,5] y) <float[11,5] W = seeded> { y = Gather(W, x) }",
}
WAYS = [
    *((parts, by, scope) for parts, by in ((2, "quantile"), (3, "kmeans"), (5, "kmeans"), (3, "magnitude"))
      for scope in ("tensor", "channel")),
    (3, "channel", "tensor"),
]  # fmt: skip
SHARED = Path(os.environ.get("SPLITFOLD_SHARED", Path(__file__).parents[2] / "shared"))


def graph(text: str) -> ir.Model:
    model = ir.from_proto(parse_graph(HEAD + text))
    CanonicalizePass()(model)
    return model


def split(model: ir.Model, options: str = "", batches: object = None) -> PassRecord:
    context = Context(calibration=None if batches is None else Calibration.of(batches))  # type: ignore[arg-type]
    text = f"split-layers{{{options}}}" if options else "split-layers"
    return Pipeline.parse(text).run(model, context)[0]


def parts_of(model: ir.Model) -> list[Array]:
    found = [(name, value) for name, value in model.graph.initializers.items() if "_part" in name]
    held = {name: np.asarray(value.const_value.numpy()) for name, value in found if value.const_value}
    return [held[name] for name in sorted(held) if name.startswith("W")]


# Exactness


@pytest.mark.parametrize("form", ["branches", "weight"])
@pytest.mark.parametrize(("parts", "by", "scope"), WAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_parts_add_up_bit_for_bit(kind: str, parts: int, by: str, scope: str, form: str) -> None:
    model = graph(LAYERS[kind])
    weight = find_layers(model)[0][0].weight_array()
    feeds = feeds_for(model)
    before = Session(model).run(feeds)["y"]
    record = split(model, f"parts={parts},by={by},scope={scope},form={form},embeddings=true")
    if kind == "depthwise" and by == "channel":
        assert record.skipped[0][1] == "nothing to split: all its input channels are equally large"
        return
    held = parts_of(model)
    assert 2 <= len(held) <= parts
    assert np.count_nonzero(held, axis=0).max() == 1
    assert np.abs(np.sum(held, axis=0) - weight).max() == 0
    for order in (held, held[::-1]):
        assert np.sum(order, axis=0).tobytes() == weight.tobytes()
    after = Session(model).run(feeds)["y"]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    if kind == "table" or form == "weight":
        assert np.array_equal(after, before)


def test_half_precision_adds_up_too() -> None:
    model = graph("net (float16[b,9] x) => (float16[b,5] y) <float16[9,5] W> { y = MatMul(x, W) }".replace(
        "<float16[9,5] W>", "<float16[9,5] W = seeded>"
    ))  # fmt: skip
    weight = find_layers(model)[0][0].weight_array()
    split(model)
    assert weight.dtype == np.float16
    assert np.sum(parts_of(model), axis=0).tobytes() == weight.tobytes()


# Which weight goes where


def test_boundaries_are_midpoints_of_the_centres() -> None:
    """The paper's rule, its centres being those of the optimal clusters: each weight goes to the nearest."""
    model = graph(LAYERS["matmul"])
    weight = find_layers(model)[0][0].weight_array()
    split(model)
    held = parts_of(model)
    centres = np.array([part[part != 0].mean() for part in held])
    assert (np.diff(centres) > 0).all()
    nearest = np.abs(weight[..., None] - centres).argmin(-1)
    assert np.array_equal(nearest, np.argmax([part != 0 for part in held], axis=0))


def test_scope_channel_clusters_each_kernel() -> None:
    model = graph(LAYERS["conv"])
    layer = find_layers(model)[0][0]
    index = Partition(3, SplitBy.KMEANS, SplitScope.CHANNEL).index(layer)
    for kernel, found in zip(layer.weight_array(), index, strict=True):
        parts = [kernel[found == part] for part in range(3)]
        assert parts[0].max() < parts[1].min() <= parts[1].max() < parts[2].min()
    whole = Partition(3, SplitBy.KMEANS, SplitScope.TENSOR).index(layer)
    assert not np.array_equal(index, whole)


def test_quantile_parts_are_equally_large() -> None:
    layer = find_layers(graph(LAYERS["matmul"]))[0][0]
    index = Partition(4, SplitBy.QUANTILE, SplitScope.TENSOR).index(layer)
    assert np.bincount(index.reshape(-1)).tolist() == [21, 21, 21, 21]


def test_magnitude_puts_outliers_of_both_signs_together() -> None:
    model = graph(
        "net (float[b,2] x) => (float[b,3] y) <float[2,3] W = {9,0.1,-0.2,0.3,-8,0.2}> { y = MatMul(x, W) }"
    )
    split(model, "by=magnitude,parts=2")
    assert parts_of(model)[1].tolist() == [[9, 0, 0], [0, -8, 0]]


@pytest.mark.parametrize(("kind", "axis"), [("matmul", 0), ("signal", 1), ("table", 1)])
def test_channel_parts_hold_whole_input_channels(kind: str, axis: int) -> None:
    layer = find_layers(graph(LAYERS[kind]))[0][0]
    index = np.moveaxis(Partition(2, SplitBy.CHANNEL, SplitScope.TENSOR).index(layer), axis, 0)
    peaks = np.abs(np.moveaxis(layer.weight_array(), axis, 0)).reshape(len(index), -1).max(1)
    flat = index.reshape(len(index), -1)
    assert (flat == flat[:, :1]).all()
    assert peaks[flat[:, 0] == 0].max() < peaks[flat[:, 0] == 1].min()


# Bad input


def record_of(weight: str, options: str = "") -> PassRecord:
    return split(
        graph(f"net (float[b,2] x) => (float[b,2] y) <float[2,2] W = {{{weight}}}> {{ y = MatMul(x, W) }}"),
        options,
    )


@pytest.mark.parametrize(
    ("weight", "options", "reason"),
    [
        ("3,3,3,3", "", "nothing to split: all its weights are equal"),
        ("3,-3,3,-3", "by=magnitude", "nothing to split: all its magnitudes are equal"),
        ("3,1,2,3", "by=channel", "nothing to split: all its input channels are equally large"),
        ("3,1,2,nan", "", "the weight holds NaN or infinity"),
    ],
)
def test_what_cannot_be_split_is_said(weight: str, options: str, reason: str) -> None:
    record = record_of(weight, options)
    assert not record.modified
    assert [text for _, text in record.skipped] == [reason]


def test_a_table_with_nan_is_left_alone() -> None:
    model = graph("net (int64[b] x) => (float[b,2] y) <float[2,2] W = {1,2,nan,3}> { y = Gather(W, x) }")
    assert split(model, "embeddings=true").skipped[0][1] == "the weight holds NaN or infinity"


def test_a_second_run_and_parts_are_left_alone() -> None:
    model = graph(LAYERS["gemm"])
    split(model)
    again = split(model, "parts=2")
    assert not again.modified
    assert {reason for _, reason in again.skipped} == {"it is a part of a split layer"}


def test_a_weight_that_others_read_stays_for_them() -> None:
    model = graph(
        "net (float[b,4] x) => (float[b,4] y, float[4,4] z) <float[4,4] W = seeded> "
        "{ y = MatMul(x, W) z = Relu(W) }"
    )
    feeds = feeds_for(model)
    before = Session(model).run(feeds)
    split(model)
    after = Session(model).run(feeds)
    assert np.array_equal(after["z"], before["z"])
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("parts=1", "parts is 1; it may be 2 to 16"),
        ("by=channel,scope=channel", "by=channel takes whole ones"),
        ("form=weight,split-bias=true", "one layer has one bias"),
        ("min-gain=1.0", "min-gain is an option of select=error"),
        ("select=error,budget=-1.0", "budget is -1.0; 0 is no limit"),
    ],
)
def test_options_that_do_not_fit(options: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse(f"split-layers{{{options}}}")


# What follows


@pytest.mark.parametrize(
    "step", ["quantize-weights{bits=4,block=16}", "quantize-activations", "quantize-dynamic"]
)
def test_every_quantizer_quantizes_every_branch(step: str) -> None:
    artifact = compile(
        mlp(),
        pipeline=f"split-layers,{step}",
        calibration=[{"x": samples()}],
        tolerance=Tolerance(cosine=0.9),
    )
    record = next(record for record in artifact.records if record.text.startswith("quantize"))
    assert [layer for layer, _ in record.applied] == ["encoder.up"] * 3 + ["encoder.down"] * 3
    assert all(len(names) == 3 for names in record.carried.values())
    realised = artifact.manifest["realised"]
    assert set(realised) == {"encoder.up", "encoder.down"}
    assert not artifact.manifest["put_back"]


def test_a_narrower_range_is_what_it_gains() -> None:
    """At the same bits the split layer errs less: the paper's claim, on outliers."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((64, 16)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.02] *= 8
    parts = split_parts(weight.T, Partition(3, SplitBy.KMEANS, SplitScope.TENSOR)._values(weight.T))

    def error(arrays: list[Array]) -> float:
        held = [quantize_blocks(array, bits=2, block=64, symmetric=False) for array in arrays]
        return float(np.square(np.sum([dequantize_blocks(it) for it in held], axis=0) - weight.T).sum())

    assert error(parts) < error([weight.T]) / 3


def test_the_branches_of_a_layer_are_measured_together() -> None:
    """Outputs of branches cancel: apart they would look better or worse than the layer is."""
    plain, divided = graph(LAYERS["matmul"]), graph(LAYERS["matmul"])
    feeds = [feeds_for(plain, seed=seed) for seed in range(3)]
    split(divided, "split-bias=true")
    context = Context(calibration=Calibration.of(feeds))
    measured = [
        Pipeline.parse("quantize-dynamic{min-sqnr=1}").run(model, context)[0].measured
        for model in (plain, divided)
    ]
    before = Session(graph(LAYERS["matmul"])).run(feeds[0])["y"]
    after = Session(divided).run(feeds[0])["y"]
    noise = 10 * np.log10(np.square(before).sum() / np.square(after - before).sum())
    ((name, found),) = measured[1].items()
    assert found == pytest.approx(noise, abs=5)
    assert found > measured[0][name] - 3


def test_a_weight_of_parts_is_no_layer_to_others() -> None:
    model = graph(LAYERS["matmul"])
    weight = find_layers(model)[0][0].weight_array()
    split(model, "form=weight")
    layers, refused = find_layers(model)
    assert not layers
    assert [reason for _, reason in refused] == [
        "its weight is a sum of parts, which quantize-parts takes up"
    ]
    (found,) = summed_layers(model)
    assert np.array_equal(found.layer.weight_array(), weight)


# Where it pays


def offered(options: str, seed: int = 0) -> PassRecord:
    model = ir.from_proto(mlp(seed=seed))
    CanonicalizePass()(model)
    return split(model, f"select=error,block=16,{options}", [{"x": samples()}])


def test_a_budget_is_kept_and_best_spent() -> None:
    unlimited, tight = offered("bits=2"), offered("bits=2,budget=6.0")
    assert [layer for layer, _ in unlimited.applied] == ["encoder.up", "encoder.down"]
    assert [layer for layer, _ in tight.applied] == ["encoder.down"]
    assert dict(tight.skipped)["encoder.up"].startswith("others gain more for a byte of budget=6 bits")
    up, down = 4.25 * 2048, 4.125 * 512 * 3
    assert tight.notes[0].startswith(f"1 of 2 layers split: {(up + down) / 2560:.2f} stored bits a weight")


def test_a_limit_on_work_is_kept() -> None:
    record = offered("bits=2,max-work=1.5")
    assert [layer for layer, _ in record.applied] == ["encoder.down"]
    assert record.notes[0].endswith(f"{(2048 + 3 * 512) / 2560:.2f} times the multiply-adds")


def test_a_small_gain_is_not_taken() -> None:
    record = offered("bits=8,min-gain=40.0")
    assert not record.applied
    assert all("below min-gain=40" in reason for _, reason in record.skipped)


def test_measured_errors_are_those_of_the_layer() -> None:
    model = graph(LAYERS["matmul"])
    weight = find_layers(model)[0][0].weight_array().T
    feeds = feeds_for(model)
    x = feeds["x"]
    record = split(model, "select=error,bits=2,block=16,min-gain=-100.0", [feeds])
    parts = [part.T for part in parts_of(model)]
    held = np.sum(
        [dequantize_blocks(quantize_blocks(p, bits=2, block=16, symmetric=False)) for p in parts], axis=0
    )
    noise = np.square(x @ (held - weight).T).sum(1)
    expected = np.mean(10 * np.log10(np.square(x @ weight.T).sum(1) / noise))
    assert next(iter(record.measured.values())) == pytest.approx(expected, abs=1e-3)


def test_data_is_asked_for() -> None:
    with pytest.raises(CalibrationError, match=r"split-layers\{select=error\} needs calibration data"):
        split(graph(LAYERS["matmul"]), "select=error")


# A real model


def test_resnet20_is_exact_and_opens_in_the_bare_runtime(tmp_path: Path) -> None:
    source = SHARED / "models" / "resnet20_cifar10.onnx"
    if not source.exists():
        pytest.skip(f"{source} is absent (set SPLITFOLD_SHARED)")
    artifact = compile(source, pipeline="split-layers{scope=channel}")
    (record,) = [record for record in artifact.records if record.text.startswith("split-layers")]
    assert len(record.applied) == 20
    assert record.deviation is not None
    assert record.deviation.sqnr_db > 100
    artifact.save(tmp_path / "out")
    before, after = (
        onnxruntime.InferenceSession(str(path)) for path in (source, tmp_path / "out" / "model.onnx")
    )
    name = before.get_inputs()[0].name
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    first, second = (session.run(None, {name: images})[0] for session in (before, after))
    np.testing.assert_allclose(second, first, rtol=1e-3, atol=1e-4)

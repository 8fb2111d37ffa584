# SPDX-License-Identifier: Apache-2.0
"""Outliers apart: exact to the bit, chosen by what they gain, and better than plain weights of one size."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph

from splitfold.passes.affine import dequantize_blocks, quantize_blocks
from splitfold.passes.base import Context
from splitfold.passes.block_grid import BlockLayout
from splitfold.passes.branches import Part, branch_of_node
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import SpecError
from splitfold.passes.identity import layers_of
from splitfold.passes.outlier_cuts import (
    Axis,
    Cut,
    Held,
    OutlierScore,
    OutputCost,
    PlainNoise,
    Split,
    cuts,
    input_gains,
)
from splitfold.passes.outlier_share import share_out
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.weight_forms import stored_bytes
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Session

K, N = 256, 64
LOUD = (3, 17, 18, 40, 90, 200)
APART = "quantize-weights{bits=8,block=16,symmetric=true,only=[*:outliers]}"


def graph(text: str, **arrays: Array) -> ir.Model:
    """Return a canonical graph; initializers in `arrays` are replaced."""
    model = ir.from_proto(parse_graph(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}'))
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)
    CanonicalizePass()(model)
    return model


def planted() -> ir.Model:
    return graph(
        f"net (float[batch,{K}] x) => (float[batch,{N}] y) <float[{K},{N}] W = seeded> "
        "{ [dense] y = MatMul(x, W) }"
    )


def batches(*, loud: float = 20.0, count: int = 4) -> list[Feeds]:
    """Return tokens of which some channels are large."""
    rng = np.random.default_rng(5)
    sizes = np.ones(K)
    sizes[list(LOUD)] = loud
    return [{"x": (rng.standard_normal((128, K)) * sizes).astype(np.float32)} for _ in range(count)]


def ran(model: ir.Model, text: str, data: list[Feeds] | None = None) -> list[PassRecord]:
    calibration = None if data is None else Calibration.of(data)
    return Pipeline.parse(text).run(model, Context(calibration=calibration))


def parts(model: ir.Model) -> dict[Part, Array]:
    found = {}
    for node in model.graph:
        part = next((branch.part for branch in branch_of_node(node)), None)
        if part is not None and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            found[part] = node.inputs[1].const_value.numpy()
    return found


def channels(model: ir.Model) -> Array:
    return next(
        value.const_value.numpy()
        for value in model.graph.initializers.values()
        if value.const_value is not None and (value.name or "").endswith("_channels")
    )


# Exact


def test_input_channels_stand_in_one_part_bit_for_bit() -> None:
    model = planted()
    whole = model.graph.initializers["W"].const_value.numpy().copy()  # type: ignore[union-attr]
    (record,) = ran(model, "split-outliers{bits=2,block=64,axis=input,share=0.1}", batches())
    assert [layer for layer, _ in record.applied] == ["dense"]
    held, picked = parts(model), channels(model)
    assert set(LOUD) <= set(picked.tolist())
    put = np.zeros_like(whole)
    put[picked] = held[Part.OUTLIERS]
    assert np.array_equal(held[Part.REST] + put, whole)
    assert not held[Part.REST][picked].any()


def test_output_channels_stand_in_one_part_bit_for_bit() -> None:
    model = planted()
    whole = model.graph.initializers["W"].const_value.numpy().copy()  # type: ignore[union-attr]
    ran(model, "split-outliers{bits=2,block=64,axis=output,share=0.2,min-gain=-50}")
    held, order = parts(model), channels(model)
    assert np.array_equal(np.concatenate([held[Part.REST], held[Part.OUTLIERS]], 1)[:, order], whole)
    assert 0 < held[Part.OUTLIERS].shape[1] <= N // 4


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("shape", ["batch", "batch,3"])
def test_outputs_stay_equal(axis: str, shape: str) -> None:
    model = graph(
        f"net (float[{shape},{K}] x) => (float[{shape},{N}] y) "
        f"<float[{K},{N}] W = seeded, float[{N}] b = seeded> "
        "{ [dense] h = MatMul(x, W) [bias] y = Add(h, b) }"
    )
    feeds = {"x": np.random.default_rng(1).standard_normal((5, *([3] if "," in shape else []), K))}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    reference = Session(model).run(feeds)["y"]
    (record,) = ran(model, f"split-outliers{{bits=2,axis={axis},share=0.2,min-gain=-50}}")
    assert record.applied
    assert Session(model).run(feeds)["y"] == pytest.approx(reference, rel=1e-4, abs=1e-4)


def test_layers_of_a_shared_weight_are_split_alike() -> None:
    model = graph(
        f"net (float[batch,{K}] x) => (float[batch,{N}] y) <float[{K},{N}] W = seeded> "
        "{ [a] p = MatMul(x, W) r = Neg(x) [b] q = MatMul(r, W) y = Add(p, q) }"
    )
    (record,) = ran(model, "split-outliers{bits=2,block=64,share=0.2}", batches())
    assert [layer for layer, _ in record.applied] == ["a", "b"]
    held = [name for name in model.graph.initializers if name.startswith("W")]
    assert sorted(held) == ["W_channels", "W_outliers", "W_rest"]


# Which channels


def literal_error(weight: Array, h: Array, layout: BlockLayout) -> float:
    """Return sum_k H_kk ||dW_k||^2 of [n, k], block by block."""
    bits, levels = layout.bits, layout.levels
    held = dequantize_blocks(
        quantize_blocks(weight, bits=bits, block=layout.block, symmetric=layout.symmetric, levels=levels)
    )
    return float(sum(h[k] * np.square(held[:, k] - weight[:, k]).sum() for k in range(weight.shape[1])))


@pytest.mark.parametrize("symmetric", [False, True])
def test_gains_are_what_the_error_falls_by_when_a_channel_leaves(symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_t(3, (6, 40)).astype(np.float32)
    h = rng.uniform(0.1, 9, 40).astype(np.float32)
    layout = BlockLayout(2, 16, symmetric, 4)
    gains = input_gains(weight, h, layout)
    whole = literal_error(weight, h, layout)
    for k in range(40):
        without = weight.copy()
        without[:, k] = 0
        assert gains[k] == pytest.approx(whole - literal_error(without, h, layout), rel=1e-3, abs=1e-3)


def test_a_channel_inside_its_ranges_is_worth_its_owq_sensitivity() -> None:
    rng = np.random.default_rng(0)
    weight = rng.uniform(-1, 1, (6, 32)).astype(np.float32)
    weight[:, 0], weight[:, 1] = 2, -2  # the ends of every block
    h = rng.uniform(0.1, 9, 32).astype(np.float32)
    layout = BlockLayout(2, 32, False, 4)
    held = dequantize_blocks(quantize_blocks(weight, bits=2, block=32, symmetric=False))
    sensitivity = h * np.square(held - weight).sum(0)
    assert input_gains(weight, h, layout)[2:] == pytest.approx(sensitivity[2:], rel=1e-4)


def test_a_large_weight_is_an_outlier_without_data() -> None:
    weight = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    weight[LOUD, :] *= 12
    for by in ("error", "weight"):
        model = planted()
        model.graph.initializers["W"].const_value = ir.tensor(weight, name="W")
        (record,) = ran(model, f"split-outliers{{bits=4,share=0.1,by={by}}}")
        assert record.applied, record.skipped
        assert set(LOUD) <= set(channels(model).tolist())


def test_loud_activations_are_outliers_with_data() -> None:
    model = planted()
    (record,) = ran(model, "split-outliers{bits=4,share=0.1,by=activation}", batches())
    assert record.applied, record.skipped
    assert set(LOUD) <= set(channels(model).tolist())


# What it is worth


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("n", "k"), [(8, 64), (8, 100), (3, 16)])
def test_sizes_are_those_that_are_stored(bits: int, symmetric: bool, n: int, k: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
    stored = quantize_blocks(matrix, bits=4 if bits == 3 else bits, block=32, symmetric=symmetric)
    assert Held(bits, 32, symmetric, mse=False).nbytes(n, k) == stored_bytes(stored)


def test_expected_noise_and_size_are_those_of_the_quantized_layer() -> None:
    """The weights that quantize-weights leaves, put back together, have the error and the bytes announced."""
    model, data = planted(), batches()
    whole = model.graph.initializers["W"].const_value.numpy().copy()  # type: ignore[union-attr]
    x = np.concatenate([feeds["x"] for feeds in data]).astype(np.float64)
    gram = (x.T @ x).astype(np.float32)
    split = Split(
        Held(2, 64, False, False), Held(8, 16, True, False), Axis.INPUT, OutlierScore.ERROR, most=0.0625
    )
    (cut,) = cuts(np.ascontiguousarray(whole.T), OutputCost(gram), split)
    ran(model, "split-outliers{bits=2,block=64,axis=input,most=0.0625,share=0.1}", data)
    ran(model, f"{APART},quantize-weights{{bits=2,block=64}}")
    assert np.array_equal(channels(model), cut.channels)
    names = [name for name in model.graph.initializers if name.startswith("W")]
    values = [model.graph.initializers[name].const_value for name in names]
    assert sum(value.nbytes for value in values if value is not None) == cut.nbytes
    held = quantized_weights(model, len(cut.channels))
    actual = np.square(x @ (held - whole)).sum() / np.square(x @ whole).sum()
    assert cut.noise == pytest.approx(actual, rel=1e-3)


def quantized_weights(model: ir.Model, count: int) -> Array:
    """Return the weight [K, N] that both MatMulNBits stand for, by what they make of unit vectors."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    return np.asarray(Session(model).run({"x": np.eye(K, dtype=np.float32)})["y"])


def error_of(model: ir.Model, reference: Array, feeds: Feeds) -> float:
    found = Session(model).run(feeds)["y"]
    return float(np.square(found - reference).sum() / np.square(reference).sum())


def test_a_planted_outlier_beats_plain_weights_of_more_bytes() -> None:
    data = batches(count=5)
    held_out = data.pop()
    reference = Session(planted()).run(held_out)["y"]
    split = planted()
    records = ran(
        split,
        f"split-outliers{{bits=2,block=64,share=0.1}},{APART},quantize-weights{{bits=2,block=64}}",
        data,
    )
    plain = planted()
    ran(plain, "quantize-weights{bits=2,block=16}")
    sizes = [
        sum(value.const_value.nbytes for value in it.graph.initializers.values()) for it in (split, plain)
    ]  # type: ignore[union-attr]
    assert records[0].applied
    assert sizes[0] < sizes[1]
    assert error_of(split, reference, held_out) < 0.3 * error_of(plain, reference, held_out)


def test_channels_that_are_all_alike_stay_together_and_the_record_says_why() -> None:
    model = planted()
    (record,) = ran(model, "split-outliers{bits=2,block=64,share=0.5}", batches(loud=1.0))
    assert not record.applied
    ((layer, reason),) = record.skipped
    assert layer == "dense"
    assert "less than min-gain=0.5 apart" in reason


def test_plain_noise_between_two_formats_is_on_a_line_of_db() -> None:
    noise = PlainNoise([(100, 0.1), (200, 0.001)])
    assert noise.at(150) == pytest.approx(0.01)
    assert (noise.at(100), noise.at(500)) == (pytest.approx(0.1), pytest.approx(0.001))


def cut(apart: int, noise: float, plain: float) -> Cut:
    return Cut(Axis.INPUT, np.arange(apart), apart, 100 + apart, 1000, noise, plain)


def test_the_share_goes_where_a_byte_gains_most() -> None:
    menus = {
        "steep": [cut(10, 0.4, 0.9), cut(20, 0.35, 0.87)],  # .05 a weight, then .002
        "flat": [cut(10, 0.7, 0.9), cut(20, 0.5, 0.9)],  # .02 a weight, in both steps
        "level": [cut(10, 0.9, 0.9)],
    }
    assert {key: found.apart for key, found in share_out(menus, 9, 0.0).items()} == {}
    assert {key: found.apart for key, found in share_out(menus, 10, 0.0).items()} == {"steep": 10}
    assert {key: found.apart for key, found in share_out(menus, 30, 0.0).items()} == {"steep": 10, "flat": 20}
    assert {key: found.apart for key, found in share_out(menus, 99, 0.0).items()} == {"steep": 20, "flat": 20}


# What is left alone


def reasons(record: PassRecord) -> dict[str, str]:
    return dict(record.skipped)


def test_bad_input_is_skipped_with_a_reason() -> None:
    model = graph(
        f"""net (float[batch,{K}] x, float[batch,4,8,8] i) => (float[batch,{N}] y, float[batch,8] s,
            float[batch,8] z, float[batch,4] t, float[batch,4,8,8] c, float[batch,8] n)
        <float[{K},{N}] W = seeded, float[{N},8] A = seeded, float[{N},8] Z = seeded, float[{N},4] T = seeded,
         float[4,4,1,1] C = seeded, float[{N},8] M = seeded> {{
          [shared] y = MatMul(x, W) [alike] s = MatMul(y, A) [zero] z = MatMul(y, Z) [tiny] t = MatMul(y, T)
          [conv] c = Conv(i, C) [nan] n = MatMul(y, M)
        }}""",
        A=np.full((N, 8), 0.5),
        Z=np.zeros((N, 8)),
        M=np.full((N, 8), np.nan),
    )
    (record,) = ran(model, "split-outliers{bits=4,most=0.125,share=0.5,min-gain=50}")
    found = reasons(record)
    assert not record.applied
    assert "less than min-gain=50" in found["shared"]
    assert found["alike"] == found["zero"] == "kept whole: 4 bits lose nothing of its weight"
    assert found["tiny"] == (
        "kept whole: of 64 input and 4 output channels, most=0.125 is less than what leaves at a time"
    )
    assert found["conv"] == "a Conv has no block-wise carrier"
    assert found["nan"] == "the weight holds NaN or infinity"


def test_weights_that_others_read_and_subgraphs() -> None:
    model = graph(
        f"""net (bool c, float[batch,{K}] x, float[{N}] s) => (float[batch,{N}] y, float[{K},{N}] m)
        <float[{K},{N}] W = seeded, float[{K},{N}] V = seeded> {{
          [tied] g = MatMul(x, W) [reader] m = Mul(W, s)
          v = If (c) <then_branch = yes () => (float[batch,{N}] p) {{ [inner] p = MatMul(x, V) }},
                      else_branch = no () => (float[batch,{N}] q) {{ q = MatMul(x, V) }}>
          y = Add(g, v)
        }}"""
    )
    data: list[Feeds] = [{"c": np.array(True), "s": np.ones(N, np.float32), **feeds} for feeds in batches()]
    (record,) = ran(model, "split-outliers{bits=2,share=0.5}", data)
    found = reasons(record)
    assert found["inner"] == "kept whole: nothing finite but zero is known of its input"
    assert found["tied"] == "kept whole: its weight is also read by 'reader', which is not split"
    assert not record.applied


def test_a_second_run_and_quantized_layers_find_nothing() -> None:
    model = planted()
    text = "split-outliers{bits=2,block=64,share=0.1}"
    ran(model, text, batches())
    (again,) = ran(model, text, batches())
    assert (again.modified, again.skipped) == (False, (("dense", "split already"),))
    ran(model, f"{APART},quantize-weights{{bits=2,block=64}}")
    (after,) = ran(model, text, batches())
    assert (after.modified, after.applied) == (False, ())


# Parts in patterns


def test_patterns_name_parts_or_the_whole_layer() -> None:
    model = planted()
    ran(model, "split-outliers{bits=2,block=64,share=0.1}", batches())
    for pattern, kept in (("dense:outliers", 1), ("*:rest", 1), ("dense", 2), ("*", 2)):
        copy = model.clone()
        (record,) = ran(copy, f"quantize-weights{{only=[{pattern}]}}")
        assert len(record.applied) == kept, pattern
        copy = model.clone()
        (record,) = ran(copy, f"quantize-weights{{exclude=[{pattern}]}}")
        assert len(record.applied) == 2 - kept, pattern
    assert {name for node in model.graph for name in layers_of(node)} == {"dense"}


def test_a_pattern_of_parts_may_find_none_but_its_layer_must_exist() -> None:
    model = planted()
    (record,) = ran(model, "quantize-weights{only=[*:outliers]}")
    assert not record.applied
    for wrong in ("other:outliers", "*:outlier"):
        with pytest.raises(SpecError, match="no layer matches"):
            ran(model, f"quantize-weights{{only=[{wrong}]}}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("bits=8", "bits is 8"),
        ("outlier-bits=4", "outlier-bits is 4"),
        ("block=48", "block is 48"),
        ("method=gptq", "method is gptq"),
        ("share=0", "share is 0.0"),
        ("most=0.9", "most is 0.9"),
        ("axis=output,by=activation", "by=activation ranks input channels"),
    ],
)
def test_wrong_options_are_refused(options: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse(f"split-outliers{{{options}}}")

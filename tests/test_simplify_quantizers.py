# SPDX-License-Identifier: Apache-2.0
"""Simpler Q/DQ: bit for bit what it was, on models of our own passes and of another tool, and careful."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from seeded import feeds_for, parse_graph

from splitfold.passes.base import Context
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.provenance import stands_for
from splitfold.passes.quantizers import QUANTIZE, grid_of
from splitfold.passes.simplify_quantizers import SimplifyQuantizersPass
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Optimization, Session

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'
GRID = "float s = {0.05}, uint8 z = {120}"


def made(text: str) -> ir.Model:
    return ir.from_proto(parse_graph(HEAD + text))


def same(model: ir.Model, steps: str = "simplify-quantizers") -> tuple[ir.Model, PassRecord]:
    """Run `steps` on a copy of `model`; nothing changes by a bit, with the runtime's optimisations off."""
    after = model.clone()
    record = Pipeline.parse(steps).run(after, Context())[-1]
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    for seed in range(2):
        feeds = feeds_for(model, seed=seed)
        one = Session(model, optimization=Optimization.OFF).run(feeds)
        two = Session(after, optimization=Optimization.OFF).run(feeds)
        assert list(one) == list(two)
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    assert not SimplifyQuantizersPass()(after).modified
    return after, record


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


# Why Q(DQ(q)) is q


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16])
def test_every_code_comes_back(kind: type[np.generic]) -> None:
    """(q - z) s / s in float32, rounded half to even, is q - z for every code, zero point and scale tried."""
    ends = np.iinfo(kind)
    codes = np.arange(ends.min, ends.max + 1, dtype=kind)
    graph = (
        f"net ({np.dtype(kind)}[n] q, float s, {np.dtype(kind)} z) => ({np.dtype(kind)}[n] y) "
        "{ d = DequantizeLinear(q, s, z) y = QuantizeLinear(d, s, z) }"
    )
    session = Session(made(graph), threads=1, optimization=Optimization.OFF)
    rng = np.random.default_rng(0)
    scales = np.concatenate([10 ** rng.uniform(-30, 30, 60), [1e-30, 1e30, 1 / 3, 2.0**-20]])
    for scale in scales.astype(np.float32):
        zero = kind(rng.integers(ends.min, ends.max, endpoint=True))
        feeds = {"q": codes, "s": np.array(scale), "z": np.array(zero)}
        np.testing.assert_array_equal(session.run(feeds)["y"], codes)


@pytest.mark.parametrize("scale", [1e-38, 3e36, 0.0])
def test_a_scale_that_could_lose_codes_is_left(scale: float) -> None:
    chain = "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) r = QuantizeLinear(d, s, z) "
    model = made(
        f"net (float[b,4] x) => (float[b,4] y) <float s = {{{scale}}}, uint8 z = {{3}}> {chain}"
        "y = DequantizeLinear(r, s, z) }"
    )
    record = Pipeline.parse("simplify-quantizers").run(model, Context())[0]
    assert not record.applied
    assert "may not come back" in record.missed[0][2]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("float t = {0.04}, uint8 o = {120}", "its scale is 0.04, that of the DQ before it 0.05"),
        ("float t = {0.05}, uint8 o = {121}", "its zero point is not"),
        ("float t = {0.05}, int8 o = {-8}", "it makes INT8 of UINT8"),
        ("float[4] t = {0.05, 0.05, 0.05, 0.05}, uint8[4] o = {120, 120, 120, 120}", "against several"),
    ],
)
def test_another_grid_stays_and_is_told(other: str, words: str) -> None:
    text = (
        f"net (float[b,4] x) => (float[b,4] y) <{GRID}, {other}> {{ q = QuantizeLinear(x, s, z) "
        "d = DequantizeLinear(q, s, z) r = QuantizeLinear(d, t, o) y = DequantizeLinear(r, t, o) }"
    )
    _, record = same(made(text))
    assert not record.modified
    assert words in record.missed[0][2]


# Movers


@pytest.mark.parametrize(
    ("mover", "shape", "more"),
    [
        ("Reshape(d, k)", "b,2,2", ", int64[3] k = {0, 2, 2}"),
        ("Flatten(d)", "b,4", ""),
        ("Transpose<perm = [1, 0]>(d)", "4,b", ""),
        ("Unsqueeze(d, k)", "b,1,4", ", int64[1] k = {1}"),
        ("Slice(d, k, e, a)", "b,2", ", int64[1] k = {1}, int64[1] e = {3}, int64[1] a = {1}"),
        ("Gather<axis = 1>(d, k)", "b,3", ", int64[3] k = {3, 0, 3}"),
        ("Identity(d)", "b,4", ""),
    ],
)
def test_movers_work_on_codes(mover: str, shape: str, more: str) -> None:
    text = (
        f"net (float[b,4] x) => (float[{shape}] y) <{GRID}{more}> {{ q = QuantizeLinear(x, s, z) "
        f"d = DequantizeLinear(q, s, z) m = {mover} r = QuantizeLinear(m, s, z) "
        "y = DequantizeLinear(r, s, z) }"
    )
    after, record = same(made(text))
    assert operators(after)["QuantizeLinear"] == operators(after)["DequantizeLinear"] == 1
    assert any("works on codes" in done for _, done in record.applied)


def test_a_squeeze_and_a_split() -> None:
    text = (
        f"net (float[b,1,4] x) => (float[b,2] y) <{GRID}, int64[1] k = {{1}}> {{ q = QuantizeLinear(x, s, z) "
        "d = DequantizeLinear(q, s, z) m = Squeeze(d, k) e, f = Split<axis = 1, num_outputs = 2>(m) "
        "y = Add(e, f) }"
    )
    after, _ = same(made(text))
    assert [node.op_type for node in after.graph][:3] == ["QuantizeLinear", "Squeeze", "Split"]
    assert operators(after)["DequantizeLinear"] == 2


@pytest.mark.parametrize(
    "rest",
    [
        "m = Transpose(d) y = Add(m, m) w = Relu(d)",  # another reader
        "m = Add(d, d) y = Transpose(m) w = Relu(m)",  # no mover
        "m = Transpose(d) y = Relu(m) w = Identity(d)",
    ],
)
def test_what_is_read_as_float_too_is_left(rest: str) -> None:
    text = (
        f"net (float[4,4] x) => (float[4,4] y, float[4,4] w) <{GRID}> {{ q = QuantizeLinear(x, s, z) "
        f"d = DequantizeLinear(q, s, z) {rest} }}"
    )
    assert not same(made(text))[1].modified


def test_codes_of_a_subgraph_are_left() -> None:
    text = (
        f"net (float[4,4] x, bool c) => (float[4,4] y) <{GRID}> {{ q = QuantizeLinear(x, s, z) "
        "d = DequantizeLinear(q, s, z) m = Transpose(d) "
        "y = If(c) <then_branch = t () => (float[4,4] a) { a = Relu(m) }, "
        "else_branch = e () => (float[4,4] a) { a = Neg(m) }> }"
    )
    assert not same(made(text))[1].modified


def test_concat_of_two_grids_is_left_to_its_kernel() -> None:
    text = (
        f"net (float[2,4] x, float[2,4] w) => (float[4,4] y) <{GRID}, float t = {{0.02}}> {{ "
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) p = QuantizeLinear(w, t, z) "
        "e = DequantizeLinear(p, t, z) j = Concat<axis = 0>(d, e) r = QuantizeLinear(j, s, z) "
        "y = DequantizeLinear(r, s, z) }"
    )
    assert not same(made(text))[1].modified


def test_a_table_is_dequantized_after_the_gather() -> None:
    text = (
        "net (int64[b] i) => (float[b,4] y) <int8[9,4] T = seeded, float s = {0.05}, int8 z = {0}> { "
        "d = DequantizeLinear(T, s, z) g = Gather(d, i) y = Relu(g) }"
    )
    after, _ = same(made(text))
    assert [node.op_type for node in after.graph] == ["Gather", "DequantizeLinear", "Relu"]


def test_scales_along_an_axis_are_not_moved_where_the_axis_may_go() -> None:
    text = (
        "net (float[b,4] x) => (float[b,2,2] y) <int8[4,4] W = seeded, float[4] s = {0.1, 0.2, 0.1, 0.2}, "
        "int8[4] z = {0, 0, 0, 0}, int64[3] k = {4, 2, 2}> { d = DequantizeLinear<axis = 1>(W, s, z) "
        "m = Reshape(d, k) y = MatMul(x, m) }"
    )
    model = made(text.replace("float[b,4] x", "float[4,b,2] x").replace("float[b,2,2] y", "float[4,b,2] y"))
    assert not same(model)[1].modified


# Provenance, options


def test_what_a_value_stands_for_is_kept() -> None:
    text = (
        f"net (float[b,4] x) => (float[b,2,2] y) <{GRID}, int64[3] k = {{0, 2, 2}}> {{ h = Relu(x) "
        "q = QuantizeLinear(h, s, z) d = DequantizeLinear(q, s, z) m = Reshape(d, k) y = Tanh(m) }"
    )
    after, _ = same(made(text))
    dequantized = next(node for node in after.graph if node.op_type == "DequantizeLinear")
    assert stands_for(dequantized.outputs[0]) == "m"


def test_excluded_layers_are_left_and_recorded() -> None:
    text = (
        f"net (float[b,4] x) => (float[b,4] y) <{GRID}> {{ q = QuantizeLinear(x, s, z) "
        "d = DequantizeLinear(q, s, z) [again] r = QuantizeLinear(d, s, z) y = DequantizeLinear(r, s, z) }"
    )
    model = made(text)
    _, record = Pipeline.parse("canonicalize,simplify-quantizers{exclude=[again]}").run(model, Context())
    assert not record.modified
    assert ("again", "excluded by option") in record.skipped


# Models


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches for onnxruntime's quantizer."""

    def __init__(self, batches: list[Feeds]) -> None:
        self._left: Iterator[Feeds] = iter(batches)

    def get_next(self) -> Feeds | None:
        return next(self._left, None)


BLOCK = (
    "net (float[b,6,8] x) => (float[b,6,8] y) <float[8,8] Q = seeded, float[8,8] K = seeded, "
    "float[8,8] V = seeded, float[8,8] O = seeded, float[8] g = seeded, int64[4] heads = {0, 6, 2, 4}, "
    "int64[3] back = {0, 6, 8}> { [q] q0 = MatMul(x, Q) [k] k0 = MatMul(x, K) [v] v0 = MatMul(x, V) "
    "q1 = Reshape(q0, heads) k1 = Reshape(k0, heads) v1 = Reshape(v0, heads) "
    "q2 = Transpose<perm = [0, 2, 1, 3]>(q1) k2 = Transpose<perm = [0, 2, 3, 1]>(k1) "
    "v2 = Transpose<perm = [0, 2, 1, 3]>(v1) w = MatMul(q2, k2) p = Softmax<axis = -1>(w) c = MatMul(p, v2) "
    "c1 = Transpose<perm = [0, 2, 1, 3]>(c) c2 = Reshape(c1, back) [o] o = MatMul(c2, O) r = Add(o, x) "
    "y = LayerNormalization(r, g) }"
)


def batches(model: ir.Model) -> list[Feeds]:
    return [feeds_for(model, seed=seed) for seed in range(1, 5)]


def test_a_model_of_onnxruntimes_quantizer(tmp_path: Path) -> None:
    model = made(BLOCK)
    onnx.save(ir.to_proto(model), tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Reader(batches(model)),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    before = ir.load(tmp_path / "int8.onnx")
    after, _ = same(before)
    assert operators(after)["QuantizeLinear"] <= operators(before)["QuantizeLinear"] - 8
    weights = [node for node in after.graph if node.op_type == "MatMul"]
    for node in weights:  # each product still reads dequantized codes on both sides, so that it fuses
        assert [value.producer().op_type for value in node.inputs] == ["DequantizeLinear"] * 2  # type: ignore[union-attr]


def test_a_model_of_our_own_pass() -> None:
    model = made(BLOCK)
    Pipeline.parse("canonicalize,quantize-activations{form=integer}").run(
        model, Context(calibration=Calibration.of(batches(model)))
    )
    after, record = same(model)
    assert ("quantized before the Reshape") in [done for _, done in record.applied]
    moved = [node for node in after.graph if node.op_type in ("Transpose", "Reshape")]
    assert sum(node.outputs[0].dtype is ir.DataType.UINT8 for node in moved) == 2
    assert all(grid_of(node, QUANTIZE) for node in after.graph if node.op_type == QUANTIZE)


def test_optimised_runs_agree() -> None:
    """As deployed the runtime may fuse more: codes then move by one step at most."""
    model = made(BLOCK)
    Pipeline.parse("canonicalize,quantize-activations").run(
        model, Context(calibration=Calibration.of(batches(model)))
    )
    after, _ = same(model)
    feeds = feeds_for(model, seed=7)
    one, two = (_only(Session(each).run(feeds)) for each in (model, after))
    assert np.abs(one - two).max() <= 0.05 * np.abs(one).max()


def _only(outputs: dict[str, Array]) -> Array:
    (array,) = outputs.values()
    return array

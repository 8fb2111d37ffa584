# SPDX-License-Identifier: Apache-2.0
"""Products of one input as one: the same numbers, bit for bit in integers, in every form."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from real_minilm import minilm, sentences
from seeded import feeds_for, parse_graph

from splitfold.compiler.realisation import read_realisation
from splitfold.passes.base import Context
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.provenance import stands_for
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'
TRIO = (
    "net (float[b,5,64] x) => (float[b,5,32] y, float[b,5,16] z, float[b,5,32] w) <float[64,32] Q = seeded, "
    "float[64,16] K = seeded, float[64,32] V = seeded, float[32] q = seeded, float[32] v = seeded> "
    "{ [query] q0 = MatMul(x, Q) y = Add(q0, q) [key] k0 = MatMul(x, K) z = Relu(k0) "
    "[value] v0 = MatMul(x, V) w = Add(v, v0) }"
)
GEMMS = (
    "net (float[b,64] x) => (float[b,32] y, float[b,16] z) <float[64,32] Q = seeded, "
    "float[64,16] K = seeded, float[32] q = seeded> { [query] y = Gemm(x, Q, q) [key] z = Gemm(x, K) }"
)


def made(text: str) -> ir.Model:
    return ir.from_proto(parse_graph(HEAD + text))


def merged(text: str, before: str = "") -> tuple[ir.Model, ir.Model, PassRecord]:
    """Return the model after the passes `before`, after merging too, and the record of that."""
    start = made(text)
    data = Calibration.of([feeds_for(start, seed=seed) for seed in range(1, 4)])
    Pipeline.parse(f"canonicalize{before}").run(start, Context(calibration=data))
    after = start.clone()
    record = Pipeline.parse("merge-projections").run(after, Context())[0]
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    return start, after, record


def outputs(model: ir.Model, seed: int, how: Optimization = Optimization.OFF) -> dict[str, Array]:
    return Session(model, threads=1, optimization=how).run(feeds_for(model, seed=seed))


FORMS = {
    "": "MatMul",
    ",quantize-activations": "DequantizeLinear, MatMul",
    ",quantize-activations{form=integer}": "MatMulIntegerToFloat",
    ",quantize-dynamic": "MatMulInteger",
    ",quantize-weights{bits=4,block=32}": "MatMulNBits",
    ",quantize-weights{bits=2,block=16,symmetric=true}": "MatMulNBits",
    ",quantize-weights{bits=8,block=32}": "MatMulNBits",
    ",quantize-weights{bits=4,block=32,form=qdq}": "DequantizeLinear, MatMul",
}


@pytest.mark.parametrize(("before", "form"), FORMS.items())
@pytest.mark.parametrize("how", Optimization)
def test_each_form_computes_the_same(before: str, form: str, how: Optimization) -> None:
    start, after, record = merged(TRIO, before)
    assert [done for _, done in record.applied] == [f"one {form} of 3"] * 3
    for seed in range(2):
        one, two = outputs(start, seed, how), outputs(after, seed, how)
        for name, array in one.items():
            if "activations" in before or "dynamic" in before:
                np.testing.assert_array_equal(two[name], array)
            else:
                np.testing.assert_allclose(two[name], array, rtol=1e-5, atol=1e-5)


def test_gemms() -> None:
    start, after, record = merged(GEMMS)
    assert [node.op_type for node in after.graph] == ["Gemm", "Split"]
    assert len(record.applied) == 2
    for name, array in outputs(start, 0).items():
        np.testing.assert_allclose(outputs(after, 0)[name], array, rtol=1e-5, atol=1e-6)


def test_joined_scales_are_those_of_the_columns() -> None:
    """By hand: codes and scales of three layers side by side, and the sums of integers they give."""
    start, after, _ = merged(TRIO, ",quantize-dynamic")
    held = {name: value.const_value.numpy() for name, value in after.graph.initializers.items()}  # type: ignore[union-attr]
    codes = next(array for array in held.values() if array.shape == (64, 80))
    scales = next(array for array in held.values() if array.shape == (80,) and array.dtype == np.float32)
    parts = [
        value.const_value.numpy()  # type: ignore[union-attr]
        for name, value in start.graph.initializers.items()
        if value.dtype is ir.DataType.INT8 and len(value.shape or ()) == 2
    ]
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, np.concatenate(parts, axis=1))
    x = feeds_for(start, seed=3)["x"]
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = np.float32((np.float32(high) - np.float32(low)) / np.float32(255))
    zero = np.clip(np.rint(-np.float32(low) / step), 0, 255)
    rounded = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    key = (rounded.astype(np.int64) @ codes[:, 32:48].astype(np.int64)) * (step * scales[32:48])
    np.testing.assert_allclose(outputs(after, 3)["z"], np.maximum(key, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        # a weight read twice, another input, a weight that is computed, a weight [K, N, M]
        "net (float[b,8] x) => (float[b,8] y) <float[8,8] W = seeded> "
        "{ a = MatMul(x, W) c = MatMul(x, W) y = Add(a, c) }",
        "net (float[b,8] x, float[b,8] u) => (float[b,8] y) <float[8,8] W = seeded, float[8,8] V = seeded> "
        "{ a = MatMul(x, W) c = MatMul(u, V) y = Add(a, c) }",
        "net (float[8,8] x) => (float[8,8] y) <float[8,8] W = seeded> "
        "{ v = Tanh(x) a = MatMul(x, W) c = MatMul(x, v) y = Add(a, c) }",
        "net (float[2,8,8] x) => (float[2,8,8] y) <float[2,8,8] W = seeded, float[2,8,8] V = seeded> "
        "{ a = MatMul(x, W) c = MatMul(x, V) y = Add(a, c) }",
        "net (float[b,8] x) => (float[b,8] y) <float[8,8] W = seeded, float[8,8] V = seeded> "
        "{ a = Gemm<alpha = 2.0>(x, W) c = Gemm(x, V) y = Add(a, c) }",
    ],
)
def test_what_is_left(text: str) -> None:
    model = made(text)
    assert not Pipeline.parse("merge-projections").run(model, Context())[0].applied


def test_a_bias_that_others_read_stays() -> None:
    text = (
        "net (float[b,8] x) => (float[b,8] y, float[b,8] z) <float[8,8] W = seeded, float[8,8] V = seeded, "
        "float[8] c = seeded> { a = MatMul(x, W) y = Add(a, c) d = MatMul(x, V) e = Add(d, c) z = Mul(e, a) }"
    )
    start, after, record = merged(text)
    assert len(record.applied) == 2
    assert sum(node.op_type == "Add" for node in after.graph) == 2
    for name, array in outputs(start, 0).items():
        np.testing.assert_allclose(outputs(after, 0)[name], array, rtol=1e-5, atol=1e-6)


def test_names_and_values_are_kept() -> None:
    _, after, _ = merged(TRIO)
    split = next(node for node in after.graph if node.op_type == "Split")
    assert [stands_for(value) for value in split.outputs] == ["y", "k0", "w"]
    assert [value.name for value in after.graph.outputs] == ["y", "z", "w"]


def test_excluded_layers_are_left() -> None:
    model = made(TRIO)
    steps = "canonicalize,merge-projections{exclude=[key]}"
    record = Pipeline.parse(steps).run(model, Context())[-1]
    assert {layer for layer, _ in record.applied} == {"query", "value"}
    assert record.skipped == (("key", "excluded by option"),)


@pytest.mark.parametrize("before", list(FORMS)[2:4])
def test_a_joined_weight_is_still_seen_to_be_read(before: str) -> None:
    """What was carried before merging is realised in the kernel that reads the joined weight."""
    model = made(TRIO)
    data = Calibration.of([feeds_for(model, seed=seed) for seed in range(1, 4)])
    records = Pipeline.parse(f"canonicalize{before},merge-projections").run(model, Context(calibration=data))
    found = read_realisation(model, records, Target.cpu())
    assert [item.layer for item in found] == ["query", "key", "value"]
    assert all(item.realised for item in found)


def test_minilm() -> None:
    """Queries, keys and values of all six layers, quantized, are one product each; no bit changes."""
    start = minilm().clone()
    Pipeline.parse("canonicalize,quantize-dynamic").run(start)
    after = start.clone()
    record = Pipeline.parse("merge-projections").run(after)[0]
    assert len(record.applied) == 18
    feeds = sentences()[0]
    one, two = (Session(model, threads=1).run(feeds) for model in (start, after))
    for name, array in one.items():
        np.testing.assert_array_equal(two[name], array)

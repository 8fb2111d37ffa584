# SPDX-License-Identifier: Apache-2.0
"""Precisions and limits: their text forms, and the bytes that a layer takes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph

from splitfold.passes.base import Context, Findings
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.carry_out import Carrying, carry_out
from splitfold.passes.errors import SpecError
from splitfold.passes.layer_cost import beside_bytes, weight_bytes_in
from splitfold.passes.layers import find_layers
from splitfold.passes.limits import Limit, Unit
from splitfold.passes.precision import ActivationPrecision, Precision, WeightPrecision
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.target import Carrier

WORDS = [
    "fp32",
    "int8-static",
    "int8-dynamic",
    *(
        f"w{bits}{block}{sym}"
        for bits in (2, 3, 4, 8)
        for block in ("", "-b16", "-b256")
        for sym in ("", "-sym")
    ),
    *(f"sim-w{bits}" for bits in range(2, 9)),
    *(f"sim-w{w}a{a}" for w in (2, 5) for a in (3, 8)),
    "sim-a6",
]


@pytest.mark.parametrize("word", WORDS)
def test_text_form_round_trips(word: str) -> None:
    assert str(Precision.parse(word)) == word
    assert Precision.parse(str(Precision.parse(word))) == Precision.parse(word)


def test_words_differ_as_precisions_do() -> None:
    assert len({Precision.parse(word) for word in WORDS}) == len(WORDS)
    assert Precision.parse("w4-b32") == Precision.parse("w4")


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("in8-static", "Did you mean 'int8-static'"),
        ("w5", "no carrier"),
        ("w4-b48", "block is 48"),
        ("sim-", "nothing is rounded"),
        ("sim-w9", "bits is 9"),
        ("sim-w4-b32", "unknown precision"),
        ("w4a8", "unknown precision"),
        ("", "unknown precision"),
    ],
)
def test_unknown_precisions_are_refused(word: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Precision.parse(word)


def test_what_nothing_carries_is_refused() -> None:
    with pytest.raises(ValueError, match="no carrier"):
        Precision(WeightPrecision(4, 32), ActivationPrecision(8))
    with pytest.raises(ValueError, match="nothing is rounded"):
        Precision(simulated=True)
    assert Precision.parse("int8-static").carrier is Carrier.STATIC_QDQ
    assert Precision.parse("int8-dynamic").carrier is Carrier.DYNAMIC_INT8
    assert Precision.parse("w2").carrier is Carrier.MATMUL_NBITS
    assert Precision.parse("sim-w4a4").carrier is None


@pytest.mark.parametrize("word", ["4bits", "4.25code-bits", "12.5MB", "0.3ms", "1e-05MB"])
def test_limits_round_trip(word: str) -> None:
    assert str(Limit.parse(word)) == word


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("4", "cannot read"),
        ("MB", "cannot read"),
        ("4bit", "Did you mean 'bits'"),
        ("0bits", "positive"),
        ("1.2.3ms", "cannot read"),
    ],
)
def test_unknown_limits_are_refused(word: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Limit.parse(word)


def test_unit_of_a_limit() -> None:
    assert Limit.parse("4.5bits") == Limit(4.5, Unit.BITS)
    assert Limit.parse("3mb") == Limit(3, Unit.MEGABYTES)


MODELS = {
    "MatMul, K and N odd": ("float[37,5] W", "y = MatMul(x, W)", "float[batch,37]", "float[batch,5]"),
    "Gemm": ("float[64,9] W, float[9] b", "y = Gemm(x, W, b)", "float[batch,64]", "float[batch,9]"),
    "Conv": (
        "float[4,3,3,3] W, float[4] b",
        "y = Conv(x, W, b)",
        "float[2,3,8,8]",
        "float[2,4,6,6]",
    ),
}


def one_layer(name: str) -> ir.Model:
    weights, node, given, made = MODELS[name]
    weights = ", ".join(f"{weight} = seeded" for weight in weights.split(", "))
    text = (
        f'<ir_version: 10, opset_import: ["" : 20]>\nnet ({given} x) => ({made} y)\n<{weights}>\n'
        f"{{\n  [layer] {node}\n}}\n"
    )
    model = ir.from_proto(parse_graph(text))
    CanonicalizePass()(model)
    return model


CARRIED = ["fp32", "int8-static", "int8-dynamic", "w2", "w3-b16", "w4-sym", "w8-b64"]
PAIRS = [(name, word) for name in MODELS for word in (CARRIED[:2] if name == "Conv" else CARRIED)]


@pytest.mark.parametrize(("name", "word"), PAIRS)
def test_planned_bytes_are_those_stored(name: str, word: str) -> None:
    model, precision = one_layer(name), Precision.parse(word)
    (layer,) = find_layers(model)[0]
    planned = weight_bytes_in(layer, precision) + beside_bytes(layer, precision)
    shape = tuple(int(size) if isinstance(size, int) else 3 for size in model.graph.inputs[0].shape or ())
    feeds = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    findings = Findings()
    carry_out(
        model, {layer.name: precision}, Context(calibration=Calibration.of(feeds)), Carrying(), findings
    )
    assert bool(findings.applied) == (not precision.is_float)
    assert weight_bytes(model) == planned


def test_simulated_bytes_are_those_of_packed_codes() -> None:
    (layer,) = find_layers(one_layer("MatMul, K and N odd"))[0]
    bits = 37 * 5 * 3 + 5 * (32 + 3)  # codes, a scale and a zero point a column
    assert weight_bytes_in(layer, Precision.simulate(3, 8)) == -(-bits // 8)

# SPDX-License-Identifier: Apache-2.0
"""A clipped line is one operator: the same numbers, and attention that is still known as clipped."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph

from splitfold.passes.attention import find_attention
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.session import Session

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
NUMBERS = "float two = {2.0}, float third = {0.33333334}, float zero = {0.0}, float one = {1.0}"


def line(body: str, constants: str = NUMBERS) -> ir.Model:
    return ir.from_proto(
        parse_graph(f"{HEAD}net (float[n,8] x) => (float[n,8] y) <{constants}> {{ {body} }}")
    )


@pytest.mark.parametrize(
    ("body", "slope", "offset"),
    [
        ("a = Mul(x, two) b = Add(a, third) y = Clip(b, zero, one)", 2, 1 / 3),
        ("a = Add(third, x) b = Mul(two, a) y = Clip(b, zero, one)", 2, 2 / 3),
        ("a = Sub(x, third) b = Div(a, two) y = Clip(b, zero, one)", 1 / 2, -1 / 6),
        ("a = Sub(third, x) y = Clip(a, zero, one)", -1, 1 / 3),
    ],
)
def test_it_is_the_line_that_was_written(body: str, slope: float, offset: float) -> None:
    model = line(body)
    x = np.random.default_rng(0).uniform(-4, 4, (9, 8)).astype(np.float32)
    before = Session(model.clone()).run({"x": x})["y"]
    assert Pipeline.parse("canonicalize,fold-clips").run(model)[-1].modified
    (node,) = model.graph
    assert node.op_type == "HardSigmoid"
    after = Session(model).run({"x": x})["y"]
    by_hand = np.clip(slope * x.astype(np.float64) + offset, 0, 1)
    np.testing.assert_allclose(after, by_hand, atol=2e-7)
    np.testing.assert_allclose(after, before, atol=2e-7)
    assert {0.0, 1.0} <= set(after.ravel().tolist())


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("y = Clip(x, zero, one)", NUMBERS),
        ("a = Mul(x, two) y = Clip(a, zero, two)", NUMBERS),
        ("a = Mul(x, two) y = Clip(a, zero)", NUMBERS),
        ("a = Div(two, x) y = Clip(a, zero, one)", NUMBERS),
        ("a = Mul(x, x) y = Clip(a, zero, one)", NUMBERS),
        ("a = Mul(x, two) y = Clip(a, zero, one)", "float[8] two, float zero = {0.0}, float one = {1.0}"),
        ("a = Mul(x, nil) y = Clip(a, nil, one)", "float nil = {0.0}, float one = {1.0}"),
    ],
)
def test_anything_else_stays(body: str, constants: str) -> None:
    model = line(body, constants)
    for value in model.graph.initializers.values():
        if value.const_value is None or value.const_value.size == 8:
            value.const_value = ir.tensor(np.arange(8, dtype=np.float32), name=value.name)
    assert not Pipeline.parse("canonicalize,fold-clips").run(model)[-1].modified


def test_clipped_attention_is_known_before_and_after() -> None:
    text = (
        "net (float[b,4,8] q, float[b,8,4] k, float[b,4,8] v) => (float[b,4,8] y) "
        "<float slope = {1.75}, float gamma = {-0.75}, float zero = {0.0}, float one = {1.0}> {"
        "s = MatMul(q, k) p = Softmax<axis = -1>(s) a = Mul(p, slope) b = Add(a, gamma) "
        "c = Clip(b, zero, one) y = MatMul(c, v) }"
    )
    model = ir.from_proto(parse_graph(HEAD + text))
    Pipeline.parse("canonicalize").run(model)
    (before,) = find_attention(model).blocks
    Pipeline.parse("fold-clips{require=all}").run(model)
    (after,) = find_attention(model).blocks
    assert before.probabilities is not None
    assert after.probabilities is not None
    for clipping in (before.probabilities.clipping, after.probabilities.clipping):
        assert clipping is not None
        assert (clipping.gamma, clipping.zeta) == pytest.approx((-0.75, 1.0))

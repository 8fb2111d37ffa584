# SPDX-License-Identifier: Apache-2.0
"""Root mean square norms as one operator: the numbers of the formula, and left alone where it is another."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from splitfold.passes.base import Context
from splitfold.passes.opset import default_opset
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.runtime.feeds import Array
from splitfold.runtime.lift import lift
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

SIZE, EPSILON = 16, 0.03
"""The epsilon is large, so that a lost one shows."""
SQUARES = {"power": "p = Pow(x, two)", "product": "p = Mul(x, x)"}
MEAN = "m = ReduceMean<keepdims = 1>(p, last) v = Add(m, epsilon)"
DIVIDE = {
    "reciprocal": "r = Sqrt(v) i = Reciprocal(r) n = Mul(x, i)",
    "one over": "r = Sqrt(v) i = Div(one, r) n = Mul(i, x)",
    "quotient": "r = Sqrt(v) n = Div(x, r)",
    "power": "i = Pow(v, inverse) n = Mul(x, i)",
}
POWER, ROOT = SQUARES["power"], DIVIDE["reciprocal"]
WEIGH = "y = Mul(n, weight)"


def graph(*steps: str, opset: int = 20, more: str = "") -> ir.Model:
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["": {opset}]>
        net (float[b,n,{SIZE}] x, float[{SIZE}] weight, float[b,n,{SIZE}] gate) => (float[b,n,{SIZE}] y{more})
        <int64[1] last = {{-1}}, int64[1] middle = {{1}}, float two = {{2.0}}, float three = {{3.0}},
         float one = {{1.0}}, float inverse = {{-0.5}}, float epsilon = {{{EPSILON}}}>
        {{ {" ".join(steps)} }}
    """)
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return model


def feeds(batch: int = 2, new: int = 5) -> dict[str, Array]:
    rng = np.random.default_rng(new)
    shapes = {"x": (batch, new, SIZE), "weight": (SIZE,), "gate": (batch, new, SIZE)}
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    drawn["x"][0] *= 1e-2  # where epsilon is most of the sum
    return drawn


def formula(given: dict[str, Array]) -> Array:
    x = given["x"].astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * given["weight"]


def fused(model: ir.Model, context: Context | None = None) -> PassRecord:
    return Pipeline.parse("canonicalize,fuse-norms").run(model, context or Context())[-1]


@pytest.mark.parametrize("optimization", [Optimization.OFF, Optimization.ALL])
@pytest.mark.parametrize("divide", DIVIDE.values(), ids=list(DIVIDE))
@pytest.mark.parametrize("square", SQUARES.values(), ids=list(SQUARES))
@pytest.mark.parametrize("weigh", [WEIGH, "y = Mul(weight, n)"])
def test_the_operator_computes_the_formula(
    square: str, divide: str, weigh: str, optimization: Optimization
) -> None:
    model = graph(square, MEAN, divide, weigh)
    assert len(fused(model).applied) == 1
    assert [node.op_type for node in model.graph] == ["RMSNormalization"]
    assert default_opset(model) == 23
    session = Session(model, optimization=optimization)
    for batch, new in ((2, 5), (1, 1)):
        given = feeds(batch, new)
        np.testing.assert_allclose(session.run(given)["y"], formula(given), rtol=1e-5, atol=1e-6)


def test_torch_computes_the_same() -> None:
    model = graph(SQUARES["power"], MEAN, DIVIDE["reciprocal"], WEIGH)
    fused(model)
    given = feeds()
    np.testing.assert_allclose(lift(model).run(given)["y"], formula(given), rtol=1e-5, atol=1e-6)


def test_a_norm_of_a_norm() -> None:
    first = f"{POWER} {MEAN} {ROOT} h = Mul(n, weight)"
    second = "q = Mul(h, h) u = ReduceMean(q, last) w = Add(epsilon, u) e = Sqrt(w) o = Div(h, e)"
    model = graph(first, second, "y = Mul(o, weight)")
    assert len(fused(model).applied) == 2
    given = feeds()
    expected = formula(given | {"x": formula(given).astype(np.float32)})
    np.testing.assert_allclose(Session(model).run(given)["y"], expected, rtol=2e-5, atol=1e-6)


def test_a_second_run_finds_nothing() -> None:
    model = graph(SQUARES["power"], MEAN, DIVIDE["reciprocal"], WEIGH)
    fused(model)
    assert not fused(model).modified


CENTRED = ("c = ReduceMean(x, last) d = Sub(x, c) p = Pow(d, two)", "r = Sqrt(v) n = Div(d, r)")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (graph(POWER, MEAN.replace("last", "middle"), ROOT, WEIGH), "last axis"),
        (graph(POWER, MEAN, ROOT.replace("Mul(x, i)", "Mul(gate, i)"), WEIGH), "not divided by the root"),
        (graph(POWER, MEAN, DIVIDE["one over"].replace("one", "two"), WEIGH), "not divided by the root"),
        (graph(POWER, MEAN, DIVIDE["quotient"].replace("Div(x, r)", "Div(r, x)"), WEIGH), "not divided"),
        (graph(POWER, MEAN, DIVIDE["power"].replace("inverse", "one"), WEIGH), "not divided by the root"),
        (graph(POWER, MEAN.replace("(m, epsilon)", "(m, gate)"), ROOT, WEIGH), "no number alone"),
        (graph(POWER, MEAN, ROOT, "y = Mul(n, gate)"), "not one weight a channel"),
        (graph(POWER, MEAN, ROOT, "y = Neg(n)"), "not multiplied with a weight"),
        (graph(CENTRED[0], MEAN, CENTRED[1], WEIGH), "a LayerNormalization"),
        (graph(POWER, MEAN, ROOT, WEIGH, more=f", float[b,n,{SIZE}] p"), "squares are read elsewhere"),
        (graph(POWER, MEAN, ROOT, WEIGH, more=f", float[b,n,{SIZE}] n"), "or read before that"),
    ],
)
def test_left_alone_with_a_reason(model: ir.Model, reason: str) -> None:
    record = fused(model)
    assert not record.modified
    assert [skipped for _, skipped in record.skipped if reason in skipped], record.skipped


def test_another_power_is_no_candidate() -> None:
    record = fused(graph("p = Pow(x, three)", MEAN, ROOT, WEIGH))
    assert (record.applied, record.skipped, record.modified) == ((), (), False)


def test_a_target_without_the_kernel_keeps_it() -> None:
    model = graph(POWER, MEAN, ROOT, WEIGH)
    record = fused(model, Context(target=Target.openvino()))
    assert "has no kernel for RMSNormalization" in record.skipped[0][1]

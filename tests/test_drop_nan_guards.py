# SPDX-License-Identifier: Apache-2.0
"""Guards against NaN go where no NaN can come, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph

from splitfold.passes.magnitudes import Interval, Unbounded, interval
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.session import Session

LOWEST = float(np.finfo(np.float32).min)
HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'


def attention(mask: str, constants: str, inputs: str = "bool[b,3,4] seen") -> ir.Model:
    text = (
        f"net (float[b,3,8] q, float[b,8,4] k, {inputs}) => (float[b,3,4] y) <{constants}> {{"
        f"[a] s = MatMul(q, k) [b] {mask} [c] t = Add(s, m) [d] p = Softmax<axis = -1>(t) "
        "[e] n = IsNaN(p) [f] y = Where(n, zero, p) }"
    )
    return ir.from_proto(parse_graph(HEAD + text))


def ran(model: ir.Model) -> tuple[bool, str]:
    (record,) = Pipeline.parse("canonicalize,drop-nan-guards").run(model)[1:]
    return record.modified, " ".join(reason for _, reason in record.skipped)


def test_rows_that_see_no_key_stay_what_they_were_bit_for_bit() -> None:
    model = attention("m = Where(seen, zero, low)", f"float zero = {{0.0}}, float low = {{{LOWEST!r}}}")
    rng = np.random.default_rng(0)
    seen = rng.random((2, 3, 4)) > 0.4
    seen[0, 1] = False
    feeds = {
        "q": 100 * rng.standard_normal((2, 3, 8)).astype(np.float32),
        "k": rng.standard_normal((2, 8, 4)).astype(np.float32),
        "seen": seen,
    }
    before = Session(model.clone()).run(feeds)["y"]
    assert ran(model)[0]
    assert "IsNaN" not in {node.op_type for node in model.graph}
    after = Session(model).run(feeds)["y"]
    assert np.array_equal(before, after)
    np.testing.assert_array_equal(after[0, 1], 0.25)


@pytest.mark.parametrize(
    ("mask", "constants", "inputs", "reason"),
    [
        ("m = Where(seen, zero, low)", "float zero = {0.0}, float low = {-inf}", "", "a whole row"),
        (
            "u = Where(seen, zero, low) m = Add(u, u)",
            f"float zero = {{0.0}}, float low = {{{LOWEST!r}}}",
            "",
            "a whole row",
        ),
        ("m = Identity(given)", "float zero = {0.0}", "float[b,3,4] given", "input 'given' may hold"),
        ("m = Log(given)", "float zero = {0.0}", "float[b,3,4] given", "Log may give an infinity or NaN"),
        (
            "c = Cast<to = 1>(seen) m = Div(c, zero)",
            "float zero = {0.0}",
            "",
            "what 'm' is divided by may be zero",
        ),
        ("m = Where(seen, zero, low)", "float zero = {0.0}, float low = {nan}", "", "'low' holds NaN"),
    ],
)  # fmt: skip
def test_a_guard_that_may_act_stays(mask: str, constants: str, inputs: str, reason: str) -> None:
    model = attention(mask, constants, inputs or "bool[b,3,4] seen")
    modified, said = ran(model)
    assert not modified
    assert reason in said


def test_an_output_of_the_softmax_keeps_its_guard() -> None:
    text = (
        "net (float[b,4] x) => (float[b,4] y, float[b,4] p) <float zero = {0.0}> "
        "{ p = Softmax<axis = -1>(x) n = IsNaN(p) y = Where(n, zero, p) }"
    )
    assert not ran(ir.from_proto(parse_graph(HEAD + text)))[0]


def test_intervals_by_hand() -> None:
    text = (
        "net (float[b,4] x) => (float[b,4] y) <float[3] c = {-2.0, 1.0, 3.0}, float h = {0.5}, "
        f"float low = {{{LOWEST!r}}}, float[4,4] W = seeded> {{"
        "scaled = Mul(c, h) less = Sub(scaled, c) moved = Unsqueeze(less, axes) top = Max(less, h) "
        "r = MatMul(x, W) s = Add(r, low) twice = Add(s, low) p = Sigmoid(r) n = Neg(c) y = Identity(r) }"
    )
    text = text.replace("float h =", "int64[1] axes = {0}, float h =")
    model = ir.from_proto(parse_graph(HEAD + text))
    for node in model.graph:
        for value in node.outputs:
            value.dtype = ir.DataType.FLOAT
    values = {value.name: value for node in model.graph for value in node.outputs}
    found = {name: interval(value, {}) for name, value in values.items()}
    assert found["scaled"] == Interval(-1, 1.5)
    assert found["less"] == Interval(-4, 3.5)
    assert found["moved"] == found["less"]
    assert found["top"] == Interval(0.5, 3.5)
    assert found["n"] == Interval(-3, 2)
    assert found["p"] == Interval(0, 1)
    s, twice = found["s"], found["twice"]
    assert isinstance(s, Interval)
    assert s.finite  # 1e30 is less than half a step of float32 at its lowest number
    assert isinstance(twice, Interval)
    assert twice.low == -np.inf
    assert isinstance(interval(model.graph.inputs[0], {}), Unbounded)

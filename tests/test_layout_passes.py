# SPDX-License-Identifier: Apache-2.0
"""Passes that remove work around the arithmetic: exact on attention as exporters write it, and careful."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from real_minilm import minilm, sentences
from seeded import feeds_for, parse_graph

from splitfold.passes.base import Context
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.provenance import stands_for
from splitfold.runtime.session import Session

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'


def made(text: str) -> ir.Model:
    return ir.from_proto(parse_graph(HEAD + text))


def ran(model: ir.Model, steps: str) -> list[PassRecord]:
    return Pipeline.parse(steps).run(model, Context())


def same(text: str, steps: str, tolerance: float = 0.0) -> tuple[ir.Model, PassRecord]:
    """Run `steps` on a graph; outputs stay equal for two sizes of the batch."""
    before, after = made(text), made(text)
    record = ran(after, f"canonicalize,{steps}")[-1]
    for seed in range(2):
        feeds = feeds_for(before, seed=seed)
        one, two = Session(before).run(feeds), Session(after).run(feeds)
        for name in one:
            np.testing.assert_allclose(one[name], two[name], rtol=tolerance, atol=tolerance)
    return after, record


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# fold-multipliers

QUERY = (
    "net (float[b,4,8] x) => (float[b,2,4,3] y) <float[8,6] W = seeded, float[6] c = seeded, {more}"
    "int64[4] s = {{0, 4, 2, 3}}> {{ h = MatMul(x, W) {bias} r = Reshape(q, s) "
    "t = Transpose<perm = [0, 2, 1, 3]>(r) {end} }}"
)


@pytest.mark.parametrize(
    ("bias", "end", "more"),
    [
        ("q = Add(h, c)", "y = Mul(t, k)", "float k = {0.42}, "),
        ("q = Add(c, h)", "y = Mul(k, t)", "float[1] k = {-3.0}, "),
        ("q = Identity(h)", "y = Div(t, k)", "float k = {5.65}, "),
        ("q = Add(h, c)", "u = Mul(t, k) y = Mul(u, m)", "float k = {0.42}, float m = {7.0}, "),
    ],
)
def test_a_factor_goes_into_weight_and_bias(bias: str, end: str, more: str) -> None:
    model, record = same(QUERY.format(bias=bias, end=end, more=more), "fold-multipliers", 1e-5)
    assert record.modified
    assert not {"Mul", "Div"} & set(operators(model))


@pytest.mark.parametrize(
    "layer",
    [
        "net (float[b,8] x) => (float[b,3] y) <float[8,3] W = seeded, float[3] c = seeded, float k = {2.5}> "
        "{ h = Gemm(x, W, c) y = Mul(h, k) }",
        "net (float[1,4,6,6] x) => (float[1,6,4,4] y) <float[6,4,3,3] W = seeded, float[6] c = seeded, "
        "float k = {2.5}> { h = Conv(x, W, c) y = Div(h, k) }",
    ],
)
def test_gemm_and_conv_take_a_factor(layer: str) -> None:
    assert same(layer, "fold-multipliers", 1e-5)[1].modified


def test_a_shared_weight_stays_for_its_other_reader() -> None:
    text = (
        "net (float[b,8] x) => (float[b,8] y, float[b,8] z) <float[8,8] W = seeded, float k = {0.3}> "
        "{ h = MatMul(x, W) y = Mul(h, k) z = MatMul(x, W) }"
    )
    model, record = same(text, "fold-multipliers", 1e-5)
    assert record.modified
    assert len(model.graph.initializers) == 2


def test_what_changed_stands_for_nothing_and_the_product_for_itself() -> None:
    model, _ = same(
        QUERY.format(bias="q = Add(h, c)", end="y = Mul(t, k)", more="float k = {2.0}, "), "fold-multipliers"
    )
    assert [stands_for(node.outputs[0]) for node in model.graph] == [None, None, None, "y"]


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("h = MatMul(x, W) m = Mul(h, k) y = Add(m, h)", "float k = {0.3}"),
        ("h = MatMul(x, W) r = Relu(h) y = Mul(r, k)", "float k = {0.3}"),
        ("h = MatMul(x, W) y = Mul(h, k)", "float[8] k = seeded"),
        ("h = MatMul(x, W) y = Mul(h, k)", "float k = {0.0}"),
        ("h = MatMul(x, W) y = Div(k, h)", "float k = {2.0}"),
        ("h = MatMul(x, W) r = Add(h, x) y = Mul(r, k)", "float k = {2.0}"),
        ("h = MatMul(x, W) y = Mul(h, k)", "float k = {1e-44}"),
    ],
)
def test_factors_that_do_not_belong_to_a_layer_stay(body: str, constants: str) -> None:
    text = f"net (float[b,8] x) => (float[b,8] y) <float[8,8] W = seeded, {constants}> {{ {body} }}"
    model = made(text)
    assert not ran(model, "canonicalize,fold-multipliers")[-1].modified


# simplify-reshapes


@pytest.mark.parametrize(
    ("target", "constants", "found"),
    [
        ("s = Shape<start = 0, end = 2>(x) t = Concat<axis = 0>(s, h)", "int64[2] h = {2, 4}", [0, 0, 2, 4]),
        ("s = Shape<start = 0, end = 1>(x) t = Concat<axis = 0>(s, h)", "int64[2] h = {-1, 4}", [0, -1, 4]),
        (
            "s = Shape(x) a = Slice(s, z, o) c = Slice(s, o, e) t = Concat<axis = 0>(c, a)",
            "int64[1] z = {0}, int64[1] o = {1}, int64[1] e = {2}",
            [-1, -1],
        ),
    ],
)  # fmt: skip
def test_targets_are_said(target: str, constants: str, found: list[int]) -> None:
    rank = ",".join("abcd"[: len(found)])
    text = f"net (float[b,5,8] x) => (float[{rank}] y) <{constants}> {{ {target} y = Reshape(x, t) }}"
    if found == [-1, -1]:
        text = text.replace("float[b,5,8] x", "float[b,t] x")
        assert not ran(made(text), "canonicalize,simplify-reshapes")[-1].modified
        return
    model, record = same(text, "simplify-reshapes")
    assert record.modified
    assert operators(model) == ["Reshape"]
    reshape = model.graph.node(0)
    held = reshape.inputs[1]
    assert held is not None
    assert held.const_value is not None
    assert [int(item) for item in held.const_value.numpy()] in (found, [0, 5, 2, 4])


def test_an_empty_axis_is_not_taken_for_a_copy() -> None:
    text = (
        "net (float[0,b] x) => (float[a,c] y) <int64[1] z = {0}> "
        "{ s = Shape<start = 1, end = 2>(x) t = Concat<axis = 0>(s, z) y = Reshape<allowzero = 1>(x, t) }"
    )
    model = made(text)
    assert not ran(model, "simplify-reshapes")[-1].modified
    assert Session(model).run({"x": np.zeros((0, 3), np.float32)})["y"].shape == (3, 0)


# merge-transposes


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [([0, 2, 1, 3], [0, 1, 3, 2], 1), ([1, 0, 2, 3], [1, 0, 2, 3], 0), ([3, 1, 2, 0], [1, 2, 3, 0], 1)],
)
def test_two_transposes_are_one_or_none(first: list[int], second: list[int], count: int) -> None:
    text = (
        "net (float[2,3,4,5] x) => (float[a,c,d,e] y) { r = Relu(x) "
        f"t = Transpose<perm = {first}>(r) u = Transpose<perm = {second}>(t) y = Tanh(u) }}"
    )
    model, record = same(text, "merge-transposes")
    assert record.modified
    assert operators(model).count("Transpose") == count


def test_a_transpose_that_others_read_stays_for_them() -> None:
    text = (
        "net (float[2,3,4] x) => (float[3,4,2] y, float[3,2,4] z) "
        "{ t = Transpose<perm = [1, 0, 2]>(x) y = Transpose<perm = [0, 2, 1]>(t) z = Identity(t) }"
    )
    model, _ = same(text, "merge-transposes")
    assert operators(model).count("Transpose") == 2


@pytest.mark.parametrize(
    ("joined", "perm", "parted"),
    [("{-1, 4, 3}", [0, 2, 1], "{-1, 2, 4, 3}"), ("{-1, 3, 4}", [0, 2, 1], "{2, -1, 4, 3}")],
)
def test_reshapes_that_do_more_than_join_stay(joined: str, perm: list[int], parted: str) -> None:
    text = (
        "net (float[b,3,2,4] x) => (float[a,c,d,e] y) "
        f"<int64[3] j = {joined}, int64[4] p = {parted}> {{ t = Transpose<perm = [0, 2, 1, 3]>(x) "
        f"r = Reshape(t, j) u = Transpose<perm = {perm}>(r) y = Reshape(u, p) }}"
    )
    model, _ = same(text, "merge-transposes")
    assert operators(model).count("Reshape") == 2


# All of them


@pytest.mark.slow
def test_minilm_is_the_same_with_less_around_its_arithmetic() -> None:
    model = minilm().clone()
    plain = minilm().clone()
    ran(plain, "canonicalize")
    ran(model, "canonicalize,drop-nan-guards,simplify-reshapes,merge-transposes,fold-multipliers")
    counts, before = operators(model), operators(plain)
    assert not {"IsNaN", "Mul"} & set(counts)
    assert before.count("Transpose") - counts.count("Transpose") == 6
    assert before.count("Concat") - counts.count("Concat") > 12
    for feeds in sentences():
        one, two = Session(plain).run(feeds), Session(model).run(feeds)
        for name in one:
            np.testing.assert_allclose(one[name], two[name], atol=1e-4)

# SPDX-License-Identifier: Apache-2.0
"""Softplus, ReLU and linear attention give what their equations give, for any mask and without 0/0."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from attention_graphs import HEADS, KEYS, SIZE, Block, attention_graph, outputs, seeded_feeds
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import random_model
from seeded import parse_graph

from splitfold.passes.attention import find_attention
from splitfold.passes.base import Context, Outcome
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import SpecError
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Optimization


def run(text: str, model: ir.Model) -> Outcome:
    (step,) = Pipeline.parse(text)
    return step.run(model, Context())


def divided(a: Array, b: Array) -> Array:
    """a / b, with 0 / 0 = 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b > 0)


def heads(block: Block, feeds: Feeds, name: str) -> Array:
    x = feeds["x"].astype(np.float64) @ block.weights[name]
    return x.reshape(*x.shape[:2], HEADS, SIZE).swapaxes(1, 2)


def merged(block: Block, context: Array) -> Array:
    batch, _, time, _ = context.shape
    return np.asarray(context.swapaxes(1, 2).reshape(batch, time, -1) @ block.weights["D"])


def relu(block: Block, feeds: Feeds) -> Array:
    keep = feeds["keep"].astype(float)
    weights = np.maximum(block.logits(feeds), 0) * keep / np.maximum(keep.sum(-1, keepdims=True), 1)
    return merged(block, weights @ heads(block, feeds, "C"))


def softplus(block: Block, feeds: Feeds, power: int, free: int) -> Array:
    """LSSA and LSSAR as in section 3 of the paper, row by row."""
    q, k, v = (heads(block, feeds, name) for name in "ABC")
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    keep = np.broadcast_to(feeds["keep"], (len(q), HEADS, KEYS, KEYS))
    out = np.zeros_like(q)
    for place in np.ndindex(q.shape[:3]):
        row = keep[place]
        count = row.sum()
        if not count:
            continue
        scores = k[place[:2]] @ q[place]
        a = np.log1p(np.exp(np.log(SIZE) * np.log(count) * scores)) * row
        a /= a.sum()
        if power:
            a = np.maximum(a * count - (0 if place[2] < free else 1), 0) ** power
            a = divided(a, a.sum(keepdims=True))
        out[place] = a @ v[place[:2]]
    return merged(block, out)


def linear(block: Block, feeds: Feeds, floor: float) -> Array:
    q, k, v = (heads(block, feeds, name) for name in "ABC")
    q, k = np.maximum(block.scale * q, 0) / block.scale, np.maximum(k, 0)
    weights = (q @ k.swapaxes(-1, -2)) * feeds["keep"]
    return merged(block, (weights @ v) / np.maximum(weights.sum(-1, keepdims=True), floor))


CASES = {
    "by=relu": relu,
    "by=softplus,power=0": lambda block, feeds: softplus(block, feeds, 0, 3),
    "by=softplus": lambda block, feeds: softplus(block, feeds, 15, 3),
    "by=softplus,power=3,free=1": lambda block, feeds: softplus(block, feeds, 3, 1),
    "by=linear": lambda block, feeds: linear(block, feeds, 1e-6),
    "by=linear,floor=100": lambda block, feeds: linear(block, feeds, 100),
}


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("keys", [KEYS, "time"])
@pytest.mark.parametrize("low", [-3.4e38, -1e4])
def test_the_equations(options: str, keys: str | int, low: float) -> None:
    model, block = attention_graph(keys=keys, low=low)
    done = run(f"replace-softmax{{{options}}}", model)
    assert len(done.findings.applied) == 1
    for seed in range(3):
        feeds = seeded_feeds(seed, empty_rows=seed == 2)
        expected = CASES[options](block, feeds)
        for optimization in Optimization:
            (actual,) = outputs(model, feeds, optimization=optimization)
            np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("options", CASES)
def test_rows_without_a_key_and_inputs_of_zero_stay_finite(options: str) -> None:
    model, _ = attention_graph(guard=True)
    run(f"replace-softmax{{{options}}}", model)
    feeds = seeded_feeds(empty_rows=True)
    empty = ~feeds["keep"].any(-1)[:, 0]
    (actual,) = outputs(model, feeds)
    assert np.isfinite(actual).all()
    assert not actual[empty].any()
    for x in (np.zeros_like(feeds["x"]), 1e4 * feeds["x"], 1e-20 * feeds["x"]):
        assert np.isfinite(outputs(model, {**feeds, "x": x})[0]).all()


def test_re_weighting_overflows_nothing_in_long_rows() -> None:
    """N^15 is above the largest float32 from 512 keys on."""
    keys = 600
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    net (float[1,{keys},4] q, float[1,4,{keys}] k, float[1,{keys},2] v) => (float[1,{keys},2] y)
    {{ [scores] s = MatMul(q, k)
       [attention] p = Softmax<axis = -1>(s)
       [context] y = MatMul(p, v) }}"""
    model = ir.from_proto(parse_graph(text))
    CanonicalizePass()(model)
    run("replace-softmax{by=softplus}", model)
    key = np.zeros((1, 4, keys), np.float32)
    key[0, 0], key[0, 0, 7] = -1, 1  # one key that all look at
    query = np.zeros((1, keys, 4), np.float32)
    query[..., 0] = 1
    v = np.random.default_rng(0).standard_normal((1, keys, 2)).astype(np.float32)
    (actual,) = outputs(model, {"q": query, "k": key, "v": v})
    np.testing.assert_allclose(actual[0], np.repeat(v[0, 7:8], keys, 0), rtol=1e-5)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 99))
def test_linear_attention_is_the_same_in_both_orders(seed: int) -> None:
    """(q k^T) v = q (k^T v): a mask that is written for each query keeps the first order."""
    feeds = seeded_feeds(seed)
    slow, _ = attention_graph()
    run("replace-softmax{by=linear}", slow)
    assert any(node.op_type == "MatMul" and node.inputs[0].name == "c.mul" for node in slow.graph)  # type: ignore[union-attr]
    text = ir.to_proto(attention_graph()[0])
    del text.graph.input[1].type.tensor_type.shape.dim[2:]
    for size in (1, KEYS):
        text.graph.input[1].type.tensor_type.shape.dim.add().dim_value = size
    fast = ir.from_proto(text)
    for node in fast.graph:
        for value in node.outputs:
            value.shape = None
    CanonicalizePass()(fast)
    run("replace-softmax{by=linear}", fast)
    products = [node for node in fast.graph if node.op_type == "MatMul"]
    assert not any(
        value.shape is not None and tuple(value.shape)[-2:] == (KEYS, KEYS)
        for node in products
        for value in node.outputs
    )
    expected = outputs(slow, feeds)[0]
    actual = outputs(fast, {**feeds, "keep": feeds["keep"][:, :, :1]})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_what_is_not_read_any_more_goes() -> None:
    for by in ("softplus", "relu", "linear"):
        model, _ = attention_graph()
        run(f"replace-softmax{{by={by}}}", model)
        operators = {node.op_type for node in model.graph}
        assert "Softmax" not in operators
        assert not find_attention(model).blocks
        assert not run(f"replace-softmax{{by={by}}}", model).modified
        assert not [n for n in model.graph if not any(o.uses() or o.is_graph_output() for o in n.outputs)]


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("by=sigmoid", "sigmoid"),
        ("power=-1", "power is -1"),
        ("free=-1", "free is -1"),
        ("floor=0", "floor is 0"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse(f"replace-softmax{{{options}}}")


def test_a_clipped_softmax_stays() -> None:
    model, _ = attention_graph()
    run("clip-softmax{gamma=-0.1}", model)
    done = run("replace-softmax", model)
    assert not done.modified
    assert "clipped" in done.findings.skipped[0][1]


def test_random_graphs_have_no_attention() -> None:
    for seed in range(20):
        model = random_model(seed)
        CanonicalizePass()(model)
        assert not run("replace-softmax", model).modified

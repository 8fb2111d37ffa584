# SPDX-License-Identifier: Apache-2.0
"""Heads side by side: attention and rotary positions by their formulas, and left alone where heads are read
on their axis."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from splitfold.passes.attention import find_attention
from splitfold.passes.base import Context
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Optimization, Session

HEADS, KEPT, SIZE, SCALE = 6, 2, 4, 0.3
SPLIT = """
    q4 = Reshape(q, six) k4 = Reshape(k, two) v4 = Reshape(v, two)
    qh = Transpose<perm = [0, 2, 1, 3]>(q4) kh = Transpose<perm = [0, 2, 1, 3]>(k4)
    vh = Transpose<perm = [0, 2, 1, 3]>(v4)
"""
ROTARY = "qr = RotaryEmbedding(qh, cos, sin) kr = RotaryEmbedding(kh, cos, sin)"
PLAIN = "qr = Identity(qh) kr = Identity(kh) used = Add(cos, sin)"
ATTENTION = f"c, keys, values = Attention<scale = {SCALE}>(qr, kr, vh, mask, past_k, past_v)"
MERGE = "t = Transpose<perm = [0, 2, 1, 3]>(c) y = Reshape(t, whole)"


def graph(*, split: str = SPLIT, rotary: str = ROTARY, merge: str = MERGE, more: str = "") -> ir.Model:
    wide, narrow = HEADS * SIZE, KEPT * SIZE
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["": 23]>
        net (float[b,n,{wide}] q, float[b,n,{narrow}] k, float[b,n,{narrow}] v, float[b,1,n,a] mask,
             float[b,{KEPT},p,{SIZE}] past_k, float[b,{KEPT},p,{SIZE}] past_v,
             float[b,n,{SIZE // 2}] cos, float[b,n,{SIZE // 2}] sin)
        => (float[b,n,{wide}] y, float[b,{KEPT},a,{SIZE}] keys, float[b,{KEPT},a,{SIZE}] values)
        <int64[4] six = {{0, 0, {HEADS}, -1}}, int64[4] two = {{0, 0, {KEPT}, {SIZE}}},
         int64[4] four = {{0, 0, 4, 2}}, int64[2] rows = {{-1, {wide}}},
         int64[3] whole = {{0, 0, {wide}}}>
        {{ {split} {rotary} {ATTENTION} {merge} {more} }}
    """)
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return model


def feeds(past: int, new: int, batch: int = 2) -> dict[str, Array]:
    rng = np.random.default_rng(past)
    angles = rng.uniform(0, 6, (batch, new, SIZE // 2))
    mask = np.triu(np.full((new, past + new), -np.inf, np.float32), past + 1)
    padded = np.repeat(mask[None, None], batch, 0)
    padded[1, :, :, : past // 2] = np.finfo(np.float32).min
    drawn = {
        "q": (new, HEADS * SIZE), "k": (new, KEPT * SIZE), "v": (new, KEPT * SIZE),
        "past_k": (KEPT, past, SIZE), "past_v": (KEPT, past, SIZE),
    }  # fmt: skip
    found = {name: rng.standard_normal((batch, *shape)) for name, shape in drawn.items()}
    found |= {"cos": np.cos(angles), "sin": np.sin(angles), "mask": padded}
    return {name: array.astype(np.float32) for name, array in found.items()}


def formula(given: dict[str, Array], *, turned: bool) -> tuple[Array, Array, Array]:
    """Return attention over past and new positions, all keys and all values (arXiv:2104.09864, eq. 34, where
    queries and keys are turned)."""
    query, new_key, new_value = (
        given[name].reshape(*given[name].shape[:2], heads, SIZE).swapaxes(1, 2)
        for name, heads in (("q", HEADS), ("k", KEPT), ("v", KEPT))
    )
    if turned:
        query, new_key = (_turned(x, given["cos"][:, None], given["sin"][:, None]) for x in (query, new_key))
    keys = np.concatenate([given["past_k"], new_key], 2)
    values = np.concatenate([given["past_v"], new_value], 2)
    each = HEADS // KEPT
    scores = SCALE * query @ keys.repeat(each, 1).swapaxes(2, 3) + given["mask"]
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    context = powers / powers.sum(-1, keepdims=True) @ values.repeat(each, 1)
    return context.swapaxes(1, 2).reshape(given["q"].shape), keys, values


def _turned(x: Array, cos: Array, sin: Array) -> Array:
    left, right = np.split(x, 2, -1)
    return np.concatenate([cos * left - sin * right, sin * left + cos * right], -1)


def flattened(model: ir.Model) -> PassRecord:
    return Pipeline.parse("canonicalize,flatten-heads").run(model, Context())[-1]


@pytest.mark.parametrize("optimization", list(Optimization))
@pytest.mark.parametrize("rotary", [ROTARY, PLAIN], ids=["rotary", "plain"])
def test_the_operators_compute_the_formula(rotary: str, optimization: Optimization) -> None:
    model = graph(rotary=rotary)
    assert flattened(model).applied == (("node_c", f"{HEADS} heads side by side"),)
    turns = 2 if rotary is ROTARY else 0
    expected_types = Counter({"RotaryEmbedding": turns, "Attention": 1})
    assert Counter(node.op_type for node in model.graph) == +expected_types
    session = Session(model, optimization=optimization)
    for past, new in ((0, 5), (5, 1), (7, 3)):
        given = feeds(past, new)
        found = session.run(given)
        assert list(found) == ["y", "keys", "values"]
        for actual, expected in zip(found.values(), formula(given, turned=rotary is ROTARY), strict=True):
            np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_a_reshape_to_rows_stays() -> None:
    """As before a Gemm, which reads [batch * positions, channels]."""
    model = graph(
        merge="t = Transpose<perm = [0, 2, 1, 3]>(c) r = Reshape(t, rows)"
        " n = Neg(r) o = Neg(n) h = Shape(q) y = Reshape(o, h)"
    )
    assert flattened(model).applied
    kinds = Counter(node.op_type for node in model.graph)
    assert (kinds["Attention"], kinds["Transpose"], kinds["Reshape"]) == (1, 0, 2)
    given = feeds(5, 2)
    found = Session(model).run(given)
    for actual, expected in zip(found.values(), formula(given, turned=True), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_a_block_is_read_as_before() -> None:
    model = graph()
    (before,) = find_attention(model).blocks
    flattened(model)
    (after,) = find_attention(model).blocks
    assert str(after) == str(before)
    assert (after.layout.count, after.layout.kv_count, after.layout.value_size) == (HEADS, KEPT, SIZE)
    assert after.is_rotary
    assert after.merged is model.graph.outputs[0]


def test_it_lifts() -> None:
    pytest.importorskip("torch", reason="lifting needs the extra 'torch'")
    from lifting import largest_difference

    model = graph()
    flattened(model)
    assert largest_difference(model, feeds(4, 2)) < 2e-5


def test_a_second_run_finds_nothing() -> None:
    model = graph()
    flattened(model)
    record = flattened(model)
    assert not record.modified
    assert not record.skipped


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (graph(more="z = Neg(kr)"), "its keys with an axis of heads are read elsewhere too"),
        (graph(more="z = Neg(kh)"), "its keys with an axis of heads are read elsewhere too"),
        (graph(more="z = Neg(c)"), "its heads are not merged by a Transpose and a Reshape that alone"),
        (
            graph(rotary=ROTARY.replace("RotaryEmbedding(qh, cos, sin)", "Neg(qh)")),
            "its queries are not split",
        ),
        (graph(merge="y = Reshape(c, whole)"), "its heads are not merged by a Transpose"),
        (graph(split=SPLIT.replace("[0, 2, 1, 3]>(k4)", "[0, 1, 2, 3]>(k4)")), "its keys are not split"),
    ],
)
def test_left_alone_with_a_reason(model: ir.Model, reason: str) -> None:
    for node in model.graph:
        if node.op_type == "Neg" and not node.outputs[0].uses():
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(node.outputs[0])
    record = flattened(model)
    assert not record.modified
    assert reason in record.skipped[0][1]


def test_heads_that_do_not_fit_each_other_stay() -> None:
    """Keys are split into four heads of two, beside queries of four and two heads of values."""
    model = graph(split=SPLIT.replace("Reshape(k, two)", "Reshape(k, four)"))
    record = flattened(model)
    assert not record.modified
    assert record.skipped[0][1] == (
        "6 heads of queries of 4, 4 of keys of 2 and 2 of values do not fit each other"
    )

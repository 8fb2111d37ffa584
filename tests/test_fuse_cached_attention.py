# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache as one operator: the numbers of the formula, and left alone where it is another."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from splitfold.passes.base import Context
from splitfold.passes.opset import default_opset
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

HEADS, KEPT, SIZE, SCALE = 6, 2, 4, 0.3
JOIN = """
    keys = Concat<axis = 2>(past_k, k) values = Concat<axis = -2>(past_v, v)
    mask = Concat<axis = 3>(past_mask, new_mask)
"""
REPEAT = """
    k5 = Unsqueeze(keys, two) v5 = Unsqueeze(values, two)
    kg = Expand(k5, groups) vg = Expand(v5, groups)
    kr = Reshape(kg, heads) vr = Reshape(vg, heads)
"""
TILE = REPEAT.replace("two", "one").replace("groups", "tiles")
"""Heads are repeated one round after the other, not each beside itself."""
SCORES = """
    kt = Transpose<perm = [0, 1, 3, 2]>(kr) s = MatMul(q, kt) t = Mul(s, scale) m = Add(t, mask)
    p = Softmax<axis = -1>(m) y = MatMul(p, vr)
"""


def graph(*, repeat: str = REPEAT, scores: str = SCORES, opset: int = 23, more: str = "") -> ir.Model:
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["": {opset}]>
        net (float[b,{HEADS},n,{SIZE}] q, float[b,{KEPT},n,{SIZE}] k, float[b,{KEPT},n,{SIZE}] v,
             float[b,1,n,p] past_mask, float[b,1,n,n] new_mask,
             float[b,{KEPT},p,{SIZE}] past_k, float[b,{KEPT},p,{SIZE}] past_v)
        => (float[b,{HEADS},n,{SIZE}] y, float[b,{KEPT},a,{SIZE}] keys, float[b,{KEPT},a,{SIZE}] values)
        <int64[1] one = {{1}}, int64[1] two = {{2}}, float scale = {{{SCALE}}},
         int64[5] groups = {{1, 1, {HEADS // KEPT}, 1, 1}}, int64[5] tiles = {{1, {HEADS // KEPT}, 1, 1, 1}},
         int64[4] heads = {{0, {HEADS}, -1, {SIZE}}}>
        {{ {JOIN} {repeat} {scores} {more} }}
    """)
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return model


def feeds(past: int, new: int, batch: int = 2) -> dict[str, Array]:
    rng = np.random.default_rng(past)
    shapes = {
        "q": (HEADS, new), "k": (KEPT, new), "v": (KEPT, new), "past_k": (KEPT, past), "past_v": (KEPT, past),
    }  # fmt: skip
    drawn = {
        name: rng.standard_normal((batch, *shape, SIZE)).astype(np.float32) for name, shape in shapes.items()
    }
    mask = np.triu(np.full((new, past + new), -np.inf, np.float32), past + 1)
    padded = np.repeat(mask[None, None], batch, 0)
    padded[1, :, :, : past // 2] = np.finfo(np.float32).min
    return drawn | {"past_mask": padded[..., :past], "new_mask": padded[..., past:]}


def formula(given: dict[str, Array]) -> tuple[Array, Array, Array]:
    keys = np.concatenate([given["past_k"], given["k"]], 2)
    values = np.concatenate([given["past_v"], given["v"]], 2)
    mask = np.concatenate([given["past_mask"], given["new_mask"]], 3)
    each = HEADS // KEPT
    scores = SCALE * given["q"] @ keys.repeat(each, 1).swapaxes(2, 3) + mask
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True) @ values.repeat(each, 1), keys, values


def fused(model: ir.Model) -> PassRecord:
    return Pipeline.parse("canonicalize,fuse-cached-attention").run(model, Context())[-1]


@pytest.mark.parametrize("optimization", list(Optimization))
@pytest.mark.parametrize("opset", [20, 23])
def test_the_operator_computes_the_formula(opset: int, optimization: Optimization) -> None:
    model = graph(opset=opset)
    assert fused(model).applied == (("node_p", f"one Attention of {HEADS} heads over its cache"),)
    assert [node.op_type for node in model.graph] == ["Concat", "Attention"]
    assert default_opset(model) == 23
    session = Session(model, optimization=optimization)
    for past, new in ((0, 5), (5, 1), (7, 3)):
        given = feeds(past, new)
        found = session.run(given)
        assert list(found) == ["y", "keys", "values"]
        for actual, expected in zip(found.values(), formula(given), strict=True):
            np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_a_second_run_finds_nothing() -> None:
    model = graph()
    fused(model)
    assert not fused(model).modified


CAPPED = SCORES.replace(
    "m = Add(t, mask)", "u = Div(t, scale) h = Tanh(u) c = Mul(h, scale) m = Add(c, mask)"
)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (graph(repeat=TILE), "heads repeated at most"),
        (graph(scores=CAPPED), "its scores are capped"),
    ],
)
def test_left_alone_with_a_reason(model: ir.Model, reason: str) -> None:
    record = fused(model)
    assert not record.modified
    assert reason in record.skipped[0][1]


def test_a_cache_that_is_read_elsewhere_stays() -> None:
    model = graph(more="z = Neg(keys)")
    read = next(node.outputs[0] for node in model.graph if node.op_type == "Neg")
    read.type, read.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", KEPT, "a", SIZE])
    model.graph.outputs.append(read)
    assert "also read elsewhere" in fused(model).skipped[0][1]


def test_new_positions_before_the_past_stay() -> None:
    model = graph()
    join = next(node for node in model.graph if node.op_type == "Concat")
    past, new = join.inputs
    join.replace_input_with(0, new)
    join.replace_input_with(1, past)
    assert not fused(model).modified


def test_a_target_without_the_operator_keeps_it_written_out() -> None:
    model = graph(opset=20)
    steps = Pipeline.parse("canonicalize,fuse-cached-attention")
    record = steps.run(model, Context(target=Target.openvino()))[-1]
    assert not record.modified
    assert record.skipped == (("node_p", "target openvino has no kernel for Attention"),)
    assert default_opset(model) == 20

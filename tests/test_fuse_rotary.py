# SPDX-License-Identifier: Apache-2.0
"""Rotary positions as one operator: the numbers of the formula, and left alone where it is another."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from decoders import VOCABULARY, captured

from splitfold.compiler.presets import exact
from splitfold.passes.attention import find_attention
from splitfold.passes.base import Context
from splitfold.passes.opset import default_opset
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.provenance import stands_for
from splitfold.runtime.feeds import Array
from splitfold.runtime.lift import lift
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

HEADS, SIZE, NUMBER = 3, 8, 0.75
ATTENTION_FIRST = "fuse-cached-attention,fuse-rotary,fuse-norms"
TABLES = """
    angles = Concat<axis = -1>(f, f) cosines = Cos(angles) sines = Sin(angles)
    scaled = Mul(number, cosines) c = Unsqueeze(scaled, one) s = Unsqueeze(sines, one)
"""
TURN = """
    x1 = Slice(x, zero, half, last) x2 = Slice(x, half, end, last, one) m = Neg(x2)
    t = Concat<axis = -1>(m, x1) a = Mul(c, x) b = Mul(t, s) y = Add(b, a)
"""
PARTIAL = """
    p = Slice(x, zero, size, last) rest = Slice(x, size, end, last)
    p1, p2 = Split<axis = 3, num_outputs = 2>(p)
    m = Neg(p2) t = Concat<axis = 3>(m, p1) a = Mul(p, c) b = Mul(s, t) z = Add(a, b)
    y = Concat<axis = 3>(z, rest)
"""


def graph(
    *, tables: str = TABLES, turn: str = TURN, wide: int = SIZE, opset: int = 20, rows: str = "b"
) -> ir.Model:
    """Return x of heads of `wide` elements, of which `SIZE` are turned by angles f of `rows` rows."""
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["": {opset}]>
        net (float[b,{HEADS},n,{wide}] x, float[{rows},n,{SIZE // 2}] f, float[{rows},n,{SIZE // 2}] g)
        => (float[b,{HEADS},n,{wide}] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] last = {{-1}},
         int64[1] half = {{{SIZE // 2}}}, int64[1] size = {{{SIZE}}}, int64[1] end = {{9223372036854775807}},
         float number = {{{NUMBER}}}>
        {{ {tables} {turn} }}
    """)
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return model


def feeds(wide: int = SIZE, batch: int = 2, new: int = 5) -> dict[str, Array]:
    rng = np.random.default_rng(new)
    shapes = {"x": (batch, HEADS, new, wide), "f": (batch, new, SIZE // 2), "g": (batch, new, SIZE // 2)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def formula(given: dict[str, Array]) -> Array:
    """Return each pair (x[i], x[i + d/2]) turned by its angle, as complex numbers (arXiv:2104.09864, eq. 13),
    but for the number that cosines are multiplied with."""
    x, angle = given["x"].astype(np.float64), given["f"][:, None].astype(np.float64)
    pairs = x[..., : SIZE // 2] + 1j * x[..., SIZE // 2 : SIZE]
    turned = pairs * (NUMBER * np.cos(angle) + 1j * np.sin(angle))
    return np.concatenate([turned.real, turned.imag, x[..., SIZE:]], -1)


def fused(model: ir.Model, context: Context | None = None) -> PassRecord:
    return Pipeline.parse("canonicalize,fuse-rotary").run(model, context or Context())[-1]


@pytest.mark.parametrize("optimization", list(Optimization))
@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize(("turn", "wide"), [(TURN, SIZE), (PARTIAL, SIZE + 6)])
def test_the_operator_computes_the_formula(
    turn: str, wide: int, opset: int, optimization: Optimization
) -> None:
    model = graph(turn=turn, wide=wide, opset=opset)
    assert len(fused(model).applied) == 1
    assert sorted(node.op_type for node in model.graph) == ["Cos", "Mul", "RotaryEmbedding", "Sin"]
    assert default_opset(model) == 23
    session = Session(model, optimization=optimization)
    for batch, new in ((2, 5), (1, 1), (3, 2)):
        given = feeds(wide, batch, new)
        np.testing.assert_allclose(session.run(given)["y"], formula(given), atol=2e-6)


def test_torch_computes_the_same() -> None:
    model = graph(turn=PARTIAL, wide=SIZE + 6)
    fused(model)
    given = feeds(SIZE + 6)
    np.testing.assert_allclose(lift(model).run(given)["y"], formula(given), atol=2e-6)


def test_halves_are_computed_once_and_stand_for_nothing() -> None:
    second = re.sub(r"\b(x1|x2|m|t|a|b)\b", r"\1_", TURN)
    second = re.sub(r"\bx\b", "h", second).replace("y = ", "w = ")
    both = TURN.replace("y = ", "h = ") + second + " y = Neg(w)"
    model = graph(turn=both)
    assert len(fused(model).applied) == 2
    kinds = [node.op_type for node in model.graph]
    assert (kinds.count("Cos"), kinds.count("Sin"), kinds.count("RotaryEmbedding")) == (1, 1, 2)
    stands = {node.op_type: stands_for(node.outputs[0]) for node in model.graph}
    assert (stands["Cos"], stands["Sin"], stands["RotaryEmbedding"]) == (None, None, "w")
    given = feeds()
    expected = -formula(given | {"x": formula(given).astype(np.float32)})
    np.testing.assert_allclose(Session(model).run(given)["y"], expected, atol=4e-6)


def test_a_second_run_finds_nothing() -> None:
    model = graph()
    fused(model)
    assert not fused(model).modified


OTHER_SIGN = TURN.replace("m = Neg(x2)", "m = Neg(x1)").replace("(m, x1)", "(m, x2)")
UNEQUAL = TURN.replace("half, last)", "one, last)").replace("(x, half, end", "(x, one, end")
OTHER_X = TURN.replace("a = Mul(c, x)", "h = Neg(x) a = Mul(c, h)")
NO_SIZE = TABLES.replace("(f, f)", "(f, g)")
BY_PLACE = TABLES.replace("scaled = Mul(number, cosines)", "scaled = Mul(sines, cosines)")
AFTER_HEADS = TABLES.replace("c = Unsqueeze(scaled, one)", "c = Unsqueeze(scaled, two)")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (graph(tables=NO_SIZE), "halves of its cosines and of its sines are equal"),
        (graph(tables=BY_PLACE), "halves of its cosines and of its sines are equal"),
        (graph(tables=AFTER_HEADS, rows="n"), "halves of its cosines and of its sines are equal"),
        (graph(rows="1"), "the batch and the positions"),
        (graph(rows="other"), "the batch and the positions"),
        (graph(turn=OTHER_SIGN), "does not turn the two halves"),
        (graph(turn=UNEQUAL), "does not turn the two halves"),
        (graph(turn=OTHER_X), "does not turn the two halves"),
    ],
)
def test_left_alone_with_a_reason(model: ir.Model, reason: str) -> None:
    record = fused(model)
    assert not record.modified
    assert [skipped for _, skipped in record.skipped if reason in skipped]


def test_neighbours_turned_in_pairs_are_no_candidates() -> None:
    turn = """
        x1 = Slice(x, zero, end, last, two) x2 = Slice(x, one, end, last, two) m = Neg(x2)
        u = Unsqueeze(m, last) v = Unsqueeze(x1, last) w = Concat<axis = -1>(u, v) h = Shape(x)
        t = Reshape(w, h) a = Mul(c, x) b = Mul(t, s) y = Add(b, a)
    """
    record = fused(graph(turn=turn))
    assert (record.applied, record.skipped, record.modified) == ((), (), False)


def test_a_target_of_an_older_opset_keeps_it() -> None:
    model = graph()
    record = fused(model, Context(target=replace(Target.cpu(), opset=20)))
    assert "RotaryEmbedding needs opset 23" in record.skipped[0][1]
    assert default_opset(model) == 20


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("last", ["fuse-norms,fuse-rotary,fuse-cached-attention", ATTENTION_FIRST])
def test_a_decoder_keeps_its_logits(name: str, last: str) -> None:
    before, model = captured(name), captured(name)
    Pipeline.of(*exact(), *Pipeline.parse(f"{last},merge-projections")).run(model, Context())
    kinds = Counter(node.op_type for node in model.graph)
    layers = kinds["Attention"]
    assert layers
    assert (kinds["RotaryEmbedding"], kinds["RMSNormalization"]) == (2 * layers, 2 * layers + 1)
    assert (kinds["Cos"], kinds["Sin"], kinds["Neg"], kinds["Pow"]) == (1, 1, 0, 0)
    blocks = find_attention(model).blocks
    assert [block.query.rotary is not None for block in blocks] == [True] * layers
    for past, new in ((0, 5), (6, 1)):
        given = decoder_feeds(before, past, new)
        expected = Session(before).run(given)
        torch_found = lift(model).run(given)
        for key, found in Session(model).run(given).items():
            np.testing.assert_allclose(found, expected[key], atol=1e-4)
            np.testing.assert_allclose(torch_found[key].detach(), expected[key], atol=1e-4)


def decoder_feeds(model: ir.Model, past: int, new: int) -> dict[str, Array]:
    rng = np.random.default_rng(past)
    sizes = {"batch": 2, "past": past, "sequence": new, "past + sequence": past + new}
    found: dict[str, Array] = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape or ()]
        drawn: dict[str, Array] = {
            "input_ids": rng.integers(0, VOCABULARY, shape),
            "attention_mask": np.ones(shape, np.int64),
        }
        found[value.name or ""] = drawn.get(value.name or "", rng.standard_normal(shape).astype(np.float32))
    return found

# SPDX-License-Identifier: Apache-2.0
"""Clipped softmax gives what the paper's equation gives, zeros included, and its range is known."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from attention_graphs import KEYS, attention_graph, numpy_softmax, outputs, seeded_feeds
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import random_model

from splitfold.passes.attention import find_attention
from splitfold.passes.base import Context, Outcome
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import PassFailedError, SpecError
from splitfold.passes.known_ranges import known_ranges
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.provenance import stands_for
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Optimization


def run(text: str, model: ir.Model) -> Outcome:
    (step,) = Pipeline.parse(text)
    return step.run(model, Context())


def clipped(x: Array, gamma: float, zeta: float) -> Array:
    """Equation 4 of the paper, with the softmax of an empty row set to zero before."""
    return np.asarray(np.clip((zeta - gamma) * np.nan_to_num(numpy_softmax(x)) + gamma, 0, 1))


@settings(deadline=None, max_examples=12)
@given(st.floats(-0.5, 0), st.floats(1, 1.5), st.integers(0, 9))
def test_the_equation(gamma: float, zeta: float, seed: int) -> None:
    model, block = attention_graph()
    feeds = seeded_feeds(seed)
    run(f"clip-softmax{{gamma={gamma:.6f},zeta={zeta:.6f}}}", model)
    expected, _ = block(feeds, lambda x: clipped(x, round(gamma, 6), round(zeta, 6)))
    for optimization in Optimization:
        (actual,) = outputs(model, feeds, optimization=optimization)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_alpha_over_the_number_of_keys() -> None:
    model, block = attention_graph()
    feeds = seeded_feeds()
    done = run("clip-softmax{alpha=2}", model)
    assert done.findings.applied == [("attention", "softmax clipped: gamma=-0.3333, zeta=1")]
    (actual,) = outputs(model, feeds)
    np.testing.assert_allclose(
        actual, block(feeds, lambda x: clipped(x, -2 / KEYS, 1))[0], rtol=1e-4, atol=1e-5
    )
    told = find_attention(model).blocks[0].probabilities
    assert told is not None
    assert told.clipping is not None
    assert told.clipping.gamma == pytest.approx(-2 / KEYS)
    assert told.clipping.zeta == pytest.approx(1)


@pytest.mark.parametrize(("low", "guard"), [(-np.inf, True), (-3.4e38, False), (-1e4, False)])
def test_rows_without_a_key_are_zero(low: float, guard: bool) -> None:
    model, block = attention_graph(low=-3.4e38 if np.isinf(low) else low, guard=guard)
    if np.isinf(low):
        model.graph.initializers["low"].const_value = ir.tensor(np.float32(-np.inf), name="low")
        block = type(block)(block.weights, block.scale, low)
    feeds = seeded_feeds(empty_rows=True)
    run("clip-softmax{alpha=3}", model)
    told = find_attention(model).blocks[0].probabilities
    assert told is not None
    actual, probabilities = outputs(model, feeds, told.read.name or "")
    assert np.isfinite(actual).all()
    empty = ~feeds["keep"].any(-1)[:, 0]
    assert empty.any()
    if low < -1e5:  # a softmax sees through a mask that only lowers all logits of a row
        assert not probabilities.swapaxes(1, 2)[empty].any()
    np.testing.assert_allclose(
        actual,
        block(feeds, lambda x: clipped(x, -3 / KEYS, 1))[0],
        rtol=1e-4,
        atol=1e-5 if low < -1e5 else 1e-3,  # float32 near 1e4
    )


def test_exact_zeros_and_ones() -> None:
    model, _ = attention_graph()
    feeds = seeded_feeds()
    feeds = {**feeds, "x": 8 * feeds["x"]}
    run("clip-softmax{gamma=-0.2,zeta=1.2}", model)
    told = find_attention(model).blocks[0].probabilities
    assert told is not None
    soft, hard = outputs(model, feeds, told.softmax.name or "", told.read.name or "")[1:]
    # zero where p <= -gamma / (zeta - gamma), one where p >= (1 - gamma) / (zeta - gamma)
    assert ((hard == 0) == (soft <= 0.2 / 1.4)).all()
    assert ((hard == 1) == (soft >= 1.2 / 1.4)).all()
    assert 0 < (hard == 1).mean() < (hard == 0).mean() < 1


@pytest.mark.parametrize("text", ["clip-softmax{gamma=0}", "clip-softmax{alpha=0,length=4}"])
def test_gamma_0_and_zeta_1_change_no_bit(text: str) -> None:
    model, _ = attention_graph()
    feeds = seeded_feeds()
    before = outputs(model, feeds)
    done = run(text, model)
    assert not done.modified
    assert done.findings.skipped == [("attention", "gamma=0 and zeta=1 leave a softmax as it is")]
    assert outputs(model, feeds)[0].tobytes() == before[0].tobytes()


def test_the_operator_itself_is_the_identity_there() -> None:
    """What gamma -> 0 leads to: the limit is reached in the kernel too, bit for bit."""
    model, _ = attention_graph()
    feeds = seeded_feeds()
    before = outputs(model, feeds)
    run("clip-softmax{gamma=-0.1}", model)
    (node,) = [node for node in model.graph if node.op_type == "HardSigmoid"]
    node.attributes["alpha"], node.attributes["beta"] = (
        ir.AttrFloat32("alpha", 1.0),
        ir.AttrFloat32("beta", 0.0),
    )
    assert outputs(model, feeds)[0].tobytes() == before[0].tobytes()


def test_a_length_that_changes_from_call_to_call() -> None:
    model, block = attention_graph(keys="time")
    done = run("clip-softmax", model)
    assert not done.modified
    ((name, reason),) = done.findings.skipped
    assert name == "attention"
    assert "(time) changes from call to call" in reason
    assert "give length" in reason
    assert run("clip-softmax{alpha=2,length=16}", model).modified
    for keys in (3, 6):
        feeds = seeded_feeds(keys=keys)
        expected = block(feeds, lambda x: clipped(x, -2 / 16, 1))[0]
        np.testing.assert_allclose(outputs(model, feeds)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_second_run_and_names() -> None:
    model, _ = attention_graph()
    assert run("clip-softmax{gamma=-0.1}", model).modified
    again = run("clip-softmax{gamma=-0.2}", model)
    assert not again.modified
    assert again.findings.skipped == [("attention", "clipped already: gamma=-0.1, zeta=1")]
    (node,) = [node for node in model.graph if node.op_type == "HardSigmoid"]
    assert stands_for(node.outputs[0]) == "p"


def test_a_clip_that_somebody_else_wrote_is_seen() -> None:
    model, _ = attention_graph()
    run("clip-softmax{gamma=-0.1}", model)
    (node,) = [node for node in model.graph if node.op_type == "HardSigmoid"]
    chain = [
        ir.node("Mul", [node.inputs[0], _number(model, "a", 1.1)]),
        ir.node("Add", [None, _number(model, "b", -0.1)]),
        ir.node("Clip", [None, _number(model, "zero", 0.0), _number(model, "one", 1.0)]),
    ]
    for first, second in itertools.pairwise(chain):
        second.replace_input_with(0, first.outputs[0])
    model.graph.insert_before(node, chain)
    node.outputs[0].replace_all_uses_with(chain[-1].outputs[0])
    model.graph.remove(node, safe=True)
    told = find_attention(model).blocks[0].probabilities
    assert told is not None
    assert told.clipping is not None
    assert told.clipping.gamma == pytest.approx(-0.1)
    assert told.clipping.zeta == pytest.approx(1)


def _number(model: ir.Model, name: str, number: float) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.float32(number), name=name), shape=ir.Shape([]))
    model.graph.register_initializer(value)
    return value


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("gamma=0.1", "gamma is 0.1"),
        ("gamma=-1", "gamma is -1"),
        ("gamma=-0.1,alpha=2", "both given"),
        ("alpha=-2", "alpha is -2"),
        ("zeta=0.9", "zeta is 0.9"),
        ("length=0", "length is 0"),
        ("gama=-0.1", "gama"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse(f"clip-softmax{{{options}}}")


def test_alpha_as_large_as_the_sequence() -> None:
    model, _ = attention_graph()
    done = run("clip-softmax{alpha=6}", model)
    assert not done.modified
    assert "it would clip all" in done.findings.skipped[0][1]


def test_patterns_and_require() -> None:
    model, _ = attention_graph()
    with pytest.raises(SpecError, match="no layer matches 'attn'"):
        run("clip-softmax{only=[attn]}", model)
    assert not run("clip-softmax{exclude=[attention]}", model).modified
    with pytest.raises(PassFailedError, match="nothing was applied"):
        run("clip-softmax{exclude=[attention],require=some}", model)


def test_random_graphs_have_no_attention() -> None:
    for seed in range(20):
        model = random_model(seed)
        CanonicalizePass()(model)
        assert not run("clip-softmax{gamma=-0.1}", model).modified


# --- with other passes ---


def test_the_range_is_known() -> None:
    model, _ = attention_graph()
    calibration = Calibration.of([seeded_feeds(seed) for seed in range(3)])
    run("clip-softmax{gamma=-0.3}", model)
    (name,) = known_ranges(model)
    Pipeline.parse("simulate-quantization{products=true}").run(model, Context(calibration=calibration))
    quantizer = next(
        node for node in model.graph if node.op_type == "QuantizeLinear" and node.inputs[0].name == name
    )  # type: ignore[union-attr]
    scale, zero = (value.const_value.numpy() for value in quantizer.inputs[1:3])  # type: ignore[union-attr]
    assert float(scale) == float(np.float32(1 / 255))
    assert int(zero) == 0


def test_a_plain_softmax_has_no_known_range() -> None:
    model, _ = attention_graph()
    assert not known_ranges(model)

# SPDX-License-Identifier: Apache-2.0
"""Gated attention gives what the paper's equation gives, and starts as the identity."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from attention_graphs import HEADS, SIZE, Block, attention_graph, numpy_softmax, outputs, seeded_feeds
from random_graphs import random_model
from seeded import parse_graph

from splitfold.passes.attention import find_attention
from splitfold.passes.base import Context, Outcome
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import SpecError
from splitfold.passes.gate_forms import GateKind
from splitfold.passes.identity import LAYERS_KEY
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Optimization, Session

KINDS = [kind.value for kind in GateKind]
FUSED = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
net (float[batch,5,24] x) => (float[batch,5,24] y)
<float[24,24] A = seeded(-0.3, 0.3), float[24,24] B = seeded(-0.3, 0.3), float[24,24] C = seeded(-0.3, 0.3),
 float[24,24] D = seeded(-0.3, 0.3)>
{
  [query] q = MatMul(x, A)
  [key] k = MatMul(x, B)
  [value] v = MatMul(x, C)
  [attention] a = com.microsoft.MultiHeadAttention<num_heads = 3>(q, k, v)
  [out] y = MatMul(a, D)
}
"""

TWICE = FUSED.replace(
    "  [out] y",
    "  [again] b = com.microsoft.MultiHeadAttention<num_heads = 3>(q, k, v)\n  [sum] c = Add(a, b)\n"
    "  [out] y",
).replace("MatMul(a, D)", "MatMul(c, D)")


def run(text: str, model: ir.Model) -> Outcome:
    (step,) = Pipeline.parse(text)
    return step.run(model, Context())


def fill(model: ir.Model, seed: int = 5) -> dict[str, Array]:
    """Give a gate weights that are not zero, and return them."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, value in model.graph.initializers.items():
        if ".gate." in name and name.endswith(("weight", "bias")) and value.const_value is not None:
            array = rng.standard_normal(value.const_value.shape.numpy()).astype(np.float32)
            value.const_value = ir.tensor(array, name=name)
            found[name.removeprefix("attention.gate.")] = array.astype(np.float64)
    return found


def numpy_gate(kind: str, x: Array, weights: dict[str, Array]) -> Array:
    """Return sigmoid(G(x)) as [batch, heads, time, 1]: table 4 of the paper, head by head."""
    logits = []
    for head in range(HEADS):
        own = x[..., head * SIZE : (head + 1) * SIZE]
        if kind == "all-heads":
            found = x @ weights["weight"][:, head] + weights["bias"][head]
        elif kind == "linear":
            found = own @ weights["weight"][head, :, 0] + weights["bias"][head, 0, 0]
        else:
            inner = np.maximum(own @ weights["hidden.weight"][head] + weights["hidden.bias"][head, 0], 0)
            found = inner @ weights["weight"][head, :, 0] + weights["bias"][head, 0, 0]
        logits.append(found)
    return np.asarray(1 / (1 + np.exp(-np.stack(logits, 1))))[..., None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["", ",keep=false", ",init=0.25"])
def test_the_equation(kind: str, options: str) -> None:
    model, block = attention_graph()
    feeds = seeded_feeds()
    done = run(f"gate-attention{{kind={kind}{options}}}", model)
    weights = fill(model)
    count = sum(array.size for array in weights.values())
    assert done.findings.applied == [("attention", f"gated ({kind}): {HEADS} heads, {count} weights")]
    factor = {"": 2.0, ",keep=false": 1.0, ",init=0.25": 4.0}[options]
    gate = factor * numpy_gate(kind, feeds["x"].astype(np.float64), weights)
    expected, _ = block(feeds, numpy_softmax, gate)
    for optimization in Optimization:
        (actual,) = outputs(model, feeds, optimization=optimization)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_weights_is_the_papers(kind: str) -> None:
    model, _ = attention_graph()
    run(f"gate-attention{{kind={kind}}}", model)
    count = sum(array.size for array in fill(model).values())
    hidden = 4
    expected = {
        "linear": HEADS * (SIZE + 1),
        "mlp": HEADS * (hidden * (SIZE + 2) + 1),
        "all-heads": HEADS * (HEADS * SIZE + 1),
    }
    assert count == expected[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_changes_no_bit(kind: str) -> None:
    model, _ = attention_graph()
    feeds = seeded_feeds()
    before = outputs(model, feeds)[0]
    assert run(f"gate-attention{{kind={kind}}}", model).modified
    assert outputs(model, feeds)[0].tobytes() == before.tobytes()


@pytest.mark.parametrize("init", [0.1, 0.25, 0.9])
def test_other_starts_change_no_more_than_rounding(init: float) -> None:
    model, block = attention_graph()
    feeds = seeded_feeds()
    before = outputs(model, feeds)[0]
    scratch = model.clone()
    run(f"gate-attention{{init={init}}}", model)
    np.testing.assert_allclose(outputs(model, feeds)[0], before, rtol=1e-5, atol=1e-6)
    run(f"gate-attention{{init={init},keep=false}}", scratch)
    np.testing.assert_allclose(
        outputs(scratch, feeds)[0], block(feeds, numpy_softmax, init)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_attention_inside_one_operator(kind: str) -> None:
    model = ir.from_proto(parse_graph(FUSED))
    CanonicalizePass()(model)
    feeds: Feeds = {"x": seeded_feeds(keys=5)["x"]}
    before = Session(model, threads=1).run(feeds, taps=["a"])
    plain, context = before["y"], before["a"].astype(np.float64)
    run(f"gate-attention{{kind={kind}}}", model)
    assert Session(model, threads=1).run(feeds)["y"].tobytes() == plain.tobytes()
    gate = 2 * numpy_gate(kind, feeds["x"].astype(np.float64), fill(model))
    gated = context.reshape(2, 5, HEADS, SIZE) * gate.swapaxes(1, 2)
    weight = model.graph.initializers["D"].const_value
    assert weight is not None
    expected = gated.reshape(2, 5, -1) @ weight.numpy().astype(np.float64)
    np.testing.assert_allclose(Session(model, threads=1).run(feeds)["y"], expected, rtol=1e-4, atol=2e-5)
    again = run("gate-attention", model)
    assert again.findings.skipped == [("attention", "gated already")]


def test_a_second_run_finds_the_gate() -> None:
    model, _ = attention_graph()
    run("gate-attention", model)
    (block,) = find_attention(model).blocks
    assert block.gate is not None
    again = run("gate-attention{kind=mlp}", model)
    assert not again.modified
    assert again.findings.skipped == [("attention", "gated already")]


def test_blocks_of_one_name_have_weights_of_their_own() -> None:
    """Equal initializers of one name become one, and would be trained as one."""
    model = ir.from_proto(parse_graph(TWICE))
    CanonicalizePass()(model)
    for node in model.graph:
        if node.op_type == "MultiHeadAttention":
            node.metadata_props[LAYERS_KEY] = '["attention"]'
    assert len(run("gate-attention", model).findings.applied) == 2
    weights = [name for name in model.graph.initializers if name.endswith("gate.weight")]
    assert sorted(weights) == ["attention.1.gate.weight", "attention.gate.weight"]


def test_with_clipped_softmax() -> None:
    model, block = attention_graph()
    feeds = seeded_feeds()
    run("clip-softmax{gamma=-0.2}", model)
    run("gate-attention{keep=false,init=0.25}", model)
    expected, _ = block(feeds, lambda x: np.clip(1.2 * numpy_softmax(x) - 0.2, 0, 1), 0.25)
    np.testing.assert_allclose(outputs(model, feeds)[0], expected, rtol=1e-4, atol=1e-5)
    assert str(find_attention(model).blocks[0]) == "decomposed, 3 heads of 8, mask, gated, clipped"


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("init=0", "init is 0"),
        ("init=1", "init is 1"),
        ("hidden=0", "hidden is 0"),
        ("seed=-1", "seed is -1"),
        ("kind=head", "kind=head"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse(f"gate-attention{{{options}}}")


def test_heads_that_do_not_divide() -> None:
    text = FUSED.replace("5,24] x", "5,25] x").replace("[24,24] A", "[25,24] A")
    text = text.replace("[24,24] B", "[25,24] B").replace("[24,24] C", "[25,24] C")
    model = ir.from_proto(parse_graph(text))
    CanonicalizePass()(model)
    done = run("gate-attention{kind=linear}", model)
    assert not done.modified
    assert "25 wide, which 3 heads do not divide: use kind=all-heads" in done.findings.skipped[0][1]
    assert run("gate-attention", model).modified


def test_fused_beyond_recognition() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
    net (float[b,5,24] q, float[b,5,24] k, float[b,5,24] v) => (float[b,5,24] y)
    { [attention] a = com.microsoft.MultiHeadAttention<num_heads = 3>(q, k, v)
      [out] y = Relu(a) }"""
    model = ir.from_proto(parse_graph(text))
    CanonicalizePass()(model)
    done = run("gate-attention", model)
    assert not done.modified
    ((name, reason),) = done.findings.skipped
    assert name == "attention"
    assert "its own input cannot be told: give a model whose projections are layers of their own" in reason


def test_random_graphs_have_no_attention() -> None:
    for seed in range(20):
        model = random_model(seed)
        CanonicalizePass()(model)
        assert not run("gate-attention", model).modified


def test_block_is_as_the_graph() -> None:
    """The reference itself: without gate it is what the runtime computes."""
    model, block = attention_graph()
    feeds = seeded_feeds()
    assert isinstance(block, Block)
    np.testing.assert_allclose(outputs(model, feeds)[0], block(feeds, numpy_softmax)[0], rtol=1e-4, atol=1e-5)

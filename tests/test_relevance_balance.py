# SPDX-License-Identifier: Apache-2.0
"""Relevance propagation: what is conserved, targets, padding, the text form of rules, and refusals."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="relevance needs the extra 'torch'")

import torch
from lifting import model_of

from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.layers import find_layers
from splitfold.runtime.errors import SplitfoldError, UnsupportedError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.lift import lift
from splitfold.runtime.padding import Padding
from splitfold.runtime.relevance.attention import SoftmaxStop
from splitfold.runtime.relevance.composite import (
    Composite,
    Fallback,
    attention_rules,
    conservative_rules,
    identity_rules,
)
from splitfold.runtime.relevance.conservation import by_layer
from splitfold.runtime.relevance.linear import AlphaBeta, Epsilon, Gamma, LinearRule, ZBox, ZPlus
from splitfold.runtime.relevance.propagate import Relevance, propagate
from splitfold.runtime.relevance.rule import Bias
from splitfold.runtime.relevance.targets import (
    AllLogits,
    EmbeddingNorm,
    NextTokenLogProbability,
    OwnDistance,
    PredictedClass,
    RandomProjection,
    Target,
    UserTarget,
)

HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'
SHARED = Path(__file__).parent.parent.parent / "shared" / "models"


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


def explained(
    model: ir.Model, feeds: Feeds, rules: Composite, target: Target | None = None, *names: str
) -> Relevance:
    return propagate(lift(model), feeds, target=target or AllLogits(), rules=rules, names=names)


# Conservation


def perceptron(seed: int, widths: tuple[int, ...] = (24, 60, 40, 5), *, bias: bool = True) -> ir.Model:
    lines, weights, value = [], {}, "x"
    for index, (rows, columns) in enumerate(itertools.pairwise(widths)):
        weights[f"w{index}"] = normal(rows, columns, seed=seed, scale=rows**-0.5)
        weights[f"b{index}"] = normal(columns, seed=seed, scale=0.3 * bias)
        last = index == len(widths) - 2
        lines.append(f"h{index} = Gemm({value}, w{index}, b{index})")
        lines.append(f"{'y' if last else f'a{index}'} = {'Identity' if last else 'Relu'}(h{index})")
        value = f"a{index}"
    text = f"{HEAD} m (float[n, {widths[0]}] x) => (float[n, {widths[-1]}] y) {{ {' '.join(lines)} }}"
    return model_of(text, **weights)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", [Epsilon(), Gamma(), AlphaBeta(), ZPlus()], ids=str)
def test_perceptrons_conserve(seed: int, rule: LinearRule) -> None:
    """What started arrives at the input or stays in biases; without biases all of it arrives."""
    feeds = {"x": normal(6, 24, seed=seed)}
    for bias in (True, False):
        model = perceptron(seed, bias=bias)
        found = explained(model, feeds, Composite(linear=rule, first=rule), PredictedClass(), "x")
        balance = found.balance
        assert balance.started == pytest.approx(found.values["x"].sum() + balance.absorbed, rel=1e-3)
        assert balance.lost_share < 1e-3
        assert (abs(balance.absorbed) > 1e-3) == bias


def test_alpha_beta_loses_what_has_no_negative_contribution() -> None:
    """A sum of positive terms alone: alpha R is handed out, and nothing takes the - beta R."""
    model = model_of(
        f"{HEAD} m (float[n, 2] x) => (float[n, 1] y) {{ y = MatMul(x, v) }}", v=np.ones((2, 1), np.float32)
    )
    found = explained(model, {"x": np.ones((1, 2), np.float32)}, Composite(first=AlphaBeta(2)))
    assert found.balance.lost == pytest.approx(-2, rel=1e-4)


def attention() -> ir.Model:
    products = " ".join(f"{name} = MatMul(x, w{name})" for name in "qkv")
    text = (
        f"{HEAD} m (float[b, t, 8] x) => (float[b, t, 8] y) {{ {products}"
        " turned = Transpose<perm = [0, 2, 1]>(k) scores = MatMul(q, turned) p = Softmax<axis = -1>(scores)"
        " y = MatMul(p, v) }"
    )
    return model_of(
        text, **{f"w{name}": normal(8, 8, seed=at, scale=8**-0.5) for at, name in enumerate("qkv")}
    )


def test_attention_alone_conserves() -> None:
    """But for softmax's Taylor rule, whose expansion has a constant term."""
    feeds, names = {"x": normal(2, 5, 8)}, ("q", "k", "v")
    fixed = explained(attention(), feeds, conservative_rules(), EmbeddingNorm(), *names)
    assert fixed.balance.arrived == pytest.approx(fixed.balance.started, rel=1e-4)
    assert fixed.balance.absorbed == pytest.approx(0, abs=1e-5)
    assert not fixed.values.get("q", np.zeros(1)).any()
    assert fixed.values["v"].sum() == pytest.approx(fixed.balance.started, rel=1e-4)
    identity = explained(attention(), feeds, identity_rules(), EmbeddingNorm(), *names)
    assert identity.balance.arrived == pytest.approx(identity.balance.started, rel=1e-3)
    taylor = explained(attention(), feeds, attention_rules(), EmbeddingNorm(), *names)
    half = taylor.balance.started / 2
    assert taylor.values["v"].sum() == pytest.approx(half, rel=1e-4)
    assert taylor.values["q"].sum() == pytest.approx(taylor.values["k"].sum(), rel=1e-3)
    rest = sum(float(taylor.values[name].sum()) for name in "qk")
    assert taylor.balance.absorbed == pytest.approx(half - rest, rel=1e-3)
    assert taylor.balance.lost_share < 1e-4


def test_masked_scores_get_nothing() -> None:
    """Also where the mask is minus infinity."""
    text = (
        f"{HEAD} m (float[b, t, 4] x) => (float[b, t, 4] y) {{ turned = Transpose<perm = [0, 2, 1]>(x)"
        " scores = MatMul(x, turned) masked = Add(scores, hidden) p = Softmax<axis = -1>(masked)"
        " y = MatMul(p, x) }"
    )
    hidden = np.triu(np.full((3, 3), -np.inf, np.float32), 1)
    model = model_of(text, hidden=hidden)
    found = explained(model, {"x": normal(2, 3, 4)}, Composite(), EmbeddingNorm(), "scores", "x")
    assert np.isfinite(found.values["x"]).all()
    assert not found.values["scores"][:, hidden != 0].any()
    assert found.values["scores"][:, hidden == 0].any()


@pytest.mark.parametrize(
    ("file", "feeds", "target"),
    [
        ("resnet20_cifar10.onnx", {"input": normal(2, 3, 32, 32)}, PredictedClass()),
        ("mcunet_imagenet.onnx", {"input": normal(1, 3, 176, 176)}, PredictedClass()),
        ("stories260K.onnx", {"ids": np.arange(1, 25).reshape(2, 12)}, NextTokenLogProbability("ids")),
    ],
)
def test_real_models_conserve(file: str, feeds: Feeds, target: Target) -> None:
    """Every layer is reached, and what rules neither pass on nor leave to constants is rounding."""
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    model = ir.load(path)
    CanonicalizePass()(model)
    layers = find_layers(model)[0]
    found = propagate(lift(model), feeds, target=target, names=[layer.output.name or "" for layer in layers])
    assert found.balance.lost_share < 1e-3
    assert all(found.values[layer.output.name or ""].any() for layer in layers)
    flows = by_layer(found.balance)
    assert sum(flow.lost for flow in flows) == pytest.approx(found.balance.lost, abs=1e-4)


# Targets


def test_relevance_starts_as_the_target_where_it_scales_with_the_outputs() -> None:
    model, feeds = perceptron(0), {"x": normal(6, 24)}
    y = lift(model).run(feeds)["y"].detach().numpy()
    for target, expected in (
        (PredictedClass(), y.max(-1).sum()),
        (AllLogits(), y.sum()),
        (EmbeddingNorm(), np.linalg.norm(y, axis=-1).sum()),
        (UserTarget(lambda outputs, given: outputs["y"][:, 2]), y[:, 2].sum()),
    ):
        assert explained(model, feeds, Composite(), target).balance.started == pytest.approx(
            expected, rel=1e-4
        )
    one = explained(model, feeds, Composite(), PredictedClass(), "y").values["y"]
    assert (one != 0).sum() == 6
    assert (one.argmax(-1) == y.argmax(-1)).all() or y.max() <= 0


def test_log_probability_of_the_next_token() -> None:
    logits, tokens = torch.tensor(normal(2, 4, 7)), torch.tensor([[1, 2, 3, 4], [0, 6, 5, 5]])
    found = NextTokenLogProbability("ids").value({"y": logits}, {"ids": tokens})
    expected = [[float(logits[b, t].log_softmax(-1)[tokens[b, t + 1]]) for t in range(3)] for b in range(2)]
    assert found.tolist() == [pytest.approx(row, rel=1e-5) for row in expected]
    with pytest.raises(ValueError, match="no input 'ids'"):
        NextTokenLogProbability("ids").value({"y": logits}, {})
    with pytest.raises(ValueError, match="should be"):
        NextTokenLogProbability("ids").value({"y": logits[0]}, {"ids": tokens})


def test_random_projections_are_new_for_each_batch_and_of_size_one() -> None:
    y = {"y": torch.tensor(normal(4000, 6))}
    first, again, other = (RandomProjection().at(turn).value(y, {}) for turn in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.square().mean()) == pytest.approx(1, rel=0.1)
    assert float(OwnDistance().value(y, {})) == 0


def test_padding_does_not_start_relevance() -> None:
    inputs = "float[b, t, 3] x, int64[b, t] attention_mask"
    model = model_of(f"{HEAD} m ({inputs}) => (float[b, t, 3] y) {{ y = Relu(x) }}")
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    feeds = {"x": np.abs(normal(2, 3, 3)), "attention_mask": mask}
    found = propagate(lift(model), feeds, names=("x",), padding=Padding("attention_mask"))
    assert found.values["x"][mask == 1].all()
    assert not found.values["x"][mask == 0].any()


# Text form, refusals


@pytest.mark.parametrize(
    "rules",
    [
        Composite(),
        conservative_rules(),
        identity_rules(),
        Composite(linear=Gamma(0.1), first=ZBox(0, 1), softmax=SoftmaxStop(), other=Fallback.GRADIENT),
    ],
)
def test_text_form_round_trips(rules: Composite) -> None:
    assert Composite.parse(str(rules)) == rules


def test_text_form_and_its_errors() -> None:
    assert str(Composite(linear=AlphaBeta(1.5), bias=Bias.PASS)) == "linear=alpha-beta(1.5;1e-06),bias=pass"
    for text, words in (
        ("lineer=epsilon", "no rules for 'lineer'. Did you mean 'linear'"),
        ("linear=epsylon", "Did you mean 'epsilon'"),
        ("linear=alpha-beta(0.5)", "alpha is 0.5"),
        ("softmax=taylor(1)", "softmax"),
        ("bias=keep", "There are absorb, pass"),
    ):
        with pytest.raises(SplitfoldError, match=words):
            Composite.parse(text)


def test_an_operator_without_a_rule_is_refused_by_name_or_takes_the_gradient() -> None:
    model = model_of(f"{HEAD} m (float[n, 3, 3] x) => (float[n] y) {{ s = Identity(x) [dets] y = Det(s) }}")
    feeds = {"x": normal(2, 3, 3)}
    whole = UserTarget(lambda outputs, _: outputs["y"])
    with pytest.raises(UnsupportedError, match=r"no rule for the operator Det .*'dets'"):
        explained(model, feeds, Composite(), whole)
    found = explained(model, feeds, Composite(other=Fallback.GRADIENT), whole, "x")
    assert found.values["x"].sum((1, 2)) == pytest.approx(3 * np.linalg.det(feeds["x"]), rel=1e-3)


def test_a_model_without_a_path_is_refused() -> None:
    model = model_of(
        f"{HEAD} m (float[n, 4] x) => (int64[n, 1] y) {{ h = MatMul(x, w) y = ArgMax<axis = -1>(h) }}",
        w=normal(4, 3),
    )
    with pytest.raises(UnsupportedError, match="nothing for relevance or gradients to start from"):
        explained(model, {"x": normal(2, 4)}, Composite())


def test_control_flow_is_refused_whatever_the_rules() -> None:
    model = model_of(
        f"{HEAD} m (float[n, 3] x, bool flag) => (float[n, 3] y) {{ s = Identity(x) [branch] y = If (flag) <"
        "then_branch = t () => (float[n, 3] a) { a = Relu(s) },"
        " else_branch = e () => (float[n, 3] b) { b = Neg(s) }> }"
    )
    feeds = {"x": normal(2, 3), "flag": np.array(True)}
    for other in Fallback:
        with pytest.raises(UnsupportedError, match=r"operator If \(node 'branch'"):
            explained(model, feeds, Composite(other=other))

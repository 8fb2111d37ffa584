# SPDX-License-Identifier: Apache-2.0
"""Relevance propagation: rules by hand, against autograd and captum, fused against written out."""

from __future__ import annotations

import math
import re

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="relevance needs the extra 'torch'")

import torch
from encoder import encoder, token_batches
from lifting import model_of
from torch.nn import functional as F  # noqa: N812

from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.layers import find_layers
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.lift import lift
from splitfold.runtime.relevance.attention import Half, NormDetached, Share
from splitfold.runtime.relevance.composite import (
    Composite,
    attention_rules,
    conservative_rules,
)
from splitfold.runtime.relevance.linear import AlphaBeta, Epsilon, Gamma, LinearRule, ZBox, ZPlus
from splitfold.runtime.relevance.propagate import Relevance, propagate
from splitfold.runtime.relevance.rule import Bias
from splitfold.runtime.relevance.targets import (
    AllLogits,
    EmbeddingNorm,
    PredictedClass,
    Target,
    UserTarget,
)

HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


def explained(
    model: ir.Model, feeds: Feeds, rules: Composite, target: Target | None = None, *names: str
) -> Relevance:
    return propagate(lift(model), feeds, target=target or AllLogits(), rules=rules, names=names)


# By hand


def two_layers(bias: float = 0.0) -> ir.Model:
    return model_of(
        f"{HEAD} m (float[n, 2] x) => (float[n, 1] y)"
        " { h = MatMul(x, w) b = Add(h, c) a = Relu(b) y = MatMul(a, v) }",
        w=np.array([[1, -1], [1, 1]], np.float32),
        c=np.array([bias, 0], np.float32),
        v=np.array([[2], [-1]], np.float32),
    )


FED = {"x": np.array([[1, 2]], np.float32)}


def test_two_layers_by_hand() -> None:
    """h = (3, 1), y = 2 * 3 - 1 = 5. R_h = (6, -1); the 3 is 1 + 2, the 1 is -1 + 2."""
    found = explained(two_layers(), FED, Composite(), None, "x", "h", "y")
    assert found.values["y"].tolist() == [[5]]
    assert found.values["h"] == pytest.approx(np.array([[6, -1]]), rel=1e-5)
    assert found.values["x"] == pytest.approx(np.array([[2 + 1, 4 - 2]]), rel=1e-5)
    assert found.balance.sources == {"input": pytest.approx(5, rel=1e-5)}


def test_a_bias_keeps_its_share_or_is_passed_over() -> None:
    """With 1 added to the first sum, y = 7: of its 8 the bias holds a quarter."""
    kept = explained(two_layers(1), FED, Composite(), None, "x", "h")
    assert kept.values["h"] == pytest.approx(np.array([[8, -1]]), rel=1e-5)
    assert kept.values["x"] == pytest.approx(np.array([[3, 2]]), rel=1e-5)
    assert kept.balance.absorbed == pytest.approx(2, rel=1e-5)
    passed = explained(two_layers(1), FED, Composite(bias=Bias.PASS), None, "x")
    assert passed.values["x"] == pytest.approx(np.array([[8 / 3 + 1, 16 / 3 - 2]]), rel=1e-5)
    assert passed.balance.absorbed == 0


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Epsilon(), (6, -1)),
        (Epsilon(5.0), (3, -0.5)),
        (AlphaBeta(2), (10, -5)),
        (ZPlus(), (5, 0)),
        (Gamma(1), (60 / 11, -5 / 11)),
        (ZBox(0, 4), (5 * 6 / 9, 5 * 3 / 9)),
    ],
    ids=str,
)
def test_linear_rules_by_hand(rule: LinearRule, expected: tuple[float, float]) -> None:
    """y = 2 * 3 - 1 * 1 = 5, to be shared between 6 and -1."""
    model = model_of(
        f"{HEAD} m (float[n, 2] x) => (float[n, 1] y) {{ y = MatMul(x, v) }}",
        v=np.array([[2], [-1]], np.float32),
    )
    feeds = {"x": np.array([[3, 1]], np.float32)}
    found = explained(model, feeds, Composite(first=rule, linear=rule), None, "x")
    assert found.values["x"][0] == pytest.approx(np.array(expected), rel=1e-5)


def test_sums_shares_and_halves_by_hand() -> None:
    """(x + y) * z with 1 + 3 and 2: the product's 8 is halved, the sum's 4 goes 1 : 3."""
    model = model_of(
        f"{HEAD} m (float[1] x, float[1] y, float[1] z) => (float[1] o) {{ s = Add(x, y) o = Mul(s, z) }}"
    )
    feeds = {name: np.array([value], np.float32) for name, value in (("x", 1), ("y", 3), ("z", 2))}
    found = explained(model, feeds, Composite(), UserTarget(lambda outputs, _: outputs["o"]), "x", "y", "z")
    assert [float(found.values[name][0]) for name in "xyz"] == pytest.approx([1, 3, 4], rel=1e-5)


def test_a_value_read_twice_gets_both_relevances() -> None:
    """y = x W1 + x W2 is x (W1 + W2)."""
    text = (
        f"{HEAD} m (float[n, 4] x) => (float[n, 3] y) {{ a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b) }}"
    )
    w, v = normal(4, 3), normal(4, 3, seed=1)
    one = model_of(f"{HEAD} m (float[n, 4] x) => (float[n, 3] y) {{ y = MatMul(x, w) }}", w=w + v)
    feeds = {"x": normal(5, 4)}
    twice = explained(model_of(text, w=w, v=v), feeds, Composite(), None, "x").values["x"]
    assert twice == pytest.approx(
        explained(one, feeds, Composite(), None, "x").values["x"], rel=1e-3, abs=1e-4
    )


# Against autograd: without an epsilon, the epsilon rule is input times gradient with factors detached


class Halved(torch.autograd.Function):
    """A matrix product of which each operand gets half the gradient."""

    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        context.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(
        context: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        a, b = context.saved_tensors  # type: ignore[attr-defined]
        return gradients[0] @ b.transpose(-1, -2) / 2, a.transpose(-1, -2) @ gradients[0] / 2


def reference_encoder(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """One layer of `encoder` with the factors detached that AttnLRP's rules hold fixed; all inner values."""
    found: dict[str, torch.Tensor] = {}

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        found[name] = x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return found[name]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt().detach()
        return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], 2, 8).transpose(1, 2)

    table = weights["embeddings.weight"][ids]
    found["words"] = table
    state, place = norm(table, "embeddings.LayerNorm"), "encoder.layer.0"
    query, key, value = (
        heads(dense(state, f"{place}.attention.self.{part}")) for part in ("query", "key", "value")
    )
    scores = Halved.apply(query, key.transpose(-1, -2)) / math.sqrt(8)
    mixed = Halved.apply(torch.softmax(scores, -1), value).transpose(1, 2).flatten(2)
    first = norm(
        dense(mixed, f"{place}.attention.output.dense") + state, f"{place}.attention.output.LayerNorm"
    )
    inner = dense(first, f"{place}.intermediate.dense")
    gated = inner * (F.gelu(inner) / inner).detach() - 0.1 * inner
    found["y"] = norm(dense(gated, f"{place}.output.dense") + first, f"{place}.output.LayerNorm")
    return found


def test_an_encoder_against_input_times_gradient_with_detached_factors() -> None:
    model = ir.from_proto(encoder(layers=1))
    CanonicalizePass()(model)
    feeds = token_batches(1)[0]
    small = 1e-12
    rules = Composite(linear=Epsilon(small), product=Half(small), norm=NormDetached(small), sum=Share(small))
    lifted = lift(model)
    lifted.module.double()
    layers = {layer.name: layer for layer in find_layers(model)[0]}
    names = {name: layer.output.name or "" for name, layer in layers.items()}
    names["words"] = names.pop("embeddings.word_embeddings")
    weights = {name: value.double() for name, value in lifted.module.state_dict().items()}
    values = reference_encoder(
        {name: value.requires_grad_() for name, value in weights.items()}, torch.as_tensor(feeds["ids"])
    )
    wanted = [name for name in values if name != "y"]
    gradients = torch.autograd.grad(values["y"].norm(dim=-1).sum(), [values[name] for name in wanted])
    found = propagate(lifted, feeds, rules=rules, names=tuple(names.values()))
    for name, gradient in zip(wanted, gradients, strict=True):
        expected = (values[name] * gradient).detach().numpy()
        assert found.values[names[name]] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


# Functions and norms written in single operators

FUSED = {
    "gelu": (
        "y = Gelu(x)",
        "d = Div(x, root) e = Erf(d) f = Add(e, one) h = Mul(x, half) y = Mul(h, f)",
    ),
    "silu": ("y = Swish(x)", "s = Sigmoid(x) y = Mul(s, x)"),
    "rms": (
        "y = RMSNormalization<axis = -1, epsilon = 0.00001>(x, scale)",
        "q = Mul(x, x) m = ReduceMean<keepdims = 1>(q, last) e = Add(m, eps) r = Sqrt(e) i = Reciprocal(r)"
        " n = Mul(x, i) y = Mul(n, scale)",
    ),
    "layer": (
        "y = LayerNormalization<axis = -1>(x, scale, shift)",
        "m = ReduceMean<keepdims = 1>(x, last) c = Sub(x, m) q = Pow(c, two)"
        " v = ReduceMean<keepdims = 1>(q, last) e = Add(v, eps) r = Sqrt(e) n = Div(c, r)"
        " g = Mul(n, scale) y = Add(g, shift)",
    ),
}


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize(
    "rules", [attention_rules(), conservative_rules()], ids=["attention", "conservative"]
)
def test_written_out_and_fused_get_the_same(kind: str, rules: Composite) -> None:
    constants = {
        "root": np.array(2**0.5, np.float32),
        "one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32),
        "two": np.array(2, np.float32),
        "eps": np.array(1e-5, np.float32),
        "last": np.array([-1]),
        "scale": normal(6, seed=2) + 1,
        "shift": normal(6, seed=3),
    }
    head = HEAD.replace("21", "24")
    found = []
    for text in FUSED[kind]:
        read = {name: array for name, array in constants.items() if re.search(rf"\b{name}\b", text)}
        model = model_of(f"{head} m (float[n, 6] x) => (float[n, 6] y) {{ {text} }}", **read)
        found.append(explained(model, {"x": normal(3, 6)}, rules, EmbeddingNorm(), "x"))
    assert found[0].values["x"] == pytest.approx(found[1].values["x"], rel=1e-3, abs=1e-4)
    assert found[0].balance.absorbed == pytest.approx(found[1].balance.absorbed, abs=1e-3)


def test_a_gate_of_another_source_gets_half() -> None:
    """SwiGLU: silu(x W) * (x V)."""
    model = model_of(
        f"{HEAD} m (float[n, 6] x) => (float[n, 6] y)"
        " { g = MatMul(x, w) u = MatMul(x, v) s = Sigmoid(g) a = Mul(g, s) y = Mul(a, u) }",
        w=normal(6, 6),
        v=normal(6, 6, seed=1),
    )
    found = explained(model, {"x": normal(3, 6)}, Composite(), EmbeddingNorm(), "g", "u", "y")
    assert found.values["g"] == pytest.approx(found.values["y"] / 2, rel=1e-5)
    assert found.values["u"] == pytest.approx(found.values["y"] / 2, rel=1e-5)


# Against captum


@pytest.mark.parametrize("name", ["epsilon", "gamma", "alpha1-beta0"])
def test_networks_against_captum(name: str) -> None:
    """A convolution, a ReLU, a pooling and two dense layers, where captum's rules are defined: inputs that
    are not negative."""
    captum = pytest.importorskip("captum.attr", reason="compares with captum")
    lrp = pytest.importorskip("captum.attr._utils.lrp_rules", reason="compares with captum")
    kernel, first, second = normal(4, 2, 3, 3, scale=0.3), normal(16, 6, scale=0.4), normal(6, 3, seed=1)
    second[:, 0] = np.abs(second[:, 0])  # a logit above 0: below it, captum's gamma rule is another one
    bias = np.abs(normal(4, scale=0.1)) * (name != "gamma")  # which it leaves as it is
    module = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AvgPool2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 6, bias=False),
        torch.nn.ReLU(),
        torch.nn.Linear(6, 3, bias=False),
    )
    for layer, array in ((0, kernel), (4, first.T), (6, second.T)):
        module[layer].weight.data = torch.tensor(array)
    module[0].bias.data = torch.tensor(bias)
    made = {
        "epsilon": (lambda: lrp.EpsilonRule(epsilon=1e-6), Epsilon()),
        "gamma": (lambda: lrp.GammaRule(gamma=0.25), Gamma(0.25)),
        "alpha1-beta0": (lambda: lrp.Alpha1_Beta0_Rule(), ZPlus()),
    }[name]
    for at in (0, 4, 6):
        module[at].rule = made[0]()
    for at in (2, 3):
        module[at].rule = lrp.EpsilonRule(epsilon=1e-6)
    x = np.abs(normal(2, 2, 8, 8))
    leaf = torch.tensor(x, requires_grad=True)
    classes = module(leaf).argmax(-1)
    expected = captum.LRP(module).attribute(leaf, target=classes).detach().numpy()
    model = model_of(
        f"{HEAD} m (float[n, 2, 8, 8] x) => (float[n, 3] y) {{ c = Conv<pads = [1, 1, 1, 1]>(x, k, b)"
        " r = Relu(c) p = AveragePool<kernel_shape = [4, 4], strides = [4, 4]>(r) f = Flatten(p)"
        " h = MatMul(f, w) a = Relu(h) y = MatMul(a, v) }",
        k=kernel,
        b=bias,
        w=first,
        v=second,
    )
    rules = Composite(linear=made[1], first=made[1])
    found = explained(model, {"x": x}, rules, PredictedClass(), "x").values["x"]
    assert np.abs(expected).max() > 1e-3
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-3 * float(np.abs(expected).max()))

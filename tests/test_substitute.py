# SPDX-License-Identifier: Apache-2.0
"""`substitute`: the traced module is what the passes make of its ONNX form, and trains as the user's did."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="substituting in a module needs the extra 'torch'")

import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch.nn import functional

from splitfold.compiler import compile, substitute
from splitfold.compiler.errors import CaptureError, SubstitutionError
from splitfold.passes.base import Pass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.clip_softmax import ClipSoftmaxPass
from splitfold.passes.gate_attention import GateAttentionPass, GateKind
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.replace_softmax import ReplaceSoftmaxPass
from splitfold.runtime.session import Session

WIDTH, HEADS, LENGTH = 16, 2, 6
SIMPLER = "canonicalize,fold-clips,simplify-reshapes,merge-transposes,fold-multipliers"


class Attention(nn.Module):
    """Attention in one of the ways that people write it."""

    def __init__(self, way: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.way, self.dropout = way, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], HEADS, WIDTH // HEADS)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        if self.way.startswith("sdpa"):
            seen = torch.arange(x.shape[1]) < x.shape[1] - 1
            mixed = functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=seen[None] if self.way == "sdpa-masked" else None,
                is_causal=self.way == "sdpa-causal",
                dropout_p=self.dropout if self.training else 0.0,
            )
        else:
            scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
            shares = self.softmax(scores) if self.way == "module" else functional.softmax(scores, -1)
            mixed = functional.dropout(shares, self.dropout, self.training) @ v
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


class Net(nn.Module):
    """Some blocks, a norm of each kind, dropout, and a layer that nobody calls."""

    def __init__(self, ways: Sequence[str], dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(way, dropout) for way in ways)
        self.norm, self.batch_norm = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.dropout, self.unused = nn.Dropout(dropout), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.dropout(block(self.norm(x)))
        out: Tensor = self.batch_norm(x.transpose(1, 2))
        return out


def net(ways: Sequence[str] = ("function", "sdpa"), dropout: float = 0.0, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net(ways, dropout)
    with torch.no_grad():
        for block in made.blocks:  # attention that is far from uniform
            block.query.weight *= 4
            block.key.weight *= 4
    return made


def example(seed: int = 1, batch: int = 3) -> tuple[Tensor]:
    return (torch.from_numpy(np.random.default_rng(seed).standard_normal((batch, LENGTH, WIDTH))).float(),)


def spread(module: nn.Module) -> nn.Module:
    """Give what was added weights that are no identity."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".gate." in name and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=random))
    return module


def exported(module: nn.Module) -> ir.Model:
    return compile(copy.deepcopy(module).eval(), example(), pipeline="canonicalize", speed=None).model


def from_module(model: ir.Model, module: nn.Module) -> None:
    """Write the weights of the gates of a module into an ONNX model."""
    for name, tensor in module.named_parameters():
        if ".gate." in name and name in model.graph.initializers:
            model.graph.initializers[name].const_value = ir.tensor(tensor.detach().numpy(), name=name)


def simpler(model: ir.Model) -> ir.Model:
    """Simplify as far as the exporter does, which merges a Reshape with the next, and as the presets do."""
    optimizer.optimize(model)
    Pipeline.parse(SIMPLER).run(model)
    return model


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


CLIP: list[Pass] = [ClipSoftmaxPass(alpha=2.0)]
GATE: list[Pass] = [GateAttentionPass(init=0.25)]
EACH: list[Pass] = [
    GateAttentionPass(kind=GateKind.ALL_HEADS, init=0.25, only=("blocks.0",)),
    GateAttentionPass(kind=GateKind.LINEAR, keep=False, only=("blocks.1",)),
    GateAttentionPass(kind=GateKind.MLP, only=("blocks.2",)),
    ClipSoftmaxPass(gamma=-0.1, zeta=1.1, only=("blocks.2",)),
]
WAYS = ("function", "module", "sdpa", "sdpa-causal", "sdpa-masked")


@pytest.mark.parametrize(("ways", "steps"), [(WAYS, CLIP), (("sdpa", "sdpa-causal", "function"), EACH)])
def test_both_ways_give_the_same_graph(ways: Sequence[str], steps: list[Pass]) -> None:
    module = net(ways)
    made = spread(substitute(module, *steps, example_inputs=example()))
    plain = exported(module)
    by_pass = plain.clone()
    Pipeline.of(*steps).run(by_pass)
    from_module(by_pass, made)
    by_pass, by_module = simpler(by_pass), simpler(exported(made))
    assert operators(by_module) == operators(by_pass)
    feeds = {by_pass.graph.inputs[0].name or "": example(5)[0].numpy()}
    (expected,) = Session(by_pass).run(feeds).values()
    (found,) = Session(by_module).run(feeds).values()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    (other,) = Session(plain).run(feeds).values()
    assert np.abs(other - expected).max() > 1e-2


def test_names_and_weights_are_the_users() -> None:
    module = net()
    made = substitute(module, GateAttentionPass(), example_inputs=example())
    held, state = module.state_dict(), made.state_dict()
    assert set(held) <= set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in held.items())
    new = {name for name, _ in made.named_parameters()} - set(dict(module.named_parameters()))
    assert new == {f"blocks.{at}.gate.{key}" for at in (0, 1) for key in ("weight", "bias")}
    with torch.no_grad():  # with gates that start as the identity
        assert torch.equal(made.eval()(*example(3)), module.eval()(*example(3)))


def test_the_state_of_one_fits_the_next() -> None:
    steps = [ClipSoftmaxPass(alpha=2.0), GateAttentionPass()]
    first = spread(substitute(net(), *steps, example_inputs=example())).eval()
    second = substitute(net(seed=3), *steps, example_inputs=example()).eval()
    assert not torch.allclose(first(*example(3)), second(*example(3)), atol=1e-3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(*example(3)), second(*example(3)))
    absent = second.load_state_dict(net().state_dict(), strict=False)
    assert not absent.unexpected_keys
    assert all(".gate." in key for key in absent.missing_keys)


@pytest.mark.parametrize("steps", [CLIP, GATE])
def test_it_trains_with_its_dropouts_and_norms(steps: list[Pass]) -> None:
    made = substitute(net(dropout=0.3), *steps, example_inputs=example())
    assert made.training
    assert not torch.equal(made(*example()), made(*example()))
    seen = dict(made.named_buffers())["batch_norm.running_mean"].clone()
    before = float((made(*example()) - 1).square().mean().detach())
    descent = torch.optim.SGD(made.parameters(), 0.05)
    for _ in range(5):
        descent.zero_grad()
        (loss := (made(*example()) - 1).square().mean()).backward()
        descent.step()
    lost = {name for name, p in made.named_parameters() if p.requires_grad and p.grad is None}
    assert lost == {"unused.weight", "unused.bias"}
    assert float(loss.detach()) < before
    assert not torch.equal(seen, dict(made.named_buffers())["batch_norm.running_mean"])
    made.eval()
    assert torch.equal(made(*example()), made(*example()))


def test_axes_that_were_dynamic_stay_so() -> None:
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)},)
    steps = [ClipSoftmaxPass(alpha=2.0, length=32), GateAttentionPass(kind=GateKind.LINEAR)]
    made = substitute(net(("sdpa-causal",)), *steps, example_inputs=example(), dynamic_shapes=shapes).eval()
    other = torch.randn(2, 9, WIDTH)
    artifact = compile(made, example(), pipeline="canonicalize", dynamic_shapes=shapes, speed=None)
    (found,) = (
        Session(artifact.model).run({artifact.model.graph.inputs[0].name or "": other.numpy()}).values()
    )
    np.testing.assert_allclose(found, made(other).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_no_key_takes_no_gradient() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(8, 24)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.projection(x).view(2, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return mixed.transpose(1, 2).flatten(2)

    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 2] = False
    inputs = (torch.randn(2, 4, 8), mask)
    made = substitute(Masked(), ClipSoftmaxPass(alpha=1.0), example_inputs=inputs)
    out = made(*inputs)
    assert torch.equal(out[0, 2], torch.zeros(8))
    out.square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in made.parameters() if p.grad is not None)


def test_another_softmax_can_stand_in_its_place() -> None:
    made = substitute(net(), ReplaceSoftmaxPass(), example_inputs=example())
    assert "Softmax" not in operators(exported(made))


def test_gates_read_the_input_of_attention_by_hand() -> None:
    torch.manual_seed(0)
    module, (x,) = Attention("sdpa"), example(2)
    made = spread(substitute(module, *GATE, example_inputs=example()))
    held = {name.rpartition(".")[2]: p for name, p in made.named_parameters() if ".gate." in name}
    gates = torch.sigmoid(x @ held["weight"] + held["bias"]) / 0.25
    module.output = nn.Identity()
    context = module(x).unflatten(-1, (HEADS, -1)) * gates[..., None]
    parts = dict(made.named_parameters())
    expected = context.flatten(2) @ parts["output.weight"].T + parts["output.bias"]
    np.testing.assert_allclose(made.eval()(x).detach(), expected.detach(), rtol=1e-4, atol=1e-5)


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if float(x.sum()) > 0 else x)


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand_like(x) if self.training else x)


class Other(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(3 * x if self.training else x)


@pytest.mark.parametrize(
    ("module", "steps", "error", "words"),
    [
        (Branches(WAYS), CLIP, CaptureError, "as it trains, torch.export cannot trace"),
        (Noisy(WAYS), CLIP, CaptureError, "draws random numbers while it trains"),
        (Other(WAYS), CLIP, CaptureError, "'self.training' decides more than that"),
        (nn.Linear(WIDTH, 4), CLIP, SubstitutionError, "nothing was substituted: it has no attention"),
        (net(), [], SubstitutionError, "there is none"),
        (net(), [CanonicalizePass()], SubstitutionError, "'canonicalize' is exact"),
        ("net", CLIP, CaptureError, "takes a torch module, not str"),
    ],
)
def test_what_cannot_be_substituted_says_why(
    module: nn.Module, steps: list[Pass], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        substitute(module, *steps, example_inputs=example())


def test_sizes_that_change_need_a_length() -> None:
    shapes = ({1: torch.export.Dim("length", max=64)},)
    with pytest.raises(SubstitutionError, match="give length"):
        substitute(net(), ClipSoftmaxPass(alpha=2.0), example_inputs=example(), dynamic_shapes=shapes)

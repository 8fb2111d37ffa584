# SPDX-License-Identifier: Apache-2.0
"""Attention is found, and what is said of it holds, in exports of Hugging Face models and of our examples."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="the architectures need the extra 'torch'")
pytest.importorskip("transformers", reason="the architectures need transformers (extra 'minilm')")

import torch
from attention_models import captured, check_block, draw, scripted, taps_of

from splitfold.compiler.capture import capture_torch
from splitfold.examples.training import char_gpt, small_bert, small_vit
from splitfold.passes.attention import find_attention
from splitfold.passes.attention_block import Attention
from splitfold.passes.base import Context
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.clip_softmax import ClipSoftmaxPass
from splitfold.passes.dims import Dim
from splitfold.passes.gate_attention import GateAttentionPass
from splitfold.passes.symbolic_shapes import symbolic_shapes
from splitfold.runtime.session import Optimization, Session

EXPECTED = {
    "bert": (2, "4 heads of 16, mask"),
    "vit": (2, "4 heads of 16"),
    "deit": (2, "4 heads of 16"),
    "swin": (4, ("2 heads of 16, position bias", "2 heads of 16, mask, position bias")),
    "clip-text": (2, "4 heads of 16, causal"),
    "clip-vision": (2, "4 heads of 16"),
    "opt": (2, "4 heads of 16, causal"),
    "gpt2": (2, "4 heads of 16, causal"),
    "llama": (2, "4 heads (2 of keys and values) of 16, causal, rotary"),
    "whisper-encoder": (2, "4 heads of 16"),
    "t5": (6, ("4 heads of 16, mask, position bias", "4 heads of 16, mask, position bias")),
    "falcon": (2, "4 heads (1 of keys and values) of 16, causal, rotary"),
    "bloom": (2, "4 heads of 16, causal, position bias"),
    "gemma2": (2, "4 heads (2 of keys and values) of 16, causal, rotary"),
    "deberta-v2": (2, "4 heads of 16, mask, content bias"),
}
"""Number of blocks, and what the first ones are."""
FURTHER = ("falcon", "gemma2", "deberta-v2", "bloom")
NONE = ("resnet", "convnext")


def check(model: ir.Model, name: str) -> None:
    report = find_attention(model)
    count, told = EXPECTED[name]
    assert len(report.blocks) == count
    assert not report.misses
    for block, text in zip(report.blocks, (told,) if isinstance(told, str) else told, strict=False):
        # a mask of ones that dynamo writes out for vision models
        assert str(block).replace("of 16, mask", "of 16").endswith(text.replace("of 16, mask", "of 16"))
    held = taps_of(model, draw(name, model), report.blocks)
    for block in report.blocks:
        check_block(block, held)
        assert block.query.input is not None
        assert len(block.query.projections) == 1


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in FURTHER else []) for name in EXPECTED]
)
def test_scripted_exports(name: str) -> None:
    check(scripted(name), name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name != "bert" else []) for name in EXPECTED]
)
def test_captured_exports(name: str) -> None:
    check(captured(name), name)


@pytest.mark.parametrize("name", NONE)
def test_convolutional_networks_have_none(name: str) -> None:
    report = find_attention(scripted(name))
    assert not report.blocks
    assert not report.misses


def test_cross_attention_of_a_decoder() -> None:
    blocks = find_attention(scripted("t5")).blocks
    assert [bool(block.cross) for block in blocks] == [False, False, False, True, False, True]
    assert [block.causal for block in blocks] == [False, False, True, False, True, False]
    assert blocks[3].layout.key_length != blocks[3].layout.query_length


@pytest.mark.slow
def test_windows_and_additive_attention_are_no_misreads() -> None:
    report = find_attention(scripted("swiftformer"))
    assert not report.blocks
    assert len(report.misses) == 4
    report = find_attention(scripted("convbert"))  # its dynamic convolution has a softmax of its own
    assert len(report.blocks) == len(report.misses) == 2


def own(module: object, inputs: tuple[object, ...]) -> tuple[Attention, ...]:
    model = capture_torch(module.eval(), inputs, None).model  # type: ignore[attr-defined]
    CanonicalizePass()(model)
    report = find_attention(model)
    assert not report.misses
    return report.blocks


def test_the_training_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    for example in (char_gpt, small_vit, small_bert):
        monkeypatch.setattr(example, "LAYERS", 2)
    ids = torch.randint(0, 50, (2, 16))
    blocks = own(char_gpt.CharGpt(50), (ids,))
    told = "decomposed, 8 heads (4 of keys and values) of 40, causal, rotary"
    assert [str(block) for block in blocks] == [told] * 2
    blocks = own(small_vit.SmallVit(), (torch.randn(2, 1, 28, 28),))
    assert [str(block) for block in blocks] == ["decomposed, 4 heads of 32"] * 2
    blocks = own(small_bert.SmallBert(50, 4), (ids,))
    assert [str(block) for block in blocks] == ["decomposed, 2 heads of 64, mask"] * 2


# --- the shapes that it rests on ---


@pytest.mark.parametrize("name", ["bert", "llama", "swin"])
def test_symbolic_shapes_are_those_of_a_run(name: str) -> None:
    model = scripted(name)
    shapes = symbolic_shapes(model)
    values = [value for node in model.graph for value in node.outputs if value.name and value.uses()]
    known = {value.name or "": shapes.of(value) for value in values if shapes.of(value) is not None}
    assert len(known) > 0.95 * len(values)
    feeds = draw(name, model)
    held = Session(model, threads=1, optimization=Optimization.OFF, taps=list(known)).run(
        feeds, taps=list(known)
    )
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        for dim, size in zip(shapes.of(value) or (), feeds[value.name or ""].shape, strict=True):
            if dim is not None and dim.symbols:
                sizes[dim.symbols[0]] = size
    checked = 0
    for key, shape in known.items():
        actual = np.asarray(held[key]).shape
        assert shape is not None
        assert len(shape) == len(actual), key
        for dim, size in zip(shape, actual, strict=True):
            if isinstance(dim, Dim) and set(dim.symbols) <= set(sizes):
                checked += 1
                assert dim.factor * np.prod([sizes[s] for s in dim.symbols], dtype=int) == size, key
    assert checked > len(known)


# --- substitutions on them ---


@pytest.mark.parametrize("name", ["bert", "gpt2", "swin", "llama", "t5"])
def test_gates_start_as_the_identity(name: str) -> None:
    model = scripted(name)
    feeds = draw(name, model)
    before = Session(model, threads=1, optimization=Optimization.OFF).run(feeds)
    blocks = find_attention(model).blocks
    done = GateAttentionPass().run(model, Context())
    assert len(done.findings.applied) == len(blocks)
    after = Session(model, threads=1, optimization=Optimization.OFF).run(feeds)
    for key, array in before.items():
        assert after[key].tobytes() == array.tobytes()
    assert not GateAttentionPass().run(model, Context()).modified


@pytest.mark.parametrize("name", ["gpt2", "swin"])
def test_gates_act_on_their_own_positions(name: str) -> None:
    """The context of head h at position t is multiplied with the gate of x at t: read off a run."""
    model = scripted(name)
    feeds = draw(name, model)
    block = find_attention(model).blocks[0]
    GateAttentionPass(keep=False).run(model, Context())
    rng = np.random.default_rng(0)
    for key, value in model.graph.initializers.items():
        if ".gate.weight" in key and value.const_value is not None:
            array = rng.standard_normal(value.const_value.shape.numpy()).astype(np.float32)
            value.const_value = ir.tensor(array, name=key)
    weight = next(v for key, v in model.graph.initializers.items() if ".gate.weight" in key).const_value
    taps = [value.name or "" for value in (block.query.input, block.context) if value is not None]
    taps.append(f"{block.name}.gated")
    held = Session(model, threads=1, optimization=Optimization.OFF, taps=taps).run(feeds, taps=taps)
    x, context, gated = (held[tap] for tap in taps)
    assert weight is not None
    gate = 1 / (1 + np.exp(-(x @ weight.numpy())))
    batch, heads, time, size = context.shape
    expected = context.transpose(0, 2, 1, 3) * gate.reshape(batch, time, heads, 1)
    np.testing.assert_allclose(gated.reshape(batch, time, heads, size), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "swin", "bloom"])
def test_clipping_acts_on_every_block(name: str) -> None:
    model = scripted(name)
    feeds = draw(name, model)
    done = ClipSoftmaxPass(alpha=2, length=20).run(model, Context())
    blocks = find_attention(model).blocks
    assert len(done.findings.applied) == len(blocks)
    taps = [
        value.name or "" for block in blocks if block.probabilities for value in (block.probabilities.read,)
    ]
    held = Session(model, threads=1, optimization=Optimization.OFF, taps=taps).run(feeds, taps=taps)
    for tap in taps:
        assert held[tap].min() == 0
        assert held[tap].max() <= 1
        assert (held[tap] == 0).mean() > 0.05
    assert not ClipSoftmaxPass(alpha=2, length=20).run(model, Context()).modified

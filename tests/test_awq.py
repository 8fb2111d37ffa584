# SPDX-License-Identifier: Apache-2.0
"""AWQ's search against an independent small one, and what its blocks are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph

from splitfold.passes.affine import dequantize_blocks, quantize_blocks
from splitfold.passes.awq import BlockFormat, awq_scales, search_awq
from splitfold.passes.base import Context, Findings
from splitfold.passes.canonicalize import name_all
from splitfold.passes.errors import SpecError
from splitfold.passes.foldable import scale_groups
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.shapes import infer_shapes
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.compare import deviation
from splitfold.runtime.errors import CalibrationError
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

RNG = np.random.default_rng(5)
LOUD = np.where(np.arange(32) % 11 == 0, 20.0, 1.0).astype(np.float32)

LINEAR = """<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 32] x) => (float[batch, 12] y)
<float[32] gamma = seeded(0.1, 2), float[32,12] W = seeded>
{ n = LayerNormalization (x, gamma)
  y = MatMul (n, W) }"""

ATTENTION = """<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, seq, 32] x) => (float[batch, seq, 8] y)
<float[32] gamma = seeded(0.1, 2), float[32,16] Q = seeded, float[32,16] K = seeded, float[32,16] V = seeded,
 float[16,8] O = seeded>
{ n = LayerNormalization (x, gamma)
  q = MatMul (n, Q)
  k = MatMul (n, K)
  v = MatMul (n, V)
  t = Transpose <perm=[0,2,1]> (k)
  s = MatMul (q, t)
  p = Softmax (s)
  c = MatMul (p, v)
  y = MatMul (c, O) }"""


def prepared(text: str) -> ir.Model:
    model = ir.from_proto(parse_graph(text))
    name_all(model, Findings())
    infer_shapes(model)
    return model


def tokens(*shape: int) -> np.ndarray:
    return (RNG.standard_normal((*shape, 32)) * LOUD).astype(np.float32)


def test_scales_by_hand() -> None:
    """Magnitudes (1, 4, 16) at ratio 1/2: (1, 2, 4), over sqrt(4 x 1) = 2."""
    np.testing.assert_allclose(awq_scales(np.array([1.0, 4.0, 16.0]), 0.5), [0.5, 1.0, 2.0], rtol=1e-6)


def test_a_dead_channel_gives_finite_scales() -> None:
    scales = awq_scales(np.array([0.0, 1.0, 2.0]), 1.0)
    assert np.isfinite(scales).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("rows", [40, 5], ids=["more rows than channels", "fewer"])
def test_the_search_of_one_layer_is_a_plain_loop(rows: int) -> None:
    model = prepared(LINEAR)
    batches = [{"x": tokens(rows)} for _ in range(3)]
    group = scale_groups(model)[0]
    weight = group.layers[0].weight_array()
    session = Session(model, optimization=Optimization.OFF)
    inputs = np.concatenate([session.run(feeds, ["n"])["n"] for feeds in batches])
    form = BlockFormat(3, 16, False)
    choice = search_awq(model, [group], batches, form, Target.cpu(), _refused)[group]
    losses = {}
    for step in range(21):
        magnitude = np.maximum(np.abs(inputs).mean(0), 1e-4).astype(np.float64) ** (step / 20)
        scale = (magnitude / np.sqrt(magnitude.max() * magnitude.min())).astype(np.float32)[:, None]
        held = quantize_blocks((weight * scale).T.copy(), bits=4, block=16, symmetric=False, levels=8)
        losses[step / 20] = np.mean((inputs @ (dequantize_blocks(held).T / scale - weight)) ** 2)
    assert choice.ratio == min(losses, key=lambda ratio: losses[ratio])
    assert choice.ratio > 0
    np.testing.assert_allclose([choice.loss, choice.plain], [min(losses.values()), losses[0.0]], rtol=1e-3)
    assert choice.gain_db == pytest.approx(10 * np.log10(losses[0.0] / min(losses.values())), rel=1e-3)


def test_the_loss_of_attention_is_that_of_its_context() -> None:
    """Q, K and V are judged by what attention makes of them, run by hand here."""
    model = prepared(ATTENTION)
    batches = [{"x": tokens(2, 6)} for _ in range(2)]
    group = scale_groups(model)[0]
    assert [layer.output.name for layer in group.layers] == ["q", "k", "v"]
    choice = search_awq(model, [group], batches, BlockFormat(3, 16, False), Target.cpu(), _refused)[group]
    session = Session(model, optimization=Optimization.OFF)
    losses = []
    for feeds in batches:
        n = session.run(feeds, ["n", "c"])
        weights = [_held(layer.weight_array(), np.ones(32, np.float32)) for layer in group.layers]
        losses.append(np.mean((_context(n["n"], *weights) - n["c"]) ** 2))
    assert choice.plain == pytest.approx(np.mean(losses), rel=1e-3)
    assert choice.loss <= choice.plain


def _held(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    held = quantize_blocks((weight * scale[:, None]).T.copy(), bits=4, block=16, symmetric=False, levels=8)
    return dequantize_blocks(held).T / scale[:, None]


def _context(n: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = (n @ q) @ (n @ k).transpose(0, 2, 1)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    return (share / share.sum(-1, keepdims=True)) @ (n @ v)


def _refused(group: object, reason: str) -> None:
    raise AssertionError(reason)


def run(model: ir.Model, text: str, batches: list[dict[str, np.ndarray]]) -> list:
    return Pipeline.parse(text).run(model, Context(calibration=Calibration.of(batches)))


@pytest.mark.parametrize("text", [LINEAR, ATTENTION])
def test_folding_is_exact_and_helps_three_bits(text: str) -> None:
    shape = (40,) if text == LINEAR else (2, 6)
    batches = [{"x": tokens(*shape)} for _ in range(4)]
    found = {}
    for steps in ("canonicalize", "canonicalize,fold-scales{method=awq,bits=3,block=16}"):
        model = prepared(text)
        before = Session(model, optimization=Optimization.OFF).run(batches[0])["y"]
        run(model, steps, batches)
        moved = Session(model, optimization=Optimization.OFF).run(batches[0])["y"]
        np.testing.assert_allclose(moved, before, rtol=1e-3, atol=1e-4)
        run(model, "quantize-weights{bits=3,block=16,accuracy-level=1}", batches)
        found[steps] = deviation([before], [Session(model).run(batches[0])["y"]]).sqnr_db
    plain, folded = found.values()
    assert folded > plain + 0.5


def test_infinities_are_refused_with_the_reason() -> None:
    model = prepared(LINEAR.replace("n = LayerNormalization (x, gamma)", "n = Mul (x, gamma)"))
    batch = tokens(4)
    batch[0, 0] = np.inf
    record = run(model, "fold-scales{method=awq,bits=3,block=16}", [{"x": batch}])[0]
    assert not record.modified
    assert "infinities" in record.skipped[0][1]


def test_without_calibration_data_it_says_so() -> None:
    with pytest.raises(CalibrationError, match="fold-scales"):
        Pipeline.parse("fold-scales{method=awq}").run(prepared(LINEAR))


@pytest.mark.parametrize(
    "text", ["method=awq,alpha=0.5", "share=0.1", "method=dgq,bits=3", "method=repq,bits=9"]
)
def test_options_of_another_method_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"no option of method|bits is 9"):
        Pipeline.parse(f"fold-scales{{{text}}}")

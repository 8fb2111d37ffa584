# SPDX-License-Identifier: Apache-2.0
"""Bias correction: the formula by hand, the order of layers, and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph

from splitfold.passes import bias_correction
from splitfold.passes.base import Context, Outcome
from splitfold.passes.bias_correction import BiasCorrection, shift
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.quantize_activations import QuantizeActivationsPass
from splitfold.passes.static_int8 import StaticForm
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.session import Optimization, Session

CHAIN = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[batch,4,6,6] x) => (float[batch,4,6,6] y)
<float[4,4,3,3] W1 = seeded, float[4] b1 = seeded, float[4,4,3,3] W2 = seeded, float[4] b2 = seeded,
 float[4,4,3,3] W3 = seeded, float[4] b3 = seeded>
{
  [first] a = Conv<pads=[1,1,1,1]>(x, W1, b1)
  [act] r = Relu(a)
  [second] c = Conv<pads=[1,1,1,1]>(r, W2, b2)
  [act2] s = Relu(c)
  [third] e = Conv<pads=[1,1,1,1]>(s, W3, b3)
  [out] y = HardSwish(e)
}
"""
WHOLE = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[batch,4,6,6] x) => (float[batch,4,6,6] z)
<float[4,4,1,1] W = {WEIGHT}, float[4] b = {0, 1, 2, 3}>
{
  [only] y = Conv(x, W, b)
  [sign] z = Sign(y)
}
"""
DENSE = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[batch,5,8] x) => (float[batch,5,8] y)
<float[8,8] W = seeded, float[8] b = seeded>
{
  [dense] h = MatMul(x, W)
  [bias] y = Add(h, b)
}
"""


def model_of(text: str) -> ir.Model:
    model = ir.from_proto(parse_graph(text))
    CanonicalizePass()(model)
    return model


def batches(count: int, seed: int, lowest: float = 2.5) -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(seed)
    return [{"x": draw.uniform(lowest, 3, (4, 4, 6, 6)).astype(np.float32)} for _ in range(count)]


def quantized(model: ir.Model, which: BiasCorrection, data: list[dict[str, np.ndarray]]) -> Outcome:
    step = QuantizeActivationsPass(correct_bias=which, weight_bits=7)
    return step.run(model, Context(calibration=Calibration.of(data)))


def outputs(model: ir.Model, data: list[dict[str, np.ndarray]], tap: str) -> np.ndarray:
    session = Session(model, optimization=Optimization.OFF, taps=[tap])
    return np.concatenate([session.run(feeds, [tap])[tap] for feeds in data]).astype(np.float64)


def test_shift_by_hand() -> None:
    reference = [
        np.array([[[1.0, 3.0], [10.0, 10.0]], [[4.0, 4.0], [9.0, 9.0]]])
    ]  # [2 samples, 2 channels, 2]
    actual = [np.array([[[0.0, 0.0], [9.0, 10.0]], [[0.0, 0.0], [9.0, 10.0]]])]
    assert shift(reference, actual, linear=False) == pytest.approx([3 * (1 - 1 / 9), 0.0])


def test_shift_of_linear_layers_takes_the_last_axis() -> None:
    reference = [np.full((3, 5, 2), [1.0, -2.0])]
    assert shift(reference, [np.zeros((3, 5, 2))], linear=True) == pytest.approx([1.0, -2.0])


def test_one_sample_says_nothing() -> None:
    assert shift([np.ones((1, 2, 3))], [np.zeros((1, 2, 3))], linear=False) == pytest.approx([0.0, 0.0])


def test_means_of_each_layer_come_back() -> None:
    """Also behind corrected layers: what a shift does downstream is counted once."""
    data = batches(4, 1)
    reference, plain, corrected = model_of(CHAIN), model_of(CHAIN), model_of(CHAIN)
    quantized(plain, BiasCorrection.NONE, data)
    outcome = quantized(corrected, BiasCorrection.CONVOLUTIONS, data)
    assert any(note.startswith("biases of 3 layers corrected") for note in outcome.findings.notes)
    for name, low in (("a", "a_int8"), ("c", "c_int8"), ("e", "e_int8")):
        was = outputs(reference, data, name).mean(axis=(0, 2, 3))
        before, after = (
            np.abs(outputs(model, data, low).mean(axis=(0, 2, 3)) - was) for model in (plain, corrected)
        )
        assert after.max() < before.max()
        assert after.mean() < before.mean() / 2


def test_unseen_data_come_nearer() -> None:
    data, unseen = batches(8, 1), batches(8, 2)
    models = [model_of(CHAIN), model_of(CHAIN), model_of(CHAIN)]
    quantized(models[1], BiasCorrection.NONE, data)
    quantized(models[2], BiasCorrection.ALL, data)
    was, plain, corrected = (outputs(model, unseen, "y") for model in models)
    assert np.square(corrected - was).sum() < np.square(plain - was).sum()


def test_what_is_exact_is_left_as_it_is() -> None:
    """Nothing to gain: the model is the one without correction, bit for bit."""
    data = [{"x": np.rint(item["x"] * 85).astype(np.float32)} for item in batches(2, 5, lowest=0.0)]
    data[0]["x"][0, 0, 0, :2] = 0, 255
    one, other = _whole(), _whole()
    step = QuantizeActivationsPass()
    step.run(one, Context(calibration=Calibration.of(data)))
    corrected = QuantizeActivationsPass(correct_bias=BiasCorrection.ALL)
    outcome = corrected.run(other, Context(calibration=Calibration.of(data)))
    assert any(note.startswith("no bias was corrected") for note in outcome.findings.notes)
    assert ir.to_proto(one) == ir.to_proto(other)


@pytest.mark.parametrize("text", [CHAIN, DENSE], ids=["codes", "floats"])
def test_what_comes_no_nearer_is_taken_back_whole(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases that were moved are what they were, bit for bit and by name."""
    shape = (4, 4, 6, 6) if text == CHAIN else (4, 5, 8)
    data = [{"x": np.random.default_rng(7).uniform(2, 3, shape).astype(np.float32)} for _ in range(2)]
    plain, corrected = model_of(text), model_of(text)
    context = Context(calibration=Calibration.of(data))
    QuantizeActivationsPass(form=StaticForm.INTEGER).run(plain, context)
    before_and_after = iter([20.0, 19.0])
    monkeypatch.setattr(bias_correction, "_sqnr", lambda *_: next(before_and_after))
    moves = []
    move = bias_correction._Bias.move
    monkeypatch.setattr(bias_correction._Bias, "move", lambda it, by: moves.append(by) or move(it, by))
    step = QuantizeActivationsPass(form=StaticForm.INTEGER, correct_bias=BiasCorrection.ALL)
    outcome = step.run(corrected, context)
    assert any(np.abs(by).max() > 0 for by in moves)
    assert outcome.findings.notes[-1].startswith("no bias was corrected")
    assert ir.to_proto(plain) == ir.to_proto(corrected)


def _whole() -> ir.Model:
    """One layer of whole weights up to 127: codes hold them as they are."""
    weight = np.random.default_rng(0).integers(-126, 127, (4, 4))
    weight[:, 0] = 127
    return model_of(WHOLE.replace("WEIGHT", ", ".join(map(str, weight.reshape(-1)))))


def test_a_layer_without_bias_is_said() -> None:
    outcome = quantized(model_of(CHAIN.replace(", b2)", ")")), BiasCorrection.CONVOLUTIONS, batches(2, 1))
    missed = {
        layer: reason for layer, pattern, reason in outcome.findings.missed if pattern == "bias correction"
    }
    assert missed == {"second": "it has no constant bias of its own"}


def test_linear_layers_of_the_integer_form() -> None:
    """A bias that MatMulIntegerToFloat takes along is float, and takes the shift whole."""
    model, draw = model_of(DENSE), np.random.default_rng(2)
    reference = model.clone()
    data = [{"x": (draw.normal(size=(8, 5, 8)) + 2).astype(np.float32)} for _ in range(3)]
    step = QuantizeActivationsPass(correct_bias=BiasCorrection.ALL, form=StaticForm.INTEGER)
    outcome = step.run(model, Context(calibration=Calibration.of(data)))
    assert any(note.startswith("biases of 1 layers corrected") for note in outcome.findings.notes)
    was, now = outputs(reference, data, "y"), outputs(model, data, "y")
    plain = reference.clone()
    QuantizeActivationsPass(form=StaticForm.INTEGER).run(plain, Context(calibration=Calibration.of(data)))
    before = outputs(plain, data, "y")
    gap = np.abs((now - was).mean(axis=(0, 1)))
    assert gap.mean() < np.abs((before - was).mean(axis=(0, 1))).mean() / 5

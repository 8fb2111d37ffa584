# SPDX-License-Identifier: Apache-2.0
"""Scale folding against SmoothQuant's own formula, worked by hand, and its exactness in both carriers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from splitfold.passes.base import Context
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.fold_scales import FoldScalesPass
from splitfold.passes.smoothquant import smoothing_scales
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.compare import exactness
from splitfold.runtime.session import Optimization, Session

RNG = np.random.default_rng(0)


def test_equation_four_by_hand() -> None:
    """max|x| = (16, 1), max|W| = (1, 4), alpha = 1/2: s = (4, 1/2), over their geometric mean sqrt(2)."""
    scales = smoothing_scales(np.array([16.0, 1.0], np.float32), np.array([1.0, 4.0], np.float32), 0.5)
    np.testing.assert_allclose(scales, np.array([4.0, 0.5]) / np.sqrt(2.0), rtol=1e-6)


def test_alpha_one_divides_by_the_activations_and_zero_multiplies_by_the_weights() -> None:
    x, w = np.array([2.0, 8.0], np.float32), np.array([1.0, 9.0], np.float32)
    np.testing.assert_allclose(smoothing_scales(x, w, 1.0), [0.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(smoothing_scales(x, w, 0.0), [3.0, 1 / 3], rtol=1e-6)


def test_dead_channels_are_left_alone() -> None:
    scales = smoothing_scales(
        np.array([0.0, 4.0, 1.0], np.float32), np.array([1.0, 1.0, 1.0], np.float32), 0.5
    )
    np.testing.assert_allclose(scales, [1.0, np.sqrt(2.0), np.sqrt(0.5)], rtol=1e-6)


def _model(residual: bool) -> ir.Model:
    """A norm with one loud channel, and two layers that read it; with `residual` an Add reads it too."""
    gamma = np.ones(16, np.float32)
    gamma[3] = 60.0
    tail = "s = Add(a, b) y = Add(s, h)" if residual else "y = Add(a, b)"
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["": 17]> norm (float[n, 16] x) => (float[n, 16] y)
        {{ h = LayerNormalization(x, gamma, beta) a = MatMul(h, A) b = MatMul(h, B) {tail} }}""",
        initializers=[
            ir.tensor(gamma, name="gamma"),
            ir.tensor(np.full(16, 0.1, np.float32), name="beta"),
            ir.tensor(RNG.standard_normal((16, 16)).astype(np.float32), name="A"),
            ir.tensor(RNG.standard_normal((16, 16)).astype(np.float32), name="B"),
        ],
    )
    CanonicalizePass()(model)
    return model


@pytest.mark.parametrize("data_free", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_folding_is_exact_and_evens_out_the_channels(residual: bool, data_free: bool) -> None:
    model, feeds = _model(residual), {"x": RNG.standard_normal((64, 16)).astype(np.float32)}
    before = Session(model, optimization=Optimization.OFF).run(feeds)
    outcome = FoldScalesPass(data_free=data_free).run(model, Context(calibration=Calibration.of([feeds])))
    after = Session(model, optimization=Optimization.OFF).run(feeds)
    assert outcome.modified
    assert exactness(before["y"], after["y"], rtol=1e-5).excess <= 1
    assert sum(node.op_type == "Mul" for node in model.graph) == (1 if residual else 0)
    readers = [node.inputs[0].name or "" for node in model.graph if node.op_type == "MatMul"]  # type: ignore[union-attr]
    assert readers[0] == readers[1]
    seen = Session(model, optimization=Optimization.OFF).run(feeds, readers)[readers[0]]
    peaks = np.abs(seen).max(0)
    assert peaks.max() / np.median(peaks) < 10  # it was about 60


def test_a_second_run_finds_nothing() -> None:
    model, feeds = _model(True), {"x": RNG.standard_normal((64, 16)).astype(np.float32)}
    context = Context(calibration=Calibration.of([feeds]))
    assert FoldScalesPass().run(model, context).modified
    again = FoldScalesPass().run(model, context)
    assert not again.modified
    assert again.findings.skipped


def test_no_gain_no_change() -> None:
    model, feeds = _model(True), {"x": RNG.standard_normal((64, 16)).astype(np.float32)}
    outcome = FoldScalesPass(min_gain=60).run(model, Context(calibration=Calibration.of([feeds])))
    assert not outcome.modified
    assert "below min-gain=60" in outcome.findings.skipped[0][1]

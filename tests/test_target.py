# SPDX-License-Identifier: Apache-2.0
"""A target is data: what it lacks is skipped with a reason, and no pass has to know its name."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from splitfold.passes.base import Context
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.target import Target

BARE = dataclasses.replace(Target.cpu(), name="bare", carriers=frozenset(), slow_fusions=frozenset())
FEEDS = {"x": np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)}


def _model() -> ir.Model:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]> net (float[n, 16] x) => (float[n, 16] y)
        { h = MatMul(x, W) s = Add(h, x) y = LayerNormalization(s, g) }""",
        initializers=[
            ir.tensor(np.eye(16, dtype=np.float32), name="W"),
            ir.tensor(np.ones(16, np.float32), name="g"),
        ],
    )
    CanonicalizePass()(model)
    return model


@pytest.mark.parametrize(
    "text",
    [
        "quantize-activations",
        "quantize-activations{form=integer}",
        "quantize-dynamic",
        "quantize-weights",
        "quantize-weights{form=qdq,block=16}",
        "unfuse-norms",
    ],
)
def test_what_a_target_lacks_is_skipped_with_the_reason(text: str) -> None:
    calibration = Calibration.of([FEEDS])
    (record,) = Pipeline.parse(text).run(_model(), Context(BARE, calibration))
    assert not record.modified
    assert not record.applied
    assert all("target bare" in reason for _, reason in record.skipped)
    assert record.skipped
    (there,) = Pipeline.parse(text).run(_model(), Context(Target.cpu(), calibration))
    assert there.applied


def test_an_opset_beyond_the_target_is_refused() -> None:
    old = dataclasses.replace(Target.cpu(), name="old", opset=16)
    with pytest.raises(
        UnsupportedError, match=r"opset 17, target old runs up to 16: export it with opset 16"
    ):
        Pipeline.parse("legalize").run(_model(), Context(old))


def test_targets_by_name() -> None:
    assert Target.named("cpu") == Target.cpu()
    with pytest.raises(UnsupportedError, match=r"unknown target 'cpuu'\. Did you mean 'cpu'"):
        Target.named("cpuu")

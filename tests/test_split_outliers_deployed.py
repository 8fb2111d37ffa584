# SPDX-License-Identifier: Apache-2.0
"""Outliers apart, as deployed and in every tool."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from test_split_outliers import APART, K, N, batches, graph, planted, ran

from splitfold.compiler import Artifact, Tolerance, compile
from splitfold.compiler.debug.diff import diff
from splitfold.compiler.debug.drift import drift
from splitfold.passes.effective_bits import effective_bits
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.session import Session


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    text = f"split-outliers{{bits=2,block=64,share=0.1}},{APART},quantize-weights{{bits=2,block=64}}"
    return compile(
        planted(), pipeline=text, calibration=batches(), tolerance=Tolerance(cosine=None), reproducers=None
    )


def test_both_parts_run_in_low_bit_kernels_of_bare_onnxruntime(artifact: Artifact, tmp_path: Path) -> None:
    file = artifact.save_model(tmp_path / "model.onnx")
    feeds = batches()[0]
    found = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, dict(feeds))[0]
    reference = Session(planted()).run(feeds)["y"]
    assert np.square(found - reference).sum() < 0.05 * np.square(reference).sum()
    assert artifact.manifest["realised"]["dense"] == {"kernel": "MatMulNBits", "low_bit": True}


def test_drift_names_the_layer_that_both_parts_come_from(artifact: Artifact) -> None:
    points = drift(planted(), artifact.model, batches()[:1]).ranked()
    assert {point.layer for point in points} == {"dense"}


def test_bits_are_those_of_the_layers_weights_outliers_included() -> None:
    model = planted()
    ran(model, "split-outliers{bits=2,block=64,axis=input,share=0.1}", batches())
    (apart,) = ran(model, APART)
    assert apart.notes[0].startswith("10.00 bits a weight")  # 8, and a float scale for 16
    ran(model, "quantize-weights{bits=2,block=64}")
    (found,) = effective_bits(model)
    names = [name for name in model.graph.initializers if not name.endswith("_channels")]
    stored = sum(model.graph.initializers[name].const_value.nbytes for name in names)  # type: ignore[union-attr]
    assert (found.layer, found.weights) == ("dense", K * N)
    assert found.stored == pytest.approx(8 * stored / (K * N))


@pytest.mark.parametrize("axis", ["input", "output"])
def test_both_parts_are_measured_as_one_layer(axis: str) -> None:
    model = graph(
        f"net (float[batch,3,{K}] x) => (float[batch,3,{N}] y) <float[{K},{N}] W = seeded> "
        "{ [dense] y = MatMul(x, W) }"
    )
    data: list[Feeds] = [{"x": feeds["x"][:126].reshape(-1, 3, K)} for feeds in batches(loud=1.0)]
    ran(model, f"split-outliers{{bits=4,axis={axis},share=0.2,min-gain=-50}}", data)
    (record,) = ran(model, "quantize-dynamic{min-sqnr=20}", data)
    assert [layer for layer, _ in record.applied] == ["dense", "dense"]
    assert 30 < record.measured["dense"] < 60


@pytest.mark.parametrize("axis", ["input", "output"])
def test_diff_compares_the_weight_of_both_parts_put_together(axis: str) -> None:
    model = planted()
    ran(model, f"split-outliers{{bits=4,axis={axis},share=0.2,min-gain=-50}}", batches())
    exact = [change.moved for layer in diff(planted(), model).layers for change in layer.tensors]
    assert {moved.max_abs for moved in exact if moved is not None} <= {0.0}
    ran(model, f"{APART},quantize-weights{{bits=4}}")
    (change,) = (
        change
        for layer in diff(planted(), model).layers
        for change in layer.tensors
        if change.moved is not None
    )
    assert change.role == "weight"
    assert change.moved is not None
    assert 18 < change.moved.sqnr_db < 30

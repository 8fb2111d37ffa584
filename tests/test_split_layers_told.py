# SPDX-License-Identifier: Apache-2.0
"""Branches of a split layer are told of as the layer: drift, diff, explain, records, files."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from diffing import only_tensor
from small import mlp, samples

from splitfold.compiler import compile
from splitfold.compiler.debug.diff.graph_diff import diff
from splitfold.compiler.debug.drift.measurement import drift
from splitfold.compiler.debug.explain.explanation import explain
from splitfold.compiler.tolerance import Tolerance
from splitfold.passes.branches import Branch, BranchKind, branches_of
from splitfold.runtime.artifact import Artifact
from splitfold.runtime.model_file import read_model


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    steps = "split-layers,quantize-weights{bits=2,block=16}"
    return compile(mlp(), pipeline=steps, calibration=[{"x": samples()}], tolerance=Tolerance(cosine=0.1))


def test_drift_names_the_layer(artifact: Artifact) -> None:
    points = drift(mlp(), artifact, [{"x": samples()}]).by_layer()
    assert {"encoder.up", "encoder.down"} <= set(points)
    whole = compile(mlp(), pipeline="quantize-weights{bits=2,block=16}", tolerance=Tolerance(cosine=0.1))
    plain = drift(mlp(), whole, [{"x": samples()}]).by_layer()
    for layer in ("encoder.up", "encoder.down"):
        split_point, plain_point = points[layer].local, plain[layer].local
        assert split_point is not None
        assert plain_point is not None
        assert split_point.sqnr_db > plain_point.sqnr_db + 3


@pytest.mark.parametrize(
    "pipeline", ["split-layers,quantize-weights{bits=8,block=16}", "split-activations,quantize-dynamic"]
)
def test_diff_puts_the_weight_together_again(pipeline: str) -> None:
    made = compile(mlp(), pipeline=pipeline, tolerance=Tolerance(cosine=0.9))
    change = only_tensor(diff(ir.from_proto(mlp()), made.model), "encoder.up")
    assert change.moved is not None
    assert change.moved.sqnr_db > 35


def test_explain_counts_each_weight_once(artifact: Artifact) -> None:
    found = explain(artifact)
    (layer,) = found.find("encoder.up")
    assert [weight.branch for weight in layer.weights] == ["part 1 of 3", "part 2 of 3", "part 3 of 3"]
    # 2 bits, a scale of 32 for 16 of them, and two zero points of 2 bits in a byte for 32
    assert layer.bits == pytest.approx(3 * (2 + 32 / 16 + 8 / 32))
    assert found.totals.elements == 32 * 64 + 64 * 8


def test_the_record_counts_each_weight_once(artifact: Artifact) -> None:
    record = artifact.records[2]
    # of 64 inputs four zero points of 2 bits fill a byte
    up, down = 3 * (2 + 2 + 8 / 32), 3 * (2 + 2 + 8 / 64)
    expected = (up * 32 * 64 + down * 64 * 8) / (32 * 64 + 64 * 8)
    assert record.notes[0].startswith(f"{expected:.2f} bits a weight")


def test_branches_survive_the_file(artifact: Artifact, tmp_path: Path) -> None:
    artifact.save(tmp_path / "out")
    model = read_model(tmp_path / "out" / "model.onnx")
    marks = [mark for node in model.graph for mark in branches_of(node.outputs[0])]
    assert marks == [Branch(BranchKind.PART, number, 3) for number in (1, 2, 3)] * 2

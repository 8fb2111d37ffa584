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
from splitfold.passes.branches import (
    Branch,
    BranchKind,
    Part,
    addresses,
    branches_of,
    last_branch,
    layer_pattern,
    value_of_layer,
)
from splitfold.passes.errors import SpecError
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


def test_a_part_has_an_address(tmp_path: Path) -> None:
    steps = (
        "split-layers{only=[encoder.up]},quantize-weights{bits=4,block=16,only=[*:part2]}",
        "quantize-weights{bits=8,block=16}",
    )
    made = compile(mlp(), pipeline=",".join(steps), tolerance=Tolerance(cosine=0.5))
    made.save(tmp_path / "out")
    held = {
        str(branches_of(node.outputs[0])[-1]): node.attributes["bits"].as_int()
        for node in read_model(tmp_path / "out" / "model.onnx").graph
        if node.op_type == "MatMulNBits" and branches_of(node.outputs[0])
    }
    assert held == {"part 1 of 3": 8, "part 2 of 3": 4, "part 3 of 3": 8}


def test_addresses_name_each_split() -> None:
    nested = [Branch(BranchKind.SLICE, 2, 2, Part.OUTLIERS), Branch(BranchKind.CHUNK, 1, 3)]
    assert addresses("a.b", nested) == ("a.b", "a.b:outliers", "a.b:outliers:chunk1")
    patterns = ["*.b:outliers:chunk*", "a.b:part12", "tf/dense:0", "a:rest:b"]
    assert [layer_pattern(it) for it in patterns] == ["*.b", "a.b", "tf/dense:0", "a:rest:b"]
    name = "y [slice 2 of 2: outliers] [chunk 1 of 3]"
    assert last_branch(name) == ("y [slice 2 of 2: outliers]", nested[1])
    assert value_of_layer(name) == "y"


def test_a_part_of_no_layer_is_an_error() -> None:
    with pytest.raises(SpecError, match=r"no layer matches 'encoder\.upp:part2'"):
        compile(mlp(), pipeline="split-layers,quantize-weights{only=[encoder.upp:part2]}")

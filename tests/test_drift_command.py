# SPDX-License-Identifier: Apache-2.0
"""``splitfold drift``: what a user sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Run
from drift_models import attention, changed, copied, quantized_by_onnxruntime, tokens, tower
from small import npz, saved

from splitfold.compiler.debug.drift.measurement import drift


@pytest.fixture
def models(tmp_path: Path) -> None:
    """A tower whose middle layer is off, and data for it, in the current folder of `run`."""
    saved(tower(12), tmp_path / "tower.onnx")
    saved(changed(changed(tower(12), "w4", 1.3), "b7", 1.01), tmp_path / "bent.onnx")
    npz(tmp_path / "rows.npz", x=np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32))


@pytest.mark.usefixtures("models")
def test_the_worst_layer_comes_first_with_its_cause(run: Run) -> None:
    lines = run("drift", "tower.onnx", "bent.onnx", "--data", "rows.npz").stdout.splitlines()
    assert lines[0] == "bent.onnx against tower.onnx over 3 batches of rows.npz"
    assert lines[1].startswith("output 'r11': cosine 0.")
    assert lines[3].split() == [
        "#",
        "layer",
        "operator",
        "local",
        "dB",
        "accum.",
        "dB",
        "cosine",
        "impact",
        "dB",
    ]
    assert lines[5].split()[:3] == ["1", "block.4", "MatMul"]
    assert lines[6].strip() == "it is 1.3 times the reference"
    assert lines[7].split()[:3] == ["2", "block.7", "Add"]
    assert lines[-1].startswith("merely dragged along, no error of their own: ")
    assert lines[-1].endswith("and 3 more")
    assert max(map(len, lines[:-1])) <= 110


@pytest.mark.usefixtures("models")
def test_all_shows_every_value_in_order(run: Run) -> None:
    lines = run("drift", "tower.onnx", "bent.onnx", "--data", "rows.npz", "--all").stdout.splitlines()
    values = [line.split()[2] for line in lines[5:] if line.strip()[:1].isdigit()]
    assert values == [f"{what}{index}" for index in range(12) for what in "mar"]


@pytest.mark.usefixtures("models")
def test_layers_can_be_chosen(run: Run) -> None:
    found = run("drift", "tower.onnx", "bent.onnx", "--layer", "block.4", "--layer", "block.5").stdout
    assert "block.4" in found
    assert "block.7" not in found
    wrong = run("drift", "tower.onnx", "bent.onnx", "--layer", "blok.4", code=1)
    assert "no layer matches 'blok.4'. Did you mean 'block.4'?" in wrong.stderr


@pytest.mark.usefixtures("models")
def test_json_is_what_python_gives(run: Run) -> None:
    text = run("drift", "tower.onnx", "bent.onnx", "--data", "rows.npz", "--json").stdout
    assert json.loads(text) == drift("tower.onnx", "bent.onnx", "rows.npz").to_json()


def test_equal_models_have_no_source(run: Run) -> None:
    found = run("drift", "model.onnx", "model.onnx", "--data", "data.npz").stdout
    assert "output 'y': equal" in found
    assert found.splitlines()[-1] == "no layer is a source of error above float rounding"


def test_an_artifact_meets_its_source(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--calibration", "data.npz")
    found = run("drift", "model.onnx", "out", "--data", "data.npz").stdout
    assert "encoder.down" in found
    assert "rounded to steps of" in found


@pytest.mark.usefixtures("models")
def test_models_of_other_inputs_are_refused(run: Run, tmp_path: Path) -> None:
    other = copied(tower(1))
    other.graph.input[0].name = other.graph.node[0].input[0] = "pixels"
    onnx.save(other, tmp_path / "other.onnx")
    message = run("drift", "tower.onnx", "other.onnx", code=1).stderr
    assert message.startswith("comparison error: the compiled model lacks the input 'x' of the reference")


def test_padding_is_said_and_can_be_kept(run: Run, tmp_path: Path) -> None:
    saved(attention(1), tmp_path / "attention.onnx")
    saved(changed(attention(1), "vw0", 1.1), tmp_path / "bent.onnx")
    npz(tmp_path / "tokens.npz", **tokens())
    command = ("drift", "attention.onnx", "bent.onnx", "--data", "tokens.npz")
    said = "left out: positions where 'attention_mask' is 0 (--padding none keeps them)"
    assert run(*command).stdout.splitlines()[1] == said
    assert said not in run(*command, "--padding", "none").stdout
    assert "no input 'mask'" in run(*command, "--padding", "mask", code=1).stderr


def test_the_collapse_that_a_mask_makes_is_explained(run: Run, tmp_path: Path) -> None:
    """onnxruntime's quantizer with its defaults: the scores and -3.4e38 share one grid."""
    batches = [tokens(seed, batch=8) for seed in range(3)]
    source = saved(attention(), tmp_path / "attention.onnx")
    collapsed = quantized_by_onnxruntime(source, tmp_path / "collapsed.onnx", batches)
    found = drift(source, collapsed, batches)
    assert found.outputs["y2"].cosine < 0.95
    assert found.unmatched == ()
    for point in found.ranked()[:3]:
        assert point.operator == "Softmax"
        assert point.layer.endswith("softmax")
        assert point.note.startswith(
            f"its input 'masked{point.layer[6]}' goes through a grid of step 1.3e+36"
        )
        assert point.impact.relative > 0.1
    npz(tmp_path / "tokens.npz", **batches[0])
    text = run("drift", source, collapsed, "--data", "tokens.npz").stdout
    assert text.count("wider than the values") == 3

# SPDX-License-Identifier: Apache-2.0
"""`splitfold compile` and `splitfold plan` with a drop of a metric."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from command_line import Run
from small import mlp

from splitfold.runtime.session import Session

METRIC = """import numpy as np
X = np.random.default_rng(0).standard_normal((200, 32)).astype(np.float32)
LABELS = None
def right(session):
    global LABELS
    outputs = session.run({"x": X})["y"]
    file = np.load("labels.npy") if LABELS is None else LABELS
    return outputs.argmax(-1) == file
def mean(session):
    return float(right(session).mean())
"""
CHOICES = "assign-precision{choices=[fp32,w8-b16,w2-b16],signal=uniform,error=bits}"


@pytest.fixture
def metrics(run: Run) -> Run:
    Path("judged.py").write_text(METRIC, encoding="utf-8")
    x = np.random.default_rng(0).standard_normal((200, 32)).astype(np.float32)
    np.save("labels.npy", Session(ir.from_proto(mlp())).run({"x": x})["y"].argmax(-1))
    return run


def test_command_compiles_within_a_drop(metrics: Run) -> None:
    options = ["compile", "model.onnx", "-o", "out", "--pipeline", CHOICES, "--evaluate", "judged:right"]
    said = " ".join(metrics(*options, "--max-drop", "0.1", "--cache", "kept").output.split())
    assert "evaluation 2 of at most 20" in said
    assert "search within max_drop = 0.1 of 1: " in said
    assert "95% each" in said
    manifest = json.loads(Path("out/manifest.json").read_text(encoding="utf-8"))
    assert manifest["search"]["met"]
    said = metrics(*options, "--max-drop", "0.1", "--cache", "kept", "--jobs", "2", "--overwrite").output
    assert "(known)" in said
    planned = ["plan", "model.onnx", "--options", CHOICES[17:-1], "--evaluate", "judged:right"]
    said = " ".join(
        metrics(*planned, "--max-drop", "0.1", "--cache", "kept", "-o", "plan.toml").output.split()
    )
    assert "(known)" in said  # the same models as those of compile
    (digest,) = manifest["plans"]
    assert digest in Path("plan.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--max-drop", "0.1"], 2, "give both of them"),
        (["--evaluate", "judged:mean", "--max-drop", "0.1", "--goal", "fast"], 2, "Did you mean 'fastest'"),
        (["--evaluate", "judged:mean", "--max-drop", "0.1", "--confidence", "2"], 2, "between 0.5 and 1"),
        (["--evaluate", "judged:mean", "--max-drop", "0", "--strict", "--limit", "3"], 0, "fp32"),
        (["--evaluate", "judged:nothing", "--max-drop", "0.1"], 1, "nothing"),
    ],
)
def test_command_options(options: list[str], code: int, words: str, metrics: Run) -> None:
    said = metrics("compile", "model.onnx", "-o", "out", "--pipeline", CHOICES, *options, code=code).output
    assert words in " ".join(said.split())


def test_command_fails_where_it_is_strict(metrics: Run) -> None:
    options = ["compile", "model.onnx", "-o", "out", "--evaluate", "judged:mean", "--max-drop", "0"]
    worst = CHOICES.replace("fp32,w8-b16,", "")
    said = metrics(*options, "--pipeline", worst, "--strict", code=1).output
    assert "budget error: no plan keeps the metric: not met" in " ".join(said.split())
    assert not Path("out").exists()
    said = metrics(*options, "--pipeline", worst, "--tolerance", "cosine=none").output
    assert "not met: no model that was tried" in " ".join(said.split())
    assert Path("out/model.onnx").is_file()

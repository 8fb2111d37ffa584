# SPDX-License-Identifier: Apache-2.0
"""The picture of a plan's front, and `splitfold plan`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import Run
from test_assign_precision import DOWN, UP, planning

from splitfold.compiler.plan_picture import front_picture
from splitfold.passes.allocation import Allocation
from splitfold.passes.limits import Limit
from splitfold.passes.plan import read_plan
from splitfold.passes.signals.signal import Basis, Scores


def test_picture_marks_the_plan() -> None:
    plan = planning().allocation.within([Limit.parse("9bits")])
    text = front_picture(planning().allocation, plan, "a < b")
    assert text.startswith("<svg")
    assert "a &lt; b" in text
    assert text.count("<circle") == 1
    assert text == front_picture(planning().allocation, plan, "a < b")


def test_an_empty_plan_has_no_layers() -> None:
    found = planning().allocation
    nothing = Allocation(
        SimpleNamespace(layers=(), choices={}, model=found.subject.model),  # type: ignore[arg-type]
        Scores("none", Basis.ORDER, {}),
        {},
    )
    assert nothing.within([Limit.parse("4bits")]).layers == ()


def test_command_plans_and_compile_carries_it_out(run: Run) -> None:
    said = run(
        "plan",
        "model.onnx",
        "--calibration",
        "data.npz",
        "--options",
        "choices=[w2,w4,w8],budget=[5code-bits]",
        "-o",
        "plan.toml",
        "--picture",
        "front.svg",
    ).output
    assert UP in said
    assert DOWN in said
    assert "Pareto front" in said
    plan = read_plan("plan.toml")
    assert set(plan.precisions) == {UP, DOWN}
    assert Path("front.svg").read_text(encoding="utf-8").startswith("<svg")
    said = run("compile", "model.onnx", "-o", "out", "--pipeline", "assign-precision{plan=plan.toml}").output
    assert "MatMulNBits 2" in said


def test_command_searches_for_a_metric(run: Run) -> None:
    Path("metrics.py").write_text(
        "import numpy as np\n"
        "def size(session):\n"
        "    return -float(np.abs(session.run({'x': np.ones((1, 32), np.float32)})['y']).max() * 0)\n",
        encoding="utf-8",
    )
    options = ["plan", "model.onnx", "--options", "signal=uniform,error=bits", "--evaluate", "metrics:size"]
    said = run(*options, "--max-drop", "0.1").output
    assert "evaluation  2 of at most 20: 3,216 bytes of weights: metric 0, drop 0: kept" in said
    assert "2 w2" in said  # any plan keeps it: the smallest


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--options", "budgt=[3bits]"], 2, "Did you mean 'budget'"),
        (["--options", "plan=x.toml,signal=uniform"], 1, "reads its plan from a file"),
        (["--max-drop", "0.1"], 2, "give both"),
        ([], 1, "calibration"),
        (["--options", "signal=uniform,error=bits", "-o", "no/where.toml"], 1, "no such folder"),
        (
            ["--options", "signal=uniform,error=bits,choices=[w8],budget=[2bits]"],
            1,
            "no plan keeps the budget 2bits",
        ),
    ],
)
def test_command_refuses(options: list[str], code: int, words: str, run: Run) -> None:
    assert words in " ".join(run("plan", "model.onnx", *options, code=code).output.split())

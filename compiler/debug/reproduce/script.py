# SPDX-License-Identifier: Apache-2.0
"""The script of a reproducer: plain Python over the public API."""

from __future__ import annotations

import dataclasses

from splitfold.compiler.debug.reproduce.case import Case
from splitfold.compiler.debug.reproduce.pass_class import PassClass, foreign_classes
from splitfold.compiler.realisation import Unrealised
from splitfold.compiler.tolerance import Tolerance
from splitfold.passes.assign_precision import AssignPrecisionPass

__all__ = ["script_text"]

_SCRIPT = '''\
"""Exits with 1 and the error while this model and pipeline fail, with 0 when they do not."""
{os}import sys
from pathlib import Path

import numpy as np

from splitfold.compiler import {imports}
{passes}
here = Path(__file__).resolve().parent
{plans}pipeline = Pipeline.parse((here / "pipeline.txt").read_text(encoding="utf-8"){table})
{inputs}{calibration}try:
    compile({arguments})
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
print("it does not fail any more")
'''


def script_text(case: Case) -> str:
    """Return a script that runs the case from the files beside it."""
    kinds = [PassClass.of(kind) for kind in foreign_classes(case.steps)]
    arguments = ['here / "model.onnx"', "pipeline=pipeline", *_limits(case), "speed=None", "reproducers=None"]
    imports = ["Pipeline", *(["Tolerance"] if _limits(case) else []), "compile"]
    if case.feeds is not None:
        arguments.insert(1, "inputs")
    if case.batches:
        arguments.append("calibration=batches")
    if case.unrealised is not Unrealised.FLOAT:
        arguments.append(f"unrealised=Unrealised.{case.unrealised.name}")
        imports.insert(-1, "Unrealised")
    plans = any(isinstance(step, AssignPrecisionPass) and step.plan for step in case.steps)
    batches = 'batches = [dict(np.load(file)) for file in sorted(here.glob("calibration-*.npz"))]\n'
    return _SCRIPT.format(
        os="import os\n" if plans else "",
        plans="os.chdir(here)  # the plans that the pipeline names lie here\n" if plans else "",
        imports=", ".join(imports),
        passes="".join(_import_lines(kinds)),
        table=f", (*PASSES, {', '.join(kind.name for kind in kinds)})" if kinds else "",
        inputs='inputs = dict(np.load(here / "inputs.npz"))\n' if case.feeds is not None else "",
        calibration=batches if case.batches else "",
        arguments=", ".join(arguments),
    )


def _limits(case: Case) -> list[str]:
    """Return the argument for the tolerance where it is not the default."""
    default, given = Tolerance(), dataclasses.asdict(case.tolerance)
    other = [f"{name}={value}" for name, value in given.items() if value != getattr(default, name)]
    return [f"tolerance=Tolerance({', '.join(other)})"] if other else []


def _import_lines(kinds: list[PassClass]) -> list[str]:
    lines = ["from splitfold.passes.table import PASSES\n"] if kinds else []
    folders = dict.fromkeys(kind.folder for kind in kinds if kind.folder)
    lines += ["\n"] * bool(folders) + [f"sys.path.insert(0, {folder!r})\n" for folder in folders]
    return lines + [f"from {kind.module} import {kind.name.partition('.')[0]}\n" for kind in kinds]

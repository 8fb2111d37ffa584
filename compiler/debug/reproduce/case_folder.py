# SPDX-License-Identifier: Apache-2.0
"""A failing case as a folder: model, inputs, pipeline, facts, and a script that shows the failure."""

from __future__ import annotations

import dataclasses
import json
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from splitfold.compiler.debug.reproduce.case import Case
from splitfold.compiler.debug.reproduce.pass_class import PassClass, foreign_classes
from splitfold.compiler.debug.reproduce.randomise import SEED
from splitfold.compiler.debug.reproduce.script import script_text
from splitfold.compiler.manifest import versions
from splitfold.compiler.plan_record import copy_plans, with_plans_in
from splitfold.compiler.realisation import Unrealised
from splitfold.compiler.tolerance import Tolerance
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.table import PASSES
from splitfold.runtime.errors import ArtifactError, SplitfoldError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.model_file import MODEL_FILE, read_model, write_model
from splitfold.runtime.target import Target

__all__ = ["FACTS_FILE", "SCRIPT_FILE", "case_facts", "read_case", "read_facts", "write_case", "write_facts"]

FACTS_FILE = "failure.json"
SCRIPT_FILE = "repro.py"
_PIPELINE_FILE = "pipeline.txt"
_INPUTS_FILE = "inputs.npz"
_BATCHES = "calibration-*.npz"
_FORMAT = 1
_NEEDED = {"passes", "pipeline", "signature", "target", "tolerance", "unrealised", "versions"}


def case_facts(case: Case) -> dict[str, Any]:
    """Return, as plain JSON values, what a case holds beyond its files, and the versions it was made with."""
    return {
        "format": _FORMAT,
        "pipeline": str(case.steps),
        "passes": [dataclasses.asdict(PassClass.of(kind)) for kind in foreign_classes(case.steps)],
        "target": case.target.name,
        "tolerance": dataclasses.asdict(case.tolerance),
        "unrealised": case.unrealised.value,
        "seed": SEED,
        "versions": {"python": platform.python_version(), **versions()},
    }


def write_case(folder: Path, case: Case) -> None:
    """Write the files of a case, and the script, into an empty folder.

    Raises:
        ArtifactError: they cannot be written.
    """
    write_model(case.model, folder)
    if case.feeds is not None:
        _write_arrays(folder / _INPUTS_FILE, case.feeds)
    for number, feeds in enumerate(case.batches):
        _write_arrays(folder / _BATCHES.replace("*", f"{number:02}"), feeds)
    steps = copy_plans(case.steps, folder)
    (folder / _PIPELINE_FILE).write_text(f"{steps}\n", encoding="utf-8")
    (folder / SCRIPT_FILE).write_text(script_text(case), encoding="utf-8")


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``failure.json``."""
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    (folder / FACTS_FILE).write_text(f"{text}\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what ``failure.json`` says.

    Raises:
        ArtifactError: there is none, or it is not what `write_facts` writes.
    """
    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} is no reproducer: it has no {FACTS_FILE}.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / FACTS_FILE} cannot be read: {error}.") from error
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT or _NEEDED - set(facts):
        raise ArtifactError(f"{folder / FACTS_FILE} is not of format {_FORMAT}, which this version reads.")
    return facts


def read_case(folder: Path, facts: Mapping[str, Any]) -> Case:
    """Return the case that `write_case` wrote.

    Raises:
        ArtifactError: files are missing or damaged, or a pass of the pipeline cannot be imported.
    """
    try:
        kinds = [PassClass(**item).load() for item in facts["passes"]]
        text = (folder / _PIPELINE_FILE).read_text(encoding="utf-8").strip()
        inputs = folder / _INPUTS_FILE
        return Case(
            read_model(folder / MODEL_FILE),
            _read_arrays(inputs) if inputs.exists() else None,
            tuple(_read_arrays(file) for file in sorted(folder.glob(_BATCHES))),
            with_plans_in(Pipeline.parse(text, (*PASSES, *kinds)), folder.resolve()),
            Target.named(facts["target"]),
            Tolerance(**facts["tolerance"]),
            Unrealised(facts["unrealised"]),
        )
    except SplitfoldError:
        raise
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{folder} is damaged: {type(error).__name__}: {error}.") from error


def _write_arrays(file: Path, arrays: Feeds) -> None:
    """Write an ``.npz``; `numpy.savez` cannot take every name."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            held = array.astype(np.str_) if array.dtype == object else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(held), allow_pickle=False)


def _read_arrays(file: Path) -> dict[str, Array]:
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}

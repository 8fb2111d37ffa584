# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.logging import RichHandler

from splitfold.compiler.cli.group import DEBUG, usage
from splitfold.compiler.cli.output import errors
from splitfold.compiler.debug.snapshots import Snapshots
from splitfold.compiler.driver import Evaluate
from splitfold.compiler.errors import CaptureError
from splitfold.compiler.locate import locate_attribute
from splitfold.compiler.presets import PRESETS, preset
from splitfold.compiler.realisation import Unrealised
from splitfold.compiler.recipe import read_recipe
from splitfold.compiler.tolerance import Tolerance
from splitfold.passes.errors import SpecError
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import ArtifactError, did_you_mean
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import usable
from splitfold.runtime.target import Target

__all__ = [
    "CalibrationOption",
    "DebugOption",
    "InputsOption",
    "PipelineOption",
    "PresetOption",
    "RecipeOption",
    "SnapshotsOption",
    "TargetOption",
    "ToleranceOption",
    "UnrealisedOption",
    "VerboseOption",
    "choose_pipeline",
    "first_feeds",
    "parse_metric",
    "parse_target",
    "parse_tolerance",
    "parse_unrealised",
    "read_inputs",
    "snapshots_in",
]


def _set_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.find_root().meta[DEBUG] = True
    return value


def _set_verbose(value: bool) -> bool:
    if value:
        logger = logging.getLogger("splitfold")
        logger.setLevel(logging.INFO)
        logger.handlers = [RichHandler(console=errors(), show_path=False, markup=False)]
    return value


DebugOption = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=_set_verbose, help="Log each step, and list every skipped layer."
    ),
]
PresetOption = Annotated[
    str | None, typer.Option("--preset", metavar="NAME", help=f"One of {', '.join(PRESETS)} (default: int8).")
]
PipelineOption = Annotated[
    str | None,
    typer.Option(
        "--pipeline", metavar="TEXT", help="Passes as text: 'canonicalize,quantize-weights{bits=4,block=32}'."
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe", metavar="FILE.toml", help='A pipeline in a file: preset = "int8", or [[pass]] tables.'
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="DATA",
        help="Typical inputs: an .npz (keys are input names, first axis = sample), a folder of .npz batches, "
        "or package.module:function that yields batches.",
    ),
]
InputsOption = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        metavar="DATA.npz",
        help="Example inputs, one array by input name: outputs are compared on them.",
    ),
]
SnapshotsOption = Annotated[
    Path | None,
    typer.Option(
        "--snapshots",
        metavar="DIR",
        help="Write the model before the first pass and after each one to DIR: .onnx, text, and the pass's "
        "record as JSON.",
    ),
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="NAME",
        help="Where the artifact is to run: cpu; openvino (openvino-bf16 to let it compute in bfloat16, "
        "openvino-or-cpu to fall back); or a file of calibrate-target: cpu with measured kernels.",
    ),
]
ToleranceOption = Annotated[
    str | None,
    typer.Option(
        "--tolerance",
        metavar="LIMITS",
        help="How far outputs may move: 'cosine=0.99,sqnr=20,max-abs=0.1,top1=0.98' "
        "(default: cosine=0.9; none lifts a limit).",
    ),
]
UnrealisedOption = Annotated[
    str,
    typer.Option(
        "--unrealised",
        metavar="CHOICE",
        help="A low-bit layer that no low-bit kernel computes: back to float (float), "
        "left as it is (keep), or an error (error).",
    ),
]


def choose_pipeline(
    preset_name: str | None, text: str | None, recipe: Path | None, target: Target | None = None
) -> Pipeline:
    """Return the pipeline of whichever of the three options was given; `int8` where none was. Presets are
    those of `target`.

    Raises:
        typer.BadParameter: two were given, or the value is wrong.
    """
    given = [
        name
        for name, value in (("--preset", preset_name), ("--pipeline", text), ("--recipe", recipe))
        if value is not None
    ]
    if len(given) > 1:
        raise typer.BadParameter("give one of them, not both.", param_hint=" / ".join(given))
    if text is not None:
        with usage("--pipeline"):
            return Pipeline.parse(text)
    if recipe is not None:
        with usage("--recipe"):
            return read_recipe(recipe)
    with usage("--preset"):
        return preset(preset_name or "int8", target)


def snapshots_in(
    folder: Path | None, *, model: str | Path, output: Path, overwrite: bool
) -> tuple[Snapshots, ...]:
    """Return the observer of ``--snapshots``, or none.

    Raises:
        typer.BadParameter: the snapshots would take the place of `model`, or `output` that of the snapshots.
        ArtifactError: the folder is not empty and `overwrite` is false.
    """
    if folder is None:
        return ()
    if folder.resolve().is_relative_to(output.resolve()):
        raise typer.BadParameter(
            f"{folder} lies in the output: choose another folder.", param_hint="--snapshots"
        )
    if Path(model).resolve().is_relative_to(folder.resolve()):
        raise typer.BadParameter(
            f"the model lies in {folder}, and its snapshots would replace it: choose another folder.",
            param_hint="--snapshots",
        )
    return (Snapshots(folder, overwrite=overwrite),)


def parse_tolerance(text: str | None) -> Tolerance | None:
    """Return the tolerance of ``--tolerance``, or None."""
    with usage("--tolerance"):
        return None if text is None else Tolerance.parse(text)


def parse_metric(text: str) -> Evaluate:
    """Return the function that ``--evaluate`` names.

    Raises:
        CaptureError: it names no function.
    """
    found = locate_attribute(text) if ":" in text else None
    if not callable(found):
        raise CaptureError(
            f"--evaluate {text} names no function: give package.module:function, a function of a session."
        )
    metric: Evaluate = found
    return metric


def parse_target(name: str) -> Target:
    """Return the target of ``--target``: by name, or the CPU with the kernel costs of a file.

    Raises:
        ProviderError: its provider cannot be used here.
    """
    if name.endswith(".json"):
        return Target.cpu().with_costs(name)
    with usage("--target"):
        target = Target.named(name)
    return usable(target)


def parse_unrealised(word: str) -> Unrealised:
    """Return the choice of ``--unrealised``."""
    words = [choice.value for choice in Unrealised]
    with usage("--unrealised"):
        if word not in words:
            raise SpecError(f"unknown choice '{word}'.{did_you_mean(word, words)} Known: {', '.join(words)}.")
    return Unrealised(word)


def read_inputs(file: Path | None) -> dict[str, Array] | None:
    """Return the arrays of ``--inputs`` by name, or None.

    Raises:
        ArtifactError: no such file, or no ``.npz``.
    """
    if file is None:
        return None
    if not file.is_file():
        raise ArtifactError(f"no such file: {file} (--inputs)")
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        raise ArtifactError(f"{file} (--inputs) is not an .npz of arrays: {error}") from error


def first_feeds(data: Calibration) -> Feeds:
    """Return the first batch of `data`."""
    return next(iter(data))

# SPDX-License-Identifier: Apache-2.0
"""``splitfold replay``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfold.compiler.cli.options import (
    CalibrationOption,
    DebugOption,
    InputsOption,
    VerboseOption,
    read_inputs,
)
from splitfold.compiler.cli.output import errors, out, say
from splitfold.compiler.locate import locate_data, locate_model
from splitfold.compiler.progress import Progress
from splitfold.compiler.replay import Replay, replay
from splitfold.runtime.model_file import check_folder

__all__ = ["replay_command"]


def replay_command(
    artifact: Annotated[str, typer.Argument(metavar="FOLDER|MODEL.onnx", help="What splitfold made.")],
    model: Annotated[
        str, typer.Option("--model", metavar="ORIGINAL", help="What it was made from, as compile takes it.")
    ],
    calibration: CalibrationOption = None,
    inputs: InputsOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Write the rebuilt artifact there.")
    ] = None,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Make an artifact again from its manifest, and say whether the same bytes come out.

    Exits with 1 where they do not.

    \b
    Example:
      splitfold replay out --model model.onnx --calibration images.npz
    """
    if output is not None:
        check_folder(output, overwrite=False)
    source = locate_model(model)
    feeds = read_inputs(inputs)
    with Progress(errors()) as progress:
        found = replay(
            artifact,
            source.model,
            feeds if feeds is not None else source.example_inputs,
            calibration=None if calibration is None else progress.watch(locate_data(calibration)),
            dynamic_shapes=source.dynamic_shapes,
            observers=[progress],
        )
    _print(found, artifact)
    if output is not None:
        found.artifact.save(output)
        say("written", output)
    if not found.same_model:
        raise typer.Exit(1)


def _print(found: Replay, artifact: str) -> None:
    say("pipeline", found.artifact.manifest["pipeline"])
    for warning in found.warnings:
        say("warning", warning)
    say(
        "model",
        "identical: the same graph and the same weights, bit for bit"
        if found.same_model
        else f"DIFFERS from {artifact}",
    )
    if found.same_model:
        say(
            "files",
            "identical, byte for byte"
            if found.same_files
            else "differ, in what the manifest records (see the warnings)",
        )
    else:
        out().print("The versions above, or another kind of processor, are the usual causes.", soft_wrap=True)

# SPDX-License-Identifier: Apache-2.0
"""``splitfold opt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfold.compiler.cli.options import (
    CalibrationOption,
    DebugOption,
    InputsOption,
    SnapshotsOption,
    TargetOption,
    ToleranceOption,
    VerboseOption,
    choose_pipeline,
    parse_target,
    parse_tolerance,
    read_inputs,
    snapshots_in,
)
from splitfold.compiler.cli.output import errors, file_bytes, megabytes, say
from splitfold.compiler.cli.report import print_report, say_snapshots
from splitfold.compiler.cli.reproducer_options import (
    NoReproducerOption,
    ReproducersOption,
    reproducers_in,
)
from splitfold.compiler.driver import compile
from splitfold.compiler.locate import locate_data
from splitfold.compiler.progress import Progress
from splitfold.runtime.model_file import model_path

__all__ = ["opt_command"]


def opt_command(
    model: Annotated[Path, typer.Argument(metavar="IN.onnx", help="The model.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT.onnx", help="The file to write (replaced if there)."),
    ],
    pipeline: Annotated[
        str, typer.Option("--pipeline", metavar="TEXT", help="Passes as text.")
    ] = "canonicalize",
    calibration: CalibrationOption = None,
    inputs: InputsOption = None,
    target: TargetOption = "cpu",
    tolerance: ToleranceOption = None,
    snapshots: SnapshotsOption = None,
    reproducers: ReproducersOption = None,
    no_reproducer: NoReproducerOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Run passes over one .onnx file and write one .onnx file, with the same checks as compile.

    Snapshots that DIR holds already are replaced, like OUT.onnx; other files in it stay. Any snapshot is a
    model to go on from: give the passes that remain.

    \b
    Example:
      splitfold opt model.onnx -o small.onnx --pipeline 'canonicalize,quantize-weights{bits=8,block=64}'
      splitfold opt steps/02-fold-scales.onnx -o small.onnx --pipeline quantize-dynamic
    """
    steps = choose_pipeline(None, pipeline, None)
    place, limits = parse_target(target), parse_tolerance(tolerance)
    failures = reproducers_in(reproducers, no_reproducer)
    if output.suffix != ".onnx":
        raise typer.BadParameter(
            f"{output} does not end in .onnx; compile writes artifact folders.", param_hint="--output"
        )
    taken = snapshots_in(snapshots, model=model, output=output, overwrite=True)
    with Progress(errors()) as progress:
        artifact = compile(
            model,
            read_inputs(inputs),
            pipeline=steps,
            target=place,
            calibration=None if calibration is None else progress.watch(locate_data(calibration)),
            tolerance=limits,
            observers=[progress, *taken],
            speed=None,
            reproducers=failures,
        )
    was = file_bytes(model_path(model))
    print_report(artifact, verbose=verbose)
    written = artifact.save_model(output)
    say("file", f"{megabytes(was)} > {megabytes(file_bytes(written))}")
    say("written", written)
    say_snapshots(taken)

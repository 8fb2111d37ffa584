# SPDX-License-Identifier: Apache-2.0
"""``splitfold compile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfold.compiler.cli.options import (
    CalibrationOption,
    DebugOption,
    InputsOption,
    PipelineOption,
    PresetOption,
    RecipeOption,
    SnapshotsOption,
    TargetOption,
    ToleranceOption,
    UnrealisedOption,
    VerboseOption,
    choose_pipeline,
    parse_target,
    parse_tolerance,
    parse_unrealised,
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
from splitfold.compiler.cli.run_options import ModelArgument
from splitfold.compiler.debug.report import REPORT_FILE, check_report
from splitfold.compiler.driver import compile
from splitfold.compiler.locate import Located, locate_data, locate_model
from splitfold.compiler.progress import Progress
from splitfold.runtime.artifact import Artifact
from splitfold.runtime.model_file import MODEL_FILE, check_folder, model_path

__all__ = ["compile_command"]


OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is in the output folder, and earlier snapshots.")
]
ReportOption = Annotated[
    bool, typer.Option("--report", help="Also write DIR/report.html: what was done, layer by layer.")
]


def compile_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the artifact.")],
    preset: PresetOption = None,
    pipeline: PipelineOption = None,
    recipe: RecipeOption = None,
    calibration: CalibrationOption = None,
    inputs: InputsOption = None,
    target: TargetOption = "cpu",
    tolerance: ToleranceOption = None,
    unrealised: UnrealisedOption = "float",
    snapshots: SnapshotsOption = None,
    overwrite: OverwriteOption = False,
    report: ReportOption = False,
    reproducers: ReproducersOption = None,
    no_reproducer: NoReproducerOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile MODEL into a verified artifact: model.onnx for plain ONNX Runtime, and manifest.json.

    A function package.module:function (the current folder is on the path) returns (module, example_inputs) or
    (module, example_inputs, dynamic_shapes), as torch.export.export takes them.

    Every pass says what it applied and why it skipped the rest. The outputs of the result are compared with
    the model's own, and a result beyond the tolerance is not written.

    \b
    Example:
      splitfold compile resnet.onnx -o out --preset int8 --calibration images.npz --tolerance cosine=0.99
      splitfold compile mypackage.models:small_bert -o out --preset int4
    """
    steps = choose_pipeline(preset, pipeline, recipe)
    place, limits, choice = parse_target(target), parse_tolerance(tolerance), parse_unrealised(unrealised)
    failures = reproducers_in(reproducers, no_reproducer)
    check_folder(output, overwrite=overwrite)
    if report:
        check_report()
    taken = snapshots_in(snapshots, model=model, output=output, overwrite=overwrite)
    source = locate_model(model)
    feeds = read_inputs(inputs)
    with Progress(errors()) as progress:
        artifact = compile(
            source.model,
            feeds if feeds is not None else source.example_inputs,
            pipeline=steps,
            target=place,
            calibration=None if calibration is None else progress.watch(locate_data(calibration)),
            tolerance=limits,
            dynamic_shapes=source.dynamic_shapes,
            observers=[progress, *taken],
            unrealised=choice,
            reproducers=failures,
        )
    print_report(artifact, verbose=verbose)
    artifact.save(output, overwrite=overwrite)
    _print_sizes(artifact, source, output)
    if report:
        say("report", artifact.write_report(output / REPORT_FILE))
    say_snapshots(taken)


def _print_sizes(artifact: Artifact, source: Located, output: Path) -> None:
    before, after = artifact.records[0].bytes_before, artifact.records[-1].bytes_after
    say("weights", f"{megabytes(before)} > {megabytes(after)} ({_percent(after, before)})")
    if isinstance(source.model, Path):
        was, now = file_bytes(model_path(source.model)), file_bytes(output / MODEL_FILE)
        say("file", f"{megabytes(was)} > {megabytes(now)} ({_percent(now, was)})")
    say("written", f"{output / MODEL_FILE} and manifest.json")


def _percent(after: int, before: int) -> str:
    return f"{100 * after / before:.0f} %" if before else "-"

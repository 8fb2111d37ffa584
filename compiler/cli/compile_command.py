# SPDX-License-Identifier: Apache-2.0
"""``splitfold compile``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    parse_metric,
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
from splitfold.compiler.cli.search_options import (
    CONFIDENCE,
    GOAL,
    LIMIT,
    CacheOption,
    ConfidenceOption,
    EvaluateOption,
    GoalOption,
    JobsOption,
    LimitOption,
    MaxDropOption,
    SecondsOption,
    StrictOption,
    TellTrials,
    check_search,
    parse_search,
    say_search,
)
from splitfold.compiler.cli.session_options import (
    OfflineOption,
    SessionOption,
    parse_session,
    say_session,
)
from splitfold.compiler.cli.speed_options import IfSlowerOption, SpeedSecondsOption, parse_speed, say_speed
from splitfold.compiler.compiled import Compiled
from splitfold.compiler.debug.report import REPORT_FILE, check_report
from splitfold.compiler.debug.snapshots import Snapshots
from splitfold.compiler.driver import compile
from splitfold.compiler.locate import Located, locate_data, locate_model
from splitfold.compiler.presets import mixed
from splitfold.compiler.progress import Progress
from splitfold.compiler.tolerance import Budget
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.model_file import MODEL_FILE, check_folder, model_path
from splitfold.runtime.target import Target

__all__ = ["COMPILE_HELP", "compile_command"]


OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is in the output folder, and earlier snapshots.")
]
ReportOption = Annotated[
    bool, typer.Option("--report", help="Also write DIR/report.html: what was done, layer by layer.")
]


COMPILE_HELP = """Compile MODEL into a verified artifact: model.onnx for plain ONNX Runtime, manifest.json.

A function package.module:function (the current folder is on the path) returns (module, example_inputs) or
(module, example_inputs, dynamic_shapes), as torch.export.export takes them.

Every pass says what it applied and why it skipped the rest. The outputs of the result are compared with
the model's own, and a result beyond the tolerance is not written. Its speed is compared with the model's
own too; where it would be slower, layers of a preset go to dynamic int8 or back to float.

With --evaluate and --max-drop the plans of the pipeline's assign-precision are searched for the smallest
model that keeps the metric.

\b
Example:
  splitfold compile resnet.onnx -o out --preset int8 --calibration images.npz --tolerance cosine=0.99
  splitfold compile mypackage.models:small_bert -o out --preset int4
  splitfold compile resnet.onnx -o out --calibration cal.npz --evaluate metrics:correct --max-drop 0.005
"""


@dataclass(frozen=True)
class _Folder:
    """Where the artifact goes, and in which form."""

    path: Path
    overwrite: bool
    report: bool
    offline: bool

    def check(self) -> None:
        """Raise before anything is compiled where the result could not be written."""
        check_folder(self.path, overwrite=self.overwrite)
        if self.report:
            check_report()

    def write(self, artifact: Compiled, source: Located) -> None:
        """Write the artifact and its report, and print their sizes."""
        if self.offline:
            artifact.save_optimized(self.path, overwrite=self.overwrite, feeds=artifact.source.feeds)
        else:
            artifact.save(self.path, overwrite=self.overwrite)
        say_session(artifact.target.options)
        _print_sizes(artifact, source, self.path)
        if self.report:
            say("report", artifact.write_report(self.path / REPORT_FILE))


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
    if_slower: IfSlowerOption = "preset",
    speed_seconds: SpeedSecondsOption = 2.0,
    evaluate: EvaluateOption = None,
    max_drop: MaxDropOption = None,
    goal: GoalOption = GOAL,
    limit: LimitOption = LIMIT,
    seconds: SecondsOption = None,
    confidence: ConfidenceOption = CONFIDENCE,
    cache: CacheOption = None,
    jobs: JobsOption = None,
    strict: StrictOption = False,
    snapshots: SnapshotsOption = None,
    session: SessionOption = None,
    offline_optimized: OfflineOption = False,
    overwrite: OverwriteOption = False,
    report: ReportOption = False,
    reproducers: ReproducersOption = None,
    no_reproducer: NoReproducerOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile MODEL; the command's help is COMPILE_HELP."""
    check_search(evaluate, max_drop, both=False)
    place = parse_target(target).with_options(parse_session(session))
    make = partial(
        compile,
        pipeline=_steps(place, preset, pipeline, recipe, searched=max_drop is not None),
        target=place,
        tolerance=parse_tolerance(tolerance),
        unrealised=parse_unrealised(unrealised),
        evaluate=None if evaluate is None else parse_metric(evaluate),
        budget=Budget(max_drop=max_drop),
        search=parse_search(goal, limit, seconds, confidence, cache, jobs, strict),
        speed=parse_speed(if_slower, speed_seconds),
        reproducers=reproducers_in(reproducers, no_reproducer),
    )
    folder = _Folder(output, overwrite, report, offline_optimized)
    folder.check()
    taken = snapshots_in(snapshots, model=model, output=output, overwrite=overwrite)
    source = locate_model(model)
    artifact = _compiled(make, source, inputs, calibration, taken)
    _print(artifact, verbose=verbose)
    folder.write(artifact, source)
    say_snapshots(taken)


def _steps(
    target: Target, preset: str | None, pipeline: str | None, recipe: Path | None, *, searched: bool
) -> Pipeline:
    """Return the pipeline that was asked for; a search without one mixes precisions."""
    if searched and not any((preset, pipeline, recipe)):
        return mixed()
    return choose_pipeline(preset, pipeline, recipe, target)


def _compiled(
    make: Callable[..., Compiled],
    source: Located,
    inputs: Path | None,
    calibration: str | None,
    taken: tuple[Snapshots, ...],
) -> Compiled:
    """Return what `make`, a compile with its settings, makes of the model, its progress shown."""
    feeds = read_inputs(inputs)
    with Progress(errors()) as progress:
        return make(
            source.model,
            feeds if feeds is not None else source.example_inputs,
            calibration=None if calibration is None else progress.watch(locate_data(calibration)),
            dynamic_shapes=source.dynamic_shapes,
            observers=[progress, TellTrials(), *taken],
        )


def _print(artifact: Compiled, *, verbose: bool) -> None:
    if artifact.search is not None:
        say_search(artifact.search)
    print_report(artifact, verbose=verbose)
    _print_metric(artifact)
    say_speed(artifact.speed, verbose=verbose)


def _print_metric(artifact: Compiled) -> None:
    if (metric := artifact.manifest["metric"]) is not None:
        say("metric", f"{metric['before']:.6g} > {metric['after']:.6g}")


def _print_sizes(artifact: Compiled, source: Located, output: Path) -> None:
    before, after = artifact.records[0].bytes_before, artifact.records[-1].bytes_after
    say("weights", f"{megabytes(before)} > {megabytes(after)} ({_percent(after, before)})")
    if isinstance(source.model, Path):
        was, now = file_bytes(model_path(source.model)), file_bytes(output / MODEL_FILE)
        say("file", f"{megabytes(was)} > {megabytes(now)} ({_percent(now, was)})")
    say("written", f"{output / MODEL_FILE} and manifest.json")


def _percent(after: int, before: int) -> str:
    return f"{100 * after / before:.0f} %" if before else "-"

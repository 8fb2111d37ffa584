# SPDX-License-Identifier: Apache-2.0
"""``splitfold bisect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfold.compiler.cli.bisect_report import print_bisection
from splitfold.compiler.cli.compare_command import DataOption
from splitfold.compiler.cli.options import (
    CalibrationOption,
    DebugOption,
    InputsOption,
    PipelineOption,
    PresetOption,
    RecipeOption,
    TargetOption,
    VerboseOption,
    choose_pipeline,
    parse_metric,
    parse_target,
    parse_tolerance,
    read_inputs,
)
from splitfold.compiler.cli.output import errors, say
from splitfold.compiler.cli.run_options import ModelArgument
from splitfold.compiler.debug.bisect.bisection import bisect
from splitfold.compiler.debug.bisect.judge import Evaluation
from splitfold.compiler.locate import locate_data, locate_model
from splitfold.compiler.recipe import recipe_text
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.errors import ArtifactError

__all__ = ["bisect_command"]


EvaluateOption = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        metavar="package.module:function",
        help="The metric: a function of an opened session that returns a number, more is better.",
    ),
]
DropOption = Annotated[
    float | None, typer.Option("--drop", metavar="NUMBER", help="What the metric may lose (default: 0.01).")
]
LimitsOption = Annotated[
    str | None,
    typer.Option(
        "--tolerance",
        metavar="LIMITS",
        help="With --data: how far outputs may be from MODEL's: 'cosine=0.99,sqnr=20' (default: cosine=0.9).",
    ),
]
WorksOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the pipeline that works: as a recipe (FILE.toml), else as text.",
    ),
]


def bisect_command(
    model: ModelArgument,
    preset: PresetOption = None,
    pipeline: PipelineOption = None,
    recipe: RecipeOption = None,
    evaluate: EvaluateOption = None,
    drop: DropOption = None,
    data: DataOption = None,
    tolerance: LimitsOption = None,
    calibration: CalibrationOption = None,
    inputs: InputsOption = None,
    target: TargetOption = "cpu",
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=3, help="Models to evaluate at most.")
    ] = 200,
    output: WorksOption = None,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the pass and the layers that break a metric, and a pipeline that does not.

    The metric is yours (--evaluate), or how far outputs move on some data (--data).

    \b
    Example:
      splitfold bisect model.onnx --pipeline canonicalize,quantize-activations --calibration cal.npz \\
          --evaluate mypackage.metrics:accuracy --drop 0.01 -o works.toml
      splitfold compile model.onnx -o out --recipe works.toml --calibration cal.npz
    """
    place = parse_target(target)
    steps = choose_pipeline(preset, pipeline, recipe, place)
    limits = parse_tolerance(tolerance)
    _check_options(evaluate, drop, data, tolerance)
    if output is not None and not output.absolute().parent.is_dir():
        raise ArtifactError(f"no such folder: {output.parent} (--output)")
    source, example = locate_model(model), read_inputs(inputs)
    with errors().status("reading") as status:

        def tell(made: Evaluation) -> None:
            status.update(f"evaluation {made.number}: {made.what}")

        found = bisect(
            source.model,
            steps,
            evaluate=None if evaluate is None else parse_metric(evaluate),
            drop=0.01 if drop is None else drop,
            data=None if data is None else locate_data(data),
            tolerance=limits,
            calibration=None if calibration is None else locate_data(calibration),
            example_inputs=example if example is not None else source.example_inputs,
            dynamic_shapes=source.dynamic_shapes,
            target=place,
            limit=limit,
            tell=tell,
        )
    print_bisection(found, limit)
    if found.pipeline is None:
        raise typer.Exit(1)
    if output is not None:
        _write(found.pipeline, output)


def _check_options(evaluate: str | None, drop: float | None, data: str | None, tolerance: str | None) -> None:
    if (evaluate is None) == (data is None):
        raise typer.BadParameter(
            "give one of them: a metric, or data on which outputs are compared.",
            param_hint="--evaluate / --data",
        )
    if tolerance is not None and data is None:
        raise typer.BadParameter(
            "it goes with --data; --evaluate goes with --drop.", param_hint="--tolerance"
        )
    if drop is not None and evaluate is None:
        raise typer.BadParameter(
            "it goes with --evaluate; --data goes with --tolerance.", param_hint="--drop"
        )


def _write(pipeline: Pipeline, output: Path) -> None:
    text = recipe_text(pipeline) if output.suffix == ".toml" else f"{pipeline}\n"
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot write {output}: {error}") from error
    say("written", output)
